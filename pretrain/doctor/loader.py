"""Where the loader's time goes, how many threads are worth it, how well samples are mixed, how much is read twice."""

import os
import resource
import time
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from pretrain.data.augment import choose_box, draw, train_pixels
from pretrain.data.decode import decode_part, open_picture
from pretrain.data.loader import Loader, find_picture, read_captions
from pretrain.data.stages import Rejected
from pretrain.data.supply import BAD_READS, IndexedSupply
from pretrain.data.text import build_tokenizer
from pretrain.doctor.order import ideal_same_shard_rate, read_amplification, same_shard_rate
from pretrain.randomness import generator
from pretrain.world import World

if TYPE_CHECKING:
    from pretrain.train import RunConfig

STAGE_SAMPLES = 256  # that each stage is timed on, in one thread
LEAST_S, LEAST_BATCHES = 3.0, 3  # that each number of threads is timed for
GOOD_ENOUGH = 0.95  # of the best rate: fewer threads that reach it are the better choice
MIXED_SAMPLES = 200_000  # whose shards are looked at
SIMULATED_RANKS = (1, 8, 64)


def examine(config: "RunConfig", world_size: int = 1, threads: list[int] | None = None) -> dict[str, Any]:
    """Measure the loader of one rank of `world_size`, alone on this machine. Rates in samples/s, times in s.

    Raises UserError and ConfigError for data that cannot be used.
    """
    tokenizer = build_tokenizer(config.model.tokenizer, config.model.text.context_length)
    size, batch = config.model.image.image_size, config.train.batch_size
    world = World(0, world_size)
    cores = len(os.sched_getaffinity(0))
    threads = (
        sorted(set(threads))
        if threads
        else sorted({1, *(2**power for power in range(1, 10) if 2**power < cores), cores})
    )

    def make(count: int) -> Loader:
        data = config.data.model_copy(update={"threads": count})
        return Loader(data, tokenizer, size, batch, config.seed, world)

    loader = make(1)
    with tqdm(total=1 + len(threads), desc="doctor loader", unit="step", leave=False, disable=None) as bar:
        stages, bad = time_stages(loader)
        bar.update()
        rates = {}
        for count in threads:
            rates[count] = time_delivery(make(count))
            bar.update()
    report = {
        "cores": cores,
        "rows": loader.rows,
        "stages_s": stages,
        "bad": bad,
        "samples_per_s": rates,
        "threads": next(count for count in threads if rates[count] >= GOOD_ENOUGH * max(rates.values())),
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "ahead_mib": loader.ahead() * loader.batch_bytes() / 2**20,
    }
    if isinstance(loader.supply, IndexedSupply):
        report |= examine_order(loader.supply)
    return report


def time_stages(loader: Loader) -> tuple[dict[str, float], int]:
    """Seconds a sample of each stage, in one thread, and how many samples were bad. Stages follow one another."""
    supply, config = loader.supply, loader.config
    spent = dict.fromkeys(("read", "decode", "crop", "tokenise", "collate"), 0.0)
    clock = time.perf_counter
    supply.open(0, 0)
    try:
        positions = np.arange(STAGE_SAMPLES)
        drawn = supply.draw(positions)
        with suppress(*BAD_READS):
            supply.read(drawn, 0, 0)  # opens files
        captions, pixels, bad = [], [], 0
        for row in range(STAGE_SAMPLES):
            begun = clock()
            try:
                raw = loader.stages(supply.read(drawn, row, 0))
                texts, encoded = read_captions(raw.fields), find_picture(raw.fields)
                read = clock()
                draws = draw(generator(loader.seed, "augment", row))
                picture = open_picture(encoded)
                box = choose_box(picture.height, picture.width, config.augment, draws.crop)
                decode_part(picture, box, loader.image_size)
                decoded = clock()
                augment = generator(loader.seed, "augment", row)
                pixels.append(train_pixels(encoded, loader.image_size, config.augment, augment))
                done = clock()
            except BAD_READS as error:
                bad += not isinstance(error, Rejected)
                continue
            captions.append(texts[0])
            spent["read"] += read - begun
            spent["decode"] += decoded - read
            spent["crop"] += max(0.0, done - decoded - (decoded - read))  # that part decoded once more
        begun = clock()
        loader.tokenizer(captions)
        spent["tokenise"] = clock() - begun
        batch = np.empty((len(pixels), *pixels[0].shape), np.uint8) if pixels else None
        begun = clock()
        for row, image in enumerate(pixels):
            batch[row] = image
        spent["collate"] = clock() - begun
    finally:
        supply.close()
    return {name: seconds / max(1, len(captions)) for name, seconds in spent.items()}, bad


def time_delivery(loader: Loader) -> float:
    """Samples/s that the training thread gets if it does nothing else, once what was decoded ahead is used up."""
    batches = iter(loader)
    next(batches)
    for _ in islice(batches, loader.ahead()):
        pass
    begun, taken = time.perf_counter(), 0
    while taken < LEAST_BATCHES or time.perf_counter() - begun < LEAST_S:
        next(batches)
        taken += 1
    rate = taken * loader.rows / (time.perf_counter() - begun)
    batches.close()
    return rate


def examine_order(supply: IndexedSupply) -> dict[str, Any]:
    """How well the order mixes, and what it reads."""
    order = supply.order
    batches = range(max(1, min(MIXED_SAMPLES, sum(order.samples)) // order.global_batch))
    amplification = {
        name: {
            ranks: read_amplification(order, number, ranks)
            for ranks in SIMULATED_RANKS
            if order.global_batch % ranks == 0
        }
        for number, name in enumerate(supply.names)
    }
    return {
        "streams": order.streams,
        "same_shard_rate": same_shard_rate(order, batches),
        "ideal_same_shard_rate": ideal_same_shard_rate(order),
        "read_amplification": amplification,
    }


def render(report: dict[str, Any]) -> str:
    """The report as a table of at most 80 columns."""
    total = sum(report["stages_s"].values())
    lines = ["one thread, stage by stage    ms/sample  samples/s   share"]
    for name, seconds in report["stages_s"].items():
        rate = f"{1 / seconds:10,.0f}" if seconds else f"{'-':>10}"
        lines.append(f"  {name:<26}{1000 * seconds:11.3f} {rate}{100 * seconds / total:7.0f} %")
    lines += ["", "threads    samples/s delivered    longest wait-free step*"]
    for count, rate in report["samples_per_s"].items():
        mark = "  <- data.threads" if count == report["threads"] else ""
        lines.append(f"{count:7} {rate:22,.0f} {report['rows'] / rate * 1000:20,.0f} ms{mark}")
    slowest = max(report["stages_s"], key=report["stages_s"].get)
    lines += [
        f"* a step of {report['rows']} samples a rank that takes longer than this never waits for data",
        "",
        f"What limits: {slowest}, on {report['cores']} cores.",
        f"Memory: {report['ahead_mib']:,.0f} MiB of batches decoded ahead; {report['peak_memory_gib']:.2f} GiB at most so far.",
    ]
    if report["bad"]:
        lines.append(f"Bad samples: {report['bad']} of the first {STAGE_SAMPLES}.")
    if "streams" in report:
        rate, ideal = report["same_shard_rate"], report["ideal_same_shard_rate"]
        compared = f"{rate / ideal:.2f} times that of the window's ideal" if ideal else "the window's ideal is 0"
        lines += [
            "",
            f"Mixing: {report['streams']} streams; {100 * rate:.2f} % of the pairs in a batch are from one shard, {compared}.",
        ]
        for name, by_ranks in report["read_amplification"].items():
            told = ", ".join(f"{value:.2f} at {ranks} ranks" for ranks, value in by_ranks.items())
            lines.append(f"Whole shards read over those needed, {name}: {told}.")
    return "\n".join(lines)

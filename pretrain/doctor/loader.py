"""Where the loader's time goes, how many threads are worth it, how well samples are mixed, how much is read twice."""

import os
import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from pretrain.config import ConfigError
from pretrain.data.augment import choose_box, draw, train_pixels
from pretrain.data.decode import decode_part, open_picture
from pretrain.data.loader import Batches, Loader, find_picture, read_captions
from pretrain.data.stages import Rejected
from pretrain.data.supply import BAD_READS, IndexedSupply
from pretrain.data.text import build_tokenizer
from pretrain.doctor.order import ideal_same_shard_rate, read_amplification, same_shard_rate
from pretrain.world import World

if TYPE_CHECKING:
    from pretrain.train import RunConfig

STAGE_SAMPLES = 256  # that each stage is timed on, in one thread
LEAST_S, LEAST_BATCHES = 3.0, 3  # that each number of threads is timed for
LITTLE_WAIT = 0.01  # of a step: no longer worth speaking of
GOOD_ENOUGH = 0.95  # of the best rate: fewer threads that reach it are the better choice
MIXED_SAMPLES = 200_000  # whose shards are looked at
SIMULATED_RANKS = (1, 8, 64)


def examine(
    config: "RunConfig",
    world_size: int = 1,
    threads: list[int] | None = None,
    step_s: float = 0.0,
    ranks_per_node: int = 1,
) -> dict[str, Any]:
    """Measure the loader of one rank of `world_size`, alone on its share of this machine. Rates in samples/s, times in s.

    Its share is a rank's of `ranks_per_node`: so many processors less are used, whatever else runs. `step_s` is what a training
    step takes without its data. Raises UserError and ConfigError for data that cannot be used.
    """
    tokenizer = build_tokenizer(config.model.tokenizer, config.model.text.context_length)
    size, batch = config.model.image.image_size, config.train.batch_size
    world = World(0, world_size)
    with take_share(ranks_per_node) as cores:
        threads = (
            sorted(set(threads))
            if threads
            else sorted({1, *(2**power for power in range(1, 10) if 2**power < cores), cores})
        )

        def make(count: int) -> Loader:
            data = config.data.model_copy(update={"threads": count})
            return Loader(data, tokenizer, size, batch, config.seed, world)

        loader = make(1)
        with tqdm(total=2 + len(threads), desc="doctor loader", unit="step", leave=False, disable=None) as bar:
            stages, bad = time_stages(loader)
            bar.update()
            rates = {}
            for count in threads:
                rates[count] = time_delivery(make(count))
                bar.update()
            best = next(count for count in threads if rates[count] >= GOOD_ENOUGH * max(rates.values()))
            stages["wait"] = time_wait(make(best), step_s) / loader.rows
            bar.update()
    report = {
        "cores": cores,
        "ranks_per_node": ranks_per_node,
        "rows": loader.rows,
        "step_s": step_s,
        "stages_s": stages,
        "bad": bad,
        "samples_per_s": rates,
        "threads": best,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "node_memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "ahead_mib": loader.ahead() * loader.batch_bytes() / 2**20,
    }
    if isinstance(loader.supply, IndexedSupply):
        report |= examine_order(loader.supply)
    return report


@contextmanager
def take_share(ranks_per_node: int) -> Iterator[int]:
    """Keep this process to one rank's share of its processors, of which there are so many. Raises ConfigError for too many
    ranks."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // ranks_per_node
    if not share:
        raise ConfigError(f"--ranks-per-node: {ranks_per_node} ranks are more than the {len(cores)} processors here")
    os.sched_setaffinity(0, cores[:share])
    try:
        yield share
    finally:
        os.sched_setaffinity(0, cores)


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
        all_draws = draw(loader.seed, positions)
        for row in range(STAGE_SAMPLES):
            begun = clock()
            try:
                raw = loader.stages(supply.read(drawn, row, 0))
                texts, encoded = read_captions(raw.fields), find_picture(raw.fields)
                read = clock()
                picture = open_picture(encoded)
                box = choose_box(picture.height, picture.width, config.augment, all_draws[row].crop)
                decode_part(picture, box, loader.image_size)
                decoded = clock()
                pixels.append(train_pixels(encoded, loader.image_size, config.augment, all_draws[row]))
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
    with use_up_ahead(loader) as batches:
        begun, taken = time.perf_counter(), 0
        while taken < LEAST_BATCHES or time.perf_counter() - begun < LEAST_S:
            next(batches)
            taken += 1
        return taken * loader.rows / (time.perf_counter() - begun)


def time_wait(loader: Loader, step_s: float) -> float:
    """Seconds of a step that the training thread waits, where all else of it takes `step_s`: the median, as the first ones wait
    for what was used up."""
    waits: list[float] = []
    with use_up_ahead(loader) as batches:
        begun = time.perf_counter()
        while len(waits) < LEAST_BATCHES or time.perf_counter() - begun < LEAST_S:
            time.sleep(step_s)
            asked = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - asked)
    return statistics.median(waits)


@contextmanager
def use_up_ahead(loader: Loader) -> Iterator[Batches]:
    """The loader's batches from where nothing more is ready that was decoded while nobody asked for it."""
    with closing(iter(loader)) as batches:
        for _ in islice(batches, 1 + loader.ahead()):
            pass
        yield batches


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


def find_limit(report: dict[str, Any]) -> str:
    """What has to change for the training thread to wait less."""
    stages = {name: seconds for name, seconds in report["stages_s"].items() if name != "wait"}
    slowest, wait_s = max(stages, key=stages.get), report["stages_s"]["wait"] * report["rows"]
    if wait_s <= LITTLE_WAIT * report["step_s"]:
        return f"the step, not the loader (of which most is {slowest})"
    if slowest == "read":
        return "read: the disk or the store, not the processors; more threads read more at once"
    return f"{slowest}, on {report['cores']} processor{'s' * (report['cores'] > 1)} a rank"


def describe_memory(report: dict[str, Any]) -> str:
    """What this rank takes, and all of a node."""
    peak, ranks = report["peak_memory_gib"], report["ranks_per_node"]
    told = f"Memory: {report['ahead_mib']:,.0f} MiB of batches decoded ahead; {peak:.2f} GiB at most so far"
    if ranks == 1:
        return f"{told}."
    node = report["node_memory_gib"]
    return f"{told}, {ranks * peak:.1f} of {node:.0f} GiB by {ranks} ranks."


def render(report: dict[str, Any]) -> str:
    """The report as a table of at most 80 columns."""
    stages, rows, step_s = dict(report["stages_s"]), report["rows"], report["step_s"]
    wait_s = stages.pop("wait") * rows
    total = sum(stages.values())
    lines = ["one thread, stage by stage    ms/sample  samples/s   share"]
    for name, seconds in stages.items():
        rate = f"{1 / seconds:10,.0f}" if seconds else f"{'-':>10}"
        lines.append(f"  {name:<26}{1000 * seconds:11.3f} {rate}{100 * seconds / total:7.0f} %")
    lines += ["", "threads    samples/s delivered    longest wait-free step*"]
    for count, rate in report["samples_per_s"].items():
        mark = "  <- data.threads" if count == report["threads"] else ""
        lines.append(f"{count:7} {rate:22,.0f} {rows / rate * 1000:20,.0f} ms{mark}")
    lines += [
        f"* a step of {rows} samples a rank that takes longer than this never waits for data",
        "",
        f"wait: {1000 * wait_s:,.1f} ms a step of {1000 * step_s:,.0f} ms, {100 * wait_s / (wait_s + step_s or 1):.0f} % of the "
        f"whole, with {report['threads']} threads.",
        f"What limits: {find_limit(report)}.",
        describe_memory(report),
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

"""How fast batches reach the training thread: our loader beside open_clip's pipeline and plain webdataset, equal cores.

    python benchmarks/loader.py --images originals/images

All read the same shards, built here from the pictures as they are and shrunk to 256 px, and all crop them alike:
RandomResizedCrop(224, scale (0.9, 1.0)), bicubic.

ours       `Loader` with a decoding thread a core; uint8, captions tokenised
open_clip  its own get_wds_dataset with its own transform and tokeniser, a DataLoader worker a core; float32, normalised
plain      webdataset and torchvision's v2 transforms as its documentation puts them, a DataLoader worker a core; float32
decode     simplejpeg alone on encoded pictures in memory, a thread a core: no reading, no crop, no batch

Ours leaves the normalisation to the device. Each contender runs in a process of its own and is measured between two
batches, after --warm-up seconds. Rounds alternate, and ratios are taken within a round, since other work on the machine
touches all alike. Memory is proportional (PSS), summed over the processes of a contender, at its most.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

from data_tools.errors import UserError, run_command

ROOT = Path(__file__).parents[1]
IMAGE_SIZE = 224
CROP_SCALE = (0.9, 1.0)
CONTEXT_LENGTH = 77
OURS, REFERENCE = "ours", "decode"
POLL_S = 1.0  # between looks at the memory, each of which stops what it looks at for a moment
LONGEST_S = 300.0


def main() -> int:
    if sys.argv[1:2] == ["run"]:
        run_contender(SimpleNamespace(**json.loads(sys.argv[2])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of JPEGs")
    parser.add_argument("--resize", type=int, nargs="+", default=[0, 256], help="pixels of the shorter side; 0: as is")
    parser.add_argument("--copies", type=int, default=10, help="of each picture, under other names")
    parser.add_argument("--cores", type=int, default=0, help="how many to use (default: all)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--warm-up", type=float, default=3.0, metavar="S", help="seconds before the measurement")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="these alone")
    parser.add_argument("--work", type=Path, help="folder for temporary files (default: the system's)")
    return run_command(compare, parser.parse_args())


def compare(options: argparse.Namespace) -> None:
    cores = sorted(os.sched_getaffinity(0))[: options.cores or None]
    pictures = choose_pictures(options.images)
    print(
        f"{len(pictures)} pictures, {len(cores)} cores, load {os.getloadavg()[0]:.1f}, batches of {options.batch_size}"
    )
    with tempfile.TemporaryDirectory(prefix="benchmark-loader-", dir=options.work) as work:
        for side in options.resize:
            shards = build_shards(pictures, options.copies, side, len(cores), Path(work))
            compare_on(shards, cores, options)


def compare_on(shards: Path, cores: list[int], options: argparse.Namespace) -> None:
    settings = {
        "shards": str(shards),
        "cores": cores,
        "batch_size": options.batch_size,
        "warm_up_s": options.warm_up,
        "seconds": options.seconds,
    }
    rates: dict[str, list[float]] = {name: [] for name in options.only}
    memory = dict.fromkeys(options.only, 0)
    for number in range(options.rounds):
        first = number % len(options.only)
        for name in options.only[first:] + options.only[:first]:
            rate, peak = measure({**settings, "name": name})
            rates[name].append(rate)
            memory[name] = max(memory[name], peak)
            print(f"{shards.name} {number + 1}: {name} {rate:.0f} images/s", file=sys.stderr, flush=True)
    manifest = json.loads((shards / "manifest.json").read_bytes())
    size = sum(path.stat().st_size for path in shards.glob("*.tar"))
    print(f"\n{shards.name}: {manifest['samples']} samples, {size / manifest['samples'] / 1e3:.0f} KB each")
    print(f"{'':<12}{'images/s':>10}{'(rounds)':>18}{'ours is':>10}{'(rounds)':>18}{'PSS MiB':>10}")
    for name, measured in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rates.get(OURS, []), measured, strict=False)]
        against = f"{describe(ratios, '.2f')}" if ratios and name != OURS else " " * 28
        print(f"{name:<12}{describe(measured, '.0f')}{against}{memory[name] / 2**20:>10.0f}")


def describe(values: list[float], form: str) -> str:
    spread = f"({min(values):{form}} to {max(values):{form}})"
    return f"{statistics.median(values):>10{form}}{spread:>18}"


def choose_pictures(folder: Path) -> list[Path]:
    pictures = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not pictures:
        raise UserError(f"{folder}: no JPEGs. Give a folder of them as --images")
    return pictures


def build_shards(pictures: list[Path], copies: int, side: int, cores: int, work: Path) -> Path:
    """Shards of `copies` of each picture, with shards enough for a worker a core."""
    images, out = work / "images", work / (f"{side}px" if side else "original")
    if not images.exists():
        images.mkdir()
        for number in range(copies):
            for path in pictures:
                shutil.copyfile(path, images / f"{number:03d}_{path.name}")
        names = sorted(path.name for path in images.iterdir())
        rows = "".join(f"{name}\ta photograph of something, number {place}\n" for place, name in enumerate(names))
        (work / "captions.tsv").write_text("image\tcaption\n" + rows)
    per_shard = max(1, len(pictures) * copies // (4 * cores))
    shape = ("--resize", str(side)) if side else ("--resize-mode", "no")
    command = [sys.executable, "-m", "data_tools", "build", str(work / "captions.tsv"), str(out)]
    command += ["--image-root", str(images), "--seed", "0", "--samples-per-shard", str(per_shard), *shape]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the shards could not be built: {done.stderr[-2000:]}")
    return out


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# A contender, from outside


def measure(settings: dict) -> tuple[float, int]:
    """Images/s of one contender, and its peak memory in bytes. Raises UserError when it fails."""
    command = [sys.executable, __file__, "run", json.dumps(settings)]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT)
        peak, started_s = 0, time.monotonic()
        try:
            while process.poll() is None:
                if time.monotonic() - started_s > LONGEST_S:
                    raise UserError(f"{settings['name']}: not done after {LONGEST_S:.0f} s")
                peak = max(peak, read_memory(process.pid))
                time.sleep(POLL_S)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise UserError(f"{settings['name']}: exit code {process.returncode}\n{text[-2000:]}")
    return json.loads(text.splitlines()[-1])["images_per_s"], peak


def read_memory(pid: int) -> int:
    """Bytes of `pid` and all below it, pages that they share counted once."""
    total, waiting = 0, [pid]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        try:
            lines = (folder / "smaps_rollup").read_text().splitlines()
            total += 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            for task in (folder / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, StopIteration):  # it has ended
            continue
    return total


# A contender, from inside


def run_contender(settings: SimpleNamespace) -> None:
    os.sched_setaffinity(0, settings.cores)
    batches = CONTENDERS[settings.name](settings)
    count_until(batches, settings.warm_up_s)
    started_s = time.monotonic()
    images = count_until(batches, settings.seconds)
    print(json.dumps({"images_per_s": images / (time.monotonic() - started_s)}), flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the workers as failed
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(0)  # without waiting for what decodes ahead


def count_until(batches: Iterator[int], seconds: float) -> int:
    """Take batches, given by their sizes, for so many seconds from now, or from the first one if nothing is there yet."""
    images, end_s = next(batches), time.monotonic() + seconds
    while time.monotonic() < end_s:
        images += next(batches)
    return images


def run_ours(settings: SimpleNamespace) -> Iterator[int]:
    from pretrain.data.augment import AugmentConfig
    from pretrain.data.loader import DataConfig, Loader
    from pretrain.data.text import ClipTokenizerConfig, build_tokenizer
    from pretrain.world import World

    augment = AugmentConfig(crop_scale=list(CROP_SCALE))
    config = DataConfig(path=settings.shards, threads=len(settings.cores), augment=augment)
    tokenizer = build_tokenizer(ClipTokenizerConfig(), CONTEXT_LENGTH)
    for batch in Loader(config, tokenizer, IMAGE_SIZE, settings.batch_size, 0, World()):
        yield len(batch.image)


def run_open_clip(settings: SimpleNamespace) -> Iterator[int]:
    import functools

    from pretrain.torchvision_ops import prepare_torchvision

    prepare_torchvision()
    import open_clip
    from open_clip_train import data

    # webdataset marks the end of a shard since 0.2.90, which open_clip does not expect.
    data.tar_file_expander = functools.partial(data.tar_file_expander, eof_value=None)
    arguments = SimpleNamespace(
        train_data=list_shards(settings),
        train_num_samples=10**9,  # no end of an epoch within the measurement
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        workers=len(settings.cores),
        batch_size=settings.batch_size,
        world_size=1,
    )
    transform = open_clip.image_transform(IMAGE_SIZE, is_train=True, aug_cfg={"scale": CROP_SCALE})
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    loader = data.get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer).dataloader
    for images, _ in loader:
        yield len(images)


def run_plain(settings: SimpleNamespace) -> Iterator[int]:
    from pretrain.torchvision_ops import prepare_torchvision

    prepare_torchvision()
    import open_clip
    import torch
    import webdataset
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(IMAGE_SIZE, CROP_SCALE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD),
        ]
    )
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    dataset = (
        webdataset.WebDataset(list_shards(settings), shardshuffle=100)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(transform, lambda text: tokenizer(text)[0])
        .batched(settings.batch_size, partial=False)
        .repeat()
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=len(settings.cores))
    for images, _ in loader:
        yield len(images)


def run_decode(settings: SimpleNamespace) -> Iterator[int]:
    import simplejpeg

    from data_tools.shards import Manifest, ShardReader

    reader = ShardReader(Manifest.load(settings.shards))
    pictures = [reader.read(index).fields["jpg"] for index in range(len(reader))]
    with ThreadPoolExecutor(len(settings.cores)) as pool:

        def decode(first: int) -> int:
            for place in range(first, first + settings.batch_size):
                simplejpeg.decode_jpeg(pictures[place % len(pictures)], "RGB")
            return settings.batch_size

        ahead = [pool.submit(decode, settings.batch_size * number) for number in range(2 * len(settings.cores))]
        for number in cycle(range(len(pictures))):
            yield ahead.pop(0).result()
            ahead.append(pool.submit(decode, settings.batch_size * number))


def list_shards(settings: SimpleNamespace) -> str:
    names = sorted(path.name for path in Path(settings.shards).glob("*.tar"))
    return f"{settings.shards}/{{{names[0].removesuffix('.tar')}..{names[-1].removesuffix('.tar')}}}.tar"


CONTENDERS: dict[str, Callable[[SimpleNamespace], Iterator[int]]] = {
    OURS: run_ours,
    "open_clip": run_open_clip,
    "plain": run_plain,
    REFERENCE: run_decode,
}


if __name__ == "__main__":
    sys.exit(main())

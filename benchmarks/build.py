"""How fast shards are built, side by side with img2dataset and with tar, and in how much memory.

    python benchmarks/build.py --images FOLDER [FOLDER ...]     (speed: pictures behind URLs, local files, byte copies)
    python benchmarks/build.py --images FOLDER --memory         (peak memory by the number of rows)

urls: `python -m data_tools build` and img2dataset (in .compat/img2dataset, which `make` sets up) download the same
pictures from an HTTP server on loopback, shrink them alike and write shards of the same number of samples. img2dataset
does the rest as it does by default; with --lean it keeps the bytes of pictures that are small enough, as we do, and reads
no EXIF. Two rates: of the whole command, and from the first picture that the server is asked for until the last file of a
shard is there, which leaves out most of what each does but once. --repeat asks for each picture under several URLs.

files: the same from local files, which img2dataset does not read.

copy: `--resize-mode no` with each `--check` of whether a JPEG is whole, on --copies copies of each picture, against `tar cf`
of the same files. All outputs are synced to the disk, and all read files that were read before; tar checks no picture
and writes no checksums, captions or sidecars.

Rounds alternate, and ratios are taken within a round, since other work on the machine touches both alike.
"""

import argparse
import asyncio
import contextlib
import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_tools.errors import UserError, run_command
from data_tools.image import CHECKS

ROOT = Path(__file__).parents[1]
IMG2DATASET = ROOT / ".compat" / "img2dataset"
POLL_S = 0.02
RATIOS = {
    "images/s": "work_s",
    "images/s of the whole command": "wall_s",
    "images a second of a processor": "cpu_s",
}
VARIANTS = {
    "captions": "50 captions a picture",
    "shared": "all captions on 200 pictures",
    "absent": "a name a row, 99 of 100 without a file",
}


class Run(NamedTuple):
    """One command: seconds by the clock and of processors, what it printed, and peak resident memory in bytes."""

    wall_s: float
    cpu_s: float
    output: str
    parent: int
    worker: int


@dataclass
class Rate:
    """What a tool came to in a round."""

    images: int
    wall_s: float
    work_s: float
    cpu_s: float
    parent: int
    worker: int

    def describe(self) -> str:
        return (
            f"{self.images / self.work_s:8.0f} {self.images / self.wall_s:10.0f} {self.cpu_s / self.images * 1e3:15.2f}"
            f" {self.parent / 2**20:12.0f} {self.worker / 2**20:12.0f}"
        )


def main() -> int:
    if sys.argv[1:2] == ["serve"]:
        asyncio.run(serve(Path(sys.argv[2])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, nargs="+", required=True, metavar="DIR", help="folders of JPEGs")
    parser.add_argument("--count", type=int, default=700, help="pictures: all of the first folder, then the next ...")
    parser.add_argument("--only", choices=("urls", "files", "copy"), help="one measurement of the three")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--repeat", type=int, default=1, help="URLs of each picture, so that start-up does not hide the rest"
    )
    parser.add_argument("--lean", action="store_true", help="img2dataset copies small pictures and reads no EXIF")
    parser.add_argument("--resize", type=int, default=256)
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--processes", type=int, default=2, help="of both")
    parser.add_argument("--threads", type=int, default=16, help="img2dataset's threads a process")
    parser.add_argument("--samples-per-shard", type=int, default=350)
    parser.add_argument("--copies", type=int, default=20, help="of each picture, for copy")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of speed")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000], help="for --memory")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="for --memory")
    parser.add_argument("--work", type=Path, help="folder for temporary files (default: the system's)")
    return run_command(compare, parser.parse_args())


def compare(options: argparse.Namespace) -> None:
    pictures = choose_pictures(options.images, options.count)
    size = sum(path.stat().st_size for path in pictures)
    with tempfile.TemporaryDirectory(prefix="benchmark-build-", dir=options.work) as work:
        if options.memory:
            measure_memory(options, pictures, Path(work))
            return
        print(f"{len(pictures)} pictures, {size / 1e6:.1f} MB; {os.cpu_count()} processors, load {read_load()}")
        for name, measure in (("urls", compare_urls), ("files", measure_files), ("copy", compare_copies)):
            if options.only in (None, name):
                measure(options, pictures, Path(work))


def choose_pictures(folders: list[Path], count: int) -> list[Path]:
    pictures = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder. Give folders of JPEGs as --images")
        pictures += sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    if not pictures:
        raise UserError(f"{folders[0]}: no JPEGs. Give folders of JPEGs as --images")
    return pictures[:count]


def read_load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


# Running


def run(command: list[str], **variables: str) -> Run:
    """Run to the end, watching the memory of the process and its children. Raises UserError when it fails."""
    started_s = time.monotonic()
    peaks: dict[int, int] = {}
    with tempfile.TemporaryFile("w+") as output:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # modules are compiled once, as an installed package's are
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        ended = threading.Event()
        watch = threading.Thread(target=watch_memory, args=(process.pid, peaks, ended))
        watch.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)  # usage: of its children too, as far as it has waited for them
            wall_s = time.monotonic() - started_s
        except BaseException:
            process.kill()
            raise
        finally:
            ended.set()
            watch.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise UserError(f"{' '.join(command[:4])}: exit code {process.returncode}\n{text[-2000:]}")
    workers = [peak for pid, peak in peaks.items() if pid != process.pid]
    cpu_s = usage.ru_utime + usage.ru_stime
    return Run(wall_s, cpu_s, text, peaks.get(process.pid, 0), max(workers, default=0))


def watch_memory(pid: int, peaks: dict[int, int], ended: threading.Event) -> None:
    """Keep the peak resident memory of `pid` and all below it, as the kernel counts it (VmHWM)."""
    while not ended.wait(POLL_S):
        waiting = [pid]
        while waiting:
            current = waiting.pop()
            with contextlib.suppress(OSError):
                peak = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{current}/status").read_text())
                if peak:  # a zombie has none
                    peaks[current] = int(peak.group(1)) * 1024  # never falls, but where a child of fork calls exec
                for task in Path(f"/proc/{current}/task").iterdir():
                    waiting += map(int, (task / "children").read_text().split())


def build_command(input: Path, out: Path, options: argparse.Namespace, *more: object) -> list[str]:
    command = [sys.executable, "-m", "data_tools", "build", input, out, "--processes", options.processes]
    return list(map(str, (*command, "--quality", options.quality, *more)))


def count_samples(out: Path) -> int:
    return json.loads((out / "manifest.json").read_bytes())["samples"]


def read_builder_s(output: str, images: int) -> float:
    """The seconds that the builder itself has counted: from when its plan is made, so with the start of workers."""
    line = next(line for line in output.splitlines() if line.startswith("rate"))
    return images / int(line.split()[1])


# Pictures behind URLs


async def serve(listing: Path) -> None:
    """Serve the files of a list as /0.jpg, /1.jpg, ... and tell at /asked when the first was asked for since last."""
    from aiohttp import web

    contents = [Path(line).read_bytes() for line in listing.read_text().splitlines()]
    first_s: list[float] = []

    async def give(request: web.Request) -> web.Response:
        if not first_s:
            first_s.append(time.time())
        return web.Response(body=contents[int(request.match_info["number"]) % len(contents)], content_type="image/jpeg")

    async def tell(_: web.Request) -> web.Response:
        answer = web.json_response(first_s)
        first_s.clear()
        return answer

    application = web.Application()
    application.router.add_get(r"/{number:\d+}.jpg", give)
    application.router.add_get("/asked", tell)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the benchmark ends


@contextlib.contextmanager
def start_server(pictures: list[Path], work: Path) -> Iterator[str]:
    listing = work / "served.txt"
    listing.write_text("\n".join(str(path.resolve()) for path in pictures))
    command = [sys.executable, __file__, "serve", str(listing)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait(10)


def compare_urls(options: argparse.Namespace, pictures: list[Path], work: Path) -> None:
    prepare_img2dataset()
    table = work / "urls.tsv"
    out = work / "out"
    with start_server(pictures, work) as server:
        urls = [f"{server}/{number}.jpg" for number in range(len(pictures) * options.repeat)]
        table.write_text("url\tcaption\n" + "".join(f"{url}\ta caption of {url}\n" for url in urls))

        def measure(tool: str) -> Rate:
            shutil.rmtree(out, ignore_errors=True)
            if tool == "ours":
                shape = ("--resize", options.resize, "--samples-per-shard", options.samples_per_shard)
                done = run(build_command(table, out, options, *shape, "--allow-private"))
                samples = count_samples(out)
            else:
                (work / "tmp").mkdir(exist_ok=True)  # its wandb leaves files there, even when it is disabled
                variables = {"NO_ALBUMENTATIONS_UPDATE": "1", "TMPDIR": str(work / "tmp")}
                done = run(img2dataset_command(table, out, options), **variables)
                samples = sum(json.loads(path.read_bytes())["successes"] for path in out.glob("*_stats.json"))
            if samples < 0.98 * len(urls):
                raise UserError(f"{tool}: only {samples} of {len(urls)} pictures\n{done.output[-2000:]}")
            with urllib.request.urlopen(f"{server}/asked") as answer:
                first_s = json.load(answer)[0]
            last_s = max(path.stat().st_mtime for path in out.iterdir() if path.name[0].isdigit())
            sizes[tool] = read_sizes(out)
            return Rate(samples, done.wall_s, last_s - first_s, done.cpu_s, done.parent, done.worker)

        sizes: dict[str, dict[str, tuple[int, int]]] = {}
        title = (
            f"urls: {len(urls)}, to {options.resize} px, quality {options.quality}, {options.processes} processes"
            + ", img2dataset lean" * options.lean
        )
        rates = alternate(title, ("ours", "img2dataset 1.47"), measure, options.rounds)
    ours, theirs = sizes["ours"], sizes["img2dataset 1.47"]
    alike = sum(
        all(abs(a - b) <= 1 for a, b in zip(size, theirs[url], strict=True))
        for url, size in ours.items()
        if url in theirs
    )
    print(f"{alike} of {len(ours)} pictures have the same size in both, within a pixel")
    print_ratios(rates, "img2dataset 1.47", "goal: 2.0")


def prepare_img2dataset() -> None:
    """Set up its environment. Raises UserError where that fails."""
    target = f"{IMG2DATASET.relative_to(ROOT)}/.ready"
    if subprocess.run(["make", "--silent", "-C", str(ROOT), target]).returncode:
        raise UserError(f"{IMG2DATASET}: could not be made. Run `make {target}` with PYTHON=python3.11 or 3.12")


def img2dataset_command(table: Path, out: Path, options: argparse.Namespace) -> list[str]:
    arguments = {
        "url_list": table,
        "output_folder": out,
        "input_format": "tsv",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "processes_count": options.processes,
        "thread_count": options.threads,
        "image_size": options.resize,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "skip_reencode": options.lean,
        "encode_quality": options.quality,
        "number_sample_per_shard": options.samples_per_shard,
        "extract_exif": not options.lean,
        "enable_wandb": False,
    }
    return [str(IMG2DATASET / "bin" / "img2dataset"), *(f"--{name}={value}" for name, value in arguments.items())]


def read_sizes(out: Path) -> dict[str, tuple[int, int]]:
    """Width and height of each stored picture, by its URL."""
    import pyarrow.parquet

    sizes = {}
    for path in sorted(out.glob("*.parquet")):
        table = pyarrow.parquet.read_table(path)
        names = table["source" if "source" in table.column_names else "url"].to_pylist()
        for name, width, height in zip(names, table["width"].to_pylist(), table["height"].to_pylist(), strict=True):
            if width:
                sizes[name] = (width, height)
    return sizes


def alternate(title: str, tools: tuple[str, ...], measure, rounds: int) -> list[dict[str, Rate]]:
    """Measure all tools in each round, every second round in the opposite order; print as it goes."""
    print(f"\n{title}")
    print(f"round  load  {'':24} images/s  (command)    CPU ms/image   parent MiB   worker MiB")
    rates = []
    for number in range(rounds):
        order = tools if number % 2 == 0 else tools[::-1]
        rates.append({})
        for tool in order:
            load = read_load()
            rates[-1][tool] = measure(tool)
            print(f"{number + 1:5}  {load:>4}  {tool:24} {rates[-1][tool].describe()}", flush=True)
    return rates


def print_ratios(rates: list[dict[str, Rate]], peer: str, goal: str) -> None:
    """The rates of all tools over that of `peer`."""
    for tool in sorted(rates[0].keys() - {peer}):
        for name, field in RATIOS.items():
            ratios = []
            for rate in rates:
                ours, theirs = rate[tool], rate[peer]
                ratios.append(ours.images / getattr(ours, field) / (theirs.images / getattr(theirs, field)))
            shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{tool}, ratio of {name}: median {statistics.median(ratios):.2f} ({shown}; {goal})")


# Local files


def lay_out(pictures: list[Path], folder: Path, copies: int) -> tuple[Path, int]:
    """Copy the pictures into a folder, and write a table of them. Returns the table and the bytes."""
    (folder / "images").mkdir(parents=True)
    names, size = [], 0
    for copy in range(copies):
        for number, path in enumerate(pictures):
            names.append(f"{copy}-{number:05d}.jpg")
            size += (folder / "images" / names[-1]).write_bytes(path.read_bytes())
    table = folder / "captions.tsv"
    with table.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(
            [("filename", "caption"), *((name, f"this is {name}") for name in names)]
        )
    os.sync()
    return table, size


def measure_files(options: argparse.Namespace, pictures: list[Path], work: Path) -> None:
    table, _ = lay_out(pictures, work / "files", 1)

    def measure(_: str) -> Rate:
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        shape = ("--resize", options.resize, "--samples-per-shard", options.samples_per_shard)
        done = run(build_command(table, out, options, "--image-root", work / "files" / "images", *shape))
        images = count_samples(out)
        return Rate(images, done.wall_s, read_builder_s(done.output, images), done.cpu_s, done.parent, done.worker)

    alternate(f"files: to {options.resize} px, from local files", ("ours",), measure, options.rounds)


def compare_copies(options: argparse.Namespace, pictures: list[Path], work: Path) -> None:
    table, size = lay_out(pictures, work / "copies", options.copies)
    images = work / "copies" / "images"

    def measure(tool: str) -> Rate:
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for path in images.iterdir():
            path.read_bytes()
        os.sync()
        count = len(pictures) * options.copies
        if tool.startswith("ours"):
            more = tool.split()[1:]
            done = run(build_command(table, out, options, "--image-root", images, "--resize-mode", "no", *more))
            count = count_samples(out)
            return Rate(count, done.wall_s, read_builder_s(done.output, count), done.cpu_s, done.parent, done.worker)
        archive = out / "pictures.tar"
        done = run(["sh", "-c", 'tar cf "$1" -C "$2" . && sync "$1"', "sh", str(archive), str(images)])
        return Rate(count, done.wall_s, done.wall_s, done.cpu_s, done.parent, done.worker)

    title = f"copy: {len(pictures) * options.copies} files, {size / 1e6:.0f} MB, both synced to the disk"
    tools = (*(f"ours --check {level}" for level in CHECKS), "tar cf")
    rates = alternate(title, tools, measure, options.rounds)
    print_ratios(rates, "tar cf", "goal: 0.5")


# Memory


def measure_memory(options: argparse.Namespace, pictures: list[Path], work: Path) -> None:
    print("peak resident memory, MiB")
    print(f"{'rows':>9} {'samples':>9} {'seconds':>8} {'parent':>7} {'worker':>7}  variant")
    for variant in options.variants:
        peaks = []
        for rows in options.rows:
            folder = work / f"{variant}-{rows}"
            table = write_rows(variant, rows, pictures[:200], folder)
            more = ("--image-root", folder / "images", "--resize", 64)
            done = run(build_command(table, folder / "out", options, *more))
            manifest = json.loads((folder / "out" / "manifest.json").read_bytes())
            samples = manifest["samples"] + manifest["failures"]
            peaks.append(max(done.parent, done.worker))
            memory = f"{done.parent / 2**20:7.0f} {done.worker / 2**20:7.0f}"
            print(f"{rows:9} {samples:9} {done.wall_s:8.1f} {memory}  {VARIANTS[variant]}", flush=True)
            shutil.rmtree(folder)
        print(f"{'':9} the most rows take {peaks[-1] / peaks[0]:.2f} times the memory of the fewest")


def write_rows(variant: str, rows: int, pictures: list[Path], folder: Path) -> Path:
    """A table of `rows` rows, and its pictures: links to a few files."""
    images = folder / "images"
    images.mkdir(parents=True)
    names = {"captions": rows // 50, "shared": 200, "absent": rows}[variant]
    for number in range(0, names, 100 if variant == "absent" else 1):
        link = images / f"{number}.jpg"
        link.symlink_to(pictures[number % len(pictures)].resolve())
    with (folder / "rows.tsv").open("w") as file:
        file.write("filename\tcaption\n")
        for row in range(rows):
            file.write(f"{row % names}.jpg\tcaption number {row} of a picture with some more words in it\n")
    return folder / "rows.tsv"


if __name__ == "__main__":
    sys.exit(main())

"""How long a run takes to reach its first sample, and how much memory, with very many shards.

    python benchmarks/loader_start.py                               (100,000 shards of 10,000 samples)
    python benchmarks/loader_start.py --shards 2000 --folder /scratch

Makes a folder of sparse shards with sidecars and statistics (only manifest.json holds bytes), then in a new process each,
for the dataset and for a view of half of it: `Manifest.load`, the order of samples, a position far out, and the samples' side
of the ledger. Times are of that one process; its memory is the most that it ever held. The folder is removed at the end.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from data_tools.files import render_json
from data_tools.shards import Manifest, Selection, ShardInfo

SAMPLE_BYTES = 100_000
FAR = 10**12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=10_000, help="of each shard (10,000)")
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # what the new process is to do
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        begin = time.perf_counter()
        make_dataset(Path(folder), options.shards, options.samples)
        total = options.shards * options.samples
        print(f"{options.shards:,} shards, {total:,} samples; made in {time.perf_counter() - begin:.0f} s")
        for name in ("data", "view"):
            command = [sys.executable, __file__, "--measure", str(Path(folder) / name)]
            print(f"\n{name}\n" + subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="")
    return 0


def make_dataset(folder: Path, shards: int, samples: int) -> None:
    """A finished build in FOLDER/data and a view of every second sample in FOLDER/view."""
    data = folder / "data"
    data.mkdir()
    infos = []
    for number in range(shards):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        infos.append(ShardInfo(f"{number:06d}.tar", samples, samples * SAMPLE_BYTES, digest, digest))
        sizes = {".tar": infos[-1].bytes, ".tar.idx": 8 * (samples + 1), ".parquet": 0, "_stats.json": 0}
        for suffix, size in sizes.items():
            with open(data / f"{number:06d}{suffix}", "wb") as file:
                os.truncate(file.fileno(), size)
    # `Manifest.write` would read sidecars for checksums.json; a reader needs manifest.json alone.
    entries = [vars(info) for info in infos]
    total = {"samples": shards * samples, "captions": shards * samples, "bytes": sum(info.bytes for info in infos)}
    content = {"format": 1, "build": "b", "failures": 0, "options": {}, "shards": entries, **total}
    (data / "manifest.json").write_bytes(render_json(content))
    starts = np.arange(shards + 1) * ((samples + 7) // 8)
    half = Selection(np.full(starts[-1], 0xAA, np.uint8), starts)
    Manifest.load(data).write_view(folder / "view", half, shards * samples // 2, {})


def measure(folder: Path) -> None:
    begin, cpu_begin = time.perf_counter(), time.process_time()
    from pretrain.data.ledger import Identities
    from pretrain.data.order import build_order

    def tell(what: str) -> None:
        nonlocal begin, cpu_begin
        # Not getrusage's: that also counts the parent, before the program was loaded.
        memory_mib = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
        took_s, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_begin
        print(f"  {what:<42} {took_s:8.3f} s {cpu_s:8.3f} s of CPU {memory_mib:6.0f} MiB at most so far")
        begin, cpu_begin = time.perf_counter(), time.process_time()

    tell("imports (torch among them)")
    manifest = Manifest.load(folder)
    tell("Manifest.load")
    counts, fingerprint = manifest.counts, manifest.fingerprint
    tell("counts and fingerprint")
    order = build_order([counts], [1], 0, 32_768)
    tell(f"order, of {order.streams} streams")
    order.at(np.arange(FAR, FAR + 512))
    tell(f"512 samples at position {FAR:,}")
    order.at(np.arange(FAR, FAR + 512))
    tell("the same again")
    order.at(np.arange(FAR, FAR + 65_536))
    tell("65,536 samples")
    _ = Identities(counts, fingerprint).expected
    tell(f"ledger: hashes of {manifest.samples:,} samples")


if __name__ == "__main__":
    sys.exit(main())

"""`doctor node`: whether this machine can take part in a run, as facts that can be compared with those of the others.

Imports torch only where there is a GPU to try, so that it costs little to ask many nodes.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import UserError, first_line
from data_tools.shards import Manifest, ShardReader

ASK_GPU_S = 15  # a driver that takes longer has a sick GPU behind it
GPU_FACTS = ("index", "name", "memory.total", "ecc.errors.uncorrected.volatile.total", "driver_version")
WRITE_BYTES = 16 * 2**20
MATMUL_S = 0.3
TOKEN = "preflight-token"  # a file that shows whether all nodes see the same folder
ROOT = Path(__file__).parents[2]


def examine_node(config: str | None, overrides: list[str], folder: str | None) -> dict[str, Any]:
    """What this node is and what is wrong with it, in `problems`. Nothing that is wrong raises."""
    started_s, problems = time.monotonic(), []
    facts: dict[str, Any] = {"host": socket.gethostname(), "time": time.time()}
    facts |= read_memory()
    facts |= {"code": hash_code(), "python": platform.python_version(), "packages": list_packages()}
    run, datasets = read_places(config, overrides)
    facts |= try_folder(folder or run or ".", problems)
    facts["shards"] = sum(try_shards(path, problems) for path in datasets)
    facts |= try_processors(problems)
    return {**facts, "problems": problems, "seconds": round(time.monotonic() - started_s, 2)}


def print_node(config: str | None, overrides: list[str], folder: str | None) -> int:
    """One JSON line; exit code 1 if something is wrong."""
    facts = examine_node(config, overrides, folder)
    print(json.dumps(facts), flush=True)
    return 1 if facts["problems"] else 0


def read_places(config: str | None, overrides: list[str]) -> tuple[str | None, list[str]]:
    """The run folder and the datasets of a run config, without building its model."""
    if config is None:
        return None, []
    from pretrain.config import read_yaml, set_dotted

    values = read_yaml(config)
    for override in overrides:
        set_dotted(values, override)
    data = values.get("data") or {}
    entries = data if isinstance(data, list) else data.get("datasets") or [data]
    paths = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return values.get("run"), [path for path in paths if isinstance(path, str)]


def read_memory() -> dict[str, float]:
    """Of the host, in GiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    return {
        name: round(int(lines[key].split()[0]) / 2**20, 1)
        for name, key in (("memory_gib", "MemTotal"), ("available_gib", "MemAvailable"))
    }


def hash_code() -> str:
    """Of the source that runs here, wherever it lies."""
    digest = hashlib.sha256()
    for package in ("data_tools", "launch", "pretrain"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def list_packages() -> dict[str, str]:
    """Version of each installed package, by the names of their folders: their metadata would take seconds to read."""
    found = {}
    for folder in dict.fromkeys(sys.path):
        if folder and os.path.isdir(folder):
            for name in os.listdir(folder):
                stem, dot, kind = name.rpartition(".")
                if dot and kind in ("dist-info", "egg-info") and "-" in stem:
                    package, _, version = stem.partition("-")
                    found.setdefault(package.lower(), version)
    return found


def try_folder(folder: str, problems: list[str]) -> dict[str, Any]:
    """Write into the folder that all nodes share, and read what was written."""
    facts: dict[str, Any] = {"folder": os.path.abspath(folder)}
    path = Path(folder) / f"preflight-{socket.gethostname()}-{os.getpid()}.tmp"
    data = os.urandom(2**20)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            started_s = time.monotonic()
            with open(path, "wb", buffering=0) as file:
                for _ in range(WRITE_BYTES // len(data)):
                    file.write(data)
                os.fsync(file.fileno())
            facts["write_mb_s"] = round(WRITE_BYTES / 1e6 / (time.monotonic() - started_s), 1)
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if any(file.read(len(data)) != data for _ in range(WRITE_BYTES // len(data))):
                    problems.append(f"{facts['folder']}: reads other bytes than were written")
        finally:
            path.unlink(missing_ok=True)
        token = Path(folder) / TOKEN
        facts["token"] = token.read_text().strip() if token.exists() else None
    except OSError as error:
        problems.append(f"{facts['folder']}: cannot be written: {error.strerror}")
    return facts


def try_shards(path: str, problems: list[str]) -> int:
    """Read the first and last sample of the first, middle and last shard of a dataset; how many were read."""
    if path.startswith("pipe:"):
        return 0
    try:
        if path.endswith(".tar"):
            return read_tars(path)
        manifest = Manifest.load(path)
        reader, ends = ShardReader(manifest), np.cumsum(manifest.counts)
        places = set()
        for number in {0, len(ends) // 2, len(ends) - 1} if len(ends) else ():
            if manifest.counts[number]:
                places |= {int(ends[number] - manifest.counts[number]), int(ends[number]) - 1}
        for place in sorted(places):
            reader.read(place)
        return len(places)
    except (UserError, OSError, ValueError) as error:
        problems.append(first_line(error))
        return 0


def read_tars(pattern: str) -> int:
    """Read the first and last bytes of the first, middle and last tar that a pattern of local paths names."""
    import glob

    from braceexpand import braceexpand

    paths = sorted(name for word in braceexpand(pattern) for name in (glob.glob(word) or [word]))
    for path in {paths[0], paths[len(paths) // 2], paths[-1]}:
        with open(path, "rb") as file:
            file.read(512)
            file.seek(-512, os.SEEK_END)
            file.read(512)
    return 2 * len({paths[0], paths[len(paths) // 2], paths[-1]})


def try_processors(problems: list[str]) -> dict[str, Any]:
    """Try the GPUs if there are any, else the processor."""
    gpus = list_gpus(problems)
    facts: dict[str, Any] = {"gpus": gpus}
    if gpus and "+cpu" not in importlib.metadata.version("torch"):
        rates = try_gpus(problems)
        for gpu, rate in zip(gpus, rates, strict=False):
            gpu["matmul_gflops"] = rate
        return {**facts, "matmul_on": "gpu", "matmul_gflops": min(rates, default=0.0)}
    return {**facts, "matmul_on": "cpu", "matmul_gflops": try_cpu(problems)}


def list_gpus(problems: list[str]) -> list[dict[str, Any]]:
    """What the driver says of the GPUs that this node shows."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FACTS)}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=ASK_GPU_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        problems.append(f"nvidia-smi gave no answer in {ASK_GPU_S} s")
        return []
    except OSError as error:
        problems.append(f"nvidia-smi: {error.strerror}")
        return []
    if result.returncode:
        said = (result.stdout + result.stderr).strip().splitlines() or ["nothing"]
        problems.append(f"nvidia-smi failed with exit code {result.returncode}: {said[0]}")
        return []
    gpus = []
    for line in result.stdout.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(GPU_FACTS):
            continue
        gpu = dict(zip(("index", "name", "memory_mib", "uncorrected_ecc", "driver"), values, strict=True))
        gpus.append(gpu)
        if gpu["uncorrected_ecc"].isdigit() and int(gpu["uncorrected_ecc"]):
            problems.append(f"GPU {gpu['index']} reports {gpu['uncorrected_ecc']} uncorrected memory errors (ECC)")
    return gpus


def try_gpus(problems: list[str]) -> list[float]:
    """GFLOP/s of a bf16 product on each GPU, whose result is checked."""
    import torch

    if not torch.cuda.is_available():
        problems.append("nvidia-smi shows GPUs, but torch cannot use them")
        return []
    rates, size = [], 8192
    for index in range(torch.cuda.device_count()):
        try:
            device = torch.device("cuda", index)
            # Ones, zeros and minus ones: their products and sums, at most 256, are exact in bf16.
            left = torch.randint(-1, 2, (size, 256), device=device, dtype=torch.bfloat16)
            right = torch.randint(-1, 2, (256, size), device=device, dtype=torch.bfloat16)
            rows = slice(0, 64)
            expected = left[rows].cpu().double() @ right.cpu().double()
            if not torch.equal((left @ right)[rows].cpu().double(), expected):
                problems.append(f"GPU {index} computes wrong products")
            square = torch.ones(size, size, device=device, dtype=torch.bfloat16)
            best_s, deadline_s = float("inf"), time.monotonic() + MATMUL_S
            square @ square
            while time.monotonic() < deadline_s:
                torch.cuda.synchronize(device)
                started_s = time.perf_counter()
                for _ in range(4):
                    square @ square
                torch.cuda.synchronize(device)
                best_s = min(best_s, (time.perf_counter() - started_s) / 4)
            rates.append(round(2 * size**3 / best_s / 1e9, 1))
        except RuntimeError as error:
            problems.append(f"GPU {index}: {first_line(error)}")
            rates.append(0.0)
    return rates


def try_cpu(problems: list[str]) -> float:
    """GFLOP/s of an fp32 product on this process's cores, whose result is checked: the best of many, for others work too."""
    size = 384
    draws = np.random.default_rng(0)
    left, right = (draws.integers(-8, 9, (size, size)).astype(np.float32) for _ in range(2))
    expected = left.astype(np.int64) @ right.astype(np.int64)  # exact, and no BLAS
    best_s, deadline_s = float("inf"), time.monotonic() + MATMUL_S
    while time.monotonic() < deadline_s:
        started_s = time.perf_counter()
        product = left @ right
        best_s = min(best_s, time.perf_counter() - started_s)
    if not np.array_equal(product.astype(np.int64), expected):
        problems.append("the processor computes wrong products")
    return round(2 * size**3 / best_s / 1e9, 1)

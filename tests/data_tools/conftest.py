"""A small real table with pictures, and a way to run the commands as a user does."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_data_tools():
    """Run `python -m data_tools ARGUMENTS` to its end."""

    def run(*arguments) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "data_tools", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)

    return run


@pytest.fixture
def start_data_tools():
    """Start `python -m data_tools ARGUMENTS` in a process group of its own, so that signals can be sent to it."""
    started = []

    def start(*arguments) -> subprocess.Popen:
        command = [sys.executable, "-m", "data_tools", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def noise():
    """A picture of seeded noise, which no encoder makes small and no two seeds share."""

    def make(width: int, height: int, seed: int = 0) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture
def write_table(tmp_path, noise):
    """Write `count` pictures with two captions each; return the arguments INPUT and --image-root of a build."""

    def write(count: int, size: int = 64) -> tuple[Path, Path]:
        images = tmp_path / "images"
        images.mkdir(exist_ok=True)
        rows = ["filename\tcaption"]
        for number in range(count):
            name = f"picture {number}.jpg"
            noise(size, size + number % 5, number).save(images / name, quality=90)
            rows += [f"{name}\tcaption {number} one", f"{name}\tcaption {number} two"]
        table = tmp_path / "table.tsv"
        table.write_text("\n".join(rows) + "\n")
        return table, images

    return write


@pytest.fixture
def read_folder():
    """The bytes of every file of a folder, by name."""

    def read(folder: Path) -> dict[str, bytes]:
        return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}

    return read

"""A dataset as the builder makes it, what its input says that is in it, and the environments of third-party readers."""

import hashlib
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

ENVIRONMENTS = ROOT / ".compat"
SHARD_SAMPLES = 6
MISSING = 8  # the row whose picture does not exist


class Expected(NamedTuple):
    """A sample that a reader has to find. The stored picture has the bytes of the input's where nothing was to change."""

    key: str
    caption: str
    captions: list[str]
    size: tuple[int, int]
    sha256: str | None


class Dataset(NamedTuple):
    folder: Path
    tars: list[Path]
    samples: dict[str, Expected]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Twenty rows in four shards: one failure, many and long captions, other scripts, pictures kept and shrunk."""
    from data_tools.build import build_shards
    from data_tools.image import ImagePolicy

    root = tmp_path_factory.mktemp("compat")
    random = np.random.default_rng(7)
    lines, samples = [], {}
    for number in range(20):
        width, height = (96, 64) if number % 3 else (300 + number, 400)
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).resize((width, height)).save(content, "JPEG", quality=90)
        name = f"picture {number}.v1.jpg"  # dots and spaces of names must not get into keys
        captions = (
            [f"picture {number}: 一只猫, größer", f"the second of {number}"] if number % 2 else [f"only {number}"]
        )
        if number == 5:
            captions[0] += " and on" * 300
        lines += [json.dumps({"image": name, "caption": text, "licence": "CC0"}) for text in captions]
        if number == MISSING:
            continue
        (root / name).write_bytes(content.getvalue())
        kept = min(width, height) <= 128
        size = (width, height) if kept else (128, round(height * 128 / width))
        key = f"{number // SHARD_SAMPLES:05d}{number % SHARD_SAMPLES:04d}"
        digest = hashlib.sha256(content.getvalue()).hexdigest() if kept else None
        samples[key] = Expected(key, captions[0], captions, size, digest)
    (root / "rows.jsonl").write_text("\n".join(lines) + "\n")
    policy = ImagePolicy(resize=128)
    folder = root / "shards"
    build_shards(root / "rows.jsonl", folder, samples_per_shard=SHARD_SAMPLES, images=policy, processes=1)
    return Dataset(folder, sorted(folder.glob("*.tar")), samples)


@pytest.fixture
def writable(built: Dataset, tmp_path: Path) -> Dataset:
    """The same in a folder that a reader may write to."""
    folder = tmp_path / "shards"
    shutil.copytree(built.folder, folder)
    return Dataset(folder, sorted(folder.glob("*.tar")), built.samples)


@pytest.fixture
def check():
    """Compare what a reader found, as dicts of `key`, `caption` and others of Expected's fields, with what there is."""

    def compare(found: list[dict], dataset: Dataset) -> None:
        keys = [sample["key"] for sample in found]
        assert sorted(keys) == sorted(dataset.samples), "every key once"
        for sample in found:
            expected = dataset.samples[sample["key"]]
            assert sample["caption"] == expected.caption
            assert sample.get("captions", expected.captions) == expected.captions
            assert tuple(sample["size"]) == expected.size
            if expected.sha256 and "sha256" in sample:
                assert sample["sha256"] == expected.sha256

    return compare


@pytest.fixture
def run_in(tmp_path: Path):
    """Run a reader's command in the environment `name`, without a network; return what it printed."""

    def run(name: str, program: str, *arguments: object) -> str:
        environment = ENVIRONMENTS / name
        if not (environment / ".ready").exists():
            pytest.skip(f"{environment.relative_to(ROOT)} is not there: `make test-compat` makes it")
        command = [str(environment / "bin" / program), *map(str, arguments)]
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        variables = {**os.environ, "HOME": str(home), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
        variables.pop("PYTHONPATH", None)
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=tmp_path, env=variables)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    return run


@pytest.fixture
def read_in(run_in):
    """Run the script beside the tests that reads with a library; return its lines, each a sample."""

    def read(name: str, *arguments: object) -> list[dict]:
        output = run_in(name, "python", Path(__file__).parent / f"read_{name}.py", *arguments)
        return [json.loads(line) for line in output.splitlines() if line.startswith("{")]

    return read

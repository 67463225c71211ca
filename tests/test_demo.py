"""End to end, as a user runs it: a table and pictures in; shards, a run, an evaluation and three exports out; and again."""

from pathlib import Path

import pytest
from paths import TINY

from pretrain.__main__ import main
from pretrain.demo import split_names


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_the_demo_on_ones_own_pictures(again: bool, shards: Path, tmp_path: Path, run_pretrain) -> None:
    scenes, out = shards / "scenes", tmp_path / "out"
    inputs = ["--captions", scenes / "captions.tsv", "--images", scenes / "images", "--config", TINY, "--out", out]
    code, stdout, stderr = run_pretrain("demo", *inputs, "train.duration=4 steps")
    assert code == 0, stderr
    table = stdout[stdout.rindex("pictures,") :]
    for row in ("text to image", "match rerank", "loss, start to end", "samples/s", "shards", "run folder", "exports"):
        assert row in table
    assert all(len(line) <= 80 + len(str(tmp_path)) for line in table.splitlines())
    for name in ("open_clip", "huggingface", "native"):
        assert (out / "exports" / name / "README.md").is_file()
    if not again:
        return
    written = {path: path.stat().st_mtime_ns for path in (out / "exports").rglob("*") if path.is_file()}
    code, stdout, stderr = run_pretrain("demo", *inputs, "train.duration=4 steps")
    assert code == 0, stderr
    assert stdout[stdout.rindex("pictures,") :] == table
    assert written == {path: path.stat().st_mtime_ns for path in (out / "exports").rglob("*") if path.is_file()}


def test_the_split_is_seeded_and_disjoint(shards: Path, tmp_path: Path) -> None:
    captions = shards / "scenes" / "captions.tsv"
    first, second = (split_names(captions, tmp_path / name) for name in ("a", "b"))
    train, val = (first[split].read_text().split() for split in ("train", "val"))
    assert len(train) + len(val) == 72 and len(val) == 3 and not set(train) & set(val)
    assert all(first[split].read_bytes() == second[split].read_bytes() for split in first)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--captions", "a.tsv"], "--captions FILE and --images DIR go together"),
        (["--train-list", "a.txt"], "--train-list and --val-list go together"),
        (["--train-list", "a.txt", "--val-list", "b.txt"], "need --captions and --images"),
        (["--captions", "no/such.tsv", "--images", "no/such"], "no/such"),
        (["--config", "no/such.yaml"], "no/such.yaml"),
        (["train.batch_sise=4"], "Did you mean 'batch_size'"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], part: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 2
    stderr = capfd.readouterr().err
    assert part in stderr and stderr.count("error:") == 1 and "Traceback" not in stderr

"""`python -m pretrain demo`: pictures with captions in, evaluated and exported weights out, in one command.

It runs the same commands that a user would type, each in its own process, and skips what an earlier call has finished.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.files import write_atomic
from pretrain.config import load_config
from pretrain.local import run_ranks
from pretrain.metrics import read_metrics
from pretrain.train import RunConfig

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
SCENES = 20_000  # drawn pictures to train on
VAL_SCENES = 1_000
SPLIT_SEED = 0
VAL_PERCENT = 5  # of the user's own pictures, where no lists are given
SHORTER = ["train.duration=240 steps", "engine.warmup_steps=40", "engine.lr=2e-3"]
"""What keeps the drawn scenes to about ten minutes on two cores that have no instructions for bf16."""
EXPORTS = ("open_clip", "huggingface", "native")


class StageError(Exception):
    """A stage failed and has said why; its exit code becomes the command's."""

    def __init__(self, code: int):
        self.code = code


def run_demo(options: argparse.Namespace) -> int:
    """All stages in turn. Returns the exit code of the first that fails, else 0."""
    try:
        run_stages(options)
    except StageError as error:
        return error.code
    return 0


def run_stages(options: argparse.Namespace) -> None:
    out = Path(options.out)
    config_path = Path(options.config or CONFIG)
    paths = {"run": out / "run", "data.path": out / "shards" / "train"}
    chosen = options.config or options.captions or any(text.startswith("train.duration=") for text in options.overrides)
    shorter = SHORTER if not chosen and not has_bf16() else []
    overrides = [*(f"{key}={json.dumps(str(path))}" for key, path in paths.items()), *shorter, *options.overrides]
    config = load_config(config_path, overrides, RunConfig)
    ranks = usable_ranks(options.ranks)
    check_inputs(options)

    captions, images, lists = prepare_pictures(options, out)
    for split, keep_list in lists.items():
        say(f"building {split} shards")
        target = str(out / "shards" / split)
        call("data_tools", "build", str(captions), target, "--image-root", str(images), "--keep-list", str(keep_list))
    say(f"training on {ranks} processes, ZeRO-{config.engine.zero_stage}")
    if shorter:
        print(
            "This processor has no instructions for bf16, so training is shorter:\n"
            f"{', '.join(shorter)}.\n"
            "The match head learns late: do not expect reranking to gain by then.\n"
            f"For all of {CONFIG.name}, in about half an hour on 2 cores:\npython -m pretrain demo --config {CONFIG}"
        )
    check(run_ranks(["train", str(config_path), *overrides], ranks))
    say("evaluating")
    results_path = out / "retrieval.json"
    if not is_current(results_path, config.run):
        if results_path.exists():  # exports of an earlier, shorter training
            for name in EXPORTS:
                shutil.rmtree(out / "exports" / name, ignore_errors=True)
        elif found := [name for name in EXPORTS if (out / "exports" / name).exists()]:
            raise UserError(f"{out / 'exports' / found[0]}: not of this demo. Move it, or choose another --out")
        shards = str(out / "shards" / "val")
        evaluate = ["evaluate", "retrieval", "--run", config.run, "--shards", shards, "--json", str(results_path)]
        check(run_ranks(evaluate, ranks))
    say("exporting, and reloading each export with its own library")
    for name in EXPORTS:
        target = out / "exports" / name
        if target.exists():
            print(f"{target}: exported already")
        elif name == "huggingface" and config.model.image.kind == "resnet":
            print("huggingface: transformers has no class for a CLIP with a ResNet; left out")
        else:
            call("pretrain", "export", "--run", config.run, "--to", name, "--out", str(target))
    print("\n" + render_summary(out, config, json.loads(results_path.read_text())))


def check(code: int) -> None:
    if code:
        raise StageError(code)


def call(package: str, *arguments: str) -> None:
    check(subprocess.run([sys.executable, "-m", package, *arguments], check=False).returncode)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def usable_ranks(asked: int) -> int:
    """As many as asked for; on GPUs, no more than there are."""
    import torch

    return min(asked, torch.cuda.device_count()) if torch.cuda.is_available() else asked


def has_bf16() -> bool:
    import torch

    from pretrain.engine import multiplies_in_bf16

    return multiplies_in_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def check_inputs(options: argparse.Namespace) -> None:
    if bool(options.captions) != bool(options.images):
        raise UserError("--captions FILE and --images DIR go together: the table of captions, and its pictures")
    if bool(options.train_list) != bool(options.val_list):
        raise UserError("--train-list and --val-list go together; without both, the pictures are split 95 to 5")
    if options.train_list and not options.captions:
        raise UserError("--train-list and --val-list need --captions and --images")
    for path in (options.captions, options.images, options.train_list, options.val_list):
        if path and not Path(path).exists():
            raise UserError(f"{path}: no such file or folder")


def prepare_pictures(options: argparse.Namespace, out: Path) -> tuple[Path, Path, dict[str, Path]]:
    """The table of captions, the folder of pictures, and the list of names of each split: the user's, or drawn ones."""
    if not options.captions:
        scenes = out / "scenes"
        say(f"drawing {SCENES:,} scenes to train on and {VAL_SCENES:,} to evaluate on")
        call("data_tools", "scenes", str(scenes), "--count", str(SCENES), "--val-count", str(VAL_SCENES), "--seed", "0")
        lists = {split: scenes / "splits" / f"{split}.txt" for split in ("train", "val")}
        return scenes / "captions.tsv", scenes / "images", lists
    captions, images = Path(options.captions), Path(options.images)
    if options.train_list:
        return captions, images, {"train": Path(options.train_list), "val": Path(options.val_list)}
    return captions, images, split_names(captions, out / "splits")


def split_names(captions: Path, folder: Path) -> dict[str, Path]:
    """Write the lists of a 95/5 split by a hash of SPLIT_SEED and each picture's name: the same pictures, the same split.

    Raises UserError for fewer than two pictures.
    """
    from data_tools.sources import read_rows

    names = list(dict.fromkeys(row.image for row in read_rows(captions, "filename", "caption")))
    if len(names) < 2:
        raise UserError(
            f"{captions}: {len(names)} pictures cannot be split into two sets. Give more, or give the lists"
        )
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{SPLIT_SEED}/{name}".encode()).digest())
    val_count = max(1, len(ranked) * VAL_PERCENT // 100)
    folder.mkdir(parents=True, exist_ok=True)
    lists = {"train": folder / "train.txt", "val": folder / "val.txt"}
    for split, chosen in zip(lists, (set(ranked[val_count:]), set(ranked[:val_count])), strict=True):
        write_atomic(lists[split], "".join(f"{name}\n" for name in names if name in chosen).encode())
    return lists


def is_current(results_path: Path, run: str) -> bool:
    """Whether the evaluation file is of the run's last step."""
    if not results_path.exists():
        return False
    current = json.loads(results_path.read_text())["step"] == read_metrics(run)[-1]["step"]
    if current:
        print(f"{results_path}: evaluated already")
    return current


def render_summary(out: Path, config: RunConfig, results: dict[str, Any]) -> str:
    """The closing table, and where everything is."""
    from pretrain.evaluate.retrieval import render_table

    lines = read_metrics(config.run)
    first, last = lines[0], lines[-1]
    rates = sorted(line["rate/samples_per_s"] for line in lines[1:] or lines)
    rows = [
        ("loss, start to end", f"{first['loss/total']:.3f} -> {last['loss/total']:.3f}"),
        ("steps, samples", f"{last['step']:,}, {last['step'] * config.train.batch_size:,}"),
        ("samples/s, median", f"{rates[len(rates) // 2]:.1f}"),
        ("shards", out / "shards"),
        ("run folder", config.run),
        ("exports", f"{out / 'exports'}{os.sep}{{{','.join(n for n in EXPORTS if (out / 'exports' / n).exists())}}}"),
    ]
    return render_table(results) + "\n\n" + "\n".join(f"{name:<20}{value}" for name, value in rows)

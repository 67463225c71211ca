"""Flickr8k from scratch, here and in open_clip's own trainer, and the recalls of both by one scorer.

    pip install -e .[bench]
    python benchmarks/flickr8k_vs_open_clip.py --data flickr8k

The same pairs, towers, batch, schedule, optimiser, crops, precision and number of samples: open_clip's arguments are
derived from our config. What differs is what is compared: our matching loss beside the contrastive one, one of a
picture's captions a pass instead of each as a pair of its own, and the machinery. A stage that has finished leaves a
file under --out and is skipped by the next call, so a benchmark that was interrupted goes on.

Shape legend: I pictures, T captions, E embedding, S pixels.
"""

import argparse
import csv
import importlib.metadata
import importlib.util
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_tools.errors import UserError, run_command
from data_tools.files import lock_folder, write_atomic, write_json_atomic
from data_tools.sources import read_rows
from pretrain.config import load_config
from pretrain.engine import settle_precision
from pretrain.evaluate.retrieval import RECALL_AT, recalls, search
from pretrain.local import end_with_parent
from pretrain.metrics import read_metrics
from pretrain.torchvision_ops import prepare_torchvision
from pretrain.train import RunConfig, load_run_config
from pretrain.world import World

CONFIG = Path(__file__).parent.parent / "configs" / "flickr8k.yaml"
RESIZE = 128  # pixels of the shorter side in our shards; the towers take 112
RERANK = 16
RANKS = 2  # of ours on CPUs; open_clip runs one process with as many threads. On GPUs both have one process and one GPU
LOADER_WORKERS = 2  # open_clip's decoding processes; ours decodes in as many threads a rank
MODEL = "benchmark-vit"  # open_clip's name for the towers
EMBED_BATCH = 250
TRAIN_OPEN_CLIP = "train-open-clip"  # the hidden subcommand that is open_clip's trainer
WAYS = {"text_to_image": "text to image", "image_to_text": "image to text"}


def main(arguments: list[str]) -> int:
    if arguments[:1] == [TRAIN_OPEN_CLIP]:
        return train_open_clip(arguments[1], arguments[2:])
    return run_command(compare, build_parser().parse_args(arguments))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="captions.tsv (filename, caption), images/, splits/{train,val}.txt"
    )
    parser.add_argument("--out", default="runs/flickr8k_vs_open_clip", metavar="DIR", help="folder for everything")
    parser.add_argument(
        "--run", metavar="RUN", help="a finished run folder of ours to compare, instead of training one"
    )
    parser.add_argument("--only", choices=("open_clip", "ours"), help="the stages of one side, and no table")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of configs/flickr8k.yaml")
    return parser


def compare(options: argparse.Namespace) -> int:
    """All stages in turn, and the table."""
    data, out = Path(options.data), Path(options.out)
    check_inputs(options, data)
    run = options.run or str(out / "run")
    paths = {"run": run, "data.path": str(out / "shards" / "train")}
    overrides = [*(f"{key}={json.dumps(path)}" for key, path in paths.items()), *options.overrides]
    config = load_run_config(run) if options.run else load_config(CONFIG, overrides, RunConfig)
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out):
        ours = theirs = None
        if options.only != "open_clip":
            ours = run_ours(config, overrides, data, out, trained=bool(options.run))
        if options.only != "ours":
            theirs = run_open_clip(config, data, out)
    if ours and theirs:
        print("\n" + render_comparison(ours, theirs))
    return 0


def check_inputs(options: argparse.Namespace, data: Path) -> None:
    if options.run and options.overrides:
        raise UserError("--run: a finished run has its config already; leave the overrides out")
    for name in ("captions.tsv", "images", "splits/train.txt", "splits/val.txt"):
        if not (data / name).exists():
            raise UserError(f"{data}: holds no {name}. Give the folder of an unpacked Flickr8k")
    if options.only != "ours" and importlib.util.find_spec("pandas") is None:
        raise UserError("open_clip's csv reader needs pandas: pip install -e .[bench]")


def claim(path: Path, settings: dict[str, Any]) -> None:
    """Note a side's settings in `path`, or refuse when its stages were begun with other ones."""
    if path.exists() and json.loads(path.read_text()) != settings:
        raise UserError(f"{path}: the stages here were begun with other data or another config; choose another --out")
    write_json_atomic(path, settings)


def run_stage(title: str, path: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `work`, which goes to `path`; or the one that an earlier call has left there."""
    if path.exists():
        print(f"\n== {title}: done already, {path}", flush=True)
        return json.loads(path.read_text())
    print(f"\n== {title}", flush=True)
    result = work()
    write_json_atomic(path, result)
    return result


def call(*arguments: str) -> None:
    """Run `python ARGUMENTS`, its output going where ours goes."""
    code = subprocess.run([sys.executable, *arguments], check=False, preexec_fn=end_with_parent).returncode
    if code:
        raise UserError(f"python {' '.join(arguments[:4])} ...: ended with exit code {code}. Its messages are above")


def steps_of(config: RunConfig, data: Path) -> int:
    return config.train.steps(len(read_names(data, "train")))


def read_names(data: Path, split: str) -> list[str]:
    return (data / "splits" / f"{split}.txt").read_text().split()


def read_captions(data: Path, split: str) -> dict[str, list[str]]:
    """The captions of each picture of a split, by its file name, in the table's order."""
    captions: dict[str, list[str]] = {}
    names = set(read_names(data, split))
    for row in read_rows(data / "captions.tsv", "filename", "caption"):
        if row.image in names and not row.refusal:
            captions.setdefault(row.image, []).append(row.caption)
    return captions


def run_ours(config: RunConfig, overrides: list[str], data: Path, out: Path, trained: bool) -> dict[str, Any]:
    """Shards, training (unless `trained`), evaluation: the recalls, `train_s` and `samples_per_s`."""
    described = config.model_dump(exclude={"run": True, "data": {"path"}})
    settings = {"data": str(data.resolve()), "run": str(Path(config.run).resolve()), "config": described}
    claim(out / "ours_settings.json", settings)
    splits = ("val",) if trained else ("train", "val")
    ranks = str(1 if on_gpu() else RANKS)
    for split in splits:
        inputs = [str(data / "captions.tsv"), str(out / "shards" / split), "--image-root", str(data / "images")]
        inputs += ["--keep-list", str(data / "splits" / f"{split}.txt"), "--resize", str(RESIZE)]
        run_stage(f"{split} shards", out / f"shards_{split}.json", lambda i=inputs: build_shards(i))

    def train() -> dict[str, Any]:
        if not trained:
            call("-m", "pretrain", "train", str(CONFIG), *overrides, "--ranks", ranks)
        return summarise_ours(config, steps_of(config, data))

    def evaluate() -> dict[str, Any]:
        results = out / "ours_retrieval.raw.json"
        arguments = ["--run", config.run, "--shards", str(out / "shards" / "val"), "--rerank", str(RERANK)]
        call("-m", "pretrain", "evaluate", "retrieval", *arguments, "--json", str(results), "--ranks", ranks)
        return json.loads(results.read_text())

    rates = run_stage("our training", out / "ours_train.json", train)
    return rates | run_stage("our evaluation", out / "ours_retrieval.json", evaluate)


def build_shards(arguments: list[str]) -> dict[str, Any]:
    call("-m", "data_tools", "build", *arguments)
    return {"command": ["build", *arguments]}


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def summarise_ours(config: RunConfig, steps: int) -> dict[str, Any]:
    lines = read_metrics(config.run)
    if lines[-1]["step"] != steps:
        raise UserError(f"{config.run}: is at step {lines[-1]['step']} of {steps}. Finish the run first")
    return summarise([(line["step"], line["time/step_s"]) for line in lines], config.train.batch_size)


def summarise(reports: list[tuple[int, float]], batch_size: int) -> dict[str, Any]:
    """Rates from (steps done, mean seconds of the steps since the report before), the data's part included."""
    before = [0, *(step for step, _ in reports)]
    train_s = sum((step - last) * step_s for (step, step_s), last in zip(reports, before, strict=False))
    return {"steps": reports[-1][0], "train_s": train_s, "samples_per_s": reports[-1][0] * batch_size / train_s}


def run_open_clip(config: RunConfig, data: Path, out: Path) -> dict[str, Any]:
    """open_clip's training and evaluation: the recalls, `train_s` and `samples_per_s`."""
    folder = out / "open_clip"
    captions = read_captions(data, "train")
    pairs = [(str((data / "images" / name).resolve()), text) for name, texts in captions.items() for text in texts]
    steps, epoch_steps = steps_of(config, data), len(pairs) // config.train.batch_size
    if steps % epoch_steps:
        raise UserError(f"train.duration: {steps} steps are not whole epochs of open_clip, each of {epoch_steps} steps")
    epochs = steps // epoch_steps
    towers = {
        "embed_dim": config.model.embed_dim,
        "vision_cfg": config.model.image.open_clip_config(),
        "text_cfg": config.model.text.open_clip_config(),
    }
    arguments = open_clip_arguments(config, epochs, Path())
    claim(out / "open_clip_settings.json", {"data": str(data.resolve()), "towers": towers, "arguments": arguments})

    def train() -> dict[str, Any]:
        write_inputs(towers, pairs, folder)
        call(__file__, TRAIN_OPEN_CLIP, str(folder / "models"), *open_clip_arguments(config, epochs, folder))
        return summarise_open_clip(folder / "logs" / MODEL / "out.log", epoch_steps, config.train.batch_size)

    def evaluate() -> dict[str, Any]:
        checkpoint = folder / "logs" / MODEL / "checkpoints" / f"epoch_{epochs}.pt"
        return evaluate_open_clip(folder / "models", checkpoint, data)

    rates = run_stage("open_clip's training", out / "open_clip_train.json", train)
    return rates | run_stage("open_clip's evaluation", out / "open_clip_retrieval.json", evaluate)


def write_inputs(towers: dict[str, Any], pairs: list[tuple[str, str]], folder: Path) -> None:
    """The table of pairs and the model description that open_clip reads."""
    (folder / "models").mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.writer(table, delimiter="\t", lineterminator="\n")  # quoted where needed, as pandas reads it
    writer.writerows([("filepath", "title"), *pairs])
    write_atomic(folder / "train.csv", table.getvalue().encode())
    write_json_atomic(folder / "models" / f"{MODEL}.json", towers)


def open_clip_arguments(config: RunConfig, epochs: int, folder: Path) -> list[str]:
    """Our config in the words of open_clip's command line."""
    import torch

    world = World(device=torch.device("cuda" if on_gpu() else "cpu"))
    engine, crop = settle_precision(config.engine, None, world), config.data.augment.crop_scale
    values = {
        "train-data": folder / "train.csv",
        "dataset-type": "csv",
        "csv-separator": "\t",
        "csv-img-key": "filepath",
        "csv-caption-key": "title",
        "model": MODEL,
        "logs": folder / "logs",
        "name": MODEL,
        "device": "cuda" if on_gpu() else "cpu",
        "precision": {"bf16": "amp_bf16", "fp16": "amp", "fp32": "fp32"}[engine.precision],
        "workers": LOADER_WORKERS,
        "batch-size": config.train.batch_size,
        "epochs": epochs,
        "lr": engine.lr,
        "warmup": engine.warmup_steps,
        "wd": engine.weight_decay,
        "beta1": engine.beta1,
        "beta2": engine.beta2,
        "eps": engine.epsilon,
        "seed": config.seed,
        "log-every-n-steps": config.train.log_every_steps,
        "resume": "latest",
        "save-frequency": 0,  # with --save-most-recent: the last one under its own name, the others by rename
    }
    if engine.gradient_clip:
        values["grad-clip-norm"] = engine.gradient_clip
    arguments = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return [*arguments, "--save-most-recent", "--aug-cfg", f"scale=({crop[0]},{crop[1]})"]


def train_open_clip(models: str, arguments: list[str]) -> int:
    """open_clip's `python -m open_clip_train.main`, with the models of a folder added to those that it knows."""
    prepare_torchvision()
    import open_clip
    from open_clip_train.main import main as run_trainer

    open_clip.add_model_config(models)
    return run_trainer(arguments) or 0


def summarise_open_clip(log: Path, epoch_steps: int, batch_size: int) -> dict[str, Any]:
    """Rates from the trainer's own log; of a step that it made twice, after an interruption, the second time."""
    pattern = re.compile(r"Train Epoch: (\d+) \[ *(\d+)/.*? Batch \(t\): ([\d.]+)")
    reports = {
        int(epoch) * epoch_steps + int(samples) // batch_size: float(step_s)
        for epoch, samples, step_s in pattern.findall(log.read_text())
    }
    return summarise(sorted(reports.items()), batch_size)


def evaluate_open_clip(models: Path, checkpoint: Path, data: Path) -> dict[str, Any]:
    """Recalls by our scorer, of embeddings that open_clip computes by itself: its transform, tokeniser and model, fp32."""
    prepare_torchvision()
    import open_clip
    import torch
    from PIL import Image
    from tqdm import tqdm

    open_clip.add_model_config(models)
    model, _, transform = open_clip.create_model_and_transforms(MODEL, pretrained=str(checkpoint), precision="fp32")
    tokenizer = open_clip.get_tokenizer(MODEL)
    model.eval()
    captions = read_captions(data, "val")
    names, texts = list(captions), [text for own in captions.values() for text in own]
    picture_of = torch.repeat_interleave(torch.tensor([len(own) for own in captions.values()]))  # [T]
    pictures = torch.arange(len(names))  # [I]
    image_embed, text_embed = [], []
    with torch.inference_mode():
        for start in tqdm(range(0, len(names), EMBED_BATCH), desc="pictures", unit="batch", disable=None):
            opened = [Image.open(data / "images" / name) for name in names[start : start + EMBED_BATCH]]
            image_embed.append(model.encode_image(torch.stack([transform(o) for o in opened]), normalize=True))
        for start in tqdm(range(0, len(texts), EMBED_BATCH), desc="captions", unit="batch", disable=None):
            text_embed.append(model.encode_text(tokenizer(texts[start : start + EMBED_BATCH]), normalize=True))
    image_embed, text_embed = torch.cat(image_embed), torch.cat(text_embed)  # [I,E], [T,E]
    to_image = search(text_embed, image_embed, picture_of, pictures, 1)[0]  # places of the true ones
    to_text = search(image_embed, text_embed, pictures, picture_of, 1)[0]
    results = {"pictures": len(names), "captions": len(texts)}
    return results | recalls("contrastive/text_to_image", to_image) | recalls("contrastive/image_to_text", to_text)


def render_comparison(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """The table, and below it the two comparisons that it is made for."""
    for count in ("pictures", "captions", "steps"):
        if ours[count] != theirs[count]:
            raise UserError(f"not comparable: ours has {ours[count]} {count}, open_clip {theirs[count]}")
    version = importlib.metadata.version("open_clip_torch")
    rows = [
        (f"open_clip {version}", theirs, "contrastive"),
        ("ours, contrastive", ours, "contrastive"),
        (f"ours, match rerank, top {ours['rerank']}", ours, "rerank"),
    ]
    lines = [
        f"{ours['pictures']} pictures, {ours['captions']} captions, {ours['steps']} steps; recall in %",
        f"{'':<28}" + "".join(f"{title:^24}" for title in WAYS.values()) + f"{'training s':>12}{'samples/s':>11}",
        f"{'':<28}" + "".join(f"{f'R@{k}':>8}" for _ in WAYS for k in RECALL_AT),
    ]
    for label, results, method in rows:
        values = "".join(f"{100 * results[f'{method}/{way}/recall_at_{k}']:8.1f}" for way in WAYS for k in RECALL_AT)
        lines.append(f"{label:<28}{values}{results['train_s']:12.0f}{results['samples_per_s']:11.1f}")
    verdicts = [
        f"{title} R@10 {100 * ours[f'contrastive/{way}/recall_at_10']:.1f} contrastive, "
        f"{100 * ours[f'rerank/{way}/recall_at_10']:.1f} reranked, "
        f"against {100 * theirs[f'contrastive/{way}/recall_at_10']:.1f}"
        for way, title in WAYS.items()
    ]
    ratio = ours["samples_per_s"] / theirs["samples_per_s"]
    verdicts.append(f"{ratio:.2f} times open_clip's samples/s, with the matching loss in our step")
    return "\n".join([*lines, "", *verdicts])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

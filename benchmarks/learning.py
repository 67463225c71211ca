"""What each objective and each kind of fusion learns at equal samples seen: recall at 1, contrastive and reranked.

    python -m pretrain demo                                      (builds the scenes)
    python benchmarks/learning.py --shards runs/demo/shards --out runs/learning
    python benchmarks/learning.py --config configs/flickr8k.yaml --shards flickr8k/shards --out runs/learning_flickr8k

The runs go one after another, seed by seed. One that has finished is not repeated, so a study that was interrupted goes
on. The table holds means over the seeds that are there, with the least and the greatest.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from data_tools.errors import UserError, run_command
from pretrain.__main__ import positive
from pretrain.config import load_config
from pretrain.local import run_ranks
from pretrain.train import RunConfig

NO_MATCHING = ["losses.matching=null", "model.match_head=false"]
CROSS = "kind: cross, width: {width}, layers: 2, heads: {heads}"
VARIANTS = {
    "contrastive": ["losses.matching=null", "model.fusion=null"],
    "+ matching": [],
    "+ matching + captioning": ["losses.captioning={{weight: 1.0}}", "model.captioning={{}}"],
    "+ matching, cross both ways": [f"model.fusion={{{{{CROSS}, direction: both}}}}"],
    "+ matching, shared": ["model.fusion={{kind: shared, width: {width}, layers: 2, heads: {heads}}}"],
    "+ matching, weighted": ["model.fusion={{kind: weighted, width: {width}, layers: 2, heads: {heads}}}"],
    "+ captioning": ["losses.captioning={{weight: 1.0}}", "model.captioning={{}}", *NO_MATCHING],
}
COLUMNS = [
    f"{score}/{way}/recall_at_1" for way in ("text_to_image", "image_to_text") for score in ("contrastive", "rerank")
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/demo.yaml", metavar="YAML")
    parser.add_argument("--shards", required=True, metavar="DIR", help="holds train/ and val/")
    parser.add_argument("--out", required=True, metavar="DIR", help="a run folder for each variant and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--ranks", type=positive, default=1)
    parser.add_argument("--table", action="store_true", help="only the table of what is there")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return run_command(study, parser.parse_args())


def study(options: argparse.Namespace) -> int:
    if not options.table:
        for seed in options.seeds:
            for name in options.variants:
                train_and_evaluate(options, name, seed)
    print(render(options))
    return 0


def folder_of(options: argparse.Namespace, name: str, seed: int) -> Path:
    return Path(options.out) / f"{name.translate(str.maketrans(' ', '_', '+,'))}_{seed}".lstrip("_")


def train_and_evaluate(options: argparse.Namespace, name: str, seed: int) -> None:
    run = folder_of(options, name, seed)
    if (run / "retrieval.json").exists():
        return
    fusion = load_config(options.config, [], RunConfig).model.fusion
    if fusion is None or not hasattr(fusion, "width"):
        raise UserError(f"{options.config}: needs a model.fusion with a width and heads, which all variants then have")
    sizes = {"width": fusion.width, "heads": fusion.heads}
    given = [f"run={run}", f"seed={seed}", f"data.path={options.shards}/train", *options.overrides]
    overrides = [override.format(**sizes) for override in VARIANTS[name]]
    print(f"\n== {name}, seed {seed}", flush=True)
    evaluate = ["evaluate", "retrieval", "--run", str(run), "--shards", f"{options.shards}/val"]
    for arguments in (
        ["train", options.config, *given, *overrides],
        [*evaluate, "--json", str(run / "retrieval.json")],
    ):
        if code := run_ranks(arguments, options.ranks):
            raise UserError(
                f"{name}, seed {seed}: '{arguments[0]}' ended with exit code {code}; its messages are above"
            )


def render(options: argparse.Namespace) -> str:
    heads = ["t2i", "t2i reranked", "i2t", "i2t reranked"]
    lines = [f"{'recall at 1 in %':<30}{'seeds':>6}" + "".join(f"{head:>22}" for head in heads)]
    for name in options.variants:
        paths = [folder_of(options, name, seed) / "retrieval.json" for seed in options.seeds]
        results = [json.loads(path.read_text()) for path in paths if path.exists()]
        cells = []
        for column in COLUMNS:
            values = [100 * result[column] for result in results if column in result]
            spread = f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})" if values else "-"
            cells.append(f"{spread:>22}")
        lines.append(f"{name:<30}{len(results):>6}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

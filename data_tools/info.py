"""Prints what a finished shard folder holds, in lines of at most 80 columns."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet

from data_tools.files import format_bytes, format_counts
from data_tools.shards import Manifest

_COLUMNS = 80
_EXAMPLES = 5


def print_info(directory: str | Path) -> None:
    """Print counts, picture sizes, failures by reason, examples of captions and the fingerprint of a build.

    Raises UserError when `directory` holds no finished build.
    """
    manifest = Manifest.load(directory)
    widths, heights, caption_counts, failures, examples = [], [], Counter(), Counter(), []
    for shard in manifest.shards:
        path = manifest.directory / f"{Path(shard.name).stem}.parquet"
        for row in pyarrow.parquet.read_table(path, columns=["error", "captions", "width", "height"]).to_pylist():
            if row["error"] is not None:
                failures[row["error"].partition(": ")[0]] += 1
                continue
            widths.append(row["width"])
            heights.append(row["height"])
            caption_counts[len(row["captions"])] += 1
            if len(examples) < _EXAMPLES:
                examples.append(row["captions"][0])
    per_image = ", ".join(f"{number}: {caption_counts[number]}" for number in sorted(caption_counts))
    lines = {
        "samples": f"{manifest.samples}, {format_bytes(manifest.bytes)} in {len(manifest.shards)} tars",
        "captions": f"{manifest.captions} (images with so many captions: {per_image})",
        "width px": _describe_range(widths),
        "height px": _describe_range(heights),
        "failures": f"{manifest.failures}" + (f" ({format_counts(failures)})" if failures else ""),
        "fingerprint": manifest.fingerprint,
    }
    print(manifest.directory)
    for name, text in lines.items():
        print(_cut(f"{name:<12} {text}"))
    print("examples")
    for caption in examples:
        print(_cut(f"  {' '.join(caption.split())}"))


def _describe_range(values: list[int]) -> str:
    return f"min {min(values)}, median {np.median(values):.0f}, max {max(values)}"


def _cut(line: str) -> str:
    return line if len(line) <= _COLUMNS else line[: _COLUMNS - 3] + "..."

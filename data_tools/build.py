"""A table of images and captions -> a shard folder, in parallel, and the same bytes however often it was interrupted.

Shard i holds a fixed range of the input samples, so any worker can make it alone. Its statistics file is written last
and says that it is complete; build.json, written first, says which build the folder holds.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import PIL
import pyarrow
import pyarrow.parquet

from data_tools.errors import UserError
from data_tools.files import (
    format_bytes,
    format_counts,
    hash_file,
    lock_folder,
    write_json_atomic,
)
from data_tools.folder import (
    add_counts,
    count,
    identify,
    is_finished,
    load_finished_shard,
    load_state,
    name_shards,
    prepare_folder,
    remove_run,
    select_info,
    write_sidecar,
)
from data_tools.image import PictureError, prepare_picture, read_picture
from data_tools.shards import (
    Manifest,
    ShardWriter,
    write_shard,
)
from data_tools.sources import Row, read_rows
from data_tools.workers import Report, choose_processes, open_progress_bar, run_tasks

SIDECAR_SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.string()),
        ("status", pyarrow.string()),
        ("error", pyarrow.string()),
        ("caption", pyarrow.string()),
        ("captions", pyarrow.list_(pyarrow.string())),
        ("width", pyarrow.int32()),
        ("height", pyarrow.int32()),
        ("original_width", pyarrow.int32()),
        ("original_height", pyarrow.int32()),
        ("sha256", pyarrow.string()),
        ("offset", pyarrow.int64()),
        ("size", pyarrow.int64()),
        ("source", pyarrow.string()),
    ]
)
"""A row for each input sample. `sha256` is that of the stored JPEG, `offset` and `size` say where it is in the tar."""

_LOOKED_UP_FIRST = 1000
_NAMES_SHOWN = 3


@dataclass(slots=True)
class _Sample:
    """One image of the input: its usable captions in input order, and why others were refused."""

    source: str
    captions: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _ShardTask:
    """All that a worker needs to make one shard alone."""

    out: Path
    stem: str
    build: str
    image_root: Path
    resize: int
    samples: list[_Sample]
    keys: list[str]


def build_shards(
    input: str | Path,
    out: str | Path,
    image_root: str | Path,
    *,
    image_column: str = "filename",
    caption_column: str = "caption",
    samples_per_shard: int = 1000,
    resize: int = 256,
    processes: int | None = None,
    seed: int | None = None,
    keep_list: str | Path | None = None,
    restart: bool = False,
) -> Manifest:
    """Build the folder `out` from the table `input` (see sources.py) and the pictures under `image_root`.

    Rows of one image become one sample with all their captions. Samples stay in input order, or are shuffled by `seed`.
    `resize` is the greatest shorter side in pixels, 0 keeps every size. `keep_list` is a file with one image name a
    line: only those are built. A run that was cut short goes on, a finished one is left alone; `restart` removes what
    an earlier build wrote. Pictures that cannot be used are counted, and listed in the .parquet files with the reason.

    Raises UserError for input that cannot be used, for a folder that holds another build or other tars, and when not
    one sample could be made.
    """
    input, out, image_root = Path(input), Path(out), Path(image_root)
    if samples_per_shard < 1 or resize < 0:
        raise UserError(
            f"--samples-per-shard {samples_per_shard} --resize {resize}: give at least 1, and 0 or a number of pixels"
        )
    if not image_root.is_dir():
        raise UserError(f"{image_root}: no such folder. Give the folder of the pictures as --image-root")
    processes = choose_processes(processes)
    keep = None if keep_list is None else _read_keep_list(Path(keep_list))
    options = {
        "input": input.name,
        "input_sha256": hash_file(input),
        "keep_list_sha256": None if keep is None else hashlib.sha256("\n".join(sorted(keep)).encode()).hexdigest(),
        "image_column": image_column,
        "caption_column": caption_column,
        "samples_per_shard": samples_per_shard,
        "resize": resize,
        "seed": seed,
    }
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out):
        state = load_state(out)
        if state is not None and restart:
            remove_run(out, state)
            state = None
        root = str(image_root.resolve())
        versions = {"pillow": PIL.__version__}
        if state is not None and is_finished(out, state, {**options, "image_root": root}, versions):
            manifest = Manifest.load(out)
            print(f"{out}: this build is finished already, with {manifest.samples} samples")
            return manifest
        samples = _choose_samples(input, _group_rows(read_rows(input, image_column, caption_column)), keep, seed)
        _look_up_pictures(image_root, samples)
        tasks = _plan_shards(out, identify(options), image_root, resize, samples_per_shard, samples)
        prepare_folder(out, [task.stem for task in tasks], state, options, image_root=root, **versions)
        return _build(out, tasks, options, processes)


# What is to be built


def _group_rows(rows: Iterable[Row]) -> dict[str, _Sample]:
    """One sample an image, in the order of their first rows, wherever its other rows stand."""
    samples: dict[str, _Sample] = {}
    for row in rows:
        sample = samples.get(row.image)
        if sample is None:
            sample = samples[row.image] = _Sample(row.image)
        if row.refusal:
            sample.refusals.append(row.refusal)
        else:
            sample.captions.append(row.caption)
    return samples


def _read_keep_list(path: Path) -> set[str]:
    try:
        names = {line.rstrip("\r") for line in path.read_text(encoding="utf-8-sig").split("\n")} - {""}
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text. Give a list with one image name a line") from None
    if not names:
        raise UserError(f"{path}: the list is empty. Give one image name a line")
    return names


def _choose_samples(input: Path, samples: dict[str, _Sample], keep: set[str] | None, seed: int | None) -> list[_Sample]:
    """The samples that are on the keep list, in input order or shuffled: a hash of seed and name is a pure function."""
    if keep is not None:
        absent = sorted(keep - samples.keys())
        if len(absent) == len(keep):
            raise UserError(f"{input}: none of the {len(keep)} names of --keep-list (first: {absent[0]}). Check both")
        if absent:
            shown = ", ".join(absent[:_NAMES_SHOWN])
            text = f"warning: {input}: {len(absent)} of {len(keep)} names of --keep-list are not in it (first: {shown})"
            print(text, file=sys.stderr)
    chosen = [sample for name, sample in samples.items() if keep is None or name in keep]
    if not chosen:
        raise UserError(f"{input}: no rows. Give a table with a header and one row a caption")
    if seed is not None:
        chosen.sort(key=lambda sample: hashlib.sha256(f"{seed}/{sample.source}".encode()).digest())
    return chosen


def _look_up_pictures(image_root: Path, samples: list[_Sample]) -> None:
    """Refuse a wrong image root before thousands of failures are written."""
    first = samples[:_LOOKED_UP_FIRST]
    if not any(os.path.exists(image_root / sample.source) for sample in first):
        raise UserError(
            f"{image_root}: none of the first {len(first)} pictures is here (such as {first[0].source}). "
            "Give their folder as --image-root"
        )


def _plan_shards(
    out: Path, build: str, image_root: Path, resize: int, samples_per_shard: int, samples: list[_Sample]
) -> list[_ShardTask]:
    """Cut the samples into shards; keys are the shard's number and the place in it, failures included."""
    starts = range(0, len(samples), samples_per_shard)
    digits = max(4, len(str(samples_per_shard - 1)))
    tasks = []
    for start, stem in zip(starts, name_shards(len(starts)), strict=True):
        part = samples[start : start + samples_per_shard]
        keys = [f"{stem}{place:0{digits}d}" for place in range(len(part))]
        tasks.append(_ShardTask(out, stem, build, image_root, resize, part, keys))
    return tasks


# Building


def _build(out: Path, tasks: list[_ShardTask], options: dict[str, Any], processes: int) -> Manifest:
    """Make the shards that are not there yet, then the manifest, and print what came of it."""
    shards = [load_finished_shard(task.out, task.stem, task.build) for task in tasks]
    waiting = [number for number, statistics in enumerate(shards) if statistics is None]
    samples = sum(len(tasks[number].samples) for number in waiting)
    if len(waiting) < len(tasks):
        print(f"{out}: going on, {len(tasks) - len(waiting)} of {len(tasks)} shards are there already")
    started_s = time.monotonic()
    with open_progress_bar(samples, "sample") as report:
        results = run_tasks(_build_shard, [tasks[number] for number in waiting], processes, report)
        with closing(results):
            for place, statistics in results:
                shards[waiting[place]] = statistics
    elapsed_s = time.monotonic() - started_s
    failures, refusals = (
        add_counts(statistics[part] for statistics in shards) for part in ("failures_by_reason", "refused_captions")
    )
    infos = [select_info(statistics) for statistics in shards]
    captions = sum(statistics["captions"] for statistics in shards)
    build, options = tasks[0].build, {**options, "pillow": PIL.__version__}
    manifest = Manifest.of_shards(out, infos, build, failures.total(), captions, options)
    if manifest.samples == 0:
        raise UserError(
            f"{out}: not one of {failures.total()} samples could be made ({format_counts(failures)}). Mend that, and "
            "run again with --restart"
        )
    manifest.write()
    print(
        f"{out}: {manifest.samples} samples, {captions} captions, {format_bytes(manifest.bytes)} in {len(tasks)} tars; "
        f"{samples / max(elapsed_s, 1e-9):.0f} images/s"
    )
    if failures:
        print(f"failures: {failures.total()} ({format_counts(failures)}); see the error column of {out}/*.parquet")
    if refusals:
        print(f"captions refused: {refusals.total()} ({format_counts(refusals)})")
    return Manifest.load(out)


def _build_shard(task: _ShardTask, report: Report) -> dict[str, Any]:
    """Write one shard's tar, index, sidecar and, last, its statistics; return the statistics."""
    tar = task.out / f"{task.stem}.tar"
    rows = []
    with write_shard(tar) as writer:
        for key, sample in zip(task.keys, task.samples, strict=True):
            row = {"key": key, "source": sample.source, "captions": sample.captions}
            try:
                row |= _add_sample(writer, key, sample, task)
                row |= {"status": "success", "caption": sample.captions[0]}
            except PictureError as error:
                row |= {"status": "failure", "error": str(error), "reason": error.reason}
            rows.append(row)
            report(1, int("reason" in row))
    write_sidecar(tar.with_suffix(".parquet"), rows, SIDECAR_SCHEMA)
    made = [row for row in rows if row["status"] == "success"]
    statistics = {
        **asdict(writer.info),
        "build": task.build,
        "failures": len(rows) - len(made),
        "captions": sum(len(row["captions"]) for row in made),
        "failures_by_reason": count(row["reason"] for row in rows if "reason" in row),
        "refused_captions": count(refusal for sample in task.samples for refusal in sample.refusals),
    }
    write_json_atomic(task.out / f"{task.stem}_stats.json", statistics)
    return statistics


def _add_sample(writer: ShardWriter, key: str, sample: _Sample, task: _ShardTask) -> dict[str, Any]:
    """Append one sample to the tar and return its part of the sidecar's row. Raises PictureError."""
    if not sample.captions:
        raise PictureError("no caption", sample.refusals[0])
    picture = prepare_picture(read_picture(task.image_root, sample.source), task.resize)
    facts = {
        "width": picture.width,
        "height": picture.height,
        "original_width": picture.original_width,
        "original_height": picture.original_height,
        "sha256": hashlib.sha256(picture.jpeg).hexdigest(),
    }
    content = {"captions": sample.captions, "key": key, "source": sample.source, **facts}
    fields = {
        "jpg": picture.jpeg,
        "txt": sample.captions[0].encode(),
        "json": json.dumps(content, ensure_ascii=False).encode(),
    }
    offset, size = writer.add(key, fields)
    return {**facts, "offset": offset, "size": size}

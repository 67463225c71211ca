"""Rows of any source -> a shard folder, in parallel, and the same bytes however often it was interrupted.

Shard i holds a fixed range of the input samples (see plan.py), so any process or machine can make it alone. Its
statistics file is written last and says that it is complete; build.json, written first, says which build the folder
holds; manifest.json, written last of all, that the build is finished.
"""

import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow

from data_tools.captions import CaptionError, CaptionPolicy, clean_caption
from data_tools.errors import UserError
from data_tools.fetch import HEALABLE, FetchOptions, fetch_all
from data_tools.files import TEMPORARY_SUFFIX, Folder, format_counts, is_url, lock_folder, open_folder
from data_tools.folder import (
    PLAN_NAME,
    add_counts,
    choose_plan_place,
    complete_shard,
    identify,
    is_finished,
    list_own_files,
    list_retried,
    list_shard_files,
    list_sidecar_fields,
    list_stems,
    load_added_shards,
    load_finished_shard,
    load_finished_shards,
    load_state,
    make_shards,
    name_shards,
    prepare_folder,
    remove_leftovers,
    remove_run,
    render_summary,
    select_info,
)
from data_tools.image import ImagePolicy, PictureError, prepare_picture
from data_tools.plan import Plan, Sample, load_or_make_plan, read_samples, remove_plan, write_samples
from data_tools.shards import MANIFEST_NAME, RETRY_NAME, Manifest, ShardInfo, ShardWriter, write_shard
from data_tools.sources import Source, open_source
from data_tools.workers import Report, Workers, choose_processes, start_workers

_LOOKED_UP_FIRST = 1000
_JSON = json.JSONEncoder(ensure_ascii=False)  # json.dumps would make one a sample
_ALIASES = {"double": "float64", "bool": "bool_"}  # names of types in pyarrow that are not those of their makers


@dataclass(frozen=True)
class _Recipe:
    """What all shards of a build have in common; it goes to the worker processes."""

    out: Folder
    build: str
    source: Source | None  # of embedded pictures
    fetch: FetchOptions
    images: ImagePolicy
    captions: CaptionPolicy
    samples_per_shard: int
    extra: dict[str, str]  # the other columns of the input, each with the name of its type

    @property
    def schema(self) -> pyarrow.Schema:
        columns = [(name, getattr(pyarrow, _ALIASES.get(kind, kind))()) for name, kind in self.extra.items()]
        return pyarrow.schema([*list_sidecar_fields(), *columns])


@dataclass(frozen=True)
class _ShardTask:
    """All that a worker needs to make one shard alone."""

    recipe: _Recipe
    stem: str
    rows: Path  # of the plan
    samples: int


def build_shards(
    input: str | Path,
    out: str | Path,
    image_root: str | Path | None = None,
    *,
    kind: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    keep_columns: Sequence[str] | None = None,
    keep_list: str | Path | None = None,
    samples_per_shard: int = 1000,
    seed: int | None = None,
    images: ImagePolicy | None = None,
    captions: CaptionPolicy | None = None,
    fetch: FetchOptions | None = None,
    processes: int | None = None,
    task: tuple[int, int] | None = None,
    restart: bool = False,
) -> Manifest | None:
    """Build the folder (or fsspec URL) `out` from `input` (see sources.py).

    Rows of one image become one sample with all their captions. Samples stay in input order, or are shuffled by `seed`.
    Names of pictures start from `image_root` (default: where the input lies). `keep_list` is a file with one image name
    a line: only those are built. A run that was cut short goes on, a finished one is left alone; `restart` removes what
    an earlier build wrote. Pictures that cannot be used are counted, and listed in the .parquet files with the reason.

    With `task` (number from 1, tasks) only every so many-th shard is made, and None returned: `finish` writes the
    manifest when all tasks are done. Tasks share nothing but the folder, and may run at once, on any machines.

    Raises UserError for input that cannot be used, for a folder that holds another build or other tars, and when not
    one sample could be made.
    """
    images, captions, fetch = images or ImagePolicy(), captions or CaptionPolicy(), fetch or FetchOptions()
    _check_cuts(samples_per_shard, task, restart)
    processes = choose_processes(processes)
    keep = None if keep_list is None else _read_keep_list(Path(keep_list))
    source = open_source(
        str(input), kind=kind, image_column=image_column, caption_column=caption_column, keep_columns=keep_columns
    )
    fetch = replace(fetch, image_root=_find_image_root(str(input), image_root))
    options = {
        "input": Path(str(input).rstrip("/")).name,
        "input_sha256": source.identity(),
        "keep_list_sha256": None if keep is None else hashlib.sha256("\n".join(sorted(keep)).encode()).hexdigest(),
        "kind": kind,
        "image_column": image_column,
        "caption_column": caption_column,
        "keep_columns": None if keep_columns is None else list(keep_columns),
        "samples_per_shard": samples_per_shard,
        "seed": seed,
        **_flatten("images", images),
        **_flatten("captions", captions),
    }
    folder = open_folder(out)
    folder.make()
    with ExitStack() as stack:
        stack.enter_context(folder.lock(exclusive=task is None))
        before = load_state(folder)
        state = None if restart else before
        if state is not None and is_finished(folder, state, options | {"image_root": fetch.image_root}, versions()):
            return _tell_finished(folder)
        build = identify(options)
        workers = stack.enter_context(start_workers(_build_shard, processes))  # they import while the plan is made
        place = stack.enter_context(choose_plan_place(folder))
        try:
            plan = load_or_make_plan(source, place, build, samples_per_shard, seed, keep)
            if not source.embedded:
                _look_up_pictures(fetch.image_root, plan)
        except UserError:
            _remove_plan(folder)
            raise
        columns = {name: str(kind) for name, kind in source.extra_columns().items()}
        embedded = source if source.embedded else None
        recipe = _Recipe(folder, build, embedded, fetch, images, captions, samples_per_shard, columns)
        stems = name_shards(plan.shards)
        tasks = [_ShardTask(recipe, stem, plan.path(i), plan.count(i)) for i, stem in enumerate(stems)]
        tasks = tasks if task is None else tasks[task[0] - 1 :: task[1]]
        facts = {"image_root": fetch.image_root, "columns": columns, "fetch": asdict(fetch), **versions()}
        if restart and before is not None:  # only now: input that cannot be used has been refused
            remove_run(folder, before)
        prepare_folder(folder, stems, state, options, shared=task is not None, **facts)
        if task is not None:
            _remove_own_leftovers(folder, tasks)
        started_s = time.monotonic()
        statistics, tried = _make_shards(tasks, processes, workers)
        if task is not None:
            print(f"{folder}: task {task[0]} of {task[1]} is done: {len(tasks)} of {len(stems)} shards")
            return None
        elapsed_s = time.monotonic() - started_s
        manifest = _finish(folder, statistics, options, f"{tried / max(elapsed_s, 1e-9):.0f} images/s")
    _remove_plan(folder)
    return manifest


def finish_build(out: str | Path) -> Manifest:
    """Write the manifest of a build whose tasks have made all shards. Raises UserError when one is missing."""
    folder = open_folder(out)
    with folder.lock():
        state = load_state(folder)
        if state is None:
            raise UserError(f"{folder}: holds no build. Give the OUT of the tasks")
        if folder.size(MANIFEST_NAME) is not None:
            return _tell_finished(folder)
        stems = list_stems(state)
        statistics = load_finished_shards(folder, stems, identify(state["options"]))
        missing = [stem for stem, found in zip(stems, statistics, strict=True) if found is None]
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of {len(stems)} shards are not there (such as {missing[0]}). Run the tasks "
                "that make them, or the same build without --task"
            )
        remove_leftovers(folder, list_own_files(stems))
        manifest = _finish(folder, statistics, state["options"])
    _remove_plan(folder)
    return manifest


def retry_failures(out: str | Path, processes: int | None = None, **fetch: Any) -> Manifest:
    """Try again what failed for a reason that can heal (time-outs, server errors, names that were not found), and write
    what comes as added shards; what is there stays untouched. `fetch` goes over the build's own FetchOptions.

    Raises UserError for a folder without a finished build.
    """
    processes, folder = choose_processes(processes), open_folder(out)
    with folder.lock(), tempfile.TemporaryDirectory() as work:
        state, manifest = load_state(folder), Manifest.load(folder)
        if state is None:
            raise UserError(f"{folder}: holds no build.json, so what was asked for is not known. Build it again")
        samples = _list_healable(manifest, state["columns"])
        size = state["options"]["samples_per_shard"]
        cuts = range(0, len(samples), size)
        stems = [shard.name.removesuffix(".tar") for shard in manifest.shards]
        first = 1 + max(map(int, stems))  # not their number: of earlier retries some may have added nothing
        added = name_shards(first + len(cuts))[first:]
        begun = set(list_retried(folder)) - {*stems, *added}  # by a retry that was killed at its very end
        for name in sorted(list_shard_files(sorted(begun))):
            folder.remove(name)
        remove_leftovers(folder, list_own_files([*stems, *added]))
        if not samples:
            folder.remove(RETRY_NAME)
            print(f"{folder}: none of its {manifest.failures} failures is of a kind that can heal")
            return manifest
        recipe = _Recipe(
            folder,
            _name_retry(manifest.build, manifest.shards),
            None,
            FetchOptions(**{**_tuples(state["fetch"]), **fetch}),
            ImagePolicy(**_pick(state["options"], "images")),
            CaptionPolicy(max_chars=0),  # the captions are clean already
            size,
            state["columns"],
        )
        tasks = []
        for start, stem in zip(cuts, added, strict=True):
            part = samples[start : start + size]
            tasks.append(_ShardTask(recipe, stem, Path(work) / f"{stem}.parquet", len(part)))
            write_samples(tasks[-1].rows, part)
        folder.write_json(RETRY_NAME, {"shards": [f"{stem}.tar" for stem in added]})
        statistics, _ = _make_shards(tasks, processes)
        kept = [part for part in statistics if _tells_news(part)]
        for part in statistics:
            if part not in kept:
                for name in sorted(list_shard_files([part["name"].removesuffix(".tar")])):
                    folder.remove(name)
        gained = sum(part["samples"] for part in kept)
        if kept:
            manifest = Manifest.of_shards(
                folder,
                [*manifest.shards, *map(select_info, kept)],
                manifest.build,
                manifest.failures - gained,
                manifest.captions + sum(part["captions"] for part in kept),
                {
                    **manifest.options,
                    "retried": [*manifest.options.get("retried", []), *(part["name"] for part in kept)],
                },
            )
            manifest.write()
        folder.remove(RETRY_NAME)
    print(
        f"{folder}: {gained} of {len(samples)} healed, in {len(kept)} added shards; {manifest.failures} failures are left"
    )
    return Manifest.load(folder)


def _tells_news(statistics: dict[str, Any]) -> bool:
    """Whether a retried shard has samples, or failures that need not be tried again."""
    return bool(statistics["samples"] or statistics["failures_by_reason"].keys() - HEALABLE)


# What is to be built


def _check_cuts(samples_per_shard: int, task: tuple[int, int] | None, restart: bool) -> None:
    """Refuse numbers of samples and tasks that make no sense."""
    if samples_per_shard < 1:
        raise UserError(f"--samples-per-shard {samples_per_shard}: give at least 1")
    if task is not None and not 1 <= task[0] <= task[1]:
        raise UserError(f"--task {task[0]}/{task[1]}: give the task's number, from 1, and the number of tasks: 3/16")
    if task is not None and restart:
        raise UserError("--task and --restart: to begin anew, remove OUT before the tasks start")


def _flatten(section: str, policy: Any) -> dict[str, Any]:
    """The fields of a policy as `section.name`, as JSON has them, so that a difference can be named."""
    return {f"{section}.{name}": json.loads(json.dumps(value)) for name, value in asdict(policy).items()}


def _pick(options: dict[str, Any], section: str) -> dict[str, Any]:
    """The arguments that `_flatten` has described."""
    return _tuples({name.partition(".")[2]: value for name, value in options.items() if name.startswith(section + ".")})


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """The values with tuples where JSON has lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def versions() -> dict[str, str]:
    """The versions of what decodes and encodes pictures: one build is made by one set of them."""
    from importlib.metadata import version

    return {name: version(name) for name in ("opencv-python-headless", "pillow", "simplejpeg")}


def _read_keep_list(path: Path) -> set[str]:
    try:
        names = {line.rstrip("\r") for line in path.read_text(encoding="utf-8-sig").split("\n")} - {""}
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text. Give a list with one image name a line") from None
    if not names:
        raise UserError(f"{path}: the list is empty. Give one image name a line")
    return names


def _find_image_root(input: str, image_root: str | Path | None) -> str:
    """Where names of pictures start: as given, else where the input lies. Raises UserError for a folder that is not."""
    if image_root is None:
        if is_url(input):
            return input.rpartition("/")[0]
        path = Path(input)
        return str((path if path.is_dir() else path.parent).resolve())
    if is_url(str(image_root)):
        return str(image_root).rstrip("/")
    if not Path(image_root).is_dir():
        raise UserError(f"{image_root}: no such folder. Give the folder of the pictures as --image-root")
    return str(Path(image_root).resolve())


def _look_up_pictures(image_root: str, plan: Plan) -> None:
    """Refuse a wrong image root before thousands of failures are written."""
    first = [sample.source for sample in islice(read_samples(plan.path(0)), _LOOKED_UP_FIRST)]
    if is_url(image_root) or any(map(is_url, first)):
        return
    if not any(os.path.exists(os.path.join(image_root, name)) for name in first if "\0" not in name):
        raise UserError(
            f"{image_root}: none of the first {len(first)} pictures is here (such as {first[0]}). "
            "Give their folder as --image-root"
        )


def _tell_finished(folder: Folder) -> Manifest:
    manifest = Manifest.load(folder)
    _remove_plan(folder)  # a process that was killed after it wrote the manifest has left it
    print(f"{folder}: this build is finished already, with {manifest.samples} samples")
    return manifest


def _remove_own_leftovers(folder: Folder, tasks: list[_ShardTask]) -> None:
    """Remove what killed processes have left of these shards, unless one is being made by another process now."""
    left = {name.partition(".")[0].removesuffix("_stats") for name in folder.names() if name.endswith(TEMPORARY_SUFFIX)}
    for task in tasks:
        if task.stem in left:
            with suppress(UserError), lock_folder(task.rows):
                remove_leftovers(folder, list_shard_files([task.stem]))


def _remove_plan(folder: Folder) -> None:
    if type(folder) is Folder:
        remove_plan(folder.path / PLAN_NAME)


# Building


def _make_shards(
    tasks: list[_ShardTask], processes: int, workers: Workers | None = None
) -> tuple[list[dict[str, Any]], int]:
    """Make the shards that are not there yet; returns the statistics of all, and the number of samples tried now."""
    if not tasks:
        return [], 0
    folder, build, stems = tasks[0].recipe.out, tasks[0].recipe.build, [task.stem for task in tasks]
    samples = [task.samples for task in tasks]
    return make_shards(folder, build, stems, _build_shard, tasks, samples, processes, workers)


def _finish(folder: Folder, statistics: list[dict[str, Any]], options: dict[str, Any], rate: str = "") -> Manifest:
    """Write the manifest, and print what came of the build.

    Shards that `retry` added are there when a manifest was removed to have a damaged shard made again.
    """
    build = identify(options)
    failures = add_counts(part["failures_by_reason"] for part in statistics)
    added = _keep_added_shards(folder, statistics, build)
    retried = {"retried": [part["name"] for part in added]} if added else {}
    manifest = Manifest.of_shards(
        folder,
        [select_info(part) for part in (*statistics, *added)],
        build,
        failures.total() - sum(part["samples"] for part in added),
        sum(part["captions"] for part in (*statistics, *added)),
        {**options, **versions(), **retried},
    )
    if manifest.samples == 0:
        raise UserError(
            f"{folder}: not one of {failures.total()} samples could be made ({format_counts(failures)}). Mend that, and "
            "run again with --restart"
        )
    manifest.write()
    print(render_summary(manifest, failures, add_counts(part["refused_captions"] for part in statistics), rate))
    return Manifest.load(folder)


def _keep_added_shards(folder: Folder, statistics: list[dict[str, Any]], build: str) -> list[dict[str, Any]]:
    """The statistics of shards that `retry` has added to just these. Others, whose samples the shards that were made
    anew may hold themselves, are removed."""
    shards = [select_info(part) for part in statistics]
    found = load_added_shards(folder, [shard.name.removesuffix(".tar") for shard in shards], build)
    added = []
    for name, group in groupby(found, key=lambda part: part["build"]):
        parts = list(group)
        if name == _name_retry(build, shards):
            added += parts
            shards += map(select_info, parts)
            continue
        for part in parts:
            for file in sorted(list_shard_files([part["name"].removesuffix(".tar")])):
                folder.remove(file)
        print(f"{folder}: removed {len(parts)} shards that `retry` had added to others than these. Run it again")
    return added


def _name_retry(build: str, shards: Sequence[ShardInfo]) -> str:
    """What statistics of added shards name instead of the build: it, and what they were added to."""
    return f"{build}-{hashlib.sha256(' '.join(shard.sha256 for shard in shards).encode()).hexdigest()[:16]}"


def _build_shard(task: _ShardTask, report: Report) -> dict[str, Any]:
    """Write one shard's tar, index, sidecar and, last, its statistics; return the statistics.

    The lock is for processes that are to make the same shard at once: the same task twice, or a worker that has not
    noticed yet that its parent was killed.
    """
    with lock_folder(task.rows, wait=True):
        return load_finished_shard(task.recipe.out, task.stem, task.recipe.build) or _write_shard(task, report)


def _write_shard(task: _ShardTask, report: Report) -> dict[str, Any]:
    recipe, name = task.recipe, f"{task.stem}.tar"
    digits = max(4, len(str(recipe.samples_per_shard - 1)))
    samples = list(read_samples(task.rows))
    refusals: Counter[str] = Counter()
    for sample in samples:
        _clean_captions(sample, recipe.captions)
        refusals.update(sample.refusals)
    rows = []
    with recipe.out.together() as out:
        with write_shard(out, name) as writer, closing(_read_pictures(recipe, samples)) as pictures:
            for place, sample in enumerate(samples):
                key = f"{task.stem}{place:0{digits}d}"
                extra = json.loads(sample.extra) if sample.extra else {}
                row = {"key": key, "source": sample.source, "captions": sample.captions, **extra}
                try:
                    if not sample.captions:
                        raise PictureError("no caption", sample.refusals[0])
                    row |= _add_sample(writer, key, sample, next(pictures), recipe.images, extra)
                    row |= {"status": "success", "caption": sample.captions[0]}
                    report(1, size=row["size"])
                except PictureError as error:
                    row |= {"status": "failure", "error": str(error)}
                    report(1, error.reason)
                rows.append(row)
            if recipe.source is not None:
                recipe.source.check_unchanged(only_read=True)
        refused = dict(sorted(refusals.items()))
        return complete_shard(out, writer.info, recipe.build, rows, recipe.schema, refused_captions=refused)


def _clean_captions(sample: Sample, policy: CaptionPolicy) -> None:
    """Clean the captions in place; those that cannot be used become refusals, repeated ones go."""
    cleaned = []
    for caption in sample.captions:
        try:
            cleaned.append(clean_caption(caption, policy))
        except CaptionError as error:
            sample.refusals.append(error.reason)
    sample.captions = cleaned


def _read_pictures(recipe: _Recipe, samples: list[Sample]) -> Iterator[bytes | PictureError]:
    """The bytes of the pictures that have a caption, or why there are none, in order."""
    wanted = [sample for sample in samples if sample.captions]
    with closing(fetch_all([sample.source for sample in wanted if not sample.place], recipe.fetch)) as fetched:
        for sample in wanted:
            if not sample.place:
                yield next(fetched)
                continue
            try:
                yield recipe.source.read_embedded(sample.place)
            except PictureError as error:
                yield error


def _add_sample(
    writer: ShardWriter,
    key: str,
    sample: Sample,
    content: bytes | PictureError,
    policy: ImagePolicy,
    extra: dict[str, Any],
) -> dict[str, Any]:
    """Append one sample to the tar and return its part of the sidecar's row. Raises PictureError."""
    if isinstance(content, PictureError):
        raise content
    picture = prepare_picture(content, policy)
    facts = {
        "width": picture.width,
        "height": picture.height,
        "original_width": picture.original_width,
        "original_height": picture.original_height,
        "sha256": hashlib.sha256(picture.data).hexdigest(),
    }
    described = {**extra, "captions": sample.captions, "key": key, "source": sample.source, **facts}
    fields = {
        picture.extension: picture.data,
        "txt": sample.captions[0].encode(),
        "json": _JSON.encode(described).encode(),
    }
    offset, size = writer.add(key, fields)
    return {**facts, "offset": offset, "size": size}


# Trying again


def _list_healable(manifest: Manifest, columns: dict[str, Any]) -> list[Sample]:
    """The samples that failed, the last time that they were tried, by what can heal. As many as there are, in memory."""
    healable = []
    names = ["source", "status", "error", "captions", *columns]
    for number in range(len(manifest.shards)):
        for row in manifest.read_sidecar(number, names, failures=True).to_pylist():
            if row["status"] != "success" and row["error"].partition(": ")[0] in HEALABLE:
                values = {name: row[name] for name in columns if row[name] is not None}
                extra = json.dumps(values, ensure_ascii=False) if values else ""
                healable.append(Sample(row["source"], row["captions"], [], extra, ""))
    return healable

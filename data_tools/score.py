"""CLIP-scores: how well each picture and its captions belong together, as a model sees it. Nothing is deleted.

The model lives in `pretrain.score`, which is imported when a dataset is scored, and torch with it; what is here reads
shards and writes tables. Pictures are read and decoded in threads, some batches ahead of the model. A batch never holds
samples of two shards, so that a shard's scores are a function of it alone.

Each finished shard lies in FILE.work until the result is there: a run that was interrupted goes on after the last one.
"""

import hashlib
import json
import re
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_tools.errors import UserError
from data_tools.files import is_url, lock_folder, open_atomic
from data_tools.shards import PICTURE_EXTENSIONS, Manifest, ShardReader, find_captions
from data_tools.workers import Report, choose_processes, open_progress_bar

if TYPE_CHECKING:
    import pyarrow

    from pretrain.score import Scorer

VERSION = 1
BATCH_SIZE = 64
WORK_SUFFIX = ".work"
_DEFAULT_SUFFIX = ".scores.parquet"
_BATCHES_AHEAD = 2
_ROWS_AT_ONCE = 2**16
_BINS = 2000  # of the histogram of scores from -1 to 1, which the quantiles are read off
_PART_NAME = re.compile(r"\d{8}\.parquet")
_IDENTITY = b"identity"

NO_PICTURE, NO_CAPTION, BAD_PICTURE = "no picture", "no caption", "bad picture"


def score_pairs(
    directory: str | Path,
    model: str,
    out: str | Path | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    device: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Write the scores of a dataset or view to the parquet file `out`; return the counts and the scores' quantiles.

    A row for each sample that counts, in the order of the dataset:

        key
        sha256       of the stored picture; null where there is none
        clip_score   float32, the greatest of clip_scores; null for a sample that cannot be scored
        clip_scores  list of float32: the cosine of the picture with each of its captions, in their order

    `model` is what `pretrain.score.load_scorer` takes. The same dataset, model and `batch_size` make the same bytes on
    the same kind of machine; elsewhere, and for another `batch_size`, a score can differ in its sixth digit. A file `out`
    of an earlier run is replaced. Raises UserError for a model or a device that is not there, and ShardError for samples
    that cannot be read (which `verify --quarantine` takes out).
    """
    manifest = Manifest.load(directory)
    out = _choose_out(directory, out)
    threads = _check_options(batch_size, threads)
    from pretrain.score import load_scorer

    scorer = load_scorer(model, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(out.name + WORK_SUFFIX)
    work.mkdir(exist_ok=True)
    with lock_folder(work):
        _check_work(work)
        identities = [_identify_shard(manifest, number, scorer, batch_size) for number in range(len(manifest.shards))]
        waiting = [
            number
            for number, identity in enumerate(identities)
            if manifest.counts[number] and _read_identity(work / _name_part(number)) != identity
        ]
        samples = int(manifest.counts[waiting].sum())
        with open_progress_bar(samples, "sample") as report:
            with closing(_score_shards(manifest, waiting, scorer, batch_size, threads, report)) as finished:
                for number, table in finished:
                    _write_part(work / _name_part(number), table, identities[number])
        parts = [work / _name_part(number) for number in np.flatnonzero(manifest.counts).tolist()]
        facts = _join_parts(parts, out, manifest, scorer, batch_size)
        for path in work.iterdir():
            path.unlink()
    work.rmdir()
    return {"out": str(out), "model": scorer.library, "device": str(scorer.device), **facts}


def _choose_out(directory: str | Path, out: str | Path | None) -> Path:
    if out is None:
        if is_url(directory):
            return Path(str(directory).rstrip("/").rpartition("/")[2] + _DEFAULT_SUFFIX)
        place = Path(directory).resolve()
        return place.with_name(place.name + _DEFAULT_SUFFIX)
    if is_url(out):
        raise UserError(f"--out {out}: give a local file")
    if Path(out).is_dir():
        raise UserError(f"--out {out}: is a folder. Give the file to write, such as scores.parquet")
    return Path(out)


def _check_options(batch_size: int, threads: int | None) -> int:
    """The number of threads. Raises UserError."""
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: give at least 1")
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: give at least 1")
    return choose_processes(threads)


def _check_work(work: Path) -> None:
    """Refuse a folder with files of something else, and remove what a killed run has left half written."""
    for path in sorted(work.iterdir()):
        stem = path.name.removesuffix(".tmp").rpartition(".")[0] if path.name.endswith(".tmp") else path.name
        if not _PART_NAME.fullmatch(stem):
            raise UserError(f"{work}: holds files of something else ({path.name}). Move them, or give another --out")
        if stem != path.name:
            path.unlink()


def _name_part(number: int) -> str:
    return f"{number:08d}.parquet"


def _identify_shard(manifest: Manifest, number: int, scorer: "Scorer", batch_size: int) -> str:
    """SHA-256 over what the scores of a shard depend on: its samples, the model, and how many go through together."""
    shard = manifest.shards[number]
    facts = [VERSION, scorer.identity, batch_size, shard.name if manifest.prefix_keys else ""]
    facts += [shard.sha256 or f"{shard.name} {shard.bytes} {shard.index_sha256}"]
    if manifest.selection is not None:
        facts.append(hashlib.sha256(np.packbits(manifest.selection.mask(number, shard.samples)).tobytes()).hexdigest())
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _read_identity(path: Path) -> str | None:
    """Of a finished part, which shard's it is; None where it is not there or not whole."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
    except (OSError, pyarrow.ArrowException):
        return None
    return metadata.get(_IDENTITY, b"").decode()


class _Sample(NamedTuple):
    """What of a sample is to be scored. `picture` is the scorer's, None when `problem` says why there is none."""

    key: str
    sha256: str | None
    picture: Any
    captions: list[str]
    problem: str


def _read_sample(reader: ShardReader, scorer: "Scorer", index: int) -> _Sample:
    """Runs in a thread."""
    from pretrain.score import BadSample

    raw = reader.read(index)
    data = next((raw.fields[name] for name in PICTURE_EXTENSIONS if name in raw.fields), None)
    if data is None:
        return _Sample(raw.key, None, None, [], NO_PICTURE)
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        captions = find_captions(raw.fields)
    except ValueError:
        captions = []
    if not captions:
        return _Sample(raw.key, sha256, None, [], NO_CAPTION)
    try:
        return _Sample(raw.key, sha256, scorer.prepare(data), captions, "")
    except BadSample:
        return _Sample(raw.key, sha256, None, [], BAD_PICTURE)


class _Batch(NamedTuple):
    number: int  # of the shard
    is_last: bool  # of the shard
    samples: "list[Future[_Sample]]"


def _score_shards(
    manifest: Manifest, numbers: list[int], scorer: "Scorer", batch_size: int, threads: int, report: Report
) -> Iterator[tuple[int, "pyarrow.Table"]]:
    """The numbers of the shards, each with its table when it is done."""
    ends = np.cumsum(manifest.counts)
    cuts = (
        (number, start, min(start + batch_size, int(ends[number])), int(ends[number]))
        for number in numbers
        for start in range(int(ends[number] - manifest.counts[number]), int(ends[number]), batch_size)
    )
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    with closing(ShardReader(manifest, max_open_shards=4)) as reader:
        try:
            ahead: deque[_Batch] = deque()
            tables: list[pyarrow.Table] = []
            while True:
                while len(ahead) <= _BATCHES_AHEAD and (cut := next(cuts, None)):
                    number, start, stop, end = cut
                    samples = [pool.submit(_read_sample, reader, scorer, index) for index in range(start, stop)]
                    ahead.append(_Batch(number, stop == end, samples))
                if not ahead:
                    return
                batch = ahead.popleft()
                tables.append(_score_batch([future.result() for future in batch.samples], scorer, report))
                if batch.is_last:
                    yield batch.number, _concatenate(tables)
                    tables = []
        finally:
            pool.shutdown(cancel_futures=True)


def _concatenate(tables: "list[pyarrow.Table]") -> "pyarrow.Table":
    import pyarrow

    return pyarrow.concat_tables(tables).combine_chunks()


def _score_batch(samples: list[_Sample], scorer: "Scorer", report: Report) -> "pyarrow.Table":
    import pyarrow

    good = [sample for sample in samples if not sample.problem]
    found = iter(scorer.score([sample.picture for sample in good], [sample.captions for sample in good]))
    scores = [[] if sample.problem else next(found) for sample in samples]
    for problem, count in Counter(sample.problem for sample in samples).items():
        report(count, problem)
    float32 = pyarrow.float32()
    return pyarrow.table(
        {
            "key": pyarrow.array([sample.key for sample in samples], pyarrow.string()),
            "sha256": pyarrow.array([sample.sha256 for sample in samples], pyarrow.string()),
            "clip_score": pyarrow.array([max(own, default=None) for own in scores], float32),
            "clip_scores": pyarrow.array(scores, pyarrow.list_(float32)),
            "problem": pyarrow.array([sample.problem for sample in samples], pyarrow.string()),
        }
    )


def _write_part(path: Path, table: "pyarrow.Table", identity: str) -> None:
    import pyarrow.parquet

    with open_atomic(path) as file:
        pyarrow.parquet.write_table(table.replace_schema_metadata({_IDENTITY: identity}), file)


def _join_parts(parts: list[Path], out: Path, manifest: Manifest, scorer: "Scorer", batch_size: int) -> dict[str, Any]:
    """Write the parts one after another into `out`, in row groups of one size; return the counts."""
    import pyarrow
    import pyarrow.parquet

    metadata = {"dataset": manifest.fingerprint, "model": scorer.identity, "library": scorer.library}
    metadata["batch_size"] = str(batch_size)
    schema = pyarrow.parquet.read_schema(parts[0])
    schema = schema.remove(schema.get_field_index("problem")).with_metadata(metadata)
    problems: Counter[str] = Counter()
    histogram, total, captions, samples = np.zeros(_BINS, np.int64), 0.0, 0, 0

    def rows() -> Iterator[pyarrow.Table]:
        for path in parts:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(_ROWS_AT_ONCE):
                    yield pyarrow.table(batch)

    with open_atomic(out) as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        waiting: list[pyarrow.Table] = []
        for table in rows():
            samples += len(table)
            problems.update(table.column("problem").to_pylist())
            captions += len(table.column("clip_scores").combine_chunks().flatten())
            scores = table.column("clip_score").drop_null().to_numpy().astype(np.float64)
            histogram += np.histogram(scores, _BINS, (-1, 1))[0]
            total += float(scores.sum())
            waiting.append(table.drop_columns("problem").replace_schema_metadata(metadata))
            if sum(map(len, waiting)) >= _ROWS_AT_ONCE:
                writer.write_table(_concatenate(waiting))
                waiting = []
        if waiting:
            writer.write_table(_concatenate(waiting))
    scored = problems.pop("", 0)
    facts: dict[str, Any] = {"samples": samples, "scored": scored, "captions": captions, "problems": dict(problems)}
    if scored:
        ends = np.cumsum(histogram)
        facts["clip_score"] = {"mean": round(total / scored, 4)} | {
            f"p{percent:02d}": round(-1 + 2 * (int(np.searchsorted(ends, percent / 100 * scored)) + 0.5) / _BINS, 4)
            for percent in (5, 25, 50, 75, 95)
        }
    return facts


def print_scores(directory: str, model: str, out: str | None, as_json: bool, **options: Any) -> None:
    """The command: score, write, and print what came of it."""
    facts = score_pairs(directory, model, out, **options)
    if as_json:
        print(json.dumps(facts))
        return
    print(f"{directory}: {facts['scored']} of {facts['samples']} samples scored, {facts['captions']} captions")
    if "clip_score" in facts:
        print("  clip_score: " + ", ".join(f"{name} {value:.3f}" for name, value in facts["clip_score"].items()))
    for problem, count in facts["problems"].items():
        print(f"  without a score: {problem} {count}")
    print(f"{facts['out']}: written, by {facts['model']} on {facts['device']}. To keep the better part:")
    print(f'  python -m data_tools view {directory} OUT --where "clip_score > 0.2" --join {facts["out"]}')

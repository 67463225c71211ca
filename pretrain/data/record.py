"""What a run leaves on record of its data, in RUN/data.

FINGERPRINT.json       the shards of a dataset, as the run first saw them: to say what has changed if it is another one later
bad-rank-00000.jsonl   the samples that could not be used, as each rank met them: where they lie, and why
"""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_tools.files import write_json_atomic
from data_tools.shards import Manifest

log = logging.getLogger(__name__)

MOST_BAD_LINES = 10_000  # of a rank, in one life of a run
NAMED = 3  # shards in a message


def write_datasets(folder: Path, names: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """Put the shards of these datasets on record, unless they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, manifest in zip(names, manifests, strict=True):
        path = locate(folder, manifest.fingerprint)
        if not path.exists():
            write_json_atomic(path, {"path": name, "samples": manifest.samples, "shards": list_shards(manifest)})


def locate(folder: Path, fingerprint: str) -> Path:
    return folder / f"{fingerprint[:16]}.json"


def list_shards(manifest: Manifest) -> list[list[Any]]:
    """Name, bytes, samples, samples that count, and the beginning of a hash of each shard."""
    counted = manifest.counts.tolist()
    return [
        [shard.name, shard.bytes, shard.samples, count, (shard.sha256 or shard.index_sha256)[:16]]
        for shard, count in zip(manifest.shards, counted, strict=True)
    ]


def explain_changes(
    folder: Path | None, then: Sequence[str], names: Sequence[str], manifests: Sequence[Manifest]
) -> str:
    """What is no longer as it was when the run had the datasets of the fingerprints `then`, in one line; "" if all is."""
    now = [manifest.fingerprint for manifest in manifests]
    if now == list(then):
        return ""
    if sorted(now) == sorted(then):
        return "the datasets stand in another order"
    if len(now) == len(then):
        told = []
        for name, manifest, fingerprint in zip(names, manifests, then, strict=True):
            if manifest.fingerprint != fingerprint:
                record = read_record(folder, fingerprint)
                changes = compare(record, manifest) if record else "it is another dataset than before"
                told.append(f"{name}: {changes}")
        return "; ".join(told)
    new = [name for name, fingerprint in zip(names, now, strict=True) if fingerprint not in then]
    records = [read_record(folder, fingerprint) for fingerprint in then if fingerprint not in now]
    gone = [record["path"] if record else "a dataset" for record in records]
    told = [f"{len(then)} datasets then, {len(now)} now"]
    return "; ".join(told + [f"{name} is new" for name in new] + [f"{name} is gone" for name in gone])


def read_record(folder: Path | None, fingerprint: str) -> dict[str, Any] | None:
    """What `write_datasets` has written; None if it is not there."""
    try:
        return json.loads(locate(folder, fingerprint).read_bytes()) if folder else None
    except (OSError, ValueError):
        return None


def compare(record: dict[str, Any], manifest: Manifest) -> str:
    """In what the dataset of a manifest differs from the one on record."""
    before = {shard[0]: shard for shard in record["shards"]}
    after = {shard[0]: shard for shard in list_shards(manifest)}
    both = [(before[name], after[name]) for name in after if name in before]
    changes = {
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
        "of another size": [new[0] for old, new in both if new[1] != old[1]],
        "of other content": [new[0] for old, new in both if new[1] == old[1] and new[4] != old[4]],
        "of which other samples count (view or quarantine)": [
            new[0] for old, new in both if new[4] == old[4] and new[3] != old[3]
        ],
    }
    told = [f"{count(names)} {what} ({name_some(names)})" for what, names in changes.items() if names]
    if not told:
        in_order = list(before) == list(after)
        told = [
            "other samples of the same shards count (view or quarantine)" if in_order else "shards in another order"
        ]
    return f"{', '.join(told)}; {record['samples']:,} samples then, {manifest.samples:,} now"


def count(names: Sequence[str]) -> str:
    return f"{len(names):,} shard{'s' * (len(names) > 1)}"


def name_some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + ", ..." * (len(names) > NAMED)


class BadSamples:
    """The file of one rank that lists bad samples."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"bad-rank-{rank:05d}.jsonl"
        self.lines_left = MOST_BAD_LINES

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Append a line for each. What cannot be written is no reason to end: it is told once, and then no more tried."""
        entries = list(entries)[: self.lines_left]
        if not entries:
            return
        self.lines_left -= len(entries)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)
        except OSError as error:
            self.lines_left = 0
            log.warning("%s: bad samples are no longer listed here: %s", self.path, error.strerror)

"""The proof that an epoch was each sample exactly once: what all ranks were given, against what the manifest says.

Each sample has a 64-bit hash of its identity (dataset, shard, place). Their sum modulo 2^64 does not depend on the order,
and differs, except by a chance of 2^-64, as soon as one sample is lost, doubled or exchanged for another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pretrain.data.order import Order, Places
from pretrain.randomness import mix

if TYPE_CHECKING:
    from pretrain.world import World

CHUNK_SAMPLES = 2**16  # hashed at a time, so that they stay in the processor's cache

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MODULUS = 2**64


@dataclass(frozen=True)
class EpochReport:
    """How an epoch of a dataset ended; `message` is for the log, an alarm unless `matched`."""

    dataset: str
    epoch: int
    samples: int  # given to the ranks
    expected: int
    matched: bool
    message: str


class Ledger:
    """Counts what a rank is given. `add` each batch; at the same positions on all ranks, `close_epochs`.

    `names` and `fingerprints` are the datasets' paths and their manifests' SHA-256.
    """

    def __init__(self, order: Order, names: Sequence[str], fingerprints: Sequence[str]) -> None:
        self._order, self._names = order, names
        self._identities = [
            Identities(counts, fingerprint) for counts, fingerprint in zip(order.counts, fingerprints, strict=True)
        ]
        self._open: dict[tuple[int, int], tuple[int, int]] = {}  # (dataset, epoch): samples, sum of their hashes
        self._finished = [0] * len(names)  # epochs of each dataset

    def add(self, places: Places) -> None:
        """Take note of samples that this rank was given."""
        for dataset in np.unique(places.dataset).tolist():
            here = places.dataset == dataset
            epochs = places.epoch[here]
            hashes = self._identities[dataset].hash(places.shard[here], places.place[here])
            for epoch in np.unique(epochs).tolist():
                chosen = hashes[epochs == epoch]
                self._note((dataset, epoch), len(chosen), int(chosen.sum(dtype=np.uint64)))

    def state(self, world: "World") -> list[dict[str, int]]:
        """The open epochs, summed over the ranks, for a checkpoint. Collective."""
        return [
            {"dataset": dataset, "epoch": epoch, "count": count, "fingerprint": fingerprint}
            for (dataset, epoch), (count, fingerprint) in sorted(_add_up(world.gather_objects(self._open)).items())
        ]

    def restore(self, state: Sequence[dict[str, int]], position: int, world: "World") -> None:
        """Go on from a checkpoint at `position`, whatever the number of ranks was: rank 0 takes over what all had."""
        self._finished, self._open = self._count_finished(position), {}
        if world.rank == 0:
            for entry in state:
                self._note((entry["dataset"], entry["epoch"]), entry["count"], entry["fingerprint"])

    def close_epochs(self, position: int, world: "World") -> list[EpochReport]:
        """Reports on the epochs that ended before `position` and have none yet: on rank 0, [] elsewhere. Collective.

        The first one hashes the dataset, which takes rank 0 some seconds for 10^9 samples.
        """
        finished = self._count_finished(position)
        ended = {
            (dataset, epoch)
            for dataset, (since, until) in enumerate(zip(self._finished, finished, strict=True))
            for epoch in range(since, until)
        }
        self._finished = finished
        if not ended:
            return []
        # Also of an epoch that had ended before: a sample that is given so late is an error, too.
        closed = [epoch for epoch in self._open if epoch[1] < finished[epoch[0]]]
        given = _add_up(world.gather_objects({epoch: self._open.pop(epoch) for epoch in closed}))
        if world.rank != 0:
            return []
        return [self._report(*epoch, *given.get(epoch, (0, 0))) for epoch in sorted(ended | given.keys())]

    def _count_finished(self, position: int) -> list[int]:
        """How many epochs of each dataset have ended before `position`."""
        drawn = self._order.count(position).tolist()
        return [count // samples for count, samples in zip(drawn, self._order.samples, strict=True)]

    def _note(self, epoch: tuple[int, int], count: int, fingerprint: int) -> None:
        count_before, before = self._open.get(epoch, (0, 0))
        self._open[epoch] = (count_before + count, (before + fingerprint) % _MODULUS)

    def _report(self, dataset: int, epoch: int, samples: int, fingerprint: int) -> EpochReport:
        expected, expected_fingerprint = self._identities[dataset].expected
        name = self._names[dataset]
        matched = (samples, fingerprint) == (expected, expected_fingerprint)
        if matched:
            message = f"epoch {epoch} of {name}: {samples:,} samples, each once (fingerprint {fingerprint:016x})"
        else:
            if samples != expected:
                found = f"{abs(samples - expected):,} too {'few' if samples < expected else 'many'}"
            else:
                found = "as many as there are, but not each once"
            message = (
                f"epoch {epoch} of {name}: the ranks were given {samples:,} samples, {found} (fingerprint "
                f"{fingerprint:016x}, of the manifest {expected:,} samples, {expected_fingerprint:016x}). Samples were "
                "lost or doubled: report this as a bug, with `python -m pretrain doctor order` of this config"
            )
        return EpochReport(name, epoch, samples, expected, matched, message)


class Identities:
    """The hashes of a dataset's samples; `counts` [S] of its shards, `fingerprint` the manifest's SHA-256."""

    def __init__(self, counts: np.ndarray, fingerprint: str) -> None:
        self._counts = np.asarray(counts, dtype=np.int64)
        start = np.uint64(int(fingerprint[:16], 16))
        self._shards = mix(start + (np.arange(len(self._counts), dtype=np.uint64) + np.uint64(1)) * _GAMMA)

    def hash(self, shard: np.ndarray, place: np.ndarray) -> np.ndarray:
        """uint64 [n] of the samples at these places."""
        return mix(self._shards[shard] + (place.astype(np.uint64) + np.uint64(1)) * _GAMMA)

    @cached_property
    def expected(self) -> tuple[int, int]:
        """The number of samples, and the sum of their hashes modulo 2^64."""
        ends = np.cumsum(self._counts)
        samples, fingerprint = int(ends[-1]), 0
        for begin in range(0, samples, CHUNK_SAMPLES):
            end = min(begin + CHUNK_SAMPLES, samples)
            first = int(np.searchsorted(ends, begin, side="right"))
            last = int(np.searchsorted(ends, end, side="left")) + 1
            starts = ends[first:last] - self._counts[first:last]
            here = np.minimum(ends[first:last], end) - np.maximum(starts, begin)
            # hash(shard, place) with place = number in the dataset - start of the shard
            offsets = self._shards[first:last] - starts.astype(np.uint64) * _GAMMA
            counter = np.arange(begin + 1, end + 1, dtype=np.uint64) * _GAMMA
            fingerprint += int(mix(np.repeat(offsets, here) + counter).sum(dtype=np.uint64))
        return samples, fingerprint % _MODULUS


def _add_up(
    parts: Sequence[dict[tuple[int, int], tuple[int, int]]],
) -> dict[tuple[int, int], tuple[int, int]]:
    """The counts and hash sums of each epoch, over all parts."""
    sums: dict[tuple[int, int], tuple[int, int]] = {}
    for part in parts:
        for epoch, (count, fingerprint) in part.items():
            before, sum_before = sums.get(epoch, (0, 0))
            sums[epoch] = (before + count, (sum_before + fingerprint) % _MODULUS)
    return sums

"""The proof that an epoch was each sample exactly once: what all ranks have read, against what the manifest says.

Each sample has a 64-bit hash of its identity: dataset, shard and place in the tar, as its reader tells them. Their sum modulo
2^64 does not depend on the order, and differs, except by a chance of 2^-64, as soon as one sample is lost, doubled or exchanged
for another. A second sum, of what is hashed of the keys in the tars, must be the same in each epoch in which no sample was
replaced: the manifest knows no keys, but one that is read where another stood before shows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pretrain.data.order import Order, Places
from pretrain.randomness import mix

if TYPE_CHECKING:
    from pretrain.world import World

CHUNK_SAMPLES = 2**16  # hashed at a time, so that they stay in the processor's cache

Sums = tuple[int, int, int, int]
"""Of an epoch: samples, the sum of their hashes, that of the hashes of their keys, samples whose own key was not read."""

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MODULUS = 2**64


@dataclass(frozen=True)
class EpochReport:
    """How an epoch of a dataset ended; `message` is for the log, an alarm unless `matched`."""

    dataset: str
    epoch: int
    samples: int  # read by the ranks
    expected: int
    matched: bool
    message: str


class Ledger:
    """Counts what a rank has read. `add` each batch; at the same positions on all ranks, `close_epochs`.

    `names` and `fingerprints` are the datasets' paths and their manifests' SHA-256; `places`, for those of which only a
    selection counts, give the places in the tar of a shard that do.
    """

    def __init__(
        self,
        order: Order,
        names: Sequence[str],
        fingerprints: Sequence[str],
        places: Sequence[Callable[[int], np.ndarray] | None] | None = None,
    ) -> None:
        self._order, self._names = order, names
        places = places or [None] * len(names)
        self._identities = [Identities(*facts) for facts in zip(order.counts, fingerprints, places, strict=True)]
        self._open: dict[tuple[int, int], Sums] = {}  # by dataset and epoch
        self._finished = [0] * len(names)  # epochs of each dataset
        self._keys: dict[int, int] = {}  # by dataset: the sum of its keys' hashes in a whole epoch, on rank 0

    def add(self, given: Places, keys: np.ndarray | None = None) -> None:
        """Take note of samples that this rank has read, at their places in the tars.

        `keys` [n] uint64: a hash of each one's key, 0 where another sample had to stand in for it.
        """
        keys = np.zeros(len(given.dataset), np.uint64) if keys is None else keys
        for dataset in np.unique(given.dataset).tolist():
            here = given.dataset == dataset
            epochs, keys_here = given.epoch[here], keys[here]
            hashes = self._identities[dataset].hash(given.shard[here], given.place[here])
            for epoch in np.unique(epochs).tolist():
                chosen = epochs == epoch
                sums = (int(part[chosen].sum(dtype=np.uint64)) for part in (hashes, keys_here))
                self._note((dataset, epoch), (int(chosen.sum()), *sums, int((keys_here[chosen] == 0).sum())))

    def state(self, world: "World") -> list[dict[str, int]]:
        """The open epochs, summed over the ranks, and what is known of keys, for a checkpoint. Collective."""
        everyone = world.gather_objects((self._open, self._keys))
        names = ("count", "fingerprint", "keys", "unknown_keys")
        opened = sorted(_add_up([part for part, _ in everyone]).items())
        return [
            *(
                {"dataset": number, "epoch": epoch} | dict(zip(names, sums, strict=True))
                for (number, epoch), sums in opened
            ),
            *({"dataset": dataset, "keys": keys} for dataset, keys in sorted(everyone[0][1].items())),
        ]

    def restore(self, state: Sequence[dict[str, int]], position: int, world: "World") -> None:
        """Go on from a checkpoint at `position`, whatever the number of ranks was: rank 0 takes over what all had."""
        self._finished, self._open, self._keys = self._count_finished(position), {}, {}
        for entry in state if world.rank == 0 else ():
            if "epoch" in entry:
                unknown = entry.get(
                    "unknown_keys", entry["count"]
                )  # all, of a checkpoint from before keys were added up
                sums = (entry["count"], entry["fingerprint"], entry.get("keys", 0), unknown)
                self._note((entry["dataset"], entry["epoch"]), sums)
            else:
                self._keys[entry["dataset"]] = entry["keys"]

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
        return [self._report(*epoch, given.get(epoch, _NOTHING)) for epoch in sorted(ended | given.keys())]

    def _count_finished(self, position: int) -> list[int]:
        """How many epochs of each dataset have ended before `position`."""
        drawn = self._order.count(position).tolist()
        return [count // samples for count, samples in zip(drawn, self._order.samples, strict=True)]

    def _note(self, epoch: tuple[int, int], sums: Sums) -> None:
        self._open[epoch] = _add(self._open.get(epoch, _NOTHING), sums)

    def _report(self, dataset: int, epoch: int, sums: Sums) -> EpochReport:
        samples, fingerprint, keys, unknown_keys = sums
        expected, expected_fingerprint = self._identities[dataset].expected
        name, problem = self._names[dataset], ""
        if samples != expected:
            problem = f"{abs(samples - expected):,} too {'few' if samples < expected else 'many'}"
        elif fingerprint != expected_fingerprint:
            problem = "as many as there are, but not each once"
        if problem:
            message = (
                f"epoch {epoch} of {name}: the ranks have read {samples:,} samples, {problem} (fingerprint "
                f"{fingerprint:016x}, of the manifest {expected:,} samples, {expected_fingerprint:016x}). Samples were "
                "lost or doubled: report this as a bug, with `python -m pretrain doctor order` of this config"
            )
        elif not unknown_keys and self._keys.setdefault(dataset, keys) != keys:
            problem = "other keys"
            message = (
                f"epoch {epoch} of {name}: {samples:,} samples, each from its place, but their keys are not those of an "
                f"epoch before (sums {keys:016x} and {self._keys[dataset]:016x}). The tars have changed under the run, or the "
                "wrong bytes were read: check them with `python -m data_tools verify`"
            )
        else:
            message = f"epoch {epoch} of {name}: {samples:,} samples, each once (fingerprint {fingerprint:016x})"
        return EpochReport(name, epoch, samples, expected, not problem, message)


class Identities:
    """The hashes of a dataset's samples; `counts` [S] of its shards, `fingerprint` the manifest's SHA-256.

    `places` gives, for the number of a shard, the places in its tar that count; None: all.
    """

    def __init__(self, counts: np.ndarray, fingerprint: str, places: Callable[[int], np.ndarray] | None = None) -> None:
        self._counts, self._places = np.asarray(counts, dtype=np.int64), places
        start = np.uint64(int(fingerprint[:16], 16))
        self._shards = mix(start + (np.arange(len(self._counts), dtype=np.uint64) + np.uint64(1)) * _GAMMA)

    def hash(self, shard: np.ndarray, place: np.ndarray) -> np.ndarray:
        """uint64 [n] of the samples at these places of the tars of these shards."""
        return mix(self._shards[shard] + (place.astype(np.uint64) + np.uint64(1)) * _GAMMA)

    @cached_property
    def expected(self) -> tuple[int, int]:
        """The number of samples, and the sum of their hashes modulo 2^64."""
        ends = np.cumsum(self._counts)
        samples, fingerprint = int(ends[-1]), 0
        if self._places is not None:
            for shard in np.flatnonzero(self._counts).tolist():
                places = self._places(shard)
                fingerprint += int(self.hash(np.full(len(places), shard), places).sum(dtype=np.uint64))
            return samples, fingerprint % _MODULUS
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


_NOTHING: Sums = (0, 0, 0, 0)


def _add(some: Sums, others: Sums) -> Sums:
    count, fingerprint, keys, unknown_keys = map(sum, zip(some, others, strict=True))
    return count, fingerprint % _MODULUS, keys % _MODULUS, unknown_keys


def _add_up(parts: Sequence[dict[tuple[int, int], Sums]]) -> dict[tuple[int, int], Sums]:
    """The sums of each epoch, over all parts."""
    sums: dict[tuple[int, int], Sums] = {}
    for part in parts:
        for epoch, found in part.items():
            sums[epoch] = _add(sums.get(epoch, _NOTHING), found)
    return sums

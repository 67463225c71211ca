"""The encoded samples of positions: of datasets with an index in an exact order, or of a stream.

`draw` says which samples some positions are to have, and costs no reading; `read` fetches one of them or, after attempts
that failed, one in its stead.
"""

import errno
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from data_tools.shards import RawSample, ShardError
from pretrain.config import ConfigError
from pretrain.data.decode import BadSample
from pretrain.data.ledger import Ledger
from pretrain.data.order import Places, build_order
from pretrain.data.sources import CachedReader, open_dataset
from pretrain.data.stages import Rejected
from pretrain.data.streaming import Stream, is_stream
from pretrain.world import World

if TYPE_CHECKING:
    from pretrain.data.loader import DataConfig, DatasetConfig

BAD_READS = (ShardError, BadSample, Rejected)
"""What is wrong with one sample; anything else ends the run."""

LOOK_AHEAD_SAMPLES = 16_384  # of a rank: the shards that a reader which fetches them is told of in advance
_VANISHED = (errno.ENOENT, errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENOTDIR)  # of a shard, not of the machine


@dataclass(frozen=True)
class Draw:
    """Which samples stand at some positions. Shape legend: n positions."""

    positions: np.ndarray  # int64 [n]
    places: Places  # [n]; of a stream, zeros


class Supply(Protocol):
    """See `IndexedSupply` and `StreamSupply`."""

    names: list[str]  # of the datasets, as in the config
    epoch_samples: int | None  # positions of an epoch: of a blend, of all its datasets together; of a stream, unknown
    ledger: Ledger | None

    def describe(self) -> dict[str, Any]: ...
    def draw(self, positions: np.ndarray) -> Draw: ...
    def read(self, draw: Draw, row: int, attempt: int) -> RawSample: ...
    def close(self) -> None: ...


def open_supply(config: "DataConfig", seed: int, global_batch: int, world: World) -> Supply:
    """Raises ConfigError and UserError, in one line, for data that cannot be used."""
    entries = config.entries()
    streams = [entry.path for entry in entries if is_stream(entry.path)]
    if not streams:
        return IndexedSupply(config, entries, seed, global_batch, world)
    if len(entries) > 1:
        raise ConfigError(f"data.datasets: {streams[0]}: a stream cannot be blended; give it alone, as data.path")
    return StreamSupply(config, seed, world)


class IndexedSupply:
    """Datasets whose samples are known by number: any position can be had at once, by anybody."""

    def __init__(
        self, config: "DataConfig", entries: Sequence["DatasetConfig"], seed: int, global_batch: int, world: World
    ) -> None:
        self.names = [entry.path for entry in entries]
        self._datasets = [open_dataset(entry.path, config.cache) for entry in entries]
        manifests = [dataset.manifest for dataset in self._datasets]
        self._fingerprints = [manifest.fingerprint for manifest in manifests]
        samples = [manifest.samples for manifest in manifests]
        weights = choose_weights(entries, samples)
        check_batch(global_batch, self.names, samples, weights)
        counts = [manifest.counts for manifest in manifests]
        self.order = build_order(counts, weights, seed, global_batch, config.window_samples)
        self.ledger = Ledger(self.order, self.names, self._fingerprints)
        passes = [entry.epochs for entry in entries] if entries[0].epochs is not None else [1] * len(entries)
        self.epoch_samples = round(sum(Fraction(str(times)) * n for times, n in zip(passes, samples, strict=True)))
        self._world, self._global_batch = world, global_batch
        self._fetching = [n for n, dataset in enumerate(self._datasets) if isinstance(dataset.reader, CachedReader)]
        self._announced = -1

    def describe(self) -> dict[str, Any]:
        """What the order of samples depends on."""
        return {"datasets": self._fingerprints, **self.order.describe()}

    def draw(self, positions: np.ndarray) -> Draw:
        if self._fetching:
            self._announce(positions)
        return Draw(positions, self.order.at(positions))

    def read(self, draw: Draw, row: int, attempt: int) -> RawSample:
        """The sample of a row of `draw`, or at later attempts one from the same dataset that depends on the position alone.

        Raises ShardError for a sample that cannot be had, UserError for a store that is gone.
        """
        places = draw.places
        dataset, shard, place = (int(part[row]) for part in (places.dataset, places.shard, places.place))
        if attempt:
            shard, place = self.order.replacement(int(draw.positions[row]), dataset, attempt)
        try:
            return self._datasets[dataset].reader.read_counted(shard, place)
        except OSError as error:
            if error.errno not in _VANISHED:
                raise
            name = self._datasets[dataset].manifest.shards[shard].name
            raise ShardError(f"{self.names[dataset]}/{name}: cannot be read: {error.strerror}") from None

    def close(self) -> None:
        """End reads that wait for a store, and what fetches ahead. A later `read` opens all that again."""
        for dataset in self._datasets:
            dataset.reader.close()
        self._announced = -1

    def _announce(self, positions: np.ndarray) -> None:
        """Tell the readers that fetch shards which ones this rank needs next, each time half of what they know is used."""
        rows = len(positions)
        batches = max(2, LOOK_AHEAD_SAMPLES // rows)
        if self._announced > positions[0] and self._announced - positions[0] > batches // 2 * self._global_batch:
            return
        ahead = (positions + np.arange(batches)[:, None] * self._global_batch).ravel()
        self._announced = int(positions[0]) + batches * self._global_batch
        places = self.order.at(ahead)
        for dataset in self._fetching:
            shards = places.shard[places.dataset == dataset]
            _, first = np.unique(shards, return_index=True)
            self._datasets[dataset].reader.prefetch(shards[np.sort(first)].tolist())


class StreamSupply:
    """What a command writes: which sample comes next is known when it comes. The order is approximate.

    Threads take samples as they come, and a run that goes on begins a new sequence of resampled shards.
    """

    def __init__(self, config: "DataConfig", seed: int, world: World) -> None:
        self.names, self.ledger, self.epoch_samples = [config.path], None, None
        self._make = lambda position: Stream(config.path, seed, world, position)
        self._stream: Stream | None = None
        self._lock = threading.Lock()

    def describe(self) -> dict[str, Any]:
        return {"stream": self.names[0]}

    def draw(self, positions: np.ndarray) -> Draw:
        with self._lock:
            if self._stream is None:
                self._stream = self._make(int(positions[0]))
        nothing = np.zeros(len(positions), np.int64)
        return Draw(positions, Places(nothing, nothing, nothing, nothing))

    def read(self, draw: Draw, row: int, attempt: int) -> RawSample:
        with self._lock:
            return next(self._stream)

    def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()


def choose_weights(entries: Sequence["DatasetConfig"], samples: Sequence[int]) -> list[int]:
    """Whole numbers in the proportion of the datasets' weights, or of the samples that their epochs make."""
    if entries[0].epochs is not None:
        shares = [Fraction(str(entry.epochs)) * n for entry, n in zip(entries, samples, strict=True)]
    else:
        shares = [Fraction(str(entry.weight or 1)) for entry in entries]
    whole = lcm(*(share.denominator for share in shares))
    return [int(share * whole) for share in shares]


def check_batch(global_batch: int, names: Sequence[str], samples: Sequence[int], weights: Sequence[int]) -> None:
    """Raise ConfigError where a picture would meet itself in every batch."""
    for name, own, weight in zip(names, samples, weights, strict=True):
        drawn = global_batch * weight / sum(weights)
        if drawn > own:
            raise ConfigError(
                f"train.batch_size: {global_batch} takes {drawn:.0f} samples of {name} a batch, which has {own}: a picture "
                "would meet itself in every batch. Use a smaller batch or more data, or give it less weight."
            )

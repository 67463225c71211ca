"""The encoded samples of positions: of datasets with an index in an exact order, or of a stream.

`draw` says which samples some positions are to have, and costs no reading; `read` fetches one of them or, after attempts
that failed, one in its stead.
"""

import resource
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from data_tools.files import RemoteFolder
from data_tools.shards import RawSample, ShardError, ShardReader
from pretrain.config import ConfigError
from pretrain.data.cache import ReaderClosed
from pretrain.data.decode import BadSample
from pretrain.data.ledger import Ledger
from pretrain.data.order import Places, build_order
from pretrain.data.record import explain_changes, write_datasets
from pretrain.data.sources import is_stream, load_dataset, open_reader
from pretrain.data.streaming import StreamReader

if TYPE_CHECKING:
    from pretrain.data.loader import DataConfig, DatasetConfig

BAD_READS = (ShardError, BadSample)
"""What is wrong with one sample; anything else ends the run."""

LOOK_AHEAD_SAMPLES = 16_384  # of a rank: the shards that a reader which fetches them is told of in advance

LEAST_OPEN_SHARDS = 512
INDEX_BYTES = 256 * 2**20  # of a rank, for the indexes of open shards
OTHER_FILES = 1024  # that a rank may need for anything else


@dataclass(frozen=True)
class Draw:
    """Which samples stand at some positions. Shape legend: n positions."""

    positions: np.ndarray  # int64 [n]
    places: Places  # [n]; of a stream, whose epochs nobody knows, positions as epochs and zeros


class Supply(Protocol):
    """See `IndexedSupply` and `StreamSupply`.

    `open` it before reading from `position` on, with so many batches under way at once; `close` ends all reads.
    """

    names: list[str]  # of the datasets, as in the config
    origins: list[int]  # the first dataset with the same tars: of views of one dataset, the same; keys are unique in it
    epoch_samples: int | None  # positions of an epoch: of a blend, of all its datasets together; of a stream, unknown
    ledger: Ledger | None
    can_stall: bool  # whether a read may wait for a store or a command, without end

    def describe(self) -> dict[str, Any]: ...
    def explain_changes(self, then: dict[str, Any], record: Path | None) -> str: ...
    def put_on_record(self, record: Path) -> None: ...
    def count(self, position: int) -> list[int]: ...
    def open(self, position: int, under_way: int) -> None: ...
    def draw(self, positions: np.ndarray) -> Draw: ...
    def read(self, draw: Draw, row: int, attempt: int) -> RawSample: ...
    def origin(self, draw: Draw, row: int) -> tuple[int, int]: ...
    def locate(self, draw: Draw, row: int) -> dict[str, Any]: ...
    def close(self) -> None: ...


def open_supply(config: "DataConfig", seed: int, global_batch: int, rank: int = 0) -> Supply:
    """Raises ConfigError and UserError, in one line, for data that cannot be used."""
    entries = config.entries()
    streams = [entry.path for entry in entries if is_stream(entry.path)]
    if not streams:
        return IndexedSupply(config, entries, seed, global_batch)
    if len(entries) > 1:
        raise ConfigError(f"data.datasets: {streams[0]}: a stream cannot be blended; give it alone, as data.path")
    return StreamSupply(config, seed, rank)


class IndexedSupply:
    """Datasets whose samples are known by number: any position can be had at once, on any rank."""

    def __init__(self, config: "DataConfig", entries: Sequence["DatasetConfig"], seed: int, global_batch: int) -> None:
        self.names = [entry.path for entry in entries]
        self.manifests = [load_dataset(entry.path, config.cache) for entry in entries]
        tars = [manifest.tars for manifest in self.manifests]
        self.origins = [tars.index(own) for own in tars]
        self._fingerprints = [manifest.fingerprint for manifest in self.manifests]
        samples = [manifest.samples for manifest in self.manifests]
        weights = choose_weights(entries, samples)
        check_batch(global_batch, self.names, samples, weights)
        counts = [manifest.counts for manifest in self.manifests]
        self.order = build_order(counts, weights, seed, global_batch, config.window_samples)
        places = [manifest.places if manifest.selection else None for manifest in self.manifests]
        self.ledger = Ledger(self.order, self.names, self._fingerprints, places)
        self.can_stall = any(isinstance(manifest.tars, RemoteFolder) for manifest in self.manifests)
        passes = [Fraction(str(entry.epochs or 1)) for entry in entries]
        self.epoch_samples = round(sum(times * own for times, own in zip(passes, samples, strict=True)))
        self._cache, self._global_batch = config.cache, global_batch
        self._readers: list[ShardReader] = []
        self._under_way = 0  # batches whose reads may not have ended
        self._announced = -1  # the position up to which the readers know what comes

    def describe(self) -> dict[str, Any]:
        """What the order of samples depends on."""
        return {"datasets": self._fingerprints, **self.order.describe()}

    def explain_changes(self, then: dict[str, Any], record: Path | None) -> str:
        """How the datasets differ from those of what `describe` gave `then`, in one line; "" if they do not."""
        return explain_changes(record, then.get("datasets", []), self.names, self.manifests)

    def put_on_record(self, record: Path) -> None:
        """Leave there what `explain_changes` compares with."""
        write_datasets(record, self.names, self.manifests)

    def count(self, position: int) -> list[int]:
        """Samples of each dataset before `position`."""
        return self.order.count(position).tolist()

    def open(self, position: int, under_way: int) -> None:
        limits = share_open_files([manifest.counts for manifest in self.manifests])
        opened = zip(self.manifests, limits, strict=True)
        self._readers = [open_reader(manifest, self._cache, most) for manifest, most in opened]
        self._under_way, self._announced = under_way, -1

    def draw(self, positions: np.ndarray) -> Draw:
        self._announce(positions)
        return Draw(positions, self.order.at(positions))

    def read(self, draw: Draw, row: int, attempt: int) -> RawSample:
        """The sample of a row of `draw`, or at later attempts one from the same dataset that depends on the position alone.

        Raises ShardError for a sample that cannot be had, UserError for a store that is gone.
        """
        dataset, shard, place = (int(part[row]) for part in (draw.places.dataset, draw.places.shard, draw.places.place))
        if attempt:
            shard, place = self.order.replacement(int(draw.positions[row]), dataset, attempt)
        return self._readers[dataset].read_selected(shard, place)

    def origin(self, draw: Draw, row: int) -> tuple[int, int]:
        """Where the sample of a row is to be read: number of the shard, place in its tar."""
        dataset, shard, place = (int(part[row]) for part in (draw.places.dataset, draw.places.shard, draw.places.place))
        return shard, int(self.manifests[dataset].places(shard)[place])

    def locate(self, draw: Draw, row: int) -> dict[str, Any]:
        """The same by name, as quarantine.json has it."""
        dataset, (shard, place) = int(draw.places.dataset[row]), self.origin(draw, row)
        return {"dataset": self.names[dataset], "shard": self.manifests[dataset].shards[shard].name, "place": place}

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def _announce(self, positions: np.ndarray) -> None:
        """Tell readers that fetch shards which ones this rank needs next, again when half of that has been used."""
        ahead = max(2, LOOK_AHEAD_SAMPLES // len(positions)) * self._global_batch
        if not any(reader.fetches for reader in self._readers) or positions[0] + ahead // 2 < self._announced:
            return
        self._announced = int(positions[0]) + ahead
        behind = min(self._under_way, int(positions[0]) // self._global_batch) * self._global_batch
        places = self.order.at((positions + np.arange(-behind, ahead, self._global_batch)[:, None]).ravel())
        for dataset, reader in enumerate(self._readers):
            shards = places.shard[places.dataset == dataset]
            first = np.unique(shards, return_index=True)[1]
            reader.prefetch(shards[np.sort(first)].tolist())


class StreamSupply:
    """What a command writes: which sample comes next is known when it comes. The order is approximate.

    Threads take samples as they come, and a run that goes on begins a new sequence of resampled shards.
    """

    def __init__(self, config: "DataConfig", seed: int, rank: int) -> None:
        self.names, self.origins, self.ledger, self.epoch_samples = [config.path], [0], None, None
        self.can_stall = True
        self._config, self._seed, self._rank = config.stream, seed, rank
        self._lock = threading.Lock()
        self._failure: Exception | None = None  # what ended the samples: a generator tells it only once

    def describe(self) -> dict[str, Any]:
        return {"stream": self.names[0]}

    def explain_changes(self, then: dict[str, Any], record: Path | None) -> str:
        return ""  # nobody knows

    def put_on_record(self, record: Path) -> None:
        pass

    def count(self, position: int) -> list[int]:
        return [position]

    def open(self, position: int, under_way: int) -> None:
        self._reader = StreamReader(self.names[0], self._config, seed=self._seed, rank=self._rank, position=position)
        self._samples, self._failure = iter(self._reader), None

    def draw(self, positions: np.ndarray) -> Draw:
        nothing = np.zeros(len(positions), np.int64)
        return Draw(positions, Places(nothing, positions, nothing, nothing))  # so that captions are drawn anew

    def read(self, draw: Draw, row: int, attempt: int) -> RawSample:
        """Whatever comes next. Raises UserError when nothing more can be had, in every thread that asks."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            try:
                return next(self._samples)
            except Exception as error:
                self._failure = ReaderClosed() if isinstance(error, StopIteration) else error
                raise self._failure from None

    def origin(self, draw: Draw, row: int) -> tuple[int, int]:
        """As many as come, each once."""
        return 0, int(draw.positions[row])

    def locate(self, draw: Draw, row: int) -> dict[str, Any]:
        return {"dataset": self.names[0]}

    def close(self) -> None:
        self._reader.close()


def share_open_files(counts: Sequence[np.ndarray]) -> list[int]:
    """How many shards of each dataset may be open at once, of datasets whose shards have so many samples.

    A dataset that fits the window is read from all of its shards at once, and so is each of up to 1,024 streams from its own:
    with fewer open files, most reads would close one file and open another, and check its index again. So all shards may be
    open, as far as their indexes fit INDEX_BYTES, and the limit of the process, which is raised as far as the system lets.
    """
    shards = sum(len(part) for part in counts)
    index_bytes = 8 * sum(int(part.sum()) for part in counts) / shards + 1
    wanted = max(LEAST_OPEN_SHARDS, min(shards, int(INDEX_BYTES / index_bytes)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        needed = wanted + OTHER_FILES
        if needed > soft:
            soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        wanted = min(wanted, max(soft // 2, soft - OTHER_FILES))
    return [max(1, wanted * len(part) // shards) for part in counts]


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
            share = "" if len(names) == 1 else f", of which {drawn:.0f} come from one dataset,"
            raise ConfigError(
                f"train.batch_size: {global_batch}{share} is more than the {own} samples of {name}: a picture would meet "
                "itself in every batch. Use a smaller batch or more data"
                + (", or give it less weight" if share else "")
            )

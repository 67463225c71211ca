"""What the order of samples gives: the keys that a rank would take, how well they are mixed, how much is read twice."""

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, TextIO

import numpy as np

from data_tools.errors import UserError
from data_tools.shards import Manifest, ShardReader
from pretrain.config import ConfigError
from pretrain.data.order import Order
from pretrain.data.supply import IndexedSupply, open_supply

if TYPE_CHECKING:
    from pretrain.train import RunConfig

MOST_POSITIONS = 10**15  # far more than any run takes, and far from where arithmetic on positions would overflow
KEPT_SHARDS = 512  # whose keys are kept, about 20 bytes a sample


def print_order(config: "RunConfig", world_size: int, rank: int, start: int, steps: int, out: TextIO) -> None:
    """Write `STEP POSITION DATASET KEY`, tab-separated, for each sample of this rank in the steps from `start` on.

    Steps count from 0, as a checkpoint does: after `step-N` comes step N. Nothing is decoded, so a sample that will turn
    out to be unreadable is named here, not the one that takes its place. Raises ConfigError for a world size that does not
    divide the batch.
    """
    global_batch = config.train.batch_size
    if global_batch % world_size:
        raise ConfigError(f"train.batch_size: {global_batch} pairs cannot be shared equally by {world_size} ranks")
    if rank >= world_size:
        raise ConfigError(f"--rank: there is no rank {rank} among {world_size}; valid are 0 to {world_size - 1}")
    if (start + steps) * global_batch > MOST_POSITIONS:
        most = MOST_POSITIONS // global_batch
        raise ConfigError(f"--start: steps {start} to {start + steps} are beyond the last that can be shown, {most:,}")
    supply = open_supply(config.data, config.seed, global_batch)
    if not isinstance(supply, IndexedSupply):
        raise ConfigError(f"{config.data.path}: the order of a stream is not known before it comes")
    readers = [KeyReader(manifest) for manifest in supply.manifests]
    rows = global_batch // world_size
    for step in range(start, start + steps):
        first = step * global_batch + rank * rows
        places = supply.order.at(np.arange(first, first + rows))
        columns = (places.dataset.tolist(), places.shard.tolist(), places.place.tolist())
        for position, (dataset, shard, place) in enumerate(zip(*columns, strict=True), start=first):
            out.write(f"{step}\t{position}\t{supply.names[dataset]}\t{readers[dataset].key(shard, place)}\n")
    out.flush()  # here, where a reader that has gone is not an error


class KeyReader:
    """The keys of a dataset's samples, from the sidecars where there are some, else from the tars."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._reader = ShardReader(manifest)
        self._find_keys = lru_cache(maxsize=KEPT_SHARDS)(self._choose_source)

    def key(self, shard: int, place: int) -> str:
        """The key of the sample of a shard before which so many others count there. Raises ShardError."""
        return self._find_keys(shard)(place)

    def _choose_source(self, shard: int) -> Callable[[int], str]:
        try:
            keys = self._manifest.read_sidecar(shard, ["key"]).column("key")
        except UserError:  # none, or not a whole one: the tar itself says it, only slower
            places = self._manifest.places(shard)
            return lambda place: self._reader.read_place(shard, int(places[place])).key
        return lambda place: keys[place].as_py()


def same_shard_rate(order: Order, batches: range) -> float:
    """The share of pairs of samples in a global batch that come from the same shard, over some batches."""
    same = 0
    for batch in batches:
        places = order.at(np.arange(batch * order.global_batch, (batch + 1) * order.global_batch))
        _, together = np.unique(np.stack([places.dataset, places.shard]), axis=1, return_counts=True)
        same += int((together * (together - 1)).sum())
    return same / (len(batches) * order.global_batch * max(1, order.global_batch - 1))


def ideal_same_shard_rate(order: Order) -> float:
    """The same for samples drawn at random from a window of whole shards.

    For a dataset of N samples and the window w = min(window, N), a sample of a shard of n meets min(n, w) - 1 others of it
    among w - 1, so the rate is the sum over shards of n / N x (min(n, w) - 1) / (w - 1). Both samples of a pair come from
    the dataset in the square of its share.
    """
    rate, total = 0.0, sum(order.blend.weights)
    for weight, counts, samples in zip(order.blend.weights, order.counts, order.samples, strict=True):
        window = min(order.window, samples)
        others = np.maximum(np.minimum(counts, window) - 1, 0)
        rate += (weight / total) ** 2 * float((counts * others).sum()) / (samples * max(1, window - 1))
    return rate


def read_amplification(order: Order, dataset: int, world_size: int, epoch: int = 0) -> float:
    """Samples in the shards that the ranks read in an epoch, over the samples they need, if each reads whole shards.

    A shard that a rank's stream is at is read once and kept until the stream leaves it. A dataset that is shuffled as a
    whole is spread over all ranks: there it is the expected value, each rank keeping all shards it has met.
    """
    samples, counts = order.samples[dataset], order.counts[dataset]
    if samples <= order.window:
        met = 1 - (1 - counts / samples) ** (samples / world_size)
        return world_size * float((counts * met).sum()) / samples
    first_row = np.arange(order.streams) * order.rows
    rank_rows = order.global_batch // world_size
    readers = (first_row + order.rows - 1) // rank_rows - first_row // rank_rows + 1
    return float((readers * order.samples_of_shards(dataset, epoch)).sum()) / samples

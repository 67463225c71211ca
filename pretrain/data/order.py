"""Which sample stands at which position: a pure function of (datasets, weights, seed, global batch, position).

Positions count samples from the start of the run, without end: row j of batch b is position b x G + j. The order knows
nothing of ranks, micro-batches or threads, so any number of them sees the same samples in the same places.

    streams    A batch's G rows belong to V streams, G / V neighbouring rows each. A rank's rows are neighbours too, so it
               reads a few streams, and other ranks read others.
    blend      Which dataset stands at number i of a stream is arithmetic on i: a tree of splits in two (`Blend`).
    epochs     Epoch e of a dataset of N samples is its draws e x N to (e + 1) x N in the order of positions, over all
               streams. Its shards are shuffled anew, joined, and cut into V parts, as long as each stream's draws.
    window     A stream takes its part in blocks of window / V samples, each shuffled in itself. A dataset that is not larger
               than the window is shuffled as a whole instead.

Shape legend: n positions, D datasets, V streams, S shards of a dataset.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import numpy as np

from pretrain.config import ConfigError
from pretrain.randomness import hash64, mix

ORDER_VERSION = 1
"""Raised by every change after which a position would hold another sample."""

DEFAULT_WINDOW = 65_536
MOST_STREAMS = 1024
EXHAUSTIVE = 6  # datasets up to which every tree of splits is tried
LEAST_BITS = 6
INT64_END = 2**63 - 1

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = np.arange(6, dtype=np.uint64) * _GAMMA


@dataclass(frozen=True)
class Places:
    """Where the samples of some positions are, int64 [n] each; `place` counts the samples that count in that shard."""

    dataset: np.ndarray
    epoch: np.ndarray
    shard: np.ndarray
    place: np.ndarray


def build_order(
    counts: Sequence[np.ndarray],
    weights: Sequence[int],
    seed: int,
    global_batch: int,
    window: int = DEFAULT_WINDOW,
    streams: int | None = None,
) -> "Order":
    """The order of a blend: `counts` [S] samples of each shard, for each dataset, and their whole-number `weights`.

    `streams` divides `global_batch`; None chooses it. Raises ConfigError for a dataset without samples, a weight below 1 or
    streams that do not divide the batch.
    """
    counts = [np.asarray(part, dtype=np.int64) for part in counts]
    if not counts or len(counts) != len(weights):
        raise ConfigError(f"data: {len(counts)} datasets with {len(weights)} weights; each dataset needs one weight")
    for number, (part, weight) in enumerate(zip(counts, weights, strict=True)):
        if part.sum() < 1:
            raise ConfigError(f"data: dataset {number} has no samples. Leave it out")
        if weight < 1:
            raise ConfigError(
                f"data: dataset {number} has weight {weight}; a weight is at least 1. Leave it out instead"
            )
    if streams is None:
        streams = choose_streams(global_batch, effective_shards(counts, weights, window))
    if streams < 1 or global_batch % streams:
        raise ConfigError(f"data: {streams} streams do not divide the global batch of {global_batch}")
    return Order(counts, weights, seed, global_batch, window, streams)


def choose_streams(global_batch: int, shards: int) -> int:
    """The number of streams: a divisor of the batch, at most 1,024 and an eighth of the shards; for few shards at most 64
    and a quarter.

    Each stream has its last shard read again by the next one, so V streams read 1 + V / shards times what they need: at
    most 1 1/8, and 1 1/4 with few shards. Ranks that share a stream each read its shards, so few streams are dear
    in their turn: of the divisors, one that many a number of ranks divides (up to 64, a power of two) comes first.
    """
    most = max(1, min(MOST_STREAMS, max(shards // 8, min(64, shards // 4))))
    divisors = (streams for streams in range(1, most + 1) if global_batch % streams == 0)
    return max(divisors, key=lambda streams: (min(streams & -streams, 64), streams))


def effective_shards(counts: Sequence[np.ndarray], weights: Sequence[int], window: int) -> int:
    """The shards of a blend, as far as cuts between streams matter: so many equal ones would be cut as often a sample.

    Datasets that fit the window are not cut into streams and do not count, unless there is no other.
    """
    large = [number for number, part in enumerate(counts) if part.sum() > window] or range(len(counts))
    # A cut falls into a shard as often as its share of the samples.
    read_twice = [
        weights[number] * int((counts[number] ** 2).sum()) / int(counts[number].sum()) ** 2 for number in large
    ]
    return round(sum(weights[number] for number in large) / sum(read_twice))


class Order:
    """See the head of this file. Made by `build_order`; safe to share between threads."""

    def __init__(
        self,
        counts: Sequence[np.ndarray],
        weights: Sequence[int],
        seed: int,
        global_batch: int,
        window: int,
        streams: int,
    ) -> None:
        self.seed, self.global_batch, self.window, self.streams = seed, global_batch, window, streams
        self.rows = global_batch // streams  # of a stream in each batch
        self.counts = list(counts)
        self.samples = [int(part.sum()) for part in counts]
        self.blend = Blend(weights, streams, seed)
        self._block = max(1, window // streams)
        self._ends = [np.cumsum(part) for part in counts]
        # An epoch holds its order of shards, 16 bytes a shard.
        self._epoch = lru_cache(maxsize=2 * len(counts) + 4)(self._cut_epoch)

    def describe(self) -> dict[str, int]:
        """What the order depends on, for a checkpoint: with another value a position would hold another sample."""
        blend = repr((self.blend.weights, self.samples)).encode()
        return {
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "streams": self.streams,
            "window": self.window,
            "blend": int.from_bytes(hashlib.sha256(blend).digest()[:7], "big"),
        }

    def at(self, positions: np.ndarray) -> Places:
        """The places of the samples at `positions` [n] int64, in any order."""
        positions = np.asarray(positions, dtype=np.int64)
        batch, row = np.divmod(positions, self.global_batch)
        stream, row = np.divmod(row, self.rows)
        dataset, number = self.blend.locate(stream, batch * self.rows + row)
        epoch, shard, place = (np.empty(len(positions), np.int64) for _ in range(3))
        for drawn in np.unique(dataset):
            which = slice(None) if len(self.counts) == 1 else np.flatnonzero(dataset == drawn)
            locate = self._locate_in_whole if self.samples[drawn] <= self.window else self._locate_in_parts
            found = locate(int(drawn), positions[which], stream[which], number[which])
            epoch[which], shard[which], place[which] = found
        return Places(dataset, epoch, shard, place)

    def count(self, position: int) -> np.ndarray:
        """int64 [D]: draws of each dataset before `position`."""
        numbers = self._numbers(position)
        return np.array([int(self.blend.count(dataset, numbers).sum()) for dataset in range(len(self.counts))])

    def epoch_end(self, dataset: int, epoch: int) -> int:
        """The position after the last draw of the dataset's epoch."""
        return self._reach(dataset, (epoch + 1) * self.samples[dataset])

    def replacement(self, position: int, dataset: int, attempt: int) -> tuple[int, int]:
        """(shard, place) of the sample that stands in for an unreadable one, from the same dataset."""
        draw = hash64(self.seed, f"replacement {dataset} {attempt}", position)
        shard, place = _find(self._ends[dataset], np.array([int(draw) % self.samples[dataset]]))
        return int(shard[0]), int(place[0])

    def samples_of_shards(self, dataset: int, epoch: int) -> np.ndarray:
        """int64 [V]: samples of all shards from which each stream reads some in an epoch of a dataset that is cut into parts."""
        cut = self._epoch(dataset, epoch)
        (used,) = np.nonzero(cut.sizes)  # a part without samples may begin after the last shard
        first = np.searchsorted(cut.ends, cut.starts[used], side="right")
        last = np.searchsorted(cut.ends, cut.starts[used] + cut.sizes[used] - 1, side="right")
        read = np.zeros(self.streams, np.int64)
        read[used] = cut.ends[last] - cut.ends[first] + self.counts[dataset][cut.shards[first]]
        return read

    def _numbers(self, position: int) -> np.ndarray:
        """[V]: samples of each stream before `position`."""
        batch, row = divmod(position, self.global_batch)
        begun = np.clip(row - self.rows * np.arange(self.streams), 0, self.rows)
        return begun + (batch * self.rows if position < INT64_END else np.array([batch * self.rows], dtype=object))

    def _reach(self, dataset: int, draws: int) -> int:
        """The first position before which there are so many draws of the dataset."""
        if len(self.counts) == 1 or draws == 0:
            return draws
        share, total = self.blend.weights[dataset], sum(self.blend.weights)
        reach = self.streams * (int(self.blend.greatest_error) + 1)  # what the count may be off its share
        low, high = max(0, (draws - reach) * total // share), (draws + reach) * total // share + 1
        while low < high:
            middle = (low + high) // 2
            if int(self.blend.count(dataset, self._numbers(middle)).sum()) < draws:
                low = middle + 1
            else:
                high = middle
        return low

    def _locate_in_whole(
        self, dataset: int, positions: np.ndarray, stream: np.ndarray, number: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epoch, shard, place) of draws of a dataset that is shuffled as a whole."""
        samples = self.samples[dataset]
        epoch, index = np.divmod(self._ordinals(dataset, positions, stream, number), samples)
        keys = hash64(self.seed, f"order {dataset}", epoch)
        chosen = shuffle_index(index, np.full(len(index), samples), keys)
        return epoch, *_find(self._ends[dataset], chosen)

    def _ordinals(self, dataset: int, positions: np.ndarray, stream: np.ndarray, number: np.ndarray) -> np.ndarray:
        """[n]: how many draws of the dataset, over all streams, come before each of these draws of it."""
        if len(self.counts) == 1:
            return positions
        batches, which = np.unique(positions // self.global_batch, return_inverse=True)
        ordinals = np.empty(len(positions), np.int64)
        step = max(1, 2**20 // self.streams)  # batches at a time, to bound the memory
        for first in range(0, len(batches), step):
            chunk = batches[first : first + step]
            streams = np.tile(np.arange(self.streams), len(chunk))
            begin = self.blend.count(dataset, np.repeat(chunk * self.rows, self.streams), streams)
            end = self.blend.count(dataset, np.repeat((chunk + 1) * self.rows, self.streams), streams)
            begin, end = (part.reshape(len(chunk), self.streams).astype(np.int64) for part in (begin, end))
            # A draw comes after all of the batches before, and after those of its own batch in the streams before its own.
            before = begin.sum(1, keepdims=True) + np.cumsum(end - begin, axis=1) - end
            here = np.flatnonzero((which >= first) & (which < first + step))
            ordinals[here] = before[which[here] - first, stream[here]] + number[here]
        return ordinals

    def _locate_in_parts(
        self, dataset: int, positions: np.ndarray, stream: np.ndarray, number: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epoch, shard, place) of draws of a dataset that is cut into a part for each stream."""
        epochs, shard, place = (np.empty(len(positions), np.int64) for _ in range(3))
        for epoch, which in self._split_by_epoch(dataset, positions):
            cut, here = self._epoch(dataset, epoch), stream[which]
            start, size = cut.starts[here], cut.sizes[here]
            index = (number[which] - cut.drawn[here]).astype(np.int64)
            block = (index + cut.shift[here]) // self._block
            first = np.maximum(block * self._block - cut.shift[here], 0)
            last = np.minimum((block + 1) * self._block - cut.shift[here], size)
            keys = mix(cut.keys[here] + block.astype(np.uint64) * _GAMMA)
            sample = start + first + shuffle_index(index - first, last - first, keys)
            shuffled, place[which] = _find(cut.ends, sample)
            epochs[which], shard[which] = epoch, cut.shards[shuffled]
        return epochs, shard, place

    def _split_by_epoch(self, dataset: int, positions: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Each epoch of the dataset that these draws of it belong to, and which of them do."""
        left = np.arange(len(positions))
        while len(left):
            epoch = self._draws(dataset, int(positions[left].min())) // self.samples[dataset]
            inside = positions[left] < self._epoch(dataset, epoch).end
            yield epoch, left[inside]
            left = left[~inside]

    def _draws(self, dataset: int, position: int) -> int:
        return position if len(self.counts) == 1 else int(self.blend.count(dataset, self._numbers(position)).sum())

    def _cut_epoch(self, dataset: int, epoch: int) -> "_Epoch":
        begin, end = (self._reach(dataset, number * self.samples[dataset]) for number in (epoch, epoch + 1))
        drawn, drawn_after = (self.blend.count(dataset, self._numbers(position)) for position in (begin, end))
        sizes = (drawn_after - drawn).astype(np.int64)
        key = hash64(self.seed, f"order {dataset}", epoch)
        shards = np.argsort(_mix_in(key, 0, np.arange(len(self.counts[dataset]))), kind="stable")
        keys = _mix_in(key, 1, np.arange(self.streams))
        return _Epoch(
            end=min(end, INT64_END),
            drawn=drawn,
            sizes=sizes,
            starts=np.cumsum(sizes) - sizes,
            shift=(keys % np.uint64(self._block)).astype(np.int64),
            keys=keys,
            shards=shards,
            ends=np.cumsum(self.counts[dataset][shards]),
        )


@dataclass(frozen=True)
class _Epoch:
    """An epoch of a dataset, cut into one part a stream."""

    end: int  # the position after its last draw
    drawn: np.ndarray  # [V] draws of each stream before it
    sizes: np.ndarray  # int64 [V] samples of each part
    starts: np.ndarray  # int64 [V] where each part begins in the joined shards
    shift: np.ndarray  # int64 [V] by how much the first block is shorter, so that blocks begin elsewhere in each epoch
    keys: np.ndarray  # uint64 [V]
    shards: np.ndarray  # int64 [S] the shards in the order in which they are joined
    ends: np.ndarray  # int64 [S] samples up to the end of each of these


def _mix_in(key: np.ndarray, purpose: int, numbers: np.ndarray) -> np.ndarray:
    """uint64 hashes of `numbers`, for this key and purpose."""
    start = mix(np.atleast_1d(key) + np.uint64(purpose) * _GAMMA)
    return mix(start + (numbers.astype(np.uint64) + np.uint64(1)) * _GAMMA)


def _find(ends: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(shard, place) of samples of joined shards whose ends are given."""
    shard = np.searchsorted(ends, samples, side="right")
    return shard, samples - np.where(shard > 0, ends[shard - 1], 0)


def shuffle_index(index: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """int64 [n]: where a permutation of range(sizes[k]) that keys[k] chooses takes index[k].

    A Feistel network over the next power of two (64 at least: smaller ones are not random enough), walked until it lands
    inside the range, so no list of indices is ever held. Source: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    bits = np.maximum(np.frexp((sizes - 1).astype(np.float64))[1], LEAST_BITS)  # exact below 2^53
    right_bits = ((bits + 1) // 2).astype(np.uint64)
    left_mask = (np.uint64(1) << (bits // 2).astype(np.uint64)) - np.uint64(1)
    network = (right_bits, left_mask, keys)
    shuffled = _feistel(index.astype(np.uint64), *network)
    outside = np.flatnonzero(shuffled >= sizes.astype(np.uint64))
    while len(outside):
        moved = _feistel(shuffled[outside], *(part[outside] for part in network))
        shuffled[outside] = moved
        outside = outside[moved >= sizes[outside].astype(np.uint64)]
    return shuffled.astype(np.int64)


def _feistel(index: np.ndarray, right_bits: np.ndarray, left_mask: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A bijection of uint64 below 2^bits, another one for every key; the two halves of the bits scramble each other."""
    right_mask = (np.uint64(1) << right_bits) - np.uint64(1)
    left, right = index >> right_bits, index & right_mask
    for one, other in _ROUNDS.reshape(-1, 2):
        left = left ^ (mix(right + (keys + one)) & left_mask)
        right = right ^ (mix(left + (keys + other)) & right_mask)
    return (left << right_bits) | right


@dataclass(frozen=True)
class _Split:
    """A node of the blend: of its draws, `left_weight` in `weight` go left."""

    left: "_Split | int"  # or the dataset
    right: "_Split | int"
    left_weight: int
    weight: int
    phases: np.ndarray  # [V], each in range(weight)

    def count_left(self, draws: np.ndarray, stream: np.ndarray | slice) -> np.ndarray:
        """How many of the node's first `draws` go left: floor((draws x left_weight + phase) / weight), without overflow."""
        draws = draws.astype(np.result_type(draws, self.phases), copy=False)
        periods = draws // self.weight
        rest = draws - periods * self.weight
        return periods * self.left_weight + (rest * self.left_weight + self.phases[stream]) // self.weight


class Blend:
    """Which dataset stands at a stream's number i, by arithmetic on i alone, in the shares of `weights`.

    A tree of splits in two. A split sends floor((m a + s) / t) of its first m draws left, where a / t is the left side's
    share and s the phase: within 1/2 of m a / t for the phase t / 2, and moved by a constant for another one. A node that
    has share r of its parent takes over r times its parent's error. So apart from its constants a dataset's count is off
    its share i w / W by at most E = 1/2 + r/2 + r r'/2 + ..., up its path.

    The phases are spread evenly over the streams, in another order at each split, so the constants cancel in the sum over
    streams. Without that all rows of a batch would come from one dataset at once, however rare that is; with it the
    datasets' numbers in a batch vary less than those of random draws.

    Proved, hence, at every number: all V streams together are within V x E of a dataset's share, each one within 2 E.
    `greatest_error` is the greatest E, of the tree where it is least. On random weights it was never above 1 for up to 4
    datasets; for 5 and 6, where all trees are tried too, seldom above and up to 1.05; for more, where the tree is a good
    guess, 1.0 to 1.3 as a rule, and up to 1.45 for weights of very different sizes.
    """

    def __init__(self, weights: Sequence[int], streams: int, seed: int) -> None:
        divisor = gcd(*weights)
        self.weights = [int(weight) // divisor for weight in weights]
        tree = _plan_tree(self.weights)
        self.greatest_error = max(_errors(tree, self.weights).values())
        self._root = self._split(tree, streams, seed)
        self._paths = dict(_paths(self._root))

    def locate(self, stream: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dataset, draws of it in that stream before) of numbers [n] of streams [n], int64 [n] each."""
        dataset = np.zeros(len(number), np.int64)
        if isinstance(self._root, int):
            return dataset, number
        drawn = np.empty(len(number), np.int64)
        pending = [(self._root, np.arange(len(number)), number)]
        while pending:
            node, which, draws = pending.pop()
            if isinstance(node, int):
                dataset[which], drawn[which] = node, draws
            elif len(which):
                left = node.count_left(draws, stream[which])
                goes_left = node.count_left(draws + 1, stream[which]) > left
                pending.append((node.left, which[goes_left], left[goes_left]))
                pending.append((node.right, which[~goes_left], (draws - left)[~goes_left]))
        return dataset, drawn

    def count(self, dataset: int, numbers: np.ndarray, stream: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Draws of the dataset among the first `numbers` of the streams (all, by default), of the shape of `numbers`."""
        for node, left in self._paths[dataset]:
            gone_left = node.count_left(numbers, stream)
            numbers = gone_left if left else numbers - gone_left
        return numbers

    def _split(self, tree: "_Tree", streams: int, seed: int) -> _Split | int:
        """The node of a tree, with phases."""
        if isinstance(tree, int):
            return tree
        left, right = tree
        weight = _weigh(tree, self.weights)
        draw = hash64(seed, f"phases {min(_leaves(left))} {min(_leaves(right))}", np.arange(streams))
        ranks = np.argsort(np.argsort(draw, kind="stable")).tolist()
        # Python integers where int64 could overflow; the middle of the streams' equal parts of range(weight).
        kind = np.int64 if weight**2 < INT64_END else object
        phases = np.array([(2 * rank + 1) * weight // (2 * streams) for rank in ranks], dtype=kind)
        sides = (self._split(side, streams, seed) for side in tree)
        return _Split(*sides, _weigh(left, self.weights), weight, phases)


_Tree = int | tuple["_Tree", "_Tree"]
"""A dataset, or two trees."""


def _leaves(tree: _Tree) -> list[int]:
    return [tree] if isinstance(tree, int) else _leaves(tree[0]) + _leaves(tree[1])


def _weigh(tree: _Tree, weights: Sequence[int]) -> int:
    return sum(weights[dataset] for dataset in _leaves(tree))


def _paths(node: "_Split | int", path: tuple = ()) -> Iterator[tuple[int, tuple]]:
    """Each dataset, and the splits on the way to it with whether it lies to their left."""
    if isinstance(node, int):
        yield node, path
    else:
        yield from _paths(node.left, (*path, (node, True)))
        yield from _paths(node.right, (*path, (node, False)))


def _errors(tree: _Tree, weights: Sequence[int], above: float = 0.0) -> dict[int, float]:
    """By how much each dataset's count may be off its share with all phases in the middle; `above` is the tree's own error."""
    if isinstance(tree, int):
        return {tree: above}
    errors = {}
    for side in tree:
        share = _weigh(side, weights) / _weigh(tree, weights)
        errors |= _errors(side, weights, 0.5 + share * above)
    return errors


def _plan_tree(weights: Sequence[int]) -> _Tree:
    """The tree of splits with the least error of its worst dataset."""
    by_weight = tuple(sorted(range(len(weights)), key=lambda dataset: (-weights[dataset], dataset)))
    return _best_tree(by_weight, weights, 0.0, float("inf"))[1]


def _best_tree(
    datasets: tuple[int, ...], weights: Sequence[int], error: float, limit: float
) -> tuple[float, _Tree | None]:
    """(greatest error, tree) of these datasets, the heaviest first, whose node has `error`; (limit, None) if none is below."""
    if len(datasets) == 1:
        return (error, datasets[0]) if error < limit else (limit, None)
    total = sum(weights[dataset] for dataset in datasets)
    if 0.5 + weights[datasets[0]] / total * error >= limit:  # of any tree
        return limit, None
    best = None
    for sides in _ways_to_split(datasets, weights):
        trees, greatest = [], 0.0
        for side in sides:
            share = sum(weights[dataset] for dataset in side) / total
            side_error, tree = _best_tree(side, weights, 0.5 + share * error, limit)
            if tree is None:
                break
            trees.append(tree)
            greatest = max(greatest, side_error)
        else:
            limit, best = greatest, (trees[0], trees[1])
    return limit, best


def _ways_to_split(
    datasets: tuple[int, ...], weights: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All ways for few datasets. For many, the heaviest alone if it outweighs the rest, else into two equal halves."""
    first, *rest = datasets
    if len(datasets) <= EXHAUSTIVE:
        for mask in range(2 ** len(rest) - 1):
            beside = tuple(dataset for place, dataset in enumerate(rest) if mask >> place & 1)
            yield (first, *beside), tuple(dataset for dataset in rest if dataset not in beside)
        return
    halves, totals = ([], []), [0, 0]
    for dataset in datasets:
        lighter = int(totals[1] < totals[0])
        halves[lighter].append(dataset)
        totals[lighter] += weights[dataset]
    yield tuple(halves[0]), tuple(halves[1])

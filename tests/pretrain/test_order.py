"""Which sample stands where: exact for every dataset, blend, number of streams and slice of the batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import ConfigError
from pretrain.data.order import Blend, Order, Places, build_order, choose_streams, effective_shards, shuffle_index
from pretrain.doctor.order import ideal_same_shard_rate, read_amplification, same_shard_rate
from pretrain.randomness import hash64

shard_counts = st.lists(st.integers(0, 12), min_size=1, max_size=40).filter(any)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    datasets = draw(st.integers(1, 5))
    counts = [np.array(draw(shard_counts)) for _ in range(datasets)]
    weights = [draw(st.integers(1, 9)) for _ in range(datasets)]
    streams, rows = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    window = draw(st.integers(1, 300))
    return build_order(counts, weights, draw(st.integers(0, 2**62)), streams * rows, window, streams)


def concatenate(parts: list[Places]) -> Places:
    names = ("dataset", "epoch", "shard", "place")
    return Places(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def same(one: Places, other: Places) -> bool:
    return all((getattr(one, name) == value).all() for name, value in vars(other).items())


@settings(max_examples=60, deadline=None)
@given(order=orders(), epochs=st.integers(1, 2))
def test_every_sample_of_every_dataset_exactly_once_an_epoch(order: Order, epochs: int) -> None:
    ends = [order.epoch_end(dataset, epochs - 1) for dataset in range(len(order.counts))]
    places = order.at(np.arange(min(max(ends), 40_000)))
    for dataset, (counts, end) in enumerate(zip(order.counts, ends, strict=True)):
        everything = [(shard, place) for shard, count in enumerate(counts) for place in range(count)]
        for epoch in range(epochs if end <= len(places.epoch) else 0):
            here = (places.dataset == dataset) & (places.epoch == epoch)
            assert sorted(zip(places.shard[here], places.place[here], strict=True)) == everything
            # an epoch is a run of the dataset's draws: none of another lies between, and it ends where it says
            drawn = places.epoch[: order.epoch_end(dataset, epoch)][
                places.dataset[: order.epoch_end(dataset, epoch)] == dataset
            ]
            assert (np.diff(drawn) >= 0).all() and (drawn <= epoch).all() and (drawn == epoch).sum() == counts.sum()


@settings(max_examples=60, deadline=None)
@given(order=orders(), data=st.data())
def test_any_slice_of_any_batch_is_the_same_alone(order: Order, data: st.DataObject) -> None:
    """What W ranks take together, from any cut point on, is what one takes; and any subset in any order."""
    world_size = data.draw(st.sampled_from([w for w in range(1, 9) if order.global_batch % w == 0]))
    first, batches, rows = data.draw(st.integers(0, 10**12)), 3, order.global_batch // world_size
    start = first * order.global_batch
    whole = order.at(np.arange(start, start + batches * order.global_batch))
    slices = [
        order.at(np.arange(begin, begin + rows)) for begin in range(start, start + batches * order.global_batch, rows)
    ]
    assert same(concatenate(slices), whole)
    chosen = np.array(data.draw(st.lists(st.integers(0, len(whole.epoch) - 1), max_size=20)), dtype=np.int64)
    subset = order.at(start + chosen)
    assert same(subset, Places(*(value[chosen] for value in vars(whole).values())))


@settings(max_examples=60, deadline=None)
@given(order=orders(), batch=st.integers(0, 10**9))
def test_counts_are_those_of_the_draws(order: Order, batch: int) -> None:
    start = batch * order.global_batch
    places = order.at(np.arange(start, start + 2 * order.global_batch))
    before = order.count(start)
    for position in range(start, start + 2 * order.global_batch + 1):
        drawn = np.bincount(places.dataset[: position - start], minlength=len(before))
        assert (order.count(position) - before == drawn).all()
    assert before.sum() == start
    for dataset, epoch, position in zip(places.dataset, places.epoch, range(start, 2**62), strict=False):
        assert order.count(position)[dataset] // order.samples[dataset] == epoch


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(
        st.one_of(st.integers(1, 20), st.integers(1, 10**6), st.integers(1, 10**15)), min_size=1, max_size=5
    ),
    streams=st.integers(1, 40),
    start=st.one_of(st.just(0), st.integers(0, 10**12)),
)
def test_shares_are_within_one_sample_a_stream(weights: list[int], streams: int, start: int) -> None:
    blend, total = Blend(weights, streams, 3), sum(weights)
    assert blend.greatest_error <= (1 if len(weights) <= 4 else 1.1)
    for number in range(start, start + 50):
        counts = [blend.count(dataset, np.full(streams, number)) for dataset in range(len(weights))]
        assert (sum(counts) == number).all()
        for weight, count in zip(weights, counts, strict=True):
            shifts = [abs(int(own) * total - number * weight) for own in count]
            assert max(shifts) <= 2 * blend.greatest_error * total
            summed = abs(int(count.sum()) * total - streams * number * weight)
            assert summed <= streams * blend.greatest_error * total * (1 + 1e-12)


@pytest.mark.parametrize("datasets", [7, 12, 40])
def test_shares_of_many_datasets(datasets: int) -> None:
    weights = [int(value) for value in 10 ** np.random.default_rng(datasets).uniform(0, 6, datasets)]
    blend, numbers = Blend(weights, 4, 0), np.arange(20_000)
    assert blend.greatest_error <= 1.5
    for dataset, weight in enumerate(weights):
        summed = sum(blend.count(dataset, numbers, np.full(len(numbers), stream)) for stream in range(4))
        assert np.abs(summed - 4 * numbers * (weight / sum(weights))).max() <= 4 * blend.greatest_error + 1e-6


def test_a_batch_mixes_its_datasets() -> None:
    """With one row a stream, the datasets' numbers in a batch spread no more than if each row were drawn at random."""
    blend, streams, batches = Blend([600, 300, 95, 5], 512, 0), 512, 400
    numbers, stream = np.repeat(np.arange(batches), streams), np.tile(np.arange(streams), batches)
    dataset = blend.locate(stream, numbers)[0].reshape(batches, streams)
    for number, share in enumerate([0.6, 0.3, 0.095, 0.005]):
        spread = (dataset == number).sum(1).std()
        assert 0 < spread < 1.1 * np.sqrt(streams * share * (1 - share))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 1000, 4096, 4097])
def test_shuffles_are_permutations_and_keys_make_others(size: int) -> None:
    keys = np.repeat(hash64(0, "test", np.arange(10)), size)
    shuffled = shuffle_index(np.tile(np.arange(size), 10), np.full(10 * size, size), keys).reshape(10, size)
    assert (np.sort(shuffled, axis=1) == np.arange(size)).all()
    assert size < 3 or len({tuple(row) for row in shuffled.tolist()}) > 3


@pytest.mark.parametrize("size", [3, 6, 200])
def test_places_are_uniform(size: int) -> None:
    """Where each element goes, and how two go together, over 20,000 keys: chi-square within its 99.99 % range."""
    keys = hash64(0, "test", np.arange(20_000))
    bins = min(size, 20)
    first, second = (
        shuffle_index(np.full(len(keys), index), np.full(len(keys), size), keys) * bins // size for index in (0, 1)
    )
    for observed, cells in ((first, bins), (second, bins), ((first - second) % bins, bins)):
        counts = np.bincount(observed, minlength=cells)
        expected = np.full(cells, len(keys) / cells)
        if observed is not first and observed is not second:  # two never go to the same place
            pairs = [(a * bins // size - b * bins // size) % bins for a in range(size) for b in range(size) if a != b]
            expected = np.bincount(pairs, minlength=cells) * len(keys) / len(pairs)
        counts, expected = counts[expected > 0], expected[expected > 0]
        assert ((counts - expected) ** 2 / expected).sum() < 52.4  # 19 degrees of freedom or fewer


@pytest.mark.parametrize(("window", "most"), [(10, 0.1), (1000, 0.02)])
def test_epochs_and_seeds_differ(window: int, most: float) -> None:
    """With a small window a shard may come at the same time in two epochs, one in 20 here."""
    counts = [np.full(20, 25)]
    first, second = (build_order(counts, [1], seed, 20, window, 5).at(np.arange(1000)) for seed in (0, 1))
    index = first.shard * 25 + first.place
    assert (index[:500] == index[500:]).mean() < most
    assert (index == second.shard * 25 + second.place).mean() < most


def test_a_stream_stays_inside_its_window() -> None:
    """Two shards at a time at most, of 40 samples, for a window of 20 a stream; and blocks begin elsewhere each epoch."""
    order = build_order([np.full(64, 40)], [1], 0, 16, window=160, streams=8)
    places = order.at(np.arange(2 * order.samples[0]))
    rows = places.shard.reshape(-1, 8, 2).transpose(1, 0, 2).reshape(8, -1)  # by stream
    for stream in rows:
        for start in range(0, len(stream) - 20):
            assert len(np.unique(stream[start : start + 20])) <= 4  # two blocks, each across a border
        changes = np.flatnonzero(np.diff(stream))
        assert len(np.unique(stream[:320])) <= 10 and len(changes) >= 8


def test_replacements_are_of_the_same_dataset_and_differ() -> None:
    order = build_order([np.array([3, 0, 2]), np.array([50])], [1, 1], 0, 4)
    found = [order.replacement(position, 0, attempt) for position in range(50) for attempt in range(4)]
    assert set(found) == {(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)}
    assert len({order.replacement(7, 1, attempt) for attempt in range(10)}) > 5
    assert order.replacement(7, 1, 3) == order.replacement(7, 1, 3)


def test_a_tiny_dataset_beside_a_large_one() -> None:
    """Thousands of its epochs in one call."""
    order = build_order([np.array([2, 1]), np.full(4000, 100)], [1, 1], 0, 2048, window=100, streams=64)
    places = order.at(np.arange(2**15))
    tiny = places.dataset == 0
    epochs, drawn = np.unique(places.epoch[tiny], return_counts=True)
    assert len(epochs) > 5000 and (drawn[:-1] == 3).all()


def test_positions_far_apart_in_one_call() -> None:
    order = build_order([np.full(50, 20), np.full(9, 3)], [7, 2], 0, 8, window=100)
    far = 10**15
    places = order.at(np.array([far, 0, far + 1, 10**9, 1]))
    assert same(places, concatenate([order.at(np.array([position])) for position in (far, 0, far + 1, 10**9, 1)]))


def test_large_sizes_and_far_positions() -> None:
    order = build_order([np.full(100_000, 10_000), np.full(3000, 7)], [10**15, 1], 0, 32_768)
    far = 10**12 // 32_768 * 32_768
    places = order.at(np.arange(far, far + 512))
    assert len(set(zip(places.shard.tolist(), places.place.tolist(), strict=True))) == 512
    assert order.count(far).sum() == far
    assert order.epoch_end(1, 0) > 2**63 and order.count(order.epoch_end(1, 0)).tolist()[1] == 21_000


def test_what_it_depends_on_is_described() -> None:
    counts = [np.array([5, 6]), np.array([7])]
    base = build_order(counts, [2, 1], 0, 4).describe()
    assert base == build_order(counts, [4, 2], 0, 4).describe()
    assert all(isinstance(value, int) for value in base.values())
    for other in (
        build_order(counts, [1, 1], 0, 4),
        build_order(counts, [2, 1], 1, 4),
        build_order(counts, [2, 1], 0, 8),
        build_order(counts, [2, 1], 0, 4, window=9),
        build_order(counts, [2, 1], 0, 4, streams=2),
        build_order([np.array([5, 6]), np.array([8])], [2, 1], 0, 4),
    ):
        assert other.describe() != base


@pytest.mark.parametrize(
    ("counts", "weights", "streams", "text"),
    [
        ([[0, 0]], [1], None, "no samples"),
        ([[3]], [0], None, "weight 0"),
        ([[3]], [1, 1], None, "2 weights"),
        ([], [], None, "0 datasets"),
        ([[3]], [1], 3, "do not divide"),
    ],
)
def test_what_cannot_be_ordered_is_refused(counts: list, weights: list, streams: int | None, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build_order([np.array(part) for part in counts], weights, 0, 4, streams=streams)


def test_streams() -> None:
    assert choose_streams(4096, 100_000) == 1024
    assert choose_streams(4096, 512) == 64
    assert choose_streams(4096, 320) == 64
    assert choose_streams(4096, 3) == 1
    assert choose_streams(3 * 1024, 800) == 64  # not 96: 64 ranks would share streams
    assert choose_streams(1000, 1000) == 40
    assert choose_streams(7, 1000) == 7
    assert effective_shards([np.full(100, 5), np.full(7, 10)], [1, 1], window=100) == 100
    assert effective_shards([np.full(100, 5), np.full(50, 10)], [1, 1], window=100) == 67  # harmonic mean
    assert effective_shards([np.array([900, 50, 50])], [1], window=1000) == 1


@pytest.mark.parametrize(
    ("shards", "sizes"), [(320, (100, 101)), (512, (100, 101)), (1500, (20, 180)), (4000, (1, 60))]
)
def test_shards_are_read_little_more_than_once(shards: int, sizes: tuple[int, int]) -> None:
    counts = np.random.default_rng(shards).integers(*sizes, shards)
    order = build_order([counts], [1], 0, 4096, window=8192)
    for world_size, most in ((1, 1.25), (8, 1.25), (64, 1.25 if shards < 320 else 1.21)):
        assert 1 <= read_amplification(order, 0, world_size) <= most


def test_read_amplification_is_that_of_the_ranks() -> None:
    """Against ranks that take every position of an epoch and count the shards that each of their streams meets."""
    counts = np.random.default_rng(0).integers(0, 30, 60)
    for streams, world_size in ((4, 4), (4, 2), (2, 4), (6, 4)):
        order = build_order([counts], [1], 0, 24, window=48, streams=streams)
        positions = np.arange(order.samples[0])
        row = positions % 24
        places = order.at(positions)
        visits = set(
            zip((row * world_size // 24).tolist(), (row // order.rows).tolist(), places.shard.tolist(), strict=True)
        )
        read = sum(int(counts[shard]) for _, _, shard in visits)
        if streams % world_size == 0:
            assert read_amplification(order, 0, world_size) == pytest.approx(read / order.samples[0])
        else:  # a rank that shares a stream may miss a small shard by chance
            assert read / order.samples[0] <= read_amplification(order, 0, world_size) <= 1.2 * read / order.samples[0]
    whole = build_order([counts], [1], 0, 24, window=10_000)
    assert 3 < read_amplification(whole, 0, 4) <= 4


@pytest.mark.parametrize(("shards", "samples"), [(64, 1000), (300, 300), (2000, 60), (30, 5000), (5000, 4)])
def test_batches_meet_a_shard_twice_as_seldom_as_at_random(shards: int, samples: int) -> None:
    for window in (2048, 16_384):
        order = build_order([np.full(shards, samples)], [1], 0, 1024, window)
        measured, ideal = same_shard_rate(order, range(0, 60, 5)), ideal_same_shard_rate(order)
        assert 0 <= measured <= 1.5 * ideal
    whole = build_order([np.full(20, 100)], [1], 0, 500, window=2000)
    assert same_shard_rate(whole, range(40)) == pytest.approx(ideal_same_shard_rate(whole), rel=0.1)

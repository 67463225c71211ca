"""The proof at the end of an epoch: it holds for what the order gives, and breaks for any sample too few or too many."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest

from pretrain.data.ledger import EpochReport, Identities, Ledger
from pretrain.data.order import Places, build_order

COUNTS = [np.array([5, 0, 9, 13]), np.array([4, 3])]
FINGERPRINTS = ["ab" * 32, "cd" * 32]
ORDER = build_order(COUNTS, [3, 1], 0, 12, window=10)


class World:
    """One of several ranks that are threads here."""

    def __init__(self, rank: int, values: list, barrier: threading.Barrier) -> None:
        self.rank, self._values, self._barrier = rank, values, barrier

    def gather_objects(self, value: object) -> list:
        self._values[self.rank] = value
        self._barrier.wait(10)
        values = list(self._values)
        self._barrier.wait(10)
        return values


@dataclass
class Ranks:
    """As many ledgers as ranks, that take the batches in step."""

    ledgers: list[Ledger]
    position: int = 0

    @classmethod
    def start(cls, world_size: int) -> "Ranks":
        return cls([Ledger(ORDER, ["train", "extra"], FINGERPRINTS) for _ in range(world_size)])

    def places(self) -> list[Places]:
        """What each rank is to be given in the next batch."""
        rows = ORDER.global_batch // len(self.ledgers)
        starts = range(self.position, self.position + ORDER.global_batch, rows)
        return [ORDER.at(np.arange(start, start + rows)) for start in starts]

    def take(self, given: list[Places]) -> list[EpochReport]:
        for ledger, places in zip(self.ledgers, given, strict=True):
            ledger.add(places)
        self.position += ORDER.global_batch
        first, *others = self.together(lambda ledger, world: ledger.close_epochs(self.position, world))
        assert not any(others)
        return first

    def together(self, collective) -> list:
        """collective(ledger, world) of every rank."""
        size = len(self.ledgers)
        values, barrier = [None] * size, threading.Barrier(size)
        with ThreadPoolExecutor(size) as pool:
            return [*pool.map(collective, self.ledgers, [World(rank, values, barrier) for rank in range(size)])]


def run(ranks: Ranks, batches: int, change=lambda batch, given: given) -> list[EpochReport]:
    reports = []
    for _ in range(batches):
        reports += ranks.take(change(ranks.position // ORDER.global_batch, ranks.places()))
    return reports


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_epoch_of_every_dataset_is_proved(world_size: int) -> None:
    reports = run(Ranks.start(world_size), 20)
    assert [report.epoch for report in reports if report.dataset == "train"] == list(range(6))
    assert [report.epoch for report in reports if report.dataset == "extra"] == list(range(8))
    assert all(report.matched and report.samples == report.expected for report in reports)
    assert any(report.message.startswith("epoch 0 of extra: 7 samples, each once (fingerprint ") for report in reports)


def pick(places: Places, rows: list[int]) -> Places:
    return Places(*(value[rows] for value in vars(places).values()))


def add_to(places: Places, name: str, row: int, much: int) -> Places:
    return replace(places, **{name: getattr(places, name) + much * (np.arange(6) == row)})


def without(row: int) -> list[int]:
    return [other for other in range(6) if other != row]


CHANGES = {
    "lost": (lambda places, a, b: pick(places, without(a)), "1 too few"),
    "doubled": (lambda places, a, b: pick(places, [*range(6), a]), "1 too many"),
    "doubled for a lost one": (lambda places, a, b: pick(places, [*without(a), b]), "but not each once"),
    "another place": (lambda places, a, b: add_to(places, "place", a, 1), "but not each once"),
    "another shard": (lambda places, a, b: add_to(places, "shard", a, -places.shard[a]), "but not each once"),
    "another epoch": (lambda places, a, b: add_to(places, "epoch", a, 1), "1 too few"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("rank", [0, 1])
def test_one_wrong_sample_raises_the_alarm(name: str, rank: int) -> None:
    change, text = CHANGES[name]

    def inject(number: int, given: list[Places]) -> list[Places]:
        if number == 1:
            places = given[rank]
            a, b = np.flatnonzero((places.dataset == 0) & (places.epoch == 0) & (places.shard > 0))[:2].tolist()
            given[rank] = change(places, a, b)
        return given

    wrong = [report for report in run(Ranks.start(2), 12, inject) if not report.matched]
    assert (wrong[0].dataset, wrong[0].epoch) == ("train", 0) and text in wrong[0].message
    assert len(wrong) == (2 if name == "another epoch" else 1)


def test_a_sample_of_an_epoch_that_has_ended_raises_the_alarm() -> None:
    first = ORDER.at(np.array([0]))
    late = max(ORDER.epoch_end(0, 0), ORDER.epoch_end(1, 0)) // 12 + 1

    def inject(number: int, given: list[Places]) -> list[Places]:
        if number == late:
            given = [Places(*map(np.append, vars(given[0]).values(), vars(first).values()))]
        return given

    wrong = [report for report in run(Ranks.start(1), 12, inject) if not report.matched]
    assert (wrong[0].dataset, wrong[0].epoch, wrong[0].samples) == (("train", "extra")[int(first.dataset[0])], 0, 1)


@pytest.mark.parametrize("before", [1, 3])
@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("lost", [False, True])
def test_it_goes_through_a_checkpoint_in_mid_epoch(before: int, after: int, lost: bool) -> None:
    ranks = Ranks.start(before)
    reports = run(
        ranks, 4, lambda number, given: [pick(given[0], [0, 1]), *given[1:]] if lost and number == 3 else given
    )
    states = ranks.together(lambda ledger, world: ledger.state(world))
    assert all(state == states[0] for state in states)
    assert all(isinstance(value, int) for entry in states[0] for value in entry.values())
    resumed = Ranks.start(after)
    resumed.position = ranks.position
    for rank, ledger in enumerate(resumed.ledgers):
        ledger.restore(states[0], ranks.position, World(rank, [], threading.Barrier(1)))
    reports += run(resumed, 8)
    assert [report.epoch for report in reports if report.dataset == "train"] == [0, 1, 2, 3]
    assert all(report.matched for report in reports) is not lost


@pytest.mark.parametrize("changed_epoch", [None, 2])
def test_keys_are_the_same_in_each_epoch_without_bad_samples(changed_epoch: int | None) -> None:
    ranks, reports, wrong_once = Ranks.start(1), [], changed_epoch is not None
    for batch in range(12):
        (places,) = ranks.places()
        keys = (places.dataset * 1000 + places.shard * 100 + places.place + 1).astype(np.uint64)
        first = np.flatnonzero((places.dataset == 0) & (places.epoch == 2))[:1]
        if wrong_once and len(first):
            keys[first] += np.uint64(5)
            wrong_once = False
        if batch == 3:
            keys[0] = 0  # a sample that was replaced: nothing is said of keys in its epoch
        ranks.ledgers[0].add(places, keys)
        ranks.position += ORDER.global_batch
        reports += ranks.together(lambda ledger, world: ledger.close_epochs(ranks.position, world))[0]
        state = json.loads(json.dumps(ranks.together(lambda ledger, world: ledger.state(world))[0]))
        ranks.ledgers = Ranks.start(1).ledgers  # as after a resume
        ranks.ledgers[0].restore(state, ranks.position, World(0, [], threading.Barrier(1)))
    wrong = [(report.dataset, report.epoch) for report in reports if not report.matched]
    assert wrong == ([("train", changed_epoch)] if changed_epoch else [])
    assert not wrong or "keys are not those of an epoch before" in next(r.message for r in reports if not r.matched)


def test_the_manifests_side_of_a_selection_is_the_sum_of_what_counts() -> None:
    places = {0: np.array([1, 4]), 1: np.array([], np.int64), 2: np.array([0, 2, 3])}
    identities = Identities(np.array([2, 0, 3]), "12" * 32, places.__getitem__)
    hashes = identities.hash(np.array([0, 0, 2, 2, 2]), np.array([1, 4, 0, 2, 3]))
    assert identities.expected == (5, int(hashes.sum(dtype=np.uint64)))


def test_the_manifests_side_is_the_sum_of_all_samples() -> None:
    counts = np.array([0, 70_000, 3, 0, 0, 65_536, 1, 100, 0])
    identities = Identities(counts, "12" * 32)
    shard, place = np.repeat(np.arange(9), counts), np.concatenate([np.arange(count) for count in counts])
    hashes = identities.hash(shard, place)
    assert identities.expected == (counts.sum(), int(hashes.sum(dtype=np.uint64)))
    assert len(np.unique(hashes)) == counts.sum()
    assert Identities(counts, "13" * 32).expected != identities.expected

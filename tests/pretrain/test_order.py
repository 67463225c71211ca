import numpy as np
import pytest

from pretrain.data.order import sample_at


@pytest.mark.parametrize("samples", [1, 2, 3, 17, 1000, 4096, 4097])
def test_each_epoch_is_a_permutation(samples: int) -> None:
    order = sample_at(samples, 7, np.arange(3 * samples))
    for epoch in order.reshape(3, samples):
        assert sorted(epoch) == list(range(samples))


def test_epochs_and_seeds_differ_and_positions_do_not_depend_on_their_neighbours() -> None:
    first, second = sample_at(1000, 0, np.arange(2000)).reshape(2, 1000)
    assert (first == second).mean() < 0.01
    assert (first == sample_at(1000, 1, np.arange(1000))).mean() < 0.01
    alone = np.concatenate([sample_at(1000, 0, np.array([position])) for position in range(0, 2000, 37)])
    assert (alone == sample_at(1000, 0, np.arange(0, 2000, 37))).all()


def test_places_are_uniform() -> None:
    """Where sample 0 and its neighbour fall, over 4,000 seeds, in 20 bins: chi-square within its 99.99 % range."""
    samples, seeds, bins = 200, 4000, 20
    for sample in (0, 1):
        places = [int(np.argmax(sample_at(samples, seed, np.arange(samples)) == sample)) for seed in range(seeds)]
        counts = np.bincount(np.array(places) * bins // samples, minlength=bins)
        chi_square = ((counts - seeds / bins) ** 2 / (seeds / bins)).sum()
        assert chi_square < 52.4  # 19 degrees of freedom


def test_a_large_dataset_needs_no_memory() -> None:
    order = sample_at(10**12, 0, np.array([0, 1, 10**12 - 1, 10**12]))
    assert ((0 <= order) & (order < 10**12)).all() and len(set(order.tolist())) == 4

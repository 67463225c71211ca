"""However a global batch is spread over ranks and micro-batches: the losses and every gradient are those of one process.

Dropout and patch dropout are on, and so is every loss.
"""

import numpy as np
import parity
import pytest
from parity import Case
from ranks import run_on_ranks

from pretrain.world import World

MICRO_BATCHES = (1, 2, 4)
RANKS = (1, 2, 4)
TOWERS_OF_CLIP = Case(text="clip", losses=parity.LOSSES)
CASES = [(Case(), count) for count in MICRO_BATCHES] + [(TOWERS_OF_CLIP, 2)]


@pytest.fixture(scope="module")
def results() -> dict[int, list]:
    found = {ranks: run_on_ranks(parity.all_losses_and_gradients, ranks, CASES)[0] for ranks in RANKS[1:]}
    return found | {1: parity.all_losses_and_gradients(World(), CASES)}


def assert_equal(found: tuple[dict, dict], expected: tuple[dict, dict]) -> None:
    for values, wanted in zip(found, expected, strict=True):
        assert values.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_allclose(values[name], wanted[name], rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", range(len(MICRO_BATCHES)), ids=[f"{count}-micro-batches" for count in MICRO_BATCHES])
def test_ranks_and_micro_batches_change_nothing(results: dict[int, list], ranks: int, case: int) -> None:
    whole = results[1][0]
    assert set(whole[0]) == {"contrastive", "sigmoid", "matching", "momentum", "total"}
    assert all(np.abs(whole[1][name]).max() > 1e-6 for name in ("logit_scale.log_scale", "logit_bias.bias"))
    assert_equal(results[ranks][case], whole)


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_other_towers_too(results: dict[int, list], ranks: int) -> None:
    assert_equal(results[ranks][3], parity.losses_and_gradients(World(), TOWERS_OF_CLIP, 1))


@pytest.mark.parametrize("ranks", RANKS)
def test_gathering_all_tokens_is_the_same(results: dict[int, list], ranks: int) -> None:
    assert_equal(results[ranks][0], results[ranks][-1])
    assert_equal(results[ranks][-1], results[1][0])

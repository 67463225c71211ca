"""The loss of several ranks is the loss of one process with the whole batch: values and every gradient."""

import numpy as np
import parity
import pytest
from ranks import run_on_ranks

from pretrain.world import World

# Batch normalisation is over what is computed at once, so this tower's batch is never cut into micro-batches.
CASES = [(parity.Case("resnet", "clip", "cross", parity.LOSSES), 1)]


@pytest.fixture(scope="module")
def on_two_ranks() -> list:
    return run_on_ranks(parity.all_losses_and_gradients, 2, CASES)[0]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[case.image for case, _ in CASES])
def test_two_ranks_equal_one(on_two_ranks: list, case: int) -> None:
    losses, gradients = on_two_ranks[case]
    expected_losses, expected_gradients = parity.losses_and_gradients(World(), *CASES[case])
    assert losses.keys() == expected_losses.keys() == {"contrastive", "matching", "total"}
    for name, expected in expected_losses.items():
        assert losses[name] == pytest.approx(expected, rel=1e-12)
    assert gradients.keys() == expected_gradients.keys()
    assert any(np.abs(gradient).max() > 1e-6 for gradient in gradients.values())
    for name, expected in expected_gradients.items():
        np.testing.assert_allclose(
            gradients[name], expected, rtol=0, atol=1e-12 * max(1, np.abs(expected).max()), err_msg=name
        )


def test_contrastive_equals_open_clip() -> None:
    for results in run_on_ranks(parity.contrastive_of_both, 2):
        for ours, theirs in zip(results["ours"], results["open_clip"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_zero_stages_give_the_same_losses() -> None:
    results = run_on_ranks(parity.train_losses, 2, [0, 1, 2, 3], 10)[0]
    assert results[0][-1] < results[0][0]
    for stage in (1, 2, 3):
        np.testing.assert_allclose(results[stage], results[0], rtol=1e-5, err_msg=f"ZeRO {stage}")
    alone = run_on_ranks(parity.train_losses, 1, [0], 10)[0]
    np.testing.assert_allclose(results[0], alone[0], rtol=1e-5)

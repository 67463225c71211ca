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


def test_losses_equal_open_clip() -> None:
    """Three ranks: open_clip exchanges both ways and between neighbours."""
    for results in run_on_ranks(parity.losses_of_both, 3):
        assert [len(found) for found in results.values()] == [3, 6]
        for (_, expected_loss, expected_gradients), *others in results.values():
            for name, loss, gradients in others:
                assert loss == pytest.approx(expected_loss, rel=1e-12), name
                assert len(gradients) == len(expected_gradients) >= 3
                for found, expected in zip(gradients, expected_gradients, strict=True):
                    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13, err_msg=name)


def test_zero_stages_and_micro_batches_give_the_losses_of_plain_pytorch() -> None:
    """Dropout and all losses on, and one step skipped by all ranks because one image of rank 1 had become NaN."""
    steps, runs = 6, [(stage, micro_batches) for stage in (0, 1, 2, 3) for micro_batches in (1, 2)]
    expected = parity.plain_losses(steps)
    assert expected[-1] < expected[0]
    for (stage, micro_batches), (losses, skipped) in zip(
        runs, run_on_ranks(parity.train_losses, 2, runs, steps)[0], strict=True
    ):
        assert np.isnan(losses.pop(parity.BAD_STEP))
        others = [loss for step, loss in enumerate(expected) if step != parity.BAD_STEP]
        np.testing.assert_allclose(losses, others, rtol=1e-5, err_msg=f"ZeRO {stage}, {micro_batches} micro-batches")
        assert len(skipped) == 1 and ("(rank 1: 8)" if micro_batches == 1 else "(rank 1: 8, 12)") in skipped[0]

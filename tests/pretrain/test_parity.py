"""The loss of several ranks is the loss of one process with the whole batch: values and every gradient."""

import numpy as np
import parity
import pytest
from parity import Run
from ranks import run_on_ranks

from pretrain.engine import EngineConfig, count_state
from pretrain.world import World

# Batch normalisation is over what is computed at once, so this tower's batch is never cut into micro-batches.
CASES = [(parity.Case("resnet", "clip", "cross", parity.LOSSES), 1)]

RUNS = {  # ZeRO stage, micro-batches, offload
    "fp32": [(0, 1, "none"), (1, 2, "none"), (2, 1, "none"), (3, 2, "none")],
    "fp32 with offload": [(2, 2, "optimizer"), (3, 1, "all")],
    "bf16": [(0, 2, "none"), (1, 1, "none"), (2, 2, "none"), (3, 1, "none")],
}


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


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_losses_equal_open_clip(ranks: int) -> None:
    """With three, open_clip exchanges both ways and between neighbours."""
    for results in run_on_ranks(parity.losses_of_both, ranks):
        assert [len(found) for found in results.values()] == [3, 6]
        for (_, expected_loss, expected_gradients), *others in results.values():
            for name, loss, gradients in others:
                assert loss == pytest.approx(expected_loss, rel=1e-12), name
                assert len(gradients) == len(expected_gradients) >= 3
                for found, expected in zip(gradients, expected_gradients, strict=True):
                    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13, err_msg=name)


TOLERANCES = {"fp32": (1e-5, 5e-5), "bf16": (0.01, 0.1), "fp16": (2e-3, 1e-2)}  # of losses and of gradients' norms


def assert_close(run: Run, found: np.ndarray, expected: np.ndarray) -> None:
    """Losses and norms [steps,2], relatively."""
    difference = np.abs(found / expected - 1).max(axis=0)
    assert (difference < TOLERANCES[run.precision]).all(), (run, difference)


@pytest.mark.parametrize(
    ("name", "steps"),
    [("fp32", 6), *(pytest.param(name, 20, marks=pytest.mark.faults) for name in RUNS)],
)
def test_zero_stages_and_micro_batches_give_the_losses_of_plain_pytorch(name: str, steps: int) -> None:
    """All losses and dropout on, weights and moments in the host's memory or not, and one step skipped by all ranks because
    one image of rank 1 had become NaN. Nothing hangs: run_on_ranks has a time limit. The gradients' norms are compared
    too: AdamW after clipping takes the same steps with gradients of another scale."""
    plain = np.array(parity.plain_losses(steps, parity.Case()))
    assert plain[-1, 0] < plain[0, 0]
    precision = name[:4]
    runs = [Run(stage, count, precision, offload) for stage, count, offload in RUNS[name]]
    for run, (losses, skipped) in zip(
        runs, run_on_ranks(parity.train_losses, 2, runs, steps, parity.Case())[0], strict=True
    ):
        assert np.isnan(losses[parity.BAD_STEP][0])
        others = np.arange(steps) != parity.BAD_STEP
        assert_close(run, np.array(losses)[others], plain[others])
        assert len(skipped) == 1
        assert ("(rank 1: 8)" if run.micro_batches == 1 else "(rank 1: 8, 12)") in skipped[0]


def train_alone(world: World) -> list[tuple[Run, list[tuple[float, float]]]]:
    """One process, in which texts' tokens go from the first pass to matching, and their gradients back."""
    parity.allow_fp16()
    runs = [Run(stage, count, precision) for stage, precision in ALONE for count in (1, 4)]
    trained = parity.train_losses(world, runs, 4, parity.Case(fusion="text_to_image", losses=parity.LOSSES))
    return [(run, losses) for run, (losses, _) in zip(runs, trained, strict=True)]


ALONE = [(0, "fp32"), (2, "fp32"), (3, "fp32"), (0, "fp16"), (1, "fp16")]


def test_one_process_trains_alike_at_any_stage_in_micro_batches_and_in_fp16() -> None:
    found = dict(run_on_ranks(train_alone, 1)[0])
    exact = np.array(found[Run(0, 1, "fp32")])
    for run, losses in found.items():
        assert_close(run, np.array(losses), exact)


PAIRS_ONLY = parity.LOSSES.model_copy(update={"contrastive": None})
CAPTIONS_ONLY = PAIRS_ONLY.model_copy(update={"matching": None, "captioning": parity.CaptioningConfig()})
CAPTIONS_TOO = parity.LOSSES.model_copy(update={"captioning": parity.CaptioningConfig()})
LEAVING = [  # text tower, fusion, losses: tokens leave the tower in its middle, and what is behind has no backward pass
    ("clip", "of_embeddings", PAIRS_ONLY),
    ("clip", "from_layer", parity.LOSSES),
    ("bert", "from_layer", CAPTIONS_TOO),
    ("bert", "med", CAPTIONS_ONLY),
    ("bert", "med_own", CAPTIONS_TOO),
]


def train_leaving(world: World) -> list[list[list[tuple[float, float]]]]:
    runs = [Run(0, 1), Run(3, 4)]
    cases = [parity.Case("vit", text, fusion, losses) for text, fusion, losses in LEAVING]
    return [[losses for losses, _ in parity.train_losses(world, runs, 2, case)] for case in cases]


def test_zero_3_trains_layers_whose_tokens_leave_the_tower_before_its_end() -> None:
    for exact, losses in run_on_ranks(train_leaving, 1)[0]:
        assert_close(Run(3, 4), np.array(losses), np.array(exact))


def test_the_state_of_training_takes_what_the_formula_says() -> None:
    """Two ranks, one layer of eight frozen, an average of the weights: whatever tensors are there after a backward pass."""
    settings = [EngineConfig(zero_stage=stage, precision=kind) for stage in range(4) for kind in ("fp32", "bf16")]
    width, count = 512, 8
    weights = list(parity.layers(width, count).parameters())
    for of_rank in run_on_ranks(parity.held_state, 2, settings, width, count):
        for config, held in zip(settings, of_rank, strict=True):
            state = count_state(weights, config, 2, average=True)
            slack = width * width * (4 if config.precision == "fp32" else 2) if config.zero_stage in (1, 2) else 0
            expected = state.total - state.bucket
            assert 0.999 * expected < held["rest"] < 1.001 * expected + slack, (config, held, state)
            assert config.zero_stage < 3 or held["bucket"] == state.bucket

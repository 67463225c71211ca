"""However a global batch is spread over ranks and micro-batches: the losses and every gradient are those of one process.

Dropout, patch dropout and, in one case, stochastic depth are on, and so is every loss that the fusion can have.
"""

import itertools

import numpy as np
import parity
import pytest
from parity import Case
from ranks import run_on_ranks

from pretrain.model import negatives
from pretrain.world import World

COUNTS = (1, 2, 4)  # of ranks, and of micro-batches
FEW = {1: (1, 4), 2: (2, 4), 4: (1,)}  # micro-batches for each number of ranks; the rest are for make test-faults
POSITIVES = ("own", "soft", "masked")
NO_CAPTIONS = parity.ALL_LOSSES.model_copy(update={"captioning": None})
CASES = {
    "med": Case(),
    "med_own": Case(fusion="med_own"),
    "shared": Case(image="timm_dropping", text="clip", fusion="shared"),
    "text_to_image": Case(text="clip", fusion="text_to_image"),
    "both": Case(fusion="both", losses=NO_CAPTIONS),
    "weighted": Case(fusion="weighted_middle", losses=NO_CAPTIONS),
    "image_to_text": Case(fusion="image_to_text", losses=parity.PAIR_LOSSES),
}


def compute(world: World, counts: dict[int, tuple[int, ...]]) -> dict:
    """Losses and gradients by fusion and number of micro-batches; those of the reference, by "gathered"; and by `positives`
    those of other true pairs' every use."""
    if world.size > 1:  # a process of its own, which draws negatives for 3 rows at a time
        negatives.MAX_SCORES = 3 * parity.GLOBAL_BATCH
    runs = [(fusion, count) for fusion in CASES for count in counts[world.size]]
    found = parity.all_losses_and_gradients(world, [(CASES[fusion], count) for fusion, count in runs])
    uses = {positives: parity.of_positives(world, positives) for positives in POSITIVES}
    return dict(zip(runs, found, strict=True)) | {"gathered": parity.gather_tokens(world, parity.GATHERED)} | uses


def compute_all(counts: dict[int, tuple[int, ...]]) -> dict[int, dict]:
    return {1: compute(World(), counts)} | {ranks: run_on_ranks(compute, ranks, counts)[0] for ranks in COUNTS[1:]}


@pytest.fixture(scope="module")
def results() -> dict[int, dict]:
    return compute_all(FEW)


def assert_equal(found: tuple[dict, dict], expected: tuple[dict, dict]) -> None:
    for values, wanted in zip(found, expected, strict=True):
        assert values.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_allclose(values[name], wanted[name], rtol=0, atol=1e-10, err_msg=name)


def check(results: dict[int, dict], ranks: int, micro_batches: int, fusion: str) -> None:
    case, whole = CASES[fusion], results[1][fusion, 1]
    assert set(whole[0]) == {name for name, loss in case.losses if loss} | {"total"}
    assert all(value > 0.01 for value in whole[0].values())
    moved = {name for name, gradient in whole[1].items() if np.abs(gradient).max() > 1e-6}
    heads = {"captioning": "caption_head.bias", "masked_language": "masked_head.bias", "matching": "match_head.weight"}
    assert {"logit_scale.log_scale", "logit_bias.bias"} <= moved
    assert {weight for loss, weight in heads.items() if getattr(case.losses, loss)} <= moved
    assert_equal(results[ranks][fusion, micro_batches], whole)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(ranks, count) for ranks in FEW for count in FEW[ranks]])
@pytest.mark.parametrize("fusion", CASES)
def test_ranks_and_micro_batches_change_nothing(results: dict, ranks: int, micro_batches: int, fusion: str) -> None:
    check(results, ranks, micro_batches, fusion)


@pytest.mark.faults
def test_any_ranks_and_micro_batches_change_nothing() -> None:
    results = compute_all(dict.fromkeys(COUNTS, COUNTS))
    for ranks, micro_batches, fusion in itertools.product(COUNTS, COUNTS, CASES):
        check(results, ranks, micro_batches, fusion)


@pytest.mark.parametrize("ranks", COUNTS)
def test_gathering_all_tokens_is_the_same(results: dict, ranks: int) -> None:
    assert_equal(results[ranks]["gathered"], parity.losses_and_gradients(World(), parity.GATHERED, 1))


@pytest.mark.parametrize("ranks", COUNTS)
@pytest.mark.parametrize("positives", POSITIVES)
def test_other_true_pairs_are_known_on_every_rank(results: dict, positives: str, ranks: int) -> None:
    """Against whole matrices of one process. The three uses differ."""
    expected = parity.of_positives(World(), positives, dense=True)
    assert_equal(results[ranks][positives], expected)
    for other in set(POSITIVES) - {positives}:
        for name, value in results[ranks][other][0].items():
            assert abs(value - expected[0][name]) > 1e-3


def test_frozen_batch_normalisation_is_exact() -> None:
    case = Case(image="resnet", fusion="text_to_image", losses=parity.PAIR_LOSSES, frozen="image_tower")
    whole = parity.losses_and_gradients(World(), case, 1)
    assert not any(name.startswith("image_tower") and "running" not in name for name in whole[1])
    assert_equal(parity.losses_and_gradients(World(), case, 4), whole)

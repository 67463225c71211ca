"""Captioning, masked language and distillation: however the batch is spread, and against transformers and open_clip."""

from types import SimpleNamespace

import numpy as np
import parity
import pytest
import torch
from parity import Case
from ranks import run_on_ranks

from pretrain.config import ConfigError, check_config
from pretrain.contract import ModelOutput, TeacherOutput
from pretrain.losses import DistillConfig, LossesConfig, compute_losses
from pretrain.model.fusion import FUSIONS
from pretrain.model.language import TokenHead, embedding_matrix, mask_tokens
from pretrain.model.model import ModelConfig, build_model
from pretrain.model.noise import row_keys
from pretrain.model.towers import unit
from pretrain.world import World

LENGTH, PATCHES = 7, 9
SPREAD = [
    Case(fusion=fusion, text=text, losses=parity.LANGUAGE_LOSSES)
    for fusion, text in (("med_dropping", "bert_dropping"), ("shared_dropping", "clip"))
]
SPREAD_CASES = [(case, count) for case in SPREAD for count in (1, 2)]


@pytest.fixture(scope="module")
def spread() -> dict[int, list]:
    on_two = run_on_ranks(parity.language_losses_and_gradients, 2, SPREAD_CASES)[0]
    return {1: parity.language_losses_and_gradients(World(), SPREAD_CASES), 2: on_two}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", range(len(SPREAD_CASES)), ids=[f"{c.fusion}-{count}" for c, count in SPREAD_CASES])
def test_ranks_and_micro_batches_change_nothing(spread: dict[int, list], ranks: int, case: int) -> None:
    whole, found = spread[1][case // 2 * 2], spread[ranks][case]
    assert set(whole[0]) == {"contrastive", "matching", "captioning", "masked_language", "distill", "total"}
    assert all(value > 0.01 for value in whole[0].values())
    moved = [name for name, gradient in whole[1].items() if np.abs(gradient).max() > 1e-6]
    assert {"caption_head.bias", "masked_head.bias", "caption_head.norm.weight"} <= set(moved)
    for values, expected in zip(found, whole, strict=True):
        assert values.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(values[name], expected[name], rtol=0, atol=1e-10, err_msg=name)

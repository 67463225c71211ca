"""FLOPs by shapes are those of a formula, and those of a real step's forward and backward pass."""

import parity
import pytest
import torch
from paths import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import check_config, load_config
from pretrain.data.text import build_tokenizer
from pretrain.flops import NotCountable, count_flops, utilisation
from pretrain.losses import LossesConfig
from pretrain.model.model import ModelConfig, build_model
from pretrain.train import RunConfig
from pretrain.world import World


def blocks(tokens: int, width: int, layers: int, mlp_ratio: float) -> float:
    """Self-attention blocks: projections 8 D^2 a token, MLP 4 r D^2, scores and values 4 N D."""
    return layers * tokens * ((8 + 4 * mlp_ratio) * width**2 + 4 * tokens * width)


def by_formula(config: ModelConfig, pairs: int) -> float:
    """Three times the forward pass of ViT, text transformer and cross-attention from text to image."""
    image, text, fusion = config.image, config.text, config.fusion
    patches, length, width = (image.image_size // image.patch_size) ** 2, text.context_length, fusion.width
    forward = 2 * patches * 3 * image.patch_size**2 * image.width + blocks(patches + 1, image.width, image.layers, 4)
    forward += blocks(length, text.width, text.layers, 4) + 2 * (image.width + text.width) * config.embed_dim
    # Query, gate and output of the text; scores and their sums. Keys and values of the image are there for all its pairs.
    cross = 6 * length * width**2 + 4 * length * patches * width
    seen = fusion.layers * 4 * patches * image.width * width if pairs else 0
    pair = 2 * length * text.width * width + fusion.layers * cross + blocks(length, width, fusion.layers, 4)
    pool = 4 * length * width**2 + 4 * width**2 + 4 * length * width
    return 3 * (forward + seen + pairs * (pair + pool + 4 * width))


@pytest.mark.parametrize("name", [pytest.param("vit_b16", marks=pytest.mark.faults), "flickr8k"])
def test_they_are_those_of_the_formula(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml", [], RunConfig)
    model = build_model(config.model, build_tokenizer(config.model.tokenizer, config.model.text.context_length))
    alone = LossesConfig()
    for losses, pairs in ((config.losses, 3), (alone, 0)):
        assert count_flops(model, losses) == pytest.approx(by_formula(config.model, pairs), rel=0.002)


@pytest.mark.parametrize("fusion", ["text_to_image", "both", "shared", "weighted", "med"])
def test_they_are_those_of_a_real_step(fusion: str) -> None:
    """Patches are dropped in both. The first layer's pixels get no gradient, which the count of shapes does not know."""
    case = parity.Case(fusion=fusion, losses=parity.LOSSES)
    config = parity.model_config(case)
    model = build_model(config, parity.TOKENIZER).train()
    expected = count_flops(model, case.losses)
    assert model.training and all(module.training for module in model.modules())
    batch = parity.make_batch(config, 0, World())
    pairs = 3 * len(batch.keys)
    keys = model.sample_keys(torch.from_numpy(batch.position))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        image, text = model.encode_image(batch.image, keys), model.encode_text(batch.ids, batch.mask, keys)
        rows = torch.arange(pairs) % len(batch.keys)
        logits = model.match_pairs(text.tokens[rows], batch.mask[rows], image.tokens, rows=rows, keys=keys[rows])
        (image.pooled.sum() + text.pooled.sum() + logits.sum()).backward()
    patches = (config.image.image_size // config.image.patch_size) ** 2
    first = 2 * patches * 3 * config.image.patch_size**2 * config.image.width
    assert counter.get_total_flops() / len(batch.keys) == pytest.approx(expected - first, rel=0.01)


def test_a_frozen_tower_is_counted_once() -> None:
    case = parity.Case(fusion="text_to_image", losses=parity.LOSSES)
    config = parity.model_config(case)
    frozen = config.model_copy(update={"freeze": ["image_tower"]})
    counts = [count_flops(build_model(settings, parity.TOKENIZER), LossesConfig()) for settings in (config, frozen)]
    text = 3 * (blocks(12, 32, 2, 4) + 2 * 32 * 16)
    assert counts[0] - text == pytest.approx(3 * (counts[1] - text), rel=0.01)


def test_utilisation_is_of_one_device() -> None:
    found = utilisation(flops=2e11, samples_per_s=8000, peak=1000, world=World(size=4))
    assert found == pytest.approx({"rate/tflops_per_gpu": 400, "rate/mfu": 0.4})


def test_a_tower_that_needs_values_is_not_counted() -> None:
    """Longformer looks at which tokens it is given."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    shape |= {"model_type": "longformer", "attention_window": 4, "vocab_size": 1001, "hidden_dropout_prob": 0.0}
    text = {"kind": "huggingface", "context_length": 12, "config": shape}
    config = check_config({"embed_dim": 12, "image": parity.VIT, "text": text}, ModelConfig, "test")
    model = build_model(config, parity.TOKENIZER).train()
    with pytest.raises(NotCountable, match="DataDependentOutputException"):
        count_flops(model, LossesConfig())
    assert model.training and torch.backends.mha.get_fastpath_enabled()

"""FLOPs by shapes are those of a formula, and those of a real step, whatever is trained."""

import json
from pathlib import Path

import parity
import pytest
import torch
from paths import ROOT, TINY
from ranks import Command
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.accumulate import compute_gradients
from pretrain.config import check_config, load_config
from pretrain.data.text import build_tokenizer
from pretrain.flops import NotCountable, count_flops, utilisation
from pretrain.losses import CaptioningConfig, DistillConfig, LossesConfig, MaskedLanguageConfig, MomentumConfig
from pretrain.model.model import ModelConfig, build_model
from pretrain.train import RunConfig, load_run_config
from pretrain.world import World


def blocks(tokens: int, width: int, layers: int, mlp_ratio: float) -> float:
    """Self-attention blocks: projections 8 D^2 a token, MLP 4 r D^2, scores and values 4 N D."""
    return layers * tokens * ((8 + 4 * mlp_ratio) * width**2 + 4 * tokens * width)


def by_formula(config: ModelConfig, pairs: int) -> float:
    """Forward and backward pass of ViT, text transformer and cross-attention from text to image."""
    image, text, fusion = config.image, config.text, config.fusion
    patches, length, width = (image.image_size // image.patch_size) ** 2, text.context_length, fusion.width
    forward = 2 * patches * 3 * image.patch_size**2 * image.width + blocks(patches + 1, image.width, image.layers, 4)
    forward += blocks(length, text.width, text.layers, 4) + 2 * (image.width + text.width) * config.embed_dim
    # Query, gate and output of the text; scores and their sums. Keys and values of the image are there for all its pairs.
    cross = 6 * length * width**2 + 4 * length * patches * width
    seen = fusion.layers * 4 * patches * image.width * width if pairs else 0
    pair = 2 * length * text.width * width + fusion.layers * cross + blocks(length, width, fusion.layers, 4)
    pool = 4 * length * width**2 + 4 * width**2 + 4 * length * width
    pixels = 2 * patches * 3 * image.patch_size**2 * image.width  # which get no gradient
    return 3 * (forward + seen + pairs * (pair + pool + 4 * width)) - pixels


@pytest.mark.parametrize("name", [pytest.param("vit_b16", marks=pytest.mark.faults), "flickr8k"])
def test_they_are_those_of_the_formula(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml", [], RunConfig)
    model = build_model(config.model, build_tokenizer(config.model.tokenizer, config.model.text.context_length))
    alone = LossesConfig()
    for losses, pairs in ((config.losses, 3), (alone, 0)):
        assert count_flops(model, losses).of_sample() == pytest.approx(by_formula(config.model, pairs), rel=0.002)


MASKED = LossesConfig(contrastive=None, masked_language=MaskedLanguageConfig())
CAPTIONS = LossesConfig(contrastive=None, captioning=CaptioningConfig())
HEADS = parity.LOSSES.model_copy(update={"captioning": CaptioningConfig(), "masked_language": MaskedLanguageConfig()})
DISTILL = LossesConfig(distill=DistillConfig(teacher="of the test"))
LAST_LAYER_TRAINED = ["image_tower.inner.conv1", "image_tower.inner.class_embedding", "image_tower.inner.ln_pre",
                      "image_tower.inner.positional_embedding", "image_tower.inner.transformer.resblocks.0"]  # fmt: skip
STEPS = {  # fusion and, if it is not BERT, text tower; losses; what is frozen
    **{fusion: (fusion, parity.LOSSES, []) for fusion in parity.FUSIONS if fusion != "cross"},
    "captioning": ("text_to_image", parity.LOSSES.model_copy(update={"captioning": CaptioningConfig()}), []),
    "captioning only": ("text_to_image", CAPTIONS, []),
    "captioning only, a causal tower": ("text_to_image clip", CAPTIONS, []),
    "captioning only, shared layers": ("med", CAPTIONS, []),
    "masked language": ("both", MASKED, []),
    "masked language, shared layers": ("med", MASKED, []),
    "both heads, checkpoints": ("shared", HEADS, []),
    "LiT": ("text_to_image", parity.LOSSES, ["image_tower"]),
    "a last layer trained": ("text_to_image", parity.LOSSES, LAST_LAYER_TRAINED),
    "a first layer trained": ("text_to_image", HEADS, ["image_tower.inner.transformer", "text_tower.inner.encoder"]),
    "momentum": (None, LossesConfig(contrastive=None, momentum=MomentumConfig(queue_samples=0)), []),
    "distill": (None, DISTILL, []),
    "distill, LiT": (None, DISTILL, ["image_tower"]),
}


@pytest.mark.parametrize("name", STEPS)
def test_they_are_those_of_a_real_step(name: str) -> None:
    """The step as it is trained, similarities with it, of a batch whose texts are shorter than the context. Patches are
    dropped in both; what checkpoints compute again is in neither."""
    fusion, losses, frozen = STEPS[name]
    fusion, _, text = (fusion or "").partition(" ")
    config = parity.model_config(parity.Case(text=text or "bert_dropping", fusion=fusion or "cross", losses=losses))
    update = {"freeze": frozen, "match_head": bool(losses.matching)} | ({} if fusion else {"fusion": None})
    config = config.model_copy(update=update)
    model = build_model(config, parity.TOKENIZER).train()
    teacher = parity.build_teacher(config, torch.float32) if losses.distill else None
    momentum = parity.build_momentum(config, losses.momentum, parity.PlainEngine(model), 16, World())
    settings = config.model_copy(update={"checkpoint_activations": name.endswith("checkpoints")})
    counted = build_model(settings, parity.TOKENIZER).train()
    before = [(module.training, module.forward) for module in counted.modules()]
    found = count_flops(counted, losses, teacher)
    assert [(module.training, module.forward) for module in counted.modules()] == before
    assert all(weight.grad is None for weight in counted.parameters())

    batch = parity.make_batch(config, 0, World())
    step = (parity.PlainEngine(model), batch, losses, 0, None, World(), teacher, momentum)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # of frozen towers' attention, which the counter does not know
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            compute_gradients(*step)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    predicted = model.count_tokens(batch).sum().item() / len(batch.keys)
    assert (predicted > 0) == bool(losses.captioning or losses.masked_language) == (found.token > 0)
    assert found.of_sample(predicted) == pytest.approx(counter.get_total_flops() / len(batch.keys), rel=0.01)


def test_a_head_is_counted_for_each_token_that_it_predicts() -> None:
    case = parity.Case(text="bert", fusion="text_to_image", losses=CAPTIONS)
    config = parity.model_config(case).model_copy(update={"match_head": False})
    found = count_flops(build_model(config, parity.TOKENIZER).train(), CAPTIONS)
    assert found.token == 3 * (2 * 32 * 32 + 2 * 32 * parity.VOCAB_SIZE)
    assert found.of_sample(2.5) == found.sample + 2.5 * found.token


def know_a_peak(rank: int) -> None:
    import pretrain.train

    pretrain.train.peak_tflops = lambda device: 1e-3


def test_the_metrics_count_the_tokens_of_the_captions(shards: Path, tmp_path: Path) -> None:
    heads = ["model.captioning={}", "losses.captioning={}", "train.duration=2 steps"]
    words = ["train", TINY, f"run={tmp_path / 'run'}", f"data.path={shards / 'train'}", *heads]
    command = Command([str(word) for word in words], None, tmp_path / "command", know_a_peak)
    assert command.wait() == [0], command.printed("stderr")
    config = load_run_config(tmp_path / "run")
    model = build_model(config.model, build_tokenizer(config.model.tokenizer, config.model.text.context_length)).train()
    flops = count_flops(model, config.losses)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["rate/mfu"] == pytest.approx(1e3 * line["rate/tflops_per_gpu"])
        tokens = (line["rate/tflops_per_gpu"] * 1e12 / line["rate/samples_per_s"] - flops.sample) / flops.token
        assert 3 < tokens < 23  # of a context of 24
        assert 8 * tokens == pytest.approx(round(8 * tokens), abs=0.01)  # of 8 captions


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

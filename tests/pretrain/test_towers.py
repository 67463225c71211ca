"""Towers of every kind against their own library, and what is done to them block by block."""

import copy
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable

import parity
import pytest
import torch
import transformers
import yaml
from paths import ROOT
from ranks import run_on_ranks
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.config import ConfigError, check_config
from pretrain.engine import EngineConfig, parameter_groups
from pretrain.model.blocks import checkpoint_blocks, compile_blocks, find_blocks, learning_rate_scales, no_contexts
from pretrain.model.fusion import FUSIONS
from pretrain.model.model import ImageTextModel, ModelConfig, build_model, check_towers
from pretrain.model.towers import (
    IMAGE_TOWERS,
    TEXT_TOWERS,
    BatchStatistics,
    GlobalBatchNorm,
    use_global_batch_norm,
)
from pretrain.torchvision_ops import prepare_torchvision
from pretrain.world import World

prepare_torchvision()

EMBED = 12
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
IMAGES = {
    "vit": parity.IMAGE_TOWERS["vit"],
    "resnet": parity.IMAGE_TOWERS["resnet"],
    "timm vit": {"kind": "timm", "name": "test_vit", "image_size": 32},
    "timm resnet": {"kind": "timm", "name": "test_resnet", "image_size": 32},
    "timm efficientnet": {"kind": "timm", "name": "test_efficientnet", "image_size": 32},
    **{
        name: {"kind": "huggingface", "image_size": 32, "config": {"model_type": name, "patch_size": 8, **SIZES}}
        for name in ("vit_", "clip_vision_model", "siglip_vision_model", "blip_vision_model")
    },
}
IMAGES["vit_"]["config"]["model_type"] = "vit"
DINO = {"model_type": "dinov2", "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES["dinov2"] = {"kind": "huggingface", "image_size": 32, "config": DINO}
IMAGES["dinov2 with drop path"] = IMAGES["dinov2"] | {"config": DINO | {"num_hidden_layers": 4, "drop_path_rate": 0.3}}
TEXTS = {
    "clip": parity.TEXT_TOWERS["clip"],
    "bert": parity.TEXT_TOWERS["bert"],
    **{
        name: {
            "kind": "huggingface",
            "context_length": 12,
            "config": {
                "model_type": name,
                "vocab_size": 50000,
                "max_position_embeddings": 32,
                **SIZES,
                "hidden_dropout_prob": 0.0,
            },
        }
        for name in ("bert_", "roberta", "electra")
    },
}
TEXTS["bert_"]["config"]["model_type"] = "bert"
TEXTS["bert with dropout"] = TEXTS["bert"] | {"dropout": 0.2}
CROSS = {"kind": "cross", "width": 32, "layers": 1, "heads": 2}


def build_image_tower(name: str, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    values = IMAGES[name] | changes
    return check_config(values, IMAGE_TOWERS[values["kind"]], "test").build(EMBED, World())


def build_text_tower(name: str, text_layer: int | None = None, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    values = TEXTS[name] | changes
    return check_config(values, TEXT_TOWERS[values["kind"]], "test").build(EMBED, parity.TOKENIZER, text_layer)


def build(image: str, text: str, fusion: dict | None = None, **changes: object) -> ImageTextModel:
    values = {"embed_dim": EMBED, "image": IMAGES[image], "text": TEXTS[text], "fusion": fusion, **changes}
    return build_model(check_config(values, ModelConfig, "test"), parity.TOKENIZER)


def draw_pixels(rows: int = 3) -> Tensor:
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def draw_texts(rows: int = 3) -> tuple[Tensor, Tensor]:
    batch = parity.make_batch(parity.model_config(parity.Case("vit", "clip", "cross", parity.LOSSES)), 0, World())
    ids, mask = batch.ids[:rows].clone(), batch.mask[:rows].clone()
    ids[1, 5:], mask[1, 5:] = 0, False
    ids[1, 4] = parity.VOCAB_SIZE - 1
    return ids, mask


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_tower_says_its_width_and_runs_in_bf16(name: str) -> None:
    tower = build_image_tower(name).bfloat16()
    output = tower(draw_pixels().bfloat16())
    assert output.tokens.shape[0] == 3 and output.tokens.shape[2] == tower.width and output.tokens.ndim == 3
    assert output.pooled.shape == (3, EMBED) and output.pooled.dtype == output.tokens.dtype == torch.bfloat16
    (output.pooled.sum() + output.tokens.sum()).backward()
    without = {n for n, p in tower.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert without <= {"inner.embeddings.mask_token"}  # DINOv2's, for hidden patches, which we do not hide


@pytest.mark.parametrize("name", IMAGES)
@torch.no_grad()
def test_stacked_convolutions_are_given_channels_last(name: str) -> None:
    tower, layouts = build_image_tower(name).eval(), []
    convolutions = [module for module in tower.modules() if isinstance(module, nn.Conv2d)]
    for module in convolutions:
        module.register_forward_pre_hook(
            lambda module, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
    pixels = draw_pixels()
    outputs = [
        tower(pixels.contiguous(memory_format=layout)) for layout in (torch.contiguous_format, torch.channels_last)
    ]
    assert len(layouts) == 2 * len(convolutions) and all(layouts) == (len(convolutions) > 1)
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_tower_says_its_width_runs_in_bf16_and_ignores_padding(name: str) -> None:
    tower = build_text_tower(name).eval()
    ids, mask = draw_texts()
    first = tower(ids, mask)
    assert first.tokens.shape == (3, 12, tower.width) and first.pooled.shape == (3, EMBED)
    if name != "roberta":  # whose positions count by what is padding, by its id
        second = tower(ids.where(mask, torch.tensor(7)), mask)
        torch.testing.assert_close(second.pooled, first.pooled, rtol=0, atol=1e-6)
        torch.testing.assert_close(second.tokens[mask], first.tokens[mask], rtol=0, atol=1e-5)
    assert tower.bfloat16()(ids, mask).pooled.isfinite().all()


@pytest.mark.parametrize("name", ["vit_", "clip_vision_model", "siglip_vision_model", "dinov2", "blip_vision_model"])
@pytest.mark.parametrize("pooling", ["pooler", "first", "mean"])
@torch.no_grad()
def test_a_vision_model_gives_what_transformers_gives(name: str, pooling: str) -> None:
    tower = build_image_tower(name, pooling=pooling).eval()
    theirs = type(tower.inner)(tower.inner.config).eval()
    assert isinstance(theirs, transformers.PreTrainedModel)
    theirs.load_state_dict(tower.inner.state_dict(), strict=pooling == "pooler")
    expected, output = theirs(pixel_values=draw_pixels()), tower(draw_pixels())
    tokens = expected.last_hidden_state
    pooled = {"pooler": expected.pooler_output, "first": tokens[:, 0], "mean": tokens.mean(1)}[pooling]
    torch.testing.assert_close(output.tokens, tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.pooled, pooled @ tower.projection.weight.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["timm vit", "timm resnet", "timm efficientnet"])
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_a_timm_model_gives_what_timm_gives(name: str, training: bool) -> None:
    import timm

    tower = build_image_tower(name).train(training).double()  # few values a channel: their variance cancels
    pixels = draw_pixels().double()
    size = {"img_size": 32} if name == "timm vit" else {}
    theirs = timm.create_model(IMAGES[name]["name"], num_classes=0, **size).train(training).double()
    theirs.load_state_dict(tower.inner.state_dict())
    features, pooled = theirs.forward_features(pixels), theirs(pixels)
    theirs.load_state_dict(tower.inner.state_dict())  # its statistics moved twice
    output = tower(pixels)
    tokens = features if features.ndim == 3 else features.flatten(2).transpose(1, 2)
    torch.testing.assert_close(output.tokens, tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.pooled, pooled @ tower.projection.weight.T, rtol=0, atol=1e-5)
    norms = [module for module in tower.modules() if isinstance(module, _BatchNorm)]
    assert all(isinstance(norm, GlobalBatchNorm) for norm in norms) and bool(norms) == (name != "timm vit")


@pytest.mark.parametrize("name", ["bert_", "roberta", "electra"])
@torch.no_grad()
def test_an_encoder_gives_what_transformers_gives(name: str) -> None:
    ids, mask = draw_texts()
    for pooling in ("first", "mean"):
        tower = build_text_tower(name, pooling=pooling).eval()
        expected = tower.inner(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        tokens, real = expected.last_hidden_state, mask[..., None].float()
        pooled = tokens[:, 0] if pooling == "first" else (tokens * real).sum(1) / real.sum(1)
        output = tower(ids, mask)
        torch.testing.assert_close(output.tokens, tokens, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.pooled, pooled @ tower.projection.weight.T, rtol=0, atol=1e-5)
        for layer in (0, 1, 2):
            early = build_text_tower(name, layer, pooling=pooling).eval()
            early.load_state_dict(tower.state_dict())
            taken = early(ids, mask)
            torch.testing.assert_close(taken.tokens, expected.hidden_states[layer], rtol=0, atol=1e-5)
            assert torch.equal(taken.pooled, output.pooled)


@torch.no_grad()
def test_clip_text_is_taken_between_its_layers() -> None:
    tower, early = build_text_tower("clip"), build_text_tower("clip", 1)
    ids, mask = draw_texts()
    block = tower.inner.transformer.resblocks[1]
    tokens = tower.inner.ln_final(block(early(ids, mask).tokens, attn_mask=tower.inner.attn_mask))
    torch.testing.assert_close(tower(ids, mask).tokens, tokens, rtol=0, atol=1e-5)


def test_fusion_cannot_start_above_the_last_layer() -> None:
    with pytest.raises(ConfigError, match="from_layer: is 3, but the text tower has 2 layers"):
        build("vit", "clip", CROSS | {"from_layer": 3})


@pytest.mark.parametrize("name", ["vit", "timm vit", "vit_", "clip_vision_model", "dinov2"])
def test_patches_are_dropped_in_training(name: str) -> None:
    tower = build_image_tower(name, patch_dropout=0.5)
    tokens = tower.eval()(draw_pixels()).tokens.shape[1]
    whole = build_image_tower(name).eval()
    whole.load_state_dict(tower.state_dict())
    assert torch.equal(tower(draw_pixels()).pooled, whole(draw_pixels()).pooled)
    kept = tower.train()(draw_pixels()).tokens.shape[1]
    before = 0 if name == "vit" else 1  # tokens of open_clip's ViT come without the class token
    assert (tokens - before) // 2 == kept - before


@pytest.mark.parametrize(("image", "message"), [
    ({"kind": "timm", "name": "vit_bse_patch16_224"}, "Did you mean 'vit_base_patch16_224'"),
    ({"kind": "timm", "name": "test_vit", "settings": {"depht": 1}}, "depht"),
    (IMAGES["siglip_vision_model"] | {"patch_dropout": 0.5}, "not have one class token"),
    (IMAGES["timm resnet"] | {"patch_dropout": 0.5}, "not have one class token"),
    ({"kind": "huggingface", "config": {"model_type": "deit"}, "patch_dropout": 0.5}, "not have one class token"),
    ({"kind": "huggingface", "config": {"model_type": "dinov2_with_registers"}, "patch_dropout": 0.5}, "not have one class token"),
    ({"kind": "timm", "name": "test_vit", "settings": {"attn_drop_rate": 0.1}}, "attention weights cannot be dropped"),
    ({"kind": "timm", "name": "test_vit", "settings": {"patch_drop_rate": 0.1}}, "model.image.patch_dropout"),
    ({"kind": "huggingface", "config": {"model_type": "vti"}}, "cannot read this config"),
    ({"kind": "huggingface"}, "give either name .* or config with a model_type"),
    ({"kind": "huggingface", "config": {"model_type": "vit", "hiden_size": 8}}, "config.hiden_size.* 'hidden_size'"),
    ({"kind": "huggingface", "config": {"model_type": "vit", "hidden_size": "x"}}, "cannot read this config"),
    ({"kind": "huggingface", "name": "/no/such/folder"}, "cannot read this config"),
])  # fmt: skip
def test_what_cannot_be_built_is_said_in_one_line(image: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        check_config(image, IMAGE_TOWERS[image["kind"]], "test").build(EMBED, World())
    assert "\n" not in str(error.value)


def test_batch_normalisation_of_any_shape_is_over_the_global_batch() -> None:
    levit = {"kind": "timm", "name": "levit_128s", "image_size": 224}
    norms = [module for module in check_config(levit, IMAGE_TOWERS["timm"], "test").build(EMBED, World()).modules()]
    norms = [module for module in norms if isinstance(module, _BatchNorm)]
    assert {type(norm) for norm in norms} == {GlobalBatchNorm} and len(norms) > 40
    for shape in ((6, 4), (6, 4, 5)):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        plain = nn.BatchNorm1d(4).double()
        ours = use_global_batch_norm(copy.deepcopy(plain), World())
        torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=1e-12)
        torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()), rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.eval()(x), plain.eval()(x), rtol=0, atol=1e-12)


def test_a_step_that_is_not_taken_leaves_no_statistics() -> None:
    tower = build_image_tower("resnet").train()
    statistics = BatchStatistics(tower)
    tower(draw_pixels())
    statistics.keep()
    before = [buffer.clone() for buffer in tower.buffers()]
    tower(draw_pixels() * float("nan"))
    assert any(buffer.isnan().any() for buffer in tower.buffers())
    statistics.restore()
    assert all(torch.equal(buffer, kept) for buffer, kept in zip(tower.buffers(), before, strict=True))


def test_an_id_that_is_padding_and_a_word_is_trained() -> None:
    """CLIP's vocabulary pads with 0, which is "!" as well."""
    ids, mask = draw_texts()
    ids[:, 1] = 0
    cases = itertools.product(("bert", "bert_", "electra"), ((None, True), (0, False), (7, True)))
    for name, (padding, trained) in cases:
        tokenizer = dataclasses.replace(parity.TOKENIZER, padding_id=padding)
        tower = check_config(TEXTS[name], TEXT_TOWERS[TEXTS[name]["kind"]], "test").build(EMBED, tokenizer, None)
        tower(ids, mask).pooled.square().sum().backward()
        assert tower.embedding.weight.grad[0].any() == trained
        assert tower.embedding.weight.grad[ids[0, 2]].any()


def test_padding_of_the_models_own_that_is_no_id_of_the_tokenizers_is_left_out() -> None:
    """ModernBERT pads with 50,283, of its 50,368 ids."""
    tower = build_text_tower("bert_", config={"model_type": "modernbert", **SIZES}, pooling="mean")
    ids, mask = draw_texts()
    tower(ids, mask).pooled.sum().backward()
    assert tower.embedding.num_embeddings == parity.VOCAB_SIZE and tower.embedding.padding_idx is None


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="500 ids and the tokenizer 1001"):
        build_text_tower("bert_", config=TEXTS["bert_"]["config"] | {"vocab_size": 500})
    assert (
        build_text_tower("bert_", config={"model_type": "bert", **SIZES}).inner.config.vocab_size == parity.VOCAB_SIZE
    )


def test_an_encoder_without_a_table_of_embeddings_is_refused() -> None:
    with pytest.raises(ConfigError, match="canine has no table of token embeddings"):
        build_text_tower("bert_", config={"model_type": "canine", **SIZES})


OTHER_ENCODERS = ("mobilebert", "nystromformer", "roformer", "roberta-prelayernorm", "deberta-v2", "longformer", "esm")


@pytest.mark.parametrize(("model_type", "alike"), [
    *[(name, True) for name in ("roberta", "electra")],
    *[(name, False) for name in ("megatron-bert", "mpnet", "convbert", "albert")],
    *[pytest.param(name, True, marks=pytest.mark.faults) for name in ("bert", "xlm-roberta", "camembert")],
    *[pytest.param(name, False, marks=pytest.mark.faults) for name in OTHER_ENCODERS],
])  # fmt: skip
def test_only_encoders_built_like_bert_decode_and_are_fused_inside(model_type: str, alike: bool) -> None:
    shape = SIZES | {"model_type": model_type, "num_hidden_layers": 4, "attention_window": 4, "mask_token_id": 4}
    known = transformers.AutoConfig.for_model(model_type).to_dict()
    shape = {key: value for key, value in shape.items() if key in known}
    torch.manual_seed(0)
    text = {"kind": "huggingface", "context_length": 12, "config": shape, "pooling": "first"}
    tower = check_config(text, TEXT_TOWERS["huggingface"], "test").build(EMBED, parity.TOKENIZER, None).eval()
    assert (tower.bert_layers is not None) == alike
    if alike:
        ids, mask = torch.arange(24).view(2, 12) + 5, torch.ones(2, 12, dtype=torch.bool)
        ids[1, :6] = ids[0, :6]
        one, other = tower.causal_tokens(ids, mask)
        assert torch.allclose(one[:6], other[:6], atol=1e-6) and not torch.allclose(one[6:], other[6:], atol=1e-2)
        return
    for changes in ({"captioning": {}, "fusion": CROSS}, {"fusion": {"kind": "med"}}):
        values = {"embed_dim": EMBED, "image": IMAGES["vit"], "text": text, **changes}
        with pytest.raises(ConfigError, match="model.text.kind=(clip or )?bert"):
            build_model(check_config(values, ModelConfig, "test"), parity.TOKENIZER)


def test_fusion_cannot_start_inside_layers_that_share_weights() -> None:
    albert = {"model_type": "albert", "embedding_size": 16, **SIZES}
    with pytest.raises(ConfigError, match=r"layers of this text tower \(albert\) share weights.*Leave from_layer out"):
        build_text_tower("bert_", text_layer=1, config=albert)
    assert build_text_tower("bert_", config=albert).eval()(*draw_texts()).tokens.shape == (3, 12, 32)


def test_texts_longer_than_the_positions_are_refused() -> None:
    """32 positions; RoBERTa's first two are never used."""
    for name, most in {"bert_": 32, "roberta": 30, "electra": 32}.items():
        tower = build_text_tower(name, context_length=most)
        ids = torch.full((2, most), 7)
        assert tower(ids, torch.ones_like(ids, dtype=torch.bool)).pooled.shape == (2, EMBED)
        longer = f"is {most + 1}, but|{most + 1}, but .* {most} tokens. .*max_position_embeddings=33"
        with pytest.raises(ConfigError, match=longer):
            build_text_tower(name, context_length=most + 1)


XLM = {"model_type": "xlm", "emb_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64}
SWIN = {"model_type": "swin", "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 2, "window_size": 4}


FUNNEL = {"model_type": "funnel", "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64}


def expect(message: str | None, model: ImageTextModel, layer_decay: float = 1.0) -> None:
    """`check_towers` takes the model, or refuses it in one line that matches `message`."""
    if message is None:
        check_towers(model, layer_decay)
        return
    with pytest.raises(ConfigError, match=message) as error:
        check_towers(model, layer_decay)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("side", "tower", "message"), [
    ("text", {"config": XLM}, "dropped by torch's generator, .* model.text.config.dropout, "),
    ("text", {"config": XLM | {"dropout": 0.0}}, None),
    ("text", {"config": {"model_type": "t5", "d_model": 32, "num_layers": 1}}, "cannot be run on a batch: ValueError: You"),
    ("text", {"config": FUNNEL}, "dropout is given .* rows for 2 samples"),
    ("text", {"config": FUNNEL | {"hidden_dropout": 0.0, "activation_dropout": 0.0}}, None),
    ("image", {"config": SWIN}, None),  # with stochastic depth, by its own default
    ("image", {"config": SWIN | {"hidden_dropout_prob": 0.1}}, "rows for 2 samples .* such as windows"),
    ("image", {"kind": "timm", "name": "test_resnet", "settings": {"drop_rate": 0.1}}, "model.image.settings.drop_rate$"),
    ("image", {"kind": "timm", "name": "test_resnet", "settings": {"drop_path_rate": 0.1}}, None),
])  # fmt: skip
def test_towers_that_draw_otherwise_or_cannot_run_are_refused(side: str, tower: dict, message: str | None) -> None:
    tower = tower if "kind" in tower else {"kind": "huggingface", "pooling": "mean"} | tower
    tower |= {"image_size": 32} if side == "image" else {"context_length": 12}
    values = {"embed_dim": EMBED, "image": IMAGES["vit"], "text": TEXTS["bert"], side: tower}
    model = build_model(check_config(values, ModelConfig, "test"), parity.TOKENIZER).train()
    buffers, state = [buffer.clone() for buffer in model.buffers()], torch.get_rng_state()
    expect(message, model)
    assert all(torch.equal(now, then) for now, then in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in model.modules())


CAUSAL = {
    "clip_text_model": SIZES,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "llama": SIZES | {"num_key_value_heads": 2},
}


@pytest.mark.parametrize(("model_type", "changes", "pooling", "message"), [
    *[(name, {}, "first", "pooling: first, but .* reads from left to right.*pooling=mean$") for name in ("gpt2", "llama")],
    *[(name, {}, "mean", None) for name in CAUSAL],
    ("clip_text_model", {}, "first", "pooling=mean or pooler$"),
    ("clip_text_model", {}, "pooler", r"config.eos_token_id=1000, .* or model.text.pooling=mean$"),
    ("clip_text_model", {"eos_token_id": 1000}, "pooler", None),
    ("roberta", {}, "first", None),
    ("siglip_text_model", {}, "pooler", None),
])  # fmt: skip
def test_an_embedding_that_does_not_depend_on_the_text_is_refused(
    model_type: str, changes: dict, pooling: str, message: str | None
) -> None:
    config = {"model_type": model_type, **CAUSAL.get(model_type, SIZES), **changes}
    text = {"kind": "huggingface", "context_length": 12, "config": config, "pooling": pooling}
    for fusion in (None, CROSS | {"from_layer": 1}):
        values = {"embed_dim": EMBED, "image": IMAGES["vit"], "text": text, "fusion": fusion}
        model = build_model(check_config(values, ModelConfig, "test"), parity.TOKENIZER).train()
        expect(message, model)
        assert model.text_tower.tap.taken is None


REGNET = {"kind": "timm", "name": "regnetx_002", "image_size": 32}
UNDROPPED = {"dropout": 0.0, "attention_dropout": 0.0}
BY_BLOCK = {
    "layer_decay": "engine.layer_decay",
    "compile": "model.compile",
    "checkpoint_activations": "model.checkpoint_activations",
}


@pytest.mark.parametrize("setting", BY_BLOCK)
def test_what_is_done_by_block_is_refused_for_a_tower_without_blocks(setting: str) -> None:
    changes = {} if setting == "layer_decay" else {setting: True}
    decay = 0.8 if setting == "layer_decay" else 1.0
    values = {"embed_dim": EMBED, "image": REGNET, "text": TEXTS["bert"], **changes}
    model = build_model(check_config(values, ModelConfig, "test"), parity.TOKENIZER).train()
    message = f"model.image: this tower is no sequence of like blocks, so {BY_BLOCK[setting]} would do nothing on it"
    expect(message, model, decay)
    frozen = check_config(values | {"freeze": ["image_tower"]}, ModelConfig, "test")
    check_towers(build_model(frozen, parity.TOKENIZER).train(), decay)
    check_towers(
        build_model(check_config(values | dict.fromkeys(changes, False), ModelConfig, "test"), parity.TOKENIZER)
    )


@pytest.mark.parametrize(("text", "refused"), [
    (XLM | UNDROPPED, True),
    (XLM | UNDROPPED | {"model_type": "flaubert"}, True),
    ({"model_type": "roberta", **SIZES}, False),
    ({"model_type": "albert", "embedding_size": 16, **SIZES}, False),
], ids=lambda value: value["model_type"] if isinstance(value, dict) else "")  # fmt: skip
def test_rates_by_depth_need_blocks_in_the_order_of_their_calls(text: dict, refused: bool) -> None:
    text = {"kind": "huggingface", "context_length": 12, "config": text}
    values = {"embed_dim": EMBED, "image": IMAGES["timm resnet"], "text": text, "checkpoint_activations": True}
    model = build_model(check_config(values, ModelConfig, "test"), parity.TOKENIZER).train()
    buffers = [buffer.clone() for buffer in model.buffers()]
    check_towers(model)  # to keep no activations, any order will do
    message = "model.text: this tower does not call its blocks in the order .* Set it to 1"
    expect(message if refused else None, model, 0.8)
    assert all(torch.equal(now, then) for now, then in zip(model.buffers(), buffers, strict=True))
    assert not any(module._forward_pre_hooks for module in find_blocks(model).values())


def test_blocks_are_found_in_every_tower() -> None:
    expected = {"vit": 2, "resnet": 4, "timm vit": 6, "timm resnet": 4, "vit_": 2, "dinov2": 2}
    assert {name: len(find_blocks(build_image_tower(name))) for name in expected} == expected
    assert list(find_blocks(build_text_tower("bert"))) == ["inner.encoder.layer.0", "inner.encoder.layer.1"]
    assert list(find_blocks(build_image_tower("resnet")))[:2] == ["inner.layer1.0", "inner.layer2.0"]
    lists = nn.ModuleList(nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2)) for _ in range(2))
    assert list(find_blocks(nn.ModuleDict({"stages": lists}))) == [f"stages.{i}.{j}" for i in (0, 1) for j in (0, 1)]


def loss_of(model: ImageTextModel) -> Tensor:
    batch = parity.make_batch(parity.model_config(parity.Case("vit", "clip", "cross", parity.LOSSES)), 0, World())
    output = model(batch)
    return (output.image_embed * output.text_embed).sum() + output.match_logits.sin().sum()


def gradients(model: ImageTextModel) -> dict[str, Tensor]:
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("changes", [
    pytest.param(["compiled"], marks=pytest.mark.faults),
    ["checkpointed"],
    ["compiled", "checkpointed"],
], ids="-".join)  # fmt: skip
def test_checkpointed_and_compiled_blocks_compute_the_same(changes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    compile_with = functools.partial(compile_blocks, backend=backend)
    monkeypatch.setattr("pretrain.model.model.compile_blocks", compile_with)
    torch.compiler.reset()
    settings = {"compile": "compiled" in changes, "checkpoint_activations": "checkpointed" in changes}
    sides = ("dinov2 with drop path", "bert with dropout", CROSS | {"layers": 2, "dropout": 0.2})
    plain, changed = build(*sides).train(), build(*sides, **settings).train()
    expected, found = gradients(plain), gradients(changed)
    # One for each kind of block, whatever its dropouts: torch gives up at eight.
    assert len(graphs) == (3 if settings["compile"] else 0)
    assert found.keys() == expected.keys() and changed.state_dict().keys() == plain.state_dict().keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6, msg=name)


def test_checkpointed_blocks_keep_less_and_leave_batch_normalisation_alone() -> None:
    def kept(model: nn.Module) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(draw_pixels(8))
        return sum(sizes)

    vit, resnet = build_image_tower("vit"), build_image_tower("resnet").train()
    before = kept(vit)
    checkpoint_blocks(vit, no_contexts)
    assert kept(vit) < 0.6 * before
    statistics = copy.deepcopy(resnet)
    checkpoint_blocks(resnet, no_contexts)
    for model in (resnet, statistics):
        model(draw_pixels()).pooled.sum().backward()
    for found, expected in zip(resnet.buffers(), statistics.buffers(), strict=True):
        assert torch.equal(found, expected)


def test_frozen_parts_do_not_train() -> None:
    model = build("resnet", "bert", CROSS, freeze=["image_tower", "text_tower.inner.embeddings"]).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("image_tower.", "text_tower.inner.embeddings.")) for name in trained)
    assert {name.partition(".")[0] for name in trained} == {"text_tower", "fusion", "match_head", "logit_scale"}
    assert not model.image_tower.training and model.text_tower.training and model.fusion.training
    assert not model.text_tower.inner.embeddings.training
    before = [buffer.clone() for buffer in model.image_tower.buffers()]
    assert set(gradients(model)) == trained - {"logit_scale.log_scale"}
    assert all(torch.equal(now, then) for now, then in zip(model.image_tower.buffers(), before, strict=True))


@pytest.mark.parametrize(("prefixes", "message"), [
    (["image"], "no parameter begins with 'image'. Names begin with: fusion, image_tower"),
    (["image_tower", "text_tower", "fusion", "match_head", "logit_scale"], "leaves nothing to train"),
])  # fmt: skip
def test_freezing_nothing_or_everything_is_refused(prefixes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("vit", "clip", CROSS, freeze=prefixes)


def test_learning_rates_fall_with_depth() -> None:
    scales = learning_rate_scales(build("vit", "bert", CROSS), 0.5)
    expected = {
        "image_tower.inner.conv1.weight": 0.25,
        "image_tower.inner.positional_embedding": 0.25,
        "image_tower.inner.transformer.resblocks.0.ln_1.weight": 0.5,
        "image_tower.inner.transformer.resblocks.1.ln_1.weight": 1,
        "image_tower.inner.ln_post.weight": 1,
        "image_tower.inner.proj": 1,
        "text_tower.inner.embeddings.word_embeddings.weight": 0.25,
        "text_tower.inner.encoder.layer.0.output.dense.weight": 0.5,
        "text_tower.projection.weight": 1,
        "fusion.text.layers.0.mlp.0.weight": 1,
        "logit_scale.log_scale": 1,
    }
    assert {name: scales[name] for name in expected} == expected


def test_parameter_groups_hold_every_trained_parameter_once() -> None:
    model = build("timm vit", "clip", CROSS, freeze=["text_tower.inner.token_embedding"])
    groups = parameter_groups(model, 0.2, 0.8)
    assert groups[0]["lr_scale"] == 1 and {group["weight_decay"] for group in groups} == {0.0, 0.2}
    assert math.isclose(min(group["lr_scale"] for group in groups), 0.8**6)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len(parameter_groups(model, 0.2, 1.0)) == 2


def train_at_stages(world: World) -> dict[str, list[list[float]]]:
    """Losses of three steps in fp32, at ZeRO 0 and 3, of towers and fusions of every library; frozen, checkpointed."""
    from pretrain.checkpoint import gather_weights
    from pretrain.engine import build_engine, set_learning_rate
    from pretrain.losses import compute_losses

    cases = {
        "timm": ("timm vit", "clip", {"kind": "shared", "width": 32, "layers": 1, "heads": 2}, {}),
        "transformers": ("dinov2", "roberta", {"kind": "weighted", "width": 32, "heads": 2}, {}),
        "med": ("blip_vision_model", "bert", {"kind": "med"}, {"checkpoint_activations": True}),
        "frozen": ("siglip_vision_model", "electra", {"kind": "med", "layers": 1}, {"freeze": ["image_tower"]}),
    }
    parity.shard_everything()
    results = {}
    for name, (image, text, fusion, changes) in cases.items():
        results[name] = []
        for stage in (0, 3):
            model = build(image, text, fusion, **changes).train()
            config = EngineConfig(zero_stage=stage, precision="fp32", lr=1e-3, layer_decay=0.7)
            engine = build_engine(model, config, parity.GLOBAL_BATCH, world)
            losses = []
            for step in range(3):
                set_learning_rate(engine, 1e-3)
                batch = parity.make_batch(
                    parity.model_config(parity.Case("vit", "clip", "cross", parity.LOSSES)), step, world
                )
                loss = compute_losses(parity.LOSSES, engine(batch), world)["total"]
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
            rates = {group["lr"] for group in engine.optimizer.param_groups}
            assert max(rates) == 1e-3 and min(rates) < 1e-3
            weights = gather_weights(engine)
            assert weights.keys() == model.state_dict().keys()
            results[name].append([*losses, sum(value.double().abs().sum().item() for value in weights.values())])
            engine.destroy()
    return results


def test_towers_and_fusions_train_alike_at_zero_0_and_3() -> None:
    for name, (plain, sharded) in run_on_ranks(train_at_stages, 1)[0].items():
        assert sharded == pytest.approx(plain, rel=1e-5), name


def push_logit_scale(world: World) -> list[list[float]]:
    """At some stages, the logit scale after two steps that raise it at its bound, and after three that lower it."""
    from pretrain.engine import build_engine, cap_logit_scale, master_parts, run_backward

    results = []
    parity.allow_fp16()
    for stage, precision in [(0, "bf16"), (2, "fp32"), (3, "fp16")]:
        model = build("vit", "clip", init_logit_scale=99.9).train()
        engine = build_engine(model, EngineConfig(zero_stage=stage, precision=precision, lr=0.1), 8, world)
        batch = parity.make_batch(parity.model_config(parity.Case("vit", "clip", "cross", parity.LOSSES)), 0, world)
        results.append([])
        for sign in (-1, -1, 1, 1, 1):
            run_backward(engine, sign * 1e-3 * engine(batch, heads=False).logit_scale.sum())
            engine.step()
            cap_logit_scale(engine)
            results[-1].append(master_parts(engine)["logit_scale.log_scale"][1].exp().item())
        engine.destroy()
    return results


def test_a_logit_scale_at_its_bound_comes_down_again() -> None:
    for scales in run_on_ranks(push_logit_scale, 1)[0]:
        assert all(98 < scale <= 100.001 for scale in scales[:2]) and scales[-1] < 0.99 * scales[1]


EXAMPLES = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "model.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.split(",")[0].split("\n")[0])
def test_the_examples_in_the_documentation_are_valid(example: str) -> None:
    values = {"image": IMAGES["vit"], "text": TEXTS["bert"], "fusion": CROSS} | yaml.safe_load(example)
    check_config(values, ModelConfig, "docs/model.md")


def test_the_documentation_shows_every_kind() -> None:
    shown = [yaml.safe_load(example) for example in EXAMPLES]
    for key, registry in {"image": IMAGE_TOWERS, "text": TEXT_TOWERS, "fusion": FUSIONS}.items():
        assert {values[key]["kind"] for values in shown if key in values} == set(registry)

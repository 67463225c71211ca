"""Weights of other libraries and of ours in a new model: equal outputs, resized positions, and a table of what was done."""

import json
import logging
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from data_tools.errors import UserError
from pretrain.config import ConfigError, check_config
from pretrain.model.model import ImageTextModel, ModelConfig, build_model
from pretrain.model.settings import describe_open_clip, describe_pixels
from pretrain.model.towers import PIXEL_MEAN, PIXEL_STD, unit
from pretrain.model.warm_start import Report, fit, resize_grid, resize_line, warm_start
from pretrain.torchvision_ops import prepare_torchvision
from pretrain.world import World

prepare_torchvision()

EMBED, VOCABULARY = 12, parity.VOCAB_SIZE
IMAGE = {"kind": "vit", "image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"kind": "clip", "context_length": 12, "width": 24, "heads": 2, "layers": 2}
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {"hidden_size": 32, "intermediate_size": 128, "image_size": 32, "patch_size": 8, **SIZES}
WORDS = {"hidden_size": 24, "intermediate_size": 96, "vocab_size": VOCABULARY, "max_position_embeddings": 12, **SIZES}
CROSS = {"kind": "cross", "width": 32, "layers": 1, "heads": 2}


def build(
    image: dict, text: dict, fusion: dict | None = None, seed: int = 5, bias: float | None = None
) -> ImageTextModel:
    values = {"embed_dim": EMBED, "image": image, "text": text, "fusion": fusion, "init_logit_bias": bias}
    return build_model(check_config(values, ModelConfig, "test"), parity.TOKENIZER, seed).eval()


def start(model: ImageTextModel, *sources: dict) -> Report:
    """Warm start from sources as a config gives them."""
    values = {"image": IMAGE, "text": TEXT, "warm_start": list(sources)}
    return warm_start(model, check_config(values, ModelConfig, "test").warm_start, World())


def shake(model: nn.Module) -> nn.Module:
    """Every weight away from where it begins: gains, biases and positions too."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def draw_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    ids = torch.randint(1, 1000, (3, 12), generator=generator)
    lengths = torch.tensor([12, 5, 8])[:, None]
    ids = ids.where(torch.arange(12) < lengths, torch.tensor(0)).scatter(1, lengths - 1, VOCABULARY - 1)
    return torch.randn(3, 3, 32, 32, generator=generator), ids, torch.arange(12) < lengths


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """transformers' CLIPModel with OpenAI's activation, and the folder where it lies."""
    import transformers

    marks = {"eos_token_id": VOCABULARY - 1, "bos_token_id": VOCABULARY - 2, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        vision_config={**VISION, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        text_config={**WORDS, **marks, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        projection_dim=EMBED,
    )
    torch.manual_seed(0)
    model, folder = shake(transformers.CLIPModel(config)), tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return model, folder


QUICK = {"activation": "quick_gelu"}
CLIP_TOWERS = {
    "open_clip's towers": (IMAGE | QUICK, TEXT | QUICK),
    "transformers' vision model": (
        {"kind": "huggingface", "image_size": 32,
         "config": {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", **VISION}},
        TEXT | QUICK,
    ),
}  # fmt: skip


@pytest.mark.parametrize("towers", CLIP_TOWERS)
@torch.no_grad()
def test_clip_of_transformers(towers: str, clip: tuple[nn.Module, Path]) -> None:
    theirs, folder = clip
    model = build(*CLIP_TOWERS[towers], CROSS)
    report = start(model, {"kind": "huggingface", "name": str(folder)})
    pixels, ids, mask = draw_inputs()
    output = theirs(pixel_values=pixels, input_ids=ids, attention_mask=mask.long())
    assert_close(unit(model.image_tower(pixels).pooled), output.image_embeds)
    assert_close(unit(model.text_tower(ids, mask).pooled), output.text_embeds)
    assert_close(model.logit_scale(), theirs.logit_scale.exp().reshape(1))
    assert {name.partition(".")[0] for name in report.fresh} == {"fusion", "match_head"}
    assert not report.resized and not report.unused


@torch.no_grad()
def test_clip_at_another_resolution_and_length(clip: tuple[nn.Module, Path], caplog: pytest.LogCaptureFixture) -> None:
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    theirs, folder = clip
    model = build(IMAGE | QUICK | {"image_size": 48}, TEXT | QUICK | {"context_length": 20})
    with caplog.at_level(logging.INFO):
        report = start(model, {"kind": "huggingface", "name": str(folder)})
    assert set(report.resized) == {"image_tower.inner.positional_embedding", "text_tower.inner.positional_embedding"}
    assert "image_tower.inner.positional_embedding: [17, 32] -> [37, 32], bicubic" in caplog.text
    assert "text_tower.inner.positional_embedding: [12, 24] -> [20, 24], linear" in caplog.text
    weights = {
        "visual.positional_embedding": theirs.vision_model.embeddings.position_embedding.weight,
        "positional_embedding": theirs.text_model.embeddings.position_embedding.weight,
    }
    model.visual = model.image_tower.inner
    resize_pos_embed(weights, model)
    resize_text_pos_embed(weights, model.text_tower.inner)
    assert_close(model.image_tower.inner.positional_embedding, weights["visual.positional_embedding"])
    assert_close(model.text_tower.inner.positional_embedding, weights["positional_embedding"])


@torch.no_grad()
def test_blip_of_transformers(tmp_path: Path) -> None:
    import transformers

    text = {**WORDS, "encoder_hidden_size": 32, "layer_norm_eps": 1e-12}
    config = transformers.BlipConfig(text_config=text, vision_config=VISION, image_text_hidden_size=EMBED)
    theirs = shake(transformers.BlipForImageTextRetrieval(config))
    theirs.save_pretrained(tmp_path)
    bias = {"pooling": "first", "projection_bias": True}
    image = {"kind": "huggingface", "image_size": 32, "config": {"model_type": "blip_vision_model", **VISION}, **bias}
    model = build(image, TEXT | {"kind": "bert"} | bias, {"kind": "med"})
    report = start(model, {"kind": "huggingface", "name": str(tmp_path)})
    pixels, ids, mask = draw_inputs()
    inputs = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask.long()}
    seen, read = model.image_tower(pixels), model.text_tower(ids, mask)
    assert_close(model.match_pairs(read.tokens, mask, seen.tokens), theirs(**inputs).itm_score)
    assert_close(unit(seen.pooled) @ unit(read.pooled).T, theirs(**inputs, use_itm_head=False).itm_score)
    assert set(report.fresh) == {"logit_scale.log_scale"} and not report.unused


@torch.no_grad()
def test_one_side_of_a_model_with_two(clip: tuple[nn.Module, Path], tmp_path: Path) -> None:
    import transformers

    model = build(IMAGE | QUICK, TEXT | {"kind": "bert", "layers": 1})  # a text tower that CLIP has nothing for
    report = start(model, {"kind": "huggingface", "name": str(clip[1])})
    pixels, _, _ = draw_inputs()
    expected = clip[0].visual_projection(clip[0].vision_model(pixel_values=pixels).pooler_output)
    assert_close(model.image_tower(pixels).pooled, expected)
    assert {name.partition(".")[0] for name in report.loaded} == {"image_tower", "logit_scale"}
    text = {name for name in clip[0].state_dict() if name.startswith("text_")}
    assert set(report.unused) == text and "text_projection.weight" in text

    config = transformers.SiglipConfig(vision_config=VISION, text_config=WORDS)
    theirs = shake(transformers.SiglipModel(config))
    theirs.save_pretrained(tmp_path)
    image = {"kind": "huggingface", "image_size": 32, "name": str(tmp_path), "pooling": "pooler"}
    model = build(image, TEXT)
    start(model, {"kind": "huggingface", "name": str(tmp_path)})
    expected = theirs.vision_model(pixel_values=pixels).pooler_output @ model.image_tower.projection.weight.T
    assert_close(model.image_tower(pixels).pooled, expected)


@pytest.mark.parametrize("kind", ["Siglip", "Siglip2", "Blip"])
@torch.no_grad()
def test_the_text_side_of_a_model_with_two(kind: str, tmp_path: Path) -> None:
    """SigLIP's reads padding, as it is trained, and its pooler gives another width; BLIP's takes the mask."""
    import transformers

    wide = {"projection_size": 20} if kind != "Blip" else {"encoder_hidden_size": 32}
    classes = {"Blip": "BlipForImageTextRetrieval"}
    shape = {"vision_config": VISION, "text_config": WORDS | wide, "image_text_hidden_size": EMBED}
    config = getattr(transformers, f"{kind}Config")(**shape)
    theirs = shake(getattr(transformers, classes.get(kind, f"{kind}Model"))(config))
    theirs.save_pretrained(tmp_path)
    pooling = "first" if kind == "Blip" else "pooler"
    text = {"kind": "huggingface", "name": str(tmp_path), "context_length": 12, "pooling": pooling}
    model = build(IMAGE, text | {"projection_bias": kind == "Blip"})
    source = {"kind": "huggingface", "name": str(tmp_path)}
    report = start(model, source)
    _, ids, mask = draw_inputs()
    found, other = model.text_tower(ids, mask), model.text_tower(ids.where(mask, torch.tensor(7)), mask)
    if kind == "Blip":
        output = theirs.text_encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        expected = output[:, 0]
        assert_close(other.pooled, found.pooled)
        assert not any("crossattention" in name for name in model.state_dict())
    else:
        output = theirs.text_model(input_ids=ids).last_hidden_state
        features = theirs.get_text_features(input_ids=ids)
        expected = getattr(features, "pooler_output", features)  # transformers 4 gives these alone
        assert not torch.allclose(other.pooled, found.pooled, atol=1e-3)
    projection = model.text_tower.projection
    assert_close(found.tokens[mask], output[mask])
    assert_close(found.pooled, projection(expected))
    assert all(name.startswith(("image_tower", "logit_scale", "text_tower.projection")) for name in report.fresh)


def save_bert(folder: Path, layers: int, vocabulary: int = VOCABULARY) -> nn.Module:
    import transformers

    sizes = WORDS | {"num_hidden_layers": layers, "max_position_embeddings": 40, "vocab_size": vocabulary}
    model = shake(transformers.BertModel(transformers.BertConfig(**sizes)))
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def test_bert_fills_the_tower_and_the_layers_of_the_fusion_behind_it(tmp_path: Path) -> None:
    theirs = save_bert(tmp_path, layers=4)
    model = build(IMAGE, TEXT | {"kind": "bert"}, {"kind": "med", "layers": 2})
    report = start(model, {"kind": "huggingface", "name": str(tmp_path)})
    _, ids, mask = draw_inputs()
    output = theirs(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    tokens = model.text_tower(ids, mask).tokens
    assert_close(tokens[mask], output.hidden_states[2][mask])
    for layer in model.fusion.layers:  # as the fusion runs them, but for the cross-attention
        tokens = layer(tokens, mask[:, None, None, :])
    assert_close(tokens[mask], output.last_hidden_state[mask])
    assert "[40, 24] -> [12, 24], cut" in report.resized["text_tower.inner.embeddings.position_embeddings.weight"]
    assert not any(name.startswith("fusion.layers") for name in report.fresh)
    assert all(name.startswith("fusion.cross") for name in report.fresh if name.startswith("fusion"))


def test_a_padded_vocabulary_fits_and_another_does_not(tmp_path: Path) -> None:
    theirs = save_bert(tmp_path / "padded", 2, VOCABULARY + 64)
    model = build(IMAGE, TEXT | {"kind": "bert"})
    report = start(model, {"kind": "huggingface", "name": str(tmp_path / "padded")})
    words = model.text_tower.inner.embeddings.word_embeddings.weight
    assert torch.equal(words, theirs.embeddings.word_embeddings.weight[:VOCABULARY])
    assert f"the first {VOCABULARY} ids" in report.resized["text_tower.inner.embeddings.word_embeddings.weight"]
    save_bert(tmp_path / "other", 2, 500)
    with pytest.raises(
        ConfigError, match=rf"word_embeddings.weight is \[500, 24\] there and \[{VOCABULARY}, 24\] here"
    ):
        start(model, {"kind": "huggingface", "name": str(tmp_path / "other")})


def test_a_vit_of_transformers_and_a_text_tower_of_ours_one_over_the_other(tmp_path: Path) -> None:
    import transformers

    theirs = shake(transformers.ViTModel(transformers.ViTConfig(**VISION | {"image_size": 48})))
    theirs.save_pretrained(tmp_path / "vit")
    image = {"kind": "huggingface", "image_size": 32, "config": {"model_type": "vit", **VISION}}
    other = shake(build(image, TEXT, seed=1))
    save_file({name: value.contiguous() for name, value in other.state_dict().items()}, tmp_path / "model.safetensors")
    model = build(image, TEXT)
    report = start(
        model,
        {"kind": "native", "path": str(tmp_path)},
        {"kind": "huggingface", "name": str(tmp_path / "vit"), "parts": ["image_tower"]},
    )
    weights, inner = model.state_dict(), "image_tower.inner."
    for name, value in other.state_dict().items():
        if not name.startswith(inner):
            assert torch.equal(weights[name], value), name
    for name, value in theirs.state_dict().items():
        if "position_embeddings" not in name:
            assert torch.equal(weights[inner + name], value), name
    assert [name.removeprefix(inner) for name in report.resized] == ["embeddings.position_embeddings"]
    assert not report.fresh and not report.unused


@pytest.mark.parametrize("form", ["folder", "safetensors", "training checkpoint"])
@torch.no_grad()
def test_open_clip(form: str, tmp_path: Path) -> None:
    import open_clip

    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 12, "width": 24, "heads": 2, "layers": 2, "vocab_size": VOCABULARY}
    theirs = shake(open_clip.CLIP(EMBED, vision, text, init_logit_bias=-16.5))
    weights = theirs.state_dict()
    path = tmp_path / {"folder": "open_clip_pytorch_model.bin", "safetensors": "x.safetensors"}.get(form, "epoch_3.pt")
    if form == "safetensors":
        save_file({name: value.contiguous() for name, value in weights.items()}, path)
    elif form == "folder":
        torch.save(weights, path)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in weights.items()}}, path)
    model = build(IMAGE, TEXT, bias=-10.0)
    report = start(model, {"kind": "open_clip", "name": str(tmp_path if form == "folder" else path)})
    assert model.logit_bias().item() == theirs.logit_bias.item() != -10
    pixels, ids, mask = draw_inputs()
    assert_close(model.image_tower(pixels).pooled, theirs.encode_image(pixels))
    assert_close(model.text_tower(ids, mask).pooled, theirs.encode_text(ids))
    assert not report.fresh and not report.unused


def test_open_clip_with_a_timm_tower_and_a_bert(tmp_path: Path) -> None:
    from open_clip.model import CustomTextCLIP

    save_bert(tmp_path / "bert", 2)
    vision = {"timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
    text = {"hf_model_name": str(tmp_path / "bert"), "hf_model_pretrained": False, "hf_pooler_type": "cls_pooler"}
    theirs = shake(CustomTextCLIP(EMBED, vision, text | {"hf_proj_type": "linear"}))
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    model = build(
        {"kind": "timm", "name": "test_resnet", "image_size": 32}, TEXT | {"kind": "bert", "context_length": 40}
    )
    report = start(model, {"kind": "open_clip", "name": str(tmp_path / "model.pt")})
    pixels, ids, mask = draw_inputs()
    with torch.no_grad():
        assert_close(model.image_tower(pixels).pooled, theirs.encode_image(pixels))
        assert_close(model.text_tower(ids, mask).pooled, theirs.encode_text(ids))
    assert not report.fresh and not report.unused


def test_the_table_names_what_is_fresh_and_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = build(IMAGE, TEXT, seed=1).state_dict()
    del other["image_tower.inner.proj"]
    save_file({"extra": torch.ones(2)} | {k: v.contiguous() for k, v in other.items()}, tmp_path / "some.safetensors")
    with caplog.at_level(logging.INFO):
        start(build(IMAGE, TEXT, CROSS), {"kind": "native", "path": str(tmp_path / "some.safetensors")})
    rows = [line.split() for line in caplog.messages[0].splitlines()]
    image = {name: value for name, value in other.items() if name.startswith("image_tower")}
    values = sum(value.numel() for value in image.values())
    assert ["loaded", "image_tower", str(len(image)), f"{values:,}"] in rows
    assert ["fresh", "match_head", "2", "66"] in rows
    assert ["fresh", "image_tower.inner.proj"] in rows and ["not", "used", "extra"] in rows
    assert not any("fusion." in word for row in rows for word in row)  # a part that is all fresh takes one line


MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
PIXELS = {"pixel_mean": MEAN, "pixel_std": STD}


def write_source(kind: str, folder: Path, clip: Path) -> dict:
    """A folder of towers with quick_gelu and pixel statistics of their own, and the source that names it."""
    import transformers

    if kind == "huggingface":
        shutil.copytree(clip, folder)
        transformers.CLIPImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(folder)
        return {"kind": kind, "name": str(folder)}
    folder.mkdir()
    model = build(IMAGE | QUICK | PIXELS, TEXT | QUICK, seed=1)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    if kind == "native":
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model": model.config.model_dump()}))
        return {"kind": kind, "path": str(folder)}
    names = {"image_tower.inner.": "visual.", "text_tower.inner.": ""}
    for ours, theirs in names.items():
        weights = {name.replace(ours, theirs): value for name, value in weights.items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    sides = {"vision_cfg": {"head_width": 16}, "text_cfg": {"heads": 2}}
    settings = {"model_cfg": {"quick_gelu": True, **sides}, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return {"kind": kind, "name": str(folder)}


@pytest.mark.parametrize("kind", ["open_clip", "huggingface", "native"])
def test_weights_are_not_taken_under_settings_that_are_not_theirs(
    kind: str, clip: tuple[nn.Module, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of what no shape shows: how pixels are normalised, the activation, the number of heads."""
    source = write_source(kind, tmp_path / "folder", clip[1])
    image, text = IMAGE | QUICK | PIXELS, TEXT | QUICK
    for changed_image, changed_text, needed in (
        (IMAGE | QUICK, text, f"model.image.pixel_mean={MEAN} and model.image.pixel_std={STD}"),
        (IMAGE | PIXELS, text, "model.image.activation=quick_gelu"),
        (image | {"head_width": 8}, text, "model.image.head_width=16"),
        (image, TEXT, "model.text.activation=quick_gelu"),
        (image, text | {"heads": 4}, "model.text.heads=2"),
    ):
        with pytest.raises(ConfigError, match=rf"were trained with {re.escape(needed)};"):
            start(build(changed_image, changed_text), source)
    assert not start(build(IMAGE, text), source | {"parts": ["text_tower"]}).differing  # no pixels
    model = build(image, text)
    assert not start(model, source).differing
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        assert_close(model.encode_image(pixels).pooled, model.image_tower((pixels / 255 - mean) / std).pooled)
    with caplog.at_level(logging.INFO):
        model = build(image | {"pixel_mean": [0.5] * 3}, text | {"activation": "gelu"})
        start(model, source | {"other_settings": True})
    differing = [line.split(maxsplit=1)[1] for line in caplog.messages[-1].splitlines() if line.startswith("differs")]
    assert differing == [
        f"model.image.pixel_mean: {MEAN} there, [0.5, 0.5, 0.5] here",
        "model.text.activation: quick_gelu there, gelu here",
    ]


def refuse(model: ImageTextModel, *sources_and_needed: Any) -> None:
    *sources, needed = sources_and_needed
    with pytest.raises(ConfigError, match=rf"were trained with {re.escape(needed)}"):
        start(model, *sources)


def test_encoders_are_not_taken_under_settings_that_are_not_theirs(tmp_path: Path) -> None:
    import transformers

    save_bert(tmp_path, 2)
    source = {"kind": "huggingface", "name": str(tmp_path)}
    text = TEXT | {"kind": "bert", "context_length": 40}
    refuse(build(IMAGE, text | {"heads": 4}), source, "model.text.heads=2")
    start(build(IMAGE, text), source)
    config = {
        "model_type": "bert",
        **WORDS,
        "max_position_embeddings": 40,
        "hidden_act": "relu",
        "layer_norm_eps": 1e-5,
    }
    encoder = {"kind": "huggingface", "context_length": 40, "config": config | {"num_attention_heads": 4}}
    needed = (
        "config.hidden_act=gelu and model.text.config.num_attention_heads=2 and model.text.config.layer_norm_eps=1e-12"
    )
    refuse(build(IMAGE, encoder), source, f"model.text.{needed}")
    config.pop("model_type")
    transformers.BertModel(transformers.BertConfig(**config)).save_pretrained(tmp_path)
    refuse(build(IMAGE, text), source, "model.text.kind=huggingface")
    sizes = {"vocab_size": VOCABULARY, "dim": 24, "hidden_dim": 48, "n_layers": 1, "n_heads": 2, "activation": "relu"}
    transformers.DistilBertModel(transformers.DistilBertConfig(**sizes)).save_pretrained(tmp_path)
    encoder["config"] = {"model_type": "distilbert", **sizes, "n_heads": 4, "activation": "gelu"}
    refuse(
        build(IMAGE, encoder), source, "model.text.config.hidden_act=relu and model.text.config.num_attention_heads=2"
    )


def test_of_several_sources_the_last_one_s_settings_count(clip: tuple[nn.Module, Path], tmp_path: Path) -> None:
    first = write_source("native", tmp_path / "first", clip[1])
    other = build(IMAGE | {"head_width": 8}, TEXT, CROSS, seed=2)
    save_file({name: value.contiguous() for name, value in other.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model": other.config.model_dump()}))
    second = {"kind": "native", "path": str(tmp_path)}
    start(build(IMAGE | {"head_width": 8}, TEXT, CROSS), first, second)
    refuse(
        build(IMAGE | {"head_width": 8}, TEXT, CROSS),
        second | {"parts": ["text_tower"]},
        first,
        "model.image.pixel_mean",
    )
    refuse(build(IMAGE | {"head_width": 8}, TEXT, CROSS | {"heads": 4}), second, "model.fusion.heads=2")


@pytest.mark.parametrize(("kind", "name", "content"), [
    ("open_clip", "open_clip_config.json", "[]"),
    ("open_clip", "open_clip_config.json", '{"model_cfg": {"vision_cfg": 3}}'),
    ("open_clip", "open_clip_config.json", '{"preprocess_cfg": 3}'),
    ("huggingface", "preprocessor_config.json", '{"image_mean": [0.5,'),
])  # fmt: skip
def test_settings_that_are_none_are_said_in_one_line(
    kind: str, name: str, content: str, clip: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    source = write_source(kind, tmp_path / "folder", clip[1])
    (tmp_path / "folder" / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"cannot read the settings of the {kind} source: \w+: .+$"):
        start(build(IMAGE, TEXT), source)


def test_a_processor_that_says_nothing_of_pixels_is_no_error(clip: tuple[nn.Module, Path], tmp_path: Path) -> None:
    source = write_source("huggingface", tmp_path / "folder", clip[1])
    (tmp_path / "folder" / "preprocessor_config.json").unlink()
    (tmp_path / "folder" / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    start(build(IMAGE | QUICK, TEXT | QUICK), source)


def test_what_open_clip_says_of_its_models() -> None:
    import open_clip

    model = build(IMAGE, TEXT).config
    assert describe_pixels(0.5, [0.25]) == {"image.pixel_mean": [0.5] * 3, "image.pixel_std": [0.25] * 3}
    plain = describe_open_clip(open_clip.get_model_config("ViT-H-14"), {}, model)
    heads = {"image.head_width": 80, "text.heads": 16, "image.activation": "gelu", "text.activation": "gelu"}
    assert plain == heads | describe_pixels(PIXEL_MEAN, PIXEL_STD)
    siglip = describe_open_clip(open_clip.get_model_config("ViT-B-16-SigLIP2"), {}, model)
    assert siglip["text.no_causal_mask"] is True and siglip["text.pool_type"] == "last"
    bert = {"vision_cfg": {"timm_model_name": "x"}, "text_cfg": {"hf_model_name": "y"}}
    assert {key.partition(".")[2] for key in describe_open_clip(bert, {}, model)} >= {"pixel_mean", "pixel_std"}
    assert not any(key.startswith("text") for key in describe_open_clip(bert, {}, model))


def test_pixels_of_weights_by_name() -> None:
    half = [0.5, 0.5, 0.5]
    for source in (
        {"kind": "timm", "name": "vit_base_patch16_224.augreg_in21k"},
        {"kind": "open_clip", "name": "ViT-B-16-SigLIP", "tag": "webli"},
    ):
        values = {"image": IMAGE, "text": TEXT, "warm_start": [source]}
        found = check_config(values, ModelConfig, "test").warm_start[0].find_settings(build(IMAGE, TEXT))
        assert found["image.pixel_mean"] == found["image.pixel_std"] == half


class Harmful:
    def __reduce__(self) -> tuple:
        return print, ("code of the file ran",)


@pytest.mark.parametrize(("content", "message"), [
    ("code", "cannot read the weights"), ("list", "holds a list"), ("half", "cannot read the weights"),
])  # fmt: skip
def test_a_file_is_never_run_as_code(content: str, message: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / ("model.safetensors" if content == "half" else "model.pt")
    if content == "code":
        path.write_bytes(pickle.dumps({"weight": Harmful()}))
    elif content == "list":
        torch.save([1, 2], path)
    else:
        path.write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    kind = {"kind": "native", "path": str(path)} if content == "half" else {"kind": "open_clip", "name": str(path)}
    with pytest.raises(UserError, match=message) as error:
        start(build(IMAGE, TEXT), kind)
    assert "\n" not in str(error.value) and "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(("source", "message"), [
    ({"kind": "open_clip", "name": "ViT-B-32", "tag": "nobody"}, "no 'ViT-B-32' with tag 'nobody'. Tags: openai"),
    ({"kind": "open_clip", "name": "ViT-B-33"}, "it knows no such model"),
    ({"kind": "native", "path": "/no/such.safetensors"}, "cannot read the weights"),
    ({"kind": "native", "path": "/"}, "holds no model.safetensors"),
    ({"kind": "huggingface", "name": "/no/such/folder"}, "cannot load '/no/such/folder'"),
    ({"kind": "timm", "name": "vit_no_such_model"}, "cannot load 'vit_no_such_model'"),
])  # fmt: skip
def test_a_source_that_is_not_there_is_said_in_one_line(source: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        start(build(IMAGE, TEXT), source)
    assert "\n" not in str(error.value)


def test_a_broken_file_of_transformers_is_said_in_one_line(clip: tuple[nn.Module, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(clip[1], tmp_path / "clip")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (whole[:100], whole[:-100], b"\xff" * 64, b""):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=f"cannot load '{folder}'") as error:
            start(build(IMAGE, TEXT), {"kind": "huggingface", "name": str(folder)})
        assert "\n" not in str(error.value)


def test_a_source_that_fills_nothing_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="none of its 1 tensors is in this model"):
        start(build(IMAGE, TEXT), {"kind": "native", "path": str(tmp_path)})
    wide = build(IMAGE | {"width": 48}, TEXT).state_dict()
    save_file({name: value.contiguous() for name, value in wide.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"\[48\] there and \[32\] here.*parts"):
        start(build(IMAGE, TEXT), {"kind": "native", "path": str(tmp_path)})
    save_bert(tmp_path / "bert", 2)
    with pytest.raises(ConfigError, match="is a bert, which is neither tower"):
        start(build(IMAGE, TEXT), {"kind": "huggingface", "name": str(tmp_path / "bert")})


@pytest.mark.parametrize("kind", ["huggingface", "open_clip"])
def test_a_source_of_other_towers_is_refused(kind: str, clip: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """Its logit scale alone is no warm start, unless it is asked for."""
    source = write_source(kind, tmp_path / "folder", clip[1])
    towers = {"kind": "timm", "name": "test_vit", "image_size": 32}, TEXT | {"kind": "bert"}
    tensors = (
        r"none of its \d\d tensors but logit_scale is in this model.*its parts to \[logit_scale\], to take no more$"
    )
    with pytest.raises(ConfigError, match=f"{kind} source: {tensors}"):
        start(build(*towers), source)
    assert set(start(build(*towers), source | {"parts": ["logit_scale"]}).loaded) == {"logit_scale.log_scale"}
    with pytest.raises(
        ConfigError, match="source has nothing for this model's 'text_tower'. Names begin with: logit_scale$"
    ):
        start(build(*towers), source | {"parts": ["logit_scale", "text_tower"]})


@pytest.mark.parametrize(("parts", "message"), [
    (["imag_tower"], "this model has no 'imag_tower'. Did you mean 'image_tower'? Names begin with: image_tower"),
    (["image_tower", "txt_tower"], "this model has no 'txt_tower'. Did you mean 'text_tower'?"),
    (["text_tower.iner"], "this model has no 'text_tower.iner'. Did you mean 'text_tower.inner'?"),
    (["image_tower", "fusion"], "this model has no 'fusion'."),
    (["image_tower", "logit_bias"], "the native source has nothing for this model's 'logit_bias'."),
])  # fmt: skip
def test_a_part_that_is_not_there_is_refused(parts: list[str], message: str, tmp_path: Path) -> None:
    weights = build(IMAGE, TEXT, CROSS, seed=1).state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=re.escape(f"model.warm_start: parts: {message}")) as error:
        start(build(IMAGE, TEXT, bias=-10.0), {"kind": "native", "path": str(tmp_path), "parts": parts})
    assert "\n" not in str(error.value)


def test_grids_keep_the_tokens_before_the_patches() -> None:
    rows = torch.randn(1 + 4 * 4, 6)
    larger = resize_grid(rows, 1 + 8 * 8, "x")
    assert torch.equal(larger[:1], rows[:1]) and larger.shape == (65, 6)
    expected = F.interpolate(rows[1:].T.reshape(1, 6, 4, 4), size=8, mode="bicubic", antialias=True)
    assert_close(larger[1:], expected.flatten(2)[0].T)
    assert_close(resize_grid(torch.ones(16, 2), 49, "x"), torch.ones(49, 2))  # no class token
    assert resize_grid(torch.randn(5 + 16, 2), 5 + 9, "x").shape == (14, 2)  # a class token and four registers
    with pytest.raises(ConfigError, match="make no square grid"):
        resize_grid(torch.randn(30, 2), 35, "x")


def test_lines_are_cut_or_stretched() -> None:
    rows = torch.arange(4.0)[:, None]
    assert resize_line(rows, 3).tolist() == [[0], [1], [2]]
    assert resize_line(rows, 8)[:, 0].tolist() == pytest.approx([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])


def test_positions_of_a_convolution_s_shape_fit() -> None:
    value, done = fit("image_tower.inner.pos_embed", torch.randn(1, 17, 4), torch.empty(1, 10, 4))
    assert value.shape == (1, 10, 4) and "bicubic" in done
    assert fit("x", torch.ones(1, 5, 4), torch.empty(5, 4))[0].shape == (5, 4)

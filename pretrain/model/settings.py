"""What weights were trained with and no shape of theirs shows: pixel statistics, activation, heads, epsilon of the norms.

Under other settings they load, and compute something else. Each function here gives, from what a library says of its
weights, the keys below `model` that a model of ours needs for them: `image.pixel_mean`, `text.heads`, ...; those that the
library does not tell are left out.
"""

from typing import Any

import torch
from torch import nn

from pretrain.model.towers import PIXEL_MEAN, PIXEL_STD

OWN_KEYS = ("pixel_mean", "pixel_std", "activation", "head_width", "heads")  # of our sections
ENCODER_KEYS = {  # of transformers' configs, under whichever name
    "hidden_act": ("hidden_act", "hidden_activation", "activation"),
    "num_attention_heads": ("num_attention_heads",),
    "layer_norm_eps": ("layer_norm_eps", "norm_eps"),
}
FIXED = {  # what our towers of these kinds always have
    "vit": {"layer_norm_eps": 1e-5},
    "clip": {"layer_norm_eps": 1e-5},
    "bert": {"layer_norm_eps": 1e-12, "hidden_act": "gelu"},
}
# What open_clip's towers may have beside and ours of its kinds have not; the values are those that ours stand for.
OPEN_CLIP_VISION = {"pool_type": "tok", "pos_embed_type": "learnable", "no_ln_pre": False, "attentional_pool": False,
                    "final_ln_after_pool": False, "norm_kwargs": {}, "act_kwargs": {}}  # fmt: skip
OPEN_CLIP_TEXT = {"pool_type": "argmax", "no_causal_mask": False, "embed_cls": False, "norm_kwargs": {},
                  "act_kwargs": {}}  # fmt: skip


def describe_pixels(mean: Any, std: Any) -> dict[str, Any]:
    """Of a mean and a deviation of three channels, or of one number for all."""
    told = {"image.pixel_mean": mean, "image.pixel_std": std}
    lists = {key: list(value) if isinstance(value, list | tuple) else [value] for key, value in told.items()}
    return {key: value * 3 if len(value) == 1 else value for key, value in lists.items() if told[key] is not None}


def describe_open_clip(shape: dict[str, Any], pixels: dict[str, Any], model: Any) -> dict[str, Any]:
    """Of open_clip's `model_cfg` and `preprocess_cfg`, for a model config of ours; what they leave out is open_clip's default."""
    settings = describe_pixels(pixels.get("mean") or PIXEL_MEAN, pixels.get("std") or PIXEL_STD)
    vision, text = shape.get("vision_cfg"), shape.get("text_cfg")
    activation = "quick_gelu" if shape.get("quick_gelu") else "gelu"
    if vision and model.image.kind in ("vit", "resnet"):
        settings["image.head_width"] = vision.get("head_width", 64)
    if vision and model.image.kind == "vit":
        settings["image.activation"] = activation
        settings |= list_extras(vision, OPEN_CLIP_VISION, "image")
    if text and model.text.kind == "clip" and not text.get("hf_model_name"):
        settings |= {"text.activation": activation, "text.heads": text.get("heads", 8)}
        ours = OPEN_CLIP_TEXT | ({"pool_type": "eos"} if text.get("pool_type") == "eos" else {})  # by the end mark's id
        settings |= list_extras(text, ours, "text")
    return settings


def list_extras(shape: dict[str, Any], ours: dict[str, Any], side: str) -> dict[str, Any]:
    return {
        f"{side}.{name}": shape[name] for name, own in ours.items() if name in shape and (shape[name] or own) != own
    }


def describe_transformers(config: Any, side: str, kind: str) -> dict[str, Any]:
    """Of transformers' config of one side, for a tower of ours of that kind."""
    told = describe_encoder(config)
    heads, activation = told.get("num_attention_heads"), told.get("hidden_act")
    if kind == "huggingface":
        return {f"{side}.config.{key}": value for key, value in told.items()}
    settings = {}
    if kind in ("vit", "clip"):
        settings[f"{side}.activation"] = activation
    if kind in ("clip", "bert"):
        settings[f"{side}.heads"] = heads
    if kind == "vit" and heads:
        settings[f"{side}.head_width"] = getattr(config, "hidden_size", 0) // heads
    if any(key in told and not agree(told[key], value) for key, value in FIXED.get(kind, {}).items()):
        settings[f"{side}.kind"] = "huggingface"
    return {key: value for key, value in settings.items() if value is not None}


def describe_encoder(config: Any) -> dict[str, Any]:
    found = {key: [getattr(config, name, None) for name in names] for key, names in ENCODER_KEYS.items()}
    known = {key: [value for value in values if isinstance(value, str | int | float)] for key, values in found.items()}
    return {key: values[0] for key, values in known.items() if values}


def describe_native(shape: dict[str, Any], model: Any) -> dict[str, Any]:
    """Of the `model` section of one of our exports, for a model config of ours."""
    settings = {}
    for side in ("image", "text", "fusion"):
        theirs, ours = shape.get(side), getattr(model, side)
        if side == "image":
            settings |= describe_pixels(theirs.get("pixel_mean", PIXEL_MEAN), theirs.get("pixel_std", PIXEL_STD))
        if not theirs or not ours or theirs["kind"] != ours.kind:
            continue
        if ours.kind == "huggingface":
            import transformers

            settings |= describe_transformers(transformers.AutoConfig.for_model(**theirs["config"]), side, ours.kind)
        settings |= {f"{side}.{key}": theirs[key] for key in OWN_KEYS if key in theirs}
    return settings


def find_differing(model: nn.Module, settings: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Which of the settings the model has otherwise: key -> (theirs, ours)."""
    differing = {}
    for key, theirs in settings.items():
        side, _, name = key.partition(".")
        if name.startswith("config."):
            inner = getattr(model, f"{side}_tower").inner
            ours = describe_encoder(inner.config).get(name.removeprefix("config."))
        else:
            ours = getattr(getattr(model.config, side), name, None)
        if not agree(ours, theirs):
            differing[key] = (theirs, ours)
    return differing


def agree(ours: Any, theirs: Any) -> bool:
    """Numbers to a thousandth: libraries round pixel statistics."""
    try:
        values = [torch.tensor(value, dtype=torch.float64) for value in (ours, theirs)]
        return values[0].shape == values[1].shape and torch.allclose(*values, rtol=1e-3, atol=0)
    except (TypeError, ValueError, RuntimeError):  # of other things than numbers
        return ours == theirs

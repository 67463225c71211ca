"""transformers' BlipForImageTextRetrieval, for what is BLIP already: its vision tower, BERT, and `med` with shared layers.

Match logits and cosines are the run's. The image processor and the tokenizer are those of the run, not BLIP's own.
"""

import copy
import importlib.metadata
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_tools.errors import UserError
from pretrain.export.card import Guide, list_bias_limits, list_training_limits
from pretrain.export.compare import Reloaded
from pretrain.export.huggingface import (
    CLIP_TOKENIZER_LIMITS,
    LIMITS,
    build_clip_tokenizer,
    build_image_processor,
    cap_log_scale,
    edit_tokenizer_files,
)
from pretrain.model.names import to_blip
from pretrain.model.towers import normalise, unit
from pretrain.restore import LoadedRun
from pretrain.torchvision_ops import prepare_torchvision

USAGE = """
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, BlipForImageTextRetrieval

model = BlipForImageTextRetrieval.from_pretrained("{name}").eval()
pictures = AutoImageProcessor.from_pretrained("{name}")(Image.open("picture.jpg"), return_tensors="pt")
texts = AutoTokenizer.from_pretrained("{name}")(["a dog"], padding="max_length", truncation=True, return_tensors="pt")
inputs = dict(pixel_values=pictures.pixel_values, input_ids=texts.input_ids, attention_mask=texts.attention_mask)
with torch.no_grad():
    print(model(**inputs).itm_score.softmax(dim=-1))  # mismatch, match
    print(model(**inputs, use_itm_head=False).itm_score)  # cosines
"""
SCALE_LIMIT = "The class has no logit scale: its logarithm is `logit_scale_init_value` in config.json."


def write(source: LoadedRun, folder: Path, final: Path) -> Guide:
    """Fill `folder`; it does not depend on where it will lie. Raises UserError for a model that BLIP cannot hold."""
    prepare_torchvision()
    check_is_blip(source)
    config = source.config.model
    settings = build_config(source)
    settings.architectures, settings.dtype = ["BlipForImageTextRetrieval"], "float32"
    settings.save_pretrained(folder)
    weights = to_blip(source.model.state_dict())
    weights = {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    build_image_processor(config.image).save_pretrained(folder)
    limits = [*list_training_limits(source), *list_bias_limits(source), SCALE_LIMIT, *LIMITS]
    if config.captioning or config.masked_language:
        limits.append(
            "The heads that predict tokens are not here: the class has no place for them. `native` holds them."
        )
    if config.tokenizer.kind == "clip":
        tokenizer = build_clip_tokenizer(folder, config.text.context_length)
        limits += CLIP_TOKENIZER_LIMITS
    else:
        tokenizer = copy.deepcopy(source.tokenizer.inner)
        tokenizer.model_max_length = config.text.context_length
    tokenizer.save_pretrained(folder)
    edit_tokenizer_files(folder, config.text.kind, config.tokenizer.kind)
    return Guide("transformers", USAGE.format(name=final.name), limits)


def check_is_blip(source: LoadedRun) -> None:
    """Raises UserError naming the first key in which the model is not BLIP's."""
    config = source.config.model
    image_type = getattr(getattr(source.model.image_tower.inner, "config", None), "model_type", config.image.kind)
    fusion = config.fusion
    needed = {
        "model.image": (image_type, "blip_vision_model"),
        "model.image.pooling": (getattr(config.image, "pooling", None), "first"),
        "model.text.kind": (config.text.kind, "bert"),
        "model.text.pooling": (getattr(config.text, "pooling", None), "first"),
        "model.fusion.kind": (fusion.kind if fusion else None, "med"),
        "model.match_head": (config.match_head, True),
        "model.fusion.layers": (getattr(fusion, "layers", None), None),
        "model.fusion.from_layer": (getattr(fusion, "text_layer", None), 0),
    }
    for key, (found, wanted) in needed.items():
        if found != wanted:
            raise UserError(
                f"--to blip: {key} is {found} where BlipForImageTextRetrieval has {wanted}. Use --to native, which holds "
                "every model"
            )


def build_config(source: LoadedRun) -> Any:
    """The BlipConfig of the run's model."""
    import transformers

    words = source.model.text_tower.inner.config
    text = transformers.BlipTextConfig(
        vocab_size=words.vocab_size,
        hidden_size=words.hidden_size,
        intermediate_size=words.intermediate_size,
        num_hidden_layers=words.num_hidden_layers,
        num_attention_heads=words.num_attention_heads,
        max_position_embeddings=words.max_position_embeddings,
        layer_norm_eps=words.layer_norm_eps,
        hidden_dropout_prob=words.hidden_dropout_prob,
        hidden_act=words.hidden_act,
    )
    return transformers.BlipConfig(
        text_config=text.to_dict(),
        vision_config=source.model.image_tower.inner.config.to_dict(),
        image_text_hidden_size=source.config.model.embed_dim,
        logit_scale_init_value=cap_log_scale(source).item(),
    )


def reload(folder: Path) -> Reloaded:
    """What transformers makes of the folder. The hub is not asked."""
    prepare_torchvision()
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import AutoImageProcessor, AutoTokenizer, BlipForImageTextRetrieval, CLIPTokenizerFast

    model = BlipForImageTextRetrieval.from_pretrained(folder, local_files_only=True).eval()
    pictures = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    statistics = pictures.image_mean, pictures.image_std

    def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
        inputs = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return inputs["input_ids"], inputs["attention_mask"].bool()

    @torch.no_grad()
    def embed_images(pixels: Tensor) -> Tensor:
        return unit(model.vision_proj(model.vision_model(normalise(pixels, *statistics)).last_hidden_state[:, 0]))

    @torch.no_grad()
    def embed_texts(texts: list[str]) -> Tensor:
        ids, mask = tokenize(texts)
        return unit(model.text_proj(model.text_encoder(ids, attention_mask=mask.long()).last_hidden_state[:, 0]))

    @torch.no_grad()
    def match_logits(pixels: Tensor, texts: list[str]) -> Tensor:
        ids, mask = tokenize(texts)
        return model(input_ids=ids, attention_mask=mask.long(), pixel_values=normalise(pixels, *statistics)).itm_score

    return Reloaded(
        library=f"transformers {importlib.metadata.version('transformers')}",
        tokenize=tokenize,
        preprocess=lambda picture: pictures(images=picture, return_tensors="pt")["pixel_values"][0],
        embed_images=embed_images,
        embed_texts=embed_texts,
        logit_scale=math.exp(model.config.logit_scale_init_value),
        clean=SimpleTokenizer().clean_fn if isinstance(tokenizer, CLIPTokenizerFast) else str,
        rounds_crop_down=True,
        match_logits=match_logits,
    )

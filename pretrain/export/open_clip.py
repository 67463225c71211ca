"""open_clip's local folders: `open_clip.create_model_and_transforms("local-dir:DIR")`.

The towers wrap open_clip's own modules, so ViT or ResNet with a CLIP text tower is the plain CLIP layout under other
names. A timm tower becomes its TimmModel, a BERT-like text tower its HFTextEncoder with the config in DIR/text_model.
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_tools.errors import UserError
from data_tools.files import write_json_atomic
from pretrain.export.card import Guide, list_contrastive_limits
from pretrain.export.compare import Reloaded
from pretrain.export.huggingface import build_bert_config, cap_log_scale
from pretrain.model.towers import normalise
from pretrain.restore import LoadedRun
from pretrain.torchvision_ops import prepare_torchvision

CONFIG, WEIGHTS, TEXT_MODEL = "open_clip_config.json", "open_clip_model.safetensors", "text_model"

POOLERS = {"first": "cls_last_hidden_state_pooler", "mean": "mean_pooler", "pooler": "cls_pooler"}

USAGE = """
import open_clip, torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{name}")
tokenizer = open_clip.get_tokenizer("local-dir:{name}")
model.eval()
with torch.no_grad():
    picture = model.encode_image(preprocess(Image.open("picture.jpg"))[None], normalize=True)
    print(picture @ model.encode_text(tokenizer(["a dog", "a cat"]), normalize=True).T)
"""

MOVED = """open_clip finds the BERT tower's config by the absolute path in `hf_model_name` of {config}, now `{path}`. \
After moving the folder, write the new path there: \
`python -c "import json, pathlib; p = pathlib.Path('{name}/{config}').resolve(); c = json.loads(p.read_text()); \
c['model_cfg']['text_cfg']['hf_model_name'] = str(p.parent / '{text_model}'); p.write_text(json.dumps(c, indent=2))"`"""


def write(source: LoadedRun, folder: Path, final: Path) -> Guide:
    """Fill `folder`, which will lie at `final`. Raises UserError for towers that open_clip does not have."""
    config, tokenizer = source.config.model, source.tokenizer
    limits = list_contrastive_limits(source, "open_clip")
    vision = build_vision(source)
    text = {"context_length": config.text.context_length, "vocab_size": tokenizer.vocab_size}
    if config.text.kind != "clip":
        check_text(source)
        build_bert_config(source).save_pretrained(folder / TEXT_MODEL)
        text |= {"hf_model_name": str(final / TEXT_MODEL), "hf_model_pretrained": False}
        text |= {"hf_pooler_type": POOLERS[config.text.pooling], "hf_proj_type": "linear"}
        limits.append(MOVED.format(config=CONFIG, path=final / TEXT_MODEL, name=final.name, text_model=TEXT_MODEL))
        if config.tokenizer.kind == "clip":
            limits.append(
                "open_clip's mask takes id 0 for padding, which is also '!' with another sign right after it ('!%'); "
                "such a '!' is not read."
            )
    else:
        text |= config.text.open_clip_config() | config.text.open_clip_pooling(tokenizer)
    if config.tokenizer.kind == "huggingface":
        tokenizer.inner.save_pretrained(folder)
        text["hf_tokenizer_name"] = "."  # for a local folder open_clip takes the folder itself, whatever stands here
        limits.append(
            "open_clip cleans texts for a Hugging Face tokenizer (ftfy, HTML entities, white space); the run did not."
        )
        limits.append(f"On the hub, `hf_tokenizer_name` in {CONFIG} has to be the repository's name.")
    model_settings = {"embed_dim": config.embed_dim, "vision_cfg": vision, "text_cfg": text, **find_activation(config)}
    if config.init_logit_bias is not None:  # without it, the class has no bias
        model_settings["init_logit_bias"] = config.init_logit_bias
    settings = {
        "model_cfg": model_settings,
        "preprocess_cfg": {
            "mean": config.image.pixel_mean,
            "std": config.image.pixel_std,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    write_json_atomic(folder / CONFIG, settings)
    save_file(rename_weights(source), folder / WEIGHTS, {"format": "pt"})
    return Guide("open_clip", USAGE.format(name=final.name), limits)


def build_vision(source: LoadedRun) -> dict[str, Any]:
    """open_clip's `vision_cfg`. Raises UserError for an image tower that it does not have."""
    image, inner = source.config.model.image, source.model.image_tower.inner
    if image.kind == "huggingface":
        raise UserError(
            "--to open_clip: it has no image towers of transformers (model.image.kind: huggingface). Use --to native"
        )
    if image.kind != "timm":
        # Patch dropout is a way to train and not part of the model; open_clip returns models in training mode.
        return {name: value for name, value in image.open_clip_config().items() if name != "patch_dropout"}
    if image.settings or (hasattr(inner, "pos_embed") and image.image_size != inner.default_cfg["input_size"][-1]):
        raise UserError(
            "--to open_clip: it builds timm's models at their own image size and without model.image.settings. "
            "Use --to native"
        )
    return {"image_size": image.image_size, "timm_model_name": image.name, "timm_pool": "", "timm_proj": "linear"}


def check_text(source: LoadedRun) -> None:
    """Raises UserError for an encoder of transformers that open_clip does not take."""
    from open_clip.hf_configs import arch_dict

    found = source.model.text_tower.inner.config.model_type
    if found not in arch_dict:
        raise UserError(
            f"--to open_clip: takes no {found} as a text tower, only {', '.join(arch_dict)}. Use --to native"
        )
    if source.config.model.text.projection_bias:
        raise UserError("--to open_clip: its projection has no bias (model.text.projection_bias). Use --to native")


def find_activation(config: Any) -> dict[str, bool]:
    """`quick_gelu` for both towers at once, as open_clip has it. Raises UserError where they differ."""
    found = {getattr(tower, "activation", None) for tower in (config.image, config.text)} - {None}
    if len(found) > 1:
        raise UserError(
            "--to open_clip: both towers need the same activation (model.image, model.text). Use --to native"
        )
    return {"quick_gelu": True} if found == {"quick_gelu"} else {}


def rename_weights(source: LoadedRun) -> dict[str, Tensor]:
    """The two towers, the logit scale and bias under open_clip's names."""
    names = {"image_tower.inner.": "visual.", "text_tower.inner.": ""}
    if source.config.model.image.kind == "timm":
        names |= {"image_tower.inner.": "visual.trunk.", "image_tower.projection.": "visual.head.proj."}
    if source.config.model.text.kind != "clip":
        names |= {"text_tower.inner.": "text.transformer.", "text_tower.projection.": "text.proj."}
    weights = {
        new + name.removeprefix(old): value.contiguous()
        for name, value in source.model.state_dict().items()
        for old, new in names.items()
        if name.startswith(old)
    }
    if source.model.logit_bias:
        weights["logit_bias"] = source.model.logit_bias.bias.detach().reshape(())
    return weights | {"logit_scale": cap_log_scale(source)}


def reload(folder: Path) -> Reloaded:
    """What open_clip makes of the folder, also where `hf_model_name` names the place that it is still to get."""
    prepare_torchvision()
    import open_clip
    from open_clip.tokenizer import HFTokenizer

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", **place_text_model(folder))
    model.eval()
    statistics = model.visual.image_mean, model.visual.image_std
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    padding = model.text.config.pad_token_id if isinstance(model, open_clip.CustomTextCLIP) else None

    def tokenize(texts: list[str]) -> tuple[Tensor, Tensor | None]:
        ids = tokenizer(texts)
        return ids, None if padding is None else ids != padding

    def clean(text: str) -> str:
        if isinstance(tokenizer, HFTokenizer):
            return tokenizer.clean_fn(text)
        return text if padding is None else text.replace("!", "")  # which may be id 0, and is then masked

    @torch.no_grad()
    def embed_images(pixels: Tensor) -> Tensor:
        return model.encode_image(normalise(pixels, *statistics), normalize=True)

    @torch.no_grad()
    def embed_texts(texts: list[str]) -> Tensor:
        return model.encode_text(tokenizer(texts), normalize=True)

    return Reloaded(
        library=f"open_clip {importlib.metadata.version('open_clip_torch')}",
        tokenize=tokenize,
        preprocess=preprocess,
        embed_images=embed_images,
        embed_texts=embed_texts,
        logit_scale=model.logit_scale.exp().item(),
        logit_bias=None if model.logit_bias is None else model.logit_bias.item(),
        clean=clean,
    )


def place_text_model(folder: Path) -> dict[str, Any]:
    """Overrides for `create_model_and_transforms` that let a BERT tower's config be found in `folder`."""
    text = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
    here = str(folder / TEXT_MODEL)
    return {"text_cfg": text | {"hf_model_name": here}} if text.get("hf_model_name", here) != here else {}

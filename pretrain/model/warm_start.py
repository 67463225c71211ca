"""Warm start: weights of open_clip, transformers, timm and our own exports into a new model, and what became of each.

`model.warm_start` is a list; each source in turn fills what it has and the model wants, later ones over earlier ones.
Files are read with safetensors or torch's `weights_only`, never as pickled code.
"""

import json
import logging
import math
import pickle
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data_tools.errors import UserError, first_line, suggest
from pretrain.config import ConfigError, ConfigModel
from pretrain.model.blocks import begins_with
from pretrain.model.names import IMAGE_NAMES, TEXT_NAMES, clip_from_huggingface, from_blip
from pretrain.model.settings import (
    describe_native,
    describe_open_clip,
    describe_pixels,
    describe_transformers,
    find_differing,
)
from pretrain.model.towers import POSITION_NAMES, ClipText, Vit
from pretrain.torchvision_ops import prepare_torchvision
from pretrain.world import World

log = logging.getLogger(__name__)

OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
OPEN_CLIP_CONFIG = "open_clip_config.json"
NATIVE_FILE, NATIVE_CONFIG = "model.safetensors", "config.json"
READ_ERRORS = (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError)  # of files missing or broken
# Where a side is from in what no shape shows: its layers, not a projection alone.
UNSEEN = {"image_tower.inner": "image", "text_tower.inner": "text", "fusion": "fusion"}
SCALARS = ("logit_scale", "logit_bias")  # of any two towers: these alone are no warm start
PADDED_IDS = 128  # vocabularies that differ by no more are the same, filled up to a round number


class Source(ConfigModel):
    parts: list[str] = []  # take only what begins with one of these names, such as image_tower; none: all that fits
    other_settings: bool = False  # take the weights also under other settings than they were trained with

    def find_settings(self, model: nn.Module) -> dict[str, Any]:
        """Keys below `model` that the weights were trained with and that no shape shows, as far as the source tells them."""
        return {}


class OpenClipSource(Source):
    """open_clip's weights: a folder or file, or one of its pretrained models by name and tag."""

    kind: Literal["open_clip"]
    name: str  # a folder, a .safetensors, .bin or .pt file, or a model such as ViT-B-16
    tag: str | None = None  # such as laion2b_s34b_b88k; a model's name needs one

    def read(self, model: nn.Module) -> dict[str, Tensor]:
        return rename_open_clip(read_file(self.find()), model)

    def find(self) -> Path:
        path = Path(self.name)
        if path.is_dir():
            return find_file(path, OPEN_CLIP_FILES)
        if path.is_file():
            return path
        prepare_torchvision()
        from open_clip import pretrained

        known = pretrained.get_pretrained_cfg(self.name, self.tag) if self.tag else {}
        if not known:
            tags = ", ".join(pretrained.list_pretrained_tags_by_model(self.name)) or "none: it knows no such model"
            raise ConfigError(f"model.warm_start: open_clip has no '{self.name}' with tag '{self.tag}'. Tags: {tags}")
        return Path(reach(pretrained.download_pretrained, known))

    def find_settings(self, model: nn.Module) -> dict[str, Any]:
        path = Path(self.name)
        if (path / OPEN_CLIP_CONFIG).is_file():
            told = read_json(path / OPEN_CLIP_CONFIG)
            return describe_open_clip(told.get("model_cfg") or {}, told.get("preprocess_cfg") or {}, model.config)
        if path.exists():
            return {}
        from open_clip import get_model_config, pretrained

        shape, pixels = get_model_config(self.name), pretrained.get_pretrained_cfg(self.name, self.tag)
        shape |= {"quick_gelu": shape.get("quick_gelu") or pixels.get("quick_gelu")}
        return describe_open_clip(shape, pixels, model.config)


class HuggingfaceSource(Source):
    """transformers' weights: CLIP and BLIP whole, or of any model that is of a tower's own kind, that tower."""

    kind: Literal["huggingface"]
    name: str  # a folder or hub name

    def read(self, model: nn.Module) -> dict[str, Tensor]:
        import transformers

        config = reach(transformers.AutoConfig.from_pretrained, self.name)
        reader = HUGGINGFACE_READERS.get(config.model_type, read_towers)
        weights = reader(self.name, config, model)
        if not weights:
            raise ConfigError(
                f"model.warm_start: {self.name} is a {config.model_type}, which is neither tower of this model. Towers of "
                "kind huggingface take it: model.image or model.text={kind: huggingface, name: ...}"
            )
        return weights

    def find_settings(self, model: nn.Module) -> dict[str, Any]:
        import transformers

        settings = {}
        try:
            told, _ = transformers.ImageProcessingMixin.get_image_processor_dict(self.name)
        except OSError as error:
            if isinstance(error.__context__, ValueError):
                raise  # there is such a file, but it is no JSON
            told = {}
        if told.get("do_normalize", True):
            settings = describe_pixels(told.get("image_mean"), told.get("image_std"))
        config = transformers.AutoConfig.from_pretrained(self.name)
        for side, nested in (("image", "vision_config"), ("text", "text_config")):
            kind = getattr(model.config, side).kind
            settings |= describe_transformers(getattr(config, nested, config), side, kind)
        return settings


class TimmSource(Source):
    """timm's own weights of an image tower of kind timm."""

    kind: Literal["timm"]
    name: str  # with the tag of the weights, such as vit_base_patch16_224.augreg_in21k

    def read(self, model: nn.Module) -> dict[str, Tensor]:
        prepare_torchvision()
        import timm

        inner = reach(lambda name: timm.create_model(name, pretrained=True, num_classes=0), self.name)
        return {f"image_tower.inner.{name}": value for name, value in inner.state_dict().items()}

    def find_settings(self, model: nn.Module) -> dict[str, Any]:
        import timm

        known = timm.create_model(self.name, num_classes=0).pretrained_cfg  # which also knows the hub's names
        return describe_pixels(known.get("mean"), known.get("std"))


class NativeSource(Source):
    """One of our own exports (`--to native`), or any .safetensors file of our names."""

    kind: Literal["native"]
    path: str

    def read(self, model: nn.Module) -> dict[str, Tensor]:
        path = Path(self.path)
        return read_file(find_file(path, (NATIVE_FILE,)) if path.is_dir() else path)

    def find_settings(self, model: nn.Module) -> dict[str, Any]:
        path = Path(self.path) / NATIVE_CONFIG
        shape = read_json(path).get("model") if path.is_file() else None
        return describe_native(shape, model.config) if shape else {}


WARM_STARTS: dict[str, type[ConfigModel]] = {
    "open_clip": OpenClipSource,
    "huggingface": HuggingfaceSource,
    "timm": TimmSource,
    "native": NativeSource,
}


@dataclass
class Report:
    """What became of each parameter and buffer of the model, and what the sources had besides."""

    loaded: dict[str, int] = field(default_factory=dict)  # name -> number of values
    resized: dict[str, str] = field(default_factory=dict)  # name -> what was done
    fresh: dict[str, int] = field(default_factory=dict)  # name -> number of values; as the seed gave them
    unused: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)  # settings other than a source's, on purpose


def warm_start(model: nn.Module, sources: list[Any], world: World) -> Report:
    """Fill `model` in place from each source in turn, and log the table on the main rank. Collective.

    Raises ConfigError or UserError for a source that cannot be read, that fills nothing, or of another shape.
    """
    report = Report()
    for turn in (True, False):  # the main rank first: what it downloads, the others find
        if world.is_main == turn:
            origins: dict[str, Source] = {}
            for source in sources:
                names = fill(model, source, report)
                origins |= {part: source for part in UNSEEN if any(begins_with(name, part) for name in names)}
            for source in sources:
                sides = [UNSEEN[part] for part, origin in origins.items() if origin is source]
                report.differing += compare_settings(model, source, sides)
        world.barrier()
    filled = report.loaded | report.resized
    report.fresh = {name: value.numel() for name, value in model.state_dict().items() if name not in filled}
    if sources and world.is_main:
        log.info("%s", render_report(report))
    return report


@torch.no_grad()
def fill(model: nn.Module, source: Any, report: Report) -> list[str]:
    """Returns the names of what was filled."""
    own = model.state_dict()  # shares the parameters' memory
    check_parts(source.parts, list(own), "this model has no", hint=True)
    weights = move_layers(model, source.read(model))
    shared = [name for name in weights if name in own]
    if not source.parts and all(name.partition(".")[0] in SCALARS for name in shared):
        scalars = ", ".join(name.partition(".")[0] for name in shared)
        raise ConfigError(
            f"model.warm_start: {source.kind} source: none of its {len(weights)} tensors{scalars and f' but {scalars}'} is in "
            "this model. Set model.image or model.text to a tower that it has"
            + (scalars and f", or its parts to [{scalars}], to take no more")
        )
    check_parts(source.parts, shared, f"the {source.kind} source has nothing for this model's")
    wanted = [name for name in weights if not source.parts or any(begins_with(name, part) for part in source.parts)]
    fitting = [name for name in wanted if name in own]
    for name in fitting:
        value, done = fit(name, weights[name], own[name])
        own[name].copy_(value)
        report.loaded.pop(name, None)
        report.resized.pop(name, None)
        if done:
            report.resized[name] = done
        else:
            report.loaded[name] = value.numel()
    report.unused += [name for name in wanted if name not in own]
    return fitting


def check_parts(parts: list[str], names: list[str], lack: str, hint: bool = False) -> None:
    """Raises ConfigError, which opens with `lack`, for a part that none of the names begins with."""
    part = next((part for part in parts if not any(begins_with(name, part) for name in names)), None)
    if part is None:
        return
    beginnings = {name.rsplit(".", count)[0] for name in names for count in range(name.count(".") + 1)}
    near = suggest(part, sorted(beginnings)) if hint else ""
    valid = sorted({name.partition(".")[0] for name in names})
    raise ConfigError(f"model.warm_start: parts: {lack} '{part}'.{near} Names begin with: {', '.join(valid) or 'none'}")


def compare_settings(model: nn.Module, source: Any, sides: list[str]) -> list[str]:
    """What these sides have otherwise than where their weights come from: a line each.

    Raises ConfigError for it unless the source is to be taken all the same, and for a source whose settings are no settings.
    """
    if not sides:
        return []
    try:
        settings = source.find_settings(model)
        differing = find_differing(model, {key: at for key, at in settings.items() if key.partition(".")[0] in sides})
    except UserError:
        raise
    except Exception as error:  # whatever is in other people's files
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(
            f"model.warm_start: cannot read the settings of the {source.kind} source: {reason}"
        ) from error
    if differing and not source.other_settings:
        needed = " and ".join(f"model.{key}={theirs}" for key, (theirs, _) in differing.items())
        raise ConfigError(
            f"model.warm_start: the {source.kind} source's weights were trained with {needed}; else they compute something "
            "else. Set that, leave the tower out (parts), or add other_settings: true to the source"
        )
    return [f"model.{key}: {theirs} there, {ours} here" for key, (theirs, ours) in differing.items()]


def move_layers(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layers beyond the text tower's last go to a fusion that has layers of that kind behind it (ALBEF's split)."""
    fusion = model.config.fusion
    if fusion is None or fusion.kind != "med" or fusion.layers is None:
        return weights
    prefix, moved = "text_tower.inner.encoder.layer.", {}
    start = len(model.text_tower.bert_layers)
    for name, value in weights.items():
        number, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and int(number) >= start:
            name = f"fusion.layers.{int(number) - start}.{rest}"
        moved[name] = value
    return moved


def fit(name: str, value: Tensor, own: Tensor) -> tuple[Tensor, str]:
    """`value` in the shape of `own`, and what was done to it ('' for nothing). Raises ConfigError if it cannot be."""
    if value.shape == own.shape:
        return value, ""
    change = f"{list(value.shape)} -> {list(own.shape)}"
    differing = [axis for axis in range(own.ndim) if value.ndim == own.ndim and value.shape[axis] != own.shape[axis]]
    if value.numel() == own.numel() and value.ndim != own.ndim:  # a leading dimension of 1 more or less
        return value.reshape(own.shape), f"{change}, the same values"
    if len(differing) == 1 and is_position(name):
        axis = differing[0]
        rows, count = value.movedim(axis, 0), own.shape[axis]
        flat = rows.reshape(len(rows), -1).float()
        if begins_with(name, "image_tower"):
            resized, how = resize_grid(flat, count, name), "bicubic"
        else:
            resized, how = resize_line(flat, count), "cut" if count < len(flat) else "linear"
        return resized.reshape(count, *rows.shape[1:]).movedim(0, axis), f"{change}, {how}"
    if differing == [0] and name.endswith("embeddings.weight") and abs(len(value) - len(own)) <= PADDED_IDS:
        count = min(len(value), len(own))
        return torch.cat([value[:count].to(own.dtype), own[count:]]), f"{change}, the first {count} ids"
    raise ConfigError(
        f"model.warm_start: {name} is {list(value.shape)} there and {list(own.shape)} here. Give this model that shape "
        "(width, layers, patch_size, tokenizer), or leave the part out: parts"
    )


def is_position(name: str) -> bool:
    """Whether the tensor has a row (or column) a place: learnt positions, by their names in the libraries."""
    last = [part for part in name.split(".") if part != "weight"][-1]
    return last in POSITION_NAMES


def resize_grid(rows: Tensor, count: int, name: str) -> Tensor:
    """Positions [n,D] of a square grid to `count` of them: bicubic and antialiased, as open_clip does.

    Tokens before the patches (none, a class token, registers) keep theirs. Raises ConfigError where no square fits.
    """
    for before in (1, 0, *range(2, 17)):
        old, new = math.isqrt(max(0, len(rows) - before)), math.isqrt(max(0, count - before))
        if old > 0 and new > 0 and old**2 + before == len(rows) and new**2 + before == count:
            grid = rows[before:].T.reshape(1, -1, old, old)
            grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
            return torch.cat([rows[:before], grid.flatten(2)[0].T])
    raise ConfigError(f"model.warm_start: {name}: {len(rows)} positions make no square grid to resize to {count}")


def resize_line(rows: Tensor, count: int) -> Tensor:
    """Positions [n,D] of a text: the first `count`, or, for more, stretched linearly, as open_clip does."""
    if count <= len(rows):
        return rows[:count]
    return F.interpolate(rows.T[None], size=count, mode="linear", align_corners=False)[0].T


def rename_open_clip(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """open_clip's names (CLIP or CustomTextCLIP) as ours."""
    if isinstance(weights.get("state_dict"), dict):  # a training checkpoint
        weights = weights["state_dict"]
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    image = {"visual.": "image_tower.inner."}
    if model.config.image.kind == "timm":
        image = {"visual.trunk.": "image_tower.inner.", "visual.head.proj.": "image_tower.projection."}
    text = {"text.": "text_tower.inner.", "": "text_tower.inner."}
    if model.config.text.kind != "clip":
        text = {"text.transformer.": "text_tower.inner.", "text.proj.": "text_tower.projection."}
    scalars = {"logit_scale": "logit_scale.log_scale", "logit_bias": "logit_bias.bias"}
    renamed = {}
    for name, value in weights.items():
        if name in scalars:
            renamed[scalars[name]] = value.reshape(1)
            continue
        names = image if name.startswith("visual.") else text
        theirs = next((theirs for theirs in names if name.startswith(theirs)), None)
        renamed[name if theirs is None else names[theirs] + name.removeprefix(theirs)] = value
    return renamed


def read_clip(name: str, config: Any, model: nn.Module) -> dict[str, Tensor]:
    """transformers' CLIPModel, into open_clip's towers or its own. A side that is no CLIP here keeps its names."""
    import transformers

    theirs = read_pretrained(transformers.CLIPModel, name)
    weights = {"logit_scale.log_scale": theirs["logit_scale"].reshape(1)}
    for tower, prefix, projection, own_class, own_projection, names in (
        ("image_tower", "vision_model.", "visual_projection.weight", Vit, "proj", IMAGE_NAMES),
        ("text_tower", "text_model.", "text_projection.weight", ClipText, "text_projection", TEXT_NAMES),
    ):
        side = {key.removeprefix(prefix): value for key, value in theirs.items() if key.startswith(prefix)}
        inner = getattr(model, tower).inner
        if isinstance(getattr(model, tower), own_class):
            side = clip_from_huggingface(side, names) | {own_projection: theirs[projection].T}
            weights |= {f"{tower}.inner.{key}": value for key, value in side.items()}
        elif getattr(inner, "config", None) and inner.config.model_type.startswith("clip_"):
            nested = prefix if hasattr(inner, prefix[:-1]) else ""  # transformers 4 names the whole once more
            weights |= {f"{tower}.inner.{nested}{key}": value for key, value in side.items()}
            weights[f"{tower}.projection.weight"] = theirs[projection]
        else:
            weights |= {key: value for key, value in theirs.items() if key.startswith(prefix) or key == projection}
    return weights


def read_blip(name: str, config: Any, model: nn.Module) -> dict[str, Tensor]:
    """transformers' BlipForImageTextRetrieval, into a BLIP vision tower, a BERT tower and a `med` fusion."""
    import transformers

    return from_blip(read_pretrained(transformers.BlipForImageTextRetrieval, name))


def read_towers(name: str, config: Any, model: nn.Module) -> dict[str, Tensor]:
    """Any other model of transformers: into the towers that are made by the same kind of config."""
    weights = {}
    for tower, side in (("image_tower", "vision_config"), ("text_tower", "text_config")):
        inner = getattr(model, tower).inner
        their_type = getattr(config, side, config).model_type
        if getattr(getattr(inner, "config", None), "model_type", None) == their_type:
            theirs = read_pretrained(type(inner), name)
            weights |= {f"{tower}.inner.{key}": value for key, value in theirs.items()}
    return weights


HUGGINGFACE_READERS = {"clip": read_clip, "blip": read_blip}  # by model_type; others go by the towers' own classes


def read_pretrained(model_class: Any, name: str) -> dict[str, Tensor]:
    """What the folder or hub name holds, as this class of transformers names it; what it would make up is left out."""
    theirs, told = reach(lambda place: model_class.from_pretrained(place, output_loading_info=True), name)
    made_up = set(told["missing_keys"])
    return {key: value.float() for key, value in theirs.state_dict().items() if key not in made_up}


def reach(get: Any, name: Any) -> Any:
    """`get(name)`, a missing or broken folder or file, or a hub that cannot be reached, told in one line."""
    try:
        return get(name)
    except (*READ_ERRORS, ValueError) as error:
        reason = first_line(error).rstrip(".")
        raise ConfigError(
            f"model.warm_start: cannot load '{name}': {reason}. Give a folder that is whole, or a name that this machine can "
            "reach"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}. Give a folder that is whole") from None


def find_file(folder: Path, names: tuple[str, ...]) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder}: holds no {' or '.join(names)}. Give the folder of an export, or the file itself")
    return found


def read_file(path: Path) -> dict[str, Any]:
    """Tensors by name of a .safetensors file, or of a torch file without code in it."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except READ_ERRORS as error:
        reason = first_line(error)
        raise UserError(
            f"{path}: cannot read the weights: {reason}. Give a .safetensors file or a plain state dict"
        ) from None
    if not isinstance(weights, dict):
        raise UserError(f"{path}: holds a {type(weights).__name__}, not tensors by name")
    return weights


def render_report(report: Report) -> str:
    """A table: a line for each part and state, then each resized tensor, then what is fresh or unused in a filled part."""
    lines = [f"{'warm start':<12}{'part':<16}{'tensors':>8}{'values':>16}"]
    sizes = {"loaded": report.loaded, "fresh": report.fresh}
    for state, names in sizes.items():
        for part, count in Counter(name.partition(".")[0] for name in names).items():
            values = sum(size for name, size in names.items() if begins_with(name, part))
            lines.append(f"{state:<12}{part:<16}{count:>8}{values:>16,}")
    lines += [f"{'resized':<12}{name}: {done}" for name, done in report.resized.items()]
    lines += [f"{'differs':<12}{line}" for line in report.differing]
    parts = {name.partition(".")[0] for name in report.loaded}
    lines += [f"{'fresh':<12}{name}" for name in report.fresh if name.partition(".")[0] in parts]
    lines += [f"{'not used':<12}{name}" for name in report.unused]
    return "\n".join(lines)

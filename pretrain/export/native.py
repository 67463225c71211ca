"""The native format: the whole model, fusion and match head included, and `load`, which gives it back ready to use.

    from pretrain.export import load

    loaded = load("my-model")
    scores = loaded.embed_images([picture]) @ loaded.embed_texts(["a dog", "a cat"]).T
    likely = loaded.match([picture], ["a dog"])

DIR/model.safetensors holds the fp32 weights by parameter name, DIR/config.json the model's config, DIR/tokenizer/ the
tokenizer's files where it is not the CLIP one that open_clip bundles.

Shape legend: n pictures or texts, P pairs, E embedding, L text tokens, S the side that the model takes.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_tools.errors import UserError
from data_tools.files import write_json_atomic
from pretrain import __version__
from pretrain.config import check_config
from pretrain.data.decode import eval_crop, eval_pixels
from pretrain.data.text import Tokenizer, build_tokenizer
from pretrain.export.card import Guide
from pretrain.export.compare import Reloaded
from pretrain.model.model import ImageTextModel, ModelConfig, build_model
from pretrain.model.towers import unit
from pretrain.restore import LoadedRun, set_weights

FORMAT = 1
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer"
ROWS_AT_A_TIME = 64  # pictures, texts or pairs that go through the model together

Pictures = Sequence[bytes | Image.Image] | Tensor  # encoded files, Pillow pictures, or [n,3,S,S] uint8 of `preprocess`

USAGE = """
from pretrain.export import load

loaded = load("{name}")
pictures = [open("picture.jpg", "rb").read()]
print(loaded.embed_images(pictures) @ loaded.embed_texts(["a dog", "a cat"]).T)
"""
USAGE_MATCH = """print(loaded.match(pictures, ["a dog"]))  # the probability that they belong together
"""


@dataclass(frozen=True)
class LoadedModel:
    """A pretrained model with what goes before it: its tokenizer, and its evaluation transform for pictures.

    To fine-tune, train `model`: it is an ordinary module in evaluation mode, and these two keep gradients:

        loaded.model.encode_image(pixels)    # [n,3,S,S] uint8 -> tokens [n,N,D], pooled [n,E]
        loaded.model.encode_text(ids, mask)  # of loaded.tokenizer(texts) -> tokens [n,L,D], pooled [n,E]

    The methods here run without gradients, any number of rows at a time.
    """

    model: ImageTextModel
    tokenizer: Tokenizer  # tokenizer(texts) -> ids [n,L] int64, mask [n,L] bool

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.log_scale.device

    def preprocess(self, picture: bytes | Image.Image) -> Tensor:
        """[3,S,S] uint8: shorter side to S, bicubic, then the centre. The model itself normalises.

        Raises BadSample for bytes that are not a whole picture.
        """
        size = self.config.image.image_size
        if isinstance(picture, bytes):
            return eval_pixels(picture, size)
        return eval_crop(np.array(picture.convert("RGB")), size)

    def embed_images(self, pictures: Pictures) -> Tensor:
        """[n,E] float32, unit norm."""
        return self.embed(pictures, lambda rows: self.model.encode_image(self.stack(rows)).pooled)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """[n,E] float32, unit norm. Dot products with `embed_images` are cosines; `logit_scale` makes them logits."""
        return self.embed(texts, lambda rows: self.model.encode_text(*self.read(rows)).pooled)

    @property
    def logit_scale(self) -> float:
        """The learnt factor from cosines to logits."""
        return self.model.logit_scale().item()

    def match(self, pictures: Pictures, texts: Sequence[str]) -> Tensor:
        """[P] float32: the probability that picture i and text i belong together, by fusion and match head.

        It is that of training, where two of three pairs are false; use it to rank rather than with a fixed threshold.
        Raises ValueError for a model without match head, or when there are not as many pictures as texts.
        """
        return self.match_logits(pictures, texts).softmax(dim=1)[:, 1]

    @torch.no_grad()
    def match_logits(self, pictures: Pictures, texts: Sequence[str]) -> Tensor:
        """[P,2] float32: the logits (mismatch, match) of picture i with text i. Raises as `match` does."""
        if self.model.match_head is None:
            raise ValueError(
                "this model was trained without fusion or match head (model.fusion), so it cannot match pairs"
            )
        if len(pictures) != len(texts):
            raise ValueError(f"{len(pictures)} pictures and {len(texts)} texts do not make pairs")
        logits = []
        for start in range(0, len(texts), ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            ids, mask = self.read(texts[rows])
            text, image = self.model.encode_text(ids, mask), self.model.encode_image(self.stack(pictures[rows]))
            logits.append(self.model.match_pairs(text.tokens, mask, image.tokens))
        return torch.cat(logits) if logits else torch.empty(0, 2)

    @torch.no_grad()
    def embed(self, rows: Pictures | Sequence[str], encode: Callable[[Any], Tensor]) -> Tensor:
        parts = [unit(encode(rows[start : start + ROWS_AT_A_TIME])) for start in range(0, len(rows), ROWS_AT_A_TIME)]
        return torch.cat(parts) if parts else torch.empty(0, self.config.embed_dim)

    def stack(self, pictures: Pictures) -> Tensor:
        """[n,3,S,S] uint8 on the model's device."""
        if not isinstance(pictures, Tensor):
            pictures = torch.stack([self.preprocess(picture) for picture in pictures])
        return pictures.to(self.device)

    def read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids [n,L] and mask [n,L] on the model's device. Raises TypeError for a single text."""
        if isinstance(texts, str):
            raise TypeError("give a list of texts; a single text would be taken letter by letter")
        ids, mask = self.tokenizer(list(texts))
        return ids.to(self.device), mask.to(self.device)


def load(directory: str | Path, device: str | torch.device = "cpu") -> LoadedModel:
    """The model of a native export, in fp32 and evaluation mode, with tokenizer and transform. Nothing is downloaded.

    Raises UserError, in one line, for a folder that is not a whole native export.
    """
    folder = Path(directory)
    config = read_config(folder)
    tokenizer = build_tokenizer(config.tokenizer, config.text.context_length)
    model = build_model(config, tokenizer).eval()
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot read the weights: {error}") from None
    set_weights(model, weights, f"{folder / WEIGHTS}: does not fit {CONFIG}")
    return LoadedModel(model.to(device), tokenizer)


def read_config(folder: Path) -> ModelConfig:
    """The model's config, its tokenizer pointing into `folder`."""
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a native export, cannot read its {CONFIG}: {error}") from None
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise UserError(
            f"{path}: not a native export of format {FORMAT}. Write one: python -m pretrain export --to native"
        )
    config = check_config(settings.get("model"), ModelConfig, f"{path}: model")
    if config.tokenizer.kind == "huggingface":
        if not (folder / TOKENIZER).is_dir():  # transformers would take the path for the name of a hub repository
            raise UserError(f"{folder / TOKENIZER}: the tokenizer's folder is missing. Restore it from a copy")
        tokenizer = config.tokenizer.model_copy(update={"name": str(folder / TOKENIZER)})
        config = config.model_copy(update={"tokenizer": tokenizer})
    return config


def write(source: LoadedRun, folder: Path, final: Path) -> Guide:
    """Fill `folder`; it does not depend on where it will lie."""
    config = source.config.model
    settings = portable_settings(source)
    if config.tokenizer.kind == "huggingface":
        source.tokenizer.inner.save_pretrained(folder / TOKENIZER)
        settings["tokenizer"]["name"] = TOKENIZER
    write_json_atomic(
        folder / CONFIG, {"format": FORMAT, "pretrain": __version__, "step": source.step, "model": settings}
    )
    save_file({name: value.contiguous() for name, value in source.model.state_dict().items()}, folder / WEIGHTS)
    usage = USAGE.format(name=final.name) + (USAGE_MATCH if config.fusion and config.match_head else "")
    return Guide(None, usage, [])


def portable_settings(source: LoadedRun) -> dict[str, Any]:
    """The model's config without what is for training only, and with transformers' configs in it instead of their places."""
    settings = source.config.model.model_dump(exclude={"warm_start", "freeze", "checkpoint_activations", "compile"})
    for side, tower in (("image", source.model.image_tower), ("text", source.model.text_tower)):
        if settings[side]["kind"] == "huggingface":
            config = tower.inner.config.to_diff_dict()
            kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
            settings[side] |= {"name": None, "config": kept}
    return settings


def reload(folder: Path) -> Reloaded:
    """What `load` gives."""
    loaded = load(folder)
    return Reloaded(
        library=f"pretrain {__version__}",
        tokenize=loaded.tokenizer,
        preprocess=lambda picture: loaded.config.image.normalise(loaded.preprocess(picture)),
        embed_images=loaded.embed_images,
        embed_texts=loaded.embed_texts,
        logit_scale=loaded.logit_scale,
        logit_bias=loaded.model.logit_bias().item() if loaded.model.logit_bias else None,
        match_logits=loaded.match_logits,
    )

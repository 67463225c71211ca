"""CLIP-scores: the cosine of a picture and a caption as an exported model embeds them. `data_tools.score` runs it.

    scorer = load_scorer("my-export", "auto")
    [[0.31, 0.27]] == scorer.score([scorer.prepare(encoded)], [["a dog", "a cat"]])

Shape legend: n pictures, t texts, E embedding, S the side that the model takes.
"""

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data_tools.errors import UserError, suggest
from pretrain import __version__
from pretrain.data.decode import BadSample, decode_image, eval_crop
from pretrain.export import native, open_clip
from pretrain.model.towers import unit
from pretrain.torchvision_ops import prepare_torchvision

__all__ = ["BadSample", "Scorer", "load_scorer"]

LOCAL, HUB = "local-dir:", "hf-hub:"
CHARACTERS_A_TOKEN = 32
"""No more of a caption is tokenised than so many characters for each token that the model reads."""
_PROBE = ["A photo of a dog, 3 cats & crème brûlée; it's 7:30!"]


@dataclass(frozen=True)
class Scorer:
    """A model on its device, with what goes before it. `identity` is a function of the weights and of all that."""

    library: str  # name and version
    identity: str  # SHA-256, hexadecimal
    device: torch.device
    context_length: int
    preprocess: Callable[[np.ndarray], Tensor]  # [H,W,3] uint8 -> [3,S,S]; safe in threads
    embed_images: Callable[[Tensor], Tensor]  # [n,3,S,S] on the device -> [n,E] unit norm
    embed_texts: Callable[[list[str]], Tensor]  # t texts -> [t,E] unit norm

    def prepare(self, encoded: bytes) -> Tensor:
        """[3,S,S] for `score`. Safe in threads. Raises BadSample for bytes that are not a whole picture."""
        return self.preprocess(decode_image(encoded))

    @torch.inference_mode()
    def score(self, pictures: Sequence[Tensor], captions: Sequence[Sequence[str]]) -> list[list[float]]:
        """The cosine of each prepared picture with each of its captions, in [-1, 1], computed in fp32.

        At most as many texts as there are pictures go through the model together. Raises UserError where the device's
        memory does not do, and for a model that gives no numbers.
        """
        texts = [self._cut(text) for own in captions for text in own]
        if not texts:
            return [[] for _ in captions]
        # cuDNN's default for convolutions is a precision of ten bits, and whichever algorithm is quickest today.
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        try:
            with exact:
                image = self.embed_images(torch.stack(list(pictures)).to(self.device)).float()
                rows = range(0, len(texts), len(pictures))
                text = torch.cat([self.embed_texts(texts[row : row + len(pictures)]) for row in rows]).float()
            picture_of = torch.repeat_interleave(torch.tensor([len(own) for own in captions]))
            cosines = (image[picture_of.to(self.device)] * text).sum(1).clamp(-1, 1).cpu()
        except torch.OutOfMemoryError:
            raise UserError(
                f"{self.device}: {len(pictures)} pictures at a time do not fit its memory. Give a smaller --batch-size"
            ) from None
        if not cosines.isfinite().all():
            raise UserError("the model gives no numbers (NaN) for a pair: its weights are damaged. Export it again")
        parts = cosines.split([len(own) for own in captions])
        return [part.tolist() for part in parts]

    def _cut(self, text: str) -> str:
        """What is tokenised: text that can be encoded, and no more of it than any token could come from."""
        return text[: CHARACTERS_A_TOKEN * self.context_length].encode("utf-8", "replace").decode()


def load_scorer(model: str, device: str = "auto") -> Scorer:
    """The model of a native export, or one that open_clip knows, in fp32 and evaluation mode.

    Args:  model = a folder (native or open_clip's; the latter also as local-dir:DIR), or open_clip's NAME:TAG or
           hf-hub:ORG/NAME. Such names are found in the cache of an earlier download, or downloaded unless
           HF_HUB_OFFLINE=1. device = auto, cpu or cuda.
    Raises UserError, in one line, when there is no such model or device.
    """
    place = choose_device(device)
    folder = Path(model.removeprefix(LOCAL))
    if model.startswith(LOCAL) or (folder / open_clip.CONFIG).is_file():
        if not (folder / open_clip.CONFIG).is_file():
            raise UserError(f"--model {model}: no {open_clip.CONFIG} there. Give a folder of open_clip's")
        overrides = open_clip.place_text_model(folder) if (folder / open_clip.TEXT_MODEL).is_dir() else {}
        return load_open_clip(model, f"{LOCAL}{folder}", None, overrides, place)
    if folder.is_dir():
        return load_native(folder, place)
    if model.startswith(HUB):
        return load_open_clip(model, model, None, {}, place)
    name, _, tag = model.partition(":")
    prepare_torchvision()
    from open_clip import list_models, list_pretrained_tags_by_model

    if name not in list_models() or tag not in list_pretrained_tags_by_model(name):
        known = list_pretrained_tags_by_model(name) if name in list_models() else []
        near = suggest(tag, known) if known else suggest(name, list_models())
        raise UserError(
            f"--model {model}: neither a folder nor a pretrained model of open_clip.{near} Give a folder that `python "
            "-m pretrain export` wrote, local-dir:DIR, or open_clip's NAME:TAG"
            + (f", with a tag among: {', '.join(known)}" if known else "")
        )
    return load_open_clip(model, name, tag, {}, place)


def choose_device(device: str) -> torch.device:
    """Raises UserError for a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here. Give --device cpu")
    return torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))


def load_native(folder: Path, device: torch.device) -> Scorer:
    loaded = native.load(folder, device)
    model, config = loaded.model, loaded.config

    def embed_texts(texts: list[str]) -> Tensor:
        return unit(model.encode_text(*loaded.read(texts)).pooled)

    # Where the tokenizer lies says nothing of the model; its ids do.
    settings = config.model_dump(exclude={"tokenizer"})
    return Scorer(
        library=f"pretrain {__version__}",
        identity=identify(model, settings, loaded.tokenizer(_PROBE)[0]),
        device=device,
        context_length=loaded.tokenizer.context_length,
        preprocess=lambda pixels: eval_crop(pixels, config.image.image_size),
        embed_images=lambda pixels: unit(model.encode_image(pixels).pooled),
        embed_texts=embed_texts,
    )


def load_open_clip(asked: str, name: str, tag: str | None, overrides: dict[str, Any], device: torch.device) -> Scorer:
    """`name`, `tag` and `overrides` as open_clip takes them; `asked` is what an error names."""
    prepare_torchvision()
    from open_clip import create_model_from_pretrained, get_tokenizer

    logging.disable(logging.ERROR)  # it logs what it then raises
    try:
        model, transform = create_model_from_pretrained(name, tag, device=device, **overrides)
        tokenizer = get_tokenizer(name)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:  # with which open_clip refuses
        reason = " ".join(str(error).split())
        raise UserError(f"--model {asked}: open_clip cannot load it: {reason}") from None
    finally:
        logging.disable(logging.NOTSET)
    model.eval()
    length = getattr(tokenizer, "context_length", None) or model.context_length
    return Scorer(
        library=f"open_clip {importlib.metadata.version('open_clip_torch')}",
        identity=identify(model, repr(transform), tokenizer(_PROBE)),
        device=device,
        context_length=length,
        preprocess=lambda pixels: transform(Image.fromarray(pixels)),
        embed_images=lambda pixels: model.encode_image(pixels, normalize=True),
        embed_texts=lambda texts: model.encode_text(tokenizer(texts).to(device), normalize=True),
    )


def identify(model: nn.Module, settings: Any, probe: Tensor) -> str:
    """SHA-256 over the weights, the settings and what the tokenizer makes of a text."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(repr(probe.tolist()).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

"""A frozen teacher for distillation: an open_clip or native export that reads the batches of the run.

It is no part of the trained model: not in the optimizer, not sharded, not in checkpoints. Every rank holds it whole.

Shape legend: B pairs, E the teacher's embedding, L text tokens, H/W pixels.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data_tools.errors import UserError, first_line
from pretrain.config import ConfigError
from pretrain.contract import Batch, TeacherOutput
from pretrain.data.text import Tokenizer
from pretrain.export import native
from pretrain.export.open_clip import CONFIG as OPEN_CLIP_CONFIG
from pretrain.export.open_clip import place_text_model
from pretrain.losses import DistillConfig
from pretrain.model.towers import normalise, unit
from pretrain.model.warm_start import OPEN_CLIP_FILES, find_file
from pretrain.torchvision_ops import prepare_torchvision

LONG = 64  # tokens: more than any probe has
PROBES = ["a", "a dog", "Red!", "1990's", "caf\u00e9", "left of two squares"]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """`teacher(batch)` gives its embeddings of the batch, without gradients."""

    image_size: int  # pixels of a side
    encode_image: Callable[[Tensor], Tensor]  # pixels [B,3,H,W], 0 to 255 -> [B,E]
    encode_text: Callable[[Tensor, Tensor], Tensor]  # ids and mask [B,L] -> [B,E]
    tokenize: Callable[[list[str]], Tensor]  # n texts -> ids [n,context_length]
    logit_scale: float

    @functools.cached_property
    def padding(self) -> Tensor:
        """[context_length] ids of no text: its end is padding."""
        return self.tokenize([""])[0]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherOutput:
        """Its own size and normalisation of the batch's pixels; the ids as they are, filled up to its length."""
        pixels = batch.image.float()
        if pixels.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255)
        missing = len(self.padding) - batch.ids.shape[1]
        ids = F.pad(batch.ids, (0, missing), value=self.padding[-1].item())
        mask = F.pad(batch.mask, (0, missing))
        image, text = unit(self.encode_image(pixels)), unit(self.encode_text(ids, mask))
        return TeacherOutput(image, text, torch.full_like(image[:1, 0], self.logit_scale))


def build_teacher(
    config: DistillConfig, tokenizer: Tokenizer, embed_dim: int, device: torch.device, dtype: torch.dtype
) -> Teacher:
    """The teacher in evaluation mode, its weights in `dtype`. Nothing is downloaded.

    Raises ConfigError or UserError, in one line, for a folder that is none, and for a teacher that reads other token ids.
    """
    folder = Path(config.teacher)
    if (folder / OPEN_CLIP_CONFIG).is_file():
        teacher = load_open_clip(folder, device, dtype)
    elif (folder / native.CONFIG).is_file():
        teacher = load_native(folder, device, dtype)
    else:
        raise ConfigError(
            f"losses.distill.teacher: {folder} is no export. Write one: python -m pretrain export --to open_clip or native"
        )
    its = teacher.tokenize(PROBES)
    length = its.shape[1]
    if tokenizer.context_length > length:
        raise ConfigError(
            f"losses.distill.teacher: it reads {length} tokens at most. Set model.text.context_length={length}"
        )
    # At the teacher's length, whatever the model's: few probes fit into a short one, or none.
    own = dataclasses.replace(tokenizer, context_length=length)(PROBES)[0]
    whole = (
        dataclasses.replace(tokenizer, context_length=LONG)(PROBES)[1].sum(1) <= length
    )  # the probes that are not cut
    if not whole.any() or not torch.equal(own[whole], its[whole]):
        raise ConfigError(
            "losses.distill.teacher: it has another tokenizer than the model. Set model.tokenizer to the teacher's"
        )
    if config.cosine:
        size = teacher.encode_image(torch.zeros(1, 3, teacher.image_size, teacher.image_size, device=device)).shape[1]
        if size != embed_dim:
            raise ConfigError(
                f"losses.distill.cosine: the teacher's embeddings have {size} numbers, the model's {embed_dim}. Set "
                f"model.embed_dim={size}, or cosine=0"
            )
    return teacher


def load_native(folder: Path, device: torch.device, dtype: torch.dtype) -> Teacher:
    loaded = native.load(folder, device)
    scale, model = loaded.logit_scale, loaded.model.to(dtype).requires_grad_(False)
    return Teacher(
        loaded.config.image.image_size,
        lambda pixels: model.encode_image(pixels).pooled,
        lambda ids, mask: model.encode_text(ids, mask).pooled,
        lambda texts: loaded.tokenizer(texts)[0],
        scale,
    )


def load_open_clip(folder: Path, device: torch.device, dtype: torch.dtype) -> Teacher:
    prepare_torchvision()
    from open_clip import create_model_and_transforms, get_tokenizer

    find_file(folder, OPEN_CLIP_FILES)  # without weights, open_clip would give a teacher of random ones
    try:
        model, *_ = create_model_and_transforms(f"local-dir:{folder}", **place_text_model(folder))
        tokenize = get_tokenizer(f"local-dir:{folder}")
    except Exception as error:  # each broken file has its own in open_clip
        raise UserError(
            f"{folder}: open_clip cannot load it: {type(error).__name__}: {first_line(error)}. Export it again"
        ) from None
    model = model.eval().requires_grad_(False)
    scale = model.logit_scale.exp().item()
    model = model.to(device, dtype)
    statistics = [model.visual.preprocess_cfg[name] for name in ("mean", "std")]
    size = model.visual.image_size
    return Teacher(
        size[0] if isinstance(size, tuple | list) else size,
        lambda pixels: model.encode_image(normalise(pixels, *statistics).to(dtype)),
        lambda ids, mask: model.encode_text(ids),  # which finds its padding by its id
        tokenize,
        scale,
    )

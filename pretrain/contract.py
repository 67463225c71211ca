"""The two dataclasses on which every part agrees: what the loader yields and what the model returns.

Shape legend: B pairs per rank, L text tokens, E embedding, P match pairs, T tokens to predict, V ids, H/W pixels,
K candidates.
"""

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Identity(NamedTuple):
    """Which picture and which caption each row holds, so that true pairs are known wherever they meet."""

    image_id: Tensor  # [B] int64, equal for the same picture
    text_id: Tensor  # [B] int64, equal for the same caption text
    true_text_id: Tensor  # [B,C] int64, of all captions of the picture; repeated to fill the row

    def rows(self, start: int, stop: int) -> "Identity":
        return Identity(*(part[start:stop] for part in self))

    def append(self, other: "Identity") -> "Identity":
        """These rows and then the other ones, with room for the captions of both."""
        width = max(self.true_text_id.shape[1], other.true_text_id.shape[1])
        true = [ids[:, :1].repeat(1, width) for ids in (self.true_text_id, other.true_text_id)]
        for filled, ids in zip(true, (self.true_text_id, other.true_text_id), strict=True):
            filled[:, : ids.shape[1]] = ids
        return Identity(
            torch.cat([self.image_id, other.image_id]), torch.cat([self.text_id, other.text_id]), torch.cat(true)
        )


@dataclass
class Batch:
    """One rank's pairs of one global batch."""

    image: Tensor  # [B,3,H,W] uint8, of whatever memory format; normalised on the device, by the model
    ids: Tensor  # [B,L] int64 token ids
    mask: Tensor  # [B,L] bool, True = a real token
    image_id: Tensor  # [B] int64, equal for the same picture
    text_id: Tensor  # [B] int64, equal for the same caption text
    true_text_id: (
        Tensor  # [B,C] int64, of all captions of the picture, the drawn one among them; repeated to fill the row
    )
    position: np.ndarray  # [B] int64 places in the run's endless order of samples; stays on the host
    keys: list[str]  # sample keys, for naming what went wrong
    extra: dict[str, list[Any]] = field(default_factory=dict)  # [B] decoded, by name: what `data.fields` asks for

    @property
    def identity(self) -> Identity:
        return Identity(self.image_id, self.text_id, self.true_text_id)

    def rows(self, start: int, stop: int) -> "Batch":
        """Some of the rows: a micro-batch."""
        values = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "extra"}
        extra = {name: column[start:stop] for name, column in self.extra.items()}
        return Batch(**{name: value[start:stop] for name, value in values.items()}, extra=extra)

    def to(self, device: torch.device) -> "Batch":
        """Copy the tensors to `device` (asynchronously where they are pinned)."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return Batch(**{k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in values.items()})


class TokenPredictions(NamedTuple):
    """T tokens to predict, of whatever samples; no padding among them."""

    logits: Tensor  # [T,V] over the vocabulary
    labels: Tensor  # [T] int64
    weight: Tensor  # [] of each token: world size / tokens of the global batch


class TeacherOutput(NamedTuple):
    """What a frozen teacher says of the same pairs. Its width E' need not be the model's."""

    image_embed: Tensor  # [B,E'] unit norm
    text_embed: Tensor  # [B,E'] unit norm
    logit_scale: Tensor  # [1]


class Candidates(NamedTuple):
    """Pairs that all ranks compare theirs with, the same on every rank."""

    image_embed: Tensor  # [K,E] unit norm
    text_embed: Tensor  # [K,E] unit norm
    identity: Identity  # of the K pairs

    def rows(self, start: int, stop: int) -> "Candidates":
        return Candidates(self.image_embed[start:stop], self.text_embed[start:stop], self.identity.rows(start, stop))

    def append(self, other: "Candidates") -> "Candidates":
        return Candidates(
            torch.cat([self.image_embed, other.image_embed]),
            torch.cat([self.text_embed, other.text_embed]),
            self.identity.append(other.identity),
        )


class MomentumOutput(NamedTuple):
    """What the momentum towers say of the same pairs, without gradients."""

    image_embed: Tensor  # [B,E] unit norm
    text_embed: Tensor  # [B,E] unit norm
    candidates: Candidates  # the global batch, and after it the queue, both by the momentum towers
    alpha: float  # share of the soft targets in this step


@dataclass
class ModelOutput:
    """What the losses consume. The match part is None for a model without fusion."""

    image_embed: Tensor  # [B,E] unit norm, float32 or better
    text_embed: Tensor  # [B,E] unit norm, float32 or better
    logit_scale: Tensor  # [1] the factor itself, already exponentiated and clamped
    logit_bias: Tensor | None = None  # [1] added to every similarity, where the model has one (sigmoid loss)
    identity: Identity | None = None  # of the B pairs
    match_logits: Tensor | None = None  # [P,2] columns: mismatch, match
    match_labels: Tensor | None = None  # [P] int64, 1 = a true pair
    match_weight: Tensor | None = None  # [P] sums to the world size over all pairs of all ranks; 0 = does not count
    captioning: TokenPredictions | None = None  # each caption's next tokens, where the model has a head for them
    masked_language: TokenPredictions | None = None  # masked tokens of the captions, likewise
    teacher: TeacherOutput | None = None  # for distillation
    momentum: MomentumOutput | None = None  # for the momentum loss
    text_tokens: Tensor | None = None  # [B,L,D] as the fusion reads them

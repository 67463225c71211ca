"""The training objectives, each a function of (its config, ModelOutput, World); chosen and weighted in the config.

Every loss returns this rank's part such that the mean over ranks is the loss of the global batch, and the mean over ranks
of its gradients is the gradient of that. Losses own no parameters and call no modules.

Similarities are computed in blocks of columns that are computed once more in the backward pass, so no loss ever holds
more than [B,chunk] of them.

Shape legend: B pairs per rank, G = B x world, E embedding, P match pairs.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pretrain.config import ConfigModel, Count
from pretrain.contract import ModelOutput
from pretrain.model.negatives import find_true_pairs, gather_identity
from pretrain.world import World


class Ramp(ConfigModel):
    """The way of a weight from `start` in step 0 to its full value in step `steps`."""

    start: float = pydantic.Field(default=0.0, ge=0)
    steps: Count
    shape: Literal["linear", "cosine"] = "linear"


class LossConfig(ConfigModel):
    """What every loss has."""

    weight: float = pydantic.Field(default=1.0, ge=0)  # in the sum
    ramp: Ramp | None = None  # none: this weight from the start

    def weight_at(self, step: int) -> float:
        """The weight in step `step`, counted from 0."""
        if self.ramp is None or step >= self.ramp.steps:
            return self.weight
        progress = step / self.ramp.steps
        if self.ramp.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.ramp.start + (self.weight - self.ramp.start) * progress


class ContrastiveConfig(LossConfig):
    """Softmax cross-entropy over all texts for each image, and over all images for each text (InfoNCE, CLIP).

    `positives` says what the other true pairs are (the same picture drawn twice, or a caption that is also its own):
    `own`: negatives like any other; `soft`: positives, all with the same share; `masked`: left out.
    """

    chunk: Count = 4096  # columns of similarities held at a time
    label_smoothing: float = pydantic.Field(default=0.0, ge=0, lt=1)
    positives: Literal["own", "soft", "masked"] = "own"


class SigmoidConfig(LossConfig):
    """A yes or no for every image with every text (SigLIP). `positives` as in `contrastive`."""

    chunk: Count = 4096  # columns of similarities held at a time
    positives: Literal["own", "soft", "masked"] = "own"


class MatchingConfig(LossConfig):
    """Whether an image and a text belong together, told from their fused tokens, for true pairs and hard negatives."""


class LossesConfig(ConfigModel):
    """The losses that are on, each with its weight in the sum."""

    contrastive: ContrastiveConfig | None = ContrastiveConfig()
    sigmoid: SigmoidConfig | None = None
    matching: MatchingConfig | None = None


def contrastive_loss(config: ContrastiveConfig, output: ModelOutput, world: World) -> Tensor:
    """Symmetric InfoNCE of own rows against the global batch, both ways, with gradients to every rank's embeddings.

    Shapes:  image_embed [B,E], text_embed [B,E], logit_scale [1].
    Returns: scalar [], nats a pair.
    Source:  CLIP, arXiv:2103.00020, section 2.3.
    """
    image, text, scale = output.image_embed, output.text_embed, output.logit_scale
    others = OtherPairs(config.positives, output, world)
    own = scale * (image * text).sum(1)
    to_text = softmax_loss(config, image, world.all_gather(text), scale, own, others.of_images)
    to_image = softmax_loss(config, text, world.all_gather(image), scale, own, others.of_texts)
    return (to_text + to_image) / 2


def softmax_loss(
    config: ContrastiveConfig,
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    own: Tensor,
    others: Callable[[int, int], Tensor | None],
) -> Tensor:
    """Cross-entropy of the softmax over all columns, mean over the rows: scalar [], nats.

    Args: rows [B,E], columns [G,E], scale [1], own [B] the rows' scores with their own column, and others(start, stop)
          [B,stop-start] bool, the true pairs beside it (None: they do not matter).
    """

    def sums(rows: Tensor, columns: Tensor, scale: Tensor, start: int) -> Tensor:
        """[4,B]: log of the sum of exponentials, the sum of all that count, and the other true pairs' sum and number."""
        scores = scale * rows @ columns.T
        other = others(start, start + len(columns))
        if other is None:
            nothing = torch.zeros_like(scores[:, 0])
            return torch.stack([scores.logsumexp(1), scores.sum(1), nothing, nothing])
        other_sum, other_count = scores.masked_fill(~other, 0).sum(1), other.sum(1, dtype=scores.dtype)
        if config.positives == "masked":
            scores, all_sum = scores.masked_fill(other, -math.inf), scores.masked_fill(other, 0).sum(1)
        else:
            all_sum = scores.sum(1)
        return torch.stack([scores.logsumexp(1), all_sum, other_sum, other_count])

    parts = [compute(sums, rows, block, scale, start) for start, block, compute in blocks(columns, config.chunk)]
    log_sums, all_sums, other_sums, other_counts = torch.stack(parts).unbind(1)
    all_sum, all_count = all_sums.sum(0), len(columns)
    other_sum, other_count = other_sums.sum(0), other_counts.sum(0)
    if config.positives == "soft":
        own = (own + other_sum) / (1 + other_count)
    elif config.positives == "masked":
        all_count = all_count - other_count
    target = (1 - config.label_smoothing) * own + config.label_smoothing * all_sum / all_count
    return (log_sums.logsumexp(0) - target).mean()


def sigmoid_loss(config: SigmoidConfig, output: ModelOutput, world: World) -> Tensor:
    """Binary cross-entropy of own images with all texts: the sum over texts, the mean over images.

    Shapes:  image_embed [B,E], text_embed [B,E], logit_scale [1], logit_bias [1].
    Returns: scalar [], nats a pair.
    Source:  SigLIP, arXiv:2303.15343, algorithm 1.
    """
    image, texts = output.image_embed, world.all_gather(output.text_embed)
    others = OtherPairs(config.positives, output, world)

    def loss_of(image: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, start: int) -> Tensor:
        scores = scale * image @ texts.T + bias
        true = own_columns(len(image), start, len(texts), world)
        other = others.of_images(start, start + len(texts))
        if config.positives == "soft":
            true = true | other
        losses = F.softplus(torch.where(true, -scores, scores))
        return (losses.masked_fill(other, 0) if config.positives == "masked" else losses).sum()

    scale, bias = output.logit_scale, output.logit_bias
    total = [
        compute(loss_of, image, block, scale, bias, start) for start, block, compute in blocks(texts, config.chunk)
    ]
    return torch.stack(total).sum() / len(image)


class OtherPairs:
    """The true pairs of own rows with the global batch, beside each row with its own column, block by block."""

    def __init__(self, positives: str, output: ModelOutput, world: World):
        self.world = world
        self.own = None if positives == "own" else output.identity
        self.everyone = None if self.own is None else gather_identity(self.own, world)

    def of_images(self, start: int, stop: int) -> Tensor | None:
        """Own images with texts [start, stop): [B,stop-start] bool, None where only the own column is a positive."""
        return self.find(start, stop, 0)

    def of_texts(self, start: int, stop: int) -> Tensor | None:
        """Own texts with images [start, stop)."""
        return self.find(start, stop, 1)

    def find(self, start: int, stop: int, side: int) -> Tensor | None:
        if self.own is None:
            return None
        true = find_true_pairs(self.own, self.everyone.rows(start, stop))[side]
        return true & ~own_columns(len(true), start, stop - start, self.world)


def own_columns(rows: int, start: int, columns: int, world: World) -> Tensor:
    """[rows,columns] bool: where own row and global column, the columns from `start` on, are of the same pair."""
    own = torch.arange(world.rank * rows, (world.rank + 1) * rows, device=world.device)
    return own[:, None] == torch.arange(start, start + columns, device=world.device)


def blocks(columns: Tensor, chunk: int) -> Iterator[tuple[int, Tensor, Callable[..., Tensor]]]:
    """(start, columns[start:start + chunk], how to call a function of them): of several blocks, each is computed once
    more in the backward pass instead of kept."""
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for number, block in enumerate(columns.split(chunk)):  # slices would each have a gradient as large as all columns
        yield number * chunk, block, again if len(columns) > chunk else _call


def _call(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


def matching_loss(config: MatchingConfig, output: ModelOutput, world: World) -> Tensor:
    """Cross-entropy over matched and mismatched pairs, mean over the global batch; micro-batches add up to it.

    Shapes:  match_logits [P,2], match_labels [P] (1 = matched), match_weight [P] (sums to the world size over all ranks).
    Returns: scalar [], nats a pair.
    Source:  ALBEF, arXiv:2107.07651, image-text matching.
    """
    losses = F.cross_entropy(output.match_logits, output.match_labels, reduction="none")
    return (losses * output.match_weight).sum()


# Over the embeddings of a rank's whole batch, at once.
EMBEDDING_LOSSES = {"contrastive": contrastive_loss, "sigmoid": sigmoid_loss}
# Over what each micro-batch computes: their parts add up.
PAIR_LOSSES = {"matching": matching_loss}
LOSSES = EMBEDDING_LOSSES | PAIR_LOSSES


def compute_losses(
    config: LossesConfig, output: ModelOutput, world: World, step: int = 0, losses: dict[str, Callable] = LOSSES
) -> dict[str, Tensor]:
    """This rank's part of each of `losses` that is on, by name, and `total`, their weighted sum: scalars [], nats a pair."""
    active = {name: getattr(config, name) for name in losses if getattr(config, name)}
    values = {name: losses[name](settings, output, world) for name, settings in active.items()}
    weighted = [settings.weight_at(step) * values[name] for name, settings in active.items()]
    return values | {"total": sum(weighted, start=output.logit_scale.new_zeros(()))}

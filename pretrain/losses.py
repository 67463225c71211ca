"""The training objectives, each a function of (its config, ModelOutput, World); chosen and weighted in the config.

Every loss returns this rank's part such that the mean over ranks is the loss of the global batch, and the mean over ranks
of its gradients is the gradient of that. Losses own no parameters and call no modules.

Similarities are computed in blocks of columns that are computed once more in the backward pass, so no loss ever holds
more than [B,chunk] of them.

Shape legend: B pairs per rank, G = B x world, E embedding, P match pairs.
"""

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pretrain.config import ConfigModel, Count
from pretrain.contract import Identity, ModelOutput
from pretrain.model.negatives import find_true_pairs, gather_identity
from pretrain.world import World


class WeightSchedule(ConfigModel):
    """A weight that goes from `start` to `end` over the first `steps` steps, and stays there."""

    start: float = pydantic.Field(ge=0)
    end: float = pydantic.Field(ge=0)
    steps: Count
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, step: int) -> float:
        progress = min(1.0, step / self.steps)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress


Weight = Annotated[float, pydantic.Field(ge=0)] | WeightSchedule


class ContrastiveConfig(ConfigModel):
    """Softmax cross-entropy over all texts for each image, and over all images for each text (InfoNCE, CLIP).

    `positives` says what the other true pairs are (the same picture drawn twice, or a caption that is also its own):
    `own`: negatives like any other; `soft`: positives, all with the same share; `masked`: left out.
    """

    weight: Weight = 1.0
    chunk: Count = 8192  # columns of similarities held at a time
    label_smoothing: float = pydantic.Field(default=0.0, ge=0, lt=1)
    positives: Literal["own", "soft", "masked"] = "own"


class SigmoidConfig(ConfigModel):
    """A yes or no for every image with every text (SigLIP). `positives` as in `contrastive`."""

    weight: Weight = 1.0
    chunk: Count = 8192  # columns of similarities held at a time
    positives: Literal["own", "soft", "masked"] = "own"


class MatchingConfig(ConfigModel):
    weight: Weight = 1.0


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

    def sums(rows: Tensor, columns: Tensor, scale: Tensor, others: Tensor | None) -> Tensor:
        """[3,B]: log of the sum of exponentials, the sum of the other positives, the sum of all that count."""
        scores = scale * rows @ columns.T
        if others is None:
            return torch.stack([scores.logsumexp(1), torch.zeros_like(scores[:, 0]), scores.sum(1)])
        positive = scores.masked_fill(~others, 0).sum(1)
        if config.positives == "soft":
            return torch.stack([scores.logsumexp(1), positive, scores.sum(1)])
        left = scores.masked_fill(others, -math.inf).logsumexp(1)
        return torch.stack([left, positive, scores.masked_fill(others, 0).sum(1)])

    parts, other_count = [], torch.zeros_like(own)
    for start, stop, block in blocks(columns, config.chunk):
        other = others(start, stop)
        parts.append(recompute(sums, rows, block, scale, other, needed=stop - start < len(columns)))
        other_count += 0 if other is None else other.sum(1)
    log_sums, positive, everything = torch.stack(parts).unbind(1)
    everything, counted = everything.sum(0), len(columns)
    if config.positives == "soft":
        own = (own + positive.sum(0)) / (1 + other_count)
    elif config.positives == "masked":
        counted = counted - other_count
    target = (1 - config.label_smoothing) * own + config.label_smoothing * everything / counted
    return (log_sums.logsumexp(0) - target).mean()


def sigmoid_loss(config: SigmoidConfig, output: ModelOutput, world: World) -> Tensor:
    """Binary cross-entropy of own images with all texts: the sum over texts, the mean over images.

    Shapes:  image_embed [B,E], text_embed [B,E], logit_scale [1], logit_bias [1].
    Returns: scalar [], nats a pair.
    Source:  SigLIP, arXiv:2303.15343, algorithm 1.
    """
    image, texts = output.image_embed, world.all_gather(output.text_embed)
    first = world.rank * len(image)
    others = OtherPairs(config.positives, output, world)

    def block_loss(image: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, other: Tensor | None, own: Tensor) -> Tensor:
        scores = scale * image @ texts.T + bias
        true = own if other is None or config.positives == "masked" else own | other
        losses = F.softplus(torch.where(true, -scores, scores))
        return (losses if other is None or config.positives == "soft" else losses.masked_fill(other, 0)).sum()

    total = 0.0
    for start, stop, block in blocks(texts, config.chunk):
        rows, columns = torch.arange(len(image), device=image.device), torch.arange(start, stop, device=image.device)
        arguments = (output.logit_scale, output.logit_bias, others.of_images(start, stop), rows[:, None] + first == columns)
        total = total + recompute(block_loss, image, block, *arguments, needed=stop - start < len(texts))
    return total / len(image)


class OtherPairs:
    """The true pairs of own rows with the global batch, beside each row with its own column, block by block."""

    def __init__(self, positives: str, output: ModelOutput, world: World):
        self.own = None if positives == "own" else output.identity
        if self.own is not None:
            self.everyone = gather_identity(self.own, world)
            self.first = world.rank * len(self.own.image_id)

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
        rows = torch.arange(len(true), device=true.device) + self.first
        return true & (rows[:, None] != torch.arange(start, stop, device=true.device))


def blocks(columns: Tensor, chunk: int) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, columns[start:stop]), with one tensor for all their gradients."""
    start = 0
    for block in columns.split(chunk):  # slices would each give a gradient of all columns
        yield start, start + len(block), block
        start += len(block)


def recompute(function: Callable[..., Tensor], *arguments: Tensor | None, needed: bool) -> Tensor:
    """function(*arguments), computed again in the backward pass instead of kept, where that is `needed`."""
    if not needed:
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


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


def loss_weight(weight: Weight, step: int) -> float:
    """The weight in step `step` (from 0)."""
    return weight.at(step) if isinstance(weight, WeightSchedule) else weight


def compute_losses(
    config: LossesConfig, output: ModelOutput, world: World, step: int = 0, losses: dict[str, Callable] = LOSSES
) -> dict[str, Tensor]:
    """This rank's part of each of `losses` that is on, by name, and `total`, their weighted sum: scalars [], nats a pair."""
    active = {name: getattr(config, name) for name in losses if getattr(config, name)}
    values = {name: losses[name](settings, output, world) for name, settings in active.items()}
    weighted = [loss_weight(settings.weight, step) * values[name] for name, settings in active.items()]
    return values | {"total": sum(weighted, start=output.logit_scale.new_zeros(()))}

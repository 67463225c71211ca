"""The training objectives, each a function of (its config, ModelOutput, World); chosen and weighted in the config.

Every loss returns this rank's part such that the mean over ranks is the loss of the global batch, and the mean over ranks
of its gradients is the gradient of that. Losses own no parameters and call no modules.

Similarities are computed in blocks of columns that are computed once more in the backward pass, so no loss ever holds
more than [B,chunk] of them.

Shape legend: B pairs per rank, G = B x world, K columns to compare with (G or, with a queue, more), E embedding, P match
pairs, T tokens to predict, V ids.
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
from pretrain.contract import Identity, ModelOutput, TokenPredictions
from pretrain.model.negatives import find_true_pairs, gather_identity
from pretrain.world import World


class Ramp(ConfigModel):
    """The way of a weight from `start` in step 0 to its full value in step `steps`."""

    start: float = pydantic.Field(default=0.0, ge=0)
    steps: Count
    shape: Literal["linear", "cosine"] = "linear"

    def towards(self, full: float, step: int) -> float:
        """The value in step `step`, counted from 0, of what becomes `full`."""
        if step >= self.steps:
            return full
        progress = step / self.steps
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (full - self.start) * progress


class LossConfig(ConfigModel):
    """What every loss has."""

    weight: float = pydantic.Field(default=1.0, ge=0)  # in the sum
    ramp: Ramp | None = None  # none: this weight from the start

    def weight_at(self, step: int) -> float:
        """The weight in step `step`, counted from 0."""
        return self.ramp.towards(self.weight, step) if self.ramp else self.weight

    @property
    def never_counts(self) -> bool:
        """Whether the weight is 0 in every step: the loss is measured and trains nothing."""
        return self.weight == 0 and (self.ramp is None or self.ramp.start == 0)


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


class CaptioningConfig(LossConfig):
    """Each next token of a caption, told from the image and the tokens before. Needs `model.captioning`."""

    label_smoothing: float = pydantic.Field(default=0.0, ge=0, lt=1)  # 0.1 in BLIP


class MaskedLanguageConfig(LossConfig):
    """Masked tokens of a caption, told from the image and the tokens around. Needs `model.masked_language`."""


class DistillConfig(LossConfig):
    """Agreement with a frozen teacher, of its similarities (both ways, over the global batch) and of its embeddings."""

    teacher: str  # folder of an open_clip or native export with the model's tokenizer
    logits: float = pydantic.Field(default=1.0, ge=0)  # share of the divergence between the softmaxes
    cosine: float = pydantic.Field(default=0.0, ge=0)  # share of 1 - cosine to its embeddings, which need its embed_dim
    chunk: Count = 4096  # columns of similarities held at a time

    @pydantic.model_validator(mode="after")
    def check_shares(self) -> "DistillConfig":
        if self.logits == self.cosine == 0:
            raise ValueError("logits and cosine are both 0, so there is nothing to agree on: give one of them a share")
        return self


class MomentumConfig(ContrastiveConfig):
    """`contrastive` against what momentum towers (averages of the towers' weights) say of the global batch and of a queue
    of past pairs, with targets that are in part their softmax (ALBEF).

    Every learnt weight w moves its average: average = decay x average + (1 - decay) x w, after each step that changed it.
    """

    positives: Literal["own", "soft", "masked"] = "soft"  # a queue longer than the dataset holds each picture again
    queue_samples: int = pydantic.Field(default=65536, ge=0, lt=2**31)  # past pairs, of all ranks together
    alpha: float = pydantic.Field(default=0.4, ge=0, le=1)  # share of the soft targets
    alpha_ramp: Ramp | None = None  # in ALBEF from 0, linear, over the first epoch
    decay: float = pydantic.Field(default=0.995, ge=0, le=1)  # what an average keeps of itself in a step
    decay_ramp: Ramp | None = None

    @pydantic.model_validator(mode="after")
    def check_ramps(self) -> "MomentumConfig":
        for name, ramp in (("alpha_ramp", self.alpha_ramp), ("decay_ramp", self.decay_ramp)):
            if ramp and ramp.start > 1:
                raise ValueError(f"{name}.start is a share: give 0 to 1; found {ramp.start}")
        return self

    def alpha_at(self, step: int) -> float:
        return self.alpha_ramp.towards(self.alpha, step) if self.alpha_ramp else self.alpha

    def decay_at(self, step: int) -> float:
        return self.decay_ramp.towards(self.decay, step) if self.decay_ramp else self.decay


class LossesConfig(ConfigModel):
    """The losses that are on, each with its weight in the sum."""

    contrastive: ContrastiveConfig | None = ContrastiveConfig()
    sigmoid: SigmoidConfig | None = None
    matching: MatchingConfig | None = None
    captioning: CaptioningConfig | None = None
    masked_language: MaskedLanguageConfig | None = None
    distill: DistillConfig | None = None
    momentum: MomentumConfig | None = None


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
    soft: "SoftTargets | None" = None,
) -> Tensor:
    """Cross-entropy of the softmax over all columns, mean over the rows: scalar [], nats.

    Args: rows [B,E], columns [K,E], scale [1], own [B] the rows' scores with their own column, others(start, stop)
          [B,stop-start] bool, the true pairs beside it (None: they do not matter), and `soft`, targets that are mixed in.
    """

    def sums(rows: Tensor, columns: Tensor, scale: Tensor, start: int) -> Tensor:
        """[5,B]: log of the sum of exponentials, the sum of all that count, and the other true pairs' sum and number, and
        the mean by the soft targets."""
        scores = scale * rows @ columns.T
        other = others(start, start + len(columns))
        nothing = torch.zeros_like(scores[:, 0])
        soft_sum = (soft.of(columns, start) * scores).sum(1) if soft else nothing
        if other is None:
            return torch.stack([scores.logsumexp(1), scores.sum(1), nothing, nothing, soft_sum])
        other_sum, other_count = scores.masked_fill(~other, 0).sum(1), other.sum(1, dtype=scores.dtype)
        if config.positives == "masked":
            scores, all_sum = scores.masked_fill(other, -math.inf), scores.masked_fill(other, 0).sum(1)
        else:
            all_sum = scores.sum(1)
        return torch.stack([scores.logsumexp(1), all_sum, other_sum, other_count, soft_sum])

    parts = [compute(sums, rows, block, scale, start) for start, block, compute in blocks(columns, config.chunk)]
    log_sums, all_sums, other_sums, other_counts, soft_sums = torch.stack(parts).unbind(1)
    all_sum, all_count = all_sums.sum(0), len(columns)
    other_sum, other_count = other_sums.sum(0), other_counts.sum(0)
    if config.positives == "soft":
        own = (own + other_sum) / (1 + other_count)
    elif config.positives == "masked":
        all_count = all_count - other_count
    target = (1 - config.label_smoothing) * own + config.label_smoothing * all_sum / all_count
    if soft:
        target = (1 - soft.share) * target + soft.share * soft_sums.sum(0)
    return (log_sums.logsumexp(0) - target).mean()


def sigmoid_loss(config: SigmoidConfig, output: ModelOutput, world: World) -> Tensor:
    """Binary cross-entropy of own images with all texts: the sum over texts, the mean over images.

    Texts are passed from rank to rank, so that each holds those of one rank besides its own, however many ranks there are.

    Shapes:  image_embed [B,E], text_embed [B,E], logit_scale [1], logit_bias [1].
    Returns: scalar [], nats a pair.
    Source:  SigLIP, arXiv:2303.15343, algorithm 1 and section 3.3.
    """
    others = OtherPairs(config.positives, output, world)

    def loss_of(image: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, start: int) -> Tensor:
        """With the texts of the global batch from `start` on."""
        scores = scale * image @ texts.T + bias
        true = own_columns(len(image), start, len(texts), world)
        other = others.of_images(start, start + len(texts))
        if config.positives == "soft":
            true = true | other
        losses = F.softplus(torch.where(true, -scores, scores))
        return (losses.masked_fill(other, 0) if config.positives == "masked" else losses).sum() / len(image)

    leaves = (output.image_embed, output.text_embed, output.logit_scale, output.logit_bias)
    return _Ring.apply(loss_of, config.chunk, world, *leaves)


class _Ring(torch.autograd.Function):
    """The sum of `loss_of` over the texts of all ranks, which go round. Their gradients travel with them and so come home.

    Gradients are computed with the loss, block by block, for a block is not there any more when the backward pass begins.
    That takes the same factor from each rank's backward pass, which holds for a weighted sum of losses.
    """

    @staticmethod
    def forward(
        ctx, loss_of: Callable, chunk: int, world: World, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor
    ) -> Tensor:
        total = image.new_zeros(())
        gradients = [torch.zeros_like(leaf) for leaf in (image, scale, bias)]
        texts, text_gradient = text.detach(), torch.zeros_like(text)
        for hop in range(world.size):
            first = (world.rank - hop) % world.size * len(text)  # whose texts these are
            for start in range(0, len(text), chunk):
                block = slice(start, start + chunk)
                with torch.enable_grad():
                    leaves = [leaf.detach().requires_grad_() for leaf in (image, texts[block], scale, bias)]
                    loss = loss_of(*leaves, first + start)
                found = torch.autograd.grad(loss, leaves)
                total += loss.detach()
                text_gradient[block] += found[1]
                for gradient, part in zip(gradients, (found[0], *found[2:]), strict=True):
                    gradient += part
            texts, text_gradient = world.rotate(texts, text_gradient)
        ctx.save_for_backward(gradients[0], text_gradient, *gradients[1:])
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, None, None, *(grad * gradient for gradient in ctx.saved_tensors)


def distill_loss(config: DistillConfig, output: ModelOutput, world: World) -> Tensor:
    """Kullback-Leibler divergence from the teacher's softmax over the global batch, mean of both ways, and 1 - cosine.

    Shapes:  image_embed [B,E], text_embed [B,E], logit_scale [1], teacher [B,E'], [B,E'], [1].
    Returns: scalar [], nats a pair.
    Source:  CLIP-KD, arXiv:2307.12732; open_clip's DistillClipLoss, less the entropy of the targets.
    """
    image, text, teacher = output.image_embed, output.text_embed, output.teacher
    loss = image.new_zeros(())
    if config.logits:
        sides = [(image, text), (text, image)]
        targets = [(teacher.image_embed, teacher.text_embed), (teacher.text_embed, teacher.image_embed)]
        for (rows, others), (target_rows, target_others) in zip(sides, targets, strict=True):
            target = (target_rows, world.all_gather(target_others), teacher.logit_scale)
            divergence = divergence_loss(rows, world.all_gather(others), output.logit_scale, *target, config.chunk)
            loss = loss + config.logits * divergence / 2
    if config.cosine:
        cosines = (image * teacher.image_embed).sum(1) + (text * teacher.text_embed).sum(1)
        loss = loss + config.cosine * (1 - cosines / 2).mean()
    return loss


def divergence_loss(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    target_rows: Tensor,
    target_columns: Tensor,
    target_scale: Tensor,
    chunk: int,
) -> Tensor:
    """KL(softmax of the targets || softmax), both over all columns, mean over the rows: scalar [], nats.

    Args: rows [B,E], columns [G,E], scale [1], and the same of the targets, which get no gradient.
    """
    scaled = target_scale * target_rows
    target_parts = target_columns.split(chunk)
    log_sum = torch.stack([(scaled @ part.T).logsumexp(1) for part in target_parts]).logsumexp(0)

    def sums(rows: Tensor, columns: Tensor, scale: Tensor, target_columns: Tensor) -> Tensor:
        """[2,B]: log of the sum of exponentials, and the targets' mean of their logarithm less the score."""
        scores, logs = scale * rows @ columns.T, scaled @ target_columns.T - log_sum[:, None]
        return torch.stack([scores.logsumexp(1), (logs.exp() * (logs - scores)).sum(1)])

    parts = [
        compute(sums, rows, block, scale, target)
        for (_, block, compute), target in zip(blocks(columns, chunk), target_parts, strict=True)
    ]
    log_sums, differences = torch.stack(parts).unbind(1)
    return (log_sums.logsumexp(0) + differences.sum(0)).mean()


def momentum_loss(config: MomentumConfig, output: ModelOutput, world: World) -> Tensor:
    """Symmetric InfoNCE of own rows against the candidates of the momentum towers, both ways, with soft targets in part.

    Shapes:  image_embed [B,E], text_embed [B,E], logit_scale [1], momentum.image_embed and text_embed [B,E], their
             candidates [K,E].
    Returns: scalar [], nats a pair.
    Source:  ALBEF, arXiv:2107.07651, sections 3.2 and 3.3; MoCo, arXiv:1911.05722.
    """
    image, text, scale, momentum = output.image_embed, output.text_embed, output.logit_scale, output.momentum
    candidates = momentum.candidates
    others = OtherPairs(config.positives, output, world, candidates.identity)
    loss = image.new_zeros(())
    for rows, averaged, partners, columns, of_rows in (
        (image, momentum.image_embed, momentum.text_embed, candidates.text_embed, others.of_images),
        (text, momentum.text_embed, momentum.image_embed, candidates.image_embed, others.of_texts),
    ):
        own = scale * (rows * partners).sum(1)
        soft = SoftTargets(config, averaged, columns, scale, of_rows, momentum.alpha) if momentum.alpha else None
        loss = loss + softmax_loss(config, rows, columns, scale, own, of_rows, soft) / 2
    return loss


class SoftTargets:
    """The softmax over all columns of rows [B,E] that get no gradient, block by block, and the `share` of it in the targets.

    The other arguments are those of `softmax_loss`; columns that are masked there have no part in this softmax either.
    """

    def __init__(
        self,
        config: ContrastiveConfig,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        others: Callable[[int, int], Tensor | None],
        share: float,
    ):
        self.rows, self.share = scale.detach() * rows, share
        self.masked = others if config.positives == "masked" else lambda start, stop: None
        sums = [self.scores(block, start).logsumexp(1) for start, block, _ in blocks(columns, config.chunk)]
        self.log_sum = torch.stack(sums).logsumexp(0)[:, None]

    def scores(self, columns: Tensor, start: int) -> Tensor:
        scores, masked = self.rows @ columns.T, self.masked(start, start + len(columns))
        return scores if masked is None else scores.masked_fill(masked, -math.inf)

    def of(self, columns: Tensor, start: int) -> Tensor:
        """The block [B,k] of these columns [k,E], the ones from `start` on."""
        return (self.scores(columns, start) - self.log_sum).exp()


class OtherPairs:
    """The true pairs of own rows with the global batch, beside each row with its own column, block by block.

    `everyone`, if not only the global batch, has it first.
    """

    def __init__(self, positives: str, output: ModelOutput, world: World, everyone: Identity | None = None):
        self.world = world
        self.own = None if positives == "own" else output.identity
        self.everyone = everyone
        if self.own is not None and everyone is None:
            self.everyone = gather_identity(self.own, world)

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


def captioning_loss(config: CaptioningConfig, output: ModelOutput, world: World) -> Tensor:
    """Cross-entropy of each caption's next tokens, mean over all tokens of the global batch; micro-batches add up to it.

    Shapes:  captioning.logits [T,V], captioning.labels [T].
    Returns: scalar [], nats a token.
    Source:  BLIP, arXiv:2201.12086, language modelling; CoCa, arXiv:2205.01917.
    """
    return token_loss(output.captioning, config.label_smoothing)


def masked_language_loss(config: MaskedLanguageConfig, output: ModelOutput, world: World) -> Tensor:
    """Cross-entropy of the masked tokens, mean over all of the global batch; micro-batches add up to it.

    Shapes:  masked_language.logits [T,V], masked_language.labels [T].
    Returns: scalar [], nats a token.
    Source:  ALBEF, arXiv:2107.07651, masked language modelling.
    """
    return token_loss(output.masked_language, 0.0)


def token_loss(tokens: TokenPredictions, label_smoothing: float) -> Tensor:
    """The weighted sum of the tokens' cross-entropies: scalar []; 0 without tokens."""
    total = F.cross_entropy(tokens.logits, tokens.labels, reduction="sum", label_smoothing=label_smoothing)
    return total * tokens.weight.to(total.dtype)


# Over the embeddings of a rank's whole batch, at once.
EMBEDDING_LOSSES = {
    "contrastive": contrastive_loss,
    "sigmoid": sigmoid_loss,
    "distill": distill_loss,
    "momentum": momentum_loss,
}
# Over what each micro-batch computes: their parts add up.
PAIR_LOSSES = {
    "matching": matching_loss,
    "captioning": captioning_loss,
    "masked_language": masked_language_loss,
}
LOSSES = EMBEDDING_LOSSES | PAIR_LOSSES


def compute_losses(
    config: LossesConfig, output: ModelOutput, world: World, step: int = 0, losses: dict[str, Callable] = LOSSES
) -> dict[str, Tensor]:
    """This rank's part of each of `losses` that is on, by name, and `total`, their weighted sum: scalars [], nats a pair or token."""
    active = {name: getattr(config, name) for name in losses if getattr(config, name)}
    values = {name: losses[name](settings, output, world) for name, settings in active.items()}
    weighted = [settings.weight_at(step) * values[name] for name, settings in active.items()]
    return values | {"total": sum(weighted, start=output.logit_scale.new_zeros(()))}

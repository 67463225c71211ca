"""The gradients of one step, the same however the batch is cut into micro-batches, and what to do with bad ones.

Shape legend: B pairs of this rank, E embedding, L text tokens of width D.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.contract import Batch, ModelOutput, TeacherOutput
from pretrain.engine import loss_scale, one_reduction, run_backward
from pretrain.losses import EMBEDDING_LOSSES, PAIR_LOSSES, LossesConfig, compute_losses
from pretrain.model.model import KnownTexts
from pretrain.model.towers import Tower
from pretrain.momentum import Momentum
from pretrain.spikes import GiveUp
from pretrain.world import World

log = logging.getLogger(__name__)


def compute_gradients(
    engine: Any,
    batch: Batch,
    config: LossesConfig,
    step: int,
    micro_batch_size: int | None,
    world: World,
    teacher: Callable[[Batch], TeacherOutput] | None = None,
    momentum: Momentum | None = None,
) -> tuple[dict[str, Tensor], ModelOutput]:
    """Losses and gradients of one step. Collective.

    With micro-batches it is two passes. The first keeps only embeddings; the losses over all of them give each embedding
    its gradient, and the draws of negatives. The second replays one micro-batch after another, dropout included, and
    carries those gradients and the pair losses back. The gradient is that of the whole batch, at the memory of one
    micro-batch and the price of one more forward. Source: GradCache, arXiv:2101.06983.

    On one rank all negatives are its own. There the second pass does the same once more, for the tokens of texts: matching
    takes those of the first pass, and their gradients are carried back when all images are done. So no text is encoded for
    each image that draws it.

    `teacher` is that of `losses.distill`, `momentum` that of `losses.momentum`.

    Returns: this rank's part of each loss and their `total`, and its embeddings [B,E].
    """
    rows = len(batch.image)
    # Before the model's own forward keeps its activations.
    averaged = momentum.compare(batch, micro_batch_size or rows, step) if momentum else None
    if micro_batch_size is None or micro_batch_size >= rows:
        output = engine(batch)
        output.momentum = averaged
        output.teacher = teacher(batch) if teacher else None
        losses = compute_losses(config, output, world, step)
        run_backward(engine, infect(losses["total"], losses["total"], output))
        return losses, output

    size, keeps_texts = micro_batch_size, bool(config.matching) and world.size == 1
    whole, tokens = embed(engine, batch, size, keeps_texts)
    whole.momentum = averaged
    whole.teacher = teach(teacher, batch, size) if teacher else None
    losses = compute_losses(config, whole, world, step, EMBEDDING_LOSSES)
    if losses["total"].requires_grad:
        losses["total"].backward()
    plan = engine.module.plan(batch, whole) if config.matching else None
    token_weights = engine.module.weigh_tokens(batch)
    with one_reduction(engine):
        for start in range(0, rows, size):
            stop = start + size
            pairs = plan.pairs(start, stop) if plan else None
            texts = None
            if keeps_texts:
                texts = KnownTexts(tokens, Tower(tokens[start:stop], whole.text_embed[start:stop].detach()))
            output = engine(batch.rows(start, stop), pairs=pairs, token_weights=token_weights, texts=texts)
            pair_losses = compute_losses(config, output, world, step, PAIR_LOSSES)
            for name, value in pair_losses.items():
                losses[name] = losses.get(name, 0) + value.detach()
            carried = carry_back(whole, output, start, stop)
            run_backward(engine, infect(pair_losses["total"] + carried, losses["total"], output))
        if keeps_texts:
            carry_texts_back(engine, batch, size, whole, tokens)
    return losses, whole


def embed(engine: Any, batch: Batch, size: int, keeps_texts: bool) -> tuple[ModelOutput, Tensor | None]:
    """The first pass, `size` pairs at once: the embeddings of the whole batch, and the texts' tokens [B,L,D] if they are
    kept, as leaves whose gradients are to be found."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(batch.image), size):
            parts.append(engine(batch.rows(start, start + size), heads=False))
            if not keeps_texts:
                parts[-1].text_tokens = None
    tokens = torch.cat([part.text_tokens for part in parts]).requires_grad_() if keeps_texts else None
    bias = parts[0].logit_bias
    whole = ModelOutput(
        image_embed=torch.cat([part.image_embed for part in parts]).requires_grad_(),
        text_embed=torch.cat([part.text_embed for part in parts]).requires_grad_(),
        logit_scale=parts[0].logit_scale.detach().requires_grad_(),
        logit_bias=None if bias is None else bias.detach().requires_grad_(),  # without detach: the parameter itself
        identity=batch.identity,
    )
    return whole, tokens


def teach(teacher: Callable[[Batch], TeacherOutput], batch: Batch, size: int) -> TeacherOutput:
    """The teacher's embeddings of the whole batch, `size` pairs at once."""
    parts = [teacher(batch.rows(start, start + size)) for start in range(0, len(batch.image), size)]
    image, text = (torch.cat([part[side] for part in parts]) for side in range(2))
    return TeacherOutput(image, text, parts[0].logit_scale)


def carry_back(whole: ModelOutput, output: ModelOutput, start: int, stop: int) -> Tensor:
    """A scalar whose gradients by the micro-batch's embeddings are those that the whole batch's losses have given them.

    The logit scale and bias are in every micro-batch's graph: each carries its share of their gradient.
    """
    share = (stop - start) / len(whole.image_embed)
    pairs = [
        (output.image_embed, whole.image_embed.grad, slice(start, stop), 1),
        (output.text_embed, whole.text_embed.grad, slice(start, stop), 1),
        (output.logit_scale, whole.logit_scale.grad, slice(None), share),
    ]
    if whole.logit_bias is not None:
        pairs.append((output.logit_bias, whole.logit_bias.grad, slice(None), share))
    carried = [(value * gradient[rows] * part).sum() for value, gradient, rows, part in pairs if gradient is not None]
    return sum(carried, start=output.logit_scale.new_zeros(()))


def carry_texts_back(engine: Any, batch: Batch, size: int, whole: ModelOutput, tokens: Tensor) -> None:
    """Encode the texts once more, and carry back the gradients of their `tokens` [B,L,D] and embeddings."""
    for start in range(0, len(batch.image), size):
        stop = start + size
        text = engine(batch.rows(start, stop), text_only=True)
        gradient = tokens.grad[start:stop].to(text.pooled.dtype) / loss_scale(engine)
        carried = (text.tokens.to(gradient.dtype) * gradient).sum()
        if whole.text_embed.grad is not None:
            carried = carried + (text.pooled * whole.text_embed.grad[start:stop]).sum()
        if carried.requires_grad:  # not where the tower is frozen
            run_backward(engine, carried)


def infect(scalar: Tensor, loss: Tensor, output: ModelOutput) -> Tensor:
    """`scalar`, with a gradient that is not finite where `loss` is not: an infinite loss may have finite gradients, and
    the reduction of gradients is how the other ranks hear of it."""
    nothing = loss.detach() * 0
    for part in (output.logit_scale, output.image_embed, output.text_embed):  # of which some may be frozen
        scalar = scalar + (nothing * part).sum()
    return scalar


class BadSteps:
    """Counts steps that were skipped because a loss or gradient was not finite, names their samples, and gives up in time.

    Such gradients reach every rank in the reduction, so every rank skips the same steps without asking.
    """

    def __init__(self, limit: int, world: World):
        self.limit, self.world = limit, world
        self.total = self.in_a_row = 0

    def check(
        self,
        step: int,
        applied: bool,
        batch: Batch,
        losses: dict[str, Tensor],
        output: ModelOutput,
        scale_could_fall: bool = False,
    ) -> list[str] | None:
        """Take note of a step; of a bad one, returns the keys of the samples to blame. Collective where it was not applied.

        In fp16, `scale_could_fall` says that the loss scale was not at its least in this step. Raises GiveUp after `limit` bad steps in a row.
        """
        if applied:
            self.in_a_row = 0
            return None
        of_ranks = self.world.gather_objects(find_bad_keys(batch, losses, output))
        by_embedding, by_loss, everyone = zip(*of_ranks, strict=True)
        if scale_could_fall and not any(by_loss):
            return None  # the loss scale was too large; DeepSpeed makes it smaller
        # One bad embedding spoils the losses of every rank that compares with it, so those tell less.
        blamed = next(keys for keys in (by_embedding, by_loss, everyone) if any(keys))
        self.total += 1
        self.in_a_row += 1
        where = "; ".join(f"rank {rank}: {', '.join(keys)}" for rank, keys in enumerate(blamed) if keys)
        if blamed is everyone:
            where = f"the losses are finite, the gradients are not; {where}"
        if self.in_a_row >= self.limit:
            raise GiveUp(
                f"step {step}: loss or gradients not finite, as in {self.in_a_row} steps in a row ({where}). They changed no "
                "weights. Look at these samples, lower engine.lr, or set engine.precision=bf16 or fp32"
            )
        if self.world.is_main:
            log.warning("step %d: loss or gradients not finite, step skipped (%s)", step, where)
        return [key for keys in blamed for key in keys]


def find_bad_keys(
    batch: Batch, losses: dict[str, Tensor], output: ModelOutput, most: int = 8
) -> tuple[list[str], list[str], list[str]]:
    """This rank's samples to blame, at most `most` by name: those whose embeddings are not finite; all of them, if one of
    its losses is not; and all of them."""
    spoiled = ~(output.image_embed.isfinite().all(1) & output.text_embed.isfinite().all(1))
    lost = not torch.stack([loss.detach().reshape(()) for loss in losses.values()]).isfinite().all()
    by_embedding = [batch.keys[row] for row in spoiled.nonzero()[:, 0].tolist()]
    return tuple(
        keys[:most] + [f"and {len(keys) - most} more"] * (len(keys) > most)
        for keys in (by_embedding, batch.keys if lost else [], batch.keys)
    )

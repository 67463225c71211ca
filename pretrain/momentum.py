"""Momentum towers: averages of both towers' weights, and a queue of what they said of past pairs.

They are no part of the trained model: not in the optimizer, and without gradients. Every rank holds the towers whole, in
the run's precision. The averages themselves are in fp32 and, with ZeRO, divided over the ranks as the optimiser's weights
are.

The towers are in evaluation mode. What they say becomes a target and stays in the queue for many steps: it should be what
the averaged weights make of the pair, not what one draw of dropout left of it, and so there is nothing to replay. (ALBEF
leaves dropout on in its momentum towers.)

Shape legend: B pairs of this rank, G = B x world, K = G + what is in the queue, E embedding.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.checkpoint import gather_weights
from pretrain.config import ConfigError
from pretrain.contract import Batch, Candidates, Identity, MomentumOutput
from pretrain.data.text import Tokenizer
from pretrain.engine import join_parts, master_parts
from pretrain.losses import MomentumConfig
from pretrain.model.blocks import compile_blocks
from pretrain.model.model import ModelConfig
from pretrain.model.negatives import gather_identity
from pretrain.model.towers import unit
from pretrain.world import World

log = logging.getLogger(__name__)

WEIGHTS, QUEUE = "momentum.weights.", "momentum.queue."  # beginnings of names in a checkpoint
ALIGNMENT = 64  # elements: where a weight may begin in the flat tensor of all, so that kernels find it aligned


class Momentum:
    """`compare` tells what the averages make of a batch; `follow` moves them after the model. All methods are collective."""

    @torch.no_grad()
    def __init__(
        self,
        config: MomentumConfig,
        model: ModelConfig,
        tokenizer: Tokenizer,
        engine: Any,
        world: World,
        restored: dict[str, Tensor],
    ):
        """`restored` is the `state` that a checkpoint kept; without, the averages are the engine's weights of now, and the
        queue is empty."""
        self.config, self.engine, self.world = config, engine, world
        self.divided = world.size > 1 and engine.zero_optimization_stage() > 0
        dtype = next(engine.module.parameters()).dtype
        with torch.random.fork_rng(devices=[]):  # what the weights begin with does not matter
            towers = Towers(model, tokenizer, world).to(world.device, dtype).requires_grad_(False).eval()
        kept = strip(restored, WEIGHTS)
        weights = kept or gather_weights(engine)
        towers.load_state_dict({name: weights[name] for name in towers.state_dict()})
        self.towers = towers

        trained = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
        self.trained = {name: weight for name, weight in towers.named_parameters() if name in trained}
        if not self.trained:
            raise ConfigError(
                "losses.momentum: both towers are frozen, so their averages are the towers themselves. Train one of them "
                "(model.freeze), or set losses.momentum=null and losses.contrastive={}"
            )
        self.flat, self.places = flatten(self.trained)
        self.exact = torch.float64 if dtype == torch.float64 else torch.float32
        self.averages = {}  # by name, this rank's part of each
        for name, (start, part) in self.masters().items():
            average = kept[name].flatten()[start : start + len(part)] if kept else part
            self.averages[name] = start, average.to(part.device, self.exact, copy=True)
        self.publish()

        pairs = strip(restored, QUEUE) or empty_queue(model.embed_dim, self.exact)
        pairs = {name: value.to(world.device) for name, value in pairs.items()}
        image, text = pairs.pop("image_embed"), pairs.pop("text_embed")
        self.queue = self.newest(Candidates(image, text, Identity(**pairs)))
        if world.is_main:
            begin = "restored" if kept else "begin as the model's weights"
            log.info("momentum towers %s, %d of %d pairs queued", begin, len(image), config.queue_samples)

        if model.compile:
            compile_blocks(towers)

    @torch.no_grad()
    def compare(self, batch: Batch, micro_batch_size: int, step: int) -> MomentumOutput:
        """What the averages make of this rank's batch, so many pairs at a time, and who there is to compare it with."""
        starts = range(0, len(batch.image), micro_batch_size)
        parts = [self.towers(batch.rows(start, start + micro_batch_size)) for start in starts]
        image, text = (torch.cat(side) for side in zip(*parts, strict=True))
        gathered = self.world.all_gather(image), self.world.all_gather(text)
        everyone = Candidates(*gathered, gather_identity(batch.identity, self.world))
        return MomentumOutput(image, text, everyone.append(self.queue), self.config.alpha_at(step))

    @torch.no_grad()
    def follow(self, output: MomentumOutput, step: int) -> None:
        """Move the averages towards the model's weights, and queue the batch. For steps that have changed the weights."""
        decay = self.config.decay_at(step)
        for name, (_, master) in self.masters().items():
            self.averages[name][1].lerp_(master, 1 - decay)
        # Of batch normalisation, and averages already.
        model_buffers = dict(self.engine.module.named_buffers())
        for name, buffer in self.towers.named_buffers():
            buffer.copy_(model_buffers[name])
        self.publish()
        batch = output.candidates.rows(0, self.world.size * len(output.image_embed))
        self.queue = self.newest(self.queue.append(batch))

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """Averages, whole and in fp32, and queue, by name, on the CPU: what a checkpoint keeps; {} but for rank 0."""
        state = {}
        if self.world.is_main:  # not once for each GPU of a node
            state = {WEIGHTS + name: value.cpu() for name, value in self.towers.state_dict().items()}
        for name, weight in self.trained.items():
            average = join_parts(self.engine, self.averages.get(name), weight.shape, self.exact, self.world)
            if self.world.is_main:
                state[WEIGHTS + name] = average
        if not self.world.is_main:
            return {}
        embeddings = {"image_embed": self.queue.image_embed, "text_embed": self.queue.text_embed}
        state |= {QUEUE + name: value.cpu() for name, value in (embeddings | self.queue.identity._asdict()).items()}
        return {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}

    def masters(self) -> dict[str, tuple[int, Tensor]]:
        """This rank's parts of the weights that are averaged."""
        return {name: part for name, part in master_parts(self.engine).items() if name in self.trained}

    def publish(self) -> None:
        """Give every rank's towers the averages, in their precision. Ranks add up what they hold of them and zeros."""
        self.flat.zero_()
        for name, (start, average) in self.averages.items():
            place = self.places[name] + start
            self.flat[place : place + len(average)] = average
        if self.divided:
            self.flat.copy_(self.world.all_reduce(self.flat))

    def newest(self, pairs: Candidates) -> Candidates:
        """The last of `pairs`, as many as the queue may hold."""
        count = len(pairs.image_embed)
        return pairs.rows(max(0, count - self.config.queue_samples), count)


class Towers(nn.Module):
    """Both towers, under the names that they have in the model."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, world: World):
        super().__init__()
        self.image_tower = config.image.build(config.embed_dim, world)
        self.text_tower = config.text.build(config.embed_dim, tokenizer, None)
        self.normalise = config.image.normalise

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """[B,E] and [B,E], unit norm."""
        pixels = self.normalise(batch.image).to(next(self.parameters()).dtype)
        return unit(self.image_tower(pixels).pooled), unit(self.text_tower(batch.ids, batch.mask).pooled)


def flatten(weights: dict[str, nn.Parameter]) -> tuple[Tensor, dict[str, int]]:
    """Make the weights views of one new tensor, and tell where in it each begins."""
    places, size = {}, 0
    for name, weight in weights.items():
        places[name] = size
        size += -(-weight.numel() // ALIGNMENT) * ALIGNMENT
    first = next(iter(weights.values()))
    flat = torch.zeros(size, dtype=first.dtype, device=first.device)
    for name, weight in weights.items():
        weight.data = flat[places[name] : places[name] + weight.numel()].view_as(weight)
    return flat, places


def empty_queue(width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    ids = torch.zeros(0, dtype=torch.int64)
    embeddings = torch.zeros(0, width, dtype=dtype)
    names = {"image_embed": embeddings, "text_embed": embeddings, "image_id": ids, "text_id": ids}
    return names | {"true_text_id": ids[:, None]}


def strip(tensors: dict[str, Tensor], beginning: str) -> dict[str, Tensor]:
    """Those whose names begin so, without it."""
    return {name.removeprefix(beginning): value for name, value in tensors.items() if name.startswith(beginning)}

"""The image-text model: two towers, and a fusion with a match head over true pairs and hard negatives.

Shape legend: B pairs per rank, G = B x world, N image tokens, L text tokens, D width, E embedding, P match pairs.
"""

import math

import pydantic
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.config import ConfigModel, Count, union_by_kind
from pretrain.contract import Batch, ModelOutput
from pretrain.data.text import TOKENIZERS, ClipTokenizerConfig, Tokenizer
from pretrain.model.blocks import (
    checkpoint_blocks,
    compile_blocks,
    freeze,
    keep_frozen_in_evaluation,
)
from pretrain.model.fusion import FUSIONS
from pretrain.model.negatives import MatchPairs, MatchPlan, plan_matches
from pretrain.model.noise import Noise, pair_keys, replace_dropouts, row_keys
from pretrain.model.towers import IMAGE_TOWERS, TEXT_TOWERS, Tower, unit
from pretrain.model.warm_start import WARM_STARTS
from pretrain.world import World

# The pixel statistics of CLIP's training data (OpenAI), which every open_clip and Hugging Face CLIP expects.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LOGIT_SCALE = 100.0


class ModelConfig(ConfigModel):
    embed_dim: Count = 512  # E, of both sides
    image: union_by_kind(IMAGE_TOWERS)
    text: union_by_kind(TEXT_TOWERS)
    tokenizer: union_by_kind(TOKENIZERS) = ClipTokenizerConfig()
    fusion: union_by_kind(FUSIONS) | None = None  # none: contrastive only
    random_negatives: float = pydantic.Field(default=0.5, ge=0, le=1)  # share of the match negatives not drawn hard
    init_logit_scale: float = pydantic.Field(default=1 / 0.07, gt=0, le=MAX_LOGIT_SCALE)
    init_logit_bias: float | None = None  # for losses.sigmoid: -10 in SigLIP, with a scale of 10; none: no bias
    warm_start: list[union_by_kind(WARM_STARTS)] = []  # weights to begin with, each source over the ones before
    freeze: list[str] = []  # beginnings of parameter names that are not trained: [image_tower] is LiT
    checkpoint_activations: bool = False  # keep none inside blocks: less memory, a third more time
    compile: bool = False  # torch.compile, block by block


class LogitScale(nn.Module):
    """The learnt factor of the similarities, kept as its logarithm. Shape [1]: DeepSpeed broadcasts no 0-d parameter."""

    def __init__(self, initial: float):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(initial)]))

    def forward(self) -> Tensor:
        # Clamped here, not on the parameter: the optimiser's fp32 copy would undo a clamp of the 16-bit one.
        log_scale = self.log_scale if self.log_scale.dtype == torch.float64 else self.log_scale.float()
        return log_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp()


class LogitBias(nn.Module):
    """What is added to the scaled similarities, learnt. A module of its own, for ZeRO-3 to gather. Shape [1]."""

    def __init__(self, initial: float):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([initial]))

    def forward(self) -> Tensor:
        return self.bias if self.bias.dtype == torch.float64 else self.bias.float()


class ImageTextModel(nn.Module):
    """`model(batch)` returns a `ModelOutput`. Every rank calls the same modules in the same order."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, seed: int = 0, world: World | None = None):
        super().__init__()
        self.config, self.seed, self.world, self.noise = config, seed, world or World(), Noise()
        self.image_tower = config.image.build(config.embed_dim, self.world)
        text_layer = config.fusion.text_layer if config.fusion else None
        self.text_tower = config.text.build(config.embed_dim, tokenizer, text_layer)
        self.logit_scale = LogitScale(config.init_logit_scale)
        self.logit_bias = None if config.init_logit_bias is None else LogitBias(config.init_logit_bias)
        self.fusion = self.match_head = None
        if config.fusion:
            self.fusion = config.fusion.build(self.image_tower.width, self.text_tower)
            self.match_head = nn.Linear(self.fusion.width, 2)
        replace_dropouts(self, self.noise)
        freeze(self, config.freeze)
        if config.checkpoint_activations:
            checkpoint_blocks(self, self.noise.checkpoint_contexts)
        if config.compile:
            compile_blocks(self)

    def train(self, mode: bool = True) -> "ImageTextModel":
        super().train(mode)
        keep_frozen_in_evaluation(self, self.config.freeze)
        return self

    def forward(self, batch: Batch, match: bool = True, pairs: MatchPairs | None = None) -> ModelOutput:
        """Embeddings of the batch, and the logits of its match pairs unless `match` is off.

        Without `pairs`, negatives are drawn from these very embeddings, which then have to be the rank's whole batch; a
        micro-batch is given the `pairs` that were drawn for it.
        """
        keys = self.sample_keys(torch.from_numpy(batch.position).to(batch.image.device))
        image, text = self.encode_image(batch.image, keys), self.encode_text(batch.ids, batch.mask, keys)
        output = ModelOutput(
            unit(image.pooled),
            unit(text.pooled),
            self.logit_scale(),
            self.logit_bias() if self.logit_bias else None,
            batch.identity,
        )
        if self.fusion and match:
            pairs = pairs or self.plan(batch, output).pairs(0, len(batch.image))
            self.match(batch, image, text, keys, pairs, output)
        return output

    def encode_image(self, image: Tensor, keys: Tensor | None = None) -> Tower:
        """[B,3,H,W] uint8 -> tokens [B,N,D], pooled [B,E] (not yet of unit norm); `keys` [B] for dropout in training."""
        with self.noise.using(keys):
            return self.image_tower(normalise(image).to(self.logit_scale.log_scale.dtype))  # the parameters' precision

    def encode_text(self, ids: Tensor, mask: Tensor, keys: Tensor | None = None) -> Tower:
        """[B,L] ids and mask -> tokens [B,L,D], pooled [B,E] (not yet of unit norm); `keys` [B] for dropout in training."""
        with self.noise.using(keys):
            return self.text_tower(ids, mask)

    def match_pairs(self, text: Tensor, text_mask: Tensor, image: Tensor, keys: Tensor | None = None) -> Tensor:
        """Match logits [P,2] (mismatch, match) of text tokens [P,L,D] with image tokens [P,N,D], pair by pair."""
        with self.noise.using(keys):
            logits = self.match_head(self.fusion(text, text_mask, image).pooled)
        return logits if logits.dtype == torch.float64 else logits.float()

    def sample_keys(self, position: Tensor) -> Tensor:
        """What dropout knows samples [B] by, in all towers."""
        return row_keys(self.seed, position)

    def plan(self, batch: Batch, output: ModelOutput) -> MatchPlan:
        """Draw the negatives of the global batch, of which `batch` and `output` are this rank's whole part. Collective."""
        embeddings = (output.image_embed, output.text_embed, output.logit_scale)
        return plan_matches(batch, *embeddings, self.seed, self.config.random_negatives, self.world)

    def match(
        self, batch: Batch, image: Tower, text: Tower, keys: Tensor, pairs: MatchPairs, output: ModelOutput
    ) -> None:
        """Fill in the match part: the texts that are not of these images are encoded here, beside the images.

        An image that many texts resemble is drawn by many. Those beyond the usual number come in chunks of their own,
        which the backward pass computes again, so that they take time but no memory.
        """
        size, count = len(batch.ids), len(pairs.ids)
        image_rows = torch.cat([torch.arange(size, device=pairs.incoming.device), pairs.incoming])
        text_keys = self.sample_keys(pairs.text_position)

        def match_others(image_tokens: Tensor, text_tokens: Tensor, start: int, stop: int) -> Tensor:
            """Logits of the texts [start, stop) of `pairs` with their images; before the first ones, those of the own."""
            chunk = slice(start, stop)
            if pairs.all_own:
                others = text_tokens[pairs.text[chunk]]
            else:
                others = self.encode_text(pairs.ids[chunk], pairs.mask[chunk], text_keys[chunk]).tokens
            rows = image_rows[chunk]
            sides = [others, pairs.mask[chunk], image_tokens[rows], pair_keys(keys[rows], text_keys[chunk])]
            if start == 0:
                own = [text_tokens, batch.mask, image_tokens, pair_keys(keys, keys)]
                sides = [torch.cat(both) for both in zip(own, sides, strict=True)]
            return self.match_pairs(*sides)

        chunks = [match_others(image.tokens, text.tokens, 0, 2 * size)]
        for start in range(2 * size, count, size):
            arguments = (image.tokens, text.tokens, start, start + size)
            chunks.append(checkpoint(match_others, *arguments, use_reentrant=False, preserve_rng_state=False))
        output.match_logits = torch.cat(chunks)
        output.match_labels = pairs.labels
        output.match_weight = pairs.weight.to(output.match_logits.dtype)


def normalise(image: Tensor) -> Tensor:
    """uint8 [B,3,H,W] -> float32 of zero mean and unit deviation (as CLIP counts them)."""
    mean = torch.tensor(PIXEL_MEAN, device=image.device)[:, None, None] * 255
    std = torch.tensor(PIXEL_STD, device=image.device)[:, None, None] * 255
    return (image - mean) / std


def build_model(config: ModelConfig, tokenizer: Tokenizer, seed: int = 0, world: World | None = None) -> ImageTextModel:
    """A model with the weights that `seed` gives, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ImageTextModel(config, tokenizer, seed, world)

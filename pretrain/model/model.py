"""The image-text model: two towers, and a fusion with a match head over true pairs and hard negatives.

Shape legend: B pairs per rank, G = B x world, N image tokens, L text tokens, D width, E embedding, P = 3B match pairs.
"""

import math

import pydantic
import torch
from torch import Tensor, nn

from pretrain.config import ConfigModel, Count, union_by_kind
from pretrain.contract import Batch, ModelOutput
from pretrain.data.text import TOKENIZERS, ClipTokenizerConfig, Tokenizer
from pretrain.model.blocks import (
    checkpoint_blocks,
    compile_blocks,
    freeze,
    keep_frozen_in_evaluation,
    no_contexts,
)
from pretrain.model.fusion import FUSIONS
from pretrain.model.negatives import draw_negatives, find_true_pairs
from pretrain.model.towers import IMAGE_TOWERS, TEXT_TOWERS, Tower, unit
from pretrain.model.warm_start import WARM_STARTS
from pretrain.randomness import uniform
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


class ImageTextModel(nn.Module):
    """`model(batch)` returns a `ModelOutput`. Every rank calls the same modules in the same order."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, seed: int = 0, world: World | None = None):
        super().__init__()
        self.config, self.seed, self.world = config, seed, world or World()
        self.image_tower = config.image.build(config.embed_dim, self.world)
        text_layer = config.fusion.text_layer if config.fusion else None
        self.text_tower = config.text.build(config.embed_dim, tokenizer, text_layer)
        self.logit_scale = LogitScale(config.init_logit_scale)
        self.fusion = self.match_head = None
        if config.fusion:
            self.fusion = config.fusion.build(self.image_tower.width, self.text_tower)
            self.match_head = nn.Linear(self.fusion.width, 2)
        freeze(self, config.freeze)
        if config.checkpoint_activations:
            checkpoint_blocks(self, no_contexts)
        if config.compile:
            compile_blocks(self)

    def train(self, mode: bool = True) -> "ImageTextModel":
        super().train(mode)
        keep_frozen_in_evaluation(self, self.config.freeze)
        return self

    def forward(self, batch: Batch) -> ModelOutput:
        image, text = self.encode_image(batch.image), self.encode_text(batch.ids, batch.mask)
        output = ModelOutput(unit(image.pooled), unit(text.pooled), self.logit_scale())
        if self.fusion:
            self.match(batch, image, text, output)
        return output

    def encode_image(self, image: Tensor) -> Tower:
        """[B,3,H,W] uint8 -> tokens [B,N,D], pooled [B,E] (not yet of unit norm)."""
        return self.image_tower(normalise(image).to(self.logit_scale.log_scale.dtype))  # the parameters' precision

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tower:
        """[B,L] ids and mask -> tokens [B,L,D], pooled [B,E] (not yet of unit norm)."""
        return self.text_tower(ids, mask)

    def match_pairs(self, text: Tensor, text_mask: Tensor, image: Tensor) -> Tensor:
        """Match logits [P,2] (mismatch, match) of text tokens [P,L,D] with image tokens [P,N,D], pair by pair."""
        logits = self.match_head(self.fusion(text, text_mask, image).pooled)
        return logits if logits.dtype == torch.float64 else logits.float()

    def match(self, batch: Batch, image: Tower, text: Tower, output: ModelOutput) -> None:
        """Fill in the match part: each own pair, each own image with a hard text, each own text with a hard image."""
        world, seed, share = self.world, self.seed, self.config.random_negatives
        with torch.no_grad():
            image_pairs, text_pairs = find_true_pairs(batch, world)
            draws = [
                torch.from_numpy(uniform(seed, purpose, batch.position)).to(batch.image.device)
                for purpose in ("hard text", "hard image")
            ]
            text_scores = output.logit_scale * output.image_embed @ world.all_gather(output.text_embed).T
            image_scores = output.logit_scale * output.text_embed @ world.all_gather(output.image_embed).T
            hard_text, has_text = draw_negatives(text_scores, image_pairs, draws[0], share)
            hard_image, has_image = draw_negatives(image_scores, text_pairs, draws[1], share)

        all_image, all_text = world.all_gather(image.tokens), world.all_gather(text.tokens)
        all_mask = world.all_gather(batch.mask)
        output.match_logits = self.match_pairs(
            torch.cat([text.tokens, all_text[hard_text], text.tokens]),
            torch.cat([batch.mask, all_mask[hard_text], batch.mask]),
            torch.cat([image.tokens, image.tokens, all_image[hard_image]]),
        )
        ones = torch.ones_like(has_text)
        output.match_labels = torch.cat([ones, ~ones, ~ones]).long()
        output.match_weight = torch.cat([ones, has_text, has_image]).to(output.match_logits.dtype)


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

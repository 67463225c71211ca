"""The image-text model: two towers, and a fusion with heads: for matching over true pairs and hard negatives, for tokens.

Shape legend: B pairs per rank, G = B x world, N image tokens, L text tokens, D width, E embedding, P match pairs.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pydantic
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from data_tools.errors import first_line
from pretrain.config import ConfigError, ConfigModel, Count, union_by_kind
from pretrain.contract import Batch, ModelOutput
from pretrain.data.text import TOKENIZERS, ClipTokenizerConfig, Tokenizer
from pretrain.model.blocks import (
    checkpoint_blocks,
    compile_blocks,
    find_blocks,
    freeze,
    keep_frozen_in_evaluation,
)
from pretrain.model.fusion import FUSIONS
from pretrain.model.language import TokenHead, TokenWeights, embedding_matrix, mask_tokens, predict
from pretrain.model.negatives import MatchPairs, MatchPlan, plan_matches
from pretrain.model.noise import Noise, derive_keys, pair_keys, replace_dropouts, row_keys
from pretrain.model.towers import IMAGE_TOWERS, TEXT_TOWERS, Tower, pool, unit
from pretrain.model.warm_start import WARM_STARTS
from pretrain.world import World

MAX_LOGIT_SCALE = 100.0


class CaptioningConfig(ConfigModel):
    """A head that predicts each caption's next token, from the image and the tokens before."""


class MaskedLanguageConfig(ConfigModel):
    """A head that predicts masked tokens of a caption, from the image and the tokens around."""

    mask_share: float = pydantic.Field(default=0.15, gt=0, lt=1)


class ModelConfig(ConfigModel):
    embed_dim: Count = 512  # E, of both sides
    image: union_by_kind(IMAGE_TOWERS)
    text: union_by_kind(TEXT_TOWERS)
    tokenizer: union_by_kind(TOKENIZERS) = ClipTokenizerConfig()
    fusion: union_by_kind(FUSIONS) | None = None  # none: contrastive only
    match_head: bool = True  # of the fusion, for losses.matching; without: a fusion for captions only
    captioning: CaptioningConfig | None = None  # for losses.captioning
    masked_language: MaskedLanguageConfig | None = None  # for losses.masked_language
    random_negatives: float = pydantic.Field(default=0.5, ge=0, le=1)  # share of the match negatives not drawn hard
    init_logit_scale: float = pydantic.Field(default=1 / 0.07, gt=0, le=MAX_LOGIT_SCALE)
    init_logit_bias: float | None = None  # for losses.sigmoid: -10 in SigLIP, with a scale of 10; none: no bias
    warm_start: list[union_by_kind(WARM_STARTS)] = []  # weights to begin with, each source over the ones before
    freeze: list[str] = []  # beginnings of parameter names that are not trained: [image_tower] is LiT
    checkpoint_activations: bool = False  # keep none inside blocks: less memory, a third more time
    compile: bool = False  # torch.compile, block by block

    @pydantic.model_validator(mode="after")
    def check_heads(self) -> "ModelConfig":
        for name, able in (("captioning", "decodes"), ("masked_language", "has_text_tokens")):
            if getattr(self, name) and not self.fusion:
                raise ValueError(f"{name} needs a fusion to predict from: set model.fusion")
            if getattr(self, name) and not getattr(self.fusion, able):
                which = " ".join(filter(None, (self.fusion.kind, getattr(self.fusion, "direction", None))))
                fitting = {
                    "captioning": "med, shared or cross text_to_image, where no text reaches an earlier token",
                    "masked_language": "any but cross image_to_text, whose fused tokens are the image's",
                }
                raise ValueError(f"{name} cannot be done by a fusion of kind {which}: choose {fitting[name]}")
        return self


class LogitScale(nn.Module):
    """The learnt factor of the similarities, kept as its logarithm. Shape [1]: DeepSpeed broadcasts no 0-d parameter."""

    def __init__(self, initial: float):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(initial)]))

    def forward(self) -> Tensor:
        # Clamped here too, not on the parameter alone: rounded to 16 bits, what the optimiser has can be above the bound.
        log_scale = self.log_scale if self.log_scale.dtype == torch.float64 else self.log_scale.float()
        return log_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp()


class LogitBias(nn.Module):
    """What is added to the scaled similarities, learnt. A module of its own, for ZeRO-3 to gather. Shape [1]."""

    def __init__(self, initial: float):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([initial]))

    def forward(self) -> Tensor:
        return self.bias if self.bias.dtype == torch.float64 else self.bias.float()


class KnownTexts(NamedTuple):
    """Texts that need not be encoded again."""

    tokens: Tensor  # [G,L,D] of the global batch
    own: Tower  # of the micro-batch; `pooled` of unit norm


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
        self.fusion = self.match_head = self.caption_head = self.masked_head = None
        self.tokenizer = tokenizer
        if config.fusion:
            self.fusion = config.fusion.build(self.image_tower.width, self.text_tower)
        if config.fusion and config.match_head:
            self.match_head = nn.Linear(self.fusion.width, 2)
        if config.captioning:
            if not self.text_tower.is_causal and self.text_tower.bert_layers is None:
                raise ConfigError(
                    "model.captioning: this text tower cannot read from left to right. Set model.text.kind=clip or bert, "
                    "or an encoder built like BERT"
                )
            self.caption_head = TokenHead(self.fusion.width, self.text_tower.embedding)
        if config.masked_language:
            if tokenizer.mask_id is None:
                raise ConfigError(
                    f"model.masked_language: the tokenizer (kind: {tokenizer.config.kind}) has no mask token. Set one that "
                    "has, such as BERT's: model.tokenizer={kind: huggingface, name: google-bert/bert-base-uncased}"
                )
            self.masked_head = TokenHead(self.fusion.width, self.text_tower.embedding)
        replace_dropouts(self, self.noise)
        freeze(self, config.freeze)
        if config.compile:
            compile_blocks(self)
        if config.checkpoint_activations:
            checkpoint_blocks(self, self.noise.checkpoint_contexts)

    def train(self, mode: bool = True) -> "ImageTextModel":
        super().train(mode)
        keep_frozen_in_evaluation(self, self.config.freeze)
        return self

    def forward(
        self,
        batch: Batch,
        heads: bool = True,
        pairs: MatchPairs | None = None,
        token_weights: TokenWeights | None = None,
        texts: KnownTexts | None = None,
        text_only: bool = False,
    ) -> ModelOutput | Tower:
        """Embeddings of the batch and, unless `heads` is off, what the heads make of its fused tokens.

        Without `pairs`, negatives are drawn from these very embeddings, which then have to be the rank's whole batch; a
        micro-batch is given the `pairs` that were drawn for it. So it is with `token_weights`, the counted tokens. Given the
        `texts`, it encodes images only, and with `text_only` texts only: these are the tower's, `pooled` of unit norm.
        """
        keys = self.sample_keys(torch.from_numpy(batch.position).to(batch.image.device))
        if text_only:
            text = self.encode_text(batch.ids, batch.mask, keys)
            return Tower(text.tokens, unit(text.pooled))
        image = self.encode_image(batch.image, keys)
        text = texts.own if texts else self.encode_text(batch.ids, batch.mask, keys)
        output = ModelOutput(
            unit(image.pooled),
            text.pooled if texts else unit(text.pooled),
            self.logit_scale(),
            self.logit_bias() if self.logit_bias else None,
            batch.identity,
            text_tokens=text.tokens,
        )
        if heads and self.match_head:
            pairs = pairs or self.plan(batch, output).pairs(0, len(batch.image))
            everyone = texts.tokens if texts else (text.tokens if pairs.all_own else None)
            self.match(batch, image, text, keys, pairs, everyone, output)
        if heads and (self.caption_head or self.masked_head):
            self.predict_tokens(batch, image, text, keys, token_weights or self.weigh_tokens(batch), output)
        return output

    def encode_image(self, image: Tensor, keys: Tensor | None = None) -> Tower:
        """[B,3,H,W] uint8 -> tokens [B,N,D], pooled [B,E] (not yet of unit norm); `keys` [B] for dropout in training."""
        with self.noise.using(keys):
            pixels = self.config.image.normalise(image)
            return self.image_tower(pixels.to(self.logit_scale.log_scale.dtype))  # the parameters' precision

    def encode_text(self, ids: Tensor, mask: Tensor, keys: Tensor | None = None) -> Tower:
        """[B,L] ids and mask -> tokens [B,L,D], pooled [B,E] (not yet of unit norm); `keys` [B] for dropout in training."""
        with self.noise.using(keys):
            return self.text_tower(ids, mask)

    def match_pairs(
        self, text: Tensor, text_mask: Tensor, image: Tensor, *, rows: Tensor | None = None, keys: Tensor | None = None
    ) -> Tensor:
        """Match logits [P,2] (mismatch, match) of text tokens [P,L,D], each with its row [P] of image tokens [I,N,D] (without
        `rows`, pair by pair); `keys` [P] for dropout in training."""
        with self.noise.using(keys):
            logits = self.match_head(self.fusion(text, text_mask, image, rows).pooled)
        return logits if logits.dtype == torch.float64 else logits.float()

    def sample_keys(self, position: Tensor) -> Tensor:
        """What dropout knows samples [B] by, in all towers."""
        return row_keys(self.seed, position)

    def plan(self, batch: Batch, output: ModelOutput) -> MatchPlan:
        """Draw the negatives of the global batch, of which `batch` and `output` are this rank's whole part. Collective."""
        embeddings = (output.image_embed, output.text_embed, output.logit_scale)
        return plan_matches(batch, *embeddings, self.seed, self.config.random_negatives, self.world)

    def match(
        self,
        batch: Batch,
        image: Tower,
        text: Tower,
        keys: Tensor,
        pairs: MatchPairs,
        everyone: Tensor | None,
        output: ModelOutput,
    ) -> None:
        """Fill in the match part: the texts that are not of these images are encoded here, beside the images, unless the
        tokens of `everyone` [G,L,D] are there.

        An image that many texts resemble is drawn by many. Those beyond the usual number come in chunks of their own,
        which the backward pass computes again, so that they take time but no memory.
        """
        size, count = len(batch.ids), len(pairs.ids)
        image_rows = torch.cat([torch.arange(size, device=pairs.incoming.device), pairs.incoming])
        text_keys = self.sample_keys(pairs.text_position)

        def match_others(image_tokens: Tensor, text_tokens: Tensor, start: int, stop: int) -> Tensor:
            """Logits of the texts [start, stop) of `pairs` with their images; before the first ones, those of the own."""
            chunk = slice(start, stop)
            if everyone is None:
                others = self.encode_text(pairs.ids[chunk], pairs.mask[chunk], text_keys[chunk]).tokens
            else:
                others = everyone[pairs.text[chunk]]
            rows = image_rows[chunk]
            sides = [others, pairs.mask[chunk], rows, pair_keys(keys[rows], text_keys[chunk])]
            if start == 0:
                own = [text_tokens, batch.mask, image_rows[:size], pair_keys(keys, keys)]
                sides = [torch.cat(both) for both in zip(own, sides, strict=True)]
            texts, mask, rows, noise_keys = sides
            if start > 0:  # these are fewer than the images
                image_tokens, rows = image_tokens[rows], None
            return self.match_pairs(texts, mask, image_tokens, rows=rows, keys=noise_keys)

        chunks = [match_others(image.tokens, text.tokens, 0, 2 * size)]
        for start in range(2 * size, count, size):
            arguments = (image.tokens, text.tokens, start, start + size)
            chunks.append(checkpoint(match_others, *arguments, use_reentrant=False, preserve_rng_state=False))
        output.match_logits = torch.cat(chunks)
        output.match_labels = pairs.labels
        output.match_weight = pairs.weight.to(output.match_logits.dtype)

    def weigh_tokens(self, batch: Batch) -> TokenWeights | None:
        """Count the tokens to predict in the global batch, of which `batch` is this rank's whole part. Collective.

        None for a model that predicts no tokens.
        """
        if not (self.caption_head or self.masked_head):
            return None
        counts = self.world.all_reduce(self.count_tokens(batch))
        return TokenWeights(*(self.world.size / counts.clamp(min=1).double()))

    def count_tokens(self, batch: Batch) -> Tensor:
        """[2] int64: tokens of this batch to predict in captioning, and masked ones; 0 where there is no head for them."""
        none = torch.zeros_like(batch.mask)
        captioned = batch.mask[:, 1:] if self.caption_head else none
        masked = self.mask_tokens(batch)[1] if self.masked_head else none
        return torch.stack([captioned.sum(), masked.sum()])

    def mask_tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch's ids [B,L] with some masked, and which [B,L]: a function of the seed and the samples' positions."""
        keys = self.sample_keys(torch.from_numpy(batch.position).to(batch.ids.device))
        share = self.config.masked_language.mask_share
        return mask_tokens(batch.ids, batch.mask, keys, self.tokenizer, share)

    def predict_tokens(
        self, batch: Batch, image: Tower, text: Tower, keys: Tensor, weights: TokenWeights, output: ModelOutput
    ) -> None:
        """Fill in the predictions of true pairs' tokens. Each kind reads the text once more, with dropout of its own."""
        embedding = embedding_matrix(self.text_tower.embedding)
        if self.caption_head:
            with self.noise.using(derive_keys(keys, "captioning")):
                causal = self.text_tower.is_causal
                tokens = text.tokens if causal else self.text_tower.causal_tokens(batch.ids, batch.mask)
                tokens = self.fusion.decode(tokens, batch.mask, image.tokens)[:, :-1]
            chosen, ids = batch.mask[:, 1:], batch.ids[:, 1:]
            output.captioning = predict(self.caption_head, tokens, chosen, ids, embedding, weights.captioning)
        if self.masked_head:
            ids, chosen = self.mask_tokens(batch)
            with self.noise.using(derive_keys(keys, "masked language")):
                tokens = self.text_tower(ids, batch.mask).tokens
                tokens = self.fusion(tokens, batch.mask, image.tokens).tokens[:, : ids.shape[1]]
            output.masked_language = predict(
                self.masked_head, tokens, chosen, batch.ids, embedding, weights.masked_language
            )


def build_model(config: ModelConfig, tokenizer: Tokenizer, seed: int = 0, world: World | None = None) -> ImageTextModel:
    """A model with the weights that `seed` gives, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ImageTextModel(config, tokenizer, seed, world)


def check_towers(model: ImageTextModel, layer_decay: float = 1.0) -> None:
    """Run the towers that are built from other libraries' code by name, on two samples as in training.

    Raises ConfigError, in one line, for a tower that cannot be run, for one whose result depends on torch's generator (with
    ranks and micro-batches it would be another), for one that is trained and has no blocks for what is to be done by block,
    and for a text tower whose embedding does not depend on the text.
    """
    by_block = {
        "model.checkpoint_activations": model.config.checkpoint_activations,
        "model.compile": model.config.compile,
        "engine.layer_decay": layer_decay < 1,
    }
    by_block = [key for key, is_set in by_block.items() if is_set]
    size, length = model.config.image.image_size, model.config.text.context_length
    pixels = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    # No id that a library takes for padding, by which RoBERTa counts its positions.
    ids, mask = torch.full((2, length), min(5, model.tokenizer.vocab_size - 1)), torch.ones(2, length, dtype=torch.bool)
    keys = model.sample_keys(torch.arange(2))
    runs = {"image": lambda: model.encode_image(pixels, keys), "text": lambda: model.encode_text(ids, mask, keys)}
    for side, run in runs.items():
        config, tower = getattr(model.config, side), getattr(model, f"{side}_tower")
        if config.kind not in ("timm", "huggingface"):
            continue
        norms = [module for module in tower.modules() if isinstance(module, _BatchNorm) and module.training]
        for norm in norms:
            norm.eval()  # these two samples are no part of its statistics
        try:
            alike = is_repeatable(run)
            called = blocks_called(tower, run) if by_block else []
        except ConfigError:
            raise
        except Exception as error:  # whatever other people's code says of an input that it was not made for
            raise ConfigError(
                f"model.{side}: this tower cannot be run on a batch: {type(error).__name__}: {first_line(error)} Choose "
                "another model or other settings"
            ) from None
        for norm in norms:
            norm.train()
        if not alike:
            raise ConfigError(
                f"model.{side}: something in this tower is dropped by torch's generator, not by sample, so ranks and "
                f"micro-batches would change the result. Set to 0 what drops there{name_dropouts(side, config, tower)}"
            )
        if by_block and any(parameter.requires_grad for parameter in tower.parameters()):
            check_blocks(side, called, by_block)
    if model.config.text.kind == "huggingface":
        check_pooling(model)


@torch.no_grad()
def blocks_called(tower: nn.Module, run: Callable[[], Tower]) -> list[int]:
    """The numbers of a tower's blocks in the order in which it calls them."""
    called = []
    hooks = [
        block.register_forward_pre_hook(lambda *_, number=number: called.append(number))
        for number, block in enumerate(find_blocks(tower).values())
    ]
    try:
        with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return called


def check_blocks(side: str, called: list[int], by_block: list[str]) -> None:
    """Raises ConfigError where these settings would do nothing on a tower, and for a decay over blocks in another order than
    they stand in, such as XLM's, whose attentions are in one list and the rest of its layers in others."""
    if not called:
        raise ConfigError(
            f"model.{side}: this tower is no sequence of like blocks, so {' and '.join(by_block)} would do nothing on it. "
            "Leave that out, choose another tower, or freeze this one"
        )
    if "engine.layer_decay" in by_block and called != sorted(called):
        raise ConfigError(
            f"model.{side}: this tower does not call its blocks in the order in which they stand, so engine.layer_decay would "
            "take them for another depth. Set it to 1, or choose another tower"
        )


def is_close(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding."""
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def check_pooling(model: ImageTextModel) -> None:
    """Raises ConfigError where texts that begin with the same token have the same embedding: where the first token of a
    causal encoder is pooled, which knows nothing of the rest.

    Tried on two texts that differ between the first token and the last. They share their dropouts.
    """
    tower, config, end_id = model.text_tower, model.config.text, model.tokenizer.end_id
    ids = torch.full((2, config.context_length), min(5, model.tokenizer.vocab_size - 1))
    ids[1, 1:-1] -= 1
    if end_id is not None:
        ids[:, -1] = end_id
    mask = torch.ones_like(ids, dtype=torch.bool)
    with model.noise.using(model.sample_keys(torch.tensor([0, 0]))), torch.compiler.set_stance("force_eager"):
        output = tower.encode(ids, mask)
    tokens = output.last_hidden_state
    tower.tap.tokens(tokens)  # which forgets what it took
    pooled = pool(output, tokens, mask, config.pooling)
    if not is_close(*pooled) or is_close(*tokens[:, -1]):  # that one too: new weights that let tokens see no others
        return
    model_type, has_pooler = tower.inner.config.model_type, getattr(output, "pooler_output", None) is not None
    if config.pooling == "first":
        raise ConfigError(
            f"model.text.pooling: first, but {model_type} reads from left to right, so its first token knows nothing of the "
            f"text. Set model.text.pooling=mean{' or pooler' if has_pooler else ''}"
        )
    raise ConfigError(
        f"model.text.pooling: the pooler of this {model_type} does not find the end of a text. Set "
        + (f"model.text.config.eos_token_id={end_id}, the tokenizer's end mark, or " if end_id is not None else "")
        + "model.text.pooling=mean"
    )


@torch.no_grad()
def is_repeatable(run: Callable[[], Tower]) -> bool:
    """Whether two calls give the same, whatever state torch's generator is in."""
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(0)
        before, first = torch.get_rng_state(), run()
        if torch.equal(torch.get_rng_state(), before):
            return True
        torch.manual_seed(1)
        return all(torch.equal(one, other) for one, other in zip(first, run(), strict=True))


def name_dropouts(side: str, config: ConfigModel, tower: nn.Module) -> str:
    """The keys of this tower's settings that sound like it, as a list to append; "" if none does."""
    if config.kind == "timm":
        section, settings = "settings", config.settings
    else:
        section, settings = "config", tower.inner.config.to_dict()
    keys = [key for key, value in settings.items() if "drop" in key and isinstance(value, float) and value > 0]
    return f": {', '.join(f'model.{side}.{section}.{key}' for key in keys)}" if keys else ""

"""Fusion of the two sides, chosen by `kind`: tokens and masks of both in, fused tokens and a pooled vector out.

Every fusion is called as `fusion(text, text_mask, image, rows)`: text [P,L,D_text] from the layer of the text tower that
its config names (`text_layer`), text_mask [P,L] bool (True = a real token), image [I,N,D_image], and which of the images
each text goes with, rows [P] (None: its own, I = P). What is computed of an image alone is computed once, however many
texts it goes with. It returns `Fused`, in which padding has no part: neither real tokens nor the pooled vector depend on
it. `fusion.width` is D.

Those whose config says `decodes` are also called as `fusion.decode(text, text_mask, image)`, with tokens of a causal text
tower: [P,L,D], of which a token knows the image and the text up to itself, so that the next one can be predicted from it.

Shape legend: P match pairs, I images, N image tokens, L text tokens, D fusion width.
"""

from typing import ClassVar, Literal, NamedTuple

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ConfigError, ConfigModel, Count, Ratio
from pretrain.model.language import attention_bias, causal_mask


class Fused(NamedTuple):
    tokens: Tensor  # [P,*,D]: L, N or L+N of them (text first), as the kind says
    mask: Tensor  # [P,*] bool, True = a real token
    pooled: Tensor  # [P,D]


Dropout = pydantic.Field(default=0.0, ge=0, lt=1)
TextLayer = pydantic.Field(default=None, ge=0)


class TransformerConfig(ConfigModel):
    """What the kinds with layers of their own share."""

    width: Count = 768
    layers: Count = 6
    heads: Count = 12
    mlp_ratio: Ratio = 4.0
    dropout: float = Dropout  # of what each branch adds to the residual stream
    from_layer: int | None = TextLayer  # fuse the text as it is after so many layers of its tower; none: its output

    decodes: ClassVar[bool] = False  # whether it has `decode`: no text may reach an earlier one, also not by the image
    has_text_tokens: ClassVar[bool] = True  # whether its fused tokens begin with the text's

    @pydantic.model_validator(mode="after")
    def check_sizes(self) -> "TransformerConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    @property
    def text_layer(self) -> int | None:
        """The text tower's layer after which its tokens are taken; None: after the last, as the tower gives them."""
        return self.from_layer


class CrossAttentionConfig(TransformerConfig):
    """One side attends to the other: layers of self-attention, cross-attention, and an MLP."""

    kind: Literal["cross"]
    # Who attends to whom. Fused tokens are those of who attends; with `both` (co-attention) the text's, then the image's.
    direction: Literal["text_to_image", "image_to_text", "both"] = "text_to_image"

    @property
    def decodes(self) -> bool:
        return self.direction == "text_to_image"

    @property
    def has_text_tokens(self) -> bool:
        return self.direction != "image_to_text"

    def build(self, image_width: int, text_tower: nn.Module) -> nn.Module:
        return CrossAttentionFusion(self, image_width, text_tower.width)


class SharedConfig(TransformerConfig):
    """One transformer over the joined sequence of text and image tokens, each marked with its side."""

    kind: Literal["shared"]
    decodes: ClassVar[bool] = True

    def build(self, image_width: int, text_tower: nn.Module) -> nn.Module:
        return SharedFusion(self, image_width, text_tower.width)


class WeightedConfig(TransformerConfig):
    """Each token is weighted against what it finds on the other side, by gates learnt from both."""

    kind: Literal["weighted"]
    layers: Count = 2

    def build(self, image_width: int, text_tower: nn.Module) -> nn.Module:
        return WeightedFusion(self, image_width, text_tower.width)


class MedConfig(ConfigModel):
    """BLIP's mixture of encoder and decoder: BERT's layers with cross-attention between self-attention and MLP.

    Without `layers` these are the text tower's own layers, weights shared (BLIP). With `layers` they are that many more,
    behind the tower's (ALBEF: a tower of 6 layers, 6 layers here, which a warm start fills from one BERT of 12).
    """

    kind: Literal["med"]
    layers: Count | None = None
    dropout: float = Dropout  # of what the cross-attention adds
    from_layer: int | None = TextLayer  # none: shared layers all have cross-attention; own ones follow the last layer

    decodes: ClassVar[bool] = True
    has_text_tokens: ClassVar[bool] = True

    @property
    def text_layer(self) -> int | None:
        return 0 if self.from_layer is None and self.layers is None else self.from_layer

    def build(self, image_width: int, text_tower: nn.Module) -> nn.Module:
        return MedFusion(self, image_width, text_tower)


FUSIONS: dict[str, type[ConfigModel]] = {
    "cross": CrossAttentionConfig,
    "shared": SharedConfig,
    "weighted": WeightedConfig,
    "med": MedConfig,
}


def spread(image: Tensor, rows: Tensor | None) -> Tensor:
    """[I,...] -> [P,...]: each pair's own."""
    return image if rows is None else image[rows]


class Attention(nn.Module):
    """Multi-head attention of `x` [P,X,D] to `context` [P,C,D']; `mask`, [P,C] or [P,X,C], is True where it may look.

    With `rows` [P], `context` is [I,C,D'], and its row that each of `x` looks at is told there.

    With `gated`, what was found is multiplied by a projection of who asked, so that one layer can compare the two. A
    sum alone can hardly say whether they agree, and matching then starts to learn much later.
    """

    def __init__(self, width: int, context_width: int, heads: int, gated: bool = False):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.gate = nn.Linear(width, width) if gated else None
        self.key_value = nn.Linear(context_width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = spread(self.key_value(context), rows).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if mask is not None:
            mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended = attended.transpose(1, 2).flatten(2)
        return self.out(attended if self.gate is None else attended * self.gate(x))


class Mlp(nn.Sequential):
    def __init__(self, width: int, ratio: float):
        hidden = int(width * ratio)
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Pool(nn.Module):
    """[P,X,D] -> [P,D]: the mean over real tokens, and what that mean attends to among them.

    In the mean alone, the one word that does not fit the image is lost among those that do.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = Attention(width, width, heads)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        mean = masked_mean(tokens, mask)
        return (mean + self.attention(mean, tokens, mask))[:, 0]


def masked_mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """[P,X,D], [P,X] bool -> [P,1,D]."""
    if mask is None:
        return tokens.mean(1, keepdim=True)
    share = mask.to(tokens.dtype)[..., None]
    return (tokens * share).sum(1, keepdim=True) / share.sum(1, keepdim=True)


class CrossAttentionLayer(nn.Module):
    """Pre-norm: self-attention, cross-attention to the other side, MLP, each with a residual connection."""

    def __init__(self, config: CrossAttentionConfig, other_width: int):
        super().__init__()
        width, co_attention = config.width, config.direction == "both"
        self.self_norm, self.cross_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        # A tower's output is normalised already; the other side's residual stream, which co-attention sees, is not.
        self.other_norm = nn.LayerNorm(width) if co_attention else nn.Identity()
        self.self_attention = Attention(width, width, config.heads)
        self.cross_attention = Attention(width, width if co_attention else other_width, config.heads, gated=True)
        self.mlp = Mlp(width, config.mlp_ratio)
        # One each: a dropout's place in the model is what its masks are made from.
        self.self_dropout, self.cross_dropout, self.mlp_dropout = (nn.Dropout(config.dropout) for _ in range(3))

    def forward(
        self, x: Tensor, mask: Tensor | None, other: Tensor, other_mask: Tensor | None, rows: Tensor | None = None
    ) -> Tensor:
        y = self.self_norm(x)
        x = x + self.self_dropout(self.self_attention(y, y, mask))
        found = self.cross_attention(self.cross_norm(x), self.other_norm(other), other_mask, rows)
        x = x + self.cross_dropout(found)
        return x + self.mlp_dropout(self.mlp(self.mlp_norm(x)))


class CrossAttentionStack(nn.Module):
    """The layers of one side. They attend to the other side's tokens, which come in anew for each layer."""

    def __init__(self, config: CrossAttentionConfig, own_width: int, other_width: int):
        super().__init__()
        self.enter = nn.Linear(own_width, config.width)
        self.layers = nn.ModuleList(CrossAttentionLayer(config, other_width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.pool = Pool(config.width, config.heads)


class CrossAttentionFusion(nn.Module):
    """Source: ALBEF, arXiv:2107.07651 (text to image); LXMERT, arXiv:1908.07490, and ViLBERT (both)."""

    def __init__(self, config: CrossAttentionConfig, image_width: int, text_width: int):
        super().__init__()
        self.width = config.width
        self.text = self.image = None
        if config.direction != "image_to_text":
            self.text = CrossAttentionStack(config, text_width, image_width)
        if config.direction != "text_to_image":
            self.image = CrossAttentionStack(config, image_width, text_width)
        initialise(self, config.layers)

    def forward(self, text: Tensor, text_mask: Tensor, image: Tensor, rows: Tensor | None = None) -> Fused:
        if self.image is None:
            tokens = self.run_one_way(self.text, self.text.enter(text), text_mask, image, None, rows)
            return Fused(tokens, text_mask, self.text.pool(tokens, text_mask))
        entered = spread(self.image.enter(image), rows)
        image_mask = text_mask.new_ones(entered.shape[:2])
        if self.text is None:
            tokens = self.run_one_way(self.image, entered, None, text, text_mask)
            return Fused(tokens, image_mask, self.image.pool(tokens, None))
        text, image = self.text.enter(text), entered
        for text_layer, image_layer in zip(self.text.layers, self.image.layers, strict=True):
            text, image = text_layer(text, text_mask, image, None), image_layer(image, None, text, text_mask)
        text, image = self.text.norm(text), self.image.norm(image)
        pooled = self.text.pool(text, text_mask) + self.image.pool(image, None)
        return Fused(torch.cat([text, image], 1), torch.cat([text_mask, image_mask], 1), pooled)

    def decode(self, text: Tensor, text_mask: Tensor, image: Tensor) -> Tensor:
        return self.run_one_way(self.text, self.text.enter(text), causal_mask(text_mask), image, None)

    def run_one_way(
        self,
        own: CrossAttentionStack,
        x: Tensor,
        mask: Tensor | None,
        other: Tensor,
        other_mask: Tensor | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        for layer in own.layers:
            x = layer(x, mask, other, other_mask, rows)
        return own.norm(x)


class Joined(nn.Module):
    """Both sides at width D in one sequence, text first, each token marked with its side."""

    def __init__(self, width: int, image_width: int, text_width: int):
        super().__init__()
        self.text, self.image = nn.Linear(text_width, width), nn.Linear(image_width, width)
        self.side = nn.Embedding(2, width)  # 0 text, 1 image
        nn.init.normal_(self.side.weight, std=0.02)

    def forward(
        self, text: Tensor, text_mask: Tensor, image: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """-> tokens [P,L+N,D], mask [P,L+N]."""
        side = self.side(torch.arange(2, device=text.device))
        image = spread(self.image(image) + side[1], rows)
        tokens = torch.cat([self.text(text) + side[0], image], 1)
        return tokens, torch.cat([text_mask, text_mask.new_ones(image.shape[:2])], 1)


class SharedLayer(nn.Module):
    """Pre-norm: gated self-attention over the joined sequence, MLP, each with a residual connection."""

    def __init__(self, config: SharedConfig):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.width, config.heads, gated=True)
        self.mlp = Mlp(config.width, config.mlp_ratio)
        self.attention_dropout, self.mlp_dropout = nn.Dropout(config.dropout), nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.attention_norm(x)
        x = x + self.attention_dropout(self.attention(y, y, mask))
        return x + self.mlp_dropout(self.mlp(self.mlp_norm(x)))


class SharedFusion(nn.Module):
    """Source: UNITER, arXiv:1909.11740, and ViLT, arXiv:2102.03334: a single stream."""

    def __init__(self, config: SharedConfig, image_width: int, text_width: int):
        super().__init__()
        self.width = config.width
        self.enter = Joined(config.width, image_width, text_width)
        self.layers = nn.ModuleList(SharedLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.text_pool, self.image_pool = Pool(config.width, config.heads), Pool(config.width, config.heads)
        initialise(self, config.layers)

    def forward(self, text: Tensor, text_mask: Tensor, image: Tensor, rows: Tensor | None = None) -> Fused:
        tokens, mask = self.enter(text, text_mask, image, rows)
        for layer in self.layers:
            tokens = layer(tokens, mask)
        tokens = self.norm(tokens)
        length = text.shape[1]  # pooled side by side: in one mean over all, a few words are lost among many patches
        pooled = self.text_pool(tokens[:, :length], text_mask) + self.image_pool(tokens[:, length:], None)
        return Fused(tokens, mask, pooled)

    def decode(self, text: Tensor, text_mask: Tensor, image: Tensor) -> Tensor:
        """The image is a prefix: it sees itself, and the text sees it and what was said before (UniLM, arXiv:1905.03197)."""
        tokens, mask = self.enter(text, text_mask, image)
        length = text.shape[1]
        mask = mask[:, None, :].repeat(1, mask.shape[1], 1)
        mask[:, :length, :length] = causal_mask(text_mask)
        mask[:, length:, :length] = False
        for layer in self.layers:
            tokens = layer(tokens, mask)
        return self.norm(tokens)[:, :length]


class WeightedLayer(nn.Module):
    """A token becomes g * itself + (1 - g) * what it finds on the other side, g [D] a function of both; then an MLP."""

    def __init__(self, config: WeightedConfig):
        super().__init__()
        width = config.width
        self.own_norm, self.other_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.find = Attention(width, width, config.heads, gated=True)
        self.weigh = nn.Linear(2 * width, width)
        self.mlp = Mlp(width, config.mlp_ratio)
        self.find_dropout, self.mlp_dropout = nn.Dropout(config.dropout), nn.Dropout(config.dropout)

    def forward(self, own: Tensor, other: Tensor, other_mask: Tensor | None) -> Tensor:
        y = self.own_norm(own)
        found = self.find_dropout(self.find(y, self.other_norm(other), other_mask))
        gate = self.weigh(torch.cat([y, found], -1)).sigmoid()
        own = gate * own + (1 - gate) * found
        return own + self.mlp_dropout(self.mlp(self.mlp_norm(own)))


class WeightedFusion(nn.Module):
    """Source: gated multimodal units, arXiv:1702.01992, here a token at a time, in layers and both ways."""

    def __init__(self, config: WeightedConfig, image_width: int, text_width: int):
        super().__init__()
        self.width = config.width
        self.text_enter, self.image_enter = nn.Linear(text_width, config.width), nn.Linear(image_width, config.width)
        self.text_layers = nn.ModuleList(WeightedLayer(config) for _ in range(config.layers))
        self.image_layers = nn.ModuleList(WeightedLayer(config) for _ in range(config.layers))
        self.text_norm, self.image_norm = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.text_pool, self.image_pool = Pool(config.width, config.heads), Pool(config.width, config.heads)
        self.weigh = nn.Linear(2 * config.width, config.width)
        initialise(self, config.layers)

    def forward(self, text: Tensor, text_mask: Tensor, image: Tensor, rows: Tensor | None = None) -> Fused:
        text, image = self.text_enter(text), spread(self.image_enter(image), rows)
        image_mask = text_mask.new_ones(image.shape[:2])
        for text_layer, image_layer in zip(self.text_layers, self.image_layers, strict=True):
            text, image = text_layer(text, image, None), image_layer(image, text, text_mask)
        text, image = self.text_norm(text), self.image_norm(image)
        of_text, of_image = self.text_pool(text, text_mask), self.image_pool(image, None)
        gate = self.weigh(torch.cat([of_text, of_image], -1)).sigmoid()
        pooled = gate * of_text + (1 - gate) * of_image
        return Fused(torch.cat([text, image], 1), torch.cat([text_mask, image_mask], 1), pooled)


class MedLayer(nn.Module):
    """BERT's layer with BLIP's `crossattention` in it: post-norm, as all of BERT, and without a gate, so that weights fit.

    BERT's layer is in a tuple, where modules are not registered: its weights belong to the text tower, or to the fusion's
    `layers`, and are saved once, there.
    """

    def __init__(self, layer: nn.Module, width: int, image_width: int, heads: int, epsilon: float, dropout: float):
        super().__init__()
        self.bert_layer = (layer,)
        self.attention = Attention(width, image_width, heads)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=epsilon)

    def forward(self, text: Tensor, bias: Tensor, image: Tensor, rows: Tensor | None = None) -> Tensor:
        """`bias` [P,1,1,L] or [P,1,L,L] is added to the scores of self-attention."""
        (layer,) = self.bert_layer
        attended = layer.attention(text, bias)[0]
        crossed = self.norm(attended + self.dropout(self.attention(attended, image, rows=rows)))
        return layer.output(layer.intermediate(crossed), crossed)


class MedFusion(nn.Module):
    """The text tower's layers (or more of them), with cross-attention. Fused tokens are the text's; pooled is the first.

    Source: BLIP, arXiv:2201.12086, the image-grounded text encoder, as transformers' BlipForImageTextRetrieval has it.
    """

    def __init__(self, config: MedConfig, image_width: int, text_tower: nn.Module):
        super().__init__()
        layers = text_tower.bert_layers
        if layers is None:
            raise ConfigError("model.fusion.kind: med needs a text tower with BERT's layers: model.text.kind=bert")
        bert, self.width = text_tower.inner.config, text_tower.width
        if config.layers:
            layers = self.layers = nn.ModuleList(type(layers[0])(bert) for _ in range(config.layers))
        elif config.text_layer >= len(layers):
            raise ConfigError(
                f"model.fusion.from_layer: {config.text_layer} leaves none of the text tower's {len(layers)} layers"
            )
        else:
            layers = layers[config.text_layer :]
        sizes = (self.width, image_width, bert.num_attention_heads, bert.layer_norm_eps)
        self.cross = nn.ModuleList(MedLayer(layer, *sizes, config.dropout) for layer in layers)
        initialise(self, len(layers))

    def forward(self, text: Tensor, text_mask: Tensor, image: Tensor, rows: Tensor | None = None) -> Fused:
        tokens = self.run(text, attention_bias(text_mask[:, None, None, :], text.dtype), image, rows)
        return Fused(tokens, text_mask, tokens[:, 0])

    def decode(self, text: Tensor, text_mask: Tensor, image: Tensor) -> Tensor:
        """BLIP's text decoder, which shares all weights with its encoder but those of self-attention; here those too."""
        return self.run(text, attention_bias(causal_mask(text_mask)[:, None], text.dtype), image)

    def run(self, text: Tensor, bias: Tensor, image: Tensor, rows: Tensor | None = None) -> Tensor:
        for layer in self.cross:
            text = layer(text, bias, image, rows)
        return text


def initialise(fusion: nn.Module, layers: int) -> None:
    """Weights of deviation 1/sqrt(inputs), so that attention is varied from the start at any width (with BERT's 0.02 a
    narrow fusion begins uniform and hardly learns to match); branches into the residual start smaller, by depth."""
    for name, module in fusion.named_modules():
        if isinstance(module, nn.Linear):
            into_residual = name.endswith((".out", "mlp.2", "output.dense"))
            nn.init.normal_(module.weight, std=(module.in_features * (3 * layers if into_residual else 1)) ** -0.5)
            nn.init.zeros_(module.bias)

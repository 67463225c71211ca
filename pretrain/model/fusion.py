"""Fusion of the two sides, chosen by `kind`: tokens and masks of both in, fused tokens and a pooled vector out.

Shape legend: P match pairs, N image tokens, L text tokens, D fusion width.
"""

from typing import Literal, NamedTuple

import pydantic
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ConfigModel, Count, Ratio


class Fused(NamedTuple):
    tokens: Tensor  # [P,L,D]
    pooled: Tensor  # [P,D]


class CrossAttentionConfig(ConfigModel):
    """Text attends to the image: layers of self-attention over text, cross-attention to image tokens, and an MLP."""

    kind: Literal["cross"]
    width: Count = 768
    layers: Count = 6
    heads: Count = 12
    mlp_ratio: Ratio = 4.0
    dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)

    @pydantic.model_validator(mode="after")
    def check_sizes(self) -> "CrossAttentionConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    def build(self, image_width: int, text_width: int) -> nn.Module:
        return CrossAttentionFusion(self, image_width, text_width)


FUSIONS: dict[str, type[ConfigModel]] = {"cross": CrossAttentionConfig}


class Attention(nn.Module):
    """Multi-head attention of `x` [P,X,D] to `context` [P,C,D']; `mask` [P,C] is True where context is real.

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

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if mask is None else mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended = attended.transpose(1, 2).flatten(2)
        return self.out(attended if self.gate is None else attended * self.gate(x))


class CrossAttentionLayer(nn.Module):
    """Pre-norm: text self-attention, text-to-image cross-attention, MLP, each with a residual connection."""

    def __init__(self, config: CrossAttentionConfig, image_width: int):
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.self_norm, self.cross_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attention = Attention(width, width, config.heads)
        self.cross_attention = Attention(width, image_width, config.heads, gated=True)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        # One each: a dropout's place in the model is what its masks are made from.
        self.self_dropout, self.cross_dropout, self.mlp_dropout = (nn.Dropout(config.dropout) for _ in range(3))

    def forward(self, text: Tensor, text_mask: Tensor, image: Tensor) -> Tensor:
        y = self.self_norm(text)
        text = text + self.self_dropout(self.self_attention(y, y, text_mask))
        text = text + self.cross_dropout(self.cross_attention(self.cross_norm(text), image))
        return text + self.mlp_dropout(self.mlp(self.mlp_norm(text)))


class CrossAttentionFusion(nn.Module):
    def __init__(self, config: CrossAttentionConfig, image_width: int, text_width: int):
        super().__init__()
        self.width = config.width
        self.enter = nn.Linear(text_width, config.width)
        self.layers = nn.ModuleList(CrossAttentionLayer(config, image_width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.pool = Attention(config.width, config.width, config.heads)
        initialise(self, config.layers)

    def forward(self, text: Tensor, text_mask: Tensor, image: Tensor) -> Fused:
        """text [P,L,D_text], text_mask [P,L] bool, image [P,N,D_image] -> tokens [P,L,D] and pooled [P,D].

        The pooled vector is the mean over real tokens and what that mean attends to among them: in the mean alone, the
        one word that does not fit the image is lost among those that do.
        """
        text = self.enter(text)
        for layer in self.layers:
            text = layer(text, text_mask, image)
        tokens = self.norm(text)
        share = text_mask.to(tokens.dtype)[..., None]
        mean = (tokens * share).sum(1, keepdim=True) / share.sum(1, keepdim=True)
        return Fused(tokens, (mean + self.pool(mean, tokens, text_mask))[:, 0])


def initialise(fusion: nn.Module, layers: int) -> None:
    """Weights of deviation 1/sqrt(inputs), so that attention is varied from the start at any width (with BERT's 0.02 a
    narrow fusion begins uniform and hardly learns to match); branches into the residual start smaller, by depth."""
    for name, module in fusion.named_modules():
        if isinstance(module, nn.Linear):
            into_residual = name.endswith((".out", "mlp.2"))
            nn.init.normal_(module.weight, std=(module.in_features * (3 * layers if into_residual else 1)) ** -0.5)
            nn.init.zeros_(module.bias)

"""Image and text towers, chosen by `kind`. Each is a library's own module, so that its weights go back there unchanged.

Shape legend: B pairs, N image tokens, L text tokens, D the tower's width, E embedding, H/W pixels.

A tower's forward returns `Tower(tokens [B,N or L,D], pooled [B,E])`: `pooled` has been through the tower's own
projection, because open_clip's towers and ResNet's attention pool carry it inside. `tower.width` is D.
"""

from typing import Literal, NamedTuple

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ConfigError, ConfigModel, Count, Ratio
from pretrain.data.text import Tokenizer
from pretrain.torchvision_ops import prepare_torchvision
from pretrain.world import World


class Tower(NamedTuple):
    tokens: Tensor  # [B,N,D] or [B,L,D]
    pooled: Tensor  # [B,E]


class VitConfig(ConfigModel):
    """open_clip's vision transformer."""

    kind: Literal["vit"]
    image_size: Count = 224  # pixels
    patch_size: Count = 16  # pixels
    width: Count = 768
    layers: Count = 12
    head_width: Count = 64
    mlp_ratio: Ratio = 4.0
    patch_dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)

    @pydantic.model_validator(mode="after")
    def check_sizes(self) -> "VitConfig":
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.head_width:
            raise ValueError(f"width {self.width} is not a multiple of head_width {self.head_width}")
        return self

    def open_clip_config(self) -> dict:
        return self.model_dump(exclude={"kind"})

    def build(self, embed_dim: int, world: World) -> nn.Module:
        return Vit(self, embed_dim)


class ResNetConfig(ConfigModel):
    """open_clip's ResNet: three-convolution stem, antialiased strides, attention pooling."""

    kind: Literal["resnet"]
    image_size: Count = 224  # pixels
    layers: list[Count] = pydantic.Field(default=[3, 4, 6, 3], min_length=4, max_length=4)
    width: Count = 64
    head_width: Count = 64

    @pydantic.model_validator(mode="after")
    def check_sizes(self) -> "ResNetConfig":
        if self.image_size % 32:
            raise ValueError(f"image_size {self.image_size} is not a multiple of 32, the ResNet's stride")
        if self.width * 32 % self.head_width:
            raise ValueError(f"32 x width {self.width} is not a multiple of head_width {self.head_width}")
        return self

    def open_clip_config(self) -> dict:
        return self.model_dump(exclude={"kind"})

    def build(self, embed_dim: int, world: World) -> nn.Module:
        return ResNet(self, embed_dim, world)


class ClipTextConfig(ConfigModel):
    """open_clip's CLIP text transformer: causal, pooled at the end mark of whatever tokenizer."""

    kind: Literal["clip"]
    context_length: Count = 77  # tokens
    width: Count = 512
    heads: Count = 8
    layers: Count = 12
    mlp_ratio: Ratio = 4.0

    @pydantic.model_validator(mode="after")
    def check_sizes(self) -> "ClipTextConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    def open_clip_config(self) -> dict:
        return self.model_dump(exclude={"kind"})

    def open_clip_pooling(self, tokenizer: Tokenizer) -> dict:
        """CLIP's own vocabulary pools at the largest id, its end mark; another one at its first end mark."""
        return {} if tokenizer.config.kind == "clip" else {"pool_type": "eos", "eos_id": tokenizer.end_id}

    def build(self, embed_dim: int, tokenizer: Tokenizer) -> nn.Module:
        if tokenizer.end_id is None:
            raise ConfigError(
                "model.text.kind: clip pools at the end mark, but this tokenizer ends texts with none. Use kind: bert, or "
                "another tokenizer"
            )
        return ClipText(self, embed_dim, tokenizer)


class BertConfig(ConfigModel):
    """A BERT encoder from transformers, trained from scratch, pooled at the first token."""

    kind: Literal["bert"]
    context_length: Count = 77  # tokens
    width: Count = 768
    heads: Count = 12
    layers: Count = 12
    mlp_ratio: Ratio = 4.0
    dropout: float = pydantic.Field(default=0.1, ge=0, lt=1)

    @pydantic.model_validator(mode="after")
    def check_sizes(self) -> "BertConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    def build(self, embed_dim: int, tokenizer: Tokenizer) -> nn.Module:
        return Bert(self, embed_dim, tokenizer.vocab_size)


IMAGE_TOWERS: dict[str, type[ConfigModel]] = {"vit": VitConfig, "resnet": ResNetConfig}
TEXT_TOWERS: dict[str, type[ConfigModel]] = {"clip": ClipTextConfig, "bert": BertConfig}


class Vit(nn.Module):
    def __init__(self, config: VitConfig, embed_dim: int):
        super().__init__()
        prepare_torchvision()
        from open_clip.model import CLIPVisionCfg, _build_vision_tower

        settings = CLIPVisionCfg(**config.open_clip_config(), output_tokens=True)
        self.inner = _build_vision_tower(embed_dim, settings)
        self.width = config.width

    def forward(self, image: Tensor) -> Tower:
        """[B,3,H,W] normalised pixels."""
        pooled, tokens = self.inner(image)
        return Tower(tokens, pooled)


class ResNet(nn.Module):
    def __init__(self, config: ResNetConfig, embed_dim: int, world: World):
        super().__init__()
        prepare_torchvision()
        from open_clip.model import CLIPVisionCfg, _build_vision_tower

        self.inner = use_global_batch_norm(
            _build_vision_tower(embed_dim, CLIPVisionCfg(**config.open_clip_config())), world
        )
        self.width = config.width * 32

    def forward(self, image: Tensor) -> Tower:
        """[B,3,H,W] normalised pixels."""
        inner = self.inner
        features = inner.layer4(inner.layer3(inner.layer2(inner.layer1(inner.stem(image)))))
        return Tower(features.flatten(2).transpose(1, 2), inner.attnpool(features))


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the global batch, on any device; the statistics' gradients cross the ranks.

    torch's SyncBatchNorm runs on GPUs only, and per-rank statistics would make the result depend on the world size.
    """

    world: World

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y = x if x.dtype == torch.float64 else x.float()
        count = y.numel() // y.shape[1] * self.world.size
        mean = self.world.all_reduce(y.sum((0, 2, 3))) / count
        centred = y - mean[:, None, None]
        variance = self.world.all_reduce(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((variance * count / max(1, count - 1)).to(self.running_var.dtype), self.momentum)
        scale = self.weight.to(y.dtype) * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias.to(y.dtype)[:, None, None]).to(x.dtype)


def use_global_batch_norm(module: nn.Module, world: World) -> nn.Module:
    """Turn every BatchNorm2d below `module` into a GlobalBatchNorm2d, in place, weights and names kept."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = GlobalBatchNorm2d
            child.world = world
    return module


class ClipText(nn.Module):
    def __init__(self, config: ClipTextConfig, embed_dim: int, tokenizer: Tokenizer):
        super().__init__()
        prepare_torchvision()
        from open_clip.model import CLIPTextCfg, _build_text_tower

        pooling = config.open_clip_pooling(tokenizer)
        settings = CLIPTextCfg(
            **config.open_clip_config(), **pooling, vocab_size=tokenizer.vocab_size, output_tokens=True
        )
        self.inner = _build_text_tower(embed_dim, settings)
        self.width = config.width

    def forward(self, ids: Tensor, mask: Tensor) -> Tower:
        """[B,L] token ids; the mask is not needed: padding follows the end mark, which attends only to what is before."""
        pooled, tokens = self.inner(ids)
        return Tower(tokens, pooled)


class Bert(nn.Module):
    def __init__(self, config: BertConfig, embed_dim: int, vocab_size: int):
        super().__init__()
        import transformers

        settings = transformers.BertConfig(
            vocab_size=vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=int(config.width * config.mlp_ratio),
            max_position_embeddings=config.context_length,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=0.0,  # fused attention cannot drop by position; see pretrain.model.noise
        )
        self.inner = transformers.BertModel(settings)  # its pooler is kept: VisionTextDualEncoderModel projects that
        self.projection = nn.Linear(config.width, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=config.width**-0.5)
        self.width = config.width

    def forward(self, ids: Tensor, mask: Tensor) -> Tower:
        """[B,L] token ids, [B,L] bool mask."""
        hidden = self.inner(input_ids=ids, attention_mask=mask.long())
        return Tower(hidden.last_hidden_state, self.projection(hidden.pooler_output))


def unit(x: Tensor) -> Tensor:
    """[...,E] scaled to unit norm, in float32 or better whatever the precision of the towers."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)

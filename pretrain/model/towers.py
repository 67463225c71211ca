"""Image and text towers, chosen by `kind`. Each is a library's own module, so that its weights go back there unchanged.

Shape legend: B pairs, N image tokens, L text tokens, D the tower's width, E embedding, H/W pixels.

A tower's forward returns `Tower(tokens [B,N or L,D], pooled [B,E])`: `pooled` has been through the tower's own
projection, because open_clip's towers and ResNet's attention pool carry it inside. `tower.width` is D, `tower.inner` the
library's module. A text tower is built with `text_layer`, which the fusion chooses: its tokens are then those after so
many of its layers (0: the embeddings), while `pooled` always comes from the last.

`text_tower.is_causal` says that no token knows what follows it. Where it is False, `causal_tokens(ids, mask)` gives tokens
[B,L,D] that do not, for captioning; `text_tower.embedding` is the nn.Embedding of its ids.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data_tools.errors import suggest
from pretrain.config import ConfigError, ConfigModel, Count, Ratio
from pretrain.data.text import Tokenizer
from pretrain.model.blocks import find_blocks
from pretrain.model.language import attention_bias, causal_mask
from pretrain.torchvision_ops import prepare_torchvision
from pretrain.world import World


class Tower(NamedTuple):
    tokens: Tensor  # [B,N,D] or [B,L,D]
    pooled: Tensor  # [B,E]


# quick_gelu is x sigmoid(1.702 x), as OpenAI's weights and a few others have it.
Activation = Literal["gelu", "quick_gelu"]
PatchShare = pydantic.Field(default=0.0, ge=0, lt=1)  # of the patches, left out in training (FLIP, arXiv:2212.00794)
Means = Annotated[list[Annotated[float, pydantic.Field(ge=0, le=1)]], pydantic.Field(min_length=3, max_length=3)]
Deviations = Annotated[list[Annotated[float, pydantic.Field(gt=0)]], pydantic.Field(min_length=3, max_length=3)]

# The pixel statistics of CLIP's training data (OpenAI), which every open_clip and Hugging Face CLIP expects.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels [B,3,H,W], 0 to 255 -> float32 (x / 255 - mean) / std, of each channel; laid out in memory as before."""
    shift = torch.tensor(mean, device=image.device)[:, None, None] * 255
    scale = torch.tensor(std, device=image.device)[:, None, None] * 255
    return (image - shift) / scale


class ImageConfig(ConfigModel):
    """What image towers share: how they get their pixels."""

    pixel_mean: Means = list(PIXEL_MEAN)  # of red, green and blue, from 0 to 1; weights expect their own
    pixel_std: Deviations = list(PIXEL_STD)

    def normalise(self, image: Tensor) -> Tensor:
        """uint8 [B,3,H,W] -> float32, as the tower takes it."""
        return normalise(image, self.pixel_mean, self.pixel_std)


class VitConfig(ImageConfig):
    """open_clip's vision transformer."""

    kind: Literal["vit"]
    image_size: Count = 224  # pixels
    patch_size: Count = 16  # pixels
    width: Count = 768
    layers: Count = 12
    head_width: Count = 64
    mlp_ratio: Ratio = 4.0
    activation: Activation = "gelu"
    patch_dropout: float = PatchShare

    @pydantic.model_validator(mode="after")
    def check_sizes(self) -> "VitConfig":
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.head_width:
            raise ValueError(f"width {self.width} is not a multiple of head_width {self.head_width}")
        return self

    def open_clip_config(self) -> dict:
        return self.model_dump(exclude={"kind", "activation", "pixel_mean", "pixel_std"})

    def build(self, embed_dim: int, world: World) -> nn.Module:
        return Vit(self, embed_dim)


class ResNetConfig(ImageConfig):
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
        return self.model_dump(exclude={"kind", "pixel_mean", "pixel_std"})

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
    activation: Activation = "gelu"

    @pydantic.model_validator(mode="after")
    def check_sizes(self) -> "ClipTextConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    def open_clip_config(self) -> dict:
        return self.model_dump(exclude={"kind", "activation"})

    def open_clip_pooling(self, tokenizer: Tokenizer) -> dict:
        """CLIP's own vocabulary pools at the largest id, its end mark; another one at its first end mark."""
        return {} if tokenizer.config.kind == "clip" else {"pool_type": "eos", "eos_id": tokenizer.end_id}

    def build(self, embed_dim: int, tokenizer: Tokenizer, text_layer: int | None) -> nn.Module:
        if tokenizer.end_id is None:
            raise ConfigError(
                "model.text.kind: clip pools at the end mark, but this tokenizer ends texts with none. Use kind: bert, or "
                "another tokenizer"
            )
        return ClipText(self, embed_dim, tokenizer, text_layer)


class TimmConfig(ImageConfig):
    """Any of timm's image models by name; its features are the tokens, its own pooling (before the classifier) is kept."""

    kind: Literal["timm"]
    name: str  # such as vit_base_patch16_224, convnext_tiny
    image_size: Count = 224  # pixels
    settings: dict[str, Any] = {}  # further arguments of timm.create_model, such as drop_path_rate
    patch_dropout: float = PatchShare

    def build(self, embed_dim: int, world: World) -> nn.Module:
        return Timm(self, embed_dim, world)


Pooling = Literal["first", "mean", "pooler"]

# How the libraries name learnt positions, of which there is one a row (or column).
POSITION_NAMES = ("positional_embedding", "pos_embed", "position_embedding", "position_embeddings")


class HuggingfaceConfig(ConfigModel):
    """A model of transformers, its shape given by a folder or hub name, or by the config's own keys.

    This gives the architecture only; weights come from `model.warm_start`. Of a two-sided model (CLIP, SigLIP, BLIP) the
    side that belongs here is taken.
    """

    kind: Literal["huggingface"]
    name: str | None = None  # folder or hub name
    config: dict[str, Any] = {}  # instead, or on top: model_type and the keys of that config class
    pooling: Pooling = "pooler"  # the last layer's first token, the mean of its real ones, or the model's own way
    projection_bias: bool = False

    @pydantic.model_validator(mode="after")
    def check_source(self) -> "HuggingfaceConfig":
        if (self.name is None) != ("model_type" in self.config):
            raise ValueError(
                "give either name (a folder or hub name) or config with a model_type, such as {model_type: vit}"
            )
        return self

    def read(self, where: str, side: str) -> Any:
        """transformers' config object. `side` is vision_config or text_config. Raises ConfigError."""
        prepare_torchvision()
        import transformers
        from huggingface_hub.errors import StrictDataclassError

        settings = dict(self.config)
        model_type = settings.pop("model_type", None)
        try:
            if self.name is None:
                config = transformers.AutoConfig.for_model(model_type)
                self.check_keys(settings, config, where)
                return transformers.AutoConfig.for_model(model_type, **settings)
            config = transformers.AutoConfig.from_pretrained(self.name)
            config = getattr(config, side, config)
            self.check_keys(settings, config, where)
            for key, value in settings.items():
                setattr(config, key, value)
            return config
        except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConfigError(f"{where}: transformers cannot read this config: {reason}") from None

    def check_keys(self, settings: dict[str, Any], config: Any, where: str) -> None:
        """Raises ConfigError for a key that this config class does not have; transformers would take it in silence."""
        for key in settings:
            if not hasattr(config, key):
                near = suggest(key, list(config.to_dict()))
                raise ConfigError(f"{where}.config.{key}: a {config.model_type} has no such key.{near}")


class HuggingfaceImageConfig(ImageConfig, HuggingfaceConfig):
    """A vision model of transformers: ViT, CLIP's, SigLIP's, BLIP's, DINOv2, ..."""

    image_size: Count = 224  # pixels
    patch_dropout: float = PatchShare

    def build(self, embed_dim: int, world: World) -> nn.Module:
        return HuggingfaceImage(self, embed_dim, world)


class HuggingfaceTextConfig(HuggingfaceConfig):
    """A text encoder of transformers: BERT, RoBERTa, DistilBERT, MPNet, ModernBERT, SigLIP's, BLIP's, ..."""

    context_length: Count = 77  # tokens
    pooling: Pooling = "first"

    def build(self, embed_dim: int, tokenizer: Tokenizer, text_layer: int | None) -> nn.Module:
        return HuggingfaceText(self, embed_dim, tokenizer, text_layer)


class BertConfig(ConfigModel):
    """BERT's encoder from transformers, by its sizes."""

    kind: Literal["bert"]
    context_length: Count = 77  # tokens
    width: Count = 768
    heads: Count = 12
    layers: Count = 12
    mlp_ratio: Ratio = 4.0
    dropout: float = pydantic.Field(default=0.1, ge=0, lt=1)  # of embeddings and branches; attention weights have none
    pooling: Literal["first", "pooler"] = "pooler"  # the first token, as BLIP; or BERT's dense layer and tanh on it
    projection_bias: bool = False  # BLIP has one

    @pydantic.model_validator(mode="after")
    def check_sizes(self) -> "BertConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    def build(self, embed_dim: int, tokenizer: Tokenizer, text_layer: int | None) -> nn.Module:
        return Bert(self, embed_dim, tokenizer, text_layer)


IMAGE_TOWERS: dict[str, type[ConfigModel]] = {
    "vit": VitConfig,
    "resnet": ResNetConfig,
    "timm": TimmConfig,
    "huggingface": HuggingfaceImageConfig,
}
TEXT_TOWERS: dict[str, type[ConfigModel]] = {
    "clip": ClipTextConfig,
    "bert": BertConfig,
    "huggingface": HuggingfaceTextConfig,
}


class Vit(nn.Module):
    def __init__(self, config: VitConfig, embed_dim: int):
        super().__init__()
        prepare_torchvision()
        from open_clip.model import CLIPVisionCfg, _build_vision_tower

        settings = CLIPVisionCfg(**config.open_clip_config(), output_tokens=True)
        self.inner = _build_vision_tower(embed_dim, settings, quick_gelu=config.activation == "quick_gelu")
        self.width = config.width

    def forward(self, image: Tensor) -> Tower:
        """[B,3,H,W] normalised pixels."""
        pooled, tokens = self.inner(image.contiguous())
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
        inner, image = self.inner, image.contiguous(memory_format=torch.channels_last)
        features = inner.layer4(inner.layer3(inner.layer2(inner.layer1(inner.stem(image)))))
        return Tower(features.flatten(2).transpose(1, 2), inner.attnpool(features))


class Timm(nn.Module):
    def __init__(self, config: TimmConfig, embed_dim: int, world: World):
        super().__init__()
        prepare_torchvision()
        import timm

        if not timm.is_model(config.name):
            raise ConfigError(
                f"model.image.name: timm has no model '{config.name}'.{suggest(config.name, timm.list_models())} All of "
                "them: python -c 'import timm; print(timm.list_models())'"
            )
        self.inner = use_global_batch_norm(create_timm(config), world)
        check_timm_dropouts(self.inner)
        self.width = self.inner.num_features
        pooled_width = getattr(self.inner, "head_hidden_size", self.width) or self.width
        self.projection = build_projection(pooled_width, embed_dim, bias=False)
        self.layout = choose_layout(self.inner)
        self.gives_nhwc = getattr(self.inner, "output_fmt", "NCHW") == "NHWC"
        if config.patch_dropout:
            # Other kinds of patch_drop belong to positions that have to be dropped along.
            if (
                not isinstance(getattr(self.inner, "patch_drop", None), nn.Identity)
                or self.inner.num_prefix_tokens != 1
            ):
                raise refuse_patch_dropout(config.name)
            self.inner.patch_drop = build_patch_dropout(config.patch_dropout)

    def forward(self, image: Tensor) -> Tower:
        """[B,3,H,W] normalised pixels."""
        features = self.inner.forward_features(image.contiguous(memory_format=self.layout))
        pooled = self.projection(self.inner.forward_head(features, pre_logits=True))
        return Tower(as_tokens(features, self.gives_nhwc), pooled)


class HuggingfaceImage(nn.Module):
    def __init__(self, config: HuggingfaceImageConfig, embed_dim: int, world: World):
        super().__init__()
        settings = config.read("model.image", "vision_config")
        if hasattr(settings, "image_size"):
            settings.image_size = config.image_size
        keep_attention_weights(settings)
        self.inner = use_global_batch_norm(build_huggingface(settings, config.pooling, "model.image"), world)
        self.layout = choose_layout(self.inner)
        self.pooling = config.pooling
        self.width = width_of(settings)
        self.projection = build_projection(self.width, embed_dim, config.projection_bias)
        if config.patch_dropout:
            embeddings = getattr(self.inner, "embeddings", nn.Module())
            names = {name for name, _ in embeddings.named_parameters(recurse=False)} - {"mask_token"}
            # More than the class token are registers, or DeiT's token for distillation.
            if sum("token" in name or "class" in name for name in names) != 1:
                raise refuse_patch_dropout(settings.model_type)
            self.patch_dropout = build_patch_dropout(config.patch_dropout)
            self.inner.embeddings.register_forward_hook(self.drop_patches)

    def forward(self, image: Tensor) -> Tower:
        """[B,3,H,W] normalised pixels."""
        output = self.inner(pixel_values=image.contiguous(memory_format=self.layout))
        tokens = as_tokens(output.last_hidden_state)
        return Tower(tokens, self.projection(pool(output, tokens, None, self.pooling)))

    def drop_patches(self, embeddings: nn.Module, arguments: tuple, tokens: Tensor) -> Tensor:
        return self.patch_dropout(tokens)


def choose_layout(tower: nn.Module) -> torch.memory_format:
    """What a tower's convolutions compute fastest with; one that only cuts patches has a single one, for which it is alike."""
    convolutions = sum(isinstance(module, nn.Conv2d) for module in tower.modules())
    return torch.channels_last if convolutions > 1 else torch.contiguous_format


class GlobalBatchNorm(_BatchNorm):
    """Batch normalisation over the global batch, on any device; the statistics' gradients cross the ranks.

    torch's SyncBatchNorm runs on GPUs only, and per-rank statistics would make the result depend on the world size.
    """

    world: World

    def forward(self, x: Tensor) -> Tensor:
        y = self.normalise(x) if self.training else _BatchNorm.forward(self, x)
        return self.act(self.drop(y)) if hasattr(self, "act") else y  # timm's BatchNormAct2d carries its activation

    def normalise(self, x: Tensor) -> Tensor:
        y = x if x.dtype == torch.float64 else x.float()
        count = y.numel() // y.shape[1] * self.world.size
        others, channels = [axis for axis in range(y.ndim) if axis != 1], (-1, *[1] * (y.ndim - 2))
        mean = self.world.all_reduce(y.sum(others)) / count
        centred = y - mean.view(channels)
        variance = self.world.all_reduce(centred.square().sum(others)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((variance * count / max(1, count - 1)).to(self.running_var.dtype), self.momentum)
        scale = self.weight.to(y.dtype) * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(channels) + self.bias.to(y.dtype).view(channels)).to(x.dtype)

    def _check_input_dim(self, x: Tensor) -> None:
        """Any [B,C,...]: torch has a class for each number of axes."""


def use_global_batch_norm(module: nn.Module, world: World) -> nn.Module:
    """Turn every batch normalisation below `module`, timm's with activation too, into ours, weights and names kept."""
    for child in module.modules():
        if isinstance(child, _BatchNorm):
            child.__class__ = GlobalBatchNorm
            child.world = world
    return module


class BatchStatistics:
    """The running statistics of a model's batch normalisation, to go back to after a step that is not taken: what is not
    finite would stay in them for good."""

    def __init__(self, model: nn.Module):
        norms = [module for module in model.modules() if isinstance(module, GlobalBatchNorm) and module.training]
        self.buffers = [buffer for norm in norms for buffer in norm.buffers()]
        self.keep()

    def keep(self) -> None:
        self.kept = [buffer.clone() for buffer in self.buffers]

    def restore(self) -> None:
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(kept)


class TokenTap:
    """The tokens after `layer` of a tower's layers: what the next one is given. None, or all layers: the tower's output."""

    def __init__(self, tower: nn.Module, layer: int | None):
        blocks = list(find_blocks(tower).values())
        config = getattr(tower, "config", None)  # of a model of transformers
        if layer is not None and getattr(config, "num_hidden_layers", len(blocks)) != len(blocks):
            raise ConfigError(
                f"model.fusion: the layers of this text tower ({config.model_type}) share weights, so fusion cannot begin "
                "between them. Leave from_layer out, or set model.text.kind=bert"
            )
        if layer is not None and layer > len(blocks):
            raise ConfigError(f"model.fusion.from_layer: is {layer}, but the text tower has {len(blocks)} layers")
        self.taken: Tensor | None = None
        self.around: list[nn.Module] = []  # the modules that the tokens leave, the outermost first
        if layer is not None and layer < len(blocks):
            self.around = [
                module
                for module in tower.modules()
                if blocks[layer] in module.modules() and module is not blocks[layer]
            ]
            blocks[layer].register_forward_pre_hook(self.take, with_kwargs=True)

    def take(self, block: nn.Module, arguments: tuple, named: dict) -> None:
        self.taken = arguments[0] if arguments else named["hidden_states"]
        for module in reversed(self.around):
            self.taken = as_output_of(module, self.taken)

    def tokens(self, output: Tensor) -> Tensor:
        """What was taken in this forward; `output` where nothing is."""
        taken, self.taken = self.taken, None
        return output if taken is None else taken


def as_output_of(module: nn.Module, tensor: Tensor) -> Tensor:
    """`tensor`, which leaves `module` other than by being returned. ZeRO-3 gathers a module's weights for the backward pass
    when what it returned gets a gradient, and has to be told of this way out; without ZeRO-3 it is the tensor itself."""
    function = vars(module).get("pre_bwd_fn")  # DeepSpeed's own, of this module
    return function.apply(tensor) if function else tensor


class ClipText(nn.Module):
    bert_layers = None
    is_causal = True

    def __init__(self, config: ClipTextConfig, embed_dim: int, tokenizer: Tokenizer, text_layer: int | None):
        super().__init__()
        prepare_torchvision()
        from open_clip.model import CLIPTextCfg, _build_text_tower

        pooling = config.open_clip_pooling(tokenizer)
        settings = CLIPTextCfg(
            **config.open_clip_config(), **pooling, vocab_size=tokenizer.vocab_size, output_tokens=True
        )
        self.inner = _build_text_tower(embed_dim, settings, quick_gelu=config.activation == "quick_gelu")
        self.width = config.width
        self.tap = TokenTap(self.inner, text_layer)

    @property
    def embedding(self) -> nn.Embedding:
        return self.inner.token_embedding

    def forward(self, ids: Tensor, mask: Tensor) -> Tower:
        """[B,L] token ids; the mask is not needed: padding follows the end mark, which attends only to what is before."""
        pooled, tokens = self.inner(ids)
        return Tower(self.tap.tokens(tokens), pooled)


class EncoderText(nn.Module):
    """What text towers around an encoder of transformers share: `inner`, `pooling`, `projection`, `tap`."""

    is_causal = False
    reads_padding = False  # SigLIP's weights are trained so, without a mask

    @property
    def embedding(self) -> nn.Embedding:
        return self.inner.get_input_embeddings()

    def forward(self, ids: Tensor, mask: Tensor) -> Tower:
        """[B,L] token ids, [B,L] bool mask."""
        output = self.encode(ids, mask)
        pooled = self.projection(pool(output, output.last_hidden_state, mask, self.pooling))
        return Tower(self.tap.tokens(output.last_hidden_state), pooled)

    def encode(self, ids: Tensor, mask: Tensor) -> Any:
        """transformers' output of [B,L] token ids and bool mask."""
        return self.inner(input_ids=ids, attention_mask=None if self.reads_padding else mask.long())

    def causal_tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B,L] ids and mask -> [B,L,D]: tokens of the same layers, each attending only to itself and what is before it.

        For encoders built like BERT (`bert_layers`); another may take such a mask for another thing.
        """
        bias = attention_bias(causal_mask(mask)[:, None], self.embedding.weight.dtype)
        return self.tap.tokens(self.inner(input_ids=ids, attention_mask=bias).last_hidden_state)


class Bert(EncoderText):
    def __init__(self, config: BertConfig, embed_dim: int, tokenizer: Tokenizer, text_layer: int | None):
        super().__init__()
        prepare_torchvision()
        import transformers

        settings = transformers.BertConfig(
            vocab_size=tokenizer.vocab_size,
            pad_token_id=tokenizer.padding_id,  # whose embedding is not trained
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=int(config.width * config.mlp_ratio),
            max_position_embeddings=config.context_length,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=0.0,  # fused kernels draw it by their own generator, not by sample
        )
        # With the pooler where it is used: VisionTextDualEncoderModel projects what it gives.
        self.inner = transformers.BertModel(settings, add_pooling_layer=config.pooling == "pooler")
        self.pooling = config.pooling
        self.width = config.width
        self.projection = build_projection(config.width, embed_dim, config.projection_bias)
        self.tap = TokenTap(self.inner, text_layer)

    @property
    def bert_layers(self) -> nn.ModuleList:
        return self.inner.encoder.layer


class HuggingfaceText(EncoderText):
    def __init__(self, config: HuggingfaceTextConfig, embed_dim: int, tokenizer: Tokenizer, text_layer: int | None):
        super().__init__()
        settings = config.read("model.text", "text_config")
        if config.name is None and "vocab_size" not in config.config:
            settings.vocab_size = tokenizer.vocab_size
        if config.name is None and "pad_token_id" not in config.config:
            if tokenizer.padding_id is not None:
                settings.pad_token_id = tokenizer.padding_id
            elif (settings.pad_token_id or 0) >= settings.vocab_size:  # ModernBERT's own, in a smaller vocabulary
                settings.pad_token_id = 0
        if settings.vocab_size < tokenizer.vocab_size:
            raise ConfigError(
                f"model.text: the model has {settings.vocab_size} ids and the tokenizer {tokenizer.vocab_size}. Set "
                "model.tokenizer to the model's own: {kind: huggingface, name: ...}"
            )
        if settings.model_type == "blip_text_model":
            settings.is_decoder = False  # else it has cross-attention, which nothing here would train
        keep_attention_weights(settings)
        self.inner = build_huggingface(settings, config.pooling, "model.text")
        self.reads_padding = settings.model_type in SIGLIP_TEXTS
        if not has_embedding(self.inner):
            raise ConfigError(
                f"model.text: {settings.model_type} has no table of token embeddings. Choose another encoder"
            )
        if tokenizer.padding_id is None:  # so what would be padding is a word or a mark, and has to be trained
            self.embedding.padding_idx = None
        check_length(config, self.inner)
        self.pooling = config.pooling
        self.width = width_of(settings)
        # SigLIP's pooler can give another width than its layers have.
        wide = self.reads_padding and config.pooling == "pooler"
        pooled_width = settings.projection_size if wide else self.width
        self.projection = build_projection(pooled_width, embed_dim, config.projection_bias)
        self.tap = TokenTap(self.inner, text_layer)

    @property
    def bert_layers(self) -> nn.ModuleList | None:
        """The layers, if the encoder is built like BERT (RoBERTa, ELECTRA, ...), else None."""
        return self.inner.encoder.layer if self.built_like_bert else None

    @functools.cached_property
    def built_like_bert(self) -> bool:  # tried out once, and only for a model that asks
        return is_built_like_bert(self.inner)


@torch.no_grad()
def is_built_like_bert(inner: nn.Module) -> bool:
    """Whether an encoder of transformers is what `attention`, `intermediate` and `output` of its layers make of an additive
    mask, one after the other. Tried out, since others have parts of the same names: norms in other places (Megatron-BERT),
    relative positions (MPNet), convolutions that look ahead (ConvBERT)."""
    encoder = getattr(inner, "encoder", None)
    if encoder is None or [name for name, _ in encoder.named_children()] != ["layer"]:
        return False
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 8, 10]]) % inner.config.vocab_size
    bias = attention_bias(causal_mask(torch.ones_like(ids, dtype=torch.bool))[:, None], torch.float32)
    begin = []
    hook = encoder.layer[0].register_forward_pre_hook(
        lambda layer, arguments, named: begin.append(arguments[0] if arguments else named["hidden_states"]),
        with_kwargs=True,
    )
    training = inner.training
    inner.eval()
    try:
        expected = inner(input_ids=ids, attention_mask=bias).last_hidden_state
        (tokens,) = begin
        for layer in encoder.layer:
            attended = layer.attention(tokens, bias)[0]
            tokens = layer.output(layer.intermediate(attended), attended)
    except Exception:  # whatever other people's code says of a mask that it was not made for
        return False
    finally:
        hook.remove()
        inner.train(training)
    one, other = expected[:, :-1]  # of texts that differ in the last token
    return torch.allclose(tokens, expected, atol=1e-5) and torch.allclose(one, other, atol=1e-5)


def create_timm(config: TimmConfig) -> nn.Module:
    """timm's model without its classifier, with positions for `image_size` where it has any."""
    import timm

    settings = {"pretrained": False, "num_classes": 0, **config.settings}
    try:
        return timm.create_model(config.name, img_size=config.image_size, **settings)
    except TypeError as error:
        if "img_size" not in str(error):
            raise ConfigError(f"model.image.settings: timm's {config.name}: {error}") from None
    return timm.create_model(config.name, **settings)  # a convolutional network, which takes any size


def check_timm_dropouts(inner: nn.Module) -> None:
    """Raises ConfigError for what timm's settings drop in a way that cannot follow the samples."""
    for name, module in inner.named_modules():
        if isinstance(module, nn.Dropout) and module.p and name.endswith("attn_drop"):
            raise ConfigError(
                "model.image.settings: attention weights cannot be dropped out, for fused attention draws that by its own "
                "generator, not by sample. Leave attn_drop_rate out; drop_rate, proj_drop_rate and drop_path_rate work"
            )
        if type(module).__name__.startswith("PatchDropout"):
            raise ConfigError(
                "model.image.settings.patch_drop_rate: patches are dropped by sample here. Set model.image.patch_dropout"
            )


def check_length(config: HuggingfaceTextConfig, inner: nn.Module) -> None:
    """Raises ConfigError for texts longer than the learnt positions of an encoder of transformers."""
    for name, module in inner.named_modules():
        if name.rpartition(".")[2] not in POSITION_NAMES or not isinstance(module, nn.Embedding):
            continue
        unused = (
            0 if module.padding_idx is None else module.padding_idx + 1
        )  # RoBERTa counts from behind its padding's id
        most = module.num_embeddings - unused
        if config.context_length > most:
            raise ConfigError(
                f"model.text.context_length: {config.context_length}, but this {inner.config.model_type} has positions for "
                f"{most} tokens. Set {most} or less, or train more: model.text.config.max_position_embeddings="
                f"{config.context_length + unused}"
            )


def has_embedding(inner: nn.Module) -> bool:
    """Whether a model of transformers looks ids up in a table; CANINE hashes characters."""
    try:
        return isinstance(inner.get_input_embeddings(), nn.Embedding)
    except NotImplementedError:
        return False


SIGLIP_TEXTS = ("siglip_text_model", "siglip2_text_model")
UNLISTED = {  # sides of two-sided models that AutoModel does not list
    "blip_vision_model": "BlipVisionModel",
    "blip_text_model": "BlipTextModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2_text_model": "Siglip2TextModel",
}


def build_huggingface(settings: Any, pooling: Pooling, where: str) -> nn.Module:
    """The module of a transformers config, without a pooler that would not be trained. Raises ConfigError."""
    import transformers

    try:
        if settings.model_type in UNLISTED:
            model_class = getattr(transformers, UNLISTED[settings.model_type])
        else:
            model_class = transformers.MODEL_MAPPING[type(settings)]
            if isinstance(model_class, tuple):  # Funnel's: the whole model, then that without its decoder
                model_class = model_class[0]
    except KeyError:
        raise ConfigError(f"{where}: transformers has no encoder for model_type '{settings.model_type}'") from None
    takes_pooler = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return model_class(settings, **({"add_pooling_layer": pooling == "pooler"} if takes_pooler else {}))


def keep_attention_weights(settings: Any) -> None:
    """No dropout inside attention, in place: fused kernels draw it by their own generator, not by sample."""
    for key in settings.to_dict():
        if key.startswith("att") and "drop" in key:  # attention_probs_dropout_prob, attention_dropout, attn_pdrop, ...
            setattr(settings, key, 0.0)


def pool(output: Any, tokens: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """[B,D] of a transformers output and its tokens [B,*,D]. Raises ConfigError for a model without a pooler."""
    if pooling == "pooler":
        if getattr(output, "pooler_output", None) is None:
            raise ConfigError("model: this model of transformers has no pooler of its own. Set pooling=first or mean")
        return output.pooler_output.flatten(1)
    if pooling == "first":
        return tokens[:, 0]
    share = tokens.new_ones(tokens.shape[:2])[..., None] if mask is None else mask.to(tokens.dtype)[..., None]
    return (tokens * share).sum(1) / share.sum(1)


def as_tokens(features: Tensor, is_nhwc: bool = False) -> Tensor:
    """[B,N,D] as it is; a map [B,D,h,w], or [B,h,w,D] if `is_nhwc`, to [B,hw,D]."""
    if features.ndim == 3:
        return features
    return features.flatten(1, 2) if is_nhwc else features.flatten(2).transpose(1, 2)


def build_projection(width: int, embed_dim: int, bias: bool) -> nn.Linear:
    projection = nn.Linear(width, embed_dim, bias)
    nn.init.normal_(projection.weight, std=width**-0.5)
    if bias:
        nn.init.zeros_(projection.bias)
    return projection


def build_patch_dropout(share: float) -> nn.Module:
    """open_clip's, between a class token and the blocks."""
    from open_clip.transformer import PatchDropout

    return PatchDropout(share)


def refuse_patch_dropout(name: str) -> ConfigError:
    return ConfigError(
        f"model.image.patch_dropout: {name} does not have one class token, followed by patches to drop. Set it to 0"
    )


def width_of(settings: Any) -> int:
    """The width of a transformers model's last tokens."""
    sizes = getattr(settings, "hidden_sizes", None)  # of a convolutional network, stage by stage
    return settings.hidden_size if sizes is None else sizes[-1]


def unit(x: Tensor) -> Tensor:
    """[...,E] scaled to unit norm, in float32 or better whatever the precision of the towers."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)

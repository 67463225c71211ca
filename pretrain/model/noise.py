"""Dropout, patch dropout and stochastic depth as a function of (seed, sample, place in the model), not of how a batch is
laid out.

Torch draws masks from a generator, so what a sample meets depends on its row, its micro-batch and its rank. Here a mask is
a hash of the row's key, the module's name and the element's index: micro-batches and ranks change nothing, a second
forward of the same sample meets the same masks, and there is no generator state to save.

Shape legend: B rows of whatever a module is given (images, texts or match pairs), N tokens, D width.
"""

import contextlib
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pretrain.config import ConfigError

# SplitMix64's constants (Steele et al. 2014) as the signed numbers that torch's int64 arithmetic wraps around.
_GAMMA, _FIRST, _SECOND = (
    constant - 2**64 for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)

_ODD = 0x9E3779B1 - 2**32  # of int32, near 2^32 over the golden ratio


def mix(value: Tensor) -> Tensor:
    """A bijection of int64 that looks random: the finaliser of SplitMix64."""
    value = (value ^ (value >> 30 & 2**34 - 1)) * _FIRST  # `>>` copies the sign; the mask makes it a shift of bits
    value = (value ^ (value >> 27 & 2**37 - 1)) * _SECOND
    return value ^ (value >> 31 & 2**33 - 1)


def row_keys(seed: int, position: Tensor) -> Tensor:
    """The keys [B] of samples at these positions [B] int64 of the run's order."""
    return mix(mix(torch.full_like(position, seed) + _GAMMA) + position * _GAMMA)


def derive_keys(keys: Tensor, purpose: str) -> Tensor:
    """Other keys [B] of the same rows, for a purpose whose draws shall be its own."""
    return mix(keys ^ zlib.crc32(purpose.encode()))


def uniform(keys: Tensor, count: int) -> Tensor:
    """[B,count] float64 in [0,1): `count` draws a row."""
    numbers = torch.arange(1, count + 1, device=keys.device) * _GAMMA
    return (mix(keys[:, None] + numbers) >> 11 & 2**53 - 1).double() * 2.0**-53


def pair_keys(image_keys: Tensor, text_keys: Tensor) -> Tensor:
    """The keys [P] of pairs of an image and a text, each given by its sample's key [P]."""
    return mix(image_keys + mix(text_keys + _GAMMA))


class Noise:
    """The keys of the rows that are in the forward now: whoever calls a module that drops sets them first."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None

    def hashes(self, module_number: Tensor, rows: int, elements: int) -> Tensor:
        """[rows,elements] int32, even over all int32s: one hash for each element of each row at this place in the model."""
        if self.keys is None:
            raise RuntimeError("dropout in training needs the keys of its rows; call the model with `keys`")
        if rows != len(self.keys):
            raise ConfigError(
                f"model: a dropout is given {rows} rows for {len(self.keys)} samples (parts of samples, such as windows), so "
                "its masks cannot follow the samples. Set the dropouts of this tower to 0"
            )
        keys = mix(self.keys ^ module_number).int()
        # Not times _GAMMA: torch's compiler works products of indices out itself, and they are too large for it.
        numbers = mix(torch.arange(elements, device=keys.device) ^ _GAMMA).int()
        # Both are well mixed. What is left, and paid for every element, is to break the linear structure of their sum.
        return (keys[:, None] ^ numbers).mul_(_ODD)

    @contextlib.contextmanager
    def using(self, keys: Tensor | None) -> Iterator[None]:
        """Within the block the rows are these."""
        before, self.keys = self.keys, keys
        try:
            yield
        finally:
            self.keys = before

    def checkpoint_contexts(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """`context_fn` of torch.utils.checkpoint: the recomputation, in the backward pass, drops what the forward dropped."""
        return contextlib.nullcontext(), self.using(self.keys)


class PositionModule(nn.Module):
    """What drops a `share` by hashes of `noise` at the place in the model called `name`.

    The place is a tensor, since numbers are constants to torch.compile: it would compile each block of a tower anew.
    """

    module_number: Tensor

    def __init__(self, share: float, noise: Noise, name: str):
        super().__init__()
        self.share, self.noise = share, noise
        self.register_buffer("module_number", torch.tensor(zlib.crc32(name.encode())), persistent=False)

    def extra_repr(self) -> str:
        return f"share={self.share}"


class PositionDropout(PositionModule):
    """nn.Dropout with masks of `noise`. Elements are counted within a row, so rows of one length meet the same masks."""

    def forward(self, x: Tensor) -> Tensor:
        """[B,...] -> the same shape, a `share` of it zero and the rest scaled up."""
        if not self.training:
            return x
        dropped = self.noise.hashes(self.module_number, len(x), x[0].numel()) < threshold_of(self.share)
        return x.masked_fill(dropped.view(x.shape), 0) * (1 / (1 - self.share))


class PositionDropPath(PositionModule):
    """timm's and transformers' DropPath (stochastic depth) with draws of `noise`: a sample's whole branch, or none of it."""

    def __init__(self, share: float, noise: Noise, name: str, scale_up: bool = True):
        super().__init__(share, noise, name)
        self.scale_up = scale_up
        # A tensor, as the place is: it grows from layer to layer.
        self.register_buffer("threshold", torch.tensor(threshold_of(share)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B,...] -> the same shape, a `share` of the rows zero, the rest scaled up if `scale_up`. arXiv:1603.09382."""
        if not self.training:
            return x
        dropped = self.noise.hashes(self.module_number, len(x), 1) < self.threshold
        kept = x.masked_fill(dropped.view(-1, *[1] * (x.ndim - 1)), 0)
        # The divisor rounded as the activations are, which timm does too.
        return kept / (0.5 - self.threshold.double() * 2.0**-32).to(x.dtype) if self.scale_up else kept


def threshold_of(share: float) -> int:
    """What a `share` of all int32s are below."""
    return int((share - 0.5) * 2.0**32)


class PositionPatchDropout(PositionModule):
    """open_clip's PatchDropout with draws of `noise`: a random subset of the patches, the first token always."""

    def forward(self, x: Tensor) -> Tensor:
        """[B,1+N,D] -> [B,1+kept,D] with kept = max(1, int(N (1 - share))). Source: FLIP, arXiv:2212.00794."""
        if not self.training:
            return x
        return torch.cat([x[:, :1], drop_patches(x[:, 1:], self.share, self.noise, self.module_number)], dim=1)


def drop_patches(tokens: Tensor, share: float, noise: Noise, module_number: Tensor) -> Tensor:
    """Keep max(1, int(N (1 - share))) of the tokens [B,N,D], each subset equally likely, in their order."""
    rows, count = tokens.shape[:2]
    order = noise.hashes(module_number, rows, count).topk(max(1, int(count * (1 - share))), dim=1).indices
    return tokens.gather(1, order.sort(dim=1).values[..., None].expand(-1, -1, tokens.shape[2]))


def replace_dropouts(model: nn.Module, noise: Noise) -> None:
    """Swap every nn.Dropout, open_clip PatchDropout and DropPath below `model` for ours, in place; each place has its masks.

    A module is known by its name in `model`. Dropouts of share 0 stay: they draw nothing. Attention probabilities inside
    fused kernels cannot be dropped by position, so towers and fusions configure those to 0.
    """
    for name, child in list(model.named_modules()):
        if isinstance(child, nn.Dropout) and child.p > 0:
            replacement = PositionDropout(child.p, noise, name)
        elif type(child).__name__ == "PatchDropout" and child.prob > 0:
            replacement = PositionPatchDropout(child.prob, noise, name)
        elif type(child).__name__.endswith("DropPath") and child.drop_prob:
            scale_up = getattr(child, "scale_by_keep", True)  # of timm's only
            replacement = PositionDropPath(child.drop_prob, noise, name, scale_up)
        else:
            continue
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, replacement.train(child.training))

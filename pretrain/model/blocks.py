"""What is done to a model block by block, whatever the library: checkpointing, compiling, freezing, learning rates by depth.

A block is what a tower or fusion repeats: a transformer layer, a residual block of a ResNet, a stage of a ConvNeXt.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from pretrain.config import ConfigError

# Parameters of open_clip's towers themselves, and so named before their blocks, though they come after them.
PROJECTIONS = ("image_tower.inner.proj", "text_tower.inner.text_projection")


def find_blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The blocks of `module` by name, in order: the members of its outermost lists of modules of one class.

    None for what is not built of such lists: timm's RegNet, DenseNet, VGG, ...
    """
    found = {}
    for name, child in module.named_children():
        members = list(child) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        alike = len({type(member) for member in members}) == 1 and any(True for _ in members[0].children())
        if alike and not isinstance(members[0], nn.ModuleList):  # which nobody calls
            found |= {f"{name}.{number}": member for number, member in enumerate(members)}
        else:
            found |= {f"{name}.{inner}": block for inner, block in find_blocks(child).items()}
    return found


def checkpoint_blocks(model: nn.Module, contexts: Callable[[], Any]) -> None:
    """Keep no activations inside the blocks: each is computed once more in the backward pass, with the same dropouts.

    `contexts` gives, at each forward, the contexts of forward and recomputation. Blocks with batch normalisation stay as
    they are: computed twice, they would count each batch twice.
    """
    for block in find_blocks(model).values():
        if any(isinstance(module, _BatchNorm) for module in block.modules()):
            continue
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def without_checkpoints(model: nn.Module) -> Iterator[None]:
    """Within, what `checkpoint_blocks` did is undone."""
    blocks = [block for block in find_blocks(model).values() if getattr(block.forward, "func", None) is checkpoint]
    checkpointed = [(block, block.forward) for block in blocks]
    for block, forward in checkpointed:
        block.forward = forward.args[0]
    try:
        yield
    finally:
        for block, forward in checkpointed:
            block.forward = forward


def no_contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    return contextlib.nullcontext(), contextlib.nullcontext()


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """torch.compile each block in place: names stay, and the blocks of one tower share what is compiled.

    Before `checkpoint_blocks`, which the compiler cannot look through. Not for ZeRO 3, which gathers a weight when a module
    asks for it: what is compiled does not, and to gather a block's as a whole fails where it is called twice in a step.
    """
    for block in find_blocks(model).values():
        block.forward = torch.compile(block.forward, backend=backend)


def freeze(model: nn.Module, prefixes: list[str]) -> None:
    """Take every parameter whose name begins with one of `prefixes` out of training. Raises ConfigError.

    A prefix ends where a name's part ends: `image_tower` is all of the tower, `text_tower.inner.encoder.layer.1` not layer 10.
    """
    names = dict(model.named_parameters())
    for prefix in prefixes:
        frozen = [name for name in names if begins_with(name, prefix)]
        if not frozen:
            valid = sorted({name.partition(".")[0] for name in names})
            raise ConfigError(
                f"model.freeze: no parameter begins with '{prefix}'. Names begin with: {', '.join(valid)}"
            )
        for name in frozen:
            names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise ConfigError("model.freeze: leaves nothing to train")


def keep_frozen_in_evaluation(model: nn.Module, prefixes: list[str]) -> None:
    """After `model.train()`: the frozen modules back to evaluation, so that no dropout and no batch statistic moves them."""
    for name, module in model.named_modules():
        if any(begins_with(name, prefix) for prefix in prefixes):
            module.eval()


def begins_with(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def learning_rate_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """What each parameter's learning rate is multiplied by, by name: 1 at a tower's end, `decay` less a block from there.

    Block i of n (from 0) has decay^(n-1-i), what comes before the blocks decay^n, what comes after them, fusion, heads and
    logit scale 1. Source: BEiT, arXiv:2106.08254, where the blocks count from the head down.
    """
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    for tower in ("image_tower", "text_tower"):
        blocks = [f"{tower}.{name}" for name in find_blocks(getattr(model, tower))]
        reached = False
        for name in (name for name in scales if begins_with(name, tower) and name not in PROJECTIONS):
            place = next((i for i, block in enumerate(blocks) if begins_with(name, block)), None)
            reached = reached or place is not None
            if place is not None:
                scales[name] = decay ** (len(blocks) - 1 - place)
            elif not reached:
                scales[name] = decay ** len(blocks)
    return scales

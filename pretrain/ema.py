"""An exponential moving average of the trained weights, kept beside them, saved with them, and exported on request.

In fp32 and, with ZeRO, divided over the ranks as the optimiser's weights are: it costs 4 bytes a parameter over all ranks.
"""

import pydantic
import torch
from torch import Tensor

from data_tools.errors import UserError
from pretrain.config import ConfigModel
from pretrain.engine import join_parts, master_parts
from pretrain.world import World

NAME = "ema."  # beginning of the names in a checkpoint


class EmaConfig(ConfigModel):
    """average = decay x average + (1 - decay) x weights, after each update."""

    decay: float = pydantic.Field(default=0.9999, gt=0, lt=1)


class Ema:
    """`follow` after each update; `state` for a checkpoint."""

    def __init__(self, config: EmaConfig, engine: object, world: World, restored: dict[str, Tensor]) -> None:
        """Begins as what `state` gave when `restored` was saved, or, without, as the weights of now."""
        self.config, self.engine, self.world = config, engine, world
        self.averages: dict[
            str, tuple[int, Tensor]
        ] = {}  # where this rank's part of a parameter begins, and the part [n]
        for name, (start, part) in master_parts(engine).items():
            kept = restored.get(NAME + name)
            begin = part if kept is None else kept.flatten()[start : start + len(part)]
            self.averages[name] = start, begin.to(part.device, part.dtype, copy=True)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the averages towards the weights, which an update has just changed."""
        parts = master_parts(self.engine)
        averages = [average for _, average in self.averages.values()]
        torch._foreach_lerp_(averages, [parts[name][1] for name in self.averages], 1 - self.config.decay)

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """Every trained parameter's average, whole and in fp32, by name, on the CPU; {} but for rank 0. Collective."""
        whole = {}
        for name, parameter in self.engine.module.named_parameters():
            if parameter.requires_grad:
                shape = getattr(parameter, "ds_shape", parameter.shape)
                part = self.averages.get(name)
                average = join_parts(self.engine, part, shape, torch.float32, self.world)
                if self.world.is_main:  # not once for each GPU of a node
                    whole[NAME + name] = average
        return whole


def averaged(weights: dict[str, Tensor], extra: dict[str, Tensor], run: str) -> dict[str, Tensor]:
    """A checkpoint's weights with the averages in the place of those that are trained. Raises UserError if it has none."""
    found = {name.removeprefix(NAME): value for name, value in extra.items() if name.startswith(NAME)}
    if not found:
        raise UserError(
            f"{run}: its checkpoint holds no average of the weights. Train with ema={{}}, or leave --ema out"
        )
    return weights | found

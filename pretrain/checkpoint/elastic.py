"""A checkpoint into an engine of another world size or another ZeRO stage, moments kept.

DeepSpeed's own loaders refuse most of these changes. Its universal format would do for some of them: a copy of everything,
one file a parameter and moment, which its loaders read at the same kind of stage only. Here the shards are mapped into
memory, each parameter's moments are put together from the pieces that the ranks held, and a rank copies what its own part
of the new partition needs. The weights come from weights.safetensors, which holds the exact (fp32) ones of every stage.

Shape legend: a piece is a flat run of one parameter's elements; a parameter is its pieces in the order of the ranks.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from data_tools.errors import UserError
from pretrain.engine import master_parts, place_at_zero_3, unsharded_masters

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Moments:
    """AdamW's state of every trained parameter, as the ranks of the saved run held it."""

    updates: float = 0.0  # how many the optimiser had made
    pieces: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)  # parameter -> moment -> flat pieces

    def add(self, name: str, state: dict[str, Tensor], start: int, numel: int) -> None:
        for moment in MOMENTS:
            piece = state[moment].flatten().narrow(0, start, numel)
            self.pieces.setdefault(name, {}).setdefault(moment, []).append(piece)
        self.updates = max(self.updates, float(state.get("step", 0)))

    def get(self, name: str, moment: str, numel: int) -> Tensor:
        """[numel] fp32; zeros for a parameter that no update has touched yet. Raises UserError for another size."""
        if name not in self.pieces:
            return torch.zeros(numel)
        whole = torch.cat(self.pieces[name][moment])
        if len(whole) != numel:
            raise UserError(f"the checkpoint's {moment} of {name} has {len(whole)} numbers, the model's {numel}")
        return whole


def restore(engine: Any, folder: Path, weights: Path, state: dict[str, Any]) -> None:
    """Put weights, moments and loss scale of any saved layout into `engine`. Collective.

    `folder` holds DeepSpeed's shards, `weights` the safetensors of the whole model, `state` is that of state.json.
    """
    moments = read_moments(folder, state)
    prepare_states(engine, moments.updates)
    with safe_open(str(weights), "pt") as file, torch.no_grad():
        exact, masters = master_parts(engine), unsharded_masters(engine)
        for name, parameter in engine.module.named_parameters():
            value = file.get_tensor(name)
            set_weight(engine, parameter, value)
            if not parameter.requires_grad:
                continue
            if name in exact:
                start, held = exact[name]
                held.copy_(value.flatten()[start : start + len(held)])
            for moment in MOMENTS:
                whole = moments.get(name, moment, value.numel())
                for held, start in held_moments(engine, masters, parameter, moment):
                    held.copy_(whole.narrow(0, start, held.numel()))
        for name, buffer in engine.module.named_buffers():
            if name in file.keys():  # which is no mapping
                buffer.copy_(file.get_tensor(name))
    scale = state.get("loss_scale")
    if scale is not None and engine.fp16_enabled():
        scaler = getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config
        scaler.cur_scale = scale


def optimized_names(engine: Any) -> list[str]:
    """Without ZeRO: names of the trained parameters in the optimiser's order, by which its saved state numbers them."""
    if engine.zero_optimization_stage():
        return []
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    groups = getattr(engine.optimizer, "fp16_groups", None) or [g["params"] for g in engine.optimizer.param_groups]
    return [names[parameter] for parameter in itertools.chain(*groups)]


def load_shard(path: Path) -> dict[str, Any]:
    """One of DeepSpeed's files, its tensors mapped and not read. It was checked against its SHA-256 before."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def read_moments(folder: Path, state: dict[str, Any]) -> Moments:
    """The moments in DeepSpeed's shards of any ZeRO stage and world size."""
    stage, ranks, moments = state["engine"]["zero_stage"], state["world_size"], Moments()
    if stage == 0:
        saved = load_shard(folder / "mp_rank_00_model_states.pt")["optimizer"]
        states = saved.get("optimizer_state_dict", saved)["state"]  # in 16 bits one level further down
        for number, name in enumerate(state["optimized"]):
            if number in states:
                moments.add(name, states[number], 0, states[number]["exp_avg"].numel())
        return moments
    for rank in range(ranks):
        (path,) = folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        saved = load_shard(path)["optimizer_state_dict"]
        if stage == 3:
            model = load_shard(folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
            read_stage_3(moments, saved["optimizer_state_dict"]["state"], model["param_shapes"], rank, ranks)
        else:
            states = saved["base_optimizer_state"]["state"]
            for group, mapping in enumerate(saved["param_slice_mappings"]):
                for name, place in mapping.items():
                    moments.add(name, states[group], place.start, place.numel)
    return moments


def read_stage_3(
    moments: Moments, states: dict[int, Any], shapes: list[dict[str, torch.Size]], rank: int, ranks: int
) -> None:
    """One rank's part: of each parameter an equal run, the last ranks' padded."""
    for group, parameters in enumerate(shapes):
        start = 0
        for name, shape in parameters.items():
            numel = shape.numel()
            share = -(-numel // ranks)
            moments.add(name, states[group], start, max(0, min(share, numel - rank * share)))
            start += share


def prepare_states(engine: Any, updates: float) -> None:
    """Give the optimiser the state that it would have after that many updates, with moments of zero."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    inner = getattr(optimizer, "optimizer", optimizer)  # torch's AdamW within DeepSpeed's wrapper
    if stage == 0:
        held = unsharded_masters(engine).values() or itertools.chain(*(group["params"] for group in inner.param_groups))
    else:
        held = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    for values in held:
        step = torch.tensor(float(updates), dtype=torch.float32, device=values.device)
        inner.state[values] = {"step": step, **{moment: torch.zeros_like(values) for moment in MOMENTS}}


def set_weight(engine: Any, parameter: nn.Parameter, value: Tensor) -> None:
    """The copy of a parameter with which the model computes. Collective at ZeRO 3."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
        parameter.data.copy_(value.reshape(parameter.shape))


def held_moments(
    engine: Any, masters: dict[nn.Parameter, Tensor], parameter: nn.Parameter, moment: str
) -> Iterator[tuple[Tensor, int]]:
    """What this rank's optimiser holds of a parameter's moment: a flat view, and where in the whole it starts.

    `masters` is what `unsharded_masters` gives.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    state = getattr(optimizer, "optimizer", optimizer).state
    if stage == 0:
        yield state[masters.get(parameter, parameter)][moment].view(-1), 0
    elif stage == 3:
        flat, place, held, start = place_at_zero_3(engine, parameter)
        yield state[flat][moment].narrow(0, place, held), start
    elif parameter._hp_mapping is not None:
        mapping = parameter._hp_mapping
        values = state[optimizer.single_partition_of_fp32_groups[mapping.param_group_index]][moment]
        place = mapping.get_hp_fragment_address()
        yield values.narrow(0, place.start, place.numel), mapping.lp_fragment_address.start

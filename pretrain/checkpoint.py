"""Checkpoints that are whole or absent: save, find, restore, prune; and the plain weights for evaluation and export.

RUN/checkpoints/step_00000100/ holds DeepSpeed's sharded save (`deepspeed/`), the fp32 weights of the whole model
(`weights.safetensors`), where there is more to keep `extra.safetensors`, and `state.json`, which lists every file with its
size. The folder gets its name last.
"""

import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_tools.errors import UserError
from data_tools.files import sync_folder, write_json_atomic
from pretrain.world import World

log = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"
EXTRA = "extra.safetensors"
STATE = "state.json"
DEEPSPEED_TAG = "deepspeed"
BYTES_PER_PARAMETER = 20  # fp32 weights, two moments and the master copy, and the 16- or 32-bit weights of the module


def folders(run: str | Path) -> list[Path]:
    """The run's checkpoints, oldest first, whether whole or not."""
    return sorted(path for path in (Path(run) / "checkpoints").glob("step_*") if path.is_dir())


def read_state(folder: Path) -> dict[str, Any]:
    """The checkpoint's state.json. Raises UserError if a file that it lists is missing or of another size."""
    try:
        state = json.loads((folder / STATE).read_text())
        wrong = [name for name, size in state["files"].items() if (folder / name).stat().st_size != size]
        int(state["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: not a whole checkpoint: {type(error).__name__}: {error}") from None
    if wrong:
        raise UserError(f"{folder}: not a whole checkpoint: {wrong[0]} has another size than when it was saved")
    return state


def find_newest(run: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its state, or None when there is no checkpoint at all.

    Raises UserError when there are checkpoints but none is whole.
    """
    found = folders(run)
    for folder in reversed(found):
        try:
            return folder, read_state(folder)
        except UserError as error:
            log.warning("%s; trying the one before", error)
    if found:
        raise UserError(f"{run}: none of its {len(found)} checkpoints is whole. Start a new run folder: run=...")
    return None


def load_weights(run: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """fp32 weights of the newest whole checkpoint by parameter name, and its state. Raises UserError if there is none."""
    newest = find_newest(run)
    if newest is None:
        raise UserError(f"{run}: holds no checkpoint. Give the run folder of a training run (its `run:` key)")
    folder, state = newest
    try:
        return load_file(folder / WEIGHTS), state
    except SafetensorError as error:
        raise UserError(
            f"{folder / WEIGHTS}: damaged: {error}. Remove {folder}, and the checkpoint before it is used"
        ) from None


def gather_weights(engine: Any) -> dict[str, Tensor]:
    """Every parameter and buffer of the model in fp32, on the CPU, whole on every rank. Collective."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in engine.module.named_parameters():
        sharded = hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
        if sharded and parameter.requires_grad:
            weights[name] = copy_to_cpu(safe_get_full_fp32_param(parameter))
        else:
            with GatheredParameters([parameter], enabled=sharded):  # ZeRO-3 shards frozen ones too, without fp32 copies
                weights[name] = copy_to_cpu(parameter)
    persistent = set(engine.module.state_dict(keep_vars=True)) - set(weights)
    weights |= {name: b.detach().cpu().clone() for name, b in engine.module.named_buffers() if name in persistent}
    return weights


def copy_to_cpu(value: Tensor) -> Tensor:
    return value.detach().float().cpu().clone(memory_format=torch.contiguous_format)


def save(
    engine: Any,
    run: str | Path,
    step: int,
    state: dict[str, Any],
    keep: int,
    world: World,
    extra: dict[str, Tensor] | None = None,
) -> Path:
    """Write the checkpoint of `step` (steps done so far), then remove all but the newest `keep`. Collective.

    `extra`: tensors on the CPU that are no part of the model; rank 0's are kept, and `restore` returns them.

    Raises UserError when it cannot be written; earlier checkpoints are then as they were.
    """
    parent = Path(run) / "checkpoints"
    final, temporary = parent / f"step_{step:08d}", parent / f"tmp_step_{step:08d}"
    if world.is_main:
        parent.mkdir(parents=True, exist_ok=True)
        for unfinished in parent.glob("tmp_step_*"):  # of runs that were killed in mid-save
            shutil.rmtree(unfinished, ignore_errors=True)
    extra = extra or {}
    check_free_space(engine, parent, world, sum(tensor.nbytes for tensor in extra.values()))
    if world.is_main:
        temporary.mkdir()
    world.barrier()
    try:
        engine.save_checkpoint(str(temporary), tag=DEEPSPEED_TAG, save_latest=False)
        weights = gather_weights(engine)
        if world.is_main:
            save_file(weights, temporary / WEIGHTS)
            if extra:
                save_file(extra, temporary / EXTRA)
            for script in temporary.glob("zero_to_*.py"):  # DeepSpeed's converters, to make what we have just written
                script.unlink()
        world.barrier()
        if world.is_main:
            finish(temporary, final, state)
            for old in folders(run)[:-keep]:
                shutil.rmtree(old)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(
            f"{temporary}: cannot write the checkpoint: {error}. Free space and run the same command again"
        ) from error
    world.barrier()
    return final


def check_free_space(engine: Any, parent: Path, world: World, extra_bytes: int) -> None:
    """Refuse to start a checkpoint that the disk cannot hold, on all ranks together."""
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    needed, free = BYTES_PER_PARAMETER * parameters + extra_bytes, 0
    if world.is_main:
        free = shutil.disk_usage(parent).free
    if world.any(world.is_main and free < needed):
        raise UserError(
            f"{parent}: a checkpoint needs about {needed / 2**30:.2f} GiB, more than the disk has free. "
            "Free space and run the same command again"
        )


def finish(temporary: Path, final: Path, state: dict[str, Any]) -> None:
    """Flush every file, list them in state.json, and give the folder its name."""
    files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
    write_json_atomic(temporary / STATE, {**state, "files": sizes})
    if final.exists():  # a broken one of the same step that `find_newest` passed over
        shutil.rmtree(final)
    os.replace(temporary, final)
    sync_folder(final.parent)


def restore(engine: Any, folder: Path) -> dict[str, Tensor]:
    """Load weights, moments and loss scale into the engine; returns the `extra` that was saved, {} if none was. Collective.

    Raises UserError for damaged files.
    """
    try:
        loaded, _ = engine.load_checkpoint(str(folder), tag=DEEPSPEED_TAG)
        extra = load_file(folder / EXTRA) if (folder / EXTRA).exists() else {}
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(f"{folder}: damaged: {reason[0]}. Remove it, and the checkpoint before it is used") from error
    if loaded is None:
        raise UserError(f"{folder}: DeepSpeed cannot load it. Remove it, and the checkpoint before it is used")
    return extra


def check_same_run(state: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to continue a checkpoint under a config that it does not fit. Raises UserError naming the first difference.

    `now` holds what `state` held for these keys: world_size, model, engine's zero_stage and precision.
    """
    for name, value in now.items():
        difference = first_difference(state.get(name), value, name)
        if difference:
            key, then, present = difference
            raise UserError(
                f"{folder}: saved with {key} {then}, now it is {present}. Put it back, or start a new run folder: run=..."
            )


def first_difference(then: Any, now: Any, key: str) -> tuple[str, Any, Any] | None:
    if isinstance(then, dict) and isinstance(now, dict):
        for name in [*then, *(name for name in now if name not in then)]:
            if found := first_difference(then.get(name), now.get(name), f"{key}.{name}"):
                return found
        return None
    return None if then == now else (key, then, now)

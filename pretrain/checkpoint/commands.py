"""python -m pretrain checkpoint list | verify | consolidate | prune: look after the checkpoints of a run without training."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data_tools.errors import UserError, first_line
from data_tools.files import format_bytes, write_json_atomic
from pretrain import checkpoint
from pretrain.checkpoint import elastic
from pretrain.engine import import_deepspeed
from pretrain.events import lock_run
from pretrain.world import World

MOMENTS = "moments.safetensors"


def list_checkpoints(run: str) -> int:
    """One line each: step, size, by how many ranks at which ZeRO stage, and whether all files are there in their sizes."""
    for folder in existing(run):
        try:
            state = checkpoint.read_state(folder)
        except UserError as error:
            print(f"{folder.name}  {error}")
            continue
        size = format_bytes(sum(file["bytes"] for file in state["files"].values()))
        layout = f"{state['world_size']} ranks, ZeRO {state['engine']['zero_stage']}, {state['engine']['precision']}"
        print(f"{folder.name}  step {state['step']}  {size}  {layout}")
    return 0


def verify_checkpoints(run: str) -> int:
    """Read every byte of every checkpoint; returns 1 if one is damaged."""
    damaged = 0
    for folder in existing(run):
        state, problem = checkpoint.verify(folder, World())
        damaged += state is None
        print(problem or f"{folder.name}  whole, {len(state['files'])} files")
    return min(damaged, 1)


def consolidate(run: str, out: str, step: int | None) -> int:
    """Put a sharded checkpoint together: weights and AdamW's moments by parameter name, each in one safetensors file.

    Names: `exp_avg/NAME` and `exp_avg_sq/NAME`, fp32, in the parameter's shape. Raises UserError for one that is damaged.
    """
    found = existing(run)
    wanted = [folder for folder in found if step in (None, checkpoint.step_of(folder))]
    if not wanted:
        raise UserError(f"{run}: has no checkpoint of step {step}. There are: {', '.join(f.name for f in found)}")
    folder = wanted[-1]
    state, problem = checkpoint.verify(folder, World())
    if state is None:
        raise UserError(f"{problem}. Choose another one with --step")
    target = Path(out)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{out}: is not empty. Choose a new folder")
    target.mkdir(parents=True, exist_ok=True)
    import_deepspeed()
    moments = elastic.read_moments(folder / checkpoint.DEEPSPEED_TAG, state)
    weights = load_file(folder / checkpoint.WEIGHTS)
    whole: dict[str, Any] = {}
    for name in moments.pieces:
        for moment in elastic.MOMENTS:
            values = moments.get(name, moment, weights[name].numel())
            whole[f"{moment}/{name}"] = values.reshape(weights[name].shape).contiguous()
    try:
        save_file(weights, target / checkpoint.WEIGHTS)
        save_file(whole, target / MOMENTS)
    except (OSError, SafetensorError) as error:  # which wraps the system's
        raise UserError(f"{out}: cannot be written: {first_line(error)}. Free space and choose a new folder") from None
    kept = {key: state[key] for key in ("step", "model", "engine", "config", "versions")}
    write_json_atomic(target / checkpoint.STATE, {**kept, "updates": moments.updates})
    print(f"{target}: {folder.name}, {len(weights)} tensors, moments of {len(moments.pieces)}")
    return 0


def prune_checkpoints(run: str, keep: int, keep_every: int | None) -> int:
    """Remove all but the last `keep` and those of each `keep_every`-th step. Refuses while a run works in the folder.

    What a run could not go on from does not count, and stays for somebody to look at: all that it finds is read.
    """
    existing(run)
    with lock_run(run, World()):
        damaged = set()
        for folder in checkpoint.folders(run):
            state, problem = checkpoint.verify(folder, World())
            if state is None:
                damaged.add(checkpoint.step_of(folder))
                print(f"{problem}; it stays")
        last = checkpoint.keep_last(keep, keep_every)
        for folder in checkpoint.prune(run, lambda steps: damaged | last([s for s in steps if s not in damaged])):
            print(f"{folder.name}  removed")
    return 0


def existing(run: str) -> list[Path]:
    found = checkpoint.folders(run)
    if not found:
        raise UserError(f"{run}: holds no checkpoint. Give the run folder of a training run (its `run:` key)")
    return found

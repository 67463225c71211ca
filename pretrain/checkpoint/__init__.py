"""Checkpoints that are whole or absent: save, find, restore, prune; and the plain weights for evaluation and export.

RUN/checkpoints/step_00000100/ holds DeepSpeed's sharded save (`deepspeed/`), the fp32 weights of the whole model
(`weights.safetensors`), where there is more to keep `extra.safetensors`, and `state.json`, which lists every file with its
size and SHA-256. The folder gets its name last. What was found damaged is set aside as damaged_step_00000100.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import pickle
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_tools.errors import UserError, first_line
from data_tools.files import hash_file, render_json, sync_folder, write_json_atomic
from pretrain.checkpoint import elastic
from pretrain.checkpoint.mirror import STATE, Mirror, fetch_newest
from pretrain.config import ConfigModel, Count
from pretrain.engine import loss_scale, numel_of, unsharded_masters
from pretrain.world import World

log = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"
EXTRA = "extra.safetensors"
DEEPSPEED_TAG = "deepspeed"
SEAL = "sha256"  # of all else in state.json, which lists those of the other files
NAME = re.compile("step_[0-9]+")
# What a system says of files that it does not get at, rather than of files that are gone or spoiled.
OUT_OF_REACH = {errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH}
OUT_OF_REACH |= {errno.ENOTCONN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
BYTES_PER_PARAMETER = 20  # fp32 weights, two moments and the master copy, and the 16- or 32-bit weights of the module


class CheckpointConfig(ConfigModel):
    """When the run is saved, and what is kept."""

    every_steps: Count = 1000
    keep: Count = 2  # the last so many
    keep_every_steps: Count | None = None  # and for good those of each so-manieth step
    # A folder on a disk or in a memory (/dev/shm) of each node's own. Shards are written there first, and brought to the run
    # folder while training goes on.
    staging: str | None = None
    # A URL that fsspec knows, or a path: each checkpoint is copied there too, in the background, and taken from there where the
    # run folder has none.
    target: str | None = None


class OutOfReach(UserError):
    """A checkpoint that cannot be read now, which says nothing of whether it is whole."""


class Found(NamedTuple):
    """The checkpoint to go on from, and those that were newer and damaged: (folder, why)."""

    folder: Path
    state: dict[str, Any]
    passed_over: list[tuple[Path, str]]


def folders(run: str | Path) -> list[Path]:
    """The run's checkpoints, oldest first, whether whole or not. What somebody has put beside them is none."""
    found = (path for path in (Path(run) / "checkpoints").glob("step_*") if NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=step_of)  # by number: names of more than eight digits are not in the order of letters


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def read_state(folder: Path) -> dict[str, Any]:
    """The checkpoint's state.json. Raises UserError if it has changed since it was written, or if a file that it lists is
    missing or of another size."""
    try:
        state = json.loads((folder / STATE).read_text())
        sealed = state.pop(SEAL, None)
        if sealed != seal_of(state) and not (sealed is None and state["format"] == 2):  # of which there was none
            raise ValueError(f"{STATE} says something else than when it was saved")
        wrong = [name for name, file in state["files"].items() if (folder / name).stat().st_size != file["bytes"]]
        int(state["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        check_reach(folder, error)
        raise UserError(f"{folder}: not a whole checkpoint: {type(error).__name__}: {error}") from None
    if wrong:
        raise UserError(f"{folder}: not a whole checkpoint: {wrong[0]} has another size than when it was saved")
    return state


def check_reach(folder: Path, error: Exception) -> None:
    """Raises OutOfReach if `error` says so: a run that went back to an older checkpoint because of it would lose steps."""
    if isinstance(error, OSError) and error.errno in OUT_OF_REACH:
        raise OutOfReach(
            f"{error.filename or folder}: cannot be read on {socket.gethostname()}: {error.strerror}. Mend that, and run the "
            "same command again"
        ) from None


def seal_of(state: dict[str, Any]) -> str:
    """SHA-256 of what a state.json says."""
    return hashlib.sha256(render_json(state)).hexdigest()


def check_files(folder: Path, state: dict[str, Any], names: list[str]) -> None:
    """Compare these files with their SHA-256. Raises UserError that names the first which has changed."""
    for name in names:
        try:
            same = hash_file(folder / name) == state["files"][name]["sha256"]
        except (OSError, KeyError) as error:
            check_reach(folder, error)
            raise UserError(f"{folder}: not a whole checkpoint: {name}: {error}") from None
        if not same:
            raise UserError(f"{folder}: not a whole checkpoint: {name} has other bytes than when it was saved")


def check_whole(folder: Path) -> None:
    """Read all of a checkpoint. Raises UserError if anything is not as it was saved."""
    state = read_state(folder)
    check_files(folder, state, list(state["files"]))


def verify(folder: Path, world: World) -> tuple[dict[str, Any] | None, str]:
    """The state of a checkpoint that is whole, else None and why not: the same on every rank, which share the reading.

    Raises UserError on every rank if one of them does not get at it. Collective.
    """
    state, problem = None, None
    if world.is_main:
        try:
            state = read_state(folder)
        except UserError as error:
            problem = error
    state, problem = world.share((state, problem))
    if isinstance(problem, OutOfReach):
        raise problem
    if state is None:
        return None, str(problem)
    largest_first = sorted(state["files"], key=lambda name: -state["files"][name]["bytes"])
    try:
        check_files(folder, state, largest_first[world.rank :: world.size])
    except UserError as error:
        problem = error
    problems = [problem for problem in world.gather_objects(problem) if problem]
    for problem in problems:
        if isinstance(problem, OutOfReach):
            raise problem
    return (None, str(problems[0])) if problems else (state, "")


def find_newest(run: str | Path, world: World, target: str | None = None) -> Found | None:
    """The newest checkpoint whose every byte is as it was saved, or None when there is no checkpoint at all. Collective.

    Where the run folder has none, that of `target` (see mirror.py) is fetched.
    Raises UserError when there are checkpoints but none is whole, or the target cannot be read.
    """
    with all_or_none(Path(run), world):
        if target and world.is_main and not folders(run):
            fetch_newest(target, Path(run) / "checkpoints", check_whole)
    found = world.share(folders(run) if world.is_main else None)
    passed_over = []
    for folder in reversed(found):
        state, problem = verify(folder, world)
        if state is not None:
            return Found(folder, state, passed_over)
        passed_over.append((folder, problem))
        if world.is_main:
            log.warning("%s; trying the one before", problem)
    if found:
        raise UserError(
            f"{run}: none of its {len(found)} checkpoints is whole ({passed_over[0][1]}). Start a new run folder: run=..."
        )
    return None


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, so that it neither counts as one nor is lost to somebody who wants to look."""
    aside = folder.with_name(f"damaged_{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)


def load_weights(
    run: str | Path, with_extra: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Of the newest whole checkpoint: fp32 weights by parameter name, the `extra` if asked for, else {}, and its state.

    Raises UserError if there is none.
    """
    found = folders(run)
    if not found:
        raise UserError(f"{run}: holds no checkpoint. Give the run folder of a training run (its `run:` key)")
    for folder in reversed(found):
        try:
            state = read_state(folder)
            names = [name for name in (WEIGHTS, EXTRA)[: 1 + with_extra] if name in state["files"]]
            check_files(folder, state, names)
            return load_file(folder / WEIGHTS), load_file(folder / EXTRA) if EXTRA in names else {}, state
        except OutOfReach:
            raise
        except (UserError, SafetensorError, OSError) as error:
            log.warning("%s; trying the one before", error if isinstance(error, UserError) else f"{folder}: {error}")
    raise UserError(f"{run}: none of its {len(found)} checkpoints is whole. Start a new run folder: run=...")


def gather_weights(engine: Any, keep: bool = True) -> dict[str, Tensor]:
    """Every parameter and buffer of the model in fp32, on the CPU and whole; {} where this rank does not `keep` them.

    Collective.
    """
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    exact = unsharded_masters(engine)
    weights = {}
    for name, parameter in engine.module.named_parameters():
        sharded = hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
        if sharded and parameter.requires_grad:
            whole = safe_get_full_fp32_param(parameter)
            if keep:
                weights[name] = copy_to_cpu(whole)
        else:
            with GatheredParameters([parameter], enabled=sharded):  # ZeRO-3 shards frozen ones too, without fp32 copies
                if keep:
                    weights[name] = copy_to_cpu(exact.get(parameter, parameter))
    if not keep:
        return {}
    persistent = set(engine.module.state_dict(keep_vars=True)) - set(weights)
    weights |= {name: b.detach().cpu().clone() for name, b in engine.module.named_buffers() if name in persistent}
    return weights


def copy_to_cpu(value: Tensor) -> Tensor:
    return value.detach().float().cpu().clone(memory_format=torch.contiguous_format)


class Saver:
    """Writes a run's checkpoints, at once or by way of a staging folder, one at a time."""

    def __init__(
        self,
        engine: Any,
        run: str | Path,
        config: CheckpointConfig,
        world: World,
        on_saved: Callable[["Saved"], None] = lambda saved: None,
        check_held: Callable[[], None] = lambda: None,  # raises where another life of the run has the folder
    ) -> None:
        self.engine, self.run, self.world = engine, Path(run), world
        self.check_held, self.on_saved = check_held, on_saved
        self.keep = keep_last(config.keep, config.keep_every_steps)
        self.parent = self.run / "checkpoints"
        self.token = world.share(
            secrets.token_hex(4)
        )  # a life that was thought dead must not write into another's files
        name = hashlib.sha256(str(self.run.resolve()).encode()).hexdigest()[:16]  # of this run among those of the node
        self.staging = Path(config.staging) / f"pretrain-{name}" if config.staging else None
        self.pending: Pending | None = None
        self.mirror = Mirror(config.target, self.keep) if config.target and world.is_main else None

    def save(self, step: int, state: dict[str, Any], extra: dict[str, Tensor] | None = None) -> None:
        """Write the checkpoint of `step` (steps done so far); by way of a staging folder, begin to. Collective.

        `extra`: tensors on the CPU that are no part of the model; rank 0's are kept, and `restore` returns them.
        Raises UserError, on every rank, when a rank cannot write; earlier checkpoints are then as they were.
        """
        self.finish()
        started_s = time.perf_counter()
        temporary, extra = self.parent / f"tmp_step_{step:08d}_{self.token}", extra or {}
        first = self.staging or temporary
        with all_or_none(temporary, self.world):
            if self.world.is_main:
                self.check_held()  # else what is removed here may be of the life that has the folder now
                self.parent.mkdir(parents=True, exist_ok=True)
                for unfinished in self.parent.glob("tmp_step_*"):  # of runs that were killed in mid-save
                    remove_tree(unfinished)
                needed = space_needed(self.engine) + sum(tensor.nbytes for tensor in extra.values())
                check_free_space(self.parent, needed)
                (temporary / DEEPSPEED_TAG).mkdir(parents=True)
            if self.staging and self.world.local_rank == 0:
                shutil.rmtree(self.staging, ignore_errors=True)
                (self.staging / DEEPSPEED_TAG).mkdir(parents=True)
        with all_or_none(first, self.world):
            written = write_shards(self.engine, first)
        weights = gather_weights(self.engine, keep=self.world.is_main)  # not once for each GPU of a node
        with all_or_none(first, self.world):
            if self.world.is_main:
                for name, tensors in {WEIGHTS: weights, EXTRA: extra}.items():
                    if tensors:
                        save_file(tensors, first / name)
                        written.append(first / name)
        state = {
            **state,
            "optimized": elastic.optimized_names(self.engine),
            "loss_scale": loss_scale(self.engine) if self.engine.fp16_enabled() else None,
        }
        names = [str(path.relative_to(first)) for path in written]
        self.pending = Pending(step, state, temporary, names, self.staging)
        if self.staging:
            self.pending.thread.start()
        else:
            self.pending.work_aside()
        self.pending.stall_s = time.perf_counter() - started_s
        if not self.staging:
            self.finish()

    def has_arrived(self) -> bool:
        """Whether a save in the background has reached the run folder on every rank, and is to be finished. Collective."""
        return self.pending is not None and not self.world.any(self.pending.thread.is_alive())

    def finish(self) -> None:
        """Wait for the save that is under way, if one is, and give its folder its name. Collective. Raises as `save`."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        started_s = time.perf_counter()
        if pending.thread.ident is not None:
            pending.thread.join()
        with all_or_none(pending.temporary, self.world):
            if pending.problem:
                raise pending.problem
        facts = {name: fact for part in self.world.gather_objects(pending.facts) for name, fact in part.items()}
        final = self.parent / f"step_{pending.step:08d}"
        with all_or_none(pending.temporary, self.world):
            if self.world.is_main:
                sync_folder(pending.temporary / DEEPSPEED_TAG)
                self.check_held()
                finish(pending.temporary, final, pending.state, facts)
                prune(self.run, lambda steps: self.keep(steps) | self.being_copied())
        stall_s = pending.stall_s + time.perf_counter() - started_s
        self.copy(final)
        self.on_saved(Saved(final, pending.step, sum(fact["bytes"] for fact in facts.values()), stall_s))

    def copy(self, folder: Path) -> None:
        """Have a whole checkpoint copied to the target, if there is one and it does not hold it yet."""
        if self.mirror:
            self.mirror.push(folder)

    def being_copied(self) -> set[int]:
        """The step of the checkpoint that is read now: removed, it would never be whole at a target that is slow."""
        folder = self.mirror.copied if self.mirror else None
        return {step_of(folder)} if folder else set()

    def close(self) -> None:
        """Wait for all that is under way, copies included. Collective."""
        self.finish()
        if self.mirror:
            self.mirror.finish()


class Saved(NamedTuple):
    folder: Path
    step: int
    bytes: int
    stall_s: float  # that training stood still


class Pending:
    """A checkpoint whose files are written, but not yet sealed, or not yet in the run folder."""

    def __init__(
        self, step: int, state: dict[str, Any], temporary: Path, names: list[str], staging: Path | None
    ) -> None:
        self.step, self.state, self.temporary, self.names, self.staging = step, state, temporary, names, staging
        self.facts: dict[str, dict[str, Any]] = {}
        self.problem: Exception | None = None
        self.stall_s = 0.0
        self.thread = threading.Thread(target=self.work_aside, name="checkpoint", daemon=True)

    def work(self) -> None:
        """Bring this rank's files to the run folder if they are not there yet, flush them, and note their checksums."""
        for name in self.names:
            if self.staging:
                shutil.copyfile(self.staging / name, self.temporary / name)
                (self.staging / name).unlink()
            self.facts[name] = seal(self.temporary / name)

    def work_aside(self) -> None:
        try:
            self.work()
        except OSError as error:
            self.problem = error
        except Exception as error:  # in a thread: what is not noted would leave a checkpoint without these files
            self.problem = RuntimeError(f"{type(error).__name__}: {first_line(error)}")


def finish(temporary: Path, final: Path, state: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Write state.json, `files` being what `seal` said of each, and give the folder its name."""
    state = json.loads(render_json({**state, "files": dict(sorted(files.items()))}))  # as it will be read back
    write_json_atomic(temporary / STATE, {**state, SEAL: seal_of(state)})
    if final.exists():  # of the same step
        remove(final)
    os.replace(temporary, final)
    sync_folder(final.parent)


def prune(run: str | Path, keep: Callable[[list[int]], set[int]]) -> list[Path]:
    """Remove the checkpoints that `keep` does not name; returns them."""
    found = {step_of(folder): folder for folder in folders(run)}
    removed = [folder for step, folder in found.items() if step not in keep(sorted(found))]
    for folder in removed:
        remove(folder)
    return removed


def remove(folder: Path) -> None:
    """Remove a checkpoint. A removal that is cut short leaves no half one."""
    trash = folder.with_name(f"tmp_{folder.name}")
    remove_tree(trash)
    os.replace(folder, trash)
    remove_tree(trash)


def remove_tree(folder: Path) -> None:
    """Remove what is no checkpoint, or as much of it as can be: on NFS, files that somebody still reads stay for a while,
    and no run is to end because of that. The next save tries again."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        log.warning("%s: cannot be removed yet", folder)


def keep_last(count: int, every_steps: int | None = None) -> Callable[[list[int]], set[int]]:
    """What `prune` is to keep: the last `count` checkpoints, and those of each `every_steps`-th step."""
    return lambda steps: {*steps[-count:], *(step for step in steps if every_steps and step % every_steps == 0)}


def write_shards(engine: Any, folder: Path) -> list[Path]:
    """DeepSpeed's save; returns the files that this rank has written. Collective.

    A rank that cannot write still goes through all of it, as the others wait for it there, and raises afterwards.
    """
    writer, written, problems = engine.checkpoint_engine, [], []
    plain_save = writer.save

    def note(state_dict: dict[str, Any], path: str) -> None:
        written.append(Path(path))
        try:
            plain_save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            problems.append(error)

    writer.save = note
    engine._copy_recovery_script = lambda path: (
        None
    )  # a converter of DeepSpeed's, to make what is written beside anyway
    try:
        engine.save_checkpoint(str(folder), tag=DEEPSPEED_TAG, save_latest=False)
    finally:
        del writer.save, engine._copy_recovery_script
    if problems:
        raise problems[0]
    return written


def seal(path: Path) -> dict[str, Any]:
    """Flush a file that this rank has written to the disk; returns its size and SHA-256."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}


@contextlib.contextmanager
def all_or_none(where: Path, world: World) -> Iterator[None]:
    """What fails in the block on one rank fails on all, in the same line. Collective at its end."""
    problem = ""
    try:
        yield
    except UserError as error:
        problem = str(error)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        problem = f"{where}: cannot write the checkpoint: {reason}. Free space and run the same command again"
    problem = next(filter(None, world.gather_objects(problem)), "")
    if problem:
        raise UserError(problem)


def space_needed(engine: Any) -> int:
    """Bytes of a checkpoint, about."""
    return BYTES_PER_PARAMETER * sum(map(numel_of, engine.module.parameters()))


def check_free_space(parent: Path, needed: int) -> None:
    """Raises UserError when the disk cannot hold a checkpoint."""
    if shutil.disk_usage(parent).free < needed:
        raise UserError(
            f"{parent}: a checkpoint needs about {needed / 2**30:.2f} GiB, more than the disk has free. "
            "Free space and run the same command again"
        )


def restore(engine: Any, folder: Path, state: dict[str, Any], now: dict[str, Any]) -> dict[str, Tensor]:
    """Load weights, moments and loss scale into the engine; returns the `extra` that was saved, {} if none was. Collective.

    `state` is that of a checkpoint which `find_newest` has found whole, `now` what `same_layout` compares it with.
    Raises UserError for files that cannot be used.
    """
    try:
        if same_layout(state, now):
            loaded, _ = engine.load_checkpoint(str(folder), tag=DEEPSPEED_TAG)
        else:
            elastic.restore(engine, folder / DEEPSPEED_TAG, folder / WEIGHTS, state)
            loaded = folder
        extra = load_file(folder / EXTRA) if (folder / EXTRA).exists() else {}
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"{folder}: damaged: {first_line(error)}. Remove it, and the checkpoint before it is used"
        ) from error
    if loaded is None:
        raise UserError(f"{folder}: DeepSpeed cannot load it. Remove it, and the checkpoint before it is used")
    return extra


def same_layout(state: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a checkpoint was saved by as many ranks at the same ZeRO stage: then DeepSpeed's loader takes it as it is."""
    return all(state[key] == now[key] for key in ("world_size", "engine"))


def check_same_run(state: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to continue a checkpoint under a config that it does not fit. Raises UserError naming the first difference.

    World size and ZeRO stage may change (see elastic.py); the model and the precision may not.
    """
    fixed = ({"model": side["model"], "engine.precision": side["engine"]["precision"]} for side in (state, now))
    difference = first_difference(*fixed, "")
    if difference:
        key, then, present = difference
        raise UserError(
            f"{folder}: saved with {key} {then}, now it is {present}. Put it back, or start a new run folder: run=..."
        )


def first_difference(then: Any, now: Any, key: str) -> tuple[str, Any, Any] | None:
    if isinstance(then, dict) and isinstance(now, dict):
        for name in [*then, *(name for name in now if name not in then)]:
            if found := first_difference(then.get(name), now.get(name), f"{key}.{name}".lstrip(".")):
                return found
        return None
    return None if then == now else (key, then, now)

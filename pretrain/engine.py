"""The optimiser's side of a step: parameter groups, schedule, DeepSpeed's generated config, and the engine.

This file and checkpoint/ are the only ones that know DeepSpeed.
"""

import contextlib
import itertools
import logging
import math
import os
import platform
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple
from unittest import mock

import pydantic
import torch
from torch import Tensor, nn

from pretrain.config import ConfigError, ConfigModel
from pretrain.model.blocks import learning_rate_scales
from pretrain.model.model import MAX_LOGIT_SCALE
from pretrain.world import World

log = logging.getLogger(__name__)

# DeepSpeed's defaults, in elements.
BUCKET = 500_000_000  # reduce_bucket_size; of smaller models, as many as they train
PERSISTENT = 100_000  # stage3_param_persistence_threshold


class EngineConfig(ConfigModel):
    """ZeRO, precision and AdamW."""

    zero_stage: int = pydantic.Field(default=1, ge=0, le=3)
    offload: Literal["none", "optimizer", "all"] = (
        "none"  # what waits in the host's memory; all: the weights too (ZeRO 3)
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # bf16 where every rank has it, else fp32
    lr: float = pydantic.Field(default=1e-3, gt=0)  # peak, after warm-up
    min_lr: float = pydantic.Field(default=0.0, ge=0)  # at the end of the cosine
    warmup_steps: int = pydantic.Field(default=0, ge=0)
    weight_decay: float = pydantic.Field(default=0.2, ge=0)  # not on norms, biases and the logit scale
    beta1: float = pydantic.Field(default=0.9, ge=0, lt=1)
    beta2: float = pydantic.Field(default=0.98, ge=0, lt=1)
    epsilon: float = pydantic.Field(default=1e-6, gt=0)
    layer_decay: float = pydantic.Field(
        default=1.0, gt=0, le=1
    )  # of the rate, a block down from a tower's end; 1 = none
    gradient_clip: float = pydantic.Field(default=1.0, ge=0)  # global norm; 0 = off

    @pydantic.model_validator(mode="after")
    def check_offload(self) -> "EngineConfig":
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"offload: {self.offload} needs zero_stage {least} or more; it is {self.zero_stage}")
        return self


def multiplies_in_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bf16 matrices: a CPU without takes some forty times as long as
    in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def settle_precision(config: EngineConfig, saved: str | None, world: World) -> EngineConfig:
    """The config with `auto` made a precision: that of the checkpoint to go on from, or one for all ranks. Collective."""
    if config.precision != "auto":
        return config
    chosen = saved or ("fp32" if world.any(not multiplies_in_bf16(world.device)) else "bf16")
    return config.model_copy(update={"precision": chosen})


def learning_rate(config: EngineConfig, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up, then half a cosine down to `min_lr`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


class StateBytes(NamedTuple):
    """What a rank keeps from step to step, and the gradients between the backward pass and the update, in bytes."""

    weights: int
    gradients: int
    optimizer: int  # fp32 weights, where they are not those of the model, and AdamW's two moments
    average: int  # of the weights, by `ema`
    bucket: int  # in which DeepSpeed puts gradients to reduce them; at ZeRO 1 and 2 during the backward pass only

    @property
    def total(self) -> int:
        return sum(self)


def numel_of(parameter: nn.Parameter) -> int:
    """Of the whole parameter, sharded by ZeRO-3 or not."""
    return getattr(parameter, "ds_numel", parameter.numel())


def bucket_size(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers the bucket has in which their gradients are reduced."""
    return min(BUCKET, sum(numel_of(parameter) for parameter in parameters if parameter.requires_grad))


def count_state(
    parameters: Sequence[nn.Parameter], config: EngineConfig, ranks: int, average: bool = False
) -> StateBytes:
    """The state of training these parameters, sharded already or not, in a settled precision; on the device and, of what
    `config.offload` moves there, in the host's memory.

    Not in it: activations, batches, what a step gathers at ZeRO 3, momentum towers, and up to one parameter more of gradients
    at ZeRO 1 and 2 (the one that the parts of two ranks cut).
    """
    stage, size = config.zero_stage, 4 if config.precision == "fp32" else 2
    numels = [numel_of(parameter) for parameter in parameters]
    whole = sum(numels)
    part = sum(numel_of(parameter) for parameter in parameters if parameter.requires_grad) / (ranks if stage else 1)
    weights = whole
    if stage == 3:  # which keeps the small ones whole too
        weights = whole / ranks + sum(numel for numel in numels if numel <= PERSISTENT)
    has_masters = stage > 0 or size == 2  # ZeRO keeps a copy of weights in fp32 too
    return StateBytes(
        weights=round(size * weights),
        gradients=round(size * part),
        optimizer=round((12 if has_masters else 8) * part),
        average=round(4 * part) if average else 0,
        bucket=size * bucket_size(parameters) if stage else 0,
    )


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups, by weight decay and by what multiplies the learning rate (`lr_scale`; those with 1 come first).

    Weights decay; gains, biases and the logit scale (all of one dimension) do not.
    """
    scales = learning_rate_scales(model, layer_decay) if layer_decay < 1 else {}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (scales.get(name, 1.0), weight_decay if parameter.ndim > 1 else 0.0)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": groups[scale, decay], "weight_decay": decay, "lr_scale": scale}
        for scale, decay in sorted(groups, reverse=True)
    ]


def deepspeed_config(config: EngineConfig, global_batch: int, world: World, bucket: int) -> dict[str, Any]:
    """DeepSpeed's own configuration, with a `bucket` of so many gradients. Generated, because DeepSpeed lets misspelt
    top-level keys pass."""
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": bucket}
    host = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    if config.offload != "none":
        zero["offload_optimizer"] = host
    if config.offload == "all":
        zero["offload_param"] = host
    return {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": global_batch // world.size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.gradient_clip,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # offloaded too, torch's fused AdamW: DeepSpeed's own needs a compiler
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16", "initial_scale_power": 14},
        "steps_per_print": 2**31,
    }


def import_deepspeed() -> Any:
    """DeepSpeed, told of the device before its import decides, needing no compiler, and quiet unless something is wrong."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # torch 2.13 renamed collectives that DeepSpeed 0.19 still calls by their old names.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    with hidden_stderr():
        import deepspeed

        # On CPUs it would compile a shared-memory all-reduce at start, which fails without a compiler and leaves files
        # in /dev/shm after a crash. gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Any ZeRO optimiser imports Muon, which has a function compiled at import; the compiler takes seconds to import. What
    # fails here is tried again by the optimiser, which then says so; a DeepSpeed without Muon has nothing to spare.
    no_compiler = mock.patch("deepspeed.runtime.compiler.compile", lambda **_: lambda function: function)
    with contextlib.suppress(ImportError, AttributeError), no_compiler:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its import sets the level once more
    return deepspeed


@contextlib.contextmanager
def hidden_stderr() -> Iterator[None]:
    """Drop what child processes print meanwhile: DeepSpeed, asked what it could compile, tries to link libaio, and the
    linker complains."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def build_engine(model: nn.Module, config: EngineConfig, global_batch: int, world: World) -> Any:
    """A DeepSpeed engine around `model`: `engine(batch)`, `engine.backward(loss)`, `engine.step()`.

    The precision is settled (`settle_precision`). Raises ConfigError for one that the device does not have.
    """
    deepspeed = import_deepspeed()
    assert config.precision != "auto"
    if config.precision == "fp16" and not deepspeed.get_accelerator().is_fp16_supported():
        raise ConfigError("engine.precision: fp16 is not supported on this device; use bf16 or fp32")
    if config.precision == "bf16" and world.is_main and not multiplies_in_bf16(world.device):
        log.warning(
            "this device has no instructions for bf16, and takes many times as long as with engine.precision=auto"
        )
    if world.device.type == "cpu" and config.precision != "fp32":
        # torch's fused attention for CPUs is not vectorised in 16 bits: its backward pass took half of a step's time.
        torch.backends.cuda.enable_flash_sdp(False)  # despite its name, for CPUs too
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed asks for it even in a job of one process
    deepspeed.init_distributed(
        "nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay, config.layer_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )
    settings = deepspeed_config(config, global_batch, world, bucket_size(model.parameters()))
    engine, *_ = deepspeed.initialize(model=model.to(world.device), optimizer=optimizer, config=settings)
    if config.zero_stage == 0 and config.precision != "fp32":
        undo_first_step(engine)
    return engine


def unsharded_masters(engine: Any) -> dict[nn.Parameter, Tensor]:
    """Without ZeRO, in 16 bits: each trained parameter's fp32 copy, in the optimiser's order. Elsewhere {}."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() or not hasattr(optimizer, "fp32_groups"):
        return {}
    return dict(zip(itertools.chain(*optimizer.fp16_groups), itertools.chain(*optimizer.fp32_groups), strict=True))


def undo_first_step(engine: Any) -> None:
    """Take back the step without gradients by which DeepSpeed, in 16 bits without ZeRO, allocates AdamW's moments.

    It decays the weights once, and counts: the first true step would then be 0.74 of what it should be.
    """
    engine.optimizer.optimizer.state.clear()
    for weight, exact in unsharded_masters(engine).items():
        exact.data.copy_(weight.data)


@contextlib.contextmanager
def one_reduction(engine: Any) -> Iterator[None]:
    """Every `engine.backward` within the block adds to the gradients of one step; ranks are averaged once, at its end."""
    if engine.zero_optimization_stage():
        with engine.coalesce_grad_reduction():
            yield
    else:  # which DeepSpeed's context refuses
        with engine.no_sync():
            yield
        engine.allreduce_gradients()


def loss_scale(engine: Any) -> float:
    """What `run_backward` multiplies a loss, and so all gradients, by: 1 but in fp16."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0


def run_backward(engine: Any, loss: Tensor) -> None:
    """`engine.backward`, with the loss scale of fp16 at every stage: DeepSpeed 0.19 divides all gradients by it, but without
    ZeRO does not multiply the loss."""
    engine.backward(loss if engine.zero_optimization_stage() else loss * loss_scale(engine))


def gradient_norm(engine: Any) -> float:
    """The global norm of the gradients that the next step would apply, before clipping. Collective.

    Infinite if one of them is not finite.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups

    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        norm = float(combine_grad_norm_groups(optimizer._get_norm_groups()))
    elif stage:
        norm = float(optimizer.scaled_global_norm())
    else:
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
    return norm / loss_scale(engine) if math.isfinite(norm) and norm >= 0 else math.inf  # DeepSpeed says -1 then


def drop_gradients(engine: Any) -> None:
    """End a step without applying its gradients: weights, moments and loss scale stay as they are."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer._overflow_clean_up(optimizer.loss_scale)
    elif stage:
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
        else:
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
    else:
        engine.zero_grad()


def can_lower_loss_scale(engine: Any) -> bool:
    """Whether gradients that overflow now can be met with a smaller loss scale: in fp16, until it is at its least."""
    if not engine.fp16_enabled():
        return False
    optimizer = engine.optimizer
    if engine.zero_optimization_stage():
        least = optimizer.loss_scaler.min_scale
    else:
        least = optimizer.loss_scale_config.min_loss_scale
    return loss_scale(engine) > least


def apply_gradients(engine: Any) -> bool:
    """Update the weights, unless a gradient is not finite: then drop the gradients. Returns whether weights were updated.

    Every rank decides the same, because gradients are reduced by now. DeepSpeed itself does so in fp16 and at ZeRO 1 and
    2, but not at ZeRO 3 nor without ZeRO.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    overflow = False
    if stage == 3 and not engine.fp16_enabled():
        optimizer.check_overflow()
        overflow = optimizer.overflow
    elif stage == 0 and not engine.fp16_enabled():
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        overflow = not torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
    if overflow:
        drop_gradients(engine)
        return False
    if stage and engine.fp16_enabled():
        # Else DeepSpeed ends the process where the scale cannot fall. It came with the checkpoint, so it is told each time.
        optimizer.loss_scaler.raise_error_at_min_scale = False
    engine.step()
    return engine.was_step_applied()


@torch.no_grad()
def cap_logit_scale(engine: Any) -> None:
    """After a step, keep the logit scale, the optimiser's and the model's, within its bound: the model clamps what it
    computes with, and from beyond the bound no gradient would bring it back."""
    log_scale = engine.module.logit_scale.log_scale
    bound = round_down(math.log(MAX_LOGIT_SCALE), log_scale.dtype)  # else fp16's would round to above it
    if log_scale.requires_grad:
        log_scale.data.clamp_(max=bound)
        if engine.zero_optimization_stage() == 3:  # which keeps small parameters whole, beside its own part of them
            log_scale.ds_tensor.data.clamp_(max=bound)
        if part := master_part(engine, log_scale, unsharded_masters(engine)):
            part[1].clamp_(max=bound)


def round_down(value: float, dtype: torch.dtype) -> float:
    """The largest number of a 16- or 32-bit `dtype` that is at most `value`, which is positive."""
    nearest = torch.tensor(value, dtype=dtype)
    if nearest.item() > value:
        bits = nearest.view(torch.int16 if nearest.itemsize == 2 else torch.int32)
        bits -= 1
    return nearest.item()


def master_parts(engine: Any) -> dict[str, tuple[int, Tensor]]:
    """The part that this rank holds of each trained parameter, in fp32: by name, the place in the flattened parameter where
    it begins, and its elements [n].

    With ZeRO the parts of all ranks make up the parameter, and a rank may have none of it; without, each rank has all. The
    parts are the optimiser's own tensors, not copies.
    """
    masters = unsharded_masters(engine)
    trained = {name: weight for name, weight in engine.module.named_parameters() if weight.requires_grad}
    parts = {name: master_part(engine, weight, masters) for name, weight in trained.items()}
    return {name: part for name, part in parts.items() if part is not None}


def master_part(engine: Any, parameter: nn.Parameter, masters: dict[nn.Parameter, Tensor]) -> tuple[int, Tensor] | None:
    """That of `master_parts` for one parameter; None where this rank holds nothing of it."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        # Not DeepSpeed's safe_get_local_fp32_param, whose answer is a copy where the optimiser is in the host's memory.
        flat, place, held, start = place_at_zero_3(engine, parameter)
        return start, flat.narrow(0, place, held)
    if stage:
        fragment = parameter._hp_mapping
        return None if fragment is None else (fragment.lp_fragment_address.start, fragment.hp_fragment)
    return 0, masters.get(parameter, parameter).detach().flatten()


def place_at_zero_3(engine: Any, parameter: nn.Parameter) -> tuple[Tensor, int, int, int]:
    """The flat fp32 tensor in which this rank's optimiser holds its part of a parameter, where the part begins there, how long
    it is, and where in the flattened parameter it begins."""
    optimizer = engine.optimizer
    group, place, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
    share = -(-parameter.ds_numel // engine.dp_world_size)
    start = min(parameter.ds_numel, engine.global_rank * share)
    held = min(numel, parameter.ds_numel - start)  # what comes after the end is padding
    return optimizer.fp32_partitioned_groups_flat[group], place, held, start


def join_parts(
    engine: Any, part: tuple[int, Tensor] | None, shape: torch.Size, dtype: torch.dtype, world: World
) -> Tensor:
    """A tensor of which the ranks hold parts divided as `master_parts` divides a parameter of this shape: whole, on the CPU.

    `part` is this rank's, None if it holds none. Collective.
    """
    whole = torch.zeros(shape.numel(), dtype=dtype, device=world.device)
    if part is not None:
        start, values = part
        whole[start : start + len(values)] = values
    if world.size > 1 and engine.zero_optimization_stage() > 0:
        whole = world.all_reduce(whole)
    return whole.view(shape).cpu()


def set_learning_rate(engine: Any, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]

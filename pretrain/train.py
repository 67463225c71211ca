"""A training run: its configuration, and the loop.

python -m pretrain train configs/demo.yaml [key=value ...]
"""

import contextlib
import importlib.metadata
import logging
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch

from data_tools.errors import UserError
from data_tools.files import write_atomic, write_json_atomic
from pretrain import __version__, checkpoint
from pretrain.config import ConfigError, ConfigModel, load_config, render_config
from pretrain.data.loader import DataConfig, Loader
from pretrain.data.text import build_tokenizer
from pretrain.engine import EngineConfig, build_engine, import_deepspeed, learning_rate, set_learning_rate
from pretrain.losses import LossesConfig, compute_losses
from pretrain.metrics import Clock, Metrics, peak_memory_gib
from pretrain.model.model import ModelConfig, build_model
from pretrain.randomness import seed_torch
from pretrain.signals import StopRequest
from pretrain.world import World

log = logging.getLogger(__name__)

EXIT_SAVED = 85  # asked to stop, checkpoint written: a launcher starts the same command again


def check_duration(text: str) -> str:
    number, _, unit = text.partition(" ")
    if unit not in ("steps", "epochs", "samples") or not number.replace("_", "").isdigit() or int(number) < 1:
        raise ValueError(
            f"write a number and a unit, such as '2000 steps', '30 epochs' or '500000 samples'; found '{text}'"
        )
    return text


class TrainConfig(ConfigModel):
    batch_size: int = pydantic.Field(ge=1)  # pairs over all ranks
    duration: Annotated[str, pydantic.AfterValidator(check_duration)]  # "2000 steps", "30 epochs", "500000 samples"
    log_every_steps: int = pydantic.Field(default=10, ge=1)
    checkpoint_every_steps: int = pydantic.Field(default=1000, ge=1)
    keep_checkpoints: int = pydantic.Field(default=2, ge=1)
    resume: Literal["auto", "never"] = "auto"

    def steps(self, samples: int | None) -> int:
        """The duration in steps, for a dataset of that many samples; a part of a batch counts as one more step.

        Raises ConfigError for epochs of a stream, of which nobody knows how many samples it has (None).
        """
        number, unit = self.duration.split()
        if unit == "epochs" and samples is None:
            raise ConfigError(f"train.duration: '{self.duration}' of a stream cannot be counted. Give steps or samples")
        total = int(number) * {"steps": self.batch_size, "epochs": samples, "samples": 1}[unit]
        return -(-total // self.batch_size)


class RunConfig(ConfigModel):
    """All of a run. Each section is described beside the code that it configures."""

    run: str  # folder for checkpoints, metrics and the resolved config
    seed: int = pydantic.Field(default=0, ge=0, lt=2**63)
    data: DataConfig
    model: ModelConfig
    losses: LossesConfig = LossesConfig()
    engine: EngineConfig = EngineConfig()
    train: TrainConfig

    @pydantic.model_validator(mode="after")
    def check_losses(self) -> "RunConfig":
        if self.losses.matching and not self.model.fusion:
            raise ValueError("losses.matching needs model.fusion: set one, or losses.matching=null")
        if self.model.fusion and not self.losses.matching:
            raise ValueError("model.fusion would not be trained: set losses.matching, or model.fusion=null")
        if not (self.losses.contrastive or self.losses.matching):
            raise ValueError("losses: all are off; set losses.contrastive or losses.matching")
        return self


def train(config: RunConfig, world: World) -> int:
    """Train for the configured duration, on from the newest checkpoint if there is one. Returns the exit code."""
    stop = StopRequest()
    import_deepspeed()  # before transformers does, which would not keep its linker quiet
    tokenizer = build_tokenizer(config.model.tokenizer, config.model.text.context_length)
    image_size, batch_size = config.model.image.image_size, config.train.batch_size
    loader = Loader(config.data, tokenizer, image_size, batch_size, config.seed, world)
    newest = find_checkpoint(config, world)
    model = build_model(config.model, tokenizer, config.seed, world).train()
    engine = build_engine(model, config.engine, batch_size, world)
    step = restore(engine, loader, *newest) if newest else 0
    steps = config.train.steps(loader.supply.epoch_samples)
    if world.is_main:
        describe_run(config)
        samples = "a stream" if loader.supply.epoch_samples is None else f"{loader.supply.epoch_samples:,} samples"
        log.info("%s: %s, %s, step %d of %d", config.run, size_of(engine), samples, step, steps)

    clock = Clock()
    metrics = Metrics(config.run, step, steps, enabled=world.is_main)
    # Closed also where a step fails: else what is under way would be finished before the process ends.
    with contextlib.closing(iter(loader)) as batches:
        stopping = world.any(stop.requested)
        while step < steps and not stopping:
            batch = next(batches).to(world.device)
            clock.data_ready()
            set_learning_rate(engine, learning_rate(config.engine, step, steps))
            seed_torch(config.seed, step, world.rank)
            losses = compute_losses(config.losses, engine(batch), world)
            engine.backward(losses["total"])
            engine.step()
            step += 1
            clock.step_done()
            loader.close_epochs()
            metrics.step_done()
            stopping = world.any(stop.requested)
            if step % config.train.log_every_steps == 0 or step in (1, steps):
                metrics.log(step, measure(engine, losses, loader, world) | clock.rates(batch_size))
            if step % config.train.checkpoint_every_steps == 0 or step == steps or stopping:
                state = run_state(config, loader, step, world)
                checkpoint.save(engine, config.run, step, state, config.train.keep_checkpoints, world)
                clock.leave_out()
        stop.ignore()
    metrics.close()
    if step < steps:
        log.info("stopped as asked after step %d of %d. Run the same command again to go on", step, steps)
        return EXIT_SAVED
    return 0


def measure(engine: Any, losses: dict[str, torch.Tensor], loader: Loader, world: World) -> dict[str, float]:
    """Losses (means over the ranks), the optimiser's state, samples replaced so far, memory: by metric name. Collective."""
    means = world.mean(torch.stack([loss.reshape(()) for loss in losses.values()])).tolist()
    values = {f"loss/{name}": mean for name, mean in zip(losses, means, strict=True)}
    values["optimizer/lr"] = engine.optimizer.param_groups[0]["lr"]
    values["optimizer/skipped_steps"] = engine.skipped_steps
    norm = engine.get_global_grad_norm()
    if norm is not None:  # DeepSpeed does not tell it at ZeRO 0 in fp32
        values["optimizer/gradient_norm"] = float(norm)
    values |= loader.measure()
    values["memory/peak_gib"] = peak_memory_gib(world.device)
    return values


def size_of(engine: Any) -> str:
    parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
    return f"{parameters / 1e6:.1f} M parameters"


def find_checkpoint(config: RunConfig, world: World) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, the same on every rank. Raises UserError if this config does not fit it."""
    existing = world.share(checkpoint.find_newest(config.run) if world.is_main else None)
    if existing is None:
        return None
    folder, state = existing
    if config.train.resume == "never":
        raise UserError(f"{config.run}: already holds {folder.name}. Choose another run folder, or train.resume=auto")
    checkpoint.check_same_run(state, run_identity(config, world), folder)
    return existing


def restore(engine: Any, loader: Loader, folder: Path, state: dict[str, Any]) -> int:
    """Put engine and loader where the checkpoint was taken; returns the number of steps done. Collective."""
    checkpoint.restore(engine, folder)
    loader.restore(state["loader"])
    return state["step"]


def run_identity(config: RunConfig, world: World) -> dict[str, Any]:
    """What must not change between a checkpoint and its continuation."""
    return {
        "world_size": world.size,
        "model": config.model.model_dump(),
        "engine": {"zero_stage": config.engine.zero_stage, "precision": config.engine.precision},
    }


def run_state(config: RunConfig, loader: Loader, step: int, world: World) -> dict[str, Any]:
    """What a checkpoint's state.json says, beside its list of files."""
    return {
        "format": 1,
        "step": step,
        "loader": loader.state(),
        **run_identity(config, world),
        "config": config.model_dump(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, and the code's git revision where there is one."""
    found = {
        name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers", "open_clip_torch")
    }
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    revision = subprocess.run(git, capture_output=True, text=True, check=False) if shutil.which("git") else None
    return found | {
        "python": platform.python_version(),
        "pretrain": __version__,
        "code_revision": revision.stdout.strip() if revision else "",
    }


def describe_run(config: RunConfig) -> None:
    """Leave in the run folder what is needed to understand and repeat it."""
    run = Path(config.run)
    run.mkdir(parents=True, exist_ok=True)
    write_atomic(run / "config.yaml", render_config(config).encode())
    with open(run / "commands.txt", "a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')} {shlex.join(sys.argv)}\n")
    write_json_atomic(run / "versions.json", versions())


def load_run_config(run: str | Path) -> RunConfig:
    """The resolved config of a run folder. Raises UserError if it is not one."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: holds no config.yaml, so it is not a run folder. Give the `run:` of a training run")
    return load_config(path, [], RunConfig)

"""A training run: its configuration, and the loop.

python -m pretrain train configs/demo.yaml [key=value ...]
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch

from data_tools.errors import UserError
from pretrain import checkpoint
from pretrain.accumulate import BadSteps, compute_gradients
from pretrain.checkpoint import CheckpointConfig, Saver
from pretrain.config import ConfigError, ConfigModel, check_config, load_config
from pretrain.contract import Batch, TeacherOutput
from pretrain.data.loader import DataConfig, Loader, open_loader
from pretrain.data.text import Tokenizer, build_tokenizer
from pretrain.ema import Ema, EmaConfig
from pretrain.engine import (
    EngineConfig,
    apply_gradients,
    build_engine,
    can_lower_loss_scale,
    cap_logit_scale,
    drop_gradients,
    import_deepspeed,
    learning_rate,
    set_learning_rate,
    settle_precision,
)
from pretrain.events import RunTaken, lock_run
from pretrain.flops import NotCountable, count_flops, peak_tflops, utilisation
from pretrain.life import Life, all_keys
from pretrain.losses import LOSSES, PAIR_LOSSES, LossesConfig
from pretrain.metrics import Clock, Metrics, peak_memory_gib
from pretrain.model.model import ImageTextModel, ModelConfig, build_model, check_towers
from pretrain.model.towers import BatchStatistics
from pretrain.model.warm_start import warm_start
from pretrain.momentum import Momentum
from pretrain.provenance import describe_run, versions
from pretrain.randomness import seed_torch
from pretrain.signals import EXIT_RESTART
from pretrain.spikes import GiveUp, SpikesConfig
from pretrain.stragglers import Stragglers
from pretrain.watch import WatchConfig
from pretrain.world import World

log = logging.getLogger(__name__)


def check_duration(text: str) -> str:
    number, _, unit = text.partition(" ")
    if unit not in ("steps", "epochs", "samples") or not number.replace("_", "").isdigit() or int(number) < 1:
        raise ValueError(
            f"write a number and a unit, such as '2000 steps', '30 epochs' or '500000 samples'; found '{text}'"
        )
    return text


class TrainConfig(ConfigModel):
    batch_size: int = pydantic.Field(ge=1)  # pairs over all ranks
    # Pairs that a rank computes at once; none: all. Fewer take less memory and one more forward; gradients stay the same.
    micro_batch_size: int | None = pydantic.Field(default=None, ge=1)
    duration: Annotated[str, pydantic.AfterValidator(check_duration)]  # "2000 steps", "30 epochs", "500000 samples"
    log_every_steps: int = pydantic.Field(default=10, ge=1)
    resume: Literal["auto", "never"] = "auto"
    max_bad_steps: int = pydantic.Field(default=10, ge=1)  # in a row, skipped for a loss or gradient that is not finite

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
    checkpoint: CheckpointConfig = CheckpointConfig()
    watch: WatchConfig = WatchConfig()
    ema: EmaConfig | None = None  # none: no average of the weights is kept
    spikes: SpikesConfig | None = None  # none: only what is not finite is skipped

    @pydantic.model_validator(mode="after")
    def check_losses(self) -> "RunConfig":
        if self.losses.matching and not (self.model.fusion and self.model.match_head):
            raise ValueError("losses.matching needs model.fusion and its match_head: set them, or losses.matching=null")
        for name in ("captioning", "masked_language"):
            if getattr(self.losses, name) and not getattr(self.model, name):
                raise ValueError(f"losses.{name} needs a head: set model.{name}={{}}, or losses.{name}=null")
            if getattr(self.model, name) and not getattr(self.losses, name):
                raise ValueError(f"model.{name} would not be trained: set losses.{name}={{}}, or model.{name}=null")
        if self.model.fusion and not (self.losses.matching or self.losses.captioning or self.losses.masked_language):
            raise ValueError("model.fusion would not be trained: set losses.matching, or model.fusion=null")
        if self.model.fusion and self.model.match_head and not self.losses.matching:
            raise ValueError("model.match_head would not be trained: set losses.matching, or model.match_head=false")
        if self.model.compile and self.engine.zero_stage == 3:
            raise ValueError(
                "model.compile does not go with engine.zero_stage=3, which gathers weights where compiled code does not ask: "
                "set engine.zero_stage=2 or less, or model.compile=false"
            )
        if self.losses.sigmoid and self.model.init_logit_bias is None:
            raise ValueError("losses.sigmoid needs a bias: set model.init_logit_bias=-10 and model.init_logit_scale=10")
        if self.model.init_logit_bias is not None and not self.losses.sigmoid:
            raise ValueError("model.init_logit_bias would not be trained: set losses.sigmoid, or leave it out")
        if not any(getattr(self.losses, name) for name in LOSSES):
            raise ValueError(f"losses: all are off; set one of {', '.join(LOSSES)}")
        active = {name: loss for name in LOSSES if (loss := getattr(self.losses, name))}
        if all(loss.never_counts for loss in active.values()):
            raise ValueError(
                f"losses: the weight of {' and '.join(active)} is 0 in every step; nothing would be trained"
            )
        for name in PAIR_LOSSES:
            if name in active and active[name].never_counts:
                raise ValueError(
                    f"losses.{name}.weight is 0 in every step, so its head would not be trained: give it a weight, or set "
                    f"losses.{name}=null and leave the head out"
                )
        return self


def train(config: RunConfig, world: World) -> int:
    """Train for the configured duration, on from the newest checkpoint if there is one. Returns the exit code."""
    with lock_run(config.run, world) as lock:
        life = Life(config.run, config.watch, config.spikes, world, lock)
        try:
            return train_steps(config, life, world)
        except GiveUp as error:
            return life.give_up(error)
        except RunTaken as error:
            log.error("error: %s", error)
            return EXIT_RESTART
        except OSError as error:
            if error.errno is None:
                life.fail(error)
                raise
            place = error.filename or config.run
            problem = UserError(f"{place}: {error.strerror}. Mend that, and run the same command again")
            life.fail(problem)
            raise problem from error
        except BaseException as error:
            life.fail(error)
            raise
        finally:
            life.close()


def train_steps(config: RunConfig, life: Life, world: World) -> int:
    """From the newest checkpoint, if there is one, to the duration or a stop. Returns the exit code. Collective."""
    import_deepspeed()  # before transformers does, which would not keep its linker quiet
    tokenizer = build_tokenizer(config.model.tokenizer, config.model.text.context_length)
    image_size, batch_size = config.model.image.image_size, config.train.batch_size
    record = Path(config.run) / "data"
    loader = open_loader(config.data, tokenizer, image_size, batch_size, config.seed, world, record)
    newest = find_checkpoint(config, world)
    config = settle(config, newest, world)
    model = build_model(config.model, tokenizer, config.seed, world).train()
    micro_batch_size = fit_micro_batch(config.train, newest, world)
    check_micro_batches(model, micro_batch_size, batch_size // world.size)
    check_towers(model)
    teacher = load_teacher(config, tokenizer, world)
    if not newest:
        warm_start(model, config.model.warm_start, world)
    peak = peak_tflops(world.device)
    flops = count_model_flops(model, config.losses, world) if peak else None
    engine = build_engine(model, config.engine, batch_size, world)
    identity = run_identity(config, world)
    step, extra = restore(engine, loader, life, newest, identity) if newest else (0, {})

    def build_momentum(extra: dict[str, torch.Tensor]) -> Momentum | None:
        settings = config.losses.momentum
        return Momentum(settings, config.model, tokenizer, engine, world, extra) if settings else None

    def build_ema(extra: dict[str, torch.Tensor]) -> Ema | None:
        return Ema(config.ema, engine, world, extra) if config.ema else None

    momentum, ema = build_momentum(extra), build_ema(extra)
    del extra  # as large as the towers
    steps = config.train.steps(loader.supply.epoch_samples)
    if world.is_main:
        describe_run(config.run, config)
        loader.supply.put_on_record(record)
        samples = "a stream" if loader.supply.epoch_samples is None else f"{loader.supply.epoch_samples:,} samples"
        model_size = f"{size_of(engine)} in {config.engine.precision}"
        log.info("%s: %s, %s, step %d of %d", config.run, model_size, samples, step, steps)

    statistics = BatchStatistics(model)
    clock, stragglers = Clock(), Stragglers(life.watch, life.note, world)
    metrics = Metrics(config.run, step, steps, enabled=world.is_main)
    bad_steps = BadSteps(config.train.max_bad_steps, world)
    saver = Saver(engine, config.run, config.checkpoint, world, life.saved, life.lock.check)
    if newest:
        saver.copy(newest.folder)  # of which the life before may not have come to the end
    batches = iter(loader)
    life.start(step, steps, newest)
    saved_step = step  # of a checkpoint, or of a beginning that needs none

    def save() -> None:
        nonlocal saved_step
        life.watch.enter("save", step)
        saver.finish()  # of the one before
        life.begin_save()
        beside = (momentum.state() if momentum else {}) | (ema.state() if ema else {})
        saver.save(step, run_state(config, loader, life, step, world), beside)
        saved_step = step
        clock.leave_out()

    try:
        while step < steps:
            life.watch.enter("data", step)
            clock.data_wanted()
            stopping, saving = life.wait_for(batches, is_saved=step == saved_step)
            if (stopping or saving) and step != saved_step:
                save()
            if stopping:
                break
            if saving:
                continue
            batch = next(batches).to(world.device)
            clock.data_ready()
            life.watch.enter("step", step)
            trained = step + 1 not in life.left_out.steps
            if trained:
                statistics.keep()
                set_learning_rate(engine, learning_rate(config.engine, step, steps))
                seed_torch(config.seed, step, world.rank)
                losses, output = compute_gradients(
                    engine, batch, config.losses, step, micro_batch_size, world, teacher, momentum
                )
                spike = life.judge(step + 1, losses["total"], engine)
                if spike and (target := life.rollback_target(saver)):
                    life.roll_back(step + 1, target, spike, batch)
                    batches.close()
                    drop_gradients(engine)  # which the first step after would else add to its own, at ZeRO 0 and 3
                    step, extra = restore(engine, loader, life, target, identity)
                    saved_step = step
                    momentum, ema = build_momentum(extra), build_ema(extra)
                    del extra
                    batches, metrics = iter(loader), metrics.go_back(step)
                    clock.leave_out()
                    continue
                if spike:
                    statistics.restore()
                    drop_gradients(engine)
                    life.skip(step + 1, spike, all_keys(batch, world))
                else:
                    scale_could_fall = can_lower_loss_scale(engine)
                    applied = apply_gradients(engine)
                    if not applied:
                        statistics.restore()
                    else:
                        cap_logit_scale(engine)
                        if momentum:
                            momentum.follow(output.momentum, step)
                        if ema:
                            ema.follow()
                    bad_keys = bad_steps.check(step + 1, applied, batch, losses, output, scale_could_fall)
                    if bad_keys is not None:
                        life.skip(step + 1, "loss or gradients not finite", bad_keys)
            step += 1
            clock.step_done()
            loader.close_epochs()
            metrics.step_done()
            if trained and (step % config.train.log_every_steps == 0 or step in (1, steps)):
                values = measure(engine, losses, loader, bad_steps, world) | clock.rates(batch_size)
                values |= stragglers.report(step, values)
                if flops is not None:
                    values |= utilisation(flops, values["rate/samples_per_s"], peak, world)
                metrics.log(step, values)
            if step % config.checkpoint.every_steps == 0 or step == steps:
                save()
            elif saver.has_arrived():
                life.watch.enter("save", step)
                saver.finish()
                clock.leave_out()
        life.watch.enter("save", step)
        saver.close()
    finally:  # also where a step fails: else what is under way would be finished before the process ends
        batches.close()
    metrics.close()
    return life.end(step, steps)


def count_model_flops(model: ImageTextModel, losses: LossesConfig, world: World) -> float | None:
    """None, with a warning, where they cannot be counted."""
    try:
        return count_flops(model, losses)
    except NotCountable as error:
        if world.is_main:
            log.warning("no rate/mfu in the metrics: %s", error)
        return None


def load_teacher(config: RunConfig, tokenizer: Tokenizer, world: World) -> Callable[[Batch], TeacherOutput] | None:
    """That of `losses.distill`, in the precision of the run; None without."""
    if not config.losses.distill:
        return None
    # Here, because it reads exports, and what writes those reads runs, and so this module.
    from pretrain.teacher import build_teacher

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.engine.precision]
    return build_teacher(config.losses.distill, tokenizer, config.model.embed_dim, world.device, dtype)


def fit_micro_batch(config: TrainConfig, found: checkpoint.Found | None, world: World) -> int | None:
    """Pairs that a rank computes at once: as configured, but where a run goes on, perhaps with another number of ranks than
    it was configured for, the greatest divisor of the pairs of a rank up to the configured size."""
    size, rows = config.micro_batch_size, config.batch_size // world.size
    if size is None or size >= rows or not found:
        return size
    fitting = next(part for part in range(size, 0, -1) if rows % part == 0)
    if fitting != size and world.is_main:
        log.info("train.micro_batch_size: %d does not divide the %d pairs of a rank; %d instead", size, rows, fitting)
    return fitting


def check_micro_batches(model: torch.nn.Module, size: int | None, rows: int) -> None:
    """Raises ConfigError for micro-batches of unequal size among a rank's `rows`, and for a model that would see them
    differently."""
    if size is None or size >= rows:
        return
    if rows % size:
        raise ConfigError(
            f"train.micro_batch_size: {size} does not divide the {rows} pairs of a rank. Choose a divisor"
        )
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    if any(norm.training for norm in norms):  # one that is frozen normalises each sample by what it knows
        raise ConfigError(
            "train.micro_batch_size: this model has batch normalisation, whose statistics are of what is computed at once. "
            "Leave it out, freeze the tower (model.freeze), or choose an image tower without, such as kind: vit"
        )


def measure(
    engine: Any, losses: dict[str, torch.Tensor], loader: Loader, bad_steps: BadSteps, world: World
) -> dict[str, float]:
    """Losses (means over the ranks), the optimiser's state, samples replaced so far, memory: by metric name. Collective."""
    means = world.mean(torch.stack([loss.reshape(()) for loss in losses.values()])).tolist()
    values = {f"loss/{name}": mean for name, mean in zip(losses, means, strict=True)}
    values["optimizer/lr"] = engine.optimizer.param_groups[0]["lr"]
    values["optimizer/bad_steps"] = bad_steps.total
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


def find_checkpoint(config: RunConfig, world: World) -> checkpoint.Found | None:
    """The checkpoint to go on from, the same on every rank. Raises UserError if this config does not fit it. Collective."""
    found = checkpoint.find_newest(config.run, world, config.checkpoint.target)
    if found is None:
        return None
    if config.train.resume == "never":
        raise UserError(
            f"{config.run}: already holds {found.folder.name}. Choose another run folder, or train.resume=auto"
        )
    # An earlier version did not have every key: what is missing is the default, which is what it did.
    model = describe_model(check_config(found.state["model"], ModelConfig, f"{found.folder}: model"))
    now = run_identity(settle(config, found, world), world)
    checkpoint.check_same_run(found.state | {"model": model}, now, found.folder)
    return found


def settle(config: RunConfig, found: checkpoint.Found | None, world: World) -> RunConfig:
    """The config with `auto` made what this run has, or will have. Collective."""
    saved = found.state["engine"]["precision"] if found else None
    return config.model_copy(update={"engine": settle_precision(config.engine, saved, world)})


def restore(
    engine: Any, loader: Loader, life: Life, found: checkpoint.Found, identity: dict[str, Any]
) -> tuple[int, dict[str, torch.Tensor]]:
    """Put engine, loader and the measure of spikes where the checkpoint was taken. Collective.

    Returns the steps done, and what was saved beside.
    """
    extra = checkpoint.restore(engine, found.folder, found.state, identity)
    loader.restore(found.state["loader"])
    life.left_out.recall(found.state["left_out"], write=life.world.is_main)
    if life.spikes:
        life.spikes.restore(found.state["spikes"])
    return found.state["step"], extra


def run_identity(config: RunConfig, world: World) -> dict[str, Any]:
    """What a checkpoint depends on: the model and the precision must not change until its continuation, the rest may."""
    return {
        "world_size": world.size,
        "model": describe_model(config.model),
        "engine": {"zero_stage": config.engine.zero_stage, "precision": config.engine.precision},
    }


def describe_model(model: ModelConfig) -> dict[str, Any]:
    """The keys that a checkpoint of the model depends on."""
    return model.model_dump(exclude={"warm_start", "checkpoint_activations", "compile"})


def run_state(config: RunConfig, loader: Loader, life: Life, step: int, world: World) -> dict[str, Any]:
    """What a checkpoint's state.json says, beside its list of files. Collective."""
    return {
        "format": 3,
        "step": step,
        "loader": loader.state(),
        "spikes": life.spikes.state() if life.spikes else {},
        "left_out": life.left_out.entries,
        **run_identity(config, world),
        "config": config.model_dump(),
        "versions": versions() if world.is_main else {},  # whose state is kept
    }


def load_run_config(run: str | Path) -> RunConfig:
    """The resolved config of a run folder. Raises UserError if it is not one."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: holds no config.yaml, so it is not a run folder. Give the `run:` of a training run")
    return load_config(path, [], RunConfig)

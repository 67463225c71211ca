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
from pretrain.contract import Batch, ModelOutput, TeacherOutput
from pretrain.data.loader import DataConfig, open_loader
from pretrain.data.text import Tokenizer, build_tokenizer
from pretrain.ema import Ema, EmaConfig
from pretrain.engine import (
    EngineConfig,
    apply_gradients,
    build_engine,
    can_lower_loss_scale,
    cap_logit_scale,
    count_state,
    drop_gradients,
    import_deepspeed,
    learning_rate,
    numel_of,
    set_learning_rate,
    settle_precision,
)
from pretrain.events import RunTaken, lock_run
from pretrain.flops import Flops, NotCountable, count_flops, peak_tflops, utilisation
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
            return Trainer(config, life, world).run()
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


class Trainer:
    """One life of a run: from the newest checkpoint, if there is one, to the duration or a stop.

    All methods but `describe` are collective. What a step does first stands first in `run`, and set-up before it: when a run
    hangs, the watch tells by the lines where its ranks are which of them is behind.
    """

    def __init__(self, config: RunConfig, life: Life, world: World) -> None:
        import_deepspeed()  # before transformers does, which would not keep its linker quiet
        self.life, self.world = life, world
        self.tokenizer = build_tokenizer(config.model.tokenizer, config.model.text.context_length)
        image_size, batch_size = config.model.image.image_size, config.train.batch_size
        record = Path(config.run) / "data"
        self.loader = open_loader(config.data, self.tokenizer, image_size, batch_size, config.seed, world, record)
        self.newest = find_checkpoint(config, world)
        self.config = config = settle(config, self.newest, world)
        model = build_model(config.model, self.tokenizer, config.seed, world).train()
        self.micro_batch_size = fit_micro_batch(config.train, self.newest, world)
        check_micro_batches(model, self.micro_batch_size, batch_size // world.size)
        check_towers(model, config.engine.layer_decay)
        self.teacher = load_teacher(config, self.tokenizer, world)
        if not self.newest:
            warm_start(model, config.model.warm_start, world)
        self.peak_tflops = peak_tflops(world.device)
        self.model_flops = count_model_flops(model, config.losses, self.teacher, world) if self.peak_tflops else None
        self.engine = build_engine(model, config.engine, batch_size, world)
        self.step = self.saved_step = 0  # steps done, and of those what a checkpoint holds; a beginning needs none
        if self.newest:
            self.restore(self.newest)
        else:
            self.begin_averages({})
        self.steps = config.train.steps(self.loader.supply.epoch_samples)
        if world.is_main:
            describe_run(config.run, config)
            self.loader.supply.put_on_record(record)
            log.info("%s", self.describe())
        self.statistics = BatchStatistics(model)
        self.clock, self.stragglers = Clock(), Stragglers(life.watch, life.note, world)
        self.metrics = Metrics(config.run, self.step, self.steps, enabled=world.is_main)
        self.bad_steps = BadSteps(config.train.max_bad_steps, world)
        self.saver = Saver(self.engine, config.run, config.checkpoint, world, life.saved, life.lock.check)
        if self.newest:
            self.saver.copy(self.newest.folder)  # of which the life before may not have come to the end
        self.batches = iter(self.loader)

    def run(self) -> int:
        """Train. Returns the exit code."""
        self.life.start(self.step, self.steps, self.newest)
        try:
            while self.step < self.steps and self.await_data():
                batch = next(self.batches).to(self.world.device)
                self.clock.data_ready()
                self.life.watch.enter("step", self.step)
                if self.step + 1 in self.life.left_out.steps:
                    self.end_step(batch)
                    continue
                losses, output = self.compute(batch)
                spike = self.life.judge(self.step + 1, losses["total"], self.engine)
                if spike and (target := self.life.rollback_target(self.saver)):
                    self.roll_back(target, spike, batch)
                    continue
                if spike:
                    self.skip(spike, batch)
                else:
                    self.update(batch, losses, output)
                self.end_step(batch, losses)
            self.life.watch.enter("save", self.step)
            self.saver.close()
        finally:  # also where a step fails: else what is under way would be finished before the process ends
            self.batches.close()
        self.metrics.close()
        return self.life.end(self.step, self.steps)

    def await_data(self) -> bool:
        """Wait for the next batch, and save where somebody asks for that; False: asked to stop, the save of it has begun."""
        while True:
            self.life.watch.enter("data", self.step)
            self.clock.data_wanted()
            stopping, saving = self.life.wait_for(self.batches, is_saved=self.step == self.saved_step)
            if (stopping or saving) and self.step != self.saved_step:
                self.save()
            if stopping or not saving:
                return not stopping

    def compute(self, batch: Batch) -> tuple[dict[str, torch.Tensor], ModelOutput]:
        """The gradients of the next step; see `compute_gradients`."""
        self.statistics.keep()
        set_learning_rate(self.engine, learning_rate(self.config.engine, self.step, self.steps))
        seed_torch(self.config.seed, self.step, self.world.rank)
        return compute_gradients(
            self.engine,
            batch,
            self.config.losses,
            self.step,
            self.micro_batch_size,
            self.world,
            self.teacher,
            self.momentum,
        )

    def update(self, batch: Batch, losses: dict[str, torch.Tensor], output: ModelOutput) -> None:
        """Apply the gradients, unless they are not finite: then the step changes nothing."""
        scale_could_fall = can_lower_loss_scale(self.engine)
        applied = apply_gradients(self.engine)
        if not applied:
            self.statistics.restore()
        else:
            cap_logit_scale(self.engine)
            if self.momentum:
                self.momentum.follow(output.momentum, self.step)
            if self.ema:
                self.ema.follow()
        bad_keys = self.bad_steps.check(self.step + 1, applied, batch, losses, output, scale_could_fall)
        if bad_keys is not None:
            self.life.skip(self.step + 1, "loss or gradients not finite", bad_keys)

    def skip(self, spike: str, batch: Batch) -> None:
        """Drop the gradients: the step changes nothing."""
        self.statistics.restore()
        drop_gradients(self.engine)
        self.life.skip(self.step + 1, spike, all_keys(batch, self.world))

    def roll_back(self, target: checkpoint.Found, spike: str, batch: Batch) -> None:
        """Go back to a checkpoint, to leave out the steps that led to the spike."""
        self.life.roll_back(self.step + 1, target, spike, batch)
        self.batches.close()
        drop_gradients(self.engine)  # which the first step after would else add to its own, at ZeRO 0 and 3
        self.restore(target)
        self.batches, self.metrics = iter(self.loader), self.metrics.go_back(self.step)
        self.clock.leave_out()

    def end_step(self, batch: Batch, losses: dict[str, torch.Tensor] | None = None) -> None:
        """Count the step, and report and save where it is time to. `losses`: None of a step that was left out."""
        self.step += 1
        self.clock.step_done()
        self.loader.close_epochs()
        self.metrics.step_done()
        if losses and (self.step % self.config.train.log_every_steps == 0 or self.step in (1, self.steps)):
            self.metrics.log(self.step, self.measure(batch, losses))
        if self.step % self.config.checkpoint.every_steps == 0 or self.step == self.steps:
            self.save()
        elif self.saver.has_arrived():
            self.life.watch.enter("save", self.step)
            self.saver.finish()
            self.clock.leave_out()

    def save(self) -> None:
        self.life.watch.enter("save", self.step)
        self.saver.finish()  # of the one before
        self.life.begin_save()
        beside = (self.momentum.state() if self.momentum else {}) | (self.ema.state() if self.ema else {})
        self.saver.save(self.step, self.state(), beside)
        self.saved_step = self.step
        self.clock.leave_out()

    def state(self) -> dict[str, Any]:
        """What a checkpoint's state.json says, beside its list of files."""
        spikes, left_out = self.life.spikes, self.life.left_out
        return {
            "format": 3,
            "step": self.step,
            "loader": self.loader.state(),
            "spikes": spikes.state() if spikes else {},
            "left_out": left_out.entries,
            **run_identity(self.config, self.world),
            "config": self.config.model_dump(),
            "versions": versions() if self.world.is_main else {},  # whose state is kept
        }

    def restore(self, found: checkpoint.Found) -> None:
        """Put all that a checkpoint holds where it was when that was taken."""
        life, identity = self.life, run_identity(self.config, self.world)
        beside = checkpoint.restore(self.engine, found.folder, found.state, identity)
        self.loader.restore(found.state["loader"])
        life.left_out.recall(found.state["left_out"], write=self.world.is_main)
        if life.spikes:
            life.spikes.restore(found.state["spikes"])
        self.step = self.saved_step = found.state["step"]
        self.begin_averages(beside)

    def begin_averages(self, beside: dict[str, torch.Tensor]) -> None:
        """The momentum towers and the average of the weights, from what was saved `beside` the engine, if there is any."""
        config, engine, world, self.momentum, self.ema = self.config, self.engine, self.world, None, None
        if config.losses.momentum:
            self.momentum = Momentum(config.losses.momentum, config.model, self.tokenizer, engine, world, beside)
        if config.ema:
            self.ema = Ema(config.ema, engine, world, beside)

    def measure(self, batch: Batch, losses: dict[str, torch.Tensor]) -> dict[str, float]:
        """Losses (means over the ranks), the optimiser's state, samples replaced so far, memory, rates, the slowest rank: by
        metric name."""
        means = self.world.mean(torch.stack([loss.reshape(()) for loss in losses.values()])).tolist()
        values = {f"loss/{name}": mean for name, mean in zip(losses, means, strict=True)}
        values["optimizer/lr"] = self.engine.optimizer.param_groups[0]["lr"]
        values["optimizer/bad_steps"] = self.bad_steps.total
        values["optimizer/skipped_steps"] = self.engine.skipped_steps
        norm = self.engine.get_global_grad_norm()
        if norm is not None:  # DeepSpeed does not tell it at ZeRO 0 in fp32
            values["optimizer/gradient_norm"] = float(norm)
        values |= self.loader.measure()
        values["memory/peak_gib"] = peak_memory_gib(self.world.device)
        values |= self.clock.rates(self.config.train.batch_size)
        values |= self.stragglers.report(self.step, values)
        if self.model_flops is not None:
            tokens = self.engine.module.count_tokens(batch).sum().item() / len(batch.ids)
            flops = self.model_flops.of_sample(tokens)
            values |= utilisation(flops, values["rate/samples_per_s"], self.peak_tflops, self.world)
        return values

    def describe(self) -> str:
        known = self.loader.supply.epoch_samples
        samples = "a stream" if known is None else f"{known:,} samples"
        parameters = list(self.engine.module.parameters())
        count = sum(map(numel_of, parameters))
        state = count_state(parameters, self.config.engine, self.world.size, bool(self.config.ema)).total
        size = f"{count / 1e6:.1f} M parameters in {self.config.engine.precision}, {state / 1e9:.2f} GB of state a rank"
        return f"{self.config.run}: {size}, {samples}, step {self.step} of {self.steps}"


def count_model_flops(
    model: ImageTextModel, losses: LossesConfig, teacher: Callable[[Batch], TeacherOutput] | None, world: World
) -> Flops | None:
    """None, with a warning, where they cannot be counted."""
    try:
        return count_flops(model, losses, teacher)
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


def load_run_config(run: str | Path) -> RunConfig:
    """The resolved config of a run folder. Raises UserError if it is not one."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: holds no config.yaml, so it is not a run folder. Give the `run:` of a training run")
    return load_config(path, [], RunConfig)

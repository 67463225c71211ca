"""Spikes and what is not finite: judged robustly, skipped or rolled back, and the run is the one without those batches."""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from lives import LifeOfRun, arguments, at_end_of_step, events_of, keys_of, losses_of, stall, weights_of
from parity import allow_fp16
from ranks import run_on_ranks

from data_tools.errors import UserError
from pretrain.checkpoint import gather_weights
from pretrain.spikes import GiveUp, LeftOut, Spikes, SpikesConfig, robust_limit
from pretrain.world import World

WATCHED = ["spikes.warmup_steps=3", "spikes.threshold=100.0"]


class Inject:
    """Multiply the losses of these steps, counted from 1, on one rank: NaN, or far out of proportion."""

    def __init__(self, factor: float, steps: list[int]) -> None:
        self.factor, self.steps = factor, steps

    def __call__(self, run: Path) -> None:
        from pretrain import accumulate, train

        compute_gradients, compute_losses = train.compute_gradients, accumulate.compute_losses
        factor = 1.0

        def at_step(engine, batch, losses, step, *others):
            nonlocal factor
            factor = self.factor if step + 1 in self.steps and os.environ["RANK"] == "1" else 1.0
            return compute_gradients(engine, batch, losses, step, *others)

        def multiplied(*others):
            return {name: loss * factor for name, loss in compute_losses(*others).items()}

        train.compute_gradients, accumulate.compute_losses = at_step, multiplied


class InjectAndStop(Inject):
    """And ask for a stop after step 7."""

    def __call__(self, run: Path) -> None:
        super().__call__(run)
        at_end_of_step(7, lambda life: setattr(life.stop, "requested", True))


def live(shards: Path, run: Path, *overrides: str, hook=None) -> LifeOfRun:
    return LifeOfRun(run, arguments(shards, run, *overrides), 2, hook)


def run_without(shards: Path, run: Path, steps: list[int], *overrides: str) -> Path:
    """A clean run that leaves these batches out."""
    run.mkdir()
    (run / "left_out.json").write_text(
        json.dumps([{"steps": steps, "spike": steps[-1], "to": 0, "reason": "", "keys": []}])
    )
    life = live(shards, run, *WATCHED, *overrides)
    assert life.wait() == [0, 0], life.stderr()
    return run


def assert_same(run: Path, clean: Path, without: list[int]) -> None:
    found, wanted = ({s: v for s, v in losses_of(path).items() if s not in without} for path in (run, clean))
    assert found == wanted and len(found) == 8 - len(without)
    weights, expected = weights_of(run), weights_of(clean)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("factor", [pytest.param(float("nan"), marks=pytest.mark.faults), 1e4])
def test_a_skipped_step_is_one_that_never_was(factor: float, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tower = (
        "model.image={kind: resnet, image_size: 32, layers: [1, 1, 1, 1], width: 8, head_width: 32}"  # has statistics
    )
    life = live(shards, run, *WATCHED, tower, hook=Inject(factor, [5]))
    assert life.wait() == [0, 0], life.stderr()
    (event,) = events_of(run, "skip")
    assert event["step"] == 5 and event["reason"].startswith("loss")
    assert set(event["keys"]) <= set(keys_of(run)[5]) and event["keys"]
    assert_same(run, run_without(shards, tmp_path / "clean", [5], tower), [5])


def test_a_rollback_leaves_the_batches_out_for_good(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stage = "engine.zero_stage=3"  # where loading a checkpoint lets the gradients of the spike be, as at 0
    rollback = [*WATCHED, "spikes.action=rollback", "spikes.leave_out_steps=2", stage]
    life = live(shards, run, *rollback, hook=InjectAndStop(1e4, [6]))
    assert life.wait(grace_s=20) == [85, 85], life.stderr()
    (event,) = events_of(run, "rollback")
    assert (event["from"], event["to"], event["left_out"]) == (6, 3, [5, 6])
    assert event["keys"] == keys_of(run)[6]
    record = (run / "left_out.json").read_text()
    (run / "left_out.json").unlink()  # as where the run folder is lost and the checkpoint comes from its copy elsewhere
    life = live(shards, run, *rollback, hook=Inject(1e4, [6]))  # a later life leaves them out too
    assert life.wait() == [0, 0], life.stderr()
    assert_same(run, run_without(shards, tmp_path / "clean", [5, 6], stage), [5, 6])
    assert (run / "left_out.json").read_text() == record


class StopInRollback(Inject):
    """Rank 0 is asked to stop while the run goes back to step 3, after which rank 1 gets no data."""

    def __call__(self, run: Path) -> None:
        super().__call__(run)
        from pretrain import train

        restore = train.Trainer.restore

        def restore_and_ask(trainer, found):
            trainer.life.stop.requested = trainer.world.is_main
            stall(1, 0)
            restore(trainer, found)

        train.Trainer.restore = restore_and_ask


@pytest.mark.faults
def test_a_stop_right_after_a_rollback(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    rollback = [*WATCHED, "spikes.action=rollback"]
    life = live(shards, run, *rollback, hook=StopInRollback(1e4, [6]))  # a new run: it restores nothing at its start
    assert life.wait(grace_s=20) == [85, 85], life.stderr()
    assert [event["step"] for event in events_of(run, "save")] == [3]
    assert (events_of(run, "stop")[0]["step"], events_of(run, "stop")[0]["code"]) == (3, 85)
    life = live(shards, run, *rollback)
    assert life.wait() == [0, 0], life.stderr()
    assert_same(run, run_without(shards, tmp_path / "clean", [6]), [6])


def test_rollbacks_without_progress_give_up(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    rollback = [*WATCHED, "spikes.action=rollback", "spikes.max_rollbacks=2"]
    life = live(shards, run, *rollback, hook=Inject(1e4, [4, 5, 6]))
    assert life.wait(grace_s=20) == [87, 87], life.stderr()
    report = json.loads((run / "report.json").read_text())
    assert "2 rollbacks to the checkpoint of step 3" in report["reason"]
    assert [entry["steps"] for entry in report["left_out"]] == [[4], [5]]
    assert not (run / "done.json").exists()


def test_the_limit_is_robust() -> None:
    assert robust_limit([1.0] * 9 + [1e6], 10) == pytest.approx(1.01)
    assert robust_limit([1.0, 2.0, 3.0, 4.0, 5.0], 2) == pytest.approx(3 + 2 * 1.4826)


def test_verdicts_depend_on_what_was_known_only() -> None:
    spikes = Spikes(SpikesConfig(warmup_steps=4, window_steps=8))
    for step in range(1, 9):
        assert spikes.judge(step, {"loss": 2.0 + step % 3 / 10, "norm": 1.0}) == ""
    later = Spikes(spikes.config)
    later.restore(json.loads(json.dumps(spikes.state())))
    for judge in (spikes, later):
        assert "loss 40 is above" in judge.judge(9, {"loss": 40.0, "norm": 1.0})
        assert "norm 9 is above" in judge.judge(9, {"loss": 2.0, "norm": 9.0})
        assert judge.judge(9, {"loss": float("nan"), "norm": 1.0}) == ""  # never applied anyway, and never learnt from
        assert judge.judge(9, {"loss": 2.1, "norm": 1.0}) == ""
    assert spikes.state() == later.state()
    fresh = Spikes(spikes.config)
    assert fresh.judge(4, {"loss": 1.0, "norm": 1.0}) == "" == fresh.judge(5, {"loss": 1e9, "norm": 1.0})


def test_what_is_left_out_is_read_back(tmp_path: Path) -> None:
    left_out = LeftOut(tmp_path)
    entry = {"steps": [7], "spike": 7, "to": 3, "reason": "loss", "keys": ["a"]}
    left_out.add(entry, limit=1, write=True)
    again = LeftOut(tmp_path)
    assert again.steps == {7}
    with pytest.raises(GiveUp, match="1 rollbacks to the checkpoint of step 3"):
        again.add({**entry, "steps": [8]}, limit=1, write=True)
    no_entry = {key: value for key, value in entry.items() if key != "to"}
    for text in ("{", "{}", "5", json.dumps([no_entry]), json.dumps([{**entry, "steps": ["seven"]}])):
        (tmp_path / "left_out.json").write_text(text)
        with pytest.raises(UserError, match=r"not the record of steps .*[^\n]*\. Restore or remove it$"):
            LeftOut(tmp_path)


def drop_then_step(world: World) -> None:
    """In each rank: a dropped step changes nothing, and the norm is the one by which DeepSpeed clips."""
    from pretrain.engine import EngineConfig, apply_gradients, build_engine, drop_gradients, gradient_norm

    def build(config):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
        return build_engine(model, config, 8, world)

    def backward(engine, seed):
        rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed + world.rank))
        engine.backward(engine(rows.to(engine.module[0].weight.dtype)).square().sum())

    for stage, precision in itertools.product(range(4), ("fp32", "bf16")):
        config = EngineConfig(zero_stage=stage, precision=precision)
        dropping, plain = build(config), build(config)
        backward(dropping, 100)
        drop_gradients(dropping)
        for seed in (200, 300):
            for engine in (dropping, plain):
                backward(engine, seed)
                norm = gradient_norm(engine)
                assert apply_gradients(engine)
                if stage:  # DeepSpeed does not tell it otherwise
                    assert norm == pytest.approx(float(engine.get_global_grad_norm()), rel=1e-6)
        found, wanted = gather_weights(dropping), gather_weights(plain)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), config


def test_a_dropped_step_changes_nothing() -> None:
    run_on_ranks(drop_then_step, 2)


class Overflow(torch.autograd.Function):
    """The same value, with gradients that are not finite."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


def overflow_for_long(world: World) -> None:
    """At each stage: the loss scale falls to its least and stays there, with no exception, and no weight changes."""
    from pretrain.engine import (
        EngineConfig,
        apply_gradients,
        build_engine,
        can_lower_loss_scale,
        gradient_norm,
        loss_scale,
    )

    allow_fp16()
    for stage in range(4):
        model = torch.nn.Linear(8, 4)
        engine = build_engine(model, EngineConfig(zero_stage=stage, precision="fp16"), 8, world)
        before, could_fall = gather_weights(engine), []
        for _ in range(20):
            engine.backward(Overflow.apply(engine(torch.ones(8, 8, dtype=torch.float16)).float().sum()))
            could_fall.append(can_lower_loss_scale(engine))
            assert gradient_norm(engine) == float("inf")
            assert not apply_gradients(engine)
        falls = could_fall.count(True)
        assert 14 <= falls <= 15 and not any(could_fall[falls:])  # from 2^14 to 1, once with DeepSpeed's patience
        assert loss_scale(engine) == 1
        assert all(torch.equal(before[name], weight) for name, weight in gather_weights(engine).items())


def test_a_loss_scale_at_its_least_raises_nothing() -> None:
    run_on_ranks(overflow_for_long, 1)


def overflow_always(run: Path) -> None:
    from pretrain import accumulate

    allow_fp16()
    compute_losses = accumulate.compute_losses

    def overflowing(*others):
        losses = compute_losses(*others)
        return losses | {"total": Overflow.apply(losses["total"])}

    accumulate.compute_losses = overflowing


def test_gradients_that_never_become_finite_in_fp16_give_up(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = ["engine.precision=fp16", "train.max_bad_steps=3", "train.duration=40 steps"]
    life = LifeOfRun(run, arguments(shards, run, *overrides), 1, overflow_always)
    assert life.wait() == [87], life.stderr()
    report = json.loads((run / "report.json").read_text())
    assert "step 18: loss or gradients not finite, as in 3 steps in a row" in report["reason"]
    assert "the gradients are not" in report["reason"]

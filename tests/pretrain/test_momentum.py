"""Momentum towers against a plain twin of ALBEF; averages from the fp32 masters; a run resumed is the run that was not.

That ranks and micro-batches change nothing is in test_accumulation.py, and ZeRO 0 to 3 against the twin in test_parity.py.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import torch
from parity import TOKENIZER, Case, PlainEngine, make_batch
from paths import TINY
from ranks import run_on_ranks
from safetensors.torch import load_file
from test_losses import LargestTensor, assert_same, make_output

from pretrain import checkpoint
from pretrain.accumulate import compute_gradients
from pretrain.config import ConfigError, load_config
from pretrain.contract import Candidates, Identity, ModelOutput, MomentumOutput
from pretrain.engine import EngineConfig, apply_gradients, build_engine, master_parts
from pretrain.losses import ContrastiveConfig, LossesConfig, MomentumConfig, Ramp, compute_losses
from pretrain.model.model import build_model
from pretrain.momentum import Momentum
from pretrain.train import RunConfig, train
from pretrain.world import World

STEPS = 4
CONFIG = parity.model_config(
    Case("vit", "clip", "cross", parity.LOSSES)
)  # without dropout, so that evaluation and training see the same
DROPPING = parity.model_config(Case(fusion="text_to_image", losses=parity.LOSSES))


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"momentum.weights.{name}": value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("positives", ["own", "soft", "masked"])
def test_it_is_albef(positives: str) -> None:
    """float64, dropout on, and a queue that first fills up and then loses parts of batches; step 1 changes nothing."""
    settings = MomentumConfig(
        chunk=7, positives=positives, queue_samples=20, alpha=0.6, alpha_ramp=Ramp(steps=2), decay=0.7
    )
    model = build_model(DROPPING, TOKENIZER).double().train()
    engine, losses = PlainEngine(model), LossesConfig(contrastive=None, momentum=settings)
    momentum = Momentum(settings, DROPPING, TOKENIZER, engine, World(), weights_of(model))
    albef, optimizer = parity.Albef(model, settings), torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(STEPS):
        batch = make_batch(DROPPING, step, World())
        optimizer.zero_grad()
        expected = albef.loss(batch, model(batch, heads=False), step)
        expected.backward()
        wanted = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        optimizer.zero_grad()
        found, output = compute_gradients(engine, batch, losses, step, 4, World(), None, momentum)
        assert found["momentum"].item() == pytest.approx(expected.item(), rel=1e-12)
        for parameter, gradient in zip(model.parameters(), wanted, strict=True):
            if gradient is not None:
                np.testing.assert_allclose(parameter.grad, gradient, rtol=0, atol=1e-12)
        assert len(output.momentum.candidates.image_embed) == parity.GLOBAL_BATCH + min(20, len(albef.past))
        if step != 1:
            optimizer.step()
            albef.follow()
            momentum.follow(output.momentum, step)
    assert len(albef.past) == 48 and len(momentum.queue.image_embed) == 20


def test_without_queue_soft_targets_and_inertia_it_is_the_contrastive_loss() -> None:
    """The same loss; the gradient is that of rows against columns that get none."""
    settings = MomentumConfig(positives="masked", queue_samples=0, alpha=0.0, decay=0.0, chunk=5)
    losses = LossesConfig(contrastive=ContrastiveConfig(positives="masked"), momentum=settings)
    model = build_model(CONFIG, TOKENIZER).double().train()
    engine, optimizer = PlainEngine(model), torch.optim.SGD(model.parameters(), lr=0.5)
    momentum = Momentum(settings, CONFIG, TOKENIZER, engine, World(), {})
    found = []
    for step in range(3):
        optimizer.zero_grad()
        batch = make_batch(CONFIG, step, World())
        values, output = compute_gradients(engine, batch, losses, step, None, World(), None, momentum)
        found.append(values["contrastive"].item())
        assert values["momentum"].item() == pytest.approx(found[-1], rel=1e-12)
        optimizer.step()
        momentum.follow(output.momentum, step)
    assert max(found) - min(found) > 0.01


def make_compared(rows: int, past: int) -> ModelOutput:
    """`make_output`'s rows beside averages that are unlike them, and a queue with two of their pictures and a text."""
    output, everyone = make_output(rows), make_output(rows + past)
    image, text = everyone.text_embed.detach(), everyone.image_embed.detach()
    everyone.identity.image_id[rows : rows + 2] = everyone.identity.image_id[3:5]
    everyone.identity.text_id[rows + 4] = everyone.identity.text_id[5]
    candidates = Candidates(image, text, everyone.identity)
    output.momentum = MomentumOutput(image[:rows], text[:rows], candidates, 0.5)
    return output


@pytest.mark.parametrize("positives", ["own", "soft", "masked"])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_blocks_equal_the_whole_matrix(positives: str, chunk: int) -> None:
    output = make_compared(12, 9)
    settings = MomentumConfig(chunk=chunk, positives=positives, label_smoothing=0.2)
    loss = compute_losses(LossesConfig(contrastive=None, momentum=settings), output, World())["momentum"]
    assert_same(loss, parity.dense_momentum(output, World(), 0.2, positives), output)


def test_identities_of_other_widths_are_joined() -> None:
    narrow = Identity(torch.tensor([1]), torch.tensor([2]), torch.tensor([[2]]))
    wide = Identity(torch.tensor([3]), torch.tensor([4]), torch.tensor([[4, 5, 6]]))
    for one, other, expected in (
        (narrow, wide, [[2, 2, 2], [4, 5, 6]]),
        (wide, narrow, [[4, 5, 6], [2, 2, 2]]),
        (narrow.rows(0, 0), wide, [[4, 5, 6]]),
    ):
        assert one.append(other).true_text_id.tolist() == expected


def test_no_more_than_a_block_is_held() -> None:
    rows, past, chunk, captions = 64, 192, 32, 2
    output = make_compared(rows, past)
    settings = MomentumConfig(chunk=chunk, queue_samples=past)
    with LargestTensor() as largest:
        loss = compute_losses(LossesConfig(contrastive=None, momentum=settings), output, World())["total"]
        loss.backward()
    assert rows * chunk <= largest.elements <= rows * chunk * captions


BAD_STEP, SAVED_STEPS, LAST_STEP = 1, 2, 3
FOLLOWING = MomentumConfig(queue_samples=24, decay=0.75, chunk=8)


def begin(world: World, stage: int, precision: str, saved: Path | None) -> tuple[Any, Momentum]:
    model = build_model(CONFIG, TOKENIZER, 0, world).train()
    if saved:
        for parameter in model.parameters():
            parameter.data += 0.1  # so that what is not restored shows
    engine = build_engine(model, EngineConfig(zero_stage=stage, precision=precision), parity.GLOBAL_BATCH, world)
    layout = {"world_size": world.size, "engine": {"zero_stage": stage, "precision": precision}}
    extra = checkpoint.restore(engine, saved, layout, layout) if saved else {}
    return engine, Momentum(FOLLOWING, CONFIG, TOKENIZER, engine, world, extra)


def take_step(world: World, engine: Any, momentum: Momentum, step: int) -> float:
    """The total loss. One step is bad, and skipped."""
    tower, batch = engine.module.image_tower, make_batch(CONFIG, step, world)
    hook = tower.register_forward_hook(parity.spoil_first_row) if step == BAD_STEP else None
    values, output = compute_gradients(engine, batch, LossesConfig(momentum=FOLLOWING), step, 4, world, None, momentum)
    if hook:
        hook.remove()
    applied = apply_gradients(engine)
    assert applied == (step != BAD_STEP)
    if applied:
        momentum.follow(output.momentum, step)
    return world.mean(values["total"]).item()


def fp32_weights(engine: Any) -> dict[str, torch.Tensor]:
    weights = checkpoint.gather_weights(engine)
    if engine.zero_optimization_stage() == 0:  # where it does not find the fp32 copies of 16-bit weights
        weights |= {name: part.clone().view_as(weights[name]) for name, (_, part) in master_parts(engine).items()}
    return weights


def follow_and_resume(world: World, folder: str, runs: list[tuple[int, str]]) -> list[tuple]:
    """For each (ZeRO stage, precision): whether the averages are those of the fp32 weights, whether the towers have them,
    and whether a resumed run has the losses and the state of the one that was not stopped."""
    results = []
    for stage, precision in runs:
        engine, momentum = begin(world, stage, precision, None)
        averages = {name: value for name, value in fp32_weights(engine).items() if name in momentum.trained}
        losses = []
        for step in range(LAST_STEP + 1):
            losses.append(take_step(world, engine, momentum, step))
            if step != BAD_STEP:
                weights = fp32_weights(engine)
                averages = {name: average.lerp(weights[name], 0.25) for name, average in averages.items()}
            if step + 1 == SAVED_STEPS:
                state, run = momentum.state(), f"{folder}/{stage}{precision}"
                saved = []
                saver = checkpoint.Saver(engine, run, checkpoint.CheckpointConfig(), world, saved.append)
                saver.save(SAVED_STEPS, {"step": SAVED_STEPS}, state)
        state, towers = world.share(momentum.state()), momentum.towers.state_dict()
        engine.destroy()
        exact = all(torch.equal(state[f"momentum.weights.{name}"], value) for name, value in averages.items())
        cast = all(torch.equal(towers[name], value.to(towers[name].dtype)) for name, value in averages.items())
        engine, momentum = begin(world, stage, precision, saved[0].folder)
        again = [take_step(world, engine, momentum, step) for step in range(SAVED_STEPS, LAST_STEP + 1)]
        last = world.share(momentum.state())
        engine.destroy()
        same = state.keys() == last.keys() and all(torch.equal(state[name], last[name]) for name in state)
        results.append((exact, cast, losses[SAVED_STEPS:] == again, same, len(averages) > 20))
    return results


def run_and_resume(world: World, folder: str, shards: str) -> None:
    """A run, and a copy of it without its last checkpoint that goes on from the one before."""
    whole, again = Path(folder, "whole"), Path(folder, "again")
    momentum = "losses.momentum={queue_samples: 12, decay: 0.9, alpha_ramp: {steps: 3}}"
    for run in (whole, again):
        overrides = [f"run={run}", f"data.path={shards}", "train.duration=5 steps", momentum]
        world.barrier()  # until the run has ended on every rank, its folder is written to
        if run == again and world.is_main:
            shutil.copytree(whole, again)
            shutil.rmtree(again / "checkpoints" / "step_00000005")
        world.barrier()
        assert train(load_config(TINY, overrides, RunConfig), world) == 0


def on_ranks(world: World, folder: str, shards: str, runs: list[tuple[int, str]]) -> list[tuple]:
    results = follow_and_resume(world, folder, runs)
    run_and_resume(world, folder, shards)
    return results


RUNS = [(stage, "bf16") for stage in (0, 1, 3)]


@pytest.fixture(scope="module")
def on_two_ranks(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    folder = tmp_path_factory.mktemp("momentum")
    return folder, run_on_ranks(on_ranks, 2, str(folder), str(shards / "train"), RUNS)


@pytest.mark.parametrize("run", range(len(RUNS)), ids=[f"zero-{stage}-{precision}" for stage, precision in RUNS])
def test_averages_follow_the_fp32_weights_and_survive_a_checkpoint(on_two_ranks: tuple[Path, list], run: int) -> None:
    """Of 16-bit weights, a skipped step between; ZeRO 2 keeps them as ZeRO 1 does."""
    for found in on_two_ranks[1]:
        assert found[run] == (True,) * 5


def test_a_resumed_run_is_the_run_that_was_not(on_two_ranks: tuple[Path, list]) -> None:
    """Of the command's own loop, at ZeRO 2."""
    runs = [on_two_ranks[0] / name for name in ("whole", "again")]
    losses, states = [], []
    for run in runs:
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses.append([(line["step"], line["loss/momentum"]) for line in lines])
        states.append(load_file(run / "checkpoints" / "step_00000005" / checkpoint.EXTRA))
    assert losses[0] == losses[1] and len(losses[0]) == 5
    assert states[0].keys() == states[1].keys() and len(states[0]["momentum.queue.image_id"]) == 12
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("losses.momentum.alpha=1.5", "losses.momentum.alpha"),
        ("losses.momentum.decay=-0.1", "losses.momentum.decay"),
        ("losses.momentum.queue_samples=-1", "losses.momentum.queue_samples"),
        ("losses.momentum.queue_size=1", "losses.momentum.queue_size: unknown key. Did you mean 'queue_samples'"),
        ("losses.momentum.alpha_ramp={start: 2, steps: 3}", "alpha_ramp.start is a share: give 0 to 1; found 2.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(override: str, part: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(TINY, [override], RunConfig)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_frozen_towers() -> None:
    """One that is frozen is the same in the averages; both leave nothing to average."""
    settings, batch = MomentumConfig(decay=0.5), make_batch(CONFIG, 0, World())
    model = build_model(CONFIG.model_copy(update={"freeze": ["image_tower"]}), TOKENIZER)
    momentum = Momentum(settings, CONFIG, TOKENIZER, PlainEngine(model), World(), {})
    before = momentum.compare(batch, 16, 0)
    with torch.no_grad():
        model.text_tower.inner.text_projection += 0.1
    momentum.follow(before, 0)
    after = momentum.compare(batch, 16, 0)
    assert torch.equal(before.image_embed, after.image_embed) and not torch.equal(before.text_embed, after.text_embed)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="both towers are frozen"):
        Momentum(settings, CONFIG, TOKENIZER, PlainEngine(model), World(), {})


def test_statistics_of_batch_normalisation_are_the_models() -> None:
    config, losses = (
        parity.model_config(Case("resnet", "clip", "cross", parity.LOSSES)),
        LossesConfig(momentum=MomentumConfig()),
    )
    model = build_model(config, TOKENIZER).train()
    momentum = Momentum(losses.momentum, config, TOKENIZER, PlainEngine(model), World(), weights_of(model))
    batch = make_batch(config, 0, World())
    _, output = compute_gradients(PlainEngine(model), batch, losses, 0, None, World(), None, momentum)
    buffers = {name: value for name, value in model.named_buffers() if "running" in name}
    averaged = dict(momentum.towers.named_buffers())
    assert buffers and not any(torch.equal(averaged[name], value) for name, value in buffers.items())
    momentum.follow(output.momentum, 0)
    assert all(torch.equal(averaged[name], value) for name, value in buffers.items())

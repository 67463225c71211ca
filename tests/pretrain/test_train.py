"""Real runs of the command: resume bit for bit, signals, crashes, and the user's mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from paths import ROOT, TINY
from processes import list_children
from ranks import Command
from safetensors.torch import load_file

from data_tools.errors import UserError
from pretrain import checkpoint
from pretrain.__main__ import main
from pretrain.config import ConfigError, load_config
from pretrain.data.loader import Loader
from pretrain.train import RunConfig, check_micro_batches, find_checkpoint, settle
from pretrain.world import World

STEPS = 8


def arguments(shards: Path, run: Path, *overrides: str, config: Path = TINY) -> list[str]:
    return [
        "train",
        str(config),
        f"run={run}",
        f"data.path={shards / 'train'}",
        f"train.duration={STEPS} steps",
        *overrides,
    ]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple]:
    return [(line["step"], line["loss/total"], line["loss/matching"]) for line in metrics(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").glob("step_*"))[-1] / "weights.safetensors")


def assert_same_run(run: Path, expected: Path) -> None:
    assert losses(run) == losses(expected)
    found, wanted = weights(run), weights(expected)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def wait_for_step(run: Path, step: int) -> None:
    deadline_s = time.monotonic() + 200
    while time.monotonic() < deadline_s:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"{run}: step {step} was not reached")


@pytest.fixture(scope="module")
def whole_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 ranks that nothing interrupted."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    command = Command(arguments(shards, run), 2, run)
    assert command.wait() == [0, 0], command.printed("stderr")
    return run


def test_a_run_explains_itself(whole_run: Path) -> None:
    lines = metrics(whole_run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    wanted = {"loss/total", "loss/contrastive", "loss/matching", "rate/samples_per_s", "optimizer/lr", "time/data_s"}
    assert wanted <= lines[0].keys()
    printed = "".join(path.read_text() for path in whole_run.parent.glob("whole.std*-0"))
    assert "1.7 M parameters in fp32, 0.03 GB of state a rank" in printed
    assert "--ranks" not in (whole_run / "config.yaml").read_text()
    assert "torch" in json.loads((whole_run / "versions.json").read_text())
    (code,) = whole_run.glob("code-*.zip")
    assert code.name in (whole_run / "commands.txt").read_text()
    places = "import data_tools.files, pretrain.config; print(data_tools.files.__file__, pretrain.config.__file__)"
    command = [sys.executable, "-c", places]
    environment = {**os.environ, "PYTHONPATH": str(code)}
    found = subprocess.run(command, cwd=whole_run, env=environment, capture_output=True, text=True)
    assert found.stdout.count(str(code)) == 2, found.stderr
    assert list((whole_run / "tensorboard").glob("events*"))
    names = [path.name for path in sorted((whole_run / "checkpoints").iterdir())]
    assert names == ["step_00000006", "step_00000008"]  # each third step and the last; the two newest are kept


@pytest.mark.faults  # as commands; test_resume.py has it with forked ranks
def test_a_stopped_run_resumes_bit_for_bit(
    shards: Path, tmp_path: Path, whole_run: Path, start_pretrain, run_pretrain
) -> None:
    run = tmp_path / "stopped"
    process = start_pretrain(*arguments(shards, run), "--ranks", "2")
    wait_for_step(run, 2)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 85 and "Run the same command again" in stderr
    assert "Traceback" not in stderr
    assert 2 <= len(metrics(run)) < STEPS
    code, _, stderr = run_pretrain(*arguments(shards, run), "--ranks", "2")
    assert code == 0, stderr
    assert_same_run(run, whole_run)


@pytest.mark.faults  # as commands; test_resume.py has it with forked ranks
def test_a_killed_run_resumes_bit_for_bit(
    shards: Path, tmp_path: Path, whole_run: Path, start_pretrain, run_pretrain
) -> None:
    run = tmp_path / "killed"
    process = start_pretrain(*arguments(shards, run), "--ranks", "2")
    wait_for_step(run, 5)  # the checkpoint of step 3 is there
    ranks = list_children(process.pid)
    os.kill(ranks[1], signal.SIGKILL)
    process.communicate(timeout=200)
    assert process.returncode not in (0, 85)
    (run / "checkpoints" / "tmp_step_00000006").mkdir(exist_ok=True)  # as a kill in mid-save would leave it
    code, _, stderr = run_pretrain(*arguments(shards, run), "--ranks", "2")
    assert code == 0, stderr
    assert_same_run(run, whole_run)
    code, _, stderr = run_pretrain(*arguments(shards, run), "--ranks", "2")  # finished already: nothing changes
    assert code == 0, stderr
    assert_same_run(run, whole_run)


@pytest.mark.faults  # as commands; test_resume.py has it with forked ranks
def test_a_damaged_checkpoint_is_passed_over(shards: Path, tmp_path: Path, whole_run: Path, run_pretrain) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(whole_run, run)
    newest = run / "checkpoints" / "step_00000008" / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    code, _, stderr = run_pretrain(*arguments(shards, run), "--ranks", "2")
    assert code == 0 and "not a whole checkpoint" in stderr and "trying the one before" in stderr
    assert_same_run(run, whole_run)


def test_a_checkpoint_of_another_model_is_refused_in_one_line(shards: Path, whole_run: Path, fork_pretrain) -> None:
    before = sorted((whole_run / "checkpoints").rglob("*"))
    code, _, stderr = fork_pretrain(*arguments(shards, whole_run, "model.image.layers=3"), ranks=2)
    assert code == 2 and "model.image.layers 2, now it is 3" in stderr and "new run folder" in stderr
    assert "Traceback" not in stderr and stderr.count("error:") == 1
    assert sorted((whole_run / "checkpoints").rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine.precision=bf16"], "engine.precision fp32, now it is bf16"),
        (["model.text.width=64"], "model.text.width 32, now it is 64"),
    ],
)
def test_what_must_not_change_is_named(overrides: list[str], message: str, whole_run: Path) -> None:
    config = load_config(whole_run / "config.yaml", overrides, RunConfig)
    with pytest.raises(UserError, match=message):
        find_checkpoint(config, World())


def test_a_checkpoint_from_before_a_key_was_there_has_its_default(whole_run: Path, monkeypatch) -> None:
    find = checkpoint.find_newest

    def find_older(*others):
        found = find(*others)
        del found.state["model"]["image"]["pixel_mean"]
        return found

    monkeypatch.setattr(checkpoint, "find_newest", find_older)
    assert find_checkpoint(load_config(whole_run / "config.yaml", [], RunConfig), World()) is not None
    config = load_config(whole_run / "config.yaml", ["model.image.pixel_mean=[0.5, 0.5, 0.5]"], RunConfig)
    with pytest.raises(UserError, match=r"pixel_mean \[0.48145466, .*\], now it is \[0.5, 0.5, 0.5\]"):
        find_checkpoint(config, World())


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_what_the_device_has_and_what_the_run_has_begun_with(
    has_bf16: bool, precision: str, whole_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.engine.multiplies_in_bf16", lambda device: has_bf16)
    config = load_config(whole_run / "config.yaml", ["engine.precision=auto"], RunConfig)
    assert settle(config, None, World()).engine.precision == precision
    found = find_checkpoint(config, World())
    assert settle(config, found, World()).engine.precision == "fp32"


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["train.batch_size=64"], "more than the 48 samples"),
        (["data.path=no/such/folder"], "no/such/folder"),
        (["engine.precision=fp16"], "fp16 is not supported"),
        (["model.tokenizer={kind: huggingface, name: no/such-tokenizer-folder}"], "cannot load"),
    ],
)
def test_mistakes_end_in_one_line(
    overrides: list[str], part: str, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    code = main(arguments(shards, tmp_path / "run", *overrides))
    stderr = capfd.readouterr().err
    assert code == 2 and part in stderr
    assert "Traceback" not in stderr and stderr.count("error:") == 1


def test_resume_never_leaves_an_old_run_alone(shards: Path, whole_run: Path, capfd: pytest.CaptureFixture) -> None:
    assert main(arguments(shards, whole_run, "train.resume=never")) == 2
    assert "already holds step_00000008" in capfd.readouterr().err


def test_check_prints_the_resolved_config(capfd: pytest.CaptureFixture) -> None:
    assert main(["train", str(TINY), "--check", "engine.lr=5e-4"]) == 0
    stdout = capfd.readouterr().out
    assert "lr: 0.0005" in stdout and "weight_decay: 0.2" in stdout
    assert main(["train", str(TINY), "--check", "engine.lrr=5e-4"]) == 2
    assert "Did you mean 'lr'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["losses.sigmoid={}"], "set model.init_logit_bias"),
        (["model.init_logit_bias=-10.0"], "init_logit_bias would not be trained"),
        (
            ["model.compile=true", "engine.zero_stage=3"],
            r"\.yaml: model.compile does not go with engine.zero_stage=3.*set engine.zero_stage=2",
        ),
        (["losses.matching.ramp={start: 1.0}"], "losses.matching.ramp.steps: is missing"),
        (["losses.distill={teacher: t, logits: 0, cosine: 0}"], "losses.distill: logits and cosine are both 0"),
        (
            ["losses.contrastive.weight=0", "losses.matching=null", "model.fusion=null"],
            "contrastive is 0 in every step",
        ),
        (["losses.matching.weight=0"], "losses.matching.weight is 0 in every step, so its head"),
    ],
)
def test_losses_that_do_not_fit_the_model_are_refused(overrides: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        load_config(TINY, overrides, RunConfig)


def test_a_loss_that_counts_in_some_step_or_is_only_measured_is_no_mistake() -> None:
    alone = ["losses.matching=null", "model.fusion=null", "losses.contrastive.weight=0"]
    load_config(TINY, [*alone, "losses.contrastive.ramp={start: 1.0, steps: 4}"], RunConfig)
    load_config(TINY, [*alone, "losses.momentum={}"], RunConfig)


def test_micro_batches_must_be_equal_and_meet_no_batch_normalisation() -> None:
    plain, normalised = torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.BatchNorm2d(2))
    for size in (None, 12, 6, 100):
        check_micro_batches(plain, size, 12)
    with pytest.raises(ConfigError, match="5 does not divide the 12"):
        check_micro_batches(plain, 5, 12)
    check_micro_batches(normalised, 12, 12)
    with pytest.raises(ConfigError, match="batch normalisation"):
        check_micro_batches(normalised, 6, 12)
    check_micro_batches(normalised.eval(), 6, 12)  # as a frozen one is


SMALL = [
    "model.image.width=64",
    "model.image.layers=1",
    "model.text.width=64",
    "model.text.layers=1",
    "model.text.heads=2",
    "model.fusion.width=64",
    "model.fusion.layers=1",
    "model.fusion.heads=2",
    "model.embed_dim=32",
    "train.batch_size=4",
    "train.duration=2 steps",
    "train.log_every_steps=1",
    "engine.warmup_steps=1",
]


@pytest.mark.parametrize(("name", "size"), [("vit_b16", 64), ("vit_l14", 56)])
def test_large_configs_run_with_small_towers(name: str, size: int, shards: Path, tmp_path: Path, fork_pretrain) -> None:
    overrides = [*SMALL, f"model.image.image_size={size}"]
    config = ROOT / "configs" / f"{name}.yaml"
    code, _, stderr = fork_pretrain(*arguments(shards, tmp_path / "run", *overrides, config=config), ranks=2)
    assert code == 0, stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]


def test_it_runs_under_torchrun(shards: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pretrain"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command += arguments(shards, tmp_path / "run", "train.duration=2 steps", "train.micro_batch_size=2")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "run")) == 2
    assert "pretrain" in (tmp_path / "run" / "commands.txt").read_text()


def test_a_step_that_fails_leaves_nothing_under_way(shards: Path, tmp_path: Path, monkeypatch) -> None:
    closed = []

    class Batches:
        def agree(self, ask):
            raise RuntimeError("a mistake")

        def __next__(self):
            raise StopIteration

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(Loader, "__iter__", lambda self: Batches())
    monkeypatch.setattr(signal, "signal", lambda *others: None)  # this process's own stay as they are
    with pytest.raises(RuntimeError, match="a mistake"):
        main(arguments(shards, tmp_path / "run"))
    assert closed

"""Real processes, killed, and resumed: whole checkpoints or none, bit for bit, and on other numbers of ranks."""

import contextlib
import ctypes
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from lives import (
    LifeOfRun,
    arguments,
    assert_same_run,
    at_end_of_step,
    copy_run,
    events_of,
    keys_of,
    losses_of,
    stall,
    weights_of,
)
from paths import TINY
from ranks import run_on_ranks
from safetensors.torch import load_file

from data_tools.errors import UserError
from pretrain import checkpoint
from pretrain.__main__ import main
from pretrain.checkpoint import Saved
from pretrain.checkpoint import mirror as mirror_module
from pretrain.checkpoint.mirror import Mirror
from pretrain.events import LOCK, RunLock
from pretrain.life import Life
from pretrain.restore import load_run
from pretrain.train import TrainConfig, fit_micro_batch
from pretrain.watch import WatchConfig
from pretrain.world import World

STEPS = 8
RANKS = 2


def live(shards: Path, run: Path, *overrides: str, ranks: int = RANKS, hook=None) -> LifeOfRun:
    return LifeOfRun(run, arguments(shards, run, *overrides), ranks, hook)


@pytest.fixture(scope="module")
def whole_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    life = live(shards, run)
    assert life.wait() == [0, 0], life.stderr()
    return run


def wait_for(condition, life: LifeOfRun) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s and life.processes[0].is_alive(), life.stderr()
        time.sleep(0.005)


def test_the_run_folder_tells_its_life(whole_run: Path) -> None:
    start, *saves, done = (events_of(whole_run, name) for name in ("start", "save", "done"))
    assert (start[0]["step"], start[0]["steps"], start[0]["world_size"], start[0]["restart"]) == (0, STEPS, RANKS, 0)
    assert [save["step"] for save in saves[0]] == [3, 6, 8] and all(save["stall_s"] > 0 for save in saves[0])
    assert json.loads((whole_run / "done.json").read_text())["step"] == STEPS == done[0]["step"]
    progress = json.loads((whole_run / "progress" / "rank-00001.json").read_text())
    pace = {"data_s", "compute_s", "wait_s"}
    assert progress.keys() == {"time", "rank", "host", "pid", "step", "phase", "since"} | pace
    ledger = json.loads((whole_run / "ledger.json").read_text())
    parts = sum(ledger[name] for name in ("productive", "checkpoint", "lost", "restart"))
    assert parts == pytest.approx(ledger["total"]) and ledger["lost"] == 0


def kill_while_saving(run: Path) -> None:
    """Die by SIGKILL in the second file that rank 1 seals."""
    if os.environ["RANK"] == "1":
        checkpoint.seal = lambda path: os.kill(os.getpid(), signal.SIGKILL)


def kill_before_the_name(run: Path) -> None:
    """Die by SIGKILL when all is written, right before the folder gets its name."""
    checkpoint.finish = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)


def kill_while_pruning(run: Path) -> None:
    """Die by SIGKILL when the new checkpoint is there and the oldest is to go."""
    checkpoint.prune = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)


def resume_after_kills(shards: Path, folder: Path, whole_run: Path, kills: int, seed: int) -> None:
    """Kill a random rank at a random instant, every other time within a save; a run that gets to its end nevertheless is
    compared with the one that nothing interrupted, and the next kills are of a new run."""
    draw = random.Random(seed)
    hooks = [kill_while_saving, None, kill_before_the_name, None, kill_while_pruning, None]
    runs, killed = [folder / "run-0"], 0
    while killed < kills:
        run, hook = runs[-1], hooks[killed % len(hooks)]
        lives_before = len(events_of(run, "start"))
        life = live(shards, run, hook=hook)
        if hook is None:
            wait_for(lambda run=run, before=lives_before: len(events_of(run, "start")) > before, life)
            time.sleep(draw.uniform(0, 1))
            if life.processes[0].is_alive():
                life.kill(draw.randrange(RANKS))
        codes = life.wait()
        assert set(codes) <= {0, 86, -signal.SIGKILL}, life.stderr()
        killed += codes != [0, 0]
        for checkpoint_folder in checkpoint.folders(run):  # whole or absent
            assert checkpoint.verify(checkpoint_folder, World())[0] is not None
        if (run / "done.json").exists():
            runs.append(folder / f"run-{len(runs)}")
    if not (runs[-1] / "done.json").exists():
        life = live(shards, runs[-1])
        assert life.wait() == [0, 0], life.stderr()
    for run in runs:
        assert_same_run(run, whole_run)
        assert not events_of(run, "fallback")


def test_a_run_killed_at_random_instants_resumes_bit_for_bit(shards: Path, tmp_path: Path, whole_run: Path) -> None:
    resume_after_kills(shards, tmp_path, whole_run, kills=3, seed=1)


@pytest.mark.faults
def test_a_run_killed_at_twenty_instants_resumes_bit_for_bit(shards: Path, tmp_path: Path, whole_run: Path) -> None:
    resume_after_kills(shards, tmp_path, whole_run, kills=20, seed=2)


def test_files_ask_for_a_save_and_for_a_stop(shards: Path, tmp_path: Path, whole_run: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "SAVE").touch()
    life = live(shards, run, "checkpoint.every_steps=100")
    wait_for(lambda: events_of(run, "save"), life)
    assert not (run / "SAVE").exists()
    (run / "STOP").touch()
    assert set(life.wait(grace_s=20)) <= {85, 0}, life.stderr()
    assert not (run / "STOP").exists()
    life = live(shards, run)
    assert life.wait() == [0, 0], life.stderr()
    assert keys_of(run) == keys_of(whole_run) and losses_of(run) == losses_of(whole_run)


def test_a_save_under_way_answers_what_asked_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that once, also where it takes many steps to reach the run folder; it does not answer what asks later."""
    monkeypatch.setattr(signal, "signal", lambda *others: None)  # those of the tests stay

    class Ready:
        agree = staticmethod(lambda ask: ask())

    life, saved = Life(tmp_path, WatchConfig(), None, World(), RunLock(tmp_path / LOCK, "")), Saved(tmp_path, 3, 0, 0.0)
    try:
        (tmp_path / "SAVE").touch()
        assert life.wait_for(Ready, is_saved=False) == (False, True)
        life.begin_save()
        assert life.wait_for(Ready, is_saved=False) == (False, False)
        life.saved(saved)
        assert not (tmp_path / "SAVE").exists()
        life.begin_save()
        (tmp_path / "SAVE").touch()
        life.saved(saved)
        assert life.wait_for(Ready, is_saved=False) == (False, True)
    finally:
        life.close()


def stall_rank_1(run: Path) -> None:
    stall(1, 4 * 8)


@pytest.mark.parametrize(
    "how",
    [
        "signal to the rank that has data",
        pytest.param("signal to the rank that waits", marks=pytest.mark.faults),
        pytest.param("file", marks=pytest.mark.faults),
    ],
)
def test_a_stop_ends_the_wait_for_data(how: str, shards: Path, tmp_path: Path, whole_run: Path) -> None:
    run = tmp_path / "run"
    life = live(shards, run, hook=stall_rank_1)
    wait_for(lambda: 4 in (losses_of(run) if (run / "metrics.jsonl").exists() else ()), life)
    time.sleep(0.3)  # it waits by now
    started_s = time.monotonic()
    if how == "file":
        (run / "STOP").touch()
    else:
        os.kill(life.processes["waits" in how].pid, signal.SIGTERM)
    assert life.wait(grace_s=20) == [85, 85], life.stderr()
    assert time.monotonic() - started_s < 10
    assert [event["step"] for event in events_of(run, "save")] == [3, 4]
    life = live(shards, run)
    assert life.wait() == [0, 0], life.stderr()
    assert_same_run(run, whole_run)


def fail_on_rank_1(run: Path) -> None:
    from pretrain.data.supply import IndexedSupply

    read = IndexedSupply.read

    def read_or_fail(supply, draw, row: int, attempt: int):
        if draw.positions[row] >= 4 * 8 and os.environ["RANK"] == "1":
            raise UserError("the store is gone")
        return read(supply, draw, row, attempt)

    IndexedSupply.read = read_or_fail


def test_data_that_one_rank_cannot_get_ends_the_run_on_all(shards: Path, tmp_path: Path) -> None:
    life = live(shards, tmp_path / "run", hook=fail_on_rank_1)
    assert life.wait(grace_s=30) == [2, 2], life.stderr()
    assert re.search(r"error: rank 1 on \S+ has no data to go on: the store is gone", life.stderr())


@pytest.mark.parametrize("name", ["state.json", "weights.safetensors", "zero_pp_rank_1", "mp_rank_00_model"])
def test_a_damaged_file_is_found_and_the_checkpoint_before_taken(name: str, tmp_path: Path, whole_run: Path) -> None:
    run = copy_run(whole_run, tmp_path / "run")
    newest = run / "checkpoints" / "step_00000008"
    (path,) = [path for path in newest.rglob("*") if path.name.startswith(name)]
    content = bytearray(path.read_bytes())
    if path.suffix == ".json":
        place = content.index(b'"position": ') + len(b'"position": ')  # another digit, and all is JSON as before
        content[place] = ord("1") + (content[place] == ord("1"))
    else:
        content[len(content) // 2] ^= 64  # one bit, of the same size
    path.write_bytes(content)
    found = checkpoint.find_newest(run, World())
    assert found.folder.name == "step_00000006"
    assert [folder.name for folder, _ in found.passed_over] == ["step_00000008"]
    assert "step_00000008: not a whole checkpoint" in found.passed_over[0][1]


@pytest.mark.parametrize("name", ["state.json", "weights.safetensors"])
def test_what_is_out_of_reach_is_not_taken_for_damaged(
    name: str, tmp_path: Path, whole_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a mount has gone stale on one node: to go back to an older checkpoint would be to lose steps."""
    run = copy_run(whole_run, tmp_path / "run")

    def refuse(function):
        def refusing(path: Path, *others: object, **named: object) -> object:
            if str(path).endswith(f"step_00000008/{name}"):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return function(path, *others, **named)

        return refusing

    monkeypatch.setattr(Path, "read_text", refuse(Path.read_text))
    monkeypatch.setattr(checkpoint, "hash_file", refuse(checkpoint.hash_file))
    with pytest.raises(UserError, match=f"step_00000008/{name}: cannot be read on .*Stale file handle"):
        checkpoint.find_newest(run, World())
    assert len(checkpoint.folders(run)) == 2


def test_a_run_falls_back_on_record(shards: Path, tmp_path: Path, whole_run: Path) -> None:
    run = copy_run(whole_run, tmp_path / "run")
    path = run / "checkpoints" / "step_00000008" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    life = live(shards, run)
    assert life.wait() == [0, 0], life.stderr()
    (event,) = events_of(run, "fallback")
    assert (event["from"], event["to"]) == ("step_00000008", "step_00000006") and "other bytes" in event["reason"]
    assert (run / "checkpoints" / "damaged_step_00000008").is_dir()
    assert_same_run(run, whole_run)


def test_a_second_run_in_the_folder_is_refused(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = live(shards, run, ranks=1)
    wait_for(lambda: (run / "run.lock").exists() and (run / "progress").exists(), first)
    second = live(shards, run, ranks=1)
    assert second.wait() == [2] and "another run works in this folder" in second.stderr()
    first.signal(signal.SIGKILL)
    first.wait()


class FreezeAfter:
    """Every rank stands still, as on nodes that have hung, once so many steps are done."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, run: Path) -> None:
        at_end_of_step(self.steps, lambda life: os.kill(os.getpid(), signal.SIGSTOP))


def test_a_life_given_up_that_wakes_leaves_the_run_to_the_next(shards: Path, tmp_path: Path, whole_run: Path) -> None:
    run = tmp_path / "run"
    first = live(shards, run, hook=FreezeAfter(5))
    wait_for(lambda: all(is_stopped(process.pid) for process in first.processes), first)
    (run / "run.lock").unlink()  # as a launcher does that has given it up
    second = live(shards, run)
    assert second.wait() == [0, 0], second.stderr()
    left = {path: path.stat().st_mtime_ns for path in written(run)}
    first.signal(signal.SIGCONT)
    codes = first.wait(grace_s=10)
    assert codes[0] == 86 and 0 not in codes and 85 not in codes  # rank 1 may find its peer gone first
    assert {path: path.stat().st_mtime_ns for path in written(run)} == left
    assert_same_run(run, whole_run)


def written(run: Path) -> list[Path]:
    """The files of a run, but for TensorBoard's: each life has one of its own, and may write out what it still holds."""
    return [path for path in run.rglob("*") if path.is_file() and path.parent.name != "tensorboard"]


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_checkpoints_are_kept_by_number_and_for_good(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    for other in ("step_00000050_mine", "step_old", "step_00000050.bak"):  # of somebody's
        (tmp_path / "checkpoints" / other).mkdir()
    (tmp_path / "checkpoints" / "step_100000000").mkdir()
    checkpoint.prune(tmp_path, checkpoint.keep_last(2, every_steps=20))
    assert [checkpoint.step_of(folder) for folder in checkpoint.folders(tmp_path)] == [20, 40, 50, 100000000]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 7


def test_what_cannot_be_removed_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """As on NFS, where files that somebody still reads keep their folder from going."""
    for step in (10, 20):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    monkeypatch.setattr(os, "rmdir", lambda *others, **named: os.stat("/nowhere/at/all"))
    checkpoint.prune(tmp_path, checkpoint.keep_last(1))
    assert [checkpoint.step_of(folder) for folder in checkpoint.folders(tmp_path)] == [20]
    assert "cannot be removed yet" in caplog.text


def test_a_thread_that_fails_leaves_no_checkpoint_without_its_files(tmp_path: Path, monkeypatch) -> None:
    def seal(path: Path) -> None:
        raise ValueError("of whatever kind")

    monkeypatch.setattr(checkpoint, "seal", seal)
    pending = checkpoint.Pending(3, {}, tmp_path, ["file"], None)
    pending.thread.start()
    pending.thread.join()
    assert "of whatever kind" in str(pending.problem)


def test_micro_batches_stay_fitted_in_later_lives() -> None:
    """Also in those on as many ranks as saved: the size that fits is in no config."""
    config = TrainConfig(batch_size=24, micro_batch_size=3, duration="8 steps")
    found = checkpoint.Found(Path(), {"world_size": 3}, [])
    assert [fit_micro_batch(config, found, World(0, size)) for size in (3, 4, 1)] == [2, 3, 3]
    assert fit_micro_batch(config, None, World(0, 3)) == 3  # of a new run: refused


def test_ranks_and_zero_stages_may_change(shards: Path, tmp_path: Path) -> None:
    """4 -> 2 -> 3 ranks, ZeRO 2 -> 3 -> 1 -> 0: the batches of the run that was not stopped, and its losses."""
    size = ["train.batch_size=12", "train.duration=8 steps", "checkpoint.every_steps=2", "checkpoint.keep=9"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    life = live(shards, whole, *size, ranks=1)
    assert life.wait() == [0], life.stderr()
    for steps, ranks, stage in [(2, 4, 2), (4, 2, 3), (6, 3, 1), (8, 1, 0)]:
        life = live(shards, run, *size, f"engine.zero_stage={stage}", ranks=ranks, hook=StopAfter(steps))
        assert life.wait(grace_s=20) == [85 if steps < 8 else 0] * ranks, life.stderr()
    assert [event["world_size"] for event in events_of(run, "start")] == [4, 2, 3, 1]
    found, wanted = losses_of(run), losses_of(whole)
    assert keys_of(run) == keys_of(whole) and found.keys() == wanted.keys()
    assert max(abs(found[step] - wanted[step]) for step in wanted) < 2e-5
    weights, expected = weights_of(run), weights_of(whole)
    assert max(float((weights[name] - expected[name]).abs().max()) for name in expected) < 1e-4


class StopAfter:
    """Ask for a stop at a step, as a signal would."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, run: Path) -> None:
        at_end_of_step(self.steps, lambda life: setattr(life.stop, "requested", True))


def resave(world: World, shards: Path, out: Path, source: Path | None, stage: int, precision: str) -> None:
    """In each rank: an engine of this layout, restored from `source` or after two updates of its own, saved to `out`."""
    from pretrain.config import load_config
    from pretrain.engine import build_engine
    from pretrain.model.model import build_model
    from pretrain.train import RunConfig, build_tokenizer, run_identity

    overrides = [f"engine.zero_stage={stage}", f"engine.precision={precision}", "train.batch_size=12"]
    config = load_config(TINY, [f"run={out}", f"data.path={shards / 'train'}", *overrides], RunConfig)
    tokenizer = build_tokenizer(config.model.tokenizer, config.model.text.context_length)
    engine = build_engine(build_model(config.model, tokenizer, 0, world), config.engine, 12, world)
    identity = run_identity(config, world)
    if source:
        found = checkpoint.find_newest(source, world)
        checkpoint.restore(engine, found.folder, found.state, identity)
    else:
        for _ in range(2):
            engine.backward(
                sum(((p.float() - 0.5) ** 2).sum() * 1e-3 * (1 + n) for n, p in enumerate(engine.module.parameters()))
            )
            engine.step()
    saver = checkpoint.Saver(engine, out, checkpoint.CheckpointConfig(), world)
    saver.save(2, {"step": 2, "config": {}, "versions": {}, **identity})


def moments_of(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    out = run.parent / f"{run.name}-whole"
    assert main(["checkpoint", "consolidate", str(run), "--out", str(out)]) == 0
    updates = json.loads((out / "state.json").read_text())["updates"]
    return load_file(out / "weights.safetensors"), load_file(out / "moments.safetensors"), updates


@pytest.mark.parametrize(
    ("precision", "layouts"),
    [
        ("fp32", [(4, 2), (2, 3), (3, 1), (1, 0), (2, 2), (1, 3), (2, 0)]),
        pytest.param("bf16", [(2, 1), (3, 3), (2, 0), (2, 2)], marks=pytest.mark.faults),
    ],
)
def test_moments_survive_any_change_of_layout(precision: str, layouts: list, shards: Path, tmp_path: Path) -> None:
    """Weights, moments and the count of updates are the same numbers, to the bit, after each of these changes."""
    source, wanted = None, None
    for number, (ranks, stage) in enumerate(layouts):
        out = tmp_path / f"run-{number}"
        run_on_ranks(resave, ranks, shards, out, source, stage, precision)
        found = moments_of(out)
        wanted = wanted or found
        assert found[2] == wanted[2] == 2
        for tensors, expected in zip(found[:2], wanted[:2], strict=True):
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[name], expected[name]) for name in expected), (ranks, stage)
        source = out
    assert len(wanted[1]) > 100 and all(values.any() for values in wanted[1].values())


@pytest.mark.parametrize(("ranks", "stage"), [pytest.param(3, 1, marks=pytest.mark.faults), (3, 3)])
def test_moments_are_those_of_the_universal_format(ranks: int, stage: int, shards: Path, tmp_path: Path) -> None:
    """The oracle: DeepSpeed's own conversion of the same shards, one file a parameter."""
    from argparse import Namespace

    from deepspeed.checkpoint import ds_to_universal

    run_on_ranks(resave, 2, shards, tmp_path / "before", None, 2, "fp32")
    run_on_ranks(resave, ranks, shards, tmp_path / "run", tmp_path / "before", stage, "fp32")
    _, moments, _ = moments_of(tmp_path / "run")
    shards_of_run = tmp_path / "run" / "checkpoints" / "step_00000002" / "deepspeed"
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    options |= {
        "inject_missing_state": True,
        "input_folder": str(shards_of_run),
        "output_folder": str(tmp_path / "universal"),
    }
    ds_to_universal.main(Namespace(**options))
    for name, values in moments.items():
        moment, _, parameter = name.partition("/")
        expected = torch.load(tmp_path / "universal" / "zero" / parameter / f"{moment}.pt", weights_only=False)
        assert torch.equal(values, (expected["param"] if isinstance(expected, dict) else expected).view_as(values)), (
            name
        )


def test_checkpoints_are_looked_after(tmp_path: Path, whole_run: Path, capfd: pytest.CaptureFixture) -> None:
    run = copy_run(whole_run, tmp_path / "run")
    assert main(["checkpoint", "list", str(run)]) == 0
    first, second = capfd.readouterr().out.splitlines()
    assert first.startswith("step_00000006  step 6") and second.endswith("2 ranks, ZeRO 2, fp32")
    assert main(["checkpoint", "verify", str(run)]) == 0
    (run / "checkpoints" / "step_00000006" / "weights.safetensors").write_bytes(b"")
    assert main(["checkpoint", "verify", str(run)]) == 1
    assert "weights.safetensors has another size" in capfd.readouterr().out
    assert main(["checkpoint", "consolidate", str(run), "--out", str(tmp_path / "out"), "--step", "6"]) == 2
    lone = copy_run(whole_run, tmp_path / "lone")
    (lone / "checkpoints" / "step_00000008" / "weights.safetensors").write_bytes(b"")
    assert main(["checkpoint", "prune", str(lone), "--keep", "1"]) == 0  # what is damaged neither counts nor goes
    assert [folder.name for folder in checkpoint.folders(lone)] == ["step_00000006", "step_00000008"]
    assert "another size than when it was saved; it stays" in capfd.readouterr().out
    shutil.rmtree(run)
    copy_run(whole_run, run)
    assert main(["checkpoint", "prune", str(run), "--keep", "1"]) == 0
    assert [folder.name for folder in checkpoint.folders(run)] == ["step_00000008"]
    assert main(["checkpoint", "list", str(tmp_path)]) == 2 and "holds no checkpoint" in capfd.readouterr().err


def fill_the_disk(run: Path) -> None:
    """From the second save on, rank 1 can write no more than the beginning of a file."""
    if os.environ["RANK"] == "1":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        plain = checkpoint.write_shards

        def write_shards(engine, folder):
            if checkpoint.folders(run):
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            return plain(engine, folder)

        checkpoint.write_shards = write_shards


def test_a_disk_full_in_mid_save_ends_the_run_and_loses_nothing(shards: Path, tmp_path: Path, whole_run: Path) -> None:
    run = tmp_path / "run"
    life = live(shards, run, hook=fill_the_disk)
    assert life.wait(grace_s=20) == [2, 2]
    assert life.stderr().count("cannot write the checkpoint") == 2 and "Traceback" not in life.stderr()
    assert [folder.name for folder in checkpoint.folders(run)] == ["step_00000003"]
    assert events_of(run, "stop")[0]["code"] == 2
    life = live(shards, run)
    assert life.wait() == [0, 0], life.stderr()
    assert_same_run(run, whole_run)
    assert not list((run / "checkpoints").glob("tmp_*"))


def fill_the_disk_of_metrics(run: Path) -> None:
    """After step 4, which no checkpoint holds, nothing more can be written to metrics.jsonl."""

    def act(life: Life) -> None:
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):  # that of the list itself is closed by now
                if os.readlink(f"/proc/self/fd/{descriptor}") == str(run / "metrics.jsonl"):
                    os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)

    at_end_of_step(4, act)


def test_a_disk_full_between_saves_ends_the_run_in_a_line(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    life = live(shards, run, ranks=1, hook=fill_the_disk_of_metrics)
    assert life.wait(grace_s=20) == [2], life.stderr()
    assert "metrics.jsonl: No space left on device" in life.stderr() and "Traceback" not in life.stderr()
    assert [folder.name for folder in checkpoint.folders(run)] == ["step_00000003"]


def become_nobody(run: Path) -> None:
    os.setuid(65534)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody who may not write")
def test_a_folder_that_cannot_be_written_is_refused(shards: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        life = live(shards, Path(folder) / "run", ranks=1, hook=become_nobody)
        assert life.wait() == [2]
        assert "cannot be written: Permission denied" in life.stderr() and "Traceback" not in life.stderr()


def make_read_only(run: Path) -> None:
    """After step 5 nothing in the run folder can be made or changed. What is open stays so, as on a remounted disk."""

    def act(life: Life) -> None:
        for path in [run, *run.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        drop_privileges_over_files()

    at_end_of_step(5, act)


def drop_privileges_over_files() -> None:
    """Let permissions hold for root, too: without CAP_DAC_OVERRIDE, in this thread."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable of capabilities 0-31; then of 32-63
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, sets) == 0
    sets[0] &= ~(1 << 1)
    assert libc.capset(header, sets) == 0


def test_a_folder_made_read_only_in_mid_run_ends_it_and_loses_nothing(
    shards: Path, tmp_path: Path, whole_run: Path
) -> None:
    run = tmp_path / "run"
    life = live(shards, run, hook=make_read_only)
    codes = life.wait(grace_s=20)
    for path in [run, *run.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert codes == [2, 2], life.stderr()
    assert "Permission denied" in life.stderr() and "Traceback" not in life.stderr()
    assert [folder.name for folder in checkpoint.folders(run)] == ["step_00000003"]
    life = live(shards, run)
    assert life.wait() == [0, 0], life.stderr()
    assert_same_run(run, whole_run)


def set_the_clock_back(run: Path) -> None:
    """A day, after step 4; and the process is killed after step 7."""
    now = time.time

    def act(life: Life) -> None:
        time.time = lambda: now() - 86400

    at_end_of_step(4, act)
    at_end_of_step(7, lambda life: os.kill(os.getpid(), signal.SIGKILL))


def test_a_clock_set_back_in_mid_run_changes_nothing(shards: Path, tmp_path: Path, whole_run: Path) -> None:
    run = tmp_path / "run"
    started_s = time.monotonic()
    life = live(shards, run, hook=set_the_clock_back)
    assert life.wait() == [-signal.SIGKILL] * 2, life.stderr()
    life = live(shards, run)
    assert life.wait() == [0, 0], life.stderr()
    assert [event["step"] for event in events_of(run, "start")] == [0, 6]
    assert_same_run(run, whole_run)
    ledger = json.loads((run / "ledger.json").read_text())
    parts = [ledger[name] for name in ("productive", "checkpoint", "lost", "restart")]
    assert min(parts) >= 0 and sum(parts) == pytest.approx(ledger["total"])
    # The clock that was right again had a day's leap forwards: between the lives, so it is none of the training's.
    assert ledger["total"] - ledger["restart"] < time.monotonic() - started_s


def test_a_save_by_way_of_staging_is_the_same_save(shards: Path, tmp_path: Path, whole_run: Path) -> None:
    run, staging = tmp_path / "run", tmp_path / "staging"
    life = live(shards, run, f"checkpoint.staging={staging}")
    assert life.wait() == [0, 0], life.stderr()
    assert_same_run(run, whole_run)
    assert [save["step"] for save in events_of(run, "save")] == [3, 6, 8]
    for folder in checkpoint.folders(run):
        assert checkpoint.verify(folder, World())[0] is not None
    assert not [path for path in staging.rglob("*") if path.is_file()]


def test_a_target_holds_copies_and_gives_them_back(shards: Path, tmp_path: Path, whole_run: Path) -> None:
    run, target = tmp_path / "run", tmp_path / "elsewhere" / "copies"
    life = live(shards, run, f"checkpoint.target=file://{target}", "train.duration=8 steps", hook=StopAfter(5))
    assert life.wait(grace_s=20) == [85, 85], life.stderr()
    assert sorted(path.name for path in target.iterdir()) == ["step_00000003", "step_00000005"]
    kept_metrics = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run)  # the disk of the run folder is gone
    run.mkdir()
    (run / "metrics.jsonl").write_bytes(kept_metrics)
    life = live(shards, run, f"checkpoint.target=file://{target}")
    assert life.wait() == [0, 0], life.stderr()
    assert_same_run(run, whole_run)


def test_a_target_that_is_gone_costs_a_warning_or_says_so(tmp_path: Path, whole_run: Path) -> None:
    nowhere = tmp_path / "file"
    nowhere.write_text("no folder")
    mirror = Mirror(str(nowhere), checkpoint.keep_last(2))
    mirror.push(whole_run / "checkpoints" / "step_00000008")
    mirror.finish()  # warns
    found = checkpoint.find_newest(whole_run, World(), str(nowhere))
    assert found.folder.name == "step_00000008"
    with pytest.raises(UserError, match="cannot be read|nosuch"):
        checkpoint.find_newest(tmp_path / "fresh", World(), "nosuch://bucket/run")
    assert checkpoint.find_newest(tmp_path / "fresh", World(), str(tmp_path / "empty")) is None


def test_a_damaged_copy_is_passed_over_and_one_that_is_missing_made(tmp_path: Path, whole_run: Path) -> None:
    target, newest = tmp_path / "copies", whole_run / "checkpoints" / "step_00000008"
    mirror = Mirror(str(target), checkpoint.keep_last(2))
    for folder in checkpoint.folders(whole_run):
        mirror.push(folder)
        mirror.finish()
    written = (target / newest.name / checkpoint.WEIGHTS).stat().st_mtime_ns
    mirror.push(newest)  # as each life does with that from which it starts
    mirror.finish()
    assert (target / newest.name / checkpoint.WEIGHTS).stat().st_mtime_ns == written
    with open(target / newest.name / checkpoint.WEIGHTS, "r+b") as file:
        file.write(b"other")
    found = checkpoint.find_newest(tmp_path / "fresh", World(), str(target))
    assert found.folder.name == "step_00000006" and found.state["step"] == 6
    (target / newest.name / "state.json").write_text('{"step": 8')  # cut short
    assert checkpoint.find_newest(tmp_path / "fresher", World(), str(target)).folder.name == "step_00000006"
    (target / "step_00000006" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="none of its 2 checkpoints is whole"):
        checkpoint.find_newest(tmp_path / "freshest", World(), str(target))


def test_what_is_being_copied_is_not_pruned(tmp_path: Path, whole_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that takes longer than the run needs for the next checkpoints would else never hold a whole one."""
    seen = []
    saver = checkpoint.Saver(None, tmp_path, checkpoint.CheckpointConfig(target=str(tmp_path / "copies")), World())
    monkeypatch.setattr(mirror_module, "copy_out", lambda folder, target: seen.append(saver.being_copied()))
    assert saver.being_copied() == set()
    saver.copy(whole_run / "checkpoints" / "step_00000006")
    saver.mirror.finish()
    assert seen == [{6}] and saver.being_copied() == set()


def test_an_average_of_the_weights_is_kept_resumed_and_exported(shards: Path, tmp_path: Path) -> None:
    """Against a twin that averages the checkpoints of every step; also over a stop, other ranks and another ZeRO stage."""
    run = tmp_path / "run"
    each = ["ema={decay: 0.75}", "checkpoint.every_steps=1", "checkpoint.keep=9", "train.duration=5 steps"]
    life = live(shards, run, *each, hook=StopAfter(3))
    assert life.wait(grace_s=20) == [85, 85], life.stderr()
    life = live(shards, run, *each, "engine.zero_stage=3", ranks=1)
    assert life.wait() == [0], life.stderr()
    steps = [load_file(folder / checkpoint.WEIGHTS) for folder in checkpoint.folders(run)]
    saved = [load_file(folder / checkpoint.EXTRA) for folder in checkpoint.folders(run)]
    for name, weight in steps[0].items():
        if (average := saved[0].get(f"ema.{name}")) is not None:
            for values, found in zip(steps[1:], saved[1:], strict=True):
                average = average.lerp(values[name], 0.25)
                assert torch.equal(found[f"ema.{name}"], average), name
            assert average.shape == weight.shape
    assert len(saved[0]) > 90
    out = tmp_path / "export"
    assert main(["export", "--run", str(run), "--to", "native", "--out", str(out), "--ema"]) == 0
    exported = load_run(run, ema=True).model.state_dict()
    assert all(torch.equal(exported[name.removeprefix("ema.")], value) for name, value in saved[-1].items())

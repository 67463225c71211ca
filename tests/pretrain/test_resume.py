"""Real processes, killed, and resumed: whole checkpoints or none, bit for bit, and on other numbers of ranks."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from lives import LifeOfRun, arguments, assert_same_run, copy_run, events_of, keys_of, losses_of, weights_of

from pretrain import checkpoint
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
    assert progress.keys() == {"time", "rank", "host", "pid", "step", "phase", "since"}
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


def resume_after_kills(shards: Path, run: Path, whole_run: Path, kills: int, seed: int) -> None:
    """Kill a random rank at a random instant, each time during a save if one is met there; then run to the end."""
    draw = random.Random(seed)
    hooks = [kill_while_saving, None, kill_before_the_name, None, kill_while_pruning, None]
    for kill in range(kills):
        hook = hooks[kill % len(hooks)]
        life = live(shards, run, hook=hook)
        if hook is None:
            wait_for(lambda: (run / "progress").exists(), life)
            time.sleep(draw.uniform(0.5, 4))
            if life.processes[0].is_alive():
                life.kill(draw.randrange(RANKS))
        codes = life.wait()
        assert set(codes) <= {0, 86, -signal.SIGKILL}, life.stderr()
        for folder in checkpoint.folders(run):  # whole or absent
            assert checkpoint.verify(folder, World())[0] is not None
        (run / "done.json").unlink(missing_ok=True)
    life = live(shards, run)
    assert life.wait() == [0, 0], life.stderr()
    assert_same_run(run, whole_run)
    assert not events_of(run, "fallback")


def test_a_run_killed_at_random_instants_resumes_bit_for_bit(shards: Path, tmp_path: Path, whole_run: Path) -> None:
    resume_after_kills(shards, tmp_path / "run", whole_run, kills=3, seed=1)


@pytest.mark.faults
def test_a_run_killed_at_twenty_instants_resumes_bit_for_bit(shards: Path, tmp_path: Path, whole_run: Path) -> None:
    resume_after_kills(shards, tmp_path / "run", whole_run, kills=20, seed=2)


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


@pytest.mark.parametrize("name", ["state.json", "weights.safetensors", "zero_pp_rank_1", "mp_rank_00_model"])
def test_a_damaged_file_is_found_and_the_checkpoint_before_taken(name: str, tmp_path: Path, whole_run: Path) -> None:
    run = copy_run(whole_run, tmp_path / "run")
    newest = run / "checkpoints" / "step_00000008"
    (path,) = [path for path in newest.rglob("*") if path.name.startswith(name)]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64 if path.suffix != ".json" else 128  # one bit, of the same size
    path.write_bytes(content)
    found = checkpoint.find_newest(run, World())
    assert found.folder.name == "step_00000006"
    assert [folder.name for folder, _ in found.passed_over] == ["step_00000008"]
    assert "step_00000008: not a whole checkpoint" in found.passed_over[0][1]


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


def test_checkpoints_are_kept_by_number_and_for_good(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    checkpoint.prune(tmp_path, checkpoint.keep_last(2, every_steps=20))
    assert [checkpoint.step_of(folder) for folder in checkpoint.folders(tmp_path)] == [20, 40, 50]


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
        from pretrain.life import Life

        plain = Life.asks

        def asks(life: Life) -> tuple[bool, bool]:
            life.stop.requested |= life.watch.step + 1 >= self.steps and life.watch.phase == "step"
            return plain(life)

        Life.asks = asks

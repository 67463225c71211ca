"""What resilience costs: the stall of a save, straight and by way of staging; the time to resume; the watch; the interval.

    python benchmarks/resilience.py                              (widths 256 and 512 on a CPU, staging in /dev/shm)
    python benchmarks/resilience.py --widths 768 1024 --out /mnt/shared/try

One rank, fp32, ZeRO 2; each save and each resume is repeated and the median is told. The stall is the time in which training
stands still, as the run itself logs it: with staging, the writing to memory, without the bytes' way to the folder. "resume"
is from the search for the newest checkpoint (all bytes read and hashed) to weights and moments in the engine: of the same
layout by DeepSpeed's loader, of another one by ours (ZeRO 2 -> 1). The watch is timed as what `enter` costs the training
thread twice a step plus what its thread takes of a core, as shares of a step of 100 ms. The interval is Young's
sqrt(2 x stall x mean time between failures) beside Daly's correction, and the best found by simulating failures.
"""

import argparse
import math
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from data_tools.errors import run_command
from pretrain import checkpoint
from pretrain.checkpoint import CheckpointConfig, Saver
from pretrain.config import check_config
from pretrain.data.text import build_tokenizer
from pretrain.engine import EngineConfig, build_engine
from pretrain.events import LOCK, RunLock
from pretrain.model.model import ModelConfig, build_model
from pretrain.watch import Watch, WatchConfig
from pretrain.world import World, connect, disconnect

STEP_S = 0.1  # that the watch is compared with
MODEL = {
    "image": {"kind": "vit", "image_size": 112, "patch_size": 16, "layers": 6, "head_width": 64},
    "text": {"kind": "clip", "context_length": 32, "layers": 4},
    "fusion": None,
}


def main() -> int:
    return run_command(measure, build_parser().parse_args())


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[256, 512], metavar="N", help="of the towers (256 512)"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of each save and resume (3)")
    parser.add_argument("--staging", default="/dev/shm", metavar="DIR", help="(/dev/shm)")
    parser.add_argument("--out", metavar="DIR", help="folder on the disk to be measured (a temporary one)")
    return parser


def measure(options: argparse.Namespace) -> int:
    world = connect()
    folder = Path(tempfile.mkdtemp(dir=options.out))
    try:
        print("| parameters | checkpoint | stall | stall, staging | whole, staging | resume | resume, other layout |")
        print("|---|---|---|---|---|---|---|")
        for width in options.widths:
            print(f"| {' | '.join(measure_size(width, folder / str(width), options, world))} |", flush=True)
        print(f"\nwatch: {measure_watch(folder, world)}\n")
        print("| stall | failures | Young | Daly | best of the simulation | goodput there | goodput at Young's |")
        print("|---|---|---|---|---|---|---|")
        for stall_s, mtbf_s in [(5, 3600), (30, 6 * 3600), (120, 24 * 3600)]:
            print(f"| {' | '.join(compare_intervals(stall_s, mtbf_s))} |", flush=True)
    finally:
        shutil.rmtree(folder)
        disconnect()
    return 0


def measure_size(width: int, folder: Path, options: argparse.Namespace, world: World) -> list[str]:
    values = {**MODEL, "embed_dim": width}
    values["image"] = {**MODEL["image"], "width": width}
    values["text"] = {**MODEL["text"], "width": width, "heads": width // 64}
    config = check_config(values, ModelConfig, "benchmark")
    tokenizer = build_tokenizer(config.tokenizer, config.text.context_length)

    def engine_at(stage: int) -> Any:
        model = build_model(config, tokenizer, 0, world)
        return build_engine(model, EngineConfig(zero_stage=stage, precision="fp32"), 8, world)

    def identity(stage: int) -> dict[str, Any]:
        return {"world_size": world.size, "model": {}, "engine": {"zero_stage": stage, "precision": "fp32"}}

    engine = engine_at(2)
    engine.backward(sum(parameter.square().sum() for parameter in engine.module.parameters()))
    engine.step()
    stalls, wholes, size = {}, {}, 0
    for name, staging in {"straight": None, "staging": options.staging}.items():
        saved = []
        saver = Saver(engine, folder / name, CheckpointConfig(staging=staging), world, saved.append)
        whole_s = []
        for step in range(options.repeats):
            started_s = time.perf_counter()
            saver.save(step, {"step": step, **identity(2)})
            while saver.pending and saver.pending.thread.is_alive():  # a run trains meanwhile
                time.sleep(0.01)
            saver.close()
            whole_s.append(time.perf_counter() - started_s)
        size = saved[0].bytes
        wholes[name] = statistics.median(whole_s)
        stalls[name] = statistics.median(save.stall_s for save in saved)
        if saver.staging:
            shutil.rmtree(saver.staging)
    resumes = []
    for stage in (2, 1):
        fresh, times_s = engine_at(stage), []
        for _ in range(options.repeats):
            started_s = time.perf_counter()
            found = checkpoint.find_newest(folder / "straight", world)
            checkpoint.restore(fresh, found.folder, found.state, identity(stage))
            times_s.append(time.perf_counter() - started_s)
        resumes.append(statistics.median(times_s))
    count = sum(parameter.numel() for parameter in engine.module.parameters())
    times = [stalls["straight"], stalls["staging"], wholes["staging"], *resumes]
    return [f"{count / 1e6:.0f} M", f"{size / 1e6:.0f} MB", *(f"{seconds:.2f} s" for seconds in times)]


def measure_watch(folder: Path, world: World, calls: int = 20_000, watched_s: float = 10.0) -> str:
    watch = Watch(folder, WatchConfig(), world, RunLock(folder / LOCK, ""))
    started_s = time.perf_counter()
    for step in range(calls):
        watch.enter("data", step)
        watch.enter("step", step)
    enter_s = (time.perf_counter() - started_s) / calls
    watch = Watch(folder, WatchConfig(), world, RunLock(folder / LOCK, ""))
    watch.start()
    time.sleep(watched_s)
    clock = time.pthread_getcpuclockid(watch.thread.ident)  # of this thread alone
    thread_s = time.clock_gettime(clock) / watched_s * STEP_S
    watch.close()
    share = (enter_s + thread_s) / STEP_S
    return f"{enter_s * 1e6:.1f} us a step in the training thread, {thread_s * 1e6:.0f} us in its own: {share:.3%} of 100 ms"


def compare_intervals(stall_s: float, mtbf_s: float, restart_s: float = 120.0) -> list[str]:
    young_s = math.sqrt(2 * stall_s * mtbf_s)
    daly_s = young_s * (1 + math.sqrt(stall_s / mtbf_s / 2) / 3 + stall_s / mtbf_s / 9) - stall_s
    candidates = [young_s * 2 ** (power / 4) for power in range(-8, 9)]
    goodputs = {interval_s: simulate(interval_s, stall_s, mtbf_s, restart_s) for interval_s in candidates}
    best_s = max(goodputs, key=goodputs.__getitem__)
    texts = [f"{stall_s:g} s", f"one in {mtbf_s / 3600:g} h", f"{young_s:.0f} s", f"{daly_s:.0f} s", f"{best_s:.0f} s"]
    return [*texts, f"{goodputs[best_s]:.2%}", f"{goodputs[young_s]:.2%}"]


def simulate(interval_s: float, stall_s: float, mtbf_s: float, restart_s: float, failures: int = 20_000) -> float:
    """The share of wall time that counts, with exponential times between failures."""
    draw = random.Random(0)
    useful_s = total_s = 0.0
    for _ in range(failures):
        life_s = draw.expovariate(1 / mtbf_s)
        useful_s += life_s // (interval_s + stall_s) * interval_s
        total_s += life_s + restart_s
    return useful_s / total_s


if __name__ == "__main__":
    sys.exit(main())

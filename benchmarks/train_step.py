"""Samples/s and peak memory of one training step, ours through DeepSpeed and open_clip's plain PyTorch one, in turns.

    python benchmarks/train_step.py                               (CPU: ViT 6x192 at 112 px, text 4x192)
    python benchmarks/train_step.py --device cuda --matching      (one GPU: ViT-B/16 at 224 px, text 12x512)

Each side is a process of its own, so that its peak memory is its own; they work one at a time, a block of steps each,
and the first of a round is the second of the next, so that what else the machine does falls on both alike. A step is
what each trainer's loop does with a batch that is there already: copy to the device, learning rate, forward, loss,
backward, clipping, AdamW. Reading and decoding are left out of both, and so is open_clip's normalising of pixels, which
its loader's processes do: it gets float32 pixels; ours gets uint8 and normalises within the step.

Model FLOPs utilisation counts the matrix products of the forward and backward pass, attention in full, recomputation and
everything else not at all, over the device's dense bf16 peak.

Shape legend: B pairs, N image tokens, L text tokens, D width, E embedding, S pixels.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from data_tools.errors import UserError, run_command
from pretrain.accumulate import compute_gradients
from pretrain.config import check_config
from pretrain.contract import Batch
from pretrain.data.text import build_tokenizer
from pretrain.engine import (
    EngineConfig,
    apply_gradients,
    build_engine,
    cap_logit_scale,
    learning_rate,
    set_learning_rate,
    settle_precision,
)
from pretrain.flops import PEAK_TFLOPS, count_flops
from pretrain.losses import ContrastiveConfig, LossesConfig, MatchingConfig
from pretrain.metrics import peak_memory_gib
from pretrain.model.model import ModelConfig, build_model
from pretrain.randomness import seed_torch
from pretrain.torchvision_ops import prepare_torchvision
from pretrain.world import World, connect, disconnect

TOWERS = {
    "tiny": {
        "embed_dim": 192,
        "image": {"kind": "vit", "image_size": 112, "patch_size": 16, "width": 192, "layers": 6, "head_width": 64},
        "text": {"kind": "clip", "context_length": 32, "width": 192, "heads": 3, "layers": 4},
        "fusion": {"kind": "cross", "width": 192, "layers": 2, "heads": 3},
    },
    "vit_b16": {
        "embed_dim": 512,
        "image": {"kind": "vit", "image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64},
        "text": {"kind": "clip", "context_length": 77, "width": 512, "heads": 8, "layers": 12},
        "fusion": {"kind": "cross", "width": 768, "layers": 6, "heads": 12},
    },
}
OURS, OPEN_CLIP, MATCHING = "ours", "open_clip", "ours + matching"
VOCAB_SIZE = 49408  # of CLIP's tokeniser; its last id ends a text
SCHEDULE_STEPS = 1000


def main() -> int:
    return run_command(compare, build_parser().parse_args())


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--towers", choices=tuple(TOWERS), help="default: tiny on a CPU, vit_b16 on a GPU")
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: 128 on a CPU, 512 on a GPU")
    parser.add_argument("--matching", action="store_true", help="also measure our step with fusion and matching loss")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--zero-stage", type=int, choices=range(4), default=1)
    parser.add_argument("--gradient-clip", type=float, default=1.0, metavar="NORM", help="of both sides; 0 = off (1.0)")
    parser.add_argument("--rounds", type=int, default=10, help="blocks of each side (10)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps a block; default: 2 on a CPU, 20 on a GPU")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="steps of each side before the first round")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of each side (all processors)")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="the device's dense peak, for the utilisation")
    return parser


def compare(options: argparse.Namespace) -> int:
    """Start the sides, let them work in turns, print the table."""
    import torch

    on_gpu = options.device == "cuda"
    options.towers = options.towers or ("vit_b16" if on_gpu else "tiny")
    options.batch_size = options.batch_size or (512 if on_gpu else 128)
    options.steps = options.steps or (20 if on_gpu else 2)
    options.threads = options.threads or len(os.sched_getaffinity(0))
    world = World(device=torch.device(options.device))
    options.precision = settle_precision(EngineConfig(precision=options.precision), None, world).precision
    # What the sides inherit: each is a job of one rank.
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    names = [OURS, OPEN_CLIP] + ([MATCHING] if options.matching else [])
    print(
        f"{options.towers}, batch {options.batch_size}, {options.precision}, gradient clip {options.gradient_clip:g}, "
        f"ZeRO-{options.zero_stage}, {options.threads} threads; {options.rounds} rounds of {options.steps} steps",
        flush=True,
    )
    sides = {name: Side(name, options) for name in names}
    try:
        facts = {name: side.receive() for name, side in sides.items()}
        rates = take_turns(options, sides)
        peaks = {name: side.finish() for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.process.terminate()
    print("\n" + render(options, rates, peaks, facts))
    return 0


def take_turns(options: argparse.Namespace, sides: dict[str, "Side"]) -> dict[str, list[float]]:
    """Samples/s of every round, by the side's name."""
    for side in sides.values():
        side.run(options.warmup)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds):
        for name in sides if number % 2 == 0 else reversed(sides):
            rates[name].append(options.steps * options.batch_size / sides[name].run(options.steps))
        line = ", ".join(f"{name} {values[-1]:.1f}" for name, values in rates.items())
        print(f"round {number + 1}/{options.rounds}, samples/s: {line}", flush=True)
    return rates


class Side:
    """One contender in a process of its own."""

    def __init__(self, name: str, options: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=be_side, args=(name, options, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process ends the pipe

    def receive(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            raise UserError(f"the process of '{self.name}' ended; its messages are above") from None

    def run(self, steps: int) -> float:
        """Seconds that `steps` steps took."""
        self.pipe.send(steps)
        return self.receive()

    def finish(self) -> float:
        """End the process; its peak memory in GiB."""
        self.pipe.send(0)
        peak_gib = self.receive()
        self.process.join()
        return peak_gib


def be_side(name: str, options: argparse.Namespace, pipe: Connection) -> None:
    """The process of a side; a mistake of the user is one line there too."""
    sys.exit(run_command(serve, name, options, pipe))


def serve(name: str, options: argparse.Namespace, pipe: Connection) -> None:
    """A side's process: tell the facts, then for each number received do so many steps and tell the seconds; 0 ends."""
    import torch

    torch.set_num_threads(options.threads)
    world = connect()
    if world.device.type != options.device:
        raise UserError(f"--device {options.device}: this machine offers {world.device.type}")
    build = {OURS: build_ours, OPEN_CLIP: build_open_clip, MATCHING: partial(build_ours, matching=True)}[name]
    parameters, flops, step = build(options, world)
    device_name = torch.cuda.get_device_name(world.device) if options.device == "cuda" else "CPU"
    pipe.send({"parameters": parameters, "flops": flops, "device": device_name})
    done = 0
    while steps := pipe.recv():
        started_s = time.perf_counter()
        for number in range(done, done + steps):
            step(number)
        if options.device == "cuda":
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - started_s)
        done += steps
    pipe.send(peak_memory_gib(world.device))
    disconnect()


def towers_of(options: argparse.Namespace, matching: bool) -> ModelConfig:
    values = dict(TOWERS[options.towers])
    if not matching:
        del values["fusion"]
    return check_config(values, ModelConfig, where=options.towers)


def draw_batch(options: argparse.Namespace, config: ModelConfig) -> Batch:
    """Random pixels, and texts of random lengths; page-locked for a GPU, as the loaders of both leave them."""
    import numpy as np
    import torch

    count, length, size = options.batch_size, config.text.context_length, config.image.image_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB_SIZE - 2, (count, length), generator=generator)
    last = torch.randint(4, length, (count, 1), generator=generator)
    places = torch.arange(length)
    batch = Batch(
        image=torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator),
        ids=ids.masked_fill(places == last, VOCAB_SIZE - 1).masked_fill(places > last, 0),
        mask=places <= last,
        image_id=torch.arange(count),
        text_id=torch.arange(count),
        true_text_id=torch.arange(count)[:, None],
        position=np.arange(count),
        keys=[str(number) for number in range(count)],
    )
    if options.device == "cuda":
        pinned = {name: part.pin_memory() for name, part in vars(batch).items() if isinstance(part, torch.Tensor)}
        batch = replace(batch, **pinned)
    return batch


def build_ours(
    options: argparse.Namespace, world: Any, matching: bool = False
) -> tuple[int, float, Callable[[int], None]]:
    """(number of parameters, FLOPs of a sample, the step as pretrain/train.py does it)."""
    config = towers_of(options, matching)
    losses_config = LossesConfig(contrastive=ContrastiveConfig(), matching=MatchingConfig() if matching else None)
    engine_config = EngineConfig(
        zero_stage=options.zero_stage, precision=options.precision, gradient_clip=options.gradient_clip
    )
    host_batch = draw_batch(options, config)
    model = build_model(config, build_tokenizer(config.tokenizer, config.text.context_length), 0, world).train()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = count_flops(model, losses_config).sample
    engine = build_engine(model, engine_config, options.batch_size, world)

    def step(number: int) -> None:
        batch = host_batch.to(world.device)
        set_learning_rate(engine, learning_rate(engine_config, number, SCHEDULE_STEPS))
        seed_torch(0, number, world.rank)
        compute_gradients(engine, batch, losses_config, number, None, world)
        apply_gradients(engine)
        cap_logit_scale(engine)

    return parameters, flops, step


def build_open_clip(options: argparse.Namespace, world: Any) -> tuple[int, None, Callable[[int], None]]:
    """(number of parameters, FLOPs that are ours too, the step as open_clip_train/train.py does it with --precision amp_bf16 or fp32)."""
    prepare_torchvision()
    import math
    from contextlib import nullcontext

    import torch
    from open_clip import ClipLoss
    from open_clip.model import CLIP

    torch.backends.cuda.matmul.allow_tf32 = True  # as its main() sets these two
    torch.backends.cudnn.benchmark = True
    config = towers_of(options, matching=False)
    batch = draw_batch(options, config)
    host_pixels = config.image.normalise(batch.image)
    if options.device == "cuda":
        host_pixels = host_pixels.pin_memory()
    vision, text = config.image.open_clip_config(), config.text.open_clip_config()
    model = CLIP(config.embed_dim, vision, text | {"vocab_size": VOCAB_SIZE}, output_dict=True).to(world.device).train()
    loss = ClipLoss(cache_labels=True)
    defaults = EngineConfig()
    named = list(model.named_parameters())
    gains = [p for name, p in named if p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))]
    kept = {id(parameter) for parameter in gains}
    optimizer = torch.optim.AdamW(
        [
            {"params": gains, "weight_decay": 0.0},
            {"params": [p for _, p in named if id(p) not in kept], "weight_decay": defaults.weight_decay},
        ],
        lr=defaults.lr,
        betas=(defaults.beta1, defaults.beta2),
        eps=defaults.epsilon,
    )
    autocast = nullcontext
    if options.precision == "bf16":
        autocast = partial(torch.amp.autocast, device_type=world.device.type, dtype=torch.bfloat16)

    def step(number: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(defaults, number, SCHEDULE_STEPS)
        images = host_pixels.to(world.device, non_blocking=True)
        texts = batch.ids.to(world.device, non_blocking=True)
        optimizer.zero_grad()
        with autocast():
            losses = loss(**model(images, texts), output_dict=True)
            total_loss = sum(losses.values())
        total_loss.backward()
        if options.gradient_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.gradient_clip, norm_type=2.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    return sum(parameter.numel() for _, parameter in named), None, step


def find_peak_tflops(options: argparse.Namespace, device_name: str) -> float | None:
    """None where no utilisation is asked for: on a CPU without --peak-tflops."""
    if options.peak_tflops or options.device == "cpu":
        return options.peak_tflops
    known = [peak for part, peak in PEAK_TFLOPS.items() if part in device_name]
    if not known:
        print(f"{device_name}: no peak known, so no utilisation; give --peak-tflops", file=sys.stderr)
    return known[0] if known else None


def render(
    options: argparse.Namespace, rates: dict[str, list[float]], peaks: dict[str, float], facts: dict[str, dict]
) -> str:
    """The table: medians over the rounds, and the ratio of each round's pair. Raises UserError for unequal towers."""
    parameters, device = facts[OURS]["parameters"], facts[OURS]["device"]
    if parameters != facts[OPEN_CLIP]["parameters"]:
        raise UserError(f"the models differ: {parameters} and {facts[OPEN_CLIP]['parameters']} parameters")
    peak_tflops = find_peak_tflops(options, device)
    lines = [
        f"{device}, {parameters / 1e6:.1f} M parameters (without fusion)",
        f"{'':<18}{'samples/s':>10}{'slowest':>9}{'fastest':>9}{'peak GiB':>10}{'GFLOP/sample':>14}{'MFU %':>7}",
    ]
    for name, values in rates.items():
        flops = facts[name]["flops"] or facts[OURS]["flops"]
        median = statistics.median(values)
        used = f"{100 * median * flops / (peak_tflops * 1e12):7.1f}" if peak_tflops else f"{'-':>7}"
        line = f"{name:<18}{median:10.1f}{min(values):9.1f}{max(values):9.1f}{peaks[name]:10.2f}{flops / 1e9:14.2f}"
        lines.append(line + used)
    ratios = sorted(ours / theirs for ours, theirs in zip(rates[OURS], rates[OPEN_CLIP], strict=True))
    lines.append(
        f"\nours over open_clip, pair by pair: median {statistics.median(ratios):.3f}, "
        f"from {ratios[0]:.3f} to {ratios[-1]:.3f}" + (f"; peak of {peak_tflops:g} TFLOP/s" if peak_tflops else "")
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

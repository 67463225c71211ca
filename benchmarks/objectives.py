"""What exactness costs: memory of the contrastive loss, bytes sent for hard negatives, time of accumulation.

    python benchmarks/objectives.py                    (CPU: small towers)
    python benchmarks/objectives.py --device cuda      (one GPU: ViT-B/16, BERT-base, cross fusion of 6 layers)

memory   Peak bytes of the forward and backward of the contrastive loss for 256 own pairs against G columns, and of the
         momentum loss where G is batch and queue, each case in a process of its own. The columns stand for what was
         gathered: they are there before, and take no gradient. (With gradients, gathered embeddings take 16 G E bytes, in
         open_clip as here.) open_clip's loss comes with `--local-loss --gather-with-grad`, and with its defaults, whose
         matrices are G x G. On a CPU, MALLOC_MMAP_THRESHOLD_=65536 in the environment keeps blocks that are free, but not
         given back, from counting.
bytes    What a rank receives in a step for matching negatives at G = 32,768, counted in the collectives of our code, beside
         gathering the image tokens of a ViT-B/16 in bf16, as BLIP-2 does (and once more for their gradients).
time     Steps of contrastive and matching losses with 8 micro-batches over steps with the whole batch, in turns, and their
         matrix products (FLOPs), which other work on the machine does not change; and steps with momentum towers and a queue of 65,536 over steps without.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_tools.errors import UserError, run_command
from pretrain.__main__ import positive
from pretrain.accumulate import compute_gradients
from pretrain.config import check_config
from pretrain.contract import Batch, Candidates, Identity, ModelOutput, MomentumOutput
from pretrain.data.text import ClipTokenizerConfig, build_tokenizer
from pretrain.engine import EngineConfig, apply_gradients, build_engine, import_deepspeed
from pretrain.losses import ContrastiveConfig, LossesConfig, MatchingConfig, MomentumConfig, compute_losses
from pretrain.model.model import ModelConfig, build_model
from pretrain.model.negatives import plan_matches
from pretrain.momentum import QUEUE, Momentum
from pretrain.world import World, connect, disconnect

OWN, WIDTH = 256, 512  # pairs of a rank, and E
COLUMNS = [2**power for power in range(10, 18)]
LARGEST_SQUARE = 8192  # columns for which G x G matrices still fit a small machine
TOKENS, TOKEN_WIDTH, TEXT_LENGTH = 197, 768, 77  # of ViT-B/16 at 224 pixels, and CLIP's context
MICRO_BATCHES = 8
MOMENTUM = LossesConfig(contrastive=None, momentum=MomentumConfig())
PRECISION = {"cpu": "fp32", "cuda": "bf16"}
TOWERS = {
    "cpu": {
        "embed_dim": 128,
        "image": {"kind": "vit", "image_size": 64, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
        "text": {"kind": "clip", "context_length": 32, "width": 128, "heads": 4, "layers": 3},
        "fusion": {"kind": "cross", "width": 128, "layers": 2, "heads": 4},
    },
    "cuda": {
        "embed_dim": 512,
        "image": {"kind": "vit"},
        "text": {"kind": "bert", "dropout": 0.0},
        "fusion": {"kind": "cross"},
    },
}


class PretendWorld(World):
    """A rank among many whose other ranks' rows are made up. Counts the bytes that it would receive."""

    def __init__(self, size: int, columns: torch.Tensor | None = None):
        super().__init__(size=size)
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "received", {})

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        kind = f"{tuple(x.shape[1:])} {x.dtype}".replace("torch.", "")
        self.received[kind] = self.received.get(kind, 0) + x.nbytes * (self.size - 1)
        return x.repeat(self.size, *[1] * (x.ndim - 1)) if self.columns is None else self.columns

    def all_gather_padded(self, x: torch.Tensor) -> torch.Tensor:
        return self.all_gather(x)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(TOWERS), default="cpu")
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="pairs a step of the time table (128, on a GPU 512)"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="of the time table (5)")
    parser.add_argument("--only", choices=("memory", "bytes", "time"), help="one of the tables")
    return run_command(measure, parser.parse_args())


def measure(options: argparse.Namespace) -> int:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: there is no CUDA device here. Leave it out")
    if options.batch_size and options.batch_size % MICRO_BATCHES:
        raise UserError(f"--batch-size: {options.batch_size} is no multiple of the {MICRO_BATCHES} micro-batches")
    tables = {"memory": show_memory, "bytes": show_bytes, "time": show_time}
    for name, show in tables.items():
        if options.only in (None, name):
            show(options)
    return 0


def show_memory(options: argparse.Namespace) -> None:
    print(f"Peak MiB of the contrastive loss, {OWN} own pairs, E = {WIDTH}, chunk {ContrastiveConfig().chunk}")
    print(f"{'G':>8} {'ours':>10} {'momentum':>10} {'open_clip':>10} {'its defaults':>13}")
    context = multiprocessing.get_context("spawn")
    for columns in COLUMNS:
        peaks = []
        for kind in ("ours", "momentum", "open_clip", "defaults"):
            if kind == "defaults" and columns > LARGEST_SQUARE:
                peaks.append("-")
                continue
            with context.Pool(1) as pool:
                peaks.append(f"{pool.apply(contrastive_peak, (kind, columns, options.device)) / 2**20:.0f}")
        print(f"{columns:>8} {peaks[0]:>10} {peaks[1]:>10} {peaks[2]:>10} {peaks[3]:>13}", flush=True)


def contrastive_peak(kind: str, columns: int, device: str) -> int:
    """Bytes held at most during one forward and backward, beyond what was there before."""
    own = columns if kind == "defaults" else OWN
    image, text = (torch.nn.functional.normalize(torch.randn(own, WIDTH, device=device), dim=1) for _ in range(2))
    everyone = torch.nn.functional.normalize(torch.randn(columns, WIDTH, device=device), dim=1)
    image.requires_grad_(), text.requires_grad_()
    scale = torch.tensor([14.0], device=device, requires_grad=True)

    def step(image: torch.Tensor, text: torch.Tensor, everyone: torch.Tensor) -> None:
        if kind == "ours":
            world = PretendWorld(columns // own, everyone)
            loss = compute_losses(LossesConfig(), ModelOutput(image, text, scale), world)["total"]
        elif kind == "momentum":
            rows = torch.arange(len(everyone), device=device)
            candidates = Candidates(everyone, everyone, Identity(rows, rows, rows[:, None]))
            identity, averaged = candidates.identity.rows(0, len(image)), (image.detach(), text.detach())
            output = ModelOutput(image, text, scale, identity=identity)
            output.momentum = MomentumOutput(*averaged, candidates, MomentumConfig().alpha)
            loss = compute_losses(MOMENTUM, output, World(device=image.device))["total"]
        else:  # as open_clip.loss.ClipLoss writes it
            labels = torch.arange(len(image), device=device)
            cross_entropy = torch.nn.functional.cross_entropy
            loss = cross_entropy(scale * image @ everyone.T, labels) / 2
            loss = loss + cross_entropy(scale * text @ everyone.T, labels) / 2
        loss.backward()

    step(image[:8].detach().requires_grad_(), text[:8].detach().requires_grad_(), everyone[:8])  # libraries load now
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(image, text, everyone)
        return torch.cuda.max_memory_allocated() - before
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before = read_status("VmRSS")
    step(image, text, everyone)
    return read_status("VmHWM") - before


def read_status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def show_bytes(options: argparse.Namespace) -> None:
    world = PretendWorld(128)
    rows = torch.arange(OWN)
    batch = Batch(
        image=torch.zeros(OWN, 1),
        ids=torch.zeros(OWN, TEXT_LENGTH, dtype=torch.int64),
        mask=torch.ones(OWN, TEXT_LENGTH, dtype=torch.bool),
        image_id=rows,
        text_id=rows,
        true_text_id=rows[:, None].repeat(1, 5),
        position=np.arange(OWN),
        keys=[],
    )
    image, text = (torch.nn.functional.normalize(torch.randn(OWN, WIDTH), dim=1) for _ in range(2))
    plan_matches(batch, image, text, torch.tensor([14.0]), 0, 0.5, world)
    print(f"\nReceived a rank and step for matching negatives, {world.size} ranks of {OWN} pairs, E = {WIDTH}, MB")
    for kind, received in world.received.items():
        print(f"  {kind:<24} {received / 1e6:10.2f}")
    ours = sum(world.received.values())
    tokens = (world.size - 1) * OWN * TOKENS * TOKEN_WIDTH * 2
    print(f"  {'ours':<24} {ours / 1e6:10.2f}")
    print(f"  {'image tokens, forward':<24} {tokens / 1e6:10.2f}   {tokens / ours:.0f} times as much")
    print(f"  {'and their gradients':<24} {2 * tokens / 1e6:10.2f}   {2 * tokens / ours:.0f} times as much")


def show_time(options: argparse.Namespace) -> None:
    import_deepspeed()
    world = connect()
    size = options.batch_size or {"cpu": 128, "cuda": 512}[options.device]
    print(
        f"\nSeconds of a step of {size} pairs, {PRECISION[options.device]}, {describe(options)}: medians of {options.rounds}"
    )
    print(f"{'':<26} {'whole':>8} {f'{MICRO_BATCHES} parts':>8}   times as long (rounds)")
    for matching in (False, True):
        whole, cut, products = time_steps(options, world, size, matching)
        ratios = [one / other for one, other in zip(cut, whole, strict=True)]
        name = "contrastive and matching" if matching else "contrastive alone"
        middle = [statistics.median(values) for values in (whole, cut, ratios)]
        print(
            f"{name:<26} {middle[0]:8.3f} {middle[1]:8.3f}   {middle[2]:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"FLOPs {products:.2f}"
        )
    print(f"{'':<26} {'without':>8} {'with':>8}   times as long (rounds)")
    without, momentum = time_momentum(options, world, size)
    ratios = [one / other for one, other in zip(momentum, without, strict=True)]
    middle = [statistics.median(values) for values in (without, momentum, ratios)]
    print(
        f"{'momentum, not contrastive':<26} {middle[0]:8.3f} {middle[1]:8.3f}   {middle[2]:.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )
    disconnect()


def build_step(options: argparse.Namespace, world: World, size: int, matching: bool) -> tuple[Any, Batch]:
    """An engine, and a batch of that many pairs."""
    towers = {name: part for name, part in TOWERS[options.device].items() if matching or name != "fusion"}
    config = check_config(towers, ModelConfig, where="towers")
    length = config.text.context_length
    model = build_model(config, build_tokenizer(ClipTokenizerConfig(), length), 0, world).train()
    engine = build_engine(model, EngineConfig(zero_stage=1, precision=PRECISION[options.device]), size, world)
    generator = torch.Generator().manual_seed(0)
    shape = (size, 3, config.image.image_size, config.image.image_size)
    batch = Batch(
        image=torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
        ids=torch.randint(1, 1000, (size, length), generator=generator),
        mask=torch.ones(size, length, dtype=torch.bool),
        image_id=torch.arange(size),
        text_id=torch.arange(size),
        true_text_id=torch.arange(size)[:, None],
        position=np.arange(size),
        keys=[],
    ).to(world.device)
    return engine, batch


def time_steps(
    options: argparse.Namespace, world: World, size: int, matching: bool
) -> tuple[list[float], list[float], float]:
    """Seconds of steps with the whole batch, and in micro-batches, in turns; and how many times the FLOPs these take."""
    engine, batch = build_step(options, world, size, matching)
    losses = LossesConfig(matching=MatchingConfig() if matching else None)

    def step(micro_batches: int) -> None:
        compute_gradients(engine, batch, losses, 0, size // micro_batches, world)
        apply_gradients(engine)

    times = time_in_turns(options, lambda: step(1), lambda: step(MICRO_BATCHES))
    products = count_products(lambda: step(MICRO_BATCHES)) / count_products(lambda: step(1))
    engine.destroy()
    return *times, products


def count_products(step: Callable[[], None]) -> int:
    """FLOPs of a step. The counter does not know all fused attentions, so it is shown the plain one."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return counter.get_total_flops()


def time_momentum(options: argparse.Namespace, world: World, size: int) -> tuple[list[float], list[float]]:
    """Seconds of steps of the contrastive loss, and of the momentum loss with a full queue, in turns."""
    engine, batch = build_step(options, world, size, matching=False)
    model, settings = engine.module, MOMENTUM.momentum
    count = settings.queue_samples
    past = torch.nn.functional.normalize(torch.randn(count, model.config.embed_dim), dim=1)
    rows = torch.arange(size, size + count)
    queue = {"image_embed": past, "text_embed": past, "image_id": rows, "text_id": rows, "true_text_id": rows[:, None]}
    restored = {QUEUE + name: value for name, value in queue.items()}
    momentum = Momentum(settings, model.config, model.tokenizer, engine, world, restored)

    def step() -> None:
        compute_gradients(engine, batch, LossesConfig(), 0, None, world)
        apply_gradients(engine)

    def step_with_momentum() -> None:
        _, output = compute_gradients(engine, batch, MOMENTUM, 0, None, world, None, momentum)
        apply_gradients(engine)
        momentum.follow(output.momentum, 0)

    times = time_in_turns(options, step, step_with_momentum)
    engine.destroy()
    return times


def time_in_turns(options: argparse.Namespace, *steps: Callable[[], None]) -> tuple[list[float], ...]:
    """Seconds that each of `steps` takes, round by round; the first round, which loads and plans, is left out."""
    times: tuple[list[float], ...] = tuple([] for _ in steps)
    for number in range(options.rounds + 1):
        for step, found in zip(steps, times, strict=True):
            started_s = time.perf_counter()
            step()
            if options.device == "cuda":
                torch.cuda.synchronize()
            if number:
                found.append(time.perf_counter() - started_s)
    return times


def describe(options: argparse.Namespace) -> Any:
    return torch.cuda.get_device_name() if options.device == "cuda" else "CPU"


if __name__ == "__main__":
    raise SystemExit(main())

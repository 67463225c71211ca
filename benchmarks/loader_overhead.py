"""How much longer a training step takes with the real loader than with a batch that is kept in memory.

    python benchmarks/loader_overhead.py --shards shards/train                     (CPU: ViT-B/32, batch 32)
    python benchmarks/loader_overhead.py --shards shards/train --batch-size 512    (one GPU: ViT-B/32, all cores)

The steps are those of pretrain/train.py: contrastive loss, bf16, ZeRO-1. Both kinds come in turns, a block of steps each,
in one process with one engine, so what else the machine does falls on both alike. While a batch is kept, the loader's
threads have filled their store and rest. On a CPU the threads that decode take from the cores that compute, so there the
overhead is decoding itself; on a GPU it is only what the training thread waits for.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import repeat

from data_tools.errors import run_command
from pretrain.config import check_config
from pretrain.contract import Batch
from pretrain.data.loader import DataConfig, Loader
from pretrain.data.text import build_tokenizer
from pretrain.engine import EngineConfig, build_engine, import_deepspeed, settle_precision
from pretrain.losses import LossesConfig, compute_losses
from pretrain.model.model import ModelConfig, build_model
from pretrain.world import connect, disconnect

PATCH_SIZES = {"vit_b32": 32, "vit_b16": 16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", required=True, metavar="DIR", help="a dataset of photographs")
    parser.add_argument("--model", choices=tuple(PATCH_SIZES), default="vit_b32")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N")
    parser.add_argument("--rounds", type=int, default=6, help="blocks of each kind (6)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="steps a block (3)")
    parser.add_argument("--threads", type=int, metavar="N", help="decoding threads (all processors)")
    return run_command(compare, parser.parse_args())


def compare(options: argparse.Namespace) -> int:
    import_deepspeed()
    world = connect()
    values = {
        "embed_dim": 512,
        "image": {"kind": "vit", "image_size": 224, "patch_size": PATCH_SIZES[options.model]}
        | {"width": 768, "layers": 12, "head_width": 64},
        "text": {"kind": "clip", "context_length": 77, "width": 512, "heads": 8, "layers": 12},
    }
    model_config = check_config(values, ModelConfig, where=options.model)
    tokenizer = build_tokenizer(model_config.tokenizer, model_config.text.context_length)
    threads = options.threads or len(os.sched_getaffinity(0))
    loader = Loader(DataConfig(path=options.shards, threads=threads), tokenizer, 224, options.batch_size, 0, world)
    model = build_model(model_config, tokenizer, 0, world).train()
    settings = settle_precision(EngineConfig(zero_stage=1), None, world)
    engine = build_engine(model, settings, options.batch_size, world)
    losses_config = LossesConfig()

    def run(batches: Iterator[Batch]) -> float:
        """Seconds a step."""
        started_s = time.perf_counter()
        for _ in range(options.steps):
            losses = compute_losses(losses_config, engine(next(batches).to(world.device)), world)
            engine.backward(losses["total"])
            engine.step()
        losses["total"].item()  # a GPU has to be done
        return (time.perf_counter() - started_s) / options.steps

    loaded = iter(loader)
    kept = repeat(next(loaded))
    run(kept)
    run(loaded)
    print(f"{options.model}, batch {options.batch_size}, {threads} decoding threads, {world.device}", flush=True)
    overheads, kept_s, loaded_s = [], [], []
    for number in range(options.rounds):
        order = (loaded, kept) if number % 2 else (kept, loaded)
        took = {id(batches): run(batches) for batches in order}
        kept_s.append(took[id(kept)])
        loaded_s.append(took[id(loaded)])
        overheads.append(loaded_s[-1] / kept_s[-1] - 1)
        print(f"round {number + 1}/{options.rounds}: {kept_s[-1]:.3f} s kept, {loaded_s[-1]:.3f} s loaded", flush=True)
    loaded.close()
    disconnect()
    print(
        f"\nstep: {statistics.median(kept_s):.3f} s with a batch kept in memory, {statistics.median(loaded_s):.3f} s with the "
        f"loader\noverhead, pair by pair: median {100 * statistics.median(overheads):.1f} %, from "
        f"{100 * min(overheads):.1f} to {100 * max(overheads):.1f} %"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

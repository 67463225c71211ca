"""What one rank computes in the parity tests: importable, so that spawned processes can run it."""

import numpy as np
import torch
import torch.distributed as dist

from pretrain.config import check_config
from pretrain.contract import Batch
from pretrain.data.text import ClipTokenizerConfig, Tokenizer
from pretrain.engine import EngineConfig, build_engine, learning_rate, set_learning_rate
from pretrain.losses import LossesConfig, MatchingConfig, compute_losses
from pretrain.model.model import ModelConfig, build_model
from pretrain.world import World

GLOBAL_BATCH = 8
VOCAB_SIZE = 49408
TOKENIZER = Tokenizer(ClipTokenizerConfig(), VOCAB_SIZE, 12, None, end_id=VOCAB_SIZE - 1)
LOSSES = LossesConfig(matching=MatchingConfig())
IMAGE_TOWERS = {
    "vit": {"kind": "vit", "image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "resnet": {"kind": "resnet", "image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
}
TEXT_TOWERS = {
    "clip": {"kind": "clip", "context_length": 12, "width": 32, "heads": 2, "layers": 2},
    "bert": {"kind": "bert", "context_length": 12, "width": 32, "heads": 2, "layers": 2, "dropout": 0.0},
}


def model_config(image: str, text: str) -> ModelConfig:
    values = {
        "embed_dim": 16,
        "image": IMAGE_TOWERS[image],
        "text": TEXT_TOWERS[text],
        "fusion": {"kind": "cross", "width": 32, "layers": 1, "heads": 2},
    }
    return check_config(values, ModelConfig, "test")


def make_batch(config: ModelConfig, step: int, world: World) -> Batch:
    """This rank's rows of a random global batch, in which pictures 0 and 1 are the same, and so are texts 2 and 3."""
    size, length = config.image.image_size, config.text.context_length
    generator = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (GLOBAL_BATCH, 3, size, size), generator=generator, dtype=torch.uint8)
    ids = torch.randint(1, 1000, (GLOBAL_BATCH, length), generator=generator)
    ids[:, 8] = VOCAB_SIZE - 1
    ids[:, 9:] = 0
    image_id, text_id = torch.arange(GLOBAL_BATCH), torch.arange(GLOBAL_BATCH)
    image[1], image_id[1], ids[3], text_id[3] = image[0], 0, ids[2], 2
    rows = GLOBAL_BATCH // world.size
    own = slice(world.rank * rows, (world.rank + 1) * rows)
    return Batch(
        image=image[own],
        ids=ids[own],
        mask=(torch.arange(length) <= 8).expand(rows, length).contiguous(),
        image_id=image_id[own],
        text_id=text_id[own],
        true_text_id=text_id[own][:, None],
        position=np.arange(GLOBAL_BATCH)[own] + step * GLOBAL_BATCH,
        keys=[str(row) for row in range(GLOBAL_BATCH)[own]],
    )


def losses_and_gradients(world: World, image: str, text: str) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Losses and every parameter's gradient in float64, each averaged over the ranks."""
    config = model_config(image, text)
    model = build_model(config, TOKENIZER, 0, world).double().train()
    losses = compute_losses(LOSSES, model(make_batch(config, 0, world)), world)
    losses["total"].backward()
    means = {name: world.mean(loss).item() for name, loss in losses.items()}
    gradients = {name: world.mean(p.grad).numpy() for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: buffer.numpy() for name, buffer in model.named_buffers() if "running" in name}
    return means, gradients | buffers


def all_losses_and_gradients(world: World, cases: list[tuple[str, str]]) -> list:
    return [losses_and_gradients(world, *case) for case in cases]


def contrastive_of_both(world: World) -> dict[str, tuple[float, np.ndarray, np.ndarray, np.ndarray]]:
    """Loss and gradients of our contrastive loss and of open_clip's, on the same embeddings."""
    from pretrain.contract import ModelOutput
    from pretrain.torchvision_ops import prepare_torchvision

    prepare_torchvision()
    from open_clip import ClipLoss

    generator = torch.Generator().manual_seed(world.rank)
    results = {}
    sides = [torch.randn(4, 16, generator=generator, dtype=torch.float64) for _ in range(2)]
    for name in ("ours", "open_clip"):
        image, text = (torch.nn.functional.normalize(side, dim=-1).requires_grad_() for side in sides)
        scale = torch.tensor([14.0], dtype=torch.float64, requires_grad=True)
        if name == "ours":
            loss = compute_losses(LossesConfig(), ModelOutput(image, text, scale), world)["contrastive"]
        else:
            loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=world.rank, world_size=world.size)(
                image, text, scale
            )
        loss.sum().backward()
        results[name] = (loss.item(), image.grad.numpy(), text.grad.numpy(), scale.grad.numpy())
    return results


def train_losses(world: World, stages: list[int], steps: int) -> dict[int, list[float]]:
    """Total losses (means over ranks) of a few real DeepSpeed steps in fp32, by ZeRO stage."""
    config = model_config("vit", "clip")
    results = {}
    for stage in stages:
        engine_config = EngineConfig(zero_stage=stage, precision="fp32", lr=1e-3, warmup_steps=3)
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        model = build_model(config, TOKENIZER, 0, world).train()
        engine = build_engine(model, engine_config, GLOBAL_BATCH, world)
        results[stage] = []
        for step in range(steps):
            set_learning_rate(engine, learning_rate(engine_config, step, steps))
            losses = compute_losses(LOSSES, engine(make_batch(config, step, world)), world)
            engine.backward(losses["total"])
            engine.step()
            results[stage].append(world.mean(losses["total"]).item())
        engine.destroy()
    return results

"""How much of the hardware is used: a sample's share of a step in floating-point operations, and what devices can do.

Shape legend: L text tokens, P match pairs, H/W pixels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_tools.errors import first_line
from pretrain.losses import LossesConfig
from pretrain.model.model import ImageTextModel
from pretrain.model.noise import PositionPatchDropout
from pretrain.world import World

# Dense bf16 peaks in TFLOP/s, from NVIDIA's data sheets; the first entry that the device's name holds counts.
PEAK_TFLOPS = {"A100": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250}
PAIRS = 3  # that the match head sees of each sample: the true one, one with a hard text, one with a hard image


class NotCountable(Exception):
    """A tower of another library needs values where there are shapes only."""


def count_flops(model: ImageTextModel, losses: LossesConfig) -> float:
    """FLOPs of one sample's training step: the matrix products of the forward pass, and twice that for the backward pass.
    Raises NotCountable.

    What is done twice to save memory or sending (checkpoints, micro-batches, texts encoded beside images) counts once, as is
    the custom for model FLOPs utilisation. Not counted: similarities, and the layer that predicts tokens, since how many there
    are depends on the captions. Nothing is computed: shapes alone go through the modules. Call it before DeepSpeed
    shards the weights.
    """
    training, fast = model.training, torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention, which the counter does not know
    for module in model.modules():
        if isinstance(module, PositionPatchDropout):
            module.train()  # what it drops is not computed
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
            return float(count_parts(model, losses))
    except Exception as error:  # whatever other people's code says of tensors without values
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise NotCountable(f"the FLOPs of this model cannot be counted from shapes: {reason}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        model.train(training)


def count_parts(model: ImageTextModel, losses: LossesConfig) -> int:
    size, length = model.config.image.image_size, model.config.text.context_length
    keys = model.sample_keys(torch.zeros(1, dtype=torch.int64))
    with FakeTensorMode(allow_non_fake_inputs=True):
        pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        ids, mask = torch.zeros(1, length, dtype=torch.int64), torch.ones(1, length, dtype=torch.bool)
        image, total = measure(model.image_tower, lambda: model.encode_image(pixels, keys))
        text, text_flops = measure(model.text_tower, lambda: model.encode_text(ids, mask))
        total += text_flops
        if losses.matching:
            texts, masks, rows = text.tokens.expand(PAIRS, -1, -1), mask.expand(PAIRS, -1), mask.new_zeros(PAIRS).long()
            total += measure(model.fusion, lambda: model.match_pairs(texts, masks, image.tokens, rows=rows))[1]
        if losses.captioning:
            if not model.text_tower.is_causal:
                total += measure(model.text_tower, lambda: model.text_tower.causal_tokens(ids, mask))[1]
            total += measure(model.fusion, lambda: model.fusion.decode(text.tokens, mask, image.tokens))[1]
        if losses.masked_language:
            total += text_flops + measure(model.fusion, lambda: model.fusion(text.tokens, mask, image.tokens))[1]
    return total


def measure(module: nn.Module, run: Callable[[], Any]) -> tuple[Any, int]:
    """What `run` returns, and its FLOPs in a step: three times those of its forward pass, or once if `module` is frozen."""
    with FlopCounterMode(display=False) as counter:
        result = run()
    trained = any(parameter.requires_grad for parameter in module.parameters())
    return result, counter.get_total_flops() * (3 if trained else 1)


def peak_tflops(device: torch.device) -> float | None:
    """What the device can do in bf16, or None for one of which it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def utilisation(flops: float, samples_per_s: float, peak: float, world: World) -> dict[str, float]:
    """Metrics of a rank's device at so many samples a second over all ranks; `peak` in TFLOP/s."""
    tflops = flops * samples_per_s / world.size / 1e12
    return {"rate/tflops_per_gpu": tflops, "rate/mfu": tflops / peak}

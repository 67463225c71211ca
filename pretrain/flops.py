"""How much of the hardware is used: a sample's share of a step in floating-point operations, and what devices can do.

Shape legend: G global batch, K columns to compare with, E embedding.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_tools.errors import first_line
from pretrain.contract import Batch, TeacherOutput
from pretrain.losses import LossesConfig
from pretrain.model.blocks import without_checkpoints
from pretrain.model.language import embedding_matrix
from pretrain.model.model import ImageTextModel
from pretrain.model.noise import PositionPatchDropout
from pretrain.world import World

# Dense bf16 peaks in TFLOP/s, from NVIDIA's data sheets; the first entry that the device's name holds counts.
PEAK_TFLOPS = {"A100": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250}
PAIRS = 3  # that the match head sees of each sample: the true one, one with a hard text, one with a hard image


class NotCountable(Exception):
    """A tower of another library needs values where there are shapes only."""


class Flops(NamedTuple):
    """What a training step takes of floating-point operations."""

    sample: float  # for a sample, but for what follows
    token: float = 0.0  # and for each token of it that is to be predicted: the head, over the whole vocabulary

    def of_sample(self, tokens: float = 0.0) -> float:
        """With so many tokens to predict."""
        return self.sample + self.token * tokens


def count_flops(
    model: ImageTextModel, losses: LossesConfig, teacher: Callable[[Batch], TeacherOutput] | None = None
) -> Flops:
    """FLOPs of a training step: the matrix products of the forward pass, and of the backward pass those by which a weight
    that is trained gets its gradient, or what comes before it. Raises NotCountable.

    So what is frozen counts once, or twice where something trained comes before it; momentum towers and `teacher` (that of
    `losses.distill`) count once. What is done twice to save memory or sending (checkpoints, micro-batches, texts encoded
    beside images) counts once, as is the custom for model FLOPs utilisation. Padding counts, since it is computed.

    Not counted: similarities. With G columns (the global batch) those of the contrastive loss take 12 G E a sample, and with
    K columns (queue and global batch) those of the momentum loss 16 K E.

    Nothing of the model is computed: shapes alone go through its modules, there and back. The teacher reads one sample. Call
    it before DeepSpeed shards the weights, and for a model in training, which may drop patches.
    """
    training, fast = model.training, torch.backends.mha.get_fastpath_enabled()
    dropping = [module for module in model.modules() if isinstance(module, PositionPatchDropout) and module.training]
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention, which the counter does not know
    try:
        with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), without_checkpoints(model):
            beside = count_teacher(model, teacher) if teacher else 0
            with FakeTensorMode(allow_non_fake_inputs=True):
                if losses.momentum:
                    beside += count_momentum(model)
                for module in dropping:
                    module.train()  # what it drops is not computed
                sample, token = count_model(model, losses)
            return Flops(float(beside + sample), float(token))
    except Exception as error:  # whatever other people's code says of tensors without values
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise NotCountable(f"the FLOPs of this model cannot be counted from shapes: {reason}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        model.train(training)


def count_model(model: ImageTextModel, losses: LossesConfig) -> tuple[int, int]:
    """Of a sample, with what all its losses but those of embeddings add; and of each token to predict."""
    batch = empty_sample(model)
    keys = model.sample_keys(torch.zeros(1, dtype=torch.int64))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    fused = []
    with FlopCounterMode(display=False) as counter:
        image, text = model.encode_image(batch.image, keys), model.encode_text(batch.ids, batch.mask)
        outputs = [image.pooled, text.pooled]
        if losses.matching:
            texts, masks = text.tokens.expand(PAIRS, -1, -1), batch.mask.expand(PAIRS, -1)
            rows = batch.ids.new_zeros(PAIRS)
            outputs.append(model.match_pairs(texts, masks, image.tokens, rows=rows))
        if losses.captioning:
            causal = model.text_tower.is_causal
            tokens = text.tokens if causal else model.text_tower.causal_tokens(batch.ids, batch.mask)
            fused.append((model.caption_head, model.fusion.decode(tokens, batch.mask, image.tokens)))
        if losses.masked_language:
            tokens = model.text_tower(batch.ids, batch.mask).tokens  # read once more, in part masked
            tokens = model.fusion(tokens, batch.mask, image.tokens).tokens[:, : batch.ids.shape[1]]
            fused.append((model.masked_head, tokens))
        run_back(outputs + [tokens for _, tokens in fused], weights)
    if not fused:
        return counter.get_total_flops(), 0
    head, tokens = fused[0]  # both heads are of one shape
    token = tokens[0, :1].detach().requires_grad_(tokens.requires_grad)
    with FlopCounterMode(display=False) as head_counter:
        run_back([head(token.clone(), embedding_matrix(model.text_tower.embedding))], [token, *weights])
    return counter.get_total_flops(), head_counter.get_total_flops()


def run_back(outputs: list[Tensor], leaves: list[Tensor]) -> None:
    """The backward pass from all `outputs` to the leaves that are trained."""
    ends, leaves = ([tensor for tensor in some if tensor.requires_grad] for some in (outputs, leaves))
    if ends and leaves:
        torch.autograd.grad([end.sum() for end in ends], leaves, allow_unused=True)


@torch.no_grad()
def count_momentum(model: ImageTextModel) -> int:
    """Of both towers as they are in evaluation."""
    batch = empty_sample(model)
    with FlopCounterMode(display=False) as counter:
        model.encode_image(batch.image), model.encode_text(batch.ids, batch.mask)
    return counter.get_total_flops()


def count_teacher(model: ImageTextModel, teacher: Callable[[Batch], TeacherOutput]) -> int:
    with FlopCounterMode(display=False) as counter:
        teacher(empty_sample(model).to(model.world.device))
    return counter.get_total_flops()


def empty_sample(model: ImageTextModel) -> Batch:
    """One pair, its text without padding."""
    size, length, none = model.config.image.image_size, model.config.text.context_length, torch.zeros(1).long()
    image, ids = torch.zeros(1, 3, size, size, dtype=torch.uint8), torch.zeros(1, length, dtype=torch.int64)
    return Batch(image, ids, torch.ones_like(ids).bool(), none, none, none[:, None], np.zeros(1, np.int64), [""])


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

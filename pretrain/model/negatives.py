"""Hard negatives for matching, drawn over the global batch.

Shape legend: B pairs per rank, G = B x world.
"""

import torch
from torch import Tensor

from pretrain.contract import Batch
from pretrain.world import World


def find_true_pairs(batch: Batch, world: World) -> tuple[Tensor, Tensor]:
    """Which pairs belong together, and so must never be taken as negatives. Collective.

    An image and a text do where the text is one of the image's captions, the drawn one or not, and where both were drawn
    for the same picture.

    Returns: own images with all texts [B,G] bool, own texts with all images [B,G] bool.
    """
    same_picture = batch.image_id[:, None] == world.all_gather(batch.image_id)
    with_text = (batch.true_text_id[:, :, None] == world.all_gather(batch.text_id)).any(1)
    with_image = (batch.text_id[:, None, None] == world.all_gather_padded(batch.true_text_id)).any(-1)
    return same_picture | with_text, same_picture | with_image


def draw_negatives(scores: Tensor, true_pairs: Tensor, uniform: Tensor, random_share: float) -> tuple[Tensor, Tensor]:
    """Draw one column a row, hard with probability 1 - `random_share`, else any: never one of the true pairs.

    The hard part is softmax(scores). The even part keeps every candidate possible, however small its softmax, and lets
    matching learn before the similarities mean much, and what the hardest negatives alone do not teach.

    Args:    scores [B,G] (scaled similarities), true_pairs [B,G] bool, uniform [B] float64 in [0,1), one draw a row.
    Returns: columns [B] int64, and [B] bool, False where a row had no candidate (its column is then meaningless).
    Source:  ALBEF, arXiv:2107.07651, section 3.2, which draws hard ones only.
    """
    scores = scores.detach().double().masked_fill(true_pairs, float("-inf"))
    candidates = (~true_pairs).double()
    hard = scores.softmax(dim=1).masked_fill(true_pairs, 0)
    weights = (1 - random_share) * hard + random_share * candidates / candidates.sum(dim=1, keepdim=True).clamp(min=1)
    cumulative = weights.cumsum(dim=1)
    total = cumulative[:, -1:]
    columns = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    return columns[:, 0].clamp(max=scores.shape[1] - 1), total[:, 0] > 0

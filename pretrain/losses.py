"""The training objectives, each a function of (its config, ModelOutput, World); chosen and weighted in the config.

Every loss returns this rank's part such that the mean over ranks is the loss of the global batch, and the mean over ranks
of its gradients is the gradient of that. Losses own no parameters and call no modules.

Shape legend: B pairs per rank, G = B x world, E embedding, P match pairs.
"""

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config import ConfigModel
from pretrain.contract import ModelOutput
from pretrain.world import World


class ContrastiveConfig(ConfigModel):
    weight: float = pydantic.Field(default=1.0, ge=0)


class MatchingConfig(ConfigModel):
    weight: float = pydantic.Field(default=1.0, ge=0)


class LossesConfig(ConfigModel):
    """The losses that are on, each with its weight in the sum."""

    contrastive: ContrastiveConfig | None = ContrastiveConfig()
    matching: MatchingConfig | None = None


def contrastive_loss(config: ContrastiveConfig, output: ModelOutput, world: World) -> Tensor:
    """Symmetric InfoNCE of own rows against the global batch, both ways, with gradients to every rank's embeddings.

    Shapes:  image_embed [B,E], text_embed [B,E], logit_scale [1]; logits [B,G].
    Returns: scalar [], nats a pair.
    Source:  CLIP, arXiv:2103.00020, section 2.3.
    """
    image, text = output.image_embed, output.text_embed
    labels = torch.arange(len(image), device=image.device) + world.rank * len(image)
    text_logits = output.logit_scale * image @ world.all_gather(text).T
    image_logits = output.logit_scale * text @ world.all_gather(image).T
    return (F.cross_entropy(text_logits, labels) + F.cross_entropy(image_logits, labels)) / 2


def matching_loss(config: MatchingConfig, output: ModelOutput, world: World) -> Tensor:
    """Cross-entropy over matched and mismatched pairs, mean over the global batch.

    Shapes:  match_logits [P,2], match_labels [P] (1 = matched), match_weight [P] (0 = does not count).
    Returns: scalar [], nats a pair.
    Source:  ALBEF, arXiv:2107.07651, image-text matching.
    """
    losses = F.cross_entropy(output.match_logits, output.match_labels, reduction="none")
    count = world.mean(output.match_weight.sum())  # the mean of the ranks' sums over this is the global mean
    return (losses * output.match_weight).sum() / count


LOSSES = {"contrastive": contrastive_loss, "matching": matching_loss}


def compute_losses(config: LossesConfig, output: ModelOutput, world: World) -> dict[str, Tensor]:
    """This rank's part of each loss that is on, by name, and `total`, their weighted sum: scalars [], nats a pair."""
    active = {name: getattr(config, name) for name in LOSSES if getattr(config, name)}
    losses = {name: LOSSES[name](settings, output, world) for name, settings in active.items()}
    losses["total"] = sum(settings.weight * losses[name] for name, settings in active.items())
    return losses

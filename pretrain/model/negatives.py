"""Hard negatives for matching, drawn over the global batch, at the memory of the local one.

Embeddings and token ids of all ranks are gathered, a few kilobytes a sample; image tokens and text tokens never are. Every
match pair is computed on the rank and in the micro-batch where its image lives, and its text is encoded there anew from
its ids. Both sides get their exact gradients where they are computed; nothing has to be sent back.

Shape legend: B pairs of this rank, G = B x world, M pairs of a micro-batch, C captions of a picture, L text tokens,
T texts to encode anew, P = M + T match pairs of a micro-batch.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.contract import Batch, Identity
from pretrain.randomness import uniform
from pretrain.world import World

MAX_SCORES = 2**22  # elements of one block of similarities while drawing: 32 MiB in float64


class MatchPairs(NamedTuple):
    """The pairs of one micro-batch, of the same shapes on every rank: in this order, each image with its own text [M],
    each image with a hard text [M], and the texts of all ranks that drew one of these images [T-M, padded]."""

    incoming: Tensor  # [T-M] int64 rows of the micro-batch: the images that were drawn
    text: Tensor  # [T] int64 rows of the global batch: the texts that are not the images' own
    ids: Tensor  # [T,L] int64, of those texts
    mask: Tensor  # [T,L] bool
    text_position: Tensor  # [T] int64
    labels: Tensor  # [P] int64, 1 = a true pair
    all_own: bool  # the micro-batch is the global batch: every text is one of its own, encoded already
    weight: Tensor  # [P] 0 for padding and where no negative could be drawn; else world / pairs of the global batch


@dataclass
class MatchPlan:
    """Who meets whom in the global batch, the same for every world size and every number of micro-batches."""

    first: int  # row of the global batch that is this rank's first
    hard_text: np.ndarray  # [G] the text drawn for each image, -1 where there was no candidate
    hard_image: np.ndarray  # [G] the image drawn for each text, -1 where there was no candidate
    weight: float  # of each pair
    ids: Tensor  # [G,L] int32
    mask: Tensor  # [G,L] bool
    position: Tensor  # [G] int64

    def pairs(self, start: int, stop: int) -> MatchPairs:
        """The pairs of this rank's rows [start, stop), one of its micro-batches of equal size."""
        size = stop - start
        first = self.first + start
        own = np.arange(first, first + size)
        hard_text = self.hard_text[own]
        drawn = self.hard_image[self.hard_image >= 0]
        # Every micro-batch of every rank takes as many texts as the one that was drawn most, so that all call the same
        # modules with the same shapes. Rounded up, so that these shapes are few.
        widest = int(np.bincount(drawn // size).max(initial=0))
        step = -(-size // 8)
        padded = -(-widest // step) * step
        incoming = np.flatnonzero((self.hard_image >= first) & (self.hard_image < first + size))
        padding = np.full(padded - len(incoming), first)
        image = np.concatenate([self.hard_image[incoming], padding]) - first
        text = np.concatenate([np.where(hard_text < 0, own, hard_text), incoming, padding])
        labels = (np.arange(size + len(text)) < size).astype(np.int64)
        counts = np.ones(len(labels))
        counts[size : 2 * size] = hard_text >= 0
        counts[2 * size + len(incoming) :] = 0
        device = self.ids.device
        text = torch.from_numpy(text).to(device)
        return MatchPairs(
            incoming=torch.from_numpy(image).to(device),
            text=text,
            ids=self.ids[text].long(),
            mask=self.mask[text],
            text_position=self.position[text],
            labels=torch.from_numpy(labels).to(device),
            all_own=size == len(self.ids),
            weight=torch.from_numpy(counts * self.weight).to(device),
        )


def plan_matches(
    batch: Batch, image: Tensor, text: Tensor, logit_scale: Tensor, seed: int, random_share: float, world: World
) -> MatchPlan:
    """Draw a hard text for every image and a hard image for every text of the global batch. Collective.

    Args: this rank's whole batch, its unit embeddings [B,E], the factor [1] of their similarities, the run's seed, and the
          share of the draws that is not hard.
    """
    with torch.no_grad():
        own, everyone = batch.identity, gather_identity(batch.identity, world)
        draws = [
            torch.from_numpy(uniform(seed, purpose, batch.position)).to(image.device)
            for purpose in ("hard text", "hard image")
        ]
        all_image, all_text = world.all_gather(image), world.all_gather(text)
        drawn = torch.empty(len(image), 2, dtype=torch.int64, device=image.device)
        block = max(1, MAX_SCORES // len(all_image))
        for start in range(0, len(image), block):
            rows = slice(start, start + block)
            true_pairs = find_true_pairs(own.rows(start, start + block), everyone)
            for side, (one, other) in enumerate(((image, all_text), (text, all_image))):
                scores = logit_scale * one[rows] @ other.T
                columns, found = draw_negatives(scores, true_pairs[side], draws[side][rows], random_share)
                drawn[rows, side] = columns.where(found, -1)
        hard_text, hard_image = world.all_gather(drawn).cpu().numpy().T
        position = torch.from_numpy(batch.position.astype(np.int64)).to(image.device)
        return MatchPlan(
            first=world.rank * len(image),
            hard_text=hard_text,
            hard_image=hard_image,
            weight=world.size / (len(hard_text) + (hard_text >= 0).sum() + (hard_image >= 0).sum()),
            ids=world.all_gather(batch.ids.int()),
            mask=world.all_gather(batch.mask),
            position=world.all_gather(position),
        )


def gather_identity(own: Identity, world: World) -> Identity:
    """The identity of the global batch: [G], [G] and [G, greatest C]. Collective."""
    return Identity(
        world.all_gather(own.image_id), world.all_gather(own.text_id), world.all_gather_padded(own.true_text_id)
    )


def find_true_pairs(rows: Identity, columns: Identity) -> tuple[Tensor, Tensor]:
    """Which pairs belong together, and so must never be taken as negatives.

    An image and a text do where the text is one of the image's captions, the drawn one or not, and where both were drawn
    for the same picture.

    Returns: the rows' images with the columns' texts, and the rows' texts with the columns' images: [rows,columns] bool.
    """
    images_with_texts = rows.image_id[:, None] == columns.image_id
    texts_with_images = images_with_texts.clone()
    for true_text_id in rows.true_text_id.T:  # one after the other: no [rows,captions,columns]
        images_with_texts |= true_text_id[:, None] == columns.text_id
    for true_text_id in columns.true_text_id.T:
        texts_with_images |= rows.text_id[:, None] == true_text_id
    return images_with_texts, texts_with_images


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

"""The proof of an export: reloaded by its own library, it gives what the run gives, for pictures and for texts.

Shape legend: n pictures or texts, E embedding, L text tokens, P match pairs, S the side that the model takes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_tools.errors import UserError
from data_tools.shards import Manifest, ShardReader
from pretrain.data.decode import BadSample, decode_image, eval_crop
from pretrain.data.loader import find_picture, read_captions
from pretrain.model.towers import unit
from pretrain.randomness import generator
from pretrain.restore import LoadedRun
from pretrain.train import RunConfig

TOLERANCE = 1e-4  # of embeddings, logits and scale, in fp32; other kernels for the same arithmetic give about 1e-6
PIXEL_TOLERANCE = 4.0  # of 255; Pillow's bicubic and torch's differ by up to 2; another filter, crop or mean by tens

REAL_SAMPLES = 8
SENTENCES = (
    "a photo of a dog",
    "Two children play football in the park!",
    "the cat's asleep, isn't it?",
    "A man in a red (size 42) shirt rides his bike downhill; 3 others follow.",
    "crème brûlée in a café at 7:30",
    "a very long caption " * 40,
)


@dataclass(frozen=True)
class Reloaded:
    """An export as its own library loads it. `clean` gives the text that library and run read alike.

    `tokenize`'s mask is the one that the text tower applies, or None for a tower that needs none.
    """

    library: str  # name and version
    tokenize: Callable[[list[str]], tuple[Tensor, Tensor | None]]  # -> ids [n,L], mask [n,L] bool
    preprocess: Callable[[Image.Image], Tensor]  # -> [3,S,S], normalised
    embed_images: Callable[[Tensor], Tensor]  # [n,3,S,S] uint8 -> [n,E] unit norm
    embed_texts: Callable[[list[str]], Tensor]  # -> [n,E] unit norm
    logit_scale: float
    logit_bias: float | None = None  # for a library that has one
    clean: Callable[[str], str] = str
    rounds_crop_down: bool = False  # the corner of the centre crop; the run rounds halves to even
    match_logits: Callable[[Tensor, list[str]], Tensor] | None = None  # pairs of [P,3,S,S] uint8 and texts -> [P,2]


@dataclass(frozen=True)
class Probes:
    """What both sides are shown: drawn pictures and our own sentences, and some of the run's pairs if still there."""

    drawn: list[np.ndarray]  # [H,W,3] uint8
    sentences: list[str]
    real: list[np.ndarray]
    captions: list[str]
    dataset: str  # name of the run's data

    @property
    def pictures(self) -> list[np.ndarray]:
        return self.drawn + self.real

    @property
    def texts(self) -> list[str]:
        return self.sentences + self.captions


@dataclass
class Comparison:
    """What has been compared so far, a line each. `out` is where the export is to lie; errors name it."""

    library: str
    out: Path
    lines: list[str] = field(default_factory=list)

    def check(self, what: str, ours: Tensor, theirs: Tensor, limit: float, over: str) -> None:
        """Note the largest absolute difference. Raises UserError if it is above `limit`, or not a number."""
        difference = largest_difference(ours, theirs)
        self.lines.append(f"{what}: largest difference {difference:.3g} over {over}")
        if not difference <= limit:
            raise UserError(
                f"{self.out}: not written: after reloading with {self.library}, {self.lines[-1]}, where at most "
                f"{limit:g} is allowed"
            )


def build_probes(config: RunConfig) -> Probes:
    """The same drawn pictures for the same image size; the run's own pairs only where its shards still lie."""
    size = config.model.image.image_size
    shapes = [(2 * size, 2 * size + 16), (3 * size + 24, 3 * size), (size, size + 4), (size // 2 + 1, size // 2 + 1)]
    drawn = [draw_picture(*shape, generator(0, "export", place)) for place, shape in enumerate(2 * shapes)]
    found = (read_real(entry.path) for entry in config.data.entries())
    real, captions = next((pairs for pairs in found if pairs[1]), ([], []))
    return Probes(drawn, list(SENTENCES), real, captions, config.data.names)


def draw_picture(height: int, width: int, draw: np.random.Generator) -> np.ndarray:
    """[H,W,3] uint8: smooth random colours and some grain, away from black and white as resizing clips there."""
    colours = Image.fromarray(draw.integers(64, 192, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(colours.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return (smooth + draw.integers(-16, 17, smooth.shape)).clip(0, 255).astype(np.uint8)


def read_real(path: str) -> tuple[list[np.ndarray], list[str]]:
    """A few pictures of the shards at `path`, each with its first caption; none where there are no such shards."""
    try:
        reader = ShardReader(Manifest.load(path))
    except UserError:
        return [], []
    pictures, captions = [], []
    for index in np.unique(np.linspace(0, len(reader) - 1, REAL_SAMPLES, dtype=int)):
        try:
            fields = reader.read(int(index)).fields
            picture, caption = decode_image(find_picture(fields)), read_captions(fields)[0]
        except (UserError, BadSample):
            continue
        pictures.append(picture)
        captions.append(caption)
    return pictures, captions


@torch.no_grad()
def compare(source: LoadedRun, reloaded: Reloaded, probes: Probes, out: Path) -> Comparison:
    """Show both sides the same. Raises UserError, naming `out`, at the first that differs by too much."""
    comparison, model = Comparison(reloaded.library, out), source.model
    pixels = torch.stack([eval_crop(picture, source.config.model.image.image_size) for picture in probes.pictures])
    texts = [reloaded.clean(text) for text in probes.texts]
    over_pictures, over_texts = f"{len(pixels)} pictures", f"{len(texts)} texts"

    ids, mask = source.tokenizer(texts)
    their_ids, their_mask = reloaded.tokenize(texts)
    comparison.check("token ids", ids, their_ids, 0, over_texts)
    if their_mask is not None:
        comparison.check("text mask", mask, their_mask, 0, over_texts)
    compare_pixels(comparison, source, reloaded, probes)

    image, text = model.encode_image(pixels), model.encode_text(ids, mask)
    for what, ours, theirs, over in (
        ("image embeddings", unit(image.pooled), reloaded.embed_images(pixels), over_pictures),
        ("text embeddings", unit(text.pooled), reloaded.embed_texts(texts), over_texts),
        ("logit scale", model.logit_scale(), torch.tensor([reloaded.logit_scale]), "one number"),
    ):
        comparison.check(what, ours, theirs, TOLERANCE, over)
    if model.logit_bias and reloaded.logit_bias is not None:
        comparison.check("logit bias", model.logit_bias(), torch.tensor([reloaded.logit_bias]), TOLERANCE, "one number")
    if reloaded.match_logits and model.match_head:
        pairs = torch.arange(len(pixels) + len(texts))
        pictures, words = pairs % len(pixels), pairs % len(texts)
        ours = model.match_pairs(text.tokens[words], mask[words], image.tokens[pictures])
        theirs = reloaded.match_logits(pixels[pictures], [texts[place] for place in words])
        comparison.check("match logits", ours, theirs, TOLERANCE, f"{len(pairs)} pairs")

    if probes.captions:
        comparison.lines.append(
            f"{len(probes.real)} of the pictures and texts are from {probes.dataset}; "
            f"{count_different(source, reloaded, probes.captions)} of these texts, as they stand, are read otherwise"
        )
    else:
        comparison.lines.append(f"the run's data ({probes.dataset}) was not found: no real pictures and texts compared")
    return comparison


def compare_pixels(comparison: Comparison, source: LoadedRun, reloaded: Reloaded, probes: Probes) -> None:
    """Compare the evaluation transforms, in units of 1/255, where both crop at the same place.

    Real pictures are only told of: at hard edges between black and white, Pillow and torch clip overshoot at different
    stages of resizing and may differ by tens, in a few pixels.
    """
    image = source.config.model.image
    size, scale = image.image_size, torch.tensor(image.pixel_std)[:, None, None] * 255
    for kind, limit, pictures in (("drawn", PIXEL_TOLERANCE, probes.drawn), ("real", math.inf, probes.real)):
        same = [picture for picture in pictures if not (reloaded.rounds_crop_down and is_cropped_aside(picture, size))]
        if same:
            ours = torch.stack([image.normalise(eval_crop(picture, size)) for picture in same])
            theirs = torch.stack([reloaded.preprocess(Image.fromarray(picture)) for picture in same])
            over = f"{len(same)} {kind} pictures"
            comparison.check("preprocessed pixels, of 255", ours * scale, theirs * scale, limit, over)
        if len(same) < len(pictures):
            comparison.lines.append(f"{len(pictures) - len(same)} {kind} pictures are cropped one pixel to the side")


def is_cropped_aside(picture: np.ndarray, size: int) -> bool:
    """Whether the crop's corner lies elsewhere if halves are rounded down, not to even: for margins of 4k+3 pixels."""
    shorter, longer = sorted(picture.shape[:2])
    return (int(size * longer / shorter) - size) % 4 == 3


def count_different(source: LoadedRun, reloaded: Reloaded, captions: list[str]) -> int:
    """How many captions, as they stand, are read otherwise than in the run."""
    (ids, mask), (their_ids, their_mask) = source.tokenizer(captions), reloaded.tokenize(captions)
    different = (ids != their_ids).any(dim=1)
    if their_mask is not None:
        different |= (mask != their_mask).any(dim=1)
    return int(different.sum())


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference, infinite where the shapes differ."""
    if ours.shape != theirs.shape:
        return math.inf
    return (ours.double() - theirs.double()).abs().max().item()

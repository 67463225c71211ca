"""What training does to a picture: a crop, a flip, changes of shape and colour. All uint8, all drawn from (seed, position).

Each transform has a row of draws of its own, whether it is on or off, so that switching one does not change what the
others do. The order is crop, flip, policy, colour jitter, grey. Operations give what Pillow's give, hence open_clip's.

Shape legend: H/W pixels; S the side that the model takes.
"""

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pydantic
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from data_tools.errors import suggest
from pretrain.config import ConfigModel
from pretrain.data.decode import Box, cut_out, open_picture
from pretrain.randomness import uniform

_DRAWS = 48  # of each transform, enough for 10 attempts at a crop with 4 each
_CROP_ATTEMPTS = 10
_MOST_OPERATIONS = 16
_FILL = (128, 128, 128)  # of what a policy moves into the picture, as in the reference implementation

Probability = Annotated[float, pydantic.Field(ge=0, le=1)]
Share = Annotated[float, pydantic.Field(ge=0, le=1)]
Change = tuple[str, float]  # an operation and its amount


class ColorJitterConfig(ConfigModel):
    """Factors from 1 - x to 1 + x, hue turned by up to x of the circle either way, in random order. All or none.

    open_clip's `--aug-cfg color_jitter="(0.32,0.32,0.32,0.08)" color_jitter_prob=0.8` is brightness, contrast,
    saturation, hue and probability.
    """

    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0
    hue: float = pydantic.Field(default=0.0, ge=0, le=0.5)
    probability: Probability = 0.8


class RandAugmentConfig(ConfigModel):
    """`count` operations in turn, each any of `operations` at `magnitude`, either way where it has two ways.

    Magnitudes go from 0 to 10, as timm, ALBEF and BLIP count them; torchvision's 9 of 31 steps are 3 here.
    Source: RandAugment, arXiv:1909.13719; ranges as in torchvision.
    """

    kind: Literal["rand_augment"]
    count: int = pydantic.Field(default=2, ge=1, le=_MOST_OPERATIONS)
    magnitude: float = pydantic.Field(default=9.0, ge=0, le=10)
    operations: list[str] = pydantic.Field(default_factory=lambda: list(RAND_AUGMENT), min_length=1)

    @pydantic.field_validator("operations")
    @classmethod
    def check_operations(cls, names: list[str]) -> list[str]:
        unknown = [name for name in names if name not in RAND_AUGMENT]
        if unknown:
            name = unknown[0]
            near = suggest(name, list(RAND_AUGMENT))
            raise ValueError(f"unknown operation '{name}'.{near} Valid: {', '.join(RAND_AUGMENT)}")
        return names


class AugmentConfig(ConfigModel):
    """How a picture is cropped and changed in training; the defaults are open_clip's.

    `mode`: random_resized_crop; center_crop, the middle square; squash, the whole picture. Each is resized to S x S.
    """

    mode: Literal["random_resized_crop", "center_crop", "squash"] = "random_resized_crop"
    crop_scale: list[float] = pydantic.Field(default=[0.9, 1.0], min_length=2, max_length=2)  # share of the area
    crop_ratio: list[float] = pydantic.Field(default=[3 / 4, 4 / 3], min_length=2, max_length=2)  # width / height
    flip: Probability = 0.0  # left to right: captions that say which side no longer hold
    color_jitter: ColorJitterConfig | None = None
    grey: Probability = 0.0
    policy: RandAugmentConfig | None = None

    @pydantic.field_validator("crop_scale")
    @classmethod
    def check_crop_scale(cls, scale: list[float]) -> list[float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(
                f"give the least and the greatest share of the area, 0 < least <= greatest <= 1; found {scale}"
            )
        return scale

    @pydantic.field_validator("crop_ratio")
    @classmethod
    def check_crop_ratio(cls, ratio: list[float]) -> list[float]:
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"give the least and the greatest width / height, 0 < least <= greatest; found {ratio}")
        return ratio


def train_pixels(encoded: bytes, size: int, augment: AugmentConfig, draws: "Draws") -> Tensor:
    """[3,S,S] uint8 of an encoded picture, channels last in memory. Safe in threads.

    The result depends on the arguments alone. Raises BadSample for bytes that are not a whole picture.
    """
    picture = open_picture(encoded)
    pixels = cut_out(picture, choose_box(picture.height, picture.width, augment, draws.crop), size)
    if draws.flip[0] < augment.flip:
        pixels = pixels[:, :, ::-1]
    changes = [*choose_operations(augment.policy, draws.policy), *choose_jitter(augment.color_jitter, draws.jitter)]
    if draws.grey[0] < augment.grey:
        changes.append(("saturation", 0.0))
    if changes:
        pixels = change(pixels.transpose(1, 2, 0), changes).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(1, 2, 0))).permute(2, 0, 1)


def change(pixels: np.ndarray, changes: list[Change]) -> np.ndarray:
    """[H,W,3] uint8, changed by one operation after the other."""
    pixels = np.ascontiguousarray(pixels)
    for name, amount in changes:
        pixels = OPERATIONS[name](pixels, amount)
    return pixels


# Draws: uniform numbers in [0, 1) to what is done


class Draws(NamedTuple):
    """[48] in [0, 1) for each transform."""

    crop: np.ndarray
    flip: np.ndarray
    policy: np.ndarray
    jitter: np.ndarray
    grey: np.ndarray


def draw(seed: int, positions: np.ndarray) -> list[Draws]:
    """Those of the samples at `positions` [n]. All at once: to set up a generator for each would take longer than to decode a
    small picture."""
    count = len(Draws._fields) * _DRAWS
    drawn = uniform(seed, "augment", np.asarray(positions)[:, None] * count + np.arange(count))
    return [Draws(*numbers) for numbers in drawn.reshape(-1, len(Draws._fields), _DRAWS)]


def choose_box(height: int, width: int, augment: AugmentConfig, draws: np.ndarray) -> Box:
    """The part of a picture of this size that is cut out. `draws`: [48] in [0, 1).

    Source: torchvision's RandomResizedCrop.
    """
    if augment.mode == "squash":
        return Box(0, 0, height, width)
    if augment.mode == "center_crop":
        return center_box(height, width, 1.0)
    least, greatest = augment.crop_ratio
    area, shapes, numbers = height * width, [math.log(least), math.log(greatest)], draws[: 4 * _CROP_ATTEMPTS].tolist()
    for attempt in range(0, 4 * _CROP_ATTEMPTS, 4):
        share, shape, down, across = numbers[attempt : attempt + 4]
        pixels, ratio = area * interpolate(augment.crop_scale, share), math.exp(interpolate(shapes, shape))
        box_width, box_height = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = int(down * (height - box_height + 1)), int(across * (width - box_width + 1))
            return Box(top, left, box_height, box_width)
    return center_box(height, width, min(max(width / height, least), greatest))


def center_box(height: int, width: int, ratio: float) -> Box:
    """The largest part in the middle whose width / height is `ratio`."""
    box_height = max(1, min(height, round(width / ratio)))
    box_width = max(1, min(width, round(height * ratio)))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def choose_operations(config: RandAugmentConfig | None, draws: np.ndarray) -> Iterator[Change]:
    """The operations of the policy. `draws`: [48] in [0, 1), two for each."""
    if config is None:
        return
    for which, sign in draws[: 2 * config.count].reshape(config.count, 2).tolist():
        name = config.operations[int(which * len(config.operations))]
        level = RAND_AUGMENT[name]
        magnitude = config.magnitude / 10
        yield name, level.amount(-magnitude if level.signed and sign < 0.5 else magnitude)


def choose_jitter(config: ColorJitterConfig | None, draws: np.ndarray) -> Iterator[Change]:
    """The operations of the colour jitter. `draws`: [48] in [0, 1): whether, then the order, then the amounts."""
    if config is None or draws[0] >= config.probability:
        return
    spreads = {
        "brightness": (1.0, config.brightness),
        "contrast": (1.0, config.contrast),
        "saturation": (1.0, config.saturation),
        "hue": (0.0, config.hue),
    }
    names = list(spreads)
    for place in np.argsort(draws[1:5]).tolist():
        middle, spread = spreads[names[place]]
        if spread:
            yield names[place], interpolate([middle - spread, middle + spread], float(draws[5 + place]))


def interpolate(ends: list[float], share: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * share


# Operations: [H,W,3] uint8 and an amount to [H,W,3] uint8


def keep(pixels: np.ndarray, _: float) -> np.ndarray:
    return pixels


def adjust_brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    return blend(np.float32(0), pixels, factor)


def adjust_contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    return blend(np.float32(int(make_grey(pixels).mean() + 0.5)), pixels, factor)


def adjust_saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    return blend(make_grey(pixels)[:, :, None].astype(np.float32), pixels, factor)


def adjust_sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    smooth = np.asarray(Image.fromarray(pixels).filter(ImageFilter.SMOOTH))
    return blend(smooth.astype(np.float32), pixels, factor)


def blend(base: np.ndarray | np.float32, pixels: np.ndarray, factor: float) -> np.ndarray:
    """`base` at a factor of 0, `pixels` at 1, and beyond them; truncated, as Pillow does."""
    mixed = base + np.float32(factor) * (pixels - base)
    return np.clip(mixed, 0, 255, out=mixed).astype(np.uint8)


def make_grey(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).convert("L"))


def turn_hue(pixels: np.ndarray, share: float) -> np.ndarray:
    """Turn the hue by `share` of the circle of colours."""
    hue, saturation, value = Image.fromarray(pixels).convert("HSV").split()
    hue = Image.fromarray(np.asarray(hue) + np.uint8(int(share * 255) % 256))  # wraps around, as a circle does
    return np.asarray(Image.merge("HSV", (hue, saturation, value)).convert("RGB"))


def posterize(pixels: np.ndarray, bits: float) -> np.ndarray:
    """Keep so many of the upper bits."""
    return pixels & np.uint8(256 - 2 ** (8 - int(bits)))


def solarize(pixels: np.ndarray, threshold: float) -> np.ndarray:
    """Invert from the threshold on."""
    return np.where(pixels < threshold, pixels, 255 - pixels)


def stretch_contrast(pixels: np.ndarray, _: float) -> np.ndarray:
    return np.asarray(ImageOps.autocontrast(Image.fromarray(pixels)))


def equalize(pixels: np.ndarray, _: float) -> np.ndarray:
    return np.asarray(ImageOps.equalize(Image.fromarray(pixels)))


def shear_x(pixels: np.ndarray, factor: float) -> np.ndarray:
    return move(pixels, (1, factor, 0, 0, 1, 0))


def shear_y(pixels: np.ndarray, factor: float) -> np.ndarray:
    return move(pixels, (1, 0, 0, factor, 1, 0))


def translate_x(pixels: np.ndarray, share: float) -> np.ndarray:
    """Move to the right, by a share of the width."""
    return move(pixels, (1, 0, -int(share * pixels.shape[1]), 0, 1, 0))


def translate_y(pixels: np.ndarray, share: float) -> np.ndarray:
    """Move down, by a share of the height."""
    return move(pixels, (1, 0, 0, 0, 1, -int(share * pixels.shape[0])))


def rotate(pixels: np.ndarray, degrees: float) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).rotate(degrees, fillcolor=_FILL))


def move(pixels: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    """Take each pixel from where (a x + b y + c, d x + e y + f) points."""
    image = Image.fromarray(pixels)
    return np.asarray(image.transform(image.size, Image.Transform.AFFINE, coefficients, fillcolor=_FILL))


OPERATIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "identity": keep,
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "sharpness": adjust_sharpness,
    "hue": turn_hue,
    "posterize": posterize,
    "solarize": solarize,
    "autocontrast": stretch_contrast,
    "equalize": equalize,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": rotate,
}


class Level(NamedTuple):
    """What an operation of a policy takes for a magnitude from 0 to 1, or from -1 where it is `signed`."""

    amount: Callable[[float], float]
    signed: bool


RAND_AUGMENT = {
    "identity": Level(lambda magnitude: 0.0, False),
    "shear_x": Level(lambda magnitude: 0.3 * magnitude, True),
    "shear_y": Level(lambda magnitude: 0.3 * magnitude, True),
    "translate_x": Level(lambda magnitude: 150 / 331 * magnitude, True),
    "translate_y": Level(lambda magnitude: 150 / 331 * magnitude, True),
    "rotate": Level(lambda magnitude: 30 * magnitude, True),
    "brightness": Level(lambda magnitude: 1 + 0.9 * magnitude, True),
    "saturation": Level(lambda magnitude: 1 + 0.9 * magnitude, True),
    "contrast": Level(lambda magnitude: 1 + 0.9 * magnitude, True),
    "sharpness": Level(lambda magnitude: 1 + 0.9 * magnitude, True),
    "posterize": Level(lambda magnitude: 8 - round(4 * magnitude), False),
    "solarize": Level(lambda magnitude: 255 * (1 - magnitude), False),
    "autocontrast": Level(lambda magnitude: 0.0, False),
    "equalize": Level(lambda magnitude: 0.0, False),
}

"""Encoded picture bytes to uint8 pixels of the training size. Safe in threads: no state, and the GIL is released.

Shape legend: H/W pixels; S the side that the model takes.
"""

import io
import math

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MAX_PIXELS = 89_000_000  # as Pillow's own warning of decompression bombs


class BadSample(Exception):
    """A sample whose bytes cannot be used; its text says why."""


def decode_image(encoded: bytes) -> np.ndarray:
    """[H,W,3] uint8 RGB. Raises BadSample for bytes that are not a whole picture.

    JPEG goes through libjpeg-turbo; PNG, WebP and CMYK JPEG through Pillow.
    """
    if encoded[:2] == b"\xff\xd8":
        try:
            height, width, colours = simplejpeg.decode_jpeg_header(encoded)[:3]
            check_size(width, height)
            if colours in ("YCbCr", "Gray", "RGB"):
                return simplejpeg.decode_jpeg(encoded, colorspace="RGB")
        except ValueError as error:
            raise BadSample(f"not a whole JPEG: {error}") from None
    try:
        picture = Image.open(io.BytesIO(encoded))
        check_size(*picture.size)
        return np.array(picture.convert("RGB"))
    except Image.UnidentifiedImageError:
        raise BadSample("not a picture of a known format") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample(f"not a readable picture: {error}") from None


def check_size(width: int, height: int) -> None:
    """Refuse, by the header alone, what would not fit into memory. Raises BadSample."""
    if width * height > MAX_PIXELS:
        raise BadSample(f"{width} x {height} pixels; at most {MAX_PIXELS:,} are decoded")


def train_crop(image: np.ndarray, size: int, scale: list[float], flip: bool, generator: np.random.Generator) -> Tensor:
    """[3,S,S] uint8: a random resized crop, flipped half of the time if `flip`.

    Args:  scale = least and greatest share of the picture's area; the aspect ratio varies from 3/4 to 4/3.
    Source: torchvision's RandomResizedCrop, with the draws from `generator`.
    """
    top, left, height, width = draw_crop(image.shape[0], image.shape[1], scale, generator)
    crop = resize(to_tensor(image[top : top + height, left : left + width]), size, size)
    return crop.flip(-1) if flip and generator.random() < 0.5 else crop


def draw_crop(height: int, width: int, scale: list[float], generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height, width in pixels."""
    for _ in range(10):
        area = height * width * generator.uniform(*scale)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(generator.integers(0, height - crop_height + 1))
            left = int(generator.integers(0, width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width, crop_height = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def eval_crop(image: np.ndarray, size: int) -> Tensor:
    """[3,S,S] uint8: the shorter side resized to S, then the centre; open_clip's evaluation transform."""
    height, width = image.shape[:2]
    if height <= width:
        height, width = size, int(size * width / height)
    else:
        height, width = int(size * height / width), size
    resized = resize(to_tensor(image), height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resized[:, top : top + size, left : left + size]


def to_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """[3,H,W] uint8 -> [3,height,width] uint8, bicubic with antialiasing."""
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]

"""Encoded picture bytes to uint8 pixels of the training size. Safe in threads: no state, and the GIL is released.

A picture is upright, as its EXIF says. What only a colour profile tells is not applied, as in open_clip: shards that
`python -m data_tools build` wrote are in sRGB, but for JPEGs that kept their bytes.

Nothing here starts a thread: on processors with AVX2, torch resizes uint8 pixels in the thread that asks, and all else
is NumPy's. Other tensor operations on this many elements would each meet at a barrier of torch's own threads, which
costs milliseconds where decoding threads already use all cores.

Shape legend: H/W pixels; S the side that the model takes.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

MAX_PIXELS = 89_000_000  # as Pillow's own warning of decompression bombs
MAX_SCANS = 500  # of a JPEG: each can be a few bytes that cost a pass over the whole picture
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

_REDUCTIONS = (8, 4, 2)  # libjpeg-turbo has SIMD for these; its others (3/8, 5/8, ...) cost more than they save
_LEAST_OVERSAMPLING = 1.5
"""A reduced JPEG has so many times the pixels that are wanted, on either side.

libjpeg's reduction is a worse filter than ours, which takes out again what that one did wrong. Against full decoding of
the same part, photographs of about 470 x 390 come out at a PSNR of 47 dB (35 the worst of them) where a half is decoded,
46 (37) for a quarter; enlarged to 1,500 pixels, at 51 (44) for a quarter, 40 (31) for an eighth.
"""
_DAMAGED_JPEG = re.compile(
    r"premature end|bad Huffman code|instead of RST|\d{3,} extraneous bytes before marker 0xd9", re.IGNORECASE
)
"""What libjpeg-turbo says of damaged picture data: the last, that the picture was full long before its data ended.

It has other complaints, about files that any viewer shows whole.
"""
_START_OF_SCAN = b"\xff\xda"
_SCANS_MATTER_FROM = 10**11  # bytes x pixels: ten times the pixels that all its scans can go over
_ORIENTATION_TAG = 0x0112


class BadSample(Exception):
    """A sample whose bytes cannot be used; its text says why."""


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


class _Turn(NamedTuple):
    """What makes a stored picture upright: first rows become columns if `sideways`, then it is flipped."""

    sideways: bool
    flip_rows: bool
    flip_columns: bool


_UPRIGHT = _Turn(False, False, False)
_TURNS = {
    2: _Turn(False, False, True),
    3: _Turn(False, True, True),
    4: _Turn(False, True, False),
    5: _Turn(True, False, False),
    6: _Turn(True, False, True),
    7: _Turn(True, True, True),
    8: _Turn(True, True, False),
}
"""By the number of EXIF's orientation tag."""


@dataclass(frozen=True)
class Picture:
    """A picture of which no more has been decoded than was needed to know its size. Height and width are upright."""

    height: int
    width: int
    turn: _Turn
    encoded: bytes
    pixels: np.ndarray | None  # [H,W,3] uint8, upright: those of a picture that libjpeg-turbo does not decode


def open_picture(encoded: bytes) -> Picture:
    """Read the header of a JPEG; decode anything else. Raises BadSample for bytes that are not a whole picture.

    What libjpeg-turbo has doubts about goes through Pillow, as do PNG, WebP, GIF, BMP and CMYK JPEG: transparency on
    white, the first frame of an animation, 16 bits to the upper 8.
    """
    if encoded[:2] == b"\xff\xd8":
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        except (ValueError, KeyError):  # KeyError: a way to subsample for which simplejpeg has no name
            colours = ""
        if colours in ("YCbCr", "Gray", "RGB"):
            check_size(width, height)
            check_scans(encoded, width, height)
            turn = _TURNS.get(_read_jpeg_orientation(encoded), _UPRIGHT)
            if turn.sideways:
                height, width = width, height
            return Picture(height, width, turn, encoded, None)
    pixels = _decode_with_pillow(encoded)
    return Picture(pixels.shape[0], pixels.shape[1], _UPRIGHT, encoded, pixels)


def decode_image(encoded: bytes) -> np.ndarray:
    """[H,W,3] uint8 RGB, upright. Raises BadSample for bytes that are not a whole picture."""
    picture = open_picture(encoded)
    if picture.pixels is not None:
        return picture.pixels
    pixels = _decode_jpeg(encoded, 1)
    return _decode_with_pillow(encoded) if pixels is None else _turn(pixels, picture.turn)


def cut_out(picture: Picture, box: Box, size: int) -> np.ndarray:
    """[3,S,S] uint8, channels last in memory: the part `box` of the upright picture, resized. Raises BadSample for damaged
    pixels."""
    part, turn = decode_part(picture, box, size)
    return _turn(resize(part, size, size), turn, rows=1)


def decode_part(picture: Picture, box: Box, size: int) -> tuple[np.ndarray, _Turn]:
    """[h,w,3] uint8: the part `box` of the picture as stored, at least S pixels on either side if it has them, and the turn
    that makes it upright. Raises BadSample for damaged pixels.

    A JPEG of which `box` has at least 3 S pixels on either side is decoded at a half, a quarter or an eighth; the edges
    of `box` then move to the nearest whole pixel of the reduced picture, so by less than a third of a pixel of the result.
    Against the part as it was drawn, such a shift leaves 38 dB (28 the worst of the photographs).
    Neither simplejpeg nor the interface of libjpeg-turbo that it is built on decodes a part of a picture.
    """
    pixels, turn = picture.pixels, picture.turn
    if pixels is None:
        reduction = choose_reduction(box, size)
        pixels = _decode_jpeg(picture.encoded, reduction)
        if pixels is None:
            pixels, turn = _decode_with_pillow(picture.encoded), _UPRIGHT
            if pixels.shape[:2] != (picture.height, picture.width):
                raise BadSample("its decoders see different sizes")
        else:
            box = _reduce(_as_stored(box, picture), reduction, *pixels.shape[:2])
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width], turn


def eval_pixels(encoded: bytes, size: int) -> Tensor:
    """[3,S,S] uint8, open_clip's evaluation transform of an upright picture. Raises BadSample."""
    return eval_crop(decode_image(encoded), size)


def eval_crop(image: np.ndarray, size: int) -> Tensor:
    """[3,S,S] uint8 of [H,W,3]: the shorter side resized to S, then the centre; open_clip's evaluation transform.

    Raises BadSample for a picture so long and narrow that it would not fit into memory.
    """
    height, width = image.shape[:2]
    if height <= width:
        height, width = size, int(size * width / height)
    else:
        height, width = int(size * height / width), size
    check_size(width, height)
    resized = resize(image, height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return torch.from_numpy(np.ascontiguousarray(resized[:, top : top + size, left : left + size]))


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """[H,W,3] uint8 -> [3,height,width] uint8, bicubic with antialiasing. Its memory has the channels last, and is its own."""
    if pixels.shape[:2] == (height, width):
        return pixels.copy().transpose(2, 0, 1)
    # Contiguous with the channels last: of the layouts, torch reads this one without copying it in its own threads. Written into
    # the same layout, which F.interpolate does not keep, it takes two thirds of the time.
    image = torch.from_numpy(np.ascontiguousarray(pixels)[None]).permute(0, 3, 1, 2)
    resized = torch.empty(1, height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    torch.ops.aten._upsample_bicubic2d_aa.out(image, (height, width), False, out=resized)
    return resized[0].numpy()


def choose_reduction(box: Box, size: int) -> int:
    """By how much a JPEG can be reduced in decoding: 1, 2, 4 or 8."""
    enough = _LEAST_OVERSAMPLING * size
    return next((by for by in _REDUCTIONS if min(box.height, box.width) >= by * enough), 1)


def check_size(width: int, height: int) -> None:
    """Refuse, by the header alone, what would not fit into memory. Raises BadSample."""
    if width * height > MAX_PIXELS:
        raise BadSample(f"{width} x {height} pixels; at most {MAX_PIXELS:,} are decoded")


def check_scans(encoded: bytes, width: int, height: int) -> None:
    """Refuse a JPEG that would take minutes to decode. Raises BadSample."""
    # Searching them all would cost 4% of decoding: a scan takes 10 bytes, so that most pictures cannot have too many.
    if len(encoded) * width * height > _SCANS_MATTER_FROM and encoded.count(_START_OF_SCAN) > MAX_SCANS:
        raise BadSample(f"a JPEG of more than {MAX_SCANS} scans")


def _decode_jpeg(encoded: bytes, reduction: int) -> np.ndarray | None:
    """[ceil(H/reduction),ceil(W/reduction),3] as stored; None if libjpeg-turbo has doubts that Pillow may not have."""
    scale = {}
    if reduction > 1:
        height, width, _, _ = simplejpeg.decode_jpeg_header(encoded)
        scale = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)}
    try:
        return simplejpeg.decode_jpeg(encoded, "RGB", **scale)
    except ValueError as error:
        if _DAMAGED_JPEG.search(str(error)):
            raise BadSample(f"not a whole JPEG: {error}") from None
        return None


def _decode_with_pillow(encoded: bytes) -> np.ndarray:
    """[H,W,3] uint8, upright, on white where it is transparent. Raises BadSample."""
    with _decoding():
        picture = Image.open(io.BytesIO(encoded), formats=FORMATS)
    check_size(*picture.size)
    if picture.format in ("JPEG", "MPO"):
        check_scans(encoded, *picture.size)
    with _decoding():
        picture.load()  # before the EXIF, for which Pillow loads a PNG and then forgets the damage that it met
        pixels = np.array(_convert_to_rgb(picture))
    return _turn(pixels, _TURNS.get(_read_orientation(picture), _UPRIGHT))


@contextmanager
def _decoding() -> Iterator[None]:
    """What Pillow raises, raised as BadSample: its decoders answer to damaged files with almost any exception."""
    try:
        yield
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        raise BadSample("not a picture of a known format") from None
    except Exception as error:
        raise BadSample(f"not a readable picture: {type(error).__name__}: {error}") from None


def _convert_to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits of grey: convert() would clip them to 255 instead of scaling
        picture = Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8))
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, "white")
    return Image.composite(picture.convert("RGB"), white, picture.getchannel("A"))


def _read_jpeg_orientation(encoded: bytes) -> int:
    # Pillow's way to read it costs more than to see that there is none. A thumbnail with scans of its own is in the EXIF.
    end = encoded.find(_START_OF_SCAN)
    if encoded.find(b"Exif\0\0", 0, end) < 0 and encoded.find(b"tiff:Orientation", 0, end) < 0:
        return 1
    try:
        return _read_orientation(Image.open(io.BytesIO(encoded), formats=("JPEG",)))
    except Exception:
        return 1


def _read_orientation(picture: Image.Image) -> int:
    try:
        return picture.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:
        return 1  # broken EXIF does not make the picture a broken one


def _turn(pixels: np.ndarray, turn: _Turn, rows: int = 0) -> np.ndarray:
    """Make pixels upright whose axes `rows` and `rows` + 1 are those of the stored picture."""
    if turn == _UPRIGHT:
        return pixels
    if turn.sideways:
        pixels = pixels.swapaxes(rows, rows + 1)
    flipped = [rows] * turn.flip_rows + [rows + 1] * turn.flip_columns
    return np.ascontiguousarray(np.flip(pixels, flipped))


def _as_stored(box: Box, picture: Picture) -> Box:
    """Where a part of the upright picture lies in the stored one."""
    top, left, height, width = box
    if picture.turn.flip_rows:
        top = picture.height - top - height
    if picture.turn.flip_columns:
        left = picture.width - left - width
    return Box(left, top, width, height) if picture.turn.sideways else Box(top, left, height, width)


def _reduce(box: Box, by: int, height: int, width: int) -> Box:
    """`box` in a picture reduced to `height` x `width`, each edge at the nearest pixel."""
    top, left = round(box.top / by), round(box.left / by)
    bottom, right = min(height, round((box.top + box.height) / by)), min(width, round((box.left + box.width) / by))
    return Box(top, left, bottom - top, right - left)

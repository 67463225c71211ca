"""Picture files -> the JPEG, WebP or PNG that goes into a shard. Untrusted bytes: the header is checked before decoding.

JPEGs go through libjpeg-turbo and OpenCV, all else through Pillow. Only operations whose result does not depend on the
processor are used, since the same picture must become the same bytes on every host.

A JPEG that keeps its bytes, and about which nothing is unusual, needs no Pillow at all: `_copy_plain_jpeg` says of it
what the way through Pillow would say, sooner; all others take that way.
"""

import functools
import io
import math
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from data_tools.errors import UserError, suggest

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MODES = ("keep_ratio", "center_crop", "border", "squash", "no")
CHECKS = ("full", "structure")
OUTPUTS = {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}
"""The extension of a stored picture -> what Pillow calls its format."""
MAX_PIXELS = 89_000_000
MOST_MAX_PIXELS = 178_000_000
"""Pillow refuses pictures that are larger, whatever the policy says."""

_MAX_SIDE = {"jpg": 65_500, "webp": 16_383, "png": 2**31 - 1}
_MAX_SCANS = 500
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = tuple(_TRANSPOSE[orientation] for orientation in (5, 6, 7, 8))
_CORRUPT_JPEG = re.compile("premature end|bad Huffman code|instead of RST", re.IGNORECASE)
"""What libjpeg-turbo says of damaged picture data. It has other complaints, about files that any viewer shows whole."""
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_SEGMENT = struct.Struct(">BBH")
_FRAME = struct.Struct(">BHHB")
_SCAN, _COMMENT, _APPLICATION_DATA = 0xDA, 0xFE, range(0xE0, 0xF0)
_KEPT_APPLICATION_DATA = {0xE0: b"JFIF\0", 0xE2: b"ICC_PROFILE\0", 0xEE: b"Adobe"}
_LEAST_APPLICATION_BYTES = {0xE0: 16, 0xE2: 18, 0xEE: 16}
"""Of segments that Pillow reads: it takes a shorter one, of a known name, for damage."""
_KEPT_PNG_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"cICP", b"sBIT")
_KEPT_WEBP_CHUNKS = (b"VP8X", b"VP8 ", b"VP8L", b"ICCP")
_WEBP_METADATA_FLAGS = 0x0C
_PROFILE_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
_FAR = 4.5
"""Ratio from which on a picture is too large for the kernels below. A reduced JPEG has less than 4, or little more."""
_BLUR, _SHARPEN, _SHARPEN_RADIUS = 0.55, 0.75, 0.6
"""Found on photographs: nearer to Lanczos than averages over areas are (by 0.4 to 6 dB), less aliasing from 1.6 on."""


class PictureError(Exception):
    """A picture that cannot become a sample: `reason` is one of a few (to count by), `detail` is about this one."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason

    def __str__(self) -> str:
        return ": ".join(self.args)


@dataclass(frozen=True)
class ImagePolicy:
    """What pictures become, and which are refused. No mode ever makes a picture larger.

    `mode` says what `resize` (pixels, 0 keeps every size) limits: the shorter side (keep_ratio); the side of the
    middle square that is cut out (center_crop); the longer side, with white around it up to a square of that side
    (border); each side by itself (squash); nothing (no). `quality` is for jpg and webp, 1 to 100. Refused from the
    header: a shorter side under `min_size`, more than `max_pixels`, longer side / shorter side over `max_aspect` (0 is
    any). `check` is for JPEGs that keep their bytes: "full" decodes each (its coded data; at an eighth of the size), which
    finds damage that breaks the entropy coding; "structure" only those about whose segments, tables or restart markers
    anything is unusual, so that a file that was cut short is noticed, and damage in the midst of coded data is not.
    Raises UserError for values that make no sense.
    """

    resize: int = 256
    mode: str = "keep_ratio"
    format: str = "jpg"
    quality: int = 90
    min_size: int = 0
    max_pixels: int = MAX_PIXELS
    max_aspect: float = 0.0
    check: str = "full"

    def __post_init__(self) -> None:
        for name, valid in (("mode", MODES), ("format", tuple(OUTPUTS)), ("check", CHECKS)):
            value = getattr(self, name)
            if value not in valid:
                raise UserError(f"image {name} '{value}': unknown.{suggest(value, valid)} Valid: {', '.join(valid)}")
        limits = {
            "resize": (0, 65_500),
            "quality": (1, 100),
            "min_size": (0, 65_500),
            "max_pixels": (1, MOST_MAX_PIXELS),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise UserError(f"image {name} {value}: give a number from {least} to {most}")
        if not (self.max_aspect == 0 or 1 <= self.max_aspect < math.inf):
            raise UserError(f"image max_aspect {self.max_aspect}: give at least 1, or 0 to take every shape")


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded picture with its size in pixels, and the size that it had before.

    Both are as displayed, so after EXIF orientation. `extension` is jpg, webp or png.
    """

    data: bytes
    extension: str
    width: int
    height: int
    original_width: int
    original_height: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """Sizes (width, height) in pixels: of the middle part that is kept, what it is scaled to, and with its border."""

    kept: tuple[int, int]
    scaled: tuple[int, int]
    framed: tuple[int, int]


def prepare_picture(data: bytes, policy: ImagePolicy) -> Picture:
    """Make the picture for a shard as `policy` says: upright, RGB in sRGB, without metadata.

    A file of the output format that needs no change keeps its bytes, less any metadata but its colour profile. Others
    are decoded and encoded again: transparency on white, the first frame of an animation, turned as EXIF says.
    Raises PictureError for anything but a whole picture of a known format within the policy's limits. Damage in the
    middle of a JPEG is noticed where it breaks the entropy coding (but see `ImagePolicy.check`); a flipped bit may well
    leave another valid picture.
    """
    return _copy_plain_jpeg(data, policy) or _prepare_any(data, policy)


def _prepare_any(data: bytes, policy: ImagePolicy) -> Picture:
    with _decoding():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_header(image, data, policy)
        width, height = image.size
        plan = _plan(width, height, policy)
        if max(plan.framed) > _MAX_SIDE[policy.format]:
            raise PictureError(
                "too large for the format",
                f"{width} x {height}, the sides of a {policy.format} have at most {_MAX_SIDE[policy.format]}",
            )
        if not _is_jpeg(image):
            image.load()  # Pillow does so for the EXIF of a PNG, and then forgets the damage that it met
        turn = _TRANSPOSE.get(_read_orientation(image))
        if turn is None and plan.framed == (width, height):
            copy = _copy(image, data, policy)
            if copy is not None:
                return Picture(copy, policy.format, width, height, width, height)
        pixels, profile = _decode(image, data, plan)
    pixels = _shrink(_cut(pixels, plan.kept[0] / width, plan.kept[1] / height), plan.scaled)
    if profile is not None:
        pixels = np.asarray(_convert_to_srgb(Image.fromarray(pixels), profile))
    pixels = _frame(pixels, plan.framed)
    if turn is not None:
        pixels = np.asarray(Image.fromarray(pixels).transpose(turn))
    if turn in _SIDEWAYS:
        width, height = height, width
    return Picture(_encode(pixels, policy), policy.format, pixels.shape[1], pixels.shape[0], width, height)


@contextmanager
def _decoding() -> Iterator[None]:
    """Whatever a decoder raises, raised as a PictureError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (PictureError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise PictureError("not a picture", f"none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise PictureError("too many pixels", str(error)) from None
    except Exception as error:
        # Pillow's decoders answer to damaged files with almost any exception, from OSError to IndexError.
        raise PictureError("damaged picture", f"{type(error).__name__}: {error}") from None


def _is_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO")  # MPO: a JPEG with others behind it, as telephones make them


# From the header


def _check_header(image: Image.Image, data: bytes, policy: ImagePolicy) -> None:
    fault = _judge_size(*image.size, policy)
    if fault is not None:
        raise fault
    if "progressive" in image.info and _has_endless_scans(data):
        raise PictureError("damaged picture", f"a JPEG of more than {_MAX_SCANS} scans")


def _judge_size(width: int, height: int, policy: ImagePolicy) -> PictureError | None:
    """Why a picture of so many pixels is refused, or None."""
    if width * height > policy.max_pixels:
        reason, limit = "too many pixels", f"at most {policy.max_pixels} are decoded"
    elif min(width, height) < policy.min_size:
        reason, limit = "too small", f"the shorter side is to have at least {policy.min_size}"
    elif policy.max_aspect and max(width, height) > policy.max_aspect * min(width, height):
        reason, limit = "too long and narrow", f"at most {policy.max_aspect:g} : 1 is asked for"
    else:
        return None
    return PictureError(reason, f"{width} x {height}, {limit}")


def _has_endless_scans(data: bytes) -> bool:
    """Whether there are too many scans: each can be a few bytes that cost a pass over the whole picture."""
    return data.count(b"\xff\xda") > _MAX_SCANS


def _plan(width: int, height: int, policy: ImagePolicy) -> _Plan:
    size, limit = (width, height), policy.resize
    if policy.mode == "no" or limit == 0:
        return _Plan(size, size, size)
    if policy.mode == "squash":
        scaled = (min(width, limit), min(height, limit))
        return _Plan(size, scaled, scaled)
    if policy.mode == "center_crop":
        side = min(size)
        scaled = (min(side, limit),) * 2
        return _Plan((side, side), scaled, scaled)
    scale = min(1.0, limit / (max(size) if policy.mode == "border" else min(size)))
    scaled = (max(1, round(width * scale)), max(1, round(height * scale)))
    return _Plan(size, scaled, (limit, limit) if policy.mode == "border" else scaled)


def _read_orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:
        return 1  # broken EXIF does not make the picture a broken one


# From bytes to pixels: uint8 arrays [height, width, 3], RGB


def _decode(image: Image.Image, data: bytes, plan: _Plan) -> tuple[np.ndarray, bytes | None]:
    """The pixels, and the colour profile that they still have (one for RGB).

    A JPEG may come at 1/2, 1/4 or 1/8 of its size, at least twice what is needed: libjpeg's reduction is a worse filter
    than ours, which then takes out again what that one did wrong.
    """
    profile = image.info.get("icc_profile")
    if _is_jpeg(image):
        eighths = 8
        while eighths > 1 and all(
            side * eighths // 16 >= 2 * target for side, target in zip(plan.kept, plan.scaled, strict=True)
        ):
            eighths //= 2
        if image.mode == "RGB" or (image.mode == "L" and not profile):
            pixels = _decode_jpeg(image.size, data, eighths)
            if pixels is not None:
                return pixels, profile
        image.draft(None, (image.width * eighths // 8, image.height * eighths // 8))
    return np.asarray(_convert_to_rgb(image, profile)), None


def _decode_jpeg(size: tuple[int, int], data: bytes, eighths: int, colours: str = "RGB") -> np.ndarray | None:
    """Decode at `eighths` / 8 of the size; None if libjpeg-turbo has doubts that Pillow may not have."""
    width, height = size
    scale = {} if eighths == 8 else {"min_width": -(-width * eighths // 8), "min_height": -(-height * eighths // 8)}
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != (height, width):
            return None
        return simplejpeg.decode_jpeg(data, colours, **scale)
    except KeyError:  # a way to subsample for which simplejpeg has no name
        return None
    except ValueError as error:
        if _CORRUPT_JPEG.search(str(error)):
            raise PictureError("damaged picture", str(error)) from None
        return None


def _convert_to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The picture in sRGB, on white where it is transparent."""
    image.load()
    alpha = None
    if image.mode.startswith("I"):  # 16 bits of grey: convert() would clip them to 255 instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if image.mode not in _PROFILE_SPACES:
        image = image.convert("RGB")
    if profile:
        image = _convert_to_srgb(image, profile)
    image = image.convert("RGB")
    return image if alpha is None else Image.composite(image, Image.new("RGB", image.size, "white"), alpha)


def _convert_to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    transform = _load_transform(profile, image.mode)
    return image if transform is None else transform.apply(image)


@functools.lru_cache(maxsize=16)
def _load_transform(profile: bytes, mode: str) -> Any:
    """What leads from `profile` to sRGB; None where nothing has to be done, or can be with a broken or false profile."""
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _PROFILE_SPACES[mode]:
            return None
        if "sRGB" in (source.profile.profile_description or ""):
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception:
        return None  # as with broken EXIF


def _cut(pixels: np.ndarray, across: float, down: float) -> np.ndarray:
    """The middle part of a picture, as shares of its width and height."""
    height, width = pixels.shape[:2]
    kept_height, kept_width = max(1, round(height * down)), max(1, round(width * across))
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    return pixels[top : top + kept_height, left : left + kept_width]


def _shrink(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale down to `size` (width, height), antialiased: blur, interpolate linearly, sharpen back what that softened.

    Nearer to Lanczos than averaging over areas is, at less than half the cost. Each step is exact in integers or in
    float32 (`_SHARPEN` is a sum of powers of two for that), unlike OpenCV's cubic interpolation, whose result is another on each kind of processor.
    """
    if (pixels.shape[1], pixels.shape[0]) == size:
        return pixels
    ratios = [side / target for side, target in zip(pixels.shape[1::-1], size, strict=True)]
    if max(ratios) >= _FAR:  # only where there was no reduced decoding to do the most of it
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0))
    import cv2

    cv2.setNumThreads(1)  # parallel work is done in processes
    cv2.ipp.setUseIPP(False)
    if max(ratios) < 1.05 * min(ratios):
        ratios = [max(ratios)] * 2  # the same but for rounding: one kernel both ways is quicker
    sigmas = [_BLUR * math.sqrt(max(0.0, ratio**2 - 1)) for ratio in ratios]
    kernel = [2 * math.ceil(sigma) + 1 for sigma in sigmas]
    pixels = cv2.GaussianBlur(pixels, kernel, sigmas[0] or 1.0, sigmaY=sigmas[1] or 1.0)
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
    soft = cv2.GaussianBlur(pixels, [min(side, 3) for side in kernel], _SHARPEN_RADIUS)
    return cv2.addWeighted(pixels, 1 + _SHARPEN, soft, -_SHARPEN, 0)


def _frame(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The picture in the middle of a white one of `size` (width, height)."""
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    framed = np.full((size[1], size[0], 3), 255, np.uint8)
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    framed[top : top + height, left : left + width] = pixels
    return framed


def _encode(pixels: np.ndarray, policy: ImagePolicy) -> bytes:
    if policy.format == "jpg":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), policy.quality, "RGB", "420")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, OUTPUTS[policy.format], quality=policy.quality)
    return buffer.getvalue()


# Copies: the file's own bytes without its metadata


def _copy(image: Image.Image, data: bytes, policy: ImagePolicy) -> bytes | None:
    """The file as it may be stored, once it is known to be whole; None if it has to be encoded again."""
    format = policy.format
    modes = ("RGB", "L", "P", "1") if format == "png" else ("RGB", "L")
    if image.format != OUTPUTS[format] or image.mode not in modes:
        return None
    if image.has_transparency_data or getattr(image, "is_animated", False):
        return None
    copy = _STRIP[format](data)
    if copy is None:
        return None
    if format == "jpg" and _decode_jpeg(image.size, copy, 1, "GRAY") is not None:
        return copy
    if format != "jpg" and copy == data:
        return copy  # it has been decoded
    try:
        shown = Image.open(io.BytesIO(copy), formats=(image.format,))
        size = shown.size
        shown.draft(None, (1, 1))  # the whole file is read at an eighth of the size: enough to find damage
        shown.load()
    except Exception:
        return None  # in a file with chunks that contradict each other; decoding the original says what to do
    return copy if size == image.size else None


def strip_jpeg(data: bytes) -> bytes | None:
    """The JPEG without EXIF, XMP, IPTC, comments and what else programs add; colour data and the picture stay.

    Returns None when the file is not a plain run of segments up to an end-of-image marker that is its end (such as a
    photo with a film or another photo behind it), so that only encoding it again would clean it.
    """
    segments = _list_segments(data)
    return None if segments is None else _join_kept(data, segments)


def _list_segments(data: bytes) -> list[tuple[int, int, int]] | None:
    """The segments of a JPEG as (marker, start, end), scans with their coded data; None unless they are a plain run up to
    an end-of-image marker that is the end of the file."""
    segments = []
    position = 2
    while position + 4 <= len(data):
        prefix, marker, length = _SEGMENT.unpack_from(data, position)
        if prefix != 0xFF or marker < 0xC0 or 0xD0 <= marker <= 0xD9 or length < 2:
            return None
        start, position = position, position + 2 + length
        if marker == _SCAN:  # its coded data has no length but ends before the next marker
            end = _JPEG_MARKER.search(data, position)
            if end is None:
                return None
            position = end.start()
        segments.append((marker, start, position))
        if position + 2 == len(data) and data.endswith(b"\xff\xd9"):
            return segments
    return None


def _join_kept(data: bytes, segments: list[tuple[int, int, int]]) -> bytes:
    """The JPEG of those segments that may be stored."""
    kept, start = [], 0  # runs of segments that stand together
    for marker, begin, end in segments:
        wanted = _KEPT_APPLICATION_DATA.get(marker)
        if marker == _COMMENT or (
            marker in _APPLICATION_DATA and (wanted is None or not data.startswith(wanted, begin + 4, end))
        ):
            kept.append(data[start:begin])
            start = end
    return b"".join((*kept, data[start:])) if kept else data


def _copy_plain_jpeg(data: bytes, policy: ImagePolicy) -> Picture | None:
    """The picture if `data` is a JPEG that keeps its bytes; None for one that does not, or about which anything is
    unusual. Raises PictureError for damage that decoding finds."""
    if policy.format != "jpg" or not data.startswith(b"\xff\xd8\xff"):
        return None
    segments = _list_segments(data)
    size = None if segments is None else _read_plain_size(data, segments)
    if size is None or max(size) > _MAX_SIDE["jpg"] or _judge_size(*size, policy) is not None:
        return None
    if _plan(*size, policy).framed != size:
        return None
    copy = _join_kept(data, segments)
    if policy.check == "full":
        with _decoding():
            if _decode_jpeg(size, copy, 1, "GRAY") is None:
                return None
    return Picture(copy, "jpg", *size, *size)


def _read_plain_size(data: bytes, segments: list[tuple[int, int, int]]) -> tuple[int, int] | None:
    """Width and height of a JPEG that is upright and that any decoder shows alike: with one frame of 1 or 3 components of
    8 bits, coded by Huffman's method, and tables, scans and restart markers as they should be. None for others, and for
    those with data of programs that only Pillow reads."""
    size, restarts, has_exif = None, False, False
    for marker, start, end in segments:
        content = start + 4
        if marker == _SCAN:
            length = _SEGMENT.unpack_from(data, start)[2]
            if size is None or length != 6 + 2 * data[content]:
                return None
            if restarts and not _is_cycle(_RESTART.findall(data, start + 2 + length, end)):
                return None
        elif marker in (0xDB, 0xC4):  # quantisation, Huffman
            if not _are_whole_tables(data, marker, content, end):
                return None
        elif marker in (0xC0, 0xC1, 0xC2):  # a frame: baseline, extended, progressive
            if size is not None or end - start < 13 or (marker == 0xC2 and _has_endless_scans(data)):
                return None
            bits, height, width, components = _FRAME.unpack_from(data, content)
            if bits != 8 or components not in (1, 3) or end - start != 10 + 3 * components or not width * height:
                return None
            size = (width, height)
        elif marker == 0xE1:  # EXIF or XMP, both of which may turn the picture
            is_exif = data.startswith(b"Exif\0\0", content, end)
            if is_exif and (has_exif or not _is_upright(data[content + 6 : end])):
                return None
            if not is_exif and data.find(b"Orientation", content, end) >= 0:
                return None
            has_exif |= is_exif
        elif marker == 0xDD:
            restarts = end - start == 6 and data[content:end] != b"\0\0"
        elif marker in _APPLICATION_DATA:
            if end - start < _LEAST_APPLICATION_BYTES.get(marker, 4):
                return None
            if marker == 0xE2 and data.startswith(b"MPF\0", content, end):  # several pictures
                return None
            if marker == 0xED and not _are_whole_resources(data[content:end]):
                return None
        elif marker != _COMMENT:
            return None
    return size


def _is_cycle(restarts: list[bytes]) -> bool:
    """Whether the restart markers of a scan are numbered from 0 to 7, over and over."""
    return all(marker[0] == number & 7 | 0xD0 for number, marker in enumerate(restarts))


def _are_whole_tables(data: bytes, marker: int, place: int, end: int) -> bool:
    while place < end:
        if marker == 0xDB:
            place += 65 if data[place] < 16 else 129
        else:
            place += 17 + sum(data[place + 1 : place + 17])
    return place == end


def _are_whole_resources(content: bytes) -> bool:
    """Whether what Photoshop adds, if this is that, is whole. Source: Adobe, Photoshop file formats, image resources."""
    if not content.startswith(b"Photoshop 3.0\0"):
        return True
    place = 14
    while content.startswith(b"8BIM", place) and place + 12 <= len(content):
        place += 7 + content[place + 6]  # a name, padded to be even
        place += place & 1
        size = int.from_bytes(content[place : place + 4], "big")
        place += 4 + size + size % 2
    return place >= len(content)


def _is_upright(exif: bytes) -> bool:
    """Whether EXIF data is as it should be and does not ask to turn the picture. Source: TIFF 6.0, section 2."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return False
    try:
        (directory,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, directory)
        entries = [struct.unpack_from(f"{order}HHIHH", exif, directory + 2 + 12 * number) for number in range(count)]
    except struct.error:
        return False
    return all(entry[1:4] == (3, 1, 1) for entry in entries if entry[0] == _ORIENTATION_TAG)


def strip_png(data: bytes) -> bytes | None:
    """The PNG without any chunk that is not needed to show it; None if it has 16 bits or is no plain run of chunks."""
    kept = [data[:8]]
    position = 8
    if data[12:16] != b"IHDR" or data[24:25] > b"\x08":
        return None
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        start, position = position, position + 12 + length
        if kind in _KEPT_PNG_CHUNKS:
            kept.append(data[start:position])
        if kind == b"IEND":
            return b"".join(kept) if position == len(data) else None
    return None


def strip_webp(data: bytes) -> bytes | None:
    """The WebP without any chunk that is not needed to show it; None if it is no plain run of chunks."""
    kept = []
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        start, position = position, position + 8 + length + length % 2
        if kind in _KEPT_WEBP_CHUNKS:
            chunk = bytearray(data[start:position])
            if kind == b"VP8X" and len(chunk) > 8:
                chunk[8] &= ~_WEBP_METADATA_FLAGS
            kept.append(bytes(chunk))
    if position != len(data) or struct.unpack_from("<I", data, 4)[0] + 8 != len(data):
        return None
    content = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(content)) + content


_STRIP: dict[str, Callable[[bytes], bytes | None]] = {"jpg": strip_jpeg, "webp": strip_webp, "png": strip_png}

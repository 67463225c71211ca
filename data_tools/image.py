"""Picture files -> the JPEG bytes that go into a shard. Untrusted bytes: the header is checked before decoding."""

import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 89_000_000
JPEG_QUALITY = 90

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
_METADATA_MARKERS = (0xE1, 0xED, 0xFE)
"""APP1 (EXIF with its GPS position, XMP), APP13 (IPTC) and comments."""


class PictureError(Exception):
    """A picture that cannot become a sample: `reason` is one of a few (to count by), `detail` is about this one."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason

    def __str__(self) -> str:
        return ": ".join(self.args)


@dataclass(frozen=True, slots=True)
class Picture:
    """A JPEG with its size in pixels, and the size that it had before (as displayed, so after EXIF orientation)."""

    jpeg: bytes
    width: int
    height: int
    original_width: int
    original_height: int


def prepare_picture(data: bytes, resize: int) -> Picture:
    """Make the JPEG for a shard: at most `resize` pixels on the shorter side (0 keeps every size), RGB, no metadata.

    A JPEG that is small enough, RGB or grey, and upright keeps its bytes, less any metadata. Others are decoded
    and encoded again at quality 90: transparency on white, the first frame of an animation, turned as EXIF says.
    Raises PictureError for anything but a whole picture of a known format and at most 89 million pixels. Damage in the
    middle of a JPEG that still has its end is not noticed: libjpeg fills such gaps with grey.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _prepare(data, resize)
    except (PictureError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise PictureError("not a picture", f"none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise PictureError("too many pixels", str(error)) from None
    except Exception as error:
        # Pillow's decoders answer to damaged files with almost any exception, from OSError to IndexError.
        raise PictureError("damaged picture", f"{type(error).__name__}: {error}") from None


def _prepare(data: bytes, resize: int) -> Picture:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PictureError("too many pixels", f"{width} x {height}, at most {MAX_PIXELS} are decoded")
    turn = _TRANSPOSE.get(_read_orientation(image))
    shrinks = 0 < resize < min(width, height)
    scale = resize / min(width, height) if shrinks else 1.0
    target = (max(1, round(width * scale)), max(1, round(height * scale)))
    if image.format == "JPEG" and image.mode in ("RGB", "L") and turn is None and not shrinks:
        kept = strip_metadata(data)
        if kept is not None:
            image.draft(None, (1, 1))  # the whole file is read at an eighth of the size: enough to find damage
            image.load()
            return Picture(kept, width, height, width, height)
    if shrinks:
        image.draft(None, (2 * target[0], 2 * target[1]))
    image = _convert_to_rgb(image)
    if shrinks:
        image = image.resize(target, Image.Resampling.LANCZOS)
    if turn is not None:
        image = image.transpose(turn)
    if turn in _SIDEWAYS:
        width, height = height, width
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, comment=b"")
    return Picture(buffer.getvalue(), *image.size, width, height)


def _read_orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:
        return 1  # broken EXIF does not make the picture a broken one


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith("I"):  # 16 bits of grey: convert() would clip them to 255 instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def strip_metadata(jpeg: bytes) -> bytes | None:
    """The JPEG without its EXIF, XMP, IPTC and comment segments; the picture's own bytes are not touched.

    Returns None when the file is not a plain run of segments up to the end-of-image marker (such as a photo with a film
    behind it), so that only encoding it again would clean it.
    """
    if not jpeg.endswith(b"\xff\xd9"):
        return None
    kept = [jpeg[:2]]
    position = 2
    while position + 4 <= len(jpeg):
        prefix, marker, length = struct.unpack_from(">BBH", jpeg, position)
        if prefix != 0xFF or length < 2:
            return None
        if marker == 0xDA:  # start of scan: the rest is the picture itself
            return b"".join((*kept, jpeg[position:]))
        if marker not in _METADATA_MARKERS:
            kept.append(jpeg[position : position + 2 + length])
        position += 2 + length
    return None

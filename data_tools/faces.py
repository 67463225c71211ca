"""Finds faces with the detector that OpenCV brings along, and hides them so that nothing can bring them back.

The detector (Haar cascades; Viola and Jones, 2001) is quick and needs no download, and it is an old one: it looks for upright
frontal and side faces of at least MIN_FACE_PIXELS pixels. It misses small, tilted, half-covered, dark and strongly lit
faces, masks and most of the faces in crowds, and it takes some patterns for faces that are none. Where faces must be gone,
find them with a stronger detector and give its boxes.
"""

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 89_000_000
MIN_FACE_PIXELS = 20
QUALITY = 95
"""Of the JPEG and WebP files that are written for changed pictures; PNG files lose nothing."""

CELLS = 4
"""A hidden face keeps the mean colours of at most CELLS x CELLS cells, and nothing else of it is in the file."""
MARGIN_TOP, MARGIN_SIDE, MARGIN_BOTTOM = 0.35, 0.2, 0.2
"""Added to a box, in shares of its height and width: detectors end at the brow, and hair, ears and chin tell who it is."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_SEARCH_PIXELS = 400
_SEARCH = {"frontal": {"scaleFactor": 1.15, "minNeighbors": 5}, "profile": {"scaleFactor": 1.2, "minNeighbors": 6}}
"""The side faces' cascade is the slower one, is run twice (mirrored too), and errs more: wider steps, more agreement."""
_SAME_FACE_OVERLAP = 0.3


class FaceError(Exception):
    """A picture that cannot be looked at, and so cannot be said to be free of faces."""


class Box(NamedTuple):
    """Where a face is, in pixels of the picture: left, top, width and height."""

    x: float
    y: float
    width: float
    height: float


class FaceFinder:
    """The cascades, loaded once; not safe for threads. The same picture gives the same boxes, with any number of them."""

    def __init__(self) -> None:
        import cv2

        self._cv2 = cv2
        self._frontal = self._load("haarcascade_frontalface_default.xml")
        self._profile = self._load("haarcascade_profileface.xml")

    def find(self, image: Image.Image) -> list[Box]:
        """The boxes of the faces in an upright picture, from left to right, without margins.

        Pictures with a longer side under 400 pixels are enlarged for the search, so that smaller faces are found.
        """
        grey = np.asarray(image.convert("L"))
        scale = min(2.0, max(1.0, _SEARCH_PIXELS / max(grey.shape)))
        if scale > 1:
            grey = self._cv2.resize(grey, None, fx=scale, fy=scale, interpolation=self._cv2.INTER_CUBIC)
        grey = self._cv2.equalizeHist(grey)
        width = grey.shape[1]
        found = self._detect(self._frontal, grey, "frontal") + self._detect(self._profile, grey, "profile")
        mirrored = self._detect(self._profile, np.ascontiguousarray(grey[:, ::-1]), "profile")
        found += [(width - x - w, y, w, h) for x, y, w, h in mirrored]
        faces: list[tuple[int, int, int, int]] = []
        for box in sorted(found, key=lambda box: (-box[2] * box[3], box)):
            if all(_overlap(box, other) < _SAME_FACE_OVERLAP for other in faces):
                faces.append(box)
        return [Box(*(side / scale for side in box)) for box in sorted(faces)]

    def _load(self, name: str):
        cascade = self._cv2.CascadeClassifier(self._cv2.data.haarcascades + name)
        if cascade.empty():
            raise RuntimeError(f"OpenCV cannot load its own {name}")
        return cascade

    def _detect(self, cascade, grey: np.ndarray, kind: str) -> list[tuple[int, int, int, int]]:
        found = cascade.detectMultiScale(grey, minSize=(MIN_FACE_PIXELS, MIN_FACE_PIXELS), **_SEARCH[kind])
        return [tuple(map(int, box)) for box in found]


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """Intersection over union of two boxes."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    shared = max(0, width) * max(0, height)
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)


def hide_faces(data: bytes, finder: FaceFinder | None, boxes: list[Box]) -> tuple[bytes, int, int, int]:
    """Hide what `boxes` say and what `finder` finds in an encoded picture.

    `boxes` are in pixels as stored, before any turn that EXIF asks for. Returns the picture's new bytes, its width and
    height, and the number of faces. A picture without any keeps its bytes; another is encoded again in its own format,
    upright and without metadata (a thumbnail in the EXIF would show the face). Raises FaceError for a picture that cannot
    be decoded, and for a box that lies outside it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise FaceError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS} are decoded")
            image.load()
            kind = "JPEG" if image.format == "MPO" else image.format
            if image.mode.startswith("I"):  # 16 bits of grey: convert() would clip them to 255 instead of scaling
                image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
            upright = ImageOps.exif_transpose(image)
    except (FaceError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders answer to damaged files with almost any exception
        raise FaceError(f"{type(error).__name__}: {error}") from None
    for box in boxes:
        if box.x >= image.width or box.y >= image.height or box.x + box.width <= 0 or box.y + box.height <= 0:
            where = ", ".join(f"{side:g}" for side in box)
            raise FaceError(f"the box {where} lies outside of its {image.width} x {image.height} pixels")
    found = finder.find(upright) if finder else []
    if not boxes and not found:
        return data, image.width, image.height, 0
    if boxes:
        image = _hide(image, boxes)
        upright = ImageOps.exif_transpose(image)
    upright = _hide(upright, found)
    buffer = io.BytesIO()
    profile = image.info.get("icc_profile")
    options = {"icc_profile": profile} if profile and kind in ("JPEG", "PNG", "WEBP") else {}
    if kind in ("JPEG", "WEBP"):
        options["quality"] = QUALITY
    upright.info = {}
    upright.save(buffer, kind, **options)
    return buffer.getvalue(), upright.width, upright.height, len(boxes) + len(found)


def _hide(image: Image.Image, boxes: list[Box]) -> Image.Image:
    """A copy of the picture in a mode that has no palette, with every box and its margins made unrecognisable."""
    kept = image.mode if image.mode in ("L", "RGB", "CMYK") else "RGB"
    mode = "RGBA" if image.has_transparency_data else kept
    pixels = np.array(image.convert(mode))
    for box in boxes:
        left, right = box.x - MARGIN_SIDE * box.width, box.x + (1 + MARGIN_SIDE) * box.width
        top, bottom = box.y - MARGIN_TOP * box.height, box.y + (1 + MARGIN_BOTTOM) * box.height
        left, top = max(0, int(np.floor(left))), max(0, int(np.floor(top)))
        right, bottom = min(image.width, int(np.ceil(right))), min(image.height, int(np.ceil(bottom)))
        pixels[top:bottom, left:right] = obscure(pixels[top:bottom, left:right])
    hidden = Image.fromarray(pixels, mode) if mode == "CMYK" else Image.fromarray(pixels)
    hidden.info = dict(image.info)
    if image.getexif():
        hidden.info["exif"] = image.getexif().tobytes()
    return hidden


def obscure(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W] or [H, W, C] -> the same shape, of which only the means of CELLS x CELLS cells can be known.

    The result is a function of those means alone (pixelation, then a Gaussian blur of half a cell, over these pixels
    only): any two pictures with equal means give the same one, so nothing can tell which it was.
    """
    import cv2

    height, width = pixels.shape[:2]
    rows = np.linspace(0, height, min(CELLS, height) + 1).astype(int)
    columns = np.linspace(0, width, min(CELLS, width) + 1).astype(int)
    sums = np.add.reduceat(np.add.reduceat(pixels.astype(np.int64), rows[:-1], axis=0), columns[:-1], axis=1)
    row_counts, column_counts = np.diff(rows), np.diff(columns)
    sizes = np.outer(row_counts, column_counts).reshape(len(row_counts), len(column_counts), *[1] * (pixels.ndim - 2))
    cells = ((2 * sums + sizes) // (2 * sizes)).astype(np.uint8)
    mosaic = np.repeat(np.repeat(cells, row_counts, axis=0), column_counts, axis=1)
    sigma_x, sigma_y = width / CELLS / 2, height / CELLS / 2
    blurred = cv2.GaussianBlur(
        np.ascontiguousarray(mosaic), (0, 0), sigma_x, sigmaY=sigma_y, borderType=cv2.BORDER_REPLICATE
    )
    return blurred.reshape(pixels.shape)

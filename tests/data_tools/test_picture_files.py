"""Pictures of every odd kind become plain JPEGs, or a failure with its reason."""

import io
import os
import re
import zlib

import numpy as np
import pytest
from PIL import Image

from data_tools.image import MAX_PIXELS, ImagePolicy, PictureError, prepare_picture, read_picture


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(jpeg: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(jpeg))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    return np.asarray(image).astype(int)


def make_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.get_ifd(0x8825)[1] = "N"  # a GPS entry
    return exif


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_small_plain_jpeg_keeps_its_bytes(noise, mode, progressive):
    data = encode(noise(60, 40).convert(mode), quality=70, progressive=progressive)
    picture = prepare_picture(data, ImagePolicy(resize=256))
    assert picture.data == data
    assert (picture.width, picture.height, picture.original_width, picture.original_height) == (60, 40, 60, 40)


def test_metadata_goes_and_the_pixels_stay(noise):
    clean = encode(noise(60, 40), quality=70)
    tagged = encode(noise(60, 40), quality=70, exif=make_exif(1), comment=b"taken at home")
    assert b"Exif" in tagged and b"taken at home" in tagged
    assert prepare_picture(tagged, ImagePolicy(resize=256)).data == clean
    with_film = tagged + b"a film behind the photo, with its own position"
    recoded = prepare_picture(with_film, ImagePolicy(resize=256)).data
    assert not any(trace in recoded for trace in (b"Exif", b"home", b"film"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("size", "resize", "expected"),
    [((100, 80), 40, (50, 40)), ((80, 100), 40, (40, 50)), ((100, 80), 0, (100, 80)), ((900, 10), 5, (450, 5))],
)
def test_the_shorter_side_is_reduced(noise, kind, size, resize, expected):
    picture = prepare_picture(encode(noise(*size), kind), ImagePolicy(resize=resize))
    assert (picture.width, picture.height) == expected
    assert Image.open(io.BytesIO(picture.data)).size == expected
    assert (picture.original_width, picture.original_height) == size


def test_reducing_is_antialiased():
    stripes = np.zeros((512, 512, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    pixels = decode(prepare_picture(encode(Image.fromarray(stripes), "PNG"), ImagePolicy(resize=64)).data)
    assert np.abs(pixels - 127.5).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    """The corner that is red in the upright picture is the one that viewers show red in the turned file."""
    upright = Image.new("RGB", (60, 40), "white")
    upright.paste("red", (0, 0, 20, 20))
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that undoes each orientation
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(inverse[orientation]))
    picture = prepare_picture(encode(stored, quality=95, exif=make_exif(orientation)), ImagePolicy(resize=256))
    pixels = decode(picture.data)
    assert (picture.original_width, picture.original_height) == (60, 40)
    assert pixels.shape == (40, 60, 3)
    assert np.abs(pixels[5, 5] - (255, 0, 0)).max() < 12
    assert all(np.abs(pixels[y, x] - 255).max() < 12 for y, x in ((5, 55), (35, 5), (35, 55)))


def test_odd_kinds_become_rgb_with_the_right_colours():
    red = Image.new("RGB", (40, 30), (200, 20, 20))
    alpha = Image.new("RGBA", (40, 30), (200, 20, 20, 0))
    half = Image.new("RGBA", (40, 30), (0, 0, 0, 128))
    palette_with_hole = Image.new("P", (40, 30), 1)
    palette_with_hole.putpalette([200, 20, 20, 0, 0, 255])
    deep = Image.fromarray(np.full((30, 40), 128 * 256, dtype=np.uint16))
    frames = [red, Image.new("RGB", (40, 30), "blue")]
    cases = {
        "cmyk jpeg": (encode(red.convert("CMYK"), quality=95), (200, 20, 20)),
        "palette png": (encode(red.quantize(4), "PNG"), (200, 20, 20)),
        "transparent png is white": (encode(alpha, "PNG"), (255, 255, 255)),
        "half transparent png": (encode(half, "PNG"), (127, 127, 127)),
        "palette with a transparent colour": (encode(palette_with_hole, "PNG", transparency=1), (255, 255, 255)),
        "grey with alpha": (encode(half.convert("LA"), "PNG"), (127, 127, 127)),
        "16 bits of grey": (encode(deep, "PNG"), (128, 128, 128)),
        "one bit": (encode(Image.new("1", (40, 30), 1), "PNG"), (255, 255, 255)),
        "webp": (encode(red, "WEBP", lossless=True), (200, 20, 20)),
        "bmp": (encode(red, "BMP"), (200, 20, 20)),
        "animated gif: first frame": (encode(red, "GIF", save_all=True, append_images=frames[1:]), (200, 20, 20)),
        "animated webp: first frame": (
            encode(red, "WEBP", save_all=True, append_images=frames[1:], lossless=True),
            (200, 20, 20),
        ),
    }
    for name, (data, colour) in cases.items():
        picture = prepare_picture(data, ImagePolicy(resize=256))
        assert np.abs(decode(picture.data) - colour).max() <= 4, name
        assert (picture.width, picture.height) == (40, 30), name


def test_broken_exif_does_not_make_a_broken_picture(noise):
    data = encode(noise(60, 40), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert b"Exif" not in prepare_picture(data, ImagePolicy(resize=256)).data


def refused(data: bytes, resize: int = 256) -> PictureError:
    with pytest.raises(PictureError) as caught:
        prepare_picture(data, ImagePolicy(resize=resize))
    return caught.value


@pytest.mark.parametrize("resize", [32, 256])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_is_an_error(noise, resize, progressive):
    data = encode(noise(200, 150), progressive=progressive)
    assert refused(data[: len(data) // 2], resize).reason == "damaged picture"


def test_damaged_files_have_a_reason_and_never_crash(noise):
    assert refused(b"").reason == "not a picture"
    assert refused(b"<html>not found</html>").reason == "not a picture"
    assert refused(encode(noise(20, 20), "TIFF")).reason == "not a picture"
    png = encode(noise(50, 50), "PNG")
    assert refused(png[:2000]).reason == "damaged picture"
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP"):
        whole = encode(noise(50, 50), kind)
        for _ in range(100):
            damaged = bytearray(whole)
            for position in generator.integers(0, len(damaged), 8):
                damaged[position] = generator.integers(0, 256)
            try:
                prepare_picture(bytes(damaged), ImagePolicy(resize=32))
            except PictureError as error:
                assert error.reason in ("damaged picture", "not a picture", "too many pixels")


def test_too_many_pixels_are_refused_from_the_header():
    for side in (9435, 60_000):  # above our limit; so far above that Pillow itself refuses
        png = bytearray(encode(Image.new("L", (8, 8)), "PNG"))
        png[16:24] = side.to_bytes(4, "big") * 2
        png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
        assert side * side > MAX_PIXELS
        assert refused(bytes(png)).reason == "too many pixels"


def test_names_stay_inside_the_image_root(tmp_path):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "..x.jpg").write_bytes(b"inside")
    (tmp_path / "secret.jpg").write_bytes(b"outside")
    assert read_picture(root, "a/..x.jpg") == read_picture(root, "./a//..x.jpg") == b"inside"
    reasons = {
        "../secret.jpg": "image name leads out of the image root",
        "a/../../secret.jpg": "image name leads out of the image root",
        str(tmp_path / "secret.jpg"): "image name leads out of the image root",
        "": "no image name",
        "a\0.jpg": "no image name",
        "a": "not a file",
        "none.jpg": "missing picture",
        "a/..x.jpg/none.jpg": "missing picture",
        "n" * 300 + ".jpg": "unreadable picture",
    }
    os.mkfifo(root / "pipe")
    reasons["pipe"] = "not a file"
    for name, reason in reasons.items():
        with pytest.raises(PictureError, match="^" + re.escape(reason)):
            read_picture(root, name)

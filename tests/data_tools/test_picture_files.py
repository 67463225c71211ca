"""Pictures of every odd kind become plain JPEGs, or a failure with its reason."""

import contextlib
import dataclasses
import io
import os
import struct
import subprocess
import sys
import zlib
from unittest import mock

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from PIL import Image, ImageCms

from data_tools.errors import UserError
from data_tools.image import (
    MAX_PIXELS,
    OUTPUTS,
    ImagePolicy,
    Picture,
    PictureError,
    prepare_picture,
    strip_jpeg,
    strip_png,
    strip_webp,
)


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


def make_noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_photograph(width: int, height: int) -> Image.Image:
    """Detail of every size, as a photograph has it."""
    layers = [
        np.asarray(make_noise(width // size + 2, height // size + 2, size).resize((width, height), 3)).astype(float)
        for size in (1, 2, 4, 8, 16, 32)
    ]
    return Image.fromarray(np.clip(128 + 1.5 * (np.mean(layers, axis=0) - 128), 0, 255).astype(np.uint8))


# The policy


@pytest.mark.parametrize(
    ("mode", "size", "resize", "expected"),
    [
        ("keep_ratio", (100, 80), 40, (50, 40)),
        ("keep_ratio", (30, 20), 40, (30, 20)),
        ("center_crop", (100, 80), 40, (40, 40)),
        ("center_crop", (100, 30), 40, (30, 30)),
        ("center_crop", (40, 40), 40, (40, 40)),
        ("border", (100, 80), 40, (40, 40)),
        ("border", (30, 20), 40, (40, 40)),
        ("border", (900, 3), 40, (40, 40)),
        ("squash", (100, 80), 40, (40, 40)),
        ("squash", (100, 30), 40, (40, 30)),
        ("no", (100, 80), 40, (100, 80)),
        ("center_crop", (100, 80), 0, (100, 80)),
    ],
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_modes_only_reduce(noise, mode, size, resize, expected, orientation):
    stored = size if orientation == 1 else size[::-1]
    picture = prepare_picture(encode(noise(*stored), exif=make_exif(orientation)), ImagePolicy(resize, mode))
    assert (picture.width, picture.height) == Image.open(io.BytesIO(picture.data)).size == expected
    assert (picture.original_width, picture.original_height) == size


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_what_each_mode_shows(kind):
    """A red bar on the left, a green middle and a blue bar on the right, each a third of 600 x 200 pixels."""
    bars = np.zeros((200, 600, 3), dtype=np.uint8)
    bars[:, :200, 0] = bars[:, 200:400, 1] = bars[:, 400:, 2] = 255
    data = encode(Image.fromarray(bars), kind)

    def show(mode: str) -> np.ndarray:
        return decode(prepare_picture(data, ImagePolicy(60, mode, quality=100)).data)

    def is_near(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
        return np.abs(pixels - colour).max() < 12

    red, green, blue, white = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    crop = show("center_crop")
    assert is_near(crop[:, 3:-3], green)
    squashed = show("squash")
    assert is_near(squashed[:, :16], red) and is_near(squashed[:, 24:36], green) and is_near(squashed[:, 44:], blue)
    border = show("border")
    assert is_near(border[:16], white) and is_near(border[-16:], white)
    assert is_near(border[24:36, :16], red) and is_near(border[24:36, 44:], blue)


@pytest.mark.parametrize("format", OUTPUTS)
def test_formats_and_quality(format):
    data = encode(make_photograph(300, 200), "BMP")
    pictures = [prepare_picture(data, ImagePolicy(100, format=format, quality=quality)) for quality in (30, 95)]
    for picture in pictures:
        image = Image.open(io.BytesIO(picture.data))
        assert (picture.extension, image.format, image.mode, image.size) == (format, OUTPUTS[format], "RGB", (150, 100))
    sizes = [len(picture.data) for picture in pictures]
    assert sizes[0] == sizes[1] if format == "png" else sizes[0] < 0.6 * sizes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "keep_ration"}, "Did you mean 'keep_ratio'"),
        ({"format": "gif"}, "Valid: jpg, webp, png"),
        ({"quality": 0}, "from 1 to 100"),
        ({"resize": -1}, "resize -1"),
        ({"max_pixels": 10**9}, "from 1 to 178000000"),
        ({"max_aspect": 0.5}, "at least 1, or 0"),
        ({"max_aspect": float("nan")}, "at least 1, or 0"),
    ],
)
def test_policies_without_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ImagePolicy(**options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_limits_refuse_from_the_header(noise, kind):
    """The picture itself is cut off, so anything that decodes it would call it damaged."""
    header = encode(noise(120, 40), kind)[:1200]
    cases = {
        ImagePolicy(min_size=41): "too small",
        ImagePolicy(max_aspect=2.9): "too long and narrow",
        ImagePolicy(max_pixels=4799): "too many pixels",
        ImagePolicy(min_size=40, max_aspect=3, max_pixels=4800): "damaged picture",
    }
    for policy, reason in cases.items():
        with pytest.raises(PictureError) as caught:
            prepare_picture(header, policy)
        assert caught.value.reason == reason


def test_a_side_too_long_for_the_format_is_refused():
    data = encode(Image.new("L", (17_000, 2)), "PNG")
    with pytest.raises(PictureError, match="too large for the format"):
        prepare_picture(data, ImagePolicy(0, format="webp"))
    assert prepare_picture(data, ImagePolicy(0)).width == 17_000


# Copies


def test_png_and_webp_that_need_no_change_are_copied_without_metadata(noise):
    image = noise(60, 40)
    extras = {"exif": make_exif(1), "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
    cases = [("png", "PNG", {}), ("webp", "WEBP", {"quality": 70}), ("webp", "WEBP", {"lossless": True})]
    for format, kind, options in cases:
        policy = ImagePolicy(format=format, quality=1)
        plain = encode(image, kind, **options)
        assert prepare_picture(plain, policy).data == plain
        tagged = encode(image, kind, **options, **extras)
        copy = prepare_picture(tagged, policy).data
        assert len(copy) < len(tagged)
        shown = Image.open(io.BytesIO(copy))
        assert "exif" not in shown.info and not shown.getexif()
        assert shown.info["icc_profile"] == extras["icc_profile"]
        assert np.array_equal(np.asarray(shown), np.asarray(Image.open(io.BytesIO(plain))))
        recoded = prepare_picture(tagged + b"something behind it", policy).data if format == "png" else b""
        assert b"behind" not in recoded and b"iCCP" not in recoded
        turned = prepare_picture(encode(image, kind, **options, exif=make_exif(6)), policy)
        assert (turned.width, turned.height) == Image.open(io.BytesIO(turned.data)).size == (40, 60)


def test_a_jpeg_with_a_subsampling_that_has_no_name_is_no_mistake_of_the_program() -> None:
    picture = bytearray(encode(make_noise(16, 16), subsampling=0))
    picture[picture.index(b"\xff\xc0") + 11] = 0x14  # 4:4:1, which the picture data are not
    for check in ("full", "structure"):
        with contextlib.suppress(PictureError):
            prepared = prepare_picture(bytes(picture), ImagePolicy(8, "keep_ratio", check=check))
            assert (prepared.width, prepared.height) == (8, 8)


@pytest.mark.parametrize("format", ["png", "webp"])
def test_transparent_and_animated_pictures_are_never_copied(format):
    see_through = Image.new("RGBA", (40, 30), (200, 20, 20, 0))
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    policy = ImagePolicy(format=format, quality=100)
    for data, colour in (
        (encode(see_through, OUTPUTS[format], **({"lossless": True} if format == "webp" else {})), (255, 255, 255)),
        (encode(frames[0], OUTPUTS[format], save_all=True, append_images=frames[1:]), (255, 0, 0)),
    ):
        image = Image.open(io.BytesIO(prepare_picture(data, policy).data))
        assert image.mode == "RGB" and not getattr(image, "is_animated", False)
        assert np.abs(np.asarray(image).astype(int) - colour).max() <= 4


def test_sixteen_bits_of_colour_become_eight():
    rows = b"".join(b"\0" + struct.pack(">3H", 200 << 8, 20 << 8, 20 << 8) * 8 for _ in range(8))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    png = prepare_picture(data, ImagePolicy(format="png")).data
    assert png[24] == 8
    assert np.all(np.asarray(Image.open(io.BytesIO(png))) == (200, 20, 20))


def test_only_what_shows_the_picture_is_left_of_a_jpeg(noise):
    plain = encode(noise(60, 40))

    def segment(marker: int, content: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content

    secrets = b"".join(segment(0xE0 + number, b"position 52.1 N") for number in range(16)) + segment(0xFE, b"position")
    assert prepare_picture(plain[:20] + secrets + plain[20:], ImagePolicy()).data == plain
    between_scans = encode(noise(60, 40), progressive=True)
    scan = between_scans.rindex(b"\xff\xda")
    assert prepare_picture(between_scans[:scan] + secrets + between_scans[scan:], ImagePolicy()).data == between_scans


def test_a_second_picture_behind_the_first_does_not_come_along(noise):
    first = encode(noise(60, 40), quality=80)
    data = first + encode(noise(60, 40, 1), exif=make_exif(1))
    assert data.endswith(b"\xff\xd9")
    picture = prepare_picture(data, ImagePolicy(quality=80))
    assert b"Exif" not in picture.data and len(picture.data) < 1.1 * len(first)
    assert np.abs(decode(picture.data) - decode(first)).mean() < 12
    several = encode(noise(60, 40), "MPO", save_all=True, append_images=[noise(60, 40, 1)])
    assert Image.open(io.BytesIO(several)).format == "MPO"
    assert prepare_picture(several, ImagePolicy()).width == 60


# Colours


def swap_red_and_blue() -> bytes:
    """A profile whose primaries are those of sRGB with red and blue exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")  # in the table of tags: name, offset, size
    profile[red + 4 : red + 8], profile[blue + 4 : blue + 8] = profile[blue + 4 : blue + 8], profile[red + 4 : red + 8]
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "xRGB".encode("utf-16-be"))


def test_other_colour_spaces_are_converted_when_the_picture_is_encoded_again():
    red = Image.new("RGB", (80, 60), (200, 20, 20))
    profile = swap_red_and_blue()
    blue = (20, 20, 200)
    for kind, options in (("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True})):
        data = encode(red, kind, icc_profile=profile, **options)
        for format in OUTPUTS:
            made = prepare_picture(data, ImagePolicy(40, format=format, quality=95)).data
            image = Image.open(io.BytesIO(made))
            assert "icc_profile" not in image.info
            assert np.abs(np.asarray(image).astype(int) - blue).max() <= 6, (kind, format)
    see_through = Image.new("RGBA", (80, 60), (200, 20, 20, 255))
    see_through.paste((0, 0, 0, 0), (0, 0, 40, 60))
    pixels = decode(prepare_picture(encode(see_through, "PNG", icc_profile=profile), ImagePolicy(quality=95)).data)
    assert np.abs(pixels[:, :30] - 255).max() <= 6 and np.abs(pixels[:, 50:] - blue).max() <= 6


def test_a_copy_keeps_its_colour_profile():
    profile = swap_red_and_blue()
    data = encode(Image.new("RGB", (80, 60), (200, 20, 20)), icc_profile=profile, exif=make_exif(1))
    copy = prepare_picture(data, ImagePolicy()).data
    assert Image.open(io.BytesIO(copy)).info["icc_profile"] == profile and b"Exif" not in copy


@pytest.mark.parametrize("profile", [b"no profile", swap_red_and_blue()[:200], swap_red_and_blue()])
@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_broken_profiles_and_those_for_other_pictures_do_no_harm(profile, mode):
    red = Image.new("RGB", (80, 60), (200, 20, 20)).convert(mode)
    plain, tagged = (
        decode(prepare_picture(encode(red, **options), ImagePolicy(40)).data)
        for options in ({}, {"icc_profile": profile})
    )
    assert np.abs(plain - tagged).max() <= 4


# Resizing


def average_areas(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(np.asarray(image.convert("RGB")), size, interpolation=cv2.INTER_AREA).astype(float)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("resize", [340, 250, 170, 110, 72, 24])
def test_reduced_pictures_are_as_near_to_lanczos_as_averages_are(kind, resize):
    """At ratios from 1.1 to 15, so with libjpeg's own reduction too."""
    data = encode(make_photograph(480, 373), kind, **({"quality": 95} if kind == "JPEG" else {}))
    made, lossy = (
        Image.open(io.BytesIO(prepare_picture(data, policy).data))
        for policy in (ImagePolicy(resize, format="png"), ImagePolicy(resize, quality=100))
    )
    brightness = [np.asarray(picture.convert("L"), dtype=float) for picture in (made, lossy)]
    assert np.abs(brightness[0] - brightness[1]).mean() < 2
    pixels, size = np.asarray(made, dtype=float), made.size
    image = Image.open(io.BytesIO(data)).convert("RGB")
    exact = np.asarray(image.resize(size, Image.Resampling.LANCZOS), dtype=float)
    assert np.mean((pixels - exact) ** 2) < 1.25 * np.mean((average_areas(image, size) - exact) ** 2) < 30


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("resize", [300, 256, 230, 150, 110, 60])
def test_fine_stripes_become_grey(kind, resize):
    """Plain interpolation shows coarse false stripes of up to full contrast, averages over areas show weak ones."""
    stripes = np.zeros((512, 512, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    data = encode(Image.fromarray(stripes), kind, **({"quality": 100} if kind == "JPEG" else {}))
    image = Image.open(io.BytesIO(prepare_picture(data, ImagePolicy(resize, format="png")).data))
    contrast, usual = (
        np.ptp(pixels[8:-8, 8:-8].astype(int))
        for pixels in (np.asarray(image), average_areas(Image.fromarray(stripes), image.size))
    )
    assert contrast <= max(usual, 4)


PRINT_HASHES = """
import hashlib, io, sys
import numpy as np
from PIL import Image
from data_tools.image import ImagePolicy, prepare_picture
generator = np.random.default_rng(0)
for kind in ("JPEG", "PNG"):
    for width, height in ((333, 277), (512, 900)):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, kind)
        for resize in (240, 150, 60):
            for mode in ("keep_ratio", "squash"):
                print(hashlib.sha256(prepare_picture(buffer.getvalue(), ImagePolicy(resize, mode)).data).hexdigest())
"""


def test_the_bytes_do_not_depend_on_the_processor():
    """OpenCV and libjpeg-turbo are kept from the wider instructions of this processor, as if it were an older one."""
    older = {"OPENCV_CPU_DISABLE": "AVX,AVX2,FMA3", "OPENCV_IPP": "sse42", "JSIMD_FORCENONE": "1"}
    runs = [
        subprocess.run(
            [sys.executable, "-c", PRINT_HASHES],
            cwd=ROOT,
            env={**os.environ, **change},
            capture_output=True,
            text=True,
            timeout=60,
        )
        for change in ({}, older)
    ]
    assert [run.returncode for run in runs] == [0, 0], runs
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout.split()) == 24


# Damage


def test_damaged_picture_data_in_the_middle_of_a_jpeg_is_noticed(noise):
    for data, policy in ((encode(noise(200, 150)), ImagePolicy()), (encode(noise(200, 150)), ImagePolicy(32))):
        middle = len(data) // 2
        assert refused(data[:middle] + data[middle + 3000 :], policy.resize).reason == "damaged picture"
    header_lies = bytearray(data)
    frame = header_lies.index(b"\xff\xc0")
    header_lies[frame + 5 : frame + 7] = (1500).to_bytes(2, "big")
    assert refused(bytes(header_lies)).reason == "damaged picture"


def test_copies_can_go_without_decoding_but_never_without_their_end(noise):
    trusting = ImagePolicy(check="structure")
    data = encode(noise(200, 150))
    assert prepare_picture(data, trusting).data == prepare_picture(data, ImagePolicy()).data
    middle = len(data) // 2
    damaged = data[:middle] + data[middle + 3000 :]
    assert prepare_picture(damaged, trusting).data.endswith(damaged[-2000:]), "which a check would have noticed"
    for end in range(2, len(data), 7):
        with pytest.raises(PictureError, match="^damaged picture|^not a picture"):
            prepare_picture(data[:end], trusting)


def test_restart_markers_out_of_turn_are_noticed_without_decoding(noise):
    data = encode(noise(200, 150), restart_marker_blocks=4)
    second, fifth = data.index(b"\xff\xd1"), data.index(b"\xff\xd4")
    assert prepare_picture(data, ImagePolicy(check="structure")).data == data
    with pytest.raises(PictureError, match="^damaged picture"):
        prepare_picture(data[:second] + data[fifth:], ImagePolicy(check="structure"))


def test_a_png_of_whole_chunks_with_broken_content_is_not_copied(noise):
    data = encode(noise(60, 40), "PNG")
    start = data.index(b"IDAT")
    (length,) = struct.unpack_from(">I", data, start - 4)
    content = data[start : start + 4 + length]
    broken = content[: length // 2] + bytes(length - length // 2 + 4)
    for changed in (broken, content[:1000]):  # false data, and too little of it
        chunk = struct.pack(">I", len(changed) - 4) + changed + struct.pack(">I", zlib.crc32(changed))
        damaged = data[: start - 4] + chunk + data[start + 8 + length :]
        for policy in (ImagePolicy(format="png"), ImagePolicy()):
            with pytest.raises(PictureError, match="^damaged picture"):
                prepare_picture(damaged, policy)


def test_a_jpeg_of_endless_scans_is_refused(noise):
    data = encode(noise(60, 40), progressive=True)
    scan = data.rindex(b"\xff\xda")
    assert "scans" in str(refused(data[:-2] + data[scan:-2] * 600 + b"\xff\xd9"))


def make_victims() -> list[bytes]:
    colour = make_noise(23, 17)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    two = {"save_all": True, "append_images": [make_noise(23, 17, 1)]}
    return [
        encode(colour),
        encode(colour, progressive=True, exif=make_exif(6)),
        encode(colour.convert("L"), restart_marker_blocks=1),
        encode(colour.convert("CMYK"), icc_profile=profile),
        encode(colour, "MPO", **two),
        encode(colour, "PNG", exif=make_exif(3)),
        encode(colour.quantize(16), "PNG", transparency=3),
        encode(colour, "PNG", **two),
        encode(colour, "WEBP", exif=make_exif(6), icc_profile=profile),
        encode(colour.convert("RGBA"), "WEBP", lossless=True),
        encode(colour, "WEBP", **two),
        encode(colour, "GIF", **two),
        encode(colour, "BMP"),
    ]


VICTIMS = make_victims()
POLICIES = [
    ImagePolicy(),
    ImagePolicy(8, "center_crop", "png"),
    ImagePolicy(8, "border", "webp", quality=30),
    ImagePolicy(5, "squash", "png"),
    ImagePolicy(0, "no", "webp"),
    ImagePolicy(0, "no", "png"),
]
CHANGES = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "insert", "end"]), st.floats(0, 1), st.binary(min_size=1, max_size=6)),
    max_size=4,
)


def damage(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, place, content in changes:
        position = int(place**2 * len(data))  # more often in the headers
        rest = {"set": position + len(content), "cut": position + 5 * len(content), "insert": position}
        data = (
            data[:position]
            + (b"" if kind == "end" else content if kind != "cut" else b"")
            + (b"" if kind == "end" else data[rest[kind] :])
        )
    return data


def check_picture(picture: Picture, policy: ImagePolicy) -> None:
    image = Image.open(io.BytesIO(picture.data))
    image.load()
    assert image.format == OUTPUTS[policy.format] and image.size == (picture.width, picture.height)
    assert not image.getexif()


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(VICTIMS), CHANGES, st.sampled_from(POLICIES))
def test_any_damage_ends_in_a_picture_or_a_reason(victim, changes, policy):
    data = damage(victim, changes)
    for strip in (strip_jpeg, strip_png, strip_webp):
        strip(data)
    try:
        picture = prepare_picture(data, policy)
    except PictureError as error:
        assert error.reason in ("damaged picture", "not a picture", "too many pixels", "too large for the format")
    else:
        check_picture(picture, policy)


def add_segments(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    added = (bytes([0xFF, marker]) + struct.pack(">H", 2 + len(content)) + content for marker, content in segments)
    return data[:2] + b"".join(added) + data[2:]


def make_jpegs() -> list[bytes]:
    colour = make_noise(23, 17)
    plain, profile = encode(colour), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='6' tiff:Orientation=\"6\"/>"
    photoshop = b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0" + struct.pack(">I", 16) + bytes(16)
    little = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    return [
        plain,
        encode(colour, progressive=True),
        encode(colour.convert("L"), restart_marker_blocks=1),
        encode(colour, icc_profile=profile, exif=make_exif(1)),
        encode(colour, exif=make_exif(6)),
        add_segments(plain, (0xE1, little)),
        add_segments(plain, (0xE1, xmp)),
        add_segments(plain, (0xED, photoshop), (0xFE, b"a comment")),
        add_segments(plain, (0xEE, b"Adobe\0\x64\0\0\0\0\0")),  # RGB that was not made YCbCr
        encode(colour.convert("CMYK")),
        encode(colour, "MPO", save_all=True, append_images=[make_noise(23, 17, 1)]),
    ]


JPEGS = make_jpegs()


def describe_outcome(data: bytes, policy: ImagePolicy) -> Picture | str:
    try:
        return prepare_picture(data, policy)
    except PictureError as error:
        return str(error)


@settings(deadline=None, max_examples=600)
@given(st.sampled_from(JPEGS), CHANGES, st.sampled_from([ImagePolicy(), ImagePolicy(8), ImagePolicy(min_size=20)]))
def test_plain_jpegs_become_without_pillow_what_they_become_with_it(data, changes, policy):
    data = damage(data, changes)
    short = describe_outcome(data, policy)
    lax = describe_outcome(data, dataclasses.replace(policy, check="structure"))
    with mock.patch("data_tools.image._copy_plain_jpeg", return_value=None):
        assert describe_outcome(data, policy) == short
    assert lax == short or isinstance(short, str)


def test_which_jpegs_need_no_pillow():
    with mock.patch("data_tools.image._prepare_any", side_effect=KeyError):
        outcomes = []
        for data in JPEGS:
            with contextlib.suppress(KeyError):
                outcomes.append((JPEGS.index(data), prepare_picture(data, ImagePolicy()).width))
    assert outcomes == [(0, 23), (1, 23), (2, 23), (3, 23), (7, 23), (8, 23)]


def test_a_webp_that_ends_in_a_chunks_header_is_no_run_of_chunks():
    assert strip_webp(b"RIFF\x80\0\0\0WEBPVP8X\n\0\0\0") is None


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x10\0\0\0WEBP", b"GIF89a", b"BM"]), st.binary()
)
def test_bytes_that_only_begin_as_a_picture(start, rest):
    with pytest.raises(PictureError):
        prepare_picture(start + rest, ImagePolicy())

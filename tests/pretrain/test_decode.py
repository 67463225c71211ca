"""Bytes to pixels: what other decoders see, upright, or BadSample. Reduced decoding stays near to full decoding."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pretrain.data.augment import AugmentConfig, Draws, train_pixels
from pretrain.data.decode import (
    BadSample,
    Box,
    choose_reduction,
    cut_out,
    decode_image,
    eval_crop,
    eval_pixels,
    open_picture,
    resize,
)
from pretrain.torchvision_ops import prepare_torchvision


def draw(height: int, width: int, seed: int = 0) -> np.ndarray:
    """[H,W,3] uint8 with as much of each scale as a photograph has: amplitudes fall as 1 / frequency."""
    noise = np.random.default_rng(seed).standard_normal((height, width, 3))
    down, across = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    falling = 1 / np.maximum(np.hypot(down, across), 1 / max(height, width))
    pixels = np.fft.ifft2(np.fft.fft2(noise, axes=(0, 1)) * falling[:, :, None], axes=(0, 1)).real
    return (128 + 40 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)


def encode(image: np.ndarray | Image.Image, format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tag_orientation(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = np.mean((one.astype(float) - other) ** 2)
    return 10 * np.log10(255**2 / error) if error else np.inf


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return np.abs(one.astype(int) - other).max()


# As others see it


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_upright(format: str, orientation: int) -> None:
    encoded = encode(draw(70, 90), format, exif=tag_orientation(orientation))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))))
    assert difference(decode_image(encoded), upright) <= 1
    picture = open_picture(encoded)
    assert (picture.height, picture.width) == upright.shape[:2] == ((70, 90) if orientation < 5 else (90, 70))
    for size in (33, 9):  # in full, and reduced
        box = Box(4, 8, 60, 52)
        expected = resize(upright[4:64, 8:60], size, size)
        assert psnr(cut_out(picture, box, size), expected) > (45 if size == 33 else 35)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_orientation_of_broken_exif_is_none() -> None:
    image = draw(20, 30)
    encoded = encode(image, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert decode_image(encoded).shape == (20, 30, 3)


def test_colours_are_rgb_on_white() -> None:
    image = draw(24, 32)
    grey = image[:, :, 0]
    three = np.repeat(grey[:, :, None], 3, axis=2)
    assert difference(decode_image(encode(grey, quality=95)), three) < 16
    assert difference(decode_image(encode(grey, "PNG")), three) == 0
    assert difference(decode_image(encode(grey.astype(np.uint16) * 256 + 200, "PNG")), three) == 0
    assert psnr(decode_image(encode(Image.fromarray(image).convert("CMYK"), quality=95)), image) > 30

    alpha = np.zeros((24, 32, 1), np.uint8)
    alpha[:, :16] = 255
    expected = np.where(alpha == 255, image, 255)
    clear = Image.fromarray(np.concatenate([image, alpha], axis=2))
    assert difference(decode_image(encode(clear, "PNG")), expected) == 0
    assert difference(decode_image(encode(clear, "WEBP", lossless=True)), expected) == 0
    palette = Image.fromarray((np.arange(24 * 32) % 4).reshape(24, 32).astype(np.uint8), "L").convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    seen = decode_image(encode(palette, "PNG", transparency=2))
    assert seen[0, :4].tolist() == [[255, 0, 0], [0, 255, 0], [255, 255, 255], [9, 9, 9]]


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP"):
        encoded = encode(frames[0], format, save_all=True, append_images=frames[1:])
        assert difference(decode_image(encoded), np.array([255, 0, 0])) < 4


def test_a_jpeg_that_libjpeg_turbo_has_doubts_about_goes_through_pillow() -> None:
    encoded = encode(draw(16, 16))
    table = encoded.index(b"\xff\xdb")
    doubtful = encoded[:table] + bytes(3) + encoded[table:]
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(doubtful)
    assert difference(decode_image(doubtful), decode_image(encoded)) <= 1
    assert torch.equal(train(doubtful, 8), train(encoded, 8))
    unnamed = bytearray(encode(draw(16, 16), subsampling=0))
    unnamed[unnamed.index(b"\xff\xc0") + 11] = 0x14  # 4:4:1, for which simplejpeg has no name
    with pytest.raises(KeyError):
        simplejpeg.decode_jpeg_header(bytes(unnamed))
    assert decode_image(bytes(unnamed)).shape == (16, 16, 3)


def test_evaluation_is_open_clips() -> None:
    prepare_torchvision()
    from open_clip import image_transform
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    mean, std = torch.tensor(OPENAI_DATASET_MEAN)[:, None, None], torch.tensor(OPENAI_DATASET_STD)[:, None, None]
    transform = image_transform(64, is_train=False)
    for height, width in ((96, 197), (233, 114), (64, 64), (40, 51), (400, 500)):
        encoded = encode(draw(height, width), quality=95)
        theirs = transform(Image.open(io.BytesIO(encoded))) * std + mean
        ours = eval_pixels(encoded, 64)
        assert ours.shape == (3, 64, 64) and ours.dtype == torch.uint8
        assert (ours - theirs * 255).abs().max() <= 2
        assert torch.equal(ours, eval_crop(decode_image(encoded), 64))


def test_resize_to_the_same_size_is_a_copy() -> None:
    image = draw(12, 12)
    same = resize(image, 12, 12)
    assert np.array_equal(same, image.transpose(2, 0, 1)) and same.transpose(1, 2, 0).flags.c_contiguous
    same[:] = 0
    assert image.any()


@pytest.mark.parametrize("shape", [(30, 50), (70, 40), (1, 90)])
def test_resize_is_torchs(shape: tuple[int, int]) -> None:
    image = draw(*shape)[1 if shape[0] > 1 else 0 :, : shape[1] - 3]  # a part, as a crop is
    expected = F.interpolate(
        torch.from_numpy(image.copy()).permute(2, 0, 1)[None], (33, 44), mode="bicubic", antialias=True
    )
    resized = resize(image, 33, 44)
    assert np.array_equal(resized, expected[0].numpy()) and resized.transpose(1, 2, 0).flags.c_contiguous


# Reduced decoding


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 512))
def test_a_reduced_picture_has_pixels_enough(height: int, width: int, size: int) -> None:
    by = choose_reduction(Box(0, 0, height, width), size)
    assert by == 1 or min(height, width) / by >= 1.5 * size
    assert by == 8 or min(height, width) / (2 * by) < 1.5 * size


@pytest.mark.parametrize(("side", "size", "reduction"), [(230, 70, 2), (460, 70, 4), (700, 56, 8), (330, 112, 1)])
def test_reduced_decoding_is_near_to_full_decoding(side: int, size: int, reduction: int) -> None:
    """At odd places, and to the right and lower edge of a picture whose sides are no multiples of 8."""
    encoded = encode(draw(side + 13, side + 6), quality=92)
    full = decode_image(encoded)
    for top, left in ((0, 0), (5, 3), (13, 6)):
        box = Box(top, left, side, side)
        assert choose_reduction(box, size) == reduction
        ours = cut_out(open_picture(encoded), box, size)
        expected = resize(full[top : top + side, left : left + side], size, size)
        assert np.array_equal(ours, expected) if reduction == 1 else psnr(ours, expected) > 32


def test_a_cut_at_whole_reduced_pixels_is_nearer() -> None:
    encoded = encode(draw(480, 480), quality=92)
    ours = cut_out(open_picture(encoded), Box(16, 8, 400, 440), 112)
    assert psnr(ours, resize(decode_image(encoded)[16:416, 8:448], 112, 112)) > 40


# Bad bytes


def train(encoded: bytes, size: int = 16, seed: int = 0) -> torch.Tensor:
    augment = AugmentConfig(crop_scale=[0.2, 1.0], flip=0.5)
    return train_pixels(encoded, size, augment, Draws(*np.random.default_rng(seed).random((5, 48))))


def refused(encoded: bytes) -> None:
    for use in (decode_image, train):
        with pytest.raises(BadSample):
            use(encoded)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"\xff\xd8", b"no picture", b"\xff\xd8\xff\xe0 cut short", b"\x89PNG\r\n\x1a\n cut", bytes(99)],
)
def test_bytes_that_are_no_picture(data: bytes) -> None:
    refused(data)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_picture_that_ends_early_is_bad(format: str) -> None:
    encoded = encode(draw(60, 80), format)
    for share in (0.1, 0.5, 0.9, 0.98):
        refused(encoded[: int(share * len(encoded))])


def test_a_progressive_jpeg_that_ends_early_is_bad() -> None:
    encoded = encode(draw(60, 80), progressive=True)
    assert decode_image(encoded).shape == (60, 80, 3)
    refused(encoded[: len(encoded) // 2])  # other decoders show it blurred


@pytest.mark.parametrize("junk", [b"\xff\0" * 200, bytes(400)], ids=["no code", "another code"])
@pytest.mark.parametrize("place", [800, 2000, 3000])
def test_damaged_coding_is_bad(place: int, junk: bytes) -> None:
    encoded = bytearray(encode(draw(60, 80), quality=95))
    encoded[place : place + 400] = junk
    refused(bytes(encoded))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP"])
def test_what_a_header_says_to_be_too_large_is_not_decoded(format: str) -> None:
    encoded = bytearray(encode(draw(8, 8), format))
    place, sides = {
        "JPEG": (encoded.find(b"\xff\xc0") + 5, struct.pack(">HH", 20_000, 20_000)),
        "PNG": (16, struct.pack(">II", 20_000, 20_000)),
        "GIF": (6, struct.pack("<HH", 20_000, 20_000)),
        "BMP": (18, struct.pack("<ii", 20_000, 20_000)),
    }[format]
    encoded[place : place + len(sides)] = sides
    encoded[29:33] = struct.pack(">I", zlib.crc32(encoded[12:29])) if format == "PNG" else encoded[29:33]
    with pytest.raises(BadSample, match="pixels|DecompressionBomb"):
        decode_image(bytes(encoded))


def test_a_jpeg_of_endless_scans_is_not_decoded() -> None:
    encoded = encode(np.zeros((2000, 3000), np.uint8), progressive=True)
    start = encoded.rindex(b"\xff\xda")
    endless = encoded[:start] + encoded[start:-2] * 501 + b"\xff\xd9"
    with pytest.raises(BadSample, match="scans"):
        decode_image(endless)


def test_a_picture_too_long_to_be_resized_is_bad() -> None:
    with pytest.raises(BadSample, match="pixels"):
        eval_crop(np.zeros((1, 10_000, 3), np.uint8), 224)
    assert train(encode(np.zeros((1, 2000, 3), np.uint8), "PNG")).shape == (3, 16, 16)


SOUND = {
    "JPEG": encode(draw(40, 48)),
    "progressive": encode(draw(40, 48), progressive=True),
    "CMYK": encode(Image.fromarray(draw(24, 32)).convert("CMYK")),
    "turned": encode(draw(24, 32), exif=tag_orientation(6)),
    "PNG": encode(Image.fromarray(draw(24, 32)).quantize(16), "PNG"),
    "WEBP": encode(draw(24, 32), "WEBP"),
    "GIF": encode(draw(24, 32), "GIF"),
    "BMP": encode(draw(8, 8), "BMP"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF and of much too large pictures
@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(SOUND)), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7))), st.data()
)
def test_flipped_bits_give_pixels_or_bad_sample(name: str, flips: list[tuple[float, int]], data: st.DataObject) -> None:
    encoded = bytearray(SOUND[name])
    for place, bit in flips:
        # Half of the flips into the header, where most of what can go wrong is decided.
        place = int(place * 2 * len(encoded)) if place < 0.5 else int((place - 0.5) * 2 * min(len(encoded), 200))
        encoded[place] ^= 1 << bit
    uses: list[Callable[[bytes], torch.Tensor]] = [train, lambda encoded: eval_pixels(encoded, 16)]
    for use in uses:
        try:
            pixels = use(bytes(encoded))
        except BadSample as error:
            assert str(error)
        else:
            assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8


def test_threads_do_not_change_pixels() -> None:
    pictures = [encode(draw(200 + 9 * seed, 260 - 7 * seed, seed)) for seed in range(8)]
    alone = [train(picture, 48, seed) for seed, picture in enumerate(pictures)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            together = list(pool.map(train, pictures, [48] * 8, range(8)))
            assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="torch resizes in its threads"
)
def test_no_threads_of_torchs_are_used() -> None:
    """Each decoding thread would get its own, and wait for them wherever the cores are taken."""
    encoded = encode(draw(300, 400))

    def count_threads() -> tuple[int, int, int]:
        torch.set_num_threads(4)
        before = len(os.listdir("/proc/self/task"))
        train(encoded, 224)
        eval_pixels(encoded, 224)
        ours = len(os.listdir("/proc/self/task"))
        torch.zeros(10**6).add_(1)  # what it looks like when they are
        return before, ours, len(os.listdir("/proc/self/task"))

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as pool:
            before, ours, torchs = pool.submit(count_threads).result()
    finally:
        torch.set_num_threads(threads)
    assert ours == before < torchs

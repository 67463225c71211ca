"""The transforms of training against torchvision's on Pillow's pictures, which are those of open_clip and timm."""

import io

import numpy as np
import pydantic
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pretrain.config import ConfigError, check_config
from pretrain.data.augment import (
    OPERATIONS,
    RAND_AUGMENT,
    AugmentConfig,
    ColorJitterConfig,
    Draws,
    RandAugmentConfig,
    change,
    choose_box,
    choose_jitter,
    choose_operations,
    draw,
    train_pixels,
)
from pretrain.data.decode import decode_image, resize
from pretrain.torchvision_ops import prepare_torchvision

ALL_ON = AugmentConfig(
    flip=1.0,
    color_jitter=ColorJitterConfig(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, probability=1.0),
    grey=1.0,
    policy=RandAugmentConfig(kind="rand_augment", count=2, magnitude=9.0),
)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """[H,W,3] uint8, of all colours, dark and bright."""
    noise = np.random.default_rng(3).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return np.array(Image.fromarray(noise).resize((110, 90), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def encoded(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def theirs():
    prepare_torchvision()
    from torchvision.transforms import v2

    return v2


def take(encoded: bytes, augment: AugmentConfig, seed: int = 0) -> np.ndarray:
    pixels = train_pixels(encoded, 48, augment, Draws(*np.random.default_rng(seed).random((5, 48))))
    assert pixels.shape == (3, 48, 48) and pixels.dtype == torch.uint8 and pixels.permute(1, 2, 0).is_contiguous()
    return pixels.numpy()


def draws(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(48)


# Crops


@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.integers(0, 10_000),
    st.sampled_from(["random_resized_crop", "center_crop"]),
)
def test_crops_lie_in_the_picture(height: int, width: int, seed: int, mode: str) -> None:
    box = choose_box(height, width, AugmentConfig(mode=mode, crop_scale=[0.05, 1.0]), draws(seed))
    assert box.height >= 1 and box.width >= 1 and box.top >= 0 and box.left >= 0
    assert box.top + box.height <= height and box.left + box.width <= width


def test_crops_are_spread_as_torchvisions(theirs) -> None:
    scale, ratio = [0.3, 0.9], [3 / 4, 4 / 3]
    transform = theirs.RandomResizedCrop(8, scale=scale, ratio=ratio)
    blank = [torch.zeros(3, 390, 470, dtype=torch.uint8)]
    torch.manual_seed(0)
    expected = [transform.make_params(blank) for _ in range(3000)]
    expected = np.array([[params[name] for name in ("top", "left", "height", "width")] for params in expected])
    config = AugmentConfig(crop_scale=scale, crop_ratio=ratio)
    ours = np.array([choose_box(390, 470, config, draws(seed)) for seed in range(3000)])
    deciles = np.linspace(5, 95, 10)
    for column in range(4):
        difference = np.percentile(ours[:, column], deciles) - np.percentile(expected[:, column], deciles)
        assert np.abs(difference).max() < 0.12 * expected[:, column].std() + 1
    log_ratios = [np.log(boxes[:, 3] / boxes[:, 2]) for boxes in (ours, expected)]
    assert abs(log_ratios[0].mean() - log_ratios[1].mean()) < 0.02
    assert abs(log_ratios[0].std() - log_ratios[1].std()) < 0.02


def test_a_crop_that_fits_nowhere_falls_back_to_the_middle_as_torchvisions(theirs) -> None:
    for height, width in ((10, 400), (400, 10)):
        transform = theirs.RandomResizedCrop(8, scale=(0.9, 1.0))
        expected = transform.make_params([torch.zeros(3, height, width, dtype=torch.uint8)])
        box = choose_box(height, width, AugmentConfig(), draws(0))
        assert box._asdict() == {name: expected[name] for name in ("top", "left", "height", "width")}


def test_modes(image: np.ndarray, encoded: bytes) -> None:
    assert np.array_equal(take(encoded, AugmentConfig(mode="squash")), resize(image, 48, 48))
    assert np.array_equal(take(encoded, AugmentConfig(mode="center_crop")), resize(image[:, 10:100], 48, 48))
    crops = {take(encoded, AugmentConfig(crop_scale=[0.2, 0.5]), seed).tobytes() for seed in range(5)}
    assert len(crops) == 5


# Operations


def adjusted(theirs, name: str, picture: Image.Image, amount: float) -> Image.Image:
    return getattr(theirs.functional, f"adjust_{name}")(picture, amount)


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.77, 1.0, 1.45, 1.9])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "sharpness"])
def test_adjustments_are_pillows(name: str, amount: float, image: np.ndarray, theirs) -> None:
    expected = np.asarray(adjusted(theirs, name, Image.fromarray(image), amount))
    assert np.array_equal(OPERATIONS[name](image, amount), expected)


@pytest.mark.parametrize("amount", [-0.5, -0.1, 0.0, 0.08, 0.5])
def test_hues_are_pillows(amount: float, image: np.ndarray, theirs) -> None:
    expected = np.asarray(adjusted(theirs, "hue", Image.fromarray(image), amount))
    assert np.array_equal(OPERATIONS["hue"](image, amount), expected)


THEIR_NAMES = {"autocontrast": "AutoContrast", "saturation": "Color"}


@pytest.mark.parametrize("magnitude", [0.0, 3.0, 10.0])
@pytest.mark.parametrize("name", RAND_AUGMENT)
def test_the_policy_does_what_torchvisions_does(name: str, magnitude: float, image: np.ndarray, theirs) -> None:
    transform = theirs.RandAugment(num_magnitude_bins=11, magnitude=int(magnitude), fill=128)
    their_name = THEIR_NAMES.get(name) or "".join(part.title() for part in name.split("_"))
    magnitudes, signed = transform._AUGMENTATION_SPACE[their_name]
    values = magnitudes(11, *image.shape[:2])
    value = 0.0 if values is None else float(values[int(magnitude)])
    level = RAND_AUGMENT[name]
    assert level.signed == signed
    for sign in (1, -1) if signed else (1,):
        picture = Image.fromarray(image)
        expected = transform._apply_image_or_video_transform(
            picture, their_name, sign * value, transform.interpolation, transform._fill
        )
        ours = change(image, [(name, level.amount(sign * magnitude / 10))])
        # Rounded coordinates: at an edge between two pixels, the last bit decides.
        assert (ours != np.asarray(expected)).mean() < 0.01


# Draws


def test_one_transform_does_not_change_the_draws_of_another(encoded: bytes) -> None:
    plain = take(encoded, AugmentConfig(), 5)
    assert np.array_equal(take(encoded, AugmentConfig(flip=1.0), 5), plain[:, :, ::-1])
    with_jitter = ALL_ON.model_copy(update={"grey": 0.0, "policy": None, "flip": 0.0})
    pixels = np.ascontiguousarray(plain.transpose(1, 2, 0))
    jitter = list(choose_jitter(ALL_ON.color_jitter, np.random.default_rng(5).random((5, 48))[3]))
    assert len(jitter) == 4
    assert np.array_equal(take(encoded, with_jitter, 5), change(pixels, jitter).transpose(2, 0, 1))
    policy = list(choose_operations(ALL_ON.policy, np.random.default_rng(5).random((5, 48))[2]))
    every = change(np.ascontiguousarray(pixels[:, ::-1]), [*policy, *jitter, ("saturation", 0.0)])
    assert np.array_equal(take(encoded, ALL_ON, 5), every.transpose(2, 0, 1))
    assert (every[:, :, 0] == every[:, :, 1]).all()


def test_draws_belong_to_their_positions_alone() -> None:
    some, others = draw(3, np.arange(50)), draw(3, np.array([49, 10**14, 7]))
    assert all(np.array_equal(*pair) for pair in zip(others[0], some[49], strict=True))
    assert all(np.array_equal(*pair) for pair in zip(others[2], some[7], strict=True))
    assert not np.array_equal(draw(4, np.array([7]))[0].crop, some[7].crop)
    every = np.array([list(drawn) for drawn in some])
    assert every.shape == (50, 5, 48) and len(np.unique(every)) == every.size
    assert 0 <= every.min() < 0.001 and 0.999 < every.max() < 1 and abs(every.mean() - 0.5) < 0.01


def test_the_same_draws_give_the_same_pixels(encoded: bytes) -> None:
    assert np.array_equal(take(encoded, ALL_ON, 1), take(encoded, ALL_ON, 1))
    assert not np.array_equal(take(encoded, ALL_ON, 1), take(encoded, ALL_ON, 2))


def test_all_is_off_by_default(image: np.ndarray, encoded: bytes) -> None:
    top, left, height, width = choose_box(90, 110, AugmentConfig(), np.random.default_rng(0).random((5, 48))[0])
    assert height * width >= 0.88 * 90 * 110
    part = decode_image(encoded)[top : top + height, left : left + width]
    assert np.array_equal(take(encoded, AugmentConfig()), resize(part, 48, 48))


def test_probabilities() -> None:
    often = [list(choose_jitter(ColorJitterConfig(hue=0.1, probability=0.3), draws(seed))) for seed in range(2000)]
    assert abs(sum(map(bool, often)) / 2000 - 0.3) < 0.04
    amounts = [changes[0][1] for changes in often if changes]
    assert {changes[0][0] for changes in often if changes} == {"hue"}
    assert -0.1 <= min(amounts) < -0.08 and 0.08 < max(amounts) <= 0.1
    config = ColorJitterConfig(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, probability=1.0)
    orders = [tuple(name for name, _ in choose_jitter(config, draws(seed))) for seed in range(1000)]
    assert len(set(orders)) == 24


def test_a_policy_chooses_each_operation_alike_often_and_both_ways() -> None:
    config = RandAugmentConfig(kind="rand_augment", count=2, magnitude=5.0)
    chosen = [one for seed in range(3000) for one in choose_operations(config, draws(seed))]
    assert len(chosen) == 6000
    counts = {name: sum(name == one for one, _ in chosen) for name in RAND_AUGMENT}
    assert min(counts.values()) > 340 and max(counts.values()) < 520  # 429 each on average
    assert {round(amount, 6) for name, amount in chosen if name == "rotate"} == {-15.0, 15.0}
    few = config.model_copy(update={"operations": ["rotate", "solarize"], "count": 16})
    assert {name for name, _ in choose_operations(few, draws(0))} == {"rotate", "solarize"}


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"crop_scale": [0.9, 0.1]}, "crop_scale: give the least"),
        ({"crop_scale": [0.0, 1.0]}, "crop_scale: give the least"),
        ({"crop_ratio": [1.5, 1.0]}, "crop_ratio: give the least"),
        ({"flip": True}, "flip"),
        ({"flip": 1.5}, "flip"),
        ({"mode": "crop"}, "mode"),
        ({"policy": {"kind": "rand_augment", "count": 17}}, "policy.count"),
        ({"policy": {"kind": "rand_augment", "operations": ["blur"]}}, "unknown operation 'blur'. Valid: identity"),
        ({"policy": {"kind": "auto_augment"}}, "policy.kind"),
        ({"color_jitter": {"hue": 0.6}}, "color_jitter.hue"),
        ({"color_jitter": {"hues": 0.1}}, "color_jitter.hues: unknown key. Did you mean 'hue'?"),
    ],
)
def test_mistakes_are_named(values: dict, part: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_config(values, AugmentConfig, "augment")
    assert part in str(error.value) and "\n" not in str(error.value)


def test_configs_go_through_yaml() -> None:
    assert AugmentConfig.model_validate(ALL_ON.model_dump()) == ALL_ON
    with pytest.raises(pydantic.ValidationError):
        ALL_ON.flip = 0.0

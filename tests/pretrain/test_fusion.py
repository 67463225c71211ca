"""Every fusion kind: shapes, padding, gradients, independence of the batch; `med` against transformers' BLIP."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from pretrain.config import ConfigError, check_config
from pretrain.data.text import ClipTokenizerConfig, Tokenizer
from pretrain.model.fusion import FUSIONS, Fused
from pretrain.model.names import from_blip, to_blip
from pretrain.model.towers import Bert, BertConfig, HuggingfaceImage, HuggingfaceImageConfig, unit
from pretrain.world import World

PAIRS, LENGTH, PATCHES = 5, 7, 9
TEXT_WIDTH, IMAGE_WIDTH, WIDTH = 24, 20, 16
SIZES = {"width": WIDTH, "layers": 2, "heads": 2}
KINDS = {
    "text_to_image": {"kind": "cross", **SIZES},
    "image_to_text": {"kind": "cross", "direction": "image_to_text", **SIZES},
    "both": {"kind": "cross", "direction": "both", **SIZES},
    "shared": {"kind": "shared", **SIZES},
    "weighted": {"kind": "weighted", **SIZES},
    "med": {"kind": "med"},
    "med own layers": {"kind": "med", "layers": 2},
}
TEXT_TOKENS = ("text_to_image", "med", "med own layers")  # whose fused tokens are the text's

TOKENIZER = Tokenizer(ClipTokenizerConfig(), 50, LENGTH, None, end_id=49, padding_id=0)


def build_text_tower(text_layer: int | None = None, width: int = TEXT_WIDTH) -> Bert:
    sizes = {"kind": "bert", "context_length": LENGTH, "width": width, "heads": 2, "layers": 3, "dropout": 0.0}
    return Bert(BertConfig(**sizes), 8, TOKENIZER, text_layer)


def build_fusion(name: str) -> nn.Module:
    torch.manual_seed(0)
    values = KINDS[name]
    config = check_config(values, FUSIONS[values["kind"]], "test")
    tower = build_text_tower(config.text_layer) if config.kind == "med" else SimpleNamespace(width=TEXT_WIDTH)
    fusion = config.build(IMAGE_WIDTH, tower).double()
    if config.kind == "med":
        tower.double()
    return fusion


def draw_pairs() -> tuple[Tensor, Tensor, Tensor]:
    """Text, its mask, image: float64. Texts of 1 to 7 tokens."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(PAIRS, LENGTH, TEXT_WIDTH, generator=generator, dtype=torch.float64)
    image = torch.randn(PAIRS, PATCHES, IMAGE_WIDTH, generator=generator, dtype=torch.float64)
    mask = torch.arange(LENGTH) < torch.tensor([7, 1, 3, 5, 2])[:, None]
    return text, mask, image


def assert_same(found: Fused, expected: Fused) -> None:
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.tokens[found.mask], expected.tokens[found.mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_tokens_mask_and_pooled_vector(name: str) -> None:
    fusion = build_fusion(name)
    text, mask, image = draw_pairs()
    fused = fusion(text, mask, image)
    all_image = torch.ones(PAIRS, PATCHES, dtype=torch.bool)
    expected = {"image_to_text": all_image} | dict.fromkeys(TEXT_TOKENS, mask)
    assert torch.equal(fused.mask, expected.get(name, torch.cat([mask, all_image], 1)))
    assert fused.tokens.shape == (*fused.mask.shape, fusion.width) and fused.pooled.shape == (PAIRS, fusion.width)
    assert fusion.width == (TEXT_WIDTH if name.startswith("med") else WIDTH)


@pytest.mark.parametrize("name", KINDS)
def test_padding_changes_nothing(name: str) -> None:
    fusion = build_fusion(name)
    text, mask, image = draw_pairs()
    other = text.where(mask[..., None], 100 * torch.randn_like(text))
    assert_same(fusion(other, mask, image), fusion(text, mask, image))


@pytest.mark.parametrize("name", KINDS)
def test_a_pair_does_not_depend_on_the_rest_of_its_batch(name: str) -> None:
    fusion = build_fusion(name)
    text, mask, image = draw_pairs()
    whole, rows = fusion(text, mask, image), torch.tensor([3, 0, 4])
    assert_same(fusion(text[rows], mask[rows], image[rows]), Fused(*(part[rows] for part in whole)))
    images = torch.tensor([1, 1, 0])  # of which one goes with two texts
    assert_same(fusion(text[rows], mask[rows], image, images), fusion(text[rows], mask[rows], image[images]))


@pytest.mark.parametrize("name", KINDS)
def test_gradients_reach_both_sides_and_every_weight(name: str) -> None:
    fusion = build_fusion(name)
    text, mask, image = draw_pairs()
    text.requires_grad_(), image.requires_grad_()
    fused = fusion(text, mask, image)
    (fused.pooled.square().sum() + fused.tokens[fused.mask].sin().sum()).backward()
    assert (text.grad[mask].abs().sum(-1) > 0).all() and (image.grad.abs().sum(-1) > 0).all()
    assert (text.grad[~mask] == 0).all()
    for parameter_name, parameter in fusion.named_parameters():
        assert parameter.ndim == 1 or parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", KINDS)
def test_the_pooled_vector_sees_one_other_word_and_one_other_patch(name: str) -> None:
    fusion = build_fusion(name)
    text, mask, image = draw_pairs()
    pooled = fusion(text, mask, image).pooled
    other_text, other_image = text.clone(), image.clone()
    other_text[0, 4] += 1
    other_image[0, 4] += 1
    for changed in (fusion(other_text, mask, image).pooled, fusion(text, mask, other_image).pooled):
        assert (changed - pooled)[0].abs().max() > 1e-4 and torch.equal(changed[1:], pooled[1:])


@pytest.mark.parametrize("name", KINDS)
def test_dropout_is_on_in_training_only(name: str) -> None:
    values = KINDS[name] | {"dropout": 0.5}
    config = check_config(values, FUSIONS[values["kind"]], "test")
    tower = build_text_tower(config.text_layer).double()
    fusion = config.build(IMAGE_WIDTH, tower).double()
    pairs = draw_pairs()
    assert not torch.equal(fusion(*pairs).pooled, fusion(*pairs).pooled)
    assert torch.equal(fusion.eval()(*pairs).pooled, fusion(*pairs).pooled)


def test_a_width_must_hold_its_heads() -> None:
    for kind in ("cross", "shared", "weighted"):
        with pytest.raises(ConfigError, match="width 16 is not a multiple of heads 3"):
            check_config({"kind": kind, "width": 16, "heads": 3}, FUSIONS[kind], "test")


def test_med_shares_the_text_tower_s_layers_and_saves_them_once() -> None:
    tower = build_text_tower(1)
    fusion = FUSIONS["med"](kind="med", from_layer=1).build(IMAGE_WIDTH, tower)
    assert len(fusion.cross) == 2 and fusion.cross[0].bert_layer == (tower.bert_layers[1],)
    assert {name.partition(".")[0] for name in fusion.state_dict()} == {"cross"}
    text = torch.randn(2, LENGTH, TEXT_WIDTH)
    fusion(text, torch.ones(2, LENGTH, dtype=torch.bool), torch.randn(2, PATCHES, IMAGE_WIDTH)).pooled.sum().backward()
    used = [layer.intermediate.dense.weight.grad is not None for layer in tower.bert_layers]
    assert used == [False, True, True]


def test_med_needs_layers_of_bert() -> None:
    clip = SimpleNamespace(width=TEXT_WIDTH, bert_layers=None, inner=None)
    with pytest.raises(ConfigError, match="model.text.kind=bert"):
        FUSIONS["med"](kind="med").build(IMAGE_WIDTH, clip)
    with pytest.raises(ConfigError, match="3 leaves none of the text tower's 3 layers"):
        FUSIONS["med"](kind="med", from_layer=3).build(IMAGE_WIDTH, build_text_tower())


class Blip(nn.Module):
    """The parts of our model that make BLIP, under the names that they have there."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        vision = {"model_type": "blip_vision_model", "patch_size": 8, **sizes}
        image = {"kind": "huggingface", "config": vision, "image_size": 16, "pooling": "first", "projection_bias": True}
        text = {"kind": "bert", "context_length": LENGTH, "width": 24, "heads": 2, "layers": 3, "dropout": 0.0}
        text |= {"pooling": "first", "projection_bias": True}
        fusion = FUSIONS["med"](kind="med")
        self.image_tower = HuggingfaceImage(HuggingfaceImageConfig(**image), 8, World())
        self.text_tower = Bert(BertConfig(**text), 8, TOKENIZER, fusion.text_layer)
        self.fusion = fusion.build(32, self.text_tower)
        self.match_head = nn.Linear(24, 2)


@pytest.fixture(scope="module")
def blip() -> tuple[Blip, nn.Module]:
    """Ours, and transformers' BlipForImageTextRetrieval of the same sizes; weights of its own each."""
    import transformers

    torch.manual_seed(2)
    ours = Blip().eval()
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96}
    config = transformers.BlipConfig(
        text_config={"vocab_size": 50, "max_position_embeddings": LENGTH, **sizes},
        vision_config=ours.image_tower.inner.config.to_dict(),
        image_text_hidden_size=8,
    )
    theirs = transformers.BlipForImageTextRetrieval(config).eval()
    for model in (ours, theirs):
        for parameter in model.parameters():  # biases and gains too, and far from the fresh weights' near uniformity
            parameter.data += 0.1 * torch.randn_like(parameter)
    return ours, theirs


@torch.no_grad()
def assert_equal_to_blip(ours: Blip, theirs: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(4, 3, 16, 16, generator=generator)
    ids = torch.randint(1, 50, (4, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.tensor([7, 2, 5, 3])[:, None]
    image, text = ours.image_tower(pixels), ours.text_tower(ids, mask)
    logits = ours.match_head(ours.fusion(text.tokens, mask, image.tokens).pooled)
    inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask.long()}
    assert logits.std() > 0.1
    assert (logits - theirs(**inputs).itm_score).abs().max() < 1e-5
    cosines = unit(image.pooled) @ unit(text.pooled).T
    assert (cosines - theirs(**inputs, use_itm_head=False).itm_score).abs().max() < 1e-5


def test_med_as_transformers_blip(blip: tuple[Blip, nn.Module]) -> None:
    ours, theirs = blip
    theirs.load_state_dict(to_blip(ours.state_dict()))
    assert_equal_to_blip(ours, theirs)


def test_transformers_blip_as_med(blip: tuple[Blip, nn.Module]) -> None:
    ours, theirs = blip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ours.load_state_dict(from_blip(theirs.state_dict()))
    assert_equal_to_blip(ours, theirs)

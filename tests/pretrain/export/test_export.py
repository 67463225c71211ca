"""Every pair of towers through every format, reloaded here by the library that the format is for."""

import io
import json
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data_tools.errors import UserError
from data_tools.files import lock_folder, write_atomic, write_json_atomic
from data_tools.shards import Manifest, write_shard
from pretrain import checkpoint
from pretrain.__main__ import main
from pretrain.config import check_config, render_config
from pretrain.data.decode import eval_crop
from pretrain.data.loader import DataConfig
from pretrain.data.text import build_tokenizer
from pretrain.export import EXPORTS, export_run, load
from pretrain.export.compare import build_probes, draw_picture, is_cropped_aside
from pretrain.model.model import build_model
from pretrain.model.towers import PIXEL_MEAN, PIXEL_STD, normalise, unit
from pretrain.randomness import generator
from pretrain.restore import load_run
from pretrain.torchvision_ops import prepare_torchvision
from pretrain.train import RunConfig, load_run_config

prepare_torchvision()

OWN_PIXELS = {"pixel_mean": [0.5, 0.4, 0.3], "pixel_std": [0.2, 0.25, 0.3]}
IMAGE_TOWERS = {
    "vit": {"kind": "vit", "image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16,
            "patch_dropout": 0.5},
    "resnet": {"kind": "resnet", "image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
    "quick": {"kind": "vit", "image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16,
              "activation": "quick_gelu", **OWN_PIXELS},
    "timm": {"kind": "timm", "name": "test_resnet", "image_size": 32, **OWN_PIXELS},
    "blip": {"kind": "huggingface", "image_size": 32, "pooling": "first", "projection_bias": True,
             "config": {"model_type": "blip_vision_model", "hidden_size": 32, "num_hidden_layers": 2,
                        "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}, **OWN_PIXELS},
}  # fmt: skip
TEXT_TOWERS = {
    "clip": {"kind": "clip", "context_length": 16, "width": 32, "heads": 4, "layers": 2},
    "bert": {"kind": "bert", "context_length": 16, "width": 32, "heads": 4, "layers": 2},
    "quick": {"kind": "clip", "context_length": 16, "width": 32, "heads": 4, "layers": 1, "activation": "quick_gelu"},
    "roberta": {"kind": "huggingface", "context_length": 16, "pooling": "mean",
                "config": {"model_type": "roberta", "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 1,
                           "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 20}},
    "blip": {"kind": "bert", "context_length": 16, "width": 32, "heads": 4, "layers": 2, "pooling": "first",
             "projection_bias": True},
}  # fmt: skip
CROSS = {"kind": "cross", "width": 32, "layers": 1, "heads": 4}
FUSIONS = {"blip": {"kind": "med"}}  # by text tower; any other has CROSS
CAPTIONS = ["a dog runs!", "two cats &amp; a dog", "wow! so red", "the cat's asleep", "3 children; one ball"]
TEXTS = ["A dog runs!", "the cat's asleep", "3 children, one ball", "a long caption " * 20]
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing here may ask the hub, or anyone; not even if it takes the refusal in its stride."""
    asked = []

    def refuse(*arguments, **options):
        asked.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert asked == []


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "train"
    folder.mkdir()
    with write_shard(folder, "00000.tar") as shard:
        for number, caption in enumerate(CAPTIONS):
            encoded = io.BytesIO()
            Image.fromarray(draw_picture(40, 50 + number, generator(1, "picture", number))).save(encoded, "JPEG")
            shard.add(f"{number:05d}", {"jpg": encoded.getvalue(), "txt": caption.encode()})
    Manifest.of_shards(folder, [shard.info], captions=len(CAPTIONS)).write()
    return folder


@pytest.fixture(scope="session")
def word_pieces(tmp_path_factory):
    """A folder with a small BERT tokenizer, whose padding is not id 0."""
    from transformers import BertTokenizerFast

    pieces = [
        *"abcdefghijklmnopqrstuvwxyz0123456789!,;:.()'",
        *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
    ]
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *pieces, "dog", "cat", "the", "asleep", "photo"]
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def build_run(tmp_path_factory, shards, word_pieces):
    """build_run(image, text, tokenizer) -> a run folder with one checkpoint, as training leaves it. Cached."""
    made = {}

    def build(image, text, tokenizer, log_scale=3.0):
        key = (image, text, tokenizer, log_scale)
        if key not in made:
            made[key] = write_run(tmp_path_factory.mktemp("-".join(map(str, key))), key, shards, word_pieces)
        return made[key]

    return build


@pytest.fixture(scope="session")
def build_export(tmp_path_factory, build_run):
    """build_export(to, image, text, tokenizer) -> the folder that the command writes. Cached: copy it to change it."""
    made = {}

    def build(to, *towers):
        key = (to, *towers)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("exports") / "my-model"
            assert export(build_run(*towers), to, made[key]) == 0
        return made[key]

    return build


def write_run(run, key, shards, word_pieces, bias=None):
    image, text, tokenizer, log_scale = key
    values = {
        "run": str(run),
        "data": {"path": str(shards)},
        "model": {
            "embed_dim": 24,
            "image": IMAGE_TOWERS[image],
            "text": TEXT_TOWERS[text],
            "tokenizer": {"kind": "clip"} if tokenizer == "clip" else {"kind": "huggingface", "name": str(word_pieces)},
            "fusion": FUSIONS.get(text, CROSS),
            "init_logit_bias": bias,
        },
        "losses": {"matching": {}, "sigmoid": None if bias is None else {}},
        "train": {"batch_size": 4, "duration": "7 steps"},
    }
    config = check_config(values, RunConfig, "test")
    write_atomic(run / "config.yaml", render_config(config).encode())
    model = build_model(config.model, build_tokenizer(config.model.tokenizer, 16))
    draw = torch.Generator().manual_seed(1)
    weights = model.state_dict()
    for name, value in weights.items():  # biases, gains and running statistics too, so that each has to go to its place
        if value.is_floating_point() and value.ndim == 1:
            weights[name] = value + 0.1 * torch.rand(value.shape, generator=draw)
    weights["logit_scale.log_scale"] = torch.tensor([log_scale])
    if bias is not None:
        weights["logit_bias.bias"] = torch.tensor([bias])
    temporary = run / "checkpoints" / "tmp_step_00000007"
    temporary.mkdir(parents=True)
    save_file(weights, temporary / checkpoint.WEIGHTS)
    files = {checkpoint.WEIGHTS: checkpoint.seal(temporary / checkpoint.WEIGHTS)}
    checkpoint.finish(temporary, run / "checkpoints" / "step_00000007", {"step": 7}, files)
    return run


def export(run, to, out):
    return main(["export", "--run", str(run), "--to", to, "--out", str(out)])


def assert_close(theirs, ours, tolerance=TOLERANCE):
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() <= tolerance


def pixel_difference(theirs, ours):
    return ((theirs - ours) * torch.tensor(PIXEL_STD)[:, None, None] * 255).abs().max()


@pytest.fixture
def pictures():
    """Drawn pictures, none of which the two ways of rounding the crop tell apart."""
    return [
        draw_picture(height, width, generator(2, "picture", width)) for height, width in [(40, 50), (77, 64), (20, 24)]
    ]


@torch.no_grad()
def embed_with_run(run, pictures, texts):
    source = load_run(run)
    pixels = torch.stack([eval_crop(picture, 32) for picture in pictures])
    image, text = source.model.encode_image(pixels), source.model.encode_text(*source.tokenizer(texts))
    return source.config.model.image.normalise(pixels), unit(image.pooled), unit(text.pooled)


ALL_RUNS = [
    (image, text, tokenizer)
    for image in ("vit", "resnet")
    for text in ("clip", "bert")
    for tokenizer in ("clip", "pieces")
]
OTHER_RUNS = [("timm", "roberta", "pieces"), ("quick", "quick", "clip")]
PAIRS = [("vit", "clip", "clip"), ("vit", "bert", "pieces"), ("resnet", "clip", "pieces"), ("resnet", "bert", "clip")]
BLIP_RUNS = [("blip", "blip", "clip"), ("blip", "blip", "pieces")]


def choose(runs):
    """Parameters of tests: in `make test` each two parts meet once, in `make test-faults` all three."""
    rare = [towers for towers in ALL_RUNS if towers not in PAIRS]
    return [
        pytest.param(towers, id="-".join(towers), marks=[pytest.mark.faults] if towers in rare else [])
        for towers in runs
    ]


@pytest.mark.parametrize("towers", choose(ALL_RUNS + OTHER_RUNS))
def test_open_clip_loads_the_folder(towers, build_run, build_export, pictures):
    import open_clip

    run, out = build_run(*towers), build_export("open_clip", *towers)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
    model.eval()
    pixels, image, text = embed_with_run(run, pictures, TEXTS)
    with torch.no_grad():
        assert_close(model.encode_image(pixels, normalize=True), image)
        assert_close(model.encode_text(tokenizer(TEXTS), normalize=True), text)
    assert isinstance(model, open_clip.CLIP if towers[1] in ("clip", "quick") else open_clip.CustomTextCLIP)
    assert model.logit_scale.shape == () and model.logit_scale.item() == pytest.approx(3.0, abs=1e-6)
    for picture, ours in zip(pictures, pixels, strict=True):
        assert pixel_difference(preprocess(Image.fromarray(picture)), ours) <= 2


@pytest.mark.parametrize(
    "towers", choose([towers for towers in ALL_RUNS + OTHER_RUNS if towers[0] in ("vit", "quick")])
)
def test_transformers_loads_the_folder(towers, build_run, build_export, pictures):
    import transformers

    run, out = build_run(*towers), build_export("huggingface", *towers)
    names = ("CLIPModel", "CLIPProcessor")
    if towers[1] == "bert":
        names = ("VisionTextDualEncoderModel", "VisionTextDualEncoderProcessor")
    model, processor = (getattr(transformers, name).from_pretrained(out) for name in names)
    assert type(transformers.AutoProcessor.from_pretrained(out)) is type(processor)
    inputs = processor(text=TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    ids, mask = load_run(run).tokenizer(TEXTS)
    assert torch.equal(inputs["input_ids"], ids) and torch.equal(inputs["attention_mask"].bool(), mask)
    pixels, image, text = embed_with_run(run, pictures, TEXTS)
    with torch.no_grad():
        output = model(**inputs, pixel_values=pixels)
        shorter = processor(text=TEXTS[:3], padding=True, truncation=True, return_tensors="pt")
        short_text = model(**shorter, pixel_values=pixels).text_embeds
    assert_close(output.image_embeds, image)
    assert_close(output.text_embeds, text)
    assert_close(short_text, text[:3])
    assert_close(output.logits_per_image, np.exp(3.0) * image @ text.T, 1e-4)
    for picture, ours in zip(pictures, pixels, strict=True):
        theirs = processor(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
        assert pixel_difference(theirs, ours) <= 2


def test_tokenizer_json_alone_does_not_take_signs_for_padding(build_export):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(build_export("huggingface", "vit", "clip", "clip") / "tokenizer.json"))
    assert tokenizer.encode("wow! !").ids == [49406, 2781, 256, 256, 49407]


@pytest.mark.parametrize(("to", "towers"), [
    ("open_clip", ("vit", "clip", "pieces")),
    ("huggingface", ("vit", "bert", "pieces")),
    ("blip", ("blip", "blip", "pieces")),
    ("native", ("vit", "clip", "pieces")),
    ("native", ("timm", "roberta", "pieces")),
])  # fmt: skip
def test_no_file_names_a_place_of_this_machine(to, towers, build_export, tmp_path_factory):
    for path in build_export(to, *towers).rglob("*.*"):
        assert str(tmp_path_factory.getbasetemp()).encode() not in path.read_bytes(), path.name


@pytest.mark.parametrize("towers", choose(BLIP_RUNS))
def test_transformers_loads_blip(towers, build_run, build_export, pictures):
    from transformers import AutoImageProcessor, AutoTokenizer, BlipForImageTextRetrieval

    run, out = build_run(*towers), build_export("blip", *towers)
    model, told = BlipForImageTextRetrieval.from_pretrained(out, output_loading_info=True)
    assert not any(told.values())
    inputs = AutoTokenizer.from_pretrained(out)(
        TEXTS[:3], padding="max_length", truncation=True, return_tensors="pt", return_token_type_ids=False
    )
    source = load_run(run)
    ids, mask = source.tokenizer(TEXTS[:3])
    assert torch.equal(inputs["input_ids"], ids) and torch.equal(inputs["attention_mask"].bool(), mask)
    pixels, image, text = embed_with_run(run, pictures, TEXTS[:3])
    for picture, ours in zip(pictures, pixels, strict=True):
        theirs = AutoImageProcessor.from_pretrained(out)(images=Image.fromarray(picture), return_tensors="pt")
        assert pixel_difference(theirs["pixel_values"][0], ours) <= 2
    with torch.no_grad():
        seen, read = source.model.image_tower(pixels), source.model.encode_text(ids, mask)
        logits = source.model.match_pairs(read.tokens, mask, seen.tokens)
        assert_close(model.eval()(pixel_values=pixels, **inputs).itm_score, logits)
        assert_close(model(pixel_values=pixels, **inputs, use_itm_head=False).itm_score, image @ text.T)


@pytest.mark.parametrize(("to", "towers", "message"), [
    ("blip", ("vit", "clip", "clip"), "model.image is vit where BlipForImageTextRetrieval has blip_vision_model"),
    ("blip", ("blip", "bert", "clip"), "model.text.pooling is pooler"),
    ("open_clip", ("blip", "clip", "clip"), "no image towers of transformers"),
    ("open_clip", ("vit", "blip", "clip"), "its projection has no bias"),
    ("open_clip", ("vit", "quick", "clip"), "both towers need the same activation"),
    ("huggingface", ("vit", "roberta", "pieces"), "takes a text tower of kind clip or bert"),
    ("huggingface", ("vit", "blip", "clip"), "projects BERT's pooler, without a bias"),
])  # fmt: skip
def test_what_a_format_cannot_hold_is_refused(to, towers, message, build_run, tmp_path, capsys):
    assert export(build_run(*towers), to, tmp_path / "export") == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "--to native" in error and "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_native_export_carries_no_place_and_nothing_of_training(build_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(build_run("blip", "roberta", "pieces"), run)
    load_run(run).model.image_tower.inner.config.save_pretrained(tmp_path / "vision")
    config = load_run(run).config.model_dump()
    config["model"]["image"] |= {"name": str(tmp_path / "vision"), "config": {}}
    config["model"] |= {"freeze": ["image_tower"], "checkpoint_activations": True}
    config["model"]["warm_start"] = [{"kind": "native", "path": "/gone"}]
    (run / "config.yaml").write_text(render_config(check_config(config, RunConfig, "test")))
    assert export(run, "native", tmp_path / "export") == 0
    shutil.rmtree(tmp_path / "vision")
    loaded = load(tmp_path / "export")
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not loaded.config.warm_start and not loaded.config.checkpoint_activations
    assert str(tmp_path) not in (tmp_path / "export" / "config.json").read_text()


@pytest.mark.parametrize("towers", choose(ALL_RUNS + OTHER_RUNS + BLIP_RUNS))
def test_load_gives_the_whole_model_back(towers, build_run, build_export, pictures, tmp_path):
    run, moved = build_run(*towers), tmp_path / "moved"
    shutil.copytree(build_export("native", *towers), moved)  # nothing in it depends on its place
    loaded, source = load(moved), load_run(run)
    assert not loaded.model.training and loaded.config.fusion == source.config.model.fusion
    assert set(loaded.model.state_dict()) == set(source.model.state_dict())
    _, image, text = embed_with_run(run, pictures, TEXTS)
    opened = [Image.fromarray(picture) for picture in pictures]
    assert_close(loaded.embed_images(opened), image)
    assert_close(loaded.embed_texts(TEXTS), text)
    assert loaded.logit_scale == pytest.approx(np.exp(3.0))
    with torch.no_grad():
        ids, mask = source.tokenizer(TEXTS[:3])
        pixels = torch.stack([eval_crop(picture, 32) for picture in pictures])
        tokens = source.model.encode_text(ids, mask).tokens, mask, source.model.encode_image(pixels).tokens
        logits = source.model.match_pairs(*tokens)
    assert_close(loaded.match_logits(opened, TEXTS[:3]), logits)
    assert_close(loaded.match(pixels, TEXTS[:3]), logits.softmax(1)[:, 1])


def test_load_takes_encoded_pictures_and_any_number_of_rows(build_export):
    loaded = load(build_export("native", "vit", "clip", "clip"))
    encoded = io.BytesIO()
    Image.fromarray(draw_picture(48, 40, generator(3, "picture", 0))).save(encoded, "PNG")
    many = [encoded.getvalue()] * 70
    rows = loaded.embed_images(many)
    assert rows.shape == (70, 24) and torch.allclose(rows, rows[:1].expand(70, -1), atol=1e-6)
    assert loaded.match(many, ["a dog"] * 70).shape == (70,)
    assert loaded.embed_texts([]).shape == (0, 24)
    with pytest.raises(ValueError, match="2 pictures and 1 texts"):
        loaded.match(many[:2], ["a dog"])
    with pytest.raises(TypeError, match="list of texts"):
        loaded.embed_texts("a dog")


def test_native_keeps_gradients_for_fine_tuning(build_export):
    loaded = load(build_export("native", "vit", "bert", "clip"))
    loaded.model.encode_text(*loaded.tokenizer(["a dog"])).pooled.sum().backward()
    assert loaded.model.text_tower.projection.weight.grad.abs().sum() > 0


def test_a_native_export_without_fusion_does_not_match(build_run, tmp_path):
    run = write_run_without_fusion(build_run("vit", "clip", "clip"), tmp_path / "run")
    assert export(run, "native", tmp_path / "export") == 0
    with pytest.raises(ValueError, match="without fusion"):
        load(tmp_path / "export").match([], [])


def write_run_without_fusion(whole, run):
    folder = run / "checkpoints" / "step_00000007"
    folder.parent.mkdir(parents=True)
    config = load_run(whole).config.model_dump()
    config["model"]["fusion"] = config["losses"]["matching"] = None
    write_atomic(run / "config.yaml", render_config(check_config(config, RunConfig, "test")).encode())
    weights = load_file(whole / "checkpoints" / folder.name / checkpoint.WEIGHTS)
    temporary = run / "checkpoints" / "tmp"
    temporary.mkdir()
    kept = {name: value for name, value in weights.items() if not name.startswith(("fusion", "match_head"))}
    save_file(kept, temporary / checkpoint.WEIGHTS)
    checkpoint.finish(
        temporary, folder, {"step": 7}, {checkpoint.WEIGHTS: checkpoint.seal(temporary / checkpoint.WEIGHTS)}
    )
    return run


@pytest.mark.parametrize("to", EXPORTS)
def test_the_bias_of_the_sigmoid_loss_is_there_or_said_to_be_missing(to, shards, word_pieces, tmp_path):
    towers = ("blip", "blip", "clip") if to == "blip" else ("vit", "clip", "clip")
    (tmp_path / "run").mkdir()
    run = write_run(tmp_path / "run", (*towers, 3.0), shards, word_pieces, bias=-7.5)
    out = tmp_path / "export"
    assert export(run, to, out) == 0
    card = (out / "README.md").read_text()
    if to in ("open_clip", "native"):
        assert EXPORTS[to].reload(out).logit_bias == -7.5 and "- logit bias: " in card
    else:
        assert "no logit bias, which is -7.5" in card


@pytest.mark.parametrize("to", EXPORTS)
def test_the_logit_scale_is_capped_as_in_training(to, build_run, tmp_path):
    towers = ("blip", "blip", "clip") if to == "blip" else ("vit", "clip", "clip")
    run = build_run(*towers, 6.0)  # the model itself goes no further than 100
    assert export(run, to, tmp_path / "export") == 0
    assert EXPORTS[to].reload(tmp_path / "export").logit_scale == pytest.approx(100)


@pytest.mark.parametrize(("to", "towers"), [
    ("open_clip", ("resnet", "clip", "clip")),
    ("open_clip", ("vit", "bert", "pieces")),
    ("huggingface", ("vit", "clip", "clip")),
    ("huggingface", ("vit", "clip", "pieces")),
    ("huggingface", ("vit", "bert", "pieces")),
    ("blip", ("blip", "blip", "pieces")),
    ("native", ("resnet", "bert", "clip")),
])  # fmt: skip
def test_the_code_in_the_model_card_runs(to, towers, build_run, tmp_path, monkeypatch, capsys):
    assert export(build_run(*towers), to, tmp_path / "my-model") == 0
    printed = capsys.readouterr().out
    Image.fromarray(draw_picture(40, 50, generator(4, "picture", 0))).save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    card = (tmp_path / "my-model" / "README.md").read_text()
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})  # noqa: S102
    assert "tensor" in capsys.readouterr().out
    for line in (
        "image embeddings: largest difference",
        "text embeddings: largest difference",
        "5 of the pictures and texts are from train",
    ):
        assert line in card and line in printed
    assert "| steps | 7 |" in card and "| samples seen | 28 |" in card and "| trained on | train |" in card
    assert ("its heads are not here" in card) == (to not in ("native", "blip"))
    assert str(tmp_path) not in card.replace(str(tmp_path / "my-model" / "text_model"), "")


def test_the_code_in_the_documentation_runs(build_export, tmp_path, monkeypatch):
    text = (Path(__file__).parents[3] / "docs" / "export.md").read_text()
    for name, to in {"flickr8k-open_clip": "open_clip", "flickr8k-hf": "huggingface", "flickr8k": "native"}.items():
        text = text.replace(f'"exports/{name}"', f'"{build_export(to, "vit", "clip", "clip")}"')
        text = text.replace(f'"local-dir:exports/{name}"', f'"local-dir:{build_export(to, "vit", "clip", "clip")}"')
    for name in ("dog.jpg", "cat.jpg"):
        Image.fromarray(draw_picture(40, 50, generator(6, name, 0))).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    variables = {}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for block in blocks:
        exec(block, variables)  # noqa: S102
    assert len(blocks) == 4 and variables["probabilities"].shape == (1, 2) and variables["likely"].shape == (2,)


def test_open_clip_finds_a_bert_tower_again_after_moving_the_folder(build_run, tmp_path, monkeypatch):
    import open_clip

    run = build_run("vit", "bert", "pieces")
    assert export(run, "open_clip", tmp_path / "my-model") == 0
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "my-model").rename(tmp_path / "elsewhere" / "my-model")
    monkeypatch.chdir(tmp_path / "elsewhere")
    command = re.search(r'python -c "(.*?)"`', open("my-model/README.md").read())[1]
    exec(command, {})  # noqa: S102
    model, _, _ = open_clip.create_model_and_transforms("local-dir:my-model")
    tokenizer = open_clip.get_tokenizer("local-dir:my-model")
    with torch.no_grad():
        assert_close(
            model.eval().encode_text(tokenizer(TEXTS), normalize=True),
            embed_with_run(run, [np.zeros((32, 32, 3), np.uint8)], TEXTS)[2],
        )


def test_transformers_has_no_class_for_a_resnet(build_run, tmp_path, capsys):
    assert export(build_run("resnet", "clip", "clip"), "huggingface", tmp_path / "new" / "export") == 2
    error = capsys.readouterr().err.strip()
    assert "resnet" in error and "--to open_clip or --to native" in error and "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused(build_run, tmp_path, capsys):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "notes.txt").write_text("mine")
    assert export(build_run("vit", "clip", "clip"), "native", tmp_path / "export") == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "notes.txt"]


def test_an_empty_folder_is_used(build_run, tmp_path):
    (tmp_path / "export").mkdir()
    assert export(build_run("vit", "clip", "clip"), "native", tmp_path / "export") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize(("to", "weights"), [
    ("open_clip", "open_clip_model.safetensors"), ("huggingface", "model.safetensors"), ("native", "model.safetensors")
])  # fmt: skip
def test_weights_that_come_back_otherwise_are_not_an_export(to, weights, build_run, tmp_path, monkeypatch, capsys):
    write = EXPORTS[to].write

    def write_damaged(source, folder, final):
        guide = write(source, folder, final)
        content = load_file(folder / weights)
        name = next(name for name in content if "ln_pre.weight" in name or "pre_layrnorm.weight" in name)
        save_file(content | {name: content[name].flip(0)}, folder / weights, {"format": "pt"})
        return guide

    monkeypatch.setattr(EXPORTS[to], "write", write_damaged)
    assert export(build_run("vit", "clip", "clip"), to, tmp_path / "export") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "image embeddings: largest difference" in error and "0.0001 is allowed" in error
    assert list(tmp_path.iterdir()) == []


def test_another_preprocessing_is_not_an_export(build_run, tmp_path, monkeypatch, capsys):
    from pretrain.export import open_clip

    def write(path, settings):
        settings["preprocess_cfg"]["mean"] = (0.5, 0.5, 0.5)
        write_json_atomic(path, settings)

    monkeypatch.setattr(open_clip, "write_json_atomic", write)
    assert export(build_run("vit", "clip", "clip"), "open_clip", tmp_path / "export") == 2
    assert "preprocessed pixels" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(build_run, tmp_path, monkeypatch):
    def interrupt(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(EXPORTS["native"], "reload", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_run(build_run("vit", "clip", "clip"), "native", tmp_path / "new" / "export")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_does_not_load_from_its_final_place_is_removed(build_run, tmp_path, monkeypatch):
    reload = EXPORTS["native"].reload

    def reload_elsewhere(folder):
        if folder == tmp_path / "export":
            raise RuntimeError("not here")
        return reload(folder)

    monkeypatch.setattr(EXPORTS["native"], "reload", reload_elsewhere)
    with pytest.raises(RuntimeError, match="not here"):
        export_run(build_run("vit", "clip", "clip"), "native", tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_in_one_line(build_run, tmp_path, monkeypatch, capsys):
    def fill_disk(*arguments):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(EXPORTS["native"], "save_file", fill_disk)
    assert export(build_run("vit", "clip", "clip"), "native", tmp_path / "export") == 2
    assert "No space left on device. Free space" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_clip_tokenizer_of_transformers_reads_as_ours(tmp_path):
    from open_clip.tokenizer import SimpleTokenizer

    from pretrain.export.huggingface import build_clip_tokenizer

    ours, theirs = SimpleTokenizer(), build_clip_tokenizer(tmp_path, 32)
    draw = np.random.default_rng(0)
    letters = list("abcdefghij ABC !!??.,'-&#@()0123456789 éüñß")
    texts = ["wow!", "wow !", "!", "!!!", "!%", "", "it's 1st", "日本 語 🐱", "x" * 300]
    texts += ["".join(draw.choice(letters, draw.integers(60))) for _ in range(500)]
    texts = [ours.clean_fn(text) for text in texts]
    inputs = theirs(texts, padding="max_length", truncation=True, return_tensors="pt")
    ids = ours(texts, context_length=32)
    assert torch.equal(inputs["input_ids"], ids)
    assert torch.equal(inputs["attention_mask"].bool(), torch.arange(32) <= ids.argmax(1, keepdim=True))


def test_probes_use_the_run_s_own_pairs_where_they_still_are(build_run, tmp_path):
    config = load_run(build_run("vit", "clip", "clip")).config
    probes = build_probes(config)
    assert probes.captions == CAPTIONS and len(probes.real) == 5
    gone = config.model_copy(update={"data": config.data.model_copy(update={"path": str(tmp_path / "gone")})})
    assert build_probes(gone).captions == [] and build_probes(gone).drawn[3].shape == probes.drawn[3].shape
    assert not any(is_cropped_aside(picture, 32) for picture in probes.drawn)


def test_a_run_of_several_datasets_is_exported(build_run, tmp_path, capsys):
    run = write_run_without_fusion(build_run("vit", "clip", "clip"), tmp_path / "run")
    config = load_run_config(run)
    datasets = [{"path": "gone/first", "weight": 1}, {"path": config.data.path, "weight": 2}]
    blend = config.model_copy(update={"data": DataConfig(datasets=datasets)})
    write_atomic(run / "config.yaml", render_config(blend).encode())
    assert export(run, "native", tmp_path / "export") == 0
    assert "5 of the pictures and texts are from first, train;" in capsys.readouterr().out
    assert "| trained on | first, train |" in (tmp_path / "export" / "README.md").read_text()


def test_what_a_killed_export_has_left_is_removed_and_a_living_one_is_not(build_run, tmp_path, monkeypatch, capsys):
    run, names = (
        build_run("vit", "clip", "clip"),
        [".export.01234567.tmp", ".export.89abcdef.tmp", ".other.01234567.tmp"],
    )
    for name in names:
        (tmp_path / name / "text_model").mkdir(parents=True)
    with lock_folder(tmp_path / names[1]):
        assert export(run, "native", tmp_path / "export") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"export", *names[1:]}

    def write_meanwhile(folder):
        (tmp_path / "second").mkdir(exist_ok=True)
        (tmp_path / "second" / "file").touch()
        return reload(folder)

    reload = EXPORTS["native"].reload
    monkeypatch.setattr(EXPORTS["native"], "reload", write_meanwhile)
    assert export(run, "native", tmp_path / "second") == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["file"]


def test_real_pairs_are_not_needed(build_run, tmp_path, capsys):
    run = write_run_without_fusion(build_run("vit", "clip", "clip"), tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"path: .*", "path: gone/train", text))
    assert export(run, "huggingface", tmp_path / "export") == 0
    assert "(train) was not found" in capsys.readouterr().out


@pytest.mark.parametrize(("size", "aside"), [((32, 32), False), ((32, 33), False), ((32, 35), True), ((39, 32), True)])
def test_pictures_that_transformers_crops_aside(size, aside):
    from transformers import CLIPImageProcessor

    picture = draw_picture(*size, generator(5, "picture", size[1]))
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    theirs = processor(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
    assert (pixel_difference(theirs, normalise(eval_crop(picture, 32), PIXEL_MEAN, PIXEL_STD)) > 2) == aside
    assert is_cropped_aside(picture, 32) == aside


@pytest.mark.parametrize(
    "damage", ["no folder", "no config", "other format", "no weights", "other weights", "no tokenizer"]
)
def test_load_refuses_what_is_not_a_whole_export(damage, build_export, tmp_path):
    out = tmp_path / "export"
    if damage != "no folder":
        shutil.copytree(build_export("native", "vit", "clip", "pieces"), out)
    if damage == "no config":
        (out / "config.json").unlink()
    if damage == "other format":
        (out / "config.json").write_text(json.dumps({"format": 2}))
    if damage == "no weights":
        (out / "model.safetensors").unlink()
    if damage == "other weights":
        save_file({"weight": torch.zeros(1)}, out / "model.safetensors")
    if damage == "no tokenizer":
        shutil.rmtree(out / "tokenizer")
    with pytest.raises(UserError) as error:
        load(out)
    assert "\n" not in str(error.value) and str(out) in str(error.value)

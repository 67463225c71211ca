"""Captioning, masked language and distillation: however the batch is spread, and against transformers and open_clip."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import parity
import pytest
import torch
from parity import Case
from paths import TINY
from test_fusion import Blip
from torch import Tensor, nn

from data_tools.errors import UserError
from pretrain.config import ConfigError, check_config, load_config
from pretrain.contract import Batch, ModelOutput, TeacherOutput, TokenPredictions
from pretrain.data.text import ClipTokenizerConfig, HuggingfaceTokenizerConfig, Tokenizer, build_tokenizer
from pretrain.export import native, open_clip
from pretrain.losses import CaptioningConfig, DistillConfig, LossesConfig, compute_losses, token_loss
from pretrain.model.language import TokenHead, embedding_matrix, mask_tokens, predict
from pretrain.model.model import ModelConfig, build_model
from pretrain.model.names import to_blip
from pretrain.model.noise import row_keys
from pretrain.model.towers import unit
from pretrain.restore import LoadedRun
from pretrain.teacher import build_teacher
from pretrain.train import RunConfig
from pretrain.world import World

ONE = torch.ones(())


def head_weights(head: TokenHead, embedding: nn.Embedding) -> dict[str, Tensor]:
    """Under transformers' names."""
    names = {"dense": "transform.dense", "norm": "transform.LayerNorm"}
    weights = {f"cls.predictions.{names[part]}.{kind}": getattr(getattr(head, part), kind)
               for part in names for kind in ("weight", "bias")}  # fmt: skip
    biases = {f"cls.predictions.{name}": head.bias for name in ("bias", "decoder.bias")}
    return weights | biases | {"cls.predictions.decoder.weight": embedding.weight}


def draw_texts(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids [4,7], mask, image tokens [4,9,width]."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 50, (4, 7), generator=generator)
    mask = torch.arange(7) < torch.tensor([7, 2, 5, 3])[:, None]
    return ids, mask, torch.randn(4, 9, width, generator=generator)


def shake(module: nn.Module) -> None:
    """Weights far from the fresh ones' near uniformity, biases and gains too."""
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_captioning_with_med_is_that_of_blip(smoothing: float) -> None:
    import transformers

    torch.manual_seed(2)
    ours = Blip().eval()
    head = TokenHead(24, ours.text_tower.embedding)
    shake(ours), shake(head)
    config = transformers.BlipTextConfig(
        vocab_size=50, max_position_embeddings=7, hidden_size=24, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=96, encoder_hidden_size=32, is_decoder=True, label_smoothing=smoothing,
    )  # fmt: skip
    theirs = transformers.models.blip.modeling_blip_text.BlipTextLMHeadModel(config).eval()
    prefix = "text_encoder."
    weights = {f"bert.{name.removeprefix(prefix)}": value for name, value in to_blip(ours.state_dict()).items()
               if name.startswith(prefix)}  # fmt: skip
    missing, unexpected = theirs.load_state_dict(weights | head_weights(head, ours.text_tower.embedding), strict=False)
    assert not unexpected and not [name for name in missing if "position_ids" not in name]
    ids, mask, image = draw_texts(32)
    with torch.no_grad():
        expected = theirs(
            ids, attention_mask=mask.long(), encoder_hidden_states=image, labels=ids.masked_fill(~mask, -100)
        ).loss
        tokens = ours.fusion.decode(ours.text_tower.causal_tokens(ids, mask), mask, image)[:, :-1]
        chosen, embedding = mask[:, 1:], embedding_matrix(ours.text_tower.embedding)
        predictions = predict(head, tokens, chosen, ids[:, 1:], embedding, ONE / chosen.sum())
        output = ModelOutput(None, None, ONE, captioning=predictions)
        losses = LossesConfig(contrastive=None, captioning=CaptioningConfig(label_smoothing=smoothing))
        assert abs(compute_losses(losses, output, World())["captioning"] - expected) < 1e-5 < expected


def test_the_head_for_masked_tokens_is_that_of_bert() -> None:
    import transformers

    torch.manual_seed(2)
    tower = Blip().text_tower.eval()
    head = TokenHead(24, tower.embedding)
    shake(tower), shake(head)
    theirs = transformers.BertForMaskedLM(tower.inner.config).eval()
    weights = {f"bert.{name}": value for name, value in tower.inner.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(weights | head_weights(head, tower.embedding), strict=False)
    assert not missing and not unexpected
    ids, mask, _ = draw_texts(1)
    chosen = mask & (torch.arange(7) % 2 == 1)
    with torch.no_grad():
        read = ids.masked_fill(chosen, 4)
        expected = theirs(read, attention_mask=mask.long(), labels=ids.masked_fill(~chosen, -100)).loss
        tokens = theirs.bert(read, attention_mask=mask.long()).last_hidden_state
        predictions = predict(head, tokens, chosen, ids, embedding_matrix(tower.embedding), ONE / chosen.sum())
        assert abs(token_loss(predictions, 0.0) - expected) < 1e-5 < expected


def test_no_tokens_to_predict_are_no_loss() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    assert token_loss(TokenPredictions(logits, torch.zeros(0, dtype=torch.int64), ONE), 0.0).item() == 0


@pytest.mark.parametrize(
    ("text", "fusion"),
    [
        ("clip", "cross"),
        ("clip", "shared"),
        ("bert", "cross"),
        ("bert_middle", "shared"),
        ("bert", "med"),
        ("bert_middle", "med"),
    ],
)
def test_a_token_knows_the_text_before_it_and_the_image(text: str, fusion: str) -> None:
    """Against the text with other words from there on, at one length after another."""
    config = parity.model_config(Case("vit", text.removesuffix("_middle"), fusion))
    if text == "bert_middle":
        config = config.model_copy(update={"fusion": config.fusion.model_copy(update={"from_layer": 1})})
    model = build_model(config, parity.TOKENIZER).double().eval()
    batch = parity.make_batch(config, 0, World()).rows(0, 3)
    image = model.encode_image(batch.image).tokens

    def decode(ids: Tensor, image: Tensor = image) -> Tensor:
        mask = torch.ones_like(ids, dtype=torch.bool)
        tower = model.text_tower
        tokens = tower(ids, mask).tokens if tower.is_causal else tower.causal_tokens(ids, mask)
        return model.fusion.decode(tokens, mask, image)

    with torch.no_grad():
        whole = decode(batch.ids)
        for length in range(1, 12):
            other = decode(torch.where(torch.arange(12) < length, batch.ids, 7))
            torch.testing.assert_close(other[:, :length], whole[:, :length], rtol=0, atol=1e-12)
            assert (other[:, length:] - whole[:, length:]).abs().max() > 1e-6
        first = (torch.arange(12) < 1).expand(3, 12)
        plain = model.fusion(model.text_tower(batch.ids, first).tokens, first, image).tokens[:, :1]
        torch.testing.assert_close(whole[:, :1], plain, rtol=0, atol=1e-12)  # with one token, there is no direction
        assert (decode(batch.ids, image.flip(0))[0] - whole[0]).abs().max() > 1e-6


def test_masking_as_bert_does() -> None:
    tokenizer = Tokenizer(ClipTokenizerConfig(), 1000, 20, None, end_id=999, mask_id=5, special_ids=(0, 999))
    ids = torch.randint(6, 999, (5000, 20), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, 12], ids[:, 15:] = 0, 999, 7
    mask = (torch.arange(20) < 15).expand(5000, 20)
    keys = row_keys(1, torch.arange(5000))
    read, chosen = mask_tokens(ids, mask, keys, tokenizer, 0.15)
    assert not chosen[~mask].any() and not chosen[:, [0, 12]].any()
    assert torch.equal(read[~chosen], ids[~chosen])
    count = 5000 * 13
    found = np.array([
        (~chosen).sum() - ids.numel() + count,
        (read[chosen] == 5).sum(),
        (read[chosen] == ids[chosen]).sum(),
    ], dtype=float)  # fmt: skip
    found = np.append(found, count - found.sum())
    expected = count * np.array([0.85, 0.15 * 0.8, 0.15 * 0.1, 0.15 * 0.1])
    assert ((found - expected) ** 2 / expected).sum() < 16.3  # chi-square with 3 degrees of freedom, 0.1 %
    random_ids = read[chosen & (read != 5) & (read != ids)]
    assert random_ids.min() < 50 and random_ids.max() > 950 and len(random_ids.unique()) > 400
    rows = torch.tensor([4, 0, 1234])
    again, _ = mask_tokens(ids[rows], mask[rows], keys[rows], tokenizer, 0.15)
    assert torch.equal(again, read[rows])
    assert not torch.equal(mask_tokens(ids, mask, row_keys(2, torch.arange(5000)), tokenizer, 0.15)[0], read)


def test_distillation_is_open_clip_s_less_the_targets_entropy() -> None:
    from open_clip.loss import DistillClipLoss

    generator = torch.Generator().manual_seed(0)
    image, text = (unit(torch.randn(8, 6, generator=generator, dtype=torch.float64)) for _ in range(2))
    teacher = TeacherOutput(
        *(unit(torch.randn(8, 5, generator=generator, dtype=torch.float64)) for _ in range(2)),
        torch.tensor([9.0]).double(),
    )
    logits = teacher.logit_scale * teacher.image_embed @ teacher.text_embed.T
    entropy = sum(-(side.softmax(1) * side.log_softmax(1)).sum(1).mean() / 2 for side in (logits, logits.T))
    results = []
    for chunk in (3, 100, None):
        leaves = [x.clone().requires_grad_() for x in (image, text, torch.tensor([14.0]).double())]
        if chunk:
            losses = LossesConfig(contrastive=None, distill=DistillConfig(teacher="-", chunk=chunk))
            loss = compute_losses(losses, ModelOutput(*leaves, teacher=teacher), World())["distill"]
        else:
            loss = DistillClipLoss()(*leaves, *teacher)[1] - entropy
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for found in results[:2]:
        for ours, theirs in zip(found, results[2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_distillation_by_cosine() -> None:
    image = unit(torch.eye(4)[:2])
    teacher = TeacherOutput(image, unit(image + image.flip(0)), ONE[None])
    losses = LossesConfig(contrastive=None, distill=DistillConfig(teacher="-", logits=0, cosine=1))
    output = ModelOutput(image, image, ONE[None], teacher=teacher)
    assert compute_losses(losses, output, World())["distill"].item() == pytest.approx((0 + 1 - 0.5**0.5) / 2)


@pytest.mark.parametrize(
    ("fusion", "head", "message"),
    [
        (None, "captioning", "captioning needs a fusion to predict from: set model.fusion"),
        (
            {"kind": "weighted"},
            "captioning",
            "captioning cannot be done by a fusion of kind weighted: choose med, shared",
        ),
        ({"kind": "cross", "direction": "both"}, "captioning", "of kind cross both"),
        ({"kind": "cross", "direction": "image_to_text"}, "masked_language", "cross image_to_text: choose any but"),
    ],
)
def test_a_fusion_that_cannot_is_refused(fusion: dict | None, head: str, message: str) -> None:
    values = {"image": parity.VIT, "text": parity.BERT, "fusion": fusion, head: {}}
    with pytest.raises(ConfigError, match=message):
        check_config(values, ModelConfig, "test")


def test_towers_and_tokenizers_that_cannot_are_refused() -> None:
    config = parity.model_config(Case("vit", "clip", "cross"))
    with pytest.raises(ConfigError, match=r"the tokenizer \(kind: clip\) has no mask token. Set one"):
        build_model(config, Tokenizer(ClipTokenizerConfig(), 1001, 12, None, end_id=1000))
    distilbert = {"model_type": "distilbert", "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    text = {"kind": "huggingface", "config": distilbert, "context_length": 12, "pooling": "first"}
    values = {"image": parity.VIT, "text": text, "fusion": parity.CROSS, "captioning": {}}
    with pytest.raises(ConfigError, match="cannot read from left to right. Set model.text.kind=clip or bert"):
        build_model(check_config(values, ModelConfig, "test"), parity.TOKENIZER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["losses.captioning={}"], "losses.captioning needs a head: set model.captioning={}"),
        (["model.captioning={}"], "model.captioning would not be trained: set losses.captioning={}"),
        (["losses.matching=null", "model.captioning={}", "losses.captioning={}"], "match_head would not be trained"),
        (["model.match_head=false"], "losses.matching needs model.fusion and its match_head"),
    ],
)
def test_heads_and_losses_belong_together(changes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(TINY, changes, RunConfig)


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a and small large red green blue yellow circle square triangle of left right".split()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT tokenizer of a few words."""
    from transformers import BertTokenizerFast

    folder = tmp_path_factory.mktemp("words")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder


def with_bert(words: Path) -> list[str]:
    text = "{kind: bert, context_length: 16, width: 32, heads: 2, layers: 2, dropout: 0.1}"
    tokenizer = f"{{kind: huggingface, name: {words}}}"
    return [f"model.text={text}", f"model.tokenizer={tokenizer}"]


def write_teacher(folder: Path, to, config: RunConfig) -> Path:
    tokenizer = build_tokenizer(config.model.tokenizer, config.model.text.context_length)
    model = build_model(config.model, tokenizer, 7).eval()
    folder.mkdir()
    to.write(LoadedRun(model, tokenizer, config, 0), folder, folder)
    return folder


@pytest.mark.parametrize("to", [native, open_clip], ids=["native", "open_clip"])
@pytest.mark.parametrize("text", ["clip", "bert"])
def test_a_teacher_gives_the_embeddings_of_its_model(to, text: str, words: Path, tmp_path: Path) -> None:
    changes = with_bert(words) if text == "bert" else []
    config = load_config(TINY, [*changes, "model.init_logit_scale=20"], RunConfig)
    tokenizer = build_tokenizer(config.model.tokenizer, 12)  # the student's texts are shorter
    long = build_tokenizer(config.model.tokenizer, config.model.text.context_length)
    settings = DistillConfig(teacher=str(write_teacher(tmp_path / "teacher", to, config)), cosine=1)
    teacher = build_teacher(settings, tokenizer, 16, torch.device("cpu"), torch.float32)
    model, texts = build_model(config.model, long, 7).eval(), ["a small red circle", "a square"]
    ids, mask = tokenizer(texts)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    identity = [torch.arange(2)] * 2 + [torch.arange(2)[:, None]]
    batch = Batch(pixels, ids, mask, *identity, position=np.arange(2), keys=["a", "b"])
    with torch.no_grad():
        image, text = unit(model.encode_image(pixels).pooled), unit(model.encode_text(*long(texts)).pooled)
    found = teacher(batch)
    torch.testing.assert_close(found.image_embed, image, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.text_embed, text, rtol=0, atol=1e-5)
    assert found.logit_scale.item() == pytest.approx(20, rel=1e-5) and not found.image_embed.requires_grad
    # A student of other pixels: they are resized as its own would be.
    batch.image = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (teacher(batch).image_embed * found.image_embed).sum(1).min() > 0.98


def test_a_broken_teacher_is_refused_in_one_line(words: Path, tmp_path: Path) -> None:
    folder = write_teacher(tmp_path / "teacher", open_clip, load_config(TINY, [], RunConfig))
    tokenizer, weights = build_tokenizer(ClipTokenizerConfig(), 24), folder / "open_clip_model.safetensors"

    def refuse(message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            build_teacher(DistillConfig(teacher=str(folder)), tokenizer, 16, torch.device("cpu"), torch.float32)
        assert "\n" not in str(error.value)

    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    refuse("open_clip cannot load it: SafetensorError")
    weights.unlink()  # open_clip would begin with random ones
    refuse("holds no open_clip_model.safetensors")
    weights.write_bytes(whole)
    for text in ("{", "{}", "[]"):
        (folder / "open_clip_config.json").write_text(text)
        refuse("open_clip cannot load it: ")


def test_teachers_that_do_not_fit_are_refused(words: Path, tmp_path: Path) -> None:
    config = load_config(TINY, [], RunConfig)
    folder = str(write_teacher(tmp_path / "teacher", native, config))

    def refuse(message: str, tokenizer: Tokenizer, embed_dim: int = 16, **values) -> None:
        settings = DistillConfig(**({"teacher": folder} | values))
        with pytest.raises(ConfigError, match=message):
            build_teacher(settings, tokenizer, embed_dim, torch.device("cpu"), torch.float32)

    own = build_tokenizer(ClipTokenizerConfig(), 24)
    refuse("is no export. Write one", own, teacher=str(tmp_path))
    refuse("reads 24 tokens at most. Set model.text.context_length=24", build_tokenizer(ClipTokenizerConfig(), 30))
    others = build_tokenizer(HuggingfaceTokenizerConfig(kind="huggingface", name=str(words)), 24)
    refuse("it has another tokenizer than the model. Set model.tokenizer", others)
    for length in (2, 3):  # which no probe fits into
        refuse("it has another tokenizer", dataclasses.replace(others, context_length=length))
    short = dataclasses.replace(own, context_length=3)
    build_teacher(DistillConfig(teacher=folder), short, 16, torch.device("cpu"), torch.float32)
    refuse("embeddings have 16 numbers, the model's 8. Set model.embed_dim=16", own, 8, cosine=1)


def test_a_run_with_all_losses(shards: Path, words: Path, tmp_path: Path, fork_pretrain) -> None:
    """Two ranks, ZeRO 3, micro-batches, a teacher, on scenes."""
    teacher = write_teacher(tmp_path / "teacher", native, load_config(TINY, with_bert(words), RunConfig))
    heads = ["model.captioning={}", "model.masked_language={}", "model.fusion={kind: med, dropout: 0.1}"]
    losses = [
        "losses.captioning={label_smoothing: 0.1}",
        "losses.masked_language={}",
        f"losses.distill.teacher={teacher}",
    ]
    settings = ["engine.zero_stage=3", "train.micro_batch_size=2", "train.duration=3 steps"]
    run = tmp_path / "run"
    code, _, stderr = fork_pretrain(
        "train", TINY, f"run={run}", f"data.path={shards / 'train'}", *with_bert(words), *heads, *losses, *settings,
        ranks=2,
    )  # fmt: skip
    assert code == 0, stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("contrastive", "matching", "captioning", "masked_language", "distill", "total")
    assert len(lines) == 3 and all(0 < line[f"loss/{name}"] < 50 for line in lines for name in names)

"""Tokenisers trained on real shards, loaded as training loads them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.build import build_shards
from data_tools.errors import UserError
from data_tools.shards import Manifest
from data_tools.tokenizer import KINDS, iterate_captions, train_tokenizer
from pretrain.data.text import HuggingfaceTokenizerConfig, build_tokenizer

CHINESE = ("一只棕色的狗在草地上奔跑", "两个孩子在海边玩耍", "一只猫坐在红色的椅子上")
ENGLISH = ("A brown dog is running on the grass.", "Two children play at the sea", "Dogs and cats, playing café games")


@pytest.fixture(scope="module")
def bilingual(tmp_path_factory) -> Path:
    """Shards of 60 samples with captions in two languages."""
    from PIL import Image

    root = tmp_path_factory.mktemp("bilingual")
    Image.new("RGB", (16, 16)).save(root / "a.png")
    rows = ["filename\tcaption"]
    for number in range(60):
        (root / f"{number}.png").write_bytes((root / "a.png").read_bytes())
        rows += [f"{number}.png\t{ENGLISH[number % 3]} {number}", f"{number}.png\t{CHINESE[number % 3]}"]
    (root / "table.tsv").write_text("\n".join(rows) + "\n")
    build_shards(root / "table.tsv", root / "shards", root, samples_per_shard=25, processes=1)
    return root / "shards"


@pytest.mark.parametrize("kind", list(KINDS))
def test_training_takes_it(bilingual, tmp_path, kind):
    facts = train_tokenizer(bilingual, tmp_path / "tokenizer", 450, kind=kind)
    tokenizer = build_tokenizer(HuggingfaceTokenizerConfig(kind="huggingface", name=str(tmp_path / "tokenizer")), 16)
    assert facts["captions"] == 120
    assert tokenizer.vocab_size == facts["vocab_size"] <= 450
    roles = KINDS[kind].special_tokens
    for role, token in roles.items():
        assert getattr(tokenizer.inner, role) == token
    ids, mask = tokenizer(["A brown dog", "the grass " * 40])
    pieces = [tokenizer.inner.convert_ids_to_tokens(row.tolist()) for row in ids]
    assert (pieces[0][0], pieces[1][0]) == (roles["cls_token"], roles["cls_token"])
    length = int(mask[0].sum())
    assert pieces[0][length - 1] == roles["sep_token"]
    assert set(pieces[0][length:]) == {roles["pad_token"]}
    assert mask[1].all() and pieces[1][-1] == roles["sep_token"]  # cut, but still with its end mark
    assert not any(
        entry["special"] is False for entry in _config(tmp_path / "tokenizer")["added_tokens_decoder"].values()
    )


def _config(folder: Path) -> dict:
    return json.loads((folder / "tokenizer_config.json").read_bytes())


def test_wordpiece_reads_chinese_by_characters(bilingual, tmp_path):
    train_tokenizer(bilingual, tmp_path / "tokenizer", 450)
    inner = build_tokenizer(HuggingfaceTokenizerConfig(kind="huggingface", name=str(tmp_path / "tokenizer")), 16).inner
    assert inner.tokenize("红色的dog") == ["红", "色", "的", "dog"]
    assert inner.tokenize("DOG") == ["dog"]
    assert inner.tokenize("\N{SNOWMAN}") == ["[UNK]"]


def test_bpe_knows_every_text(bilingual, tmp_path):
    train_tokenizer(bilingual, tmp_path / "tokenizer", 450, kind="bpe", lowercase=False)
    inner = build_tokenizer(HuggingfaceTokenizerConfig(kind="huggingface", name=str(tmp_path / "tokenizer")), 16).inner
    text = "Ein Schneemann \N{SNOWMAN} und 狗 \N{GRINNING FACE}"
    ids = inner(text)["input_ids"]
    assert inner.unk_token_id not in ids
    assert inner.decode(ids, skip_special_tokens=True).strip() == text


def test_lowercase_is_a_choice(bilingual, tmp_path):
    for lowercase in (True, False):
        train_tokenizer(bilingual, tmp_path / str(lowercase), 450, lowercase=lowercase)
        vocabulary = json.loads((tmp_path / str(lowercase) / "tokenizer.json").read_bytes())["model"]["vocab"]
        assert ("T" in vocabulary) is not lowercase
        assert "t" in vocabulary


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_same_captions_make_the_same_files(bilingual, tmp_path, read_folder, run_data_tools, kind):
    """In processes of their own: the library's hash maps are seeded anew in each."""
    for name in ("one", "two", "three"):
        done = run_data_tools("tokenizer", bilingual, tmp_path / name, "--vocab-size", 400, "--kind", kind, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["captions"] == 120
    first = read_folder(tmp_path / "one")
    assert sorted(first) == ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert first == read_folder(tmp_path / "two") == read_folder(tmp_path / "three")


def test_captions_come_from_sidecars_and_without_them_from_the_tars(bilingual, tmp_path):
    import shutil

    expected = list(iterate_captions(Manifest.load(bilingual)))
    assert expected[:2] == [f"{ENGLISH[0]} 0", CHINESE[0]] and len(expected) == 120
    copy = tmp_path / "copy"
    shutil.copytree(bilingual, copy)
    (copy / "00001.parquet").unlink()
    assert list(iterate_captions(Manifest.load(copy))) == expected


def test_refusals(bilingual, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").write_text("mine")
    with pytest.raises(UserError, match="Give a new folder"):
        train_tokenizer(bilingual, used, 400)
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
    with pytest.raises(UserError, match="Give at least 100"):
        train_tokenizer(bilingual, tmp_path / "new", 20)
    with pytest.raises(UserError, match="Valid: wordpiece, bpe"):
        train_tokenizer(bilingual, tmp_path / "new", 400, kind="unigram")
    with pytest.raises(UserError, match="no such folder"):
        train_tokenizer(tmp_path / "absent", tmp_path / "new", 400)
    assert not (tmp_path / "new").exists()


def test_an_error_while_writing_leaves_nothing(bilingual, tmp_path, monkeypatch):
    import data_tools.tokenizer

    def fail(*arguments):
        raise OSError("disk")

    monkeypatch.setattr(data_tools.tokenizer, "write_json_atomic", fail)
    with pytest.raises(OSError):
        train_tokenizer(bilingual, tmp_path / "new", 400)
    assert list(tmp_path.iterdir()) == []


def test_transformers_is_not_needed():
    code = "import sys, data_tools.tokenizer; sys.exit(bool({'transformers', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""CLIP-scores against a loop that embeds one picture and one caption at a time; interruptions, views, bad samples."""

import hashlib
import io
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch
from paths import ROOT, TINY
from PIL import Image
from tending import encode_noise, make_dataset

from data_tools.__main__ import main
from data_tools.errors import UserError
from data_tools.score import score_pairs
from data_tools.shards import Manifest, Selection, ShardReader, find_captions, write_shard
from pretrain import score as model_side
from pretrain.config import load_config
from pretrain.data.text import build_tokenizer
from pretrain.export import EXPORTS, load
from pretrain.model.model import build_model
from pretrain.restore import LoadedRun
from pretrain.torchvision_ops import prepare_torchvision
from pretrain.train import RunConfig

COLUMNS = ["key", "sha256", "clip_score", "clip_scores"]


@pytest.fixture(scope="module")
def run():
    """A tiny model as training leaves it, with biases that are not zero."""
    config = load_config(TINY, [], RunConfig)
    tokenizer = build_tokenizer(config.model.tokenizer, config.model.text.context_length)
    model = build_model(config.model, tokenizer, seed=3).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1 * torch.randn(value.shape, generator=draw)
    return LoadedRun(model, tokenizer, config, step=1)


@pytest.fixture(scope="module")
def export(run, tmp_path_factory):
    """export(kind) -> the folder of the tiny model in that format."""
    folders = {}
    for kind in ("native", "open_clip"):
        folders[kind] = tmp_path_factory.mktemp("exports") / kind
        folders[kind].mkdir()
        EXPORTS[kind].write(run, folders[kind], folders[kind])
    return folders.__getitem__


@pytest.fixture
def dataset(tmp_path):
    make_dataset(tmp_path / "shards", counts=(5, 0, 4, 3))
    return tmp_path / "shards"


def read_rows(path) -> list[dict]:
    return pyarrow.parquet.read_table(path).to_pylist()


def list_samples(folder):
    manifest = Manifest.load(folder)
    reader = ShardReader(manifest)
    return [reader.read(index) for index in range(len(reader))]


def score_naively(kind, folder, samples) -> list[list[float]]:
    """Pair by pair, with each library's own way to load a model."""
    if kind == "native":
        loaded = load(folder)
        embed_image = loaded.embed_images
        embed_text = loaded.embed_texts
    else:
        prepare_torchvision()
        import open_clip

        model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        model.eval()

        def embed_image(pictures):
            return model.encode_image(transform(Image.open(io.BytesIO(pictures[0])))[None], normalize=True)

        def embed_text(texts):
            return model.encode_text(tokenizer(texts), normalize=True)

    with torch.no_grad():
        return [
            [float(embed_image([raw.fields["jpg"]])[0] @ embed_text([text])[0]) for text in find_captions(raw.fields)]
            for raw in samples
        ]


@pytest.mark.parametrize("kind", ["native", "open_clip"])
def test_scores_are_those_of_a_naive_loop(kind, export, dataset, tmp_path):
    facts = score_pairs(dataset, str(export(kind)), tmp_path / "scores.parquet", batch_size=2, device="cpu")
    samples = list_samples(dataset)
    expected = score_naively(kind, export(kind), samples)
    rows = read_rows(tmp_path / "scores.parquet")
    assert [list(row) for row in rows] == [COLUMNS] * 12
    assert [row["key"] for row in rows] == [raw.key for raw in samples]
    assert [row["sha256"] for row in rows] == [hashlib.sha256(raw.fields["jpg"]).hexdigest() for raw in samples]
    assert [len(row["clip_scores"]) for row in rows] == [1, 2] * 6
    for row, scores in zip(rows, expected, strict=True):
        np.testing.assert_allclose(row["clip_scores"], scores, atol=2e-6)
        assert row["clip_score"] == max(row["clip_scores"])
    greatest = [max(scores) for scores in expected]
    assert np.ptp(greatest) > 0.01, "a model that scores all pairs alike would prove nothing"
    assert (facts["samples"], facts["scored"], facts["captions"], facts["problems"]) == (12, 12, 18, {})
    assert facts["clip_score"]["mean"] == pytest.approx(np.mean(greatest), abs=1e-4)
    assert facts["clip_score"]["p50"] == pytest.approx(sorted(greatest)[5], abs=1e-3)


def test_local_dir_is_the_same_as_the_folder(export, dataset, tmp_path):
    for number, model in enumerate((str(export("open_clip")), f"local-dir:{export('open_clip')}")):
        score_pairs(dataset, model, tmp_path / f"{number}", device="cpu")
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(export, dataset, tmp_path, monkeypatch):
    whole, out, work = tmp_path / "whole", tmp_path / "scores.parquet", tmp_path / "scores.parquet.work"
    score_pairs(dataset, str(export("native")), whole, batch_size=2, device="cpu", threads=1)
    seen, score = [], model_side.Scorer.score

    def score_some(self, pictures, captions):
        if len(seen) == 5:  # 3 batches of the first shard and 2 of the third are done, but its mark is not written
            raise KeyboardInterrupt
        seen.append(len(pictures))
        return score(self, pictures, captions)

    monkeypatch.setattr(model_side.Scorer, "score", score_some)
    with pytest.raises(KeyboardInterrupt):
        score_pairs(dataset, str(export("native")), out, batch_size=2, device="cpu", threads=3)
    assert seen == [2, 2, 1, 2, 2]
    assert sorted(os.listdir(work)) == ["00000000.parquet", "00000002.parquet"]
    assert not out.exists()
    (work / "00000003.parquet.01234567.tmp").write_bytes(b"half")  # what SIGKILL leaves
    (work / "00000002.parquet").write_bytes(b"PAR1 damaged")
    seen[:] = [0]
    score_pairs(dataset, str(export("native")), out, batch_size=2, device="cpu", threads=3)
    assert seen == [0, 2, 2, 2, 1]
    assert out.read_bytes() == whole.read_bytes()
    assert not work.exists()


def test_parts_of_another_model_or_batch_size_are_made_anew(export, dataset, tmp_path, monkeypatch):
    out = tmp_path / "scores.parquet"

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data_tools.score._join_parts", stop)
        score_pairs(dataset, str(export("open_clip")), out, device="cpu")
    for options in ({}, {"batch_size": 3}):
        score_pairs(dataset, str(export("native")), tmp_path / "fresh", device="cpu", **options)
        score_pairs(dataset, str(export("native")), out, device="cpu", **options)
        assert out.read_bytes() == (tmp_path / "fresh").read_bytes()


def test_a_view_and_a_quarantined_set_are_scored_without_what_they_leave_out(export, dataset, tmp_path):
    keys = [raw.key for raw in list_samples(dataset)]
    score_pairs(dataset, str(export("native")), tmp_path / "all", device="cpu")
    rows = {row["key"]: row for row in read_rows(tmp_path / "all")}
    kept = [[1, 0, 1, 1, 0], [], [0] * 4, [0, 1, 1]]
    Manifest.load(dataset).write_view(tmp_path / "view", Selection.of_masks(kept), 5, {})
    (dataset / "quarantine.json").write_text('{"00000.tar": {"2": "damaged"}}')
    for place, chosen in (("view", [0, 3, 10, 11]), ("shards", [0, 1, 3, *range(4, 12)])):
        score_pairs(tmp_path / place, str(export("native")), tmp_path / "some", device="cpu")
        some = read_rows(tmp_path / "some")
        assert [row["key"] for row in some] == [keys[number] for number in chosen]
        for row in some:
            np.testing.assert_allclose(row["clip_scores"], rows[row["key"]]["clip_scores"], atol=2e-6)


def test_what_cannot_be_scored_has_no_score_and_is_counted(export, tmp_path):
    picture = encode_noise(1)
    with write_shard(tmp_path, "00000.tar") as shard:
        shard.add("good", {"jpg": picture, "txt": b"a dog"})
        shard.add("cut", {"jpg": picture[:500], "txt": b"a dog"})
        shard.add("silent", {"jpg": picture, "txt": b"  "})
        shard.add("badtext", {"jpg": picture, "txt": b"\xff\xfe"})
        shard.add("blind", {"txt": b"a dog"})
        strange = json.dumps({"captions": ["nul \0 \ud800", "x" * 2**20, "ǆ" * 10_000]})
        shard.add("strange", {"jpg": picture, "json": strange.encode()})
    Manifest.of_shards(tmp_path, [shard.info], captions=9).write()
    facts = score_pairs(tmp_path, str(export("native")), tmp_path / "scores.parquet", batch_size=4, device="cpu")
    rows = {row["key"]: row for row in read_rows(tmp_path / "scores.parquet")}
    assert {key: len(row["clip_scores"]) for key, row in rows.items()} == {
        "good": 1, "cut": 0, "silent": 0, "badtext": 0, "blind": 0, "strange": 3,
    }  # fmt: skip
    assert {key for key, row in rows.items() if row["clip_score"] is None} == {"cut", "silent", "badtext", "blind"}
    assert rows["blind"]["sha256"] is None and rows["cut"]["sha256"] == hashlib.sha256(picture[:500]).hexdigest()
    assert facts["problems"] == {"bad picture": 1, "no caption": 2, "no picture": 1}
    assert (facts["samples"], facts["scored"]) == (6, 2)


def test_scores_select_a_view(export, dataset, tmp_path, capsys):
    scores = tmp_path / "scores.parquet"
    command = ["score", str(dataset), "--model", str(export("native")), "--out", str(scores), "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["samples"], facts["out"], facts["device"]) == (12, str(scores), "cpu")
    rows = read_rows(scores)
    limit = sorted(row["clip_score"] for row in rows)[6]
    where = f"clip_score > {(limit + sorted(row['clip_score'] for row in rows)[5]) / 2}"
    assert main(["view", str(dataset), str(tmp_path / "view"), "--join", str(scores), "--where", where]) == 0
    expected = [row["key"] for row in rows if row["clip_score"] >= limit]
    assert [raw.key for raw in list_samples(tmp_path / "view")] == expected
    assert main(command) == 0
    assert "12 of 12 samples scored, 18 captions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere"}, r"--model nowhere: neither a folder nor a pretrained model"),
        ({"model": "ViT-B-3:openai"}, r"Did you mean 'ViT-B-32'\?"),
        ({"model": "ViT-B-32:openaj"}, r"Did you mean 'openai'\?.*with a tag among: openai, "),
        ({"model": "local-dir:nowhere"}, r"--model local-dir:nowhere: no open_clip_config.json there"),
        ({"model": "."}, r"not a native export"),
        ({"device": "cuda"}, r"--device cuda: torch finds no CUDA device"),
        ({"batch_size": 0}, r"--batch-size 0: give at least 1"),
        ({"threads": 0}, r"--threads 0: give at least 1"),
        ({"out": "."}, r"--out .: is a folder"),
        ({"out": "s3://bucket/scores.parquet"}, r"--out s3://.*: give a local file"),
    ],
)
def test_mistakes_are_refused_in_one_line(options, message, export, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        score_pairs(dataset, **{"model": str(export("native")), "device": "cpu", "out": "scores.parquet", **options})
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["shards"]


def test_damaged_weights_are_refused(run, export, dataset, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    path = export("native") / "model.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items()}
    weights["text_tower.inner.text_projection"][:] = float("nan")
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "config.json").write_bytes((export("native") / "config.json").read_bytes())
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match="no numbers"):
        score_pairs(dataset, str(folder), tmp_path / "scores.parquet", device="cpu")
    assert not (tmp_path / "scores.parquet").exists()


def test_a_work_folder_of_something_else_is_left_alone(export, dataset, tmp_path):
    (tmp_path / "scores.parquet.work").mkdir()
    (tmp_path / "scores.parquet.work" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files of something else"):
        score_pairs(dataset, str(export("native")), tmp_path / "scores.parquet", device="cpu")
    assert (tmp_path / "scores.parquet.work" / "thesis.txt").read_text() == "mine"


def test_torch_comes_with_the_model_only():
    code = "import sys, data_tools.score, data_tools.__main__; print('torch' in sys.modules, 'pretrain' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["native", "open_clip"])
def test_a_gpu_gives_the_scores_of_the_processor(kind, export, dataset, tmp_path):
    for device in ("cpu", "cuda"):
        score_pairs(dataset, str(export(kind)), tmp_path / device, batch_size=4, device=device)
    score_pairs(dataset, str(export(kind)), tmp_path / "again", batch_size=4, device="auto", threads=3)
    for one, other in zip(read_rows(tmp_path / "cpu"), read_rows(tmp_path / "cuda"), strict=True):
        np.testing.assert_allclose(one["clip_scores"], other["clip_scores"], atol=1e-5)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "cuda").read_bytes()

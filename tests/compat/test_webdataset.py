"""webdataset finds every sample once, whole, and knows where one ends and the next begins."""

import hashlib
import io
import json

import webdataset
from PIL import Image


def describe(sample: dict) -> dict:
    return {
        "key": sample["__key__"],
        "caption": sample["txt"].decode(),
        "captions": json.loads(sample["json"])["captions"],
        "size": Image.open(io.BytesIO(sample["jpg"])).size,
        "sha256": hashlib.sha256(sample["jpg"]).hexdigest(),
    }


def test_every_key_is_read_once_from_adjacent_members(built, check):
    """Grouping is strict: webdataset raises for a member twice in a sample, and members apart would make a key twice."""
    dataset = webdataset.WebDataset([str(tar) for tar in built.tars], shardshuffle=False)
    samples = list(dataset)
    assert all({"jpg", "txt", "json"} == {name for name in sample if "_" not in name} for sample in samples)
    check([describe(sample) for sample in samples], built)
    assert [sample["__key__"] for sample in samples] == sorted(built.samples), "in the order of the input"


def test_brace_notation_decoding_and_batches(built):
    pattern = f"{built.folder}/{{00000..{len(built.tars) - 1:05d}}}.tar"
    pipeline = webdataset.WebDataset(pattern, shardshuffle=False).decode("rgb8").to_tuple("jpg", "txt", "json")
    for (pixels, caption, described), expected in zip(pipeline, built.samples.values(), strict=True):
        assert pixels.shape == (*expected.size[::-1], 3)
        assert caption == expected.caption
        assert described["key"] == expected.key and described["licence"] == "CC0"
    first, *_ = webdataset.WebDataset(pattern, shardshuffle=False).batched(4)
    assert len(first["__key__"]) == 4

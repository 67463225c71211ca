"""Fields are decoded as webdataset decodes them, and nothing in a shard runs as code; users' stages are put in."""

import gzip
import io
import json
import pickle
import zipfile

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset import tenbin
from webdataset.autodecode import Decoder

from data_tools.errors import UserError
from data_tools.shards import RawSample
from pretrain.config import ConfigError, check_config
from pretrain.data.decode import BadSample
from pretrain.data.fields import decode_fields
from pretrain.data.stages import Rejected, StageConfig, load_stages


def save(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def save_many(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)
FIELDS = {
    "txt": "Grüße".encode(),
    "de.transcript": b"Haus",
    "cls": b"7\n",
    "index": b"-3",
    "json": b'{"a": [1, null, "x"]}',
    "meta.json.gz": gzip.compress(b'["packed"]'),
    "mp": msgpack.packb({"b": [1, 2.5, b"raw"]}),
    "jpg": b"\xff\xd8 not looked at",
    "unheard-of": b"\0\1",
}


def test_fields_are_what_webdataset_makes_of_them():
    assert decode_fields(FIELDS) == Decoder([]).decode(FIELDS)


def test_arrays_are_what_webdataset_makes_of_them():
    fields = {
        "embedding.npy": save(ARRAY),
        "npz": save_many(a=ARRAY, b=ARRAY[0]),
        "ten": bytes(tenbin.encode_buffer([ARRAY])),
    }
    ours, theirs = decode_fields(fields), Decoder([]).decode(fields)
    for name in ("a", "b"):
        assert np.array_equal(ours["npz"][name], theirs["npz"][name])
    assert np.array_equal(ours["embedding.npy"], ARRAY) and np.array_equal(ours["ten"][0], theirs["ten"][0])


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from a shard has run')",)


@pytest.mark.parametrize("kind", ["pkl", "pickle", "pyd", "pth", "state.pth", "pkl.gz"])
def test_types_that_can_hold_code_are_refused(kind):
    with pytest.raises(UserError, match=rf"^field '{kind}': a \.\w+ file can run any code"):
        decode_fields({kind: pickle.dumps(Bomb())})


def test_pickles_inside_arrays_are_bad_samples():
    objects = np.array([Bomb()], dtype=object)
    for fields in ({"npy": save(objects)}, {"npz": save_many(a=objects)}):
        with pytest.raises(BadSample):
            decode_fields(fields)


def test_a_missing_library_is_named():
    with pytest.raises(UserError, match="field 'cbor': needs the package cbor: pip install cbor"):
        decode_fields({"cbor": b"\x01"})


def test_what_unpacks_to_too_much_is_a_bad_sample(monkeypatch):
    monkeypatch.setattr("pretrain.data.fields.MAX_DECOMPRESSED_BYTES", 10_000)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.npy", bytes(20_000))
    for fields in ({"txt.gz": gzip.compress(bytes(20_000))}, {"npz": archive.getvalue()}):
        with pytest.raises(BadSample, match="more than 10000 bytes"):
            decode_fields(fields)


def test_an_array_that_promises_too_much_is_a_bad_sample():
    data = save(np.zeros(4)).replace(b"(4,), }          ", b"(4000000000000,),}")
    with pytest.raises(BadSample):
        decode_fields({"npy": data})


def test_an_array_whose_header_is_no_python_is_a_bad_sample():
    with pytest.raises(BadSample):
        decode_fields({"npy": save(ARRAY).replace(b"}", b"\0")})


GOOD = {**FIELDS, "npy": save(ARRAY), "npz": save_many(a=ARRAY), "ten": bytes(tenbin.encode_buffer([ARRAY]))}


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(GOOD)), st.data())
def test_damaged_fields_are_decoded_or_bad_samples(name, data):
    content = bytearray(GOOD[name])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    try:
        decode_fields({name: bytes(content[:cut])})
    except BadSample as error:
        assert name in str(error)


# Stages: what follows is named by dotted names


def is_long(sample: dict) -> bool:
    return len(sample["txt"]) > 3


def shout(sample: dict) -> dict:
    return {**sample, "txt": sample["txt"].upper()}


def count(sample: dict) -> dict | None:
    sample["json"]["seen"] = sample["json"].get("seen", 0) + 1
    sample["npy"] = sample["npy"] * 2
    return None if sample["json"]["seen"] > 2 else sample


def spoil(sample: dict) -> dict:
    return {**sample, "jpg": ARRAY}


def forget(sample: dict) -> bool:
    return True


def make(text: bytes = b"a bird", **fields: bytes) -> RawSample:
    return RawSample("k", "00000.tar", {"jpg": b"picture", "txt": text, **fields})


def stages(*entries: dict):
    return load_stages([check_config(entry, StageConfig, "test") for entry in entries])


def test_select_and_map_get_encoded_fields():
    apply = stages({"select": f"{__name__}.is_long"}, {"map": f"{__name__}.shout"})
    assert apply(make()) == make(b"A BIRD")
    with pytest.raises(Rejected, match="is_long did not select it"):
        apply(make(b"a"))
    assert stages()(make()) == make()


def test_decoded_fields_go_in_and_come_back_as_bytes():
    apply = stages(*[{"map": f"{__name__}.count", "decoded": True}] * 2)
    before = make(json=b"{}", npy=save(ARRAY), cls=b"3")
    after = decode_fields(apply(before).fields)
    assert (after["json"], after["cls"], after["jpg"], after["txt"]) == ({"seen": 2}, 3, b"picture", "a bird")
    assert np.array_equal(after["npy"], ARRAY * 4)
    with pytest.raises(Rejected, match="count rejected it"):
        apply(make(json=json.dumps({"seen": 1}).encode(), npy=save(ARRAY)))


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"map": f"{__name__}.spoil"}, "gave the field 'jpg' as ndarray"),
        ({"map": f"{__name__}.forget"}, "returned bool; a map returns the sample, or None"),
    ],
)
def test_what_a_map_may_not_give_back(entry, text):
    with pytest.raises(UserError, match=text):
        stages(entry)(make())


def test_an_error_of_a_stage_is_not_swallowed():
    with pytest.raises(KeyError):
        stages({"map": f"{__name__}.count", "decoded": True})(make())


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"map": f"{__name__}.shuot"}, "has no such function. Did you mean 'shout'?"),
        ({"map": "pretrain.data.fieldz.decode"}, "there is no module pretrain.data.fieldz. Did you mean 'fields'?"),
        ({"map": "jsom.loads"}, "there is no module jsom. Did you mean 'json'?"),
        ({"map": "loads"}, "write package.module.function"),
        ({}, "give either map or select"),
        ({"map": "json.loads", "select": "json.loads"}, "give either map or select"),
    ],
)
def test_a_stage_that_cannot_be_had_is_told_in_one_line(entry, text):
    with pytest.raises(ConfigError) as caught:
        stages(entry)
    assert text in str(caught.value) and "\n" not in str(caught.value)

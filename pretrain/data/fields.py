"""The fields of a sample as webdataset's `.decode()` gives them to its users, without ever running code from a shard.

Source: webdataset 1.0, webdataset/autodecode.py. Pictures and what it does not know stay bytes, as there.
"""

import gzip
import io
import json
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from data_tools.errors import UserError
from pretrain.data.decode import BadSample

MAX_DECOMPRESSED_BYTES = 2**28

_CODE_BEARING = ("pkl", "pickle", "pyd", "pth", "pt", "joblib", "dill")
"""Types that load by pickle, and so run whatever program lies in them."""

_BAD_BYTES = (
    ValueError,
    RecursionError,
    EOFError,
    OSError,
    OverflowError,
    MemoryError,  # of a header that promises more than there is
    SyntaxError,  # of an array's header, which is Python's
    tokenize.TokenError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def decode_fields(fields: dict[str, bytes]) -> dict[str, Any]:
    """Every field by the last part of its name: text, numbers, JSON, arrays; a `.gz` after it is unpacked first.

    Raises BadSample for bytes that are not what the name says, and UserError, which ends the run, for a type that can hold
    code, or whose library is not installed.
    """
    return {name: decode_field(name, data) for name, data in fields.items()}


def decode_field(name: str, data: bytes) -> Any:
    """One field; raises as `decode_fields`."""
    *_, kind = name.removesuffix(".gz").split(".")
    if kind in _CODE_BEARING:
        raise UserError(
            f"field '{name}': a .{kind} file can run any code when it is read, and is refused. Store it as json, npy or "
            "txt, or drop it with a `map` stage that takes encoded fields"
        )
    try:
        if name.endswith(".gz"):
            data = _unpack(data)
        decode = DECODERS.get(kind)
        return data if decode is None else decode(data)
    except ImportError as error:
        raise UserError(f"field '{name}': needs the package {error.name}: pip install {error.name}") from None
    except _BAD_BYTES as error:
        raise BadSample(f"field '{name}' is not readable: {error}") from None


def _unpack(data: bytes) -> bytes:
    content = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_DECOMPRESSED_BYTES + 1)
    if len(content) > MAX_DECOMPRESSED_BYTES:
        raise ValueError(f"more than {MAX_DECOMPRESSED_BYTES} bytes come out of it")
    return content


def _decode_text(data: bytes) -> str:
    return data.decode("utf-8")


def _decode_array(data: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def _decode_arrays(data: bytes) -> dict[str, Any]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(member.file_size for member in archive.infolist()) > MAX_DECOMPRESSED_BYTES:
            raise ValueError(f"more than {MAX_DECOMPRESSED_BYTES} bytes come out of it")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def _decode_tensors(data: bytes) -> list[np.ndarray]:
    from webdataset import tenbin

    try:
        return tenbin.decode_buffer(data)
    except (AssertionError, LookupError, TypeError) as error:  # what it says to damaged bytes
        raise ValueError(f"{type(error).__name__} {error}") from None


def _decode_msgpack(data: bytes) -> Any:
    import msgpack

    return msgpack.unpackb(data)


def _decode_cbor(data: bytes) -> Any:
    import cbor

    return cbor.loads(data)


DECODERS: dict[str, Callable[[bytes], Any]] = {
    "txt": _decode_text,
    "text": _decode_text,
    "transcript": _decode_text,
    "cls": int,
    "cls2": int,
    "index": int,
    "inx": int,
    "id": int,
    "json": json.loads,
    "jsn": json.loads,
    "npy": _decode_array,
    "npz": _decode_arrays,
    "ten": _decode_tensors,
    "tb": _decode_tensors,
    "mp": _decode_msgpack,
    "msg": _decode_msgpack,
    "cbor": _decode_cbor,
}

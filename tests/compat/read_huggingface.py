"""Prints the samples of tars as Hugging Face's datasets reads them."""

import hashlib
import io
import json
import sys

from datasets import Image, load_dataset
from PIL import Image as Pillow

rows = load_dataset("webdataset", data_files=sys.argv[1], split="train", streaming=sys.argv[2] == "1")
decoded = next(iter(rows))
assert isinstance(decoded["jpg"], Pillow.Image), "the column is known to hold pictures"
for row in rows.cast_column("jpg", Image(decode=False)):
    picture, described = row["jpg"]["bytes"], row["json"]
    sample = {"key": row["__key__"], "caption": row["txt"], "captions": list(described["captions"])}
    sample |= {"size": Pillow.open(io.BytesIO(picture)).size, "sha256": hashlib.sha256(picture).hexdigest()}
    print(json.dumps({**sample, "licence": described["licence"]}))

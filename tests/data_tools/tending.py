"""A small real dataset as `build` leaves it, for the tests of what tends datasets."""

import hashlib
import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image

from data_tools.files import Folder
from data_tools.folder import list_sidecar_fields, write_sidecar
from data_tools.shards import Manifest, write_shard


def encode_noise(seed: int, width: int = 48, height: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=80)
    return stream.getvalue()


def make_dataset(folder: Path, counts=(4, 3), failures: int = 1, seed: int = 0, extra: bool = True) -> Manifest:
    """Shards of so many samples, each with `failures` failures before them; sample i has i + 1 words and two captions
    if i is odd."""
    folder.mkdir(parents=True, exist_ok=True)
    infos, captions_of_all, number = [], 0, 0
    schema = pyarrow.schema([*list_sidecar_fields(), *([("licence", pyarrow.string())] if extra else [])])
    for shard, samples in enumerate(counts):
        stem, rows = f"{shard:05d}", []
        for place in range(failures):
            rows.append(
                {"key": f"{stem}{place:04d}", "status": "failure", "error": "missing picture: x", "captions": ["lost"]}
            )
        with write_shard(folder, f"{stem}.tar") as writer:
            for place in range(samples):
                key = f"{stem}{place + failures:04d}"
                width = 40 + 8 * number
                captions = [f"{seed}" + " word" * number, "another"][: 1 + number % 2]
                picture = encode_noise(1000 * seed + number, width)
                facts = {"width": width, "height": 40, "original_width": 2 * width, "original_height": 80}
                facts["sha256"] = hashlib.sha256(picture).hexdigest()
                source = f"{seed}/{number}.jpg"
                described = {"captions": captions, "key": key, "source": source, **facts}
                if extra:
                    described = {"licence": f"cc-{number % 2}", **described}
                fields = {"jpg": picture, "txt": captions[0].encode(), "json": json.dumps(described).encode()}
                offset, size = writer.add(key, fields)
                row = {"status": "success", "caption": captions[0], "offset": offset, "size": size}
                rows.append(described | row)
                captions_of_all += len(captions)
                number += 1
        hashed = write_sidecar(Folder(folder), f"{stem}.tar", rows, schema)
        statistics = {**asdict(writer.info), "build": "b", "failures": failures}
        statistics["captions"] = sum(len(row["captions"]) for row in rows if row["status"] == "success")
        statistics |= {"failures_by_reason": {"missing picture": failures}, "refused_captions": {}}
        statistics["sidecar_sha256"] = hashed
        (folder / f"{stem}_stats.json").write_text(json.dumps(statistics, indent=2) + "\n")
        infos.append(writer.info)
    manifest = Manifest.of_shards(folder, infos, "b", failures * len(counts), captions_of_all, {"seed": None})
    manifest.write()
    return Manifest.load(folder)

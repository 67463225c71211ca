"""Prints the samples of a prepared dataset as Energon reads them, in sequence and, for the pictures' bytes, by name."""

import hashlib
import json
import sys

from megatron.energon import WorkerConfig, get_loader, get_val_dataset
from megatron.energon.cache.file_store import WebdatasetFileStore
from megatron.energon.epathlib import EPath

folder = sys.argv[1]
files = WebdatasetFileStore(EPath(folder))
workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
dataset = get_val_dataset(folder, split_part="train", worker_config=workers, batch_size=1)
for batch in get_loader(dataset):
    key = batch.__key__[0].rpartition("/")[2]
    picture, _ = files[f"{key}.jpg"]
    _, _, height, width = batch.image.shape
    sample = {"key": key, "caption": batch.caption[0], "size": (width, height)}
    print(json.dumps({**sample, "sha256": hashlib.sha256(picture).hexdigest()}))

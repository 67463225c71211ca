"""Prints the samples of tars as open_clip's training and evaluation loaders give them, one a batch."""

import glob
import json
import os
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import torch

torchvision = find_spec("torchvision")
try:
    for library in glob.glob(os.path.join(os.path.dirname(torchvision.origin), "_C*.so")):
        torch.ops.load_library(library)
except OSError:  # built for CUDA, beside a CPU build of torch: declare what is looked up at import
    schemas = torch.library.Library("torchvision", "DEF")
    schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from open_clip_train.data import get_wds_dataset  # noqa: E402

pattern = sys.argv[1]
options = SimpleNamespace(
    train_data=pattern,
    val_data=pattern,
    train_num_samples=None,  # to be found in sizes.json
    val_num_samples=None,
    train_data_upsampling_factors=None,
    dataset_resampled=False,
    seed=0,
    batch_size=1,
    workers=1,
    world_size=1,
)
for is_train in (True, False):
    data = get_wds_dataset(options, lambda image: image.size, is_train, tokenizer=lambda text: [text])
    if is_train:
        print(json.dumps({"num_samples": data.dataloader.num_samples, "num_batches": data.dataloader.num_batches}))
    for (size,), (caption,) in data.dataloader:
        print(json.dumps({"is_train": is_train, "caption": caption, "size": size}))

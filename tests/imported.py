"""What takes seconds to import or to build. The server that processes of tests are forked from does it once, for all."""

from pretrain.engine import import_deepspeed
from pretrain.torchvision_ops import prepare_torchvision

import_deepspeed()  # before transformers, which would not keep its linker quiet
prepare_torchvision()

import aiohttp  # noqa: E402, F401
import cv2  # noqa: E402, F401
import duckdb  # noqa: E402, F401
import open_clip  # noqa: E402, F401
import pyarrow.parquet  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401
import transformers.models.bert.modeling_bert  # noqa: E402, F401

import data_tools.build  # noqa: E402, F401
import pretrain.train  # noqa: E402, F401

pretrain.data.text.clip_byte_pairs()

"""What takes seconds to import. ranks.py has it imported once, in the process that all ranks are forked from."""

from pretrain.engine import import_deepspeed
from pretrain.torchvision_ops import prepare_torchvision

import_deepspeed()  # before transformers, which would not keep its linker quiet
prepare_torchvision()

import open_clip  # noqa: E402, F401
import transformers.models.bert.modeling_bert  # noqa: E402, F401

import pretrain.train  # noqa: E402, F401

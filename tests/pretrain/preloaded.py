"""What the server of forks imports once, so that a life of a run costs its steps and not its imports."""

import pretrain.train  # noqa: F401
from pretrain.engine import import_deepspeed
from pretrain.torchvision_ops import prepare_torchvision

import_deepspeed()
prepare_torchvision()

import deepspeed.runtime.zero.muon.original_muon  # noqa: E402, F401
import open_clip  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401

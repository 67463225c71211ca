"""What the server of forks imports once, so that a life of a run costs its steps and not its imports."""

import pretrain.train  # noqa: F401
from pretrain.engine import import_deepspeed

import_deepspeed()

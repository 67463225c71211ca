"""A finished or running run, back as a model: what evaluation and export start from."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from data_tools.errors import UserError
from pretrain.checkpoint import load_weights
from pretrain.data.text import Tokenizer, build_tokenizer
from pretrain.ema import averaged
from pretrain.model.model import ImageTextModel, build_model
from pretrain.train import RunConfig, load_run_config


@dataclass
class LoadedRun:
    model: ImageTextModel  # fp32, in evaluation mode, on the CPU
    tokenizer: Tokenizer
    config: RunConfig
    step: int  # training steps done


def load_run(run: str | Path, ema: bool = False) -> LoadedRun:
    """The model of the newest whole checkpoint, or of the average of its weights.

    Raises UserError if there is none, or if it does not fit the config.
    """
    config = load_run_config(run)
    weights, extra, state = load_weights(run, with_extra=ema)
    if ema:
        weights = averaged(weights, extra, str(run))
    tokenizer = build_tokenizer(config.model.tokenizer, config.model.text.context_length)
    model = build_model(config.model, tokenizer, config.seed).eval()
    set_weights(model, weights, f"{run}: the checkpoint does not fit its config.yaml")
    return LoadedRun(model, tokenizer, config, state["step"])


def set_weights(model: nn.Module, weights: dict[str, Tensor], complaint: str) -> None:
    """Copy `weights` into `model`. Raises UserError: `complaint`, and the first name or shape that does not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{complaint}: {reason}") from None

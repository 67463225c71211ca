"""Captions to token ids. Every tokeniser here works offline once its files are on disk.

Shape legend: n texts, L text tokens (the context length).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.config import ConfigError, ConfigModel
from pretrain.torchvision_ops import prepare_torchvision


class ClipTokenizerConfig(ConfigModel):
    """CLIP's byte-pair encoding (49,408 ids), as open_clip bundles it: English, lower-cased, no download."""

    kind: Literal["clip"] = "clip"


class HuggingfaceTokenizerConfig(ConfigModel):
    """Any tokeniser that transformers reads: a local folder, or a hub name such as google-bert/bert-base-uncased."""

    kind: Literal["huggingface"]
    name: str


TOKENIZERS: dict[str, type[ConfigModel]] = {"clip": ClipTokenizerConfig, "huggingface": HuggingfaceTokenizerConfig}


@dataclass(frozen=True)
class Tokenizer:
    """`tokenizer(texts)` gives ids [n,L] int64 and mask [n,L] bool (True = a real token, its end marks included)."""

    config: ConfigModel
    vocab_size: int
    context_length: int
    inner: Any  # open_clip's SimpleTokenizer or a transformers tokenizer
    end_id: int | None  # the id that ends every text; None: it differs, and a tower cannot pool there

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        if self.config.kind == "clip":
            ids = self.inner(texts, context_length=self.context_length)
            # Padding is id 0, which is also "!", so the mask goes by the end mark: the largest id there is.
            return ids, torch.arange(self.context_length) <= ids.argmax(dim=1, keepdim=True)
        encoded = self.inner(
            texts, max_length=self.context_length, padding="max_length", truncation=True, return_tensors="pt"
        )
        return encoded["input_ids"], encoded["attention_mask"].bool()


def build_tokenizer(config: ConfigModel, context_length: int) -> Tokenizer:
    """Raises ConfigError, in one line, when the tokeniser's files cannot be found."""
    if config.kind == "clip":
        prepare_torchvision()
        from open_clip.tokenizer import SimpleTokenizer

        inner = SimpleTokenizer()
        return Tokenizer(config, inner.vocab_size, context_length, inner, end_id=inner.vocab_size - 1)
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(config.name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.tokenizer.name: cannot load '{config.name}': {reason} Give a folder with tokenizer files, or a hub "
            "name that this machine can reach."
        ) from None
    if inner.pad_token_id is None:
        raise ConfigError(f"model.tokenizer.name: '{config.name}' has no padding token; choose one that has")
    inner.padding_side = "right"
    last = {inner(text)["input_ids"][-1] for text in ("a", "b")}
    return Tokenizer(config, len(inner), context_length, inner, end_id=last.pop() if len(last) == 1 else None)

"""Captions to token ids. Every tokeniser here works offline once its files are on disk.

Shape legend: n texts, L text tokens (the context length).
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_tools.errors import first_line
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
    inner: Any  # ClipBytePairs or a transformers tokenizer
    end_id: int | None  # the id that ends every text; None: it differs, and a tower cannot pool there
    padding_id: int | None = None  # the id that is padding and nothing else; None: it is also a word or an end mark
    mask_id: int | None = None  # what stands for a token to be predicted; None: it has no such id
    special_ids: tuple[int, ...] = ()  # padding, begin, end, ...: not words

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        if self.config.kind == "clip":
            ids = self.inner(texts, self.context_length)
            # Padding is id 0, which is also "!", so the mask goes by the end mark: the largest id there is.
            return ids, torch.arange(self.context_length) <= ids.argmax(dim=1, keepdim=True)
        encoded = self.inner(
            texts, max_length=self.context_length, padding="max_length", truncation=True, return_tensors="pt"
        )
        return encoded["input_ids"], encoded["attention_mask"].bool()


class ClipBytePairs:
    """The ids of open_clip's SimpleTokenizer, merged in Rust (the library `tokenizers`), which leaves the GIL.

    Texts that are not ASCII once they are clean, or that spell a special token, go through SimpleTokenizer itself: its
    regular expressions and those of Rust need not agree on every letter of Unicode.
    """

    def __init__(self) -> None:
        prepare_torchvision()
        from open_clip.tokenizer import SimpleTokenizer
        from tokenizers import Regex, models, pre_tokenizers
        from tokenizers import Tokenizer as RustTokenizer

        self._simple = SimpleTokenizer()
        self.vocab_size = self._simple.vocab_size
        self._start, self._end = self._simple.all_special_ids
        merges = list(self._simple.bpe_ranks)
        self._merger = RustTokenizer(models.BPE(self._simple.encoder, merges, end_of_word_suffix="</w>"))
        words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")  # SimpleTokenizer's, for lower-case ASCII
        self._merger.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def __call__(self, texts: list[str], context_length: int) -> Tensor:
        """[n,L] int64, padded with 0; a longer text is cut, and the end mark kept."""
        clean = [self._clean(text) for text in texts]
        plain = [text.isascii() and "<start_of_text>" not in text and "<end_of_text>" not in text for text in clean]
        merged = iter(
            self._merger.encode_batch_fast([text for text, is_plain in zip(clean, plain, strict=True) if is_plain])
        )
        ids = np.zeros((len(texts), context_length), dtype=np.int64)
        for row, text, is_plain in zip(ids, texts, plain, strict=True):
            tokens = (next(merged).ids if is_plain else self._simple.encode(text))[: context_length - 2]
            row[0], row[1 : 1 + len(tokens)], row[1 + len(tokens)] = self._start, tokens, self._end
        return torch.from_numpy(ids)

    def _clean(self, text: str) -> str:
        """What SimpleTokenizer makes of the text first; in printable ASCII without entities it has nothing to mend."""
        if text.isascii() and text.isprintable() and "&" not in text:
            return " ".join(text.split()).lower()
        return self._simple.clean_fn(text)


@functools.cache
def clip_byte_pairs() -> ClipBytePairs:
    """That of the process: it takes half a second to build, and does not change."""
    return ClipBytePairs()


def build_tokenizer(config: ConfigModel, context_length: int) -> Tokenizer:
    """Raises ConfigError, in one line, when the tokeniser's files cannot be found."""
    if config.kind == "clip":
        inner = clip_byte_pairs()
        return Tokenizer(config, inner.vocab_size, context_length, inner, end_id=inner.vocab_size - 1)
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(config.name)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"model.tokenizer.name: cannot load '{config.name}': {reason} Give a folder with tokenizer files, or a hub "
            "name that this machine can reach."
        ) from None
    if inner.pad_token_id is None:
        raise ConfigError(f"model.tokenizer.name: '{config.name}' has no padding token; choose one that has")
    inner.padding_side = "right"
    last = {inner(text)["input_ids"][-1] for text in ("a", "b")}
    marks = ("bos", "eos", "cls", "sep", "unk", "mask")
    shared = inner.pad_token_id in {getattr(inner, f"{mark}_token_id") for mark in marks}
    return Tokenizer(
        config,
        len(inner),
        context_length,
        inner,
        end_id=last.pop() if len(last) == 1 else None,
        padding_id=None if shared else inner.pad_token_id,
        mask_id=inner.mask_token_id,
        special_ids=tuple(inner.all_special_ids),
    )

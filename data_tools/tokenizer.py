"""Trains a tokeniser on the captions of a dataset and saves it as a folder that transformers' AutoTokenizer loads.

    wordpiece   as BERT's: words and characters of Chinese apart, then pieces ("play", "##ing"); [CLS] text [SEP]
    bpe         as RoBERTa's: pairs of bytes, so nothing is unknown in any language; <s> text </s>

The same captions in the same order make the same files. Sources: BERT (arXiv:1810.04805), RoBERTa (arXiv:1907.11692),
and the `tokenizers` library, which does the training.
"""

import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_tools.dedup import read_captions
from data_tools.errors import UserError
from data_tools.files import TEMPORARY_SUFFIX, sync_folder, write_atomic, write_json_atomic
from data_tools.shards import Manifest, ShardReader, sidecar_name

MIN_FREQUENCY = 2
"""How often a pair of pieces must occur, at least, to become a piece of its own."""
MEASURED_CAPTIONS = 10_000

Captions = Callable[[], Iterable[str]]
"""Each call goes through all captions once more."""


@dataclass(frozen=True)
class _Kind:
    """Special tokens by their role in transformers, in the order of their ids, and how the rest is learned."""

    special_tokens: dict[str, str]
    smallest: int
    train: Callable[[Captions, int, list[str], bool], Tokenizer]


def train_tokenizer(
    directory: str | Path, out: str | Path, vocab_size: int, *, kind: str = "wordpiece", lowercase: bool = True
) -> dict[str, Any]:
    """Train on all captions of the dataset (or view) `directory`; write the folder `out`, complete or not at all.

    The captions are streamed, three times for wordpiece. The vocabulary has at most `vocab_size` entries, special
    tokens included; fewer when the captions do not have so many pieces that occur twice. Returns what was measured:
    captions, vocab_size, and of the first 10,000 captions the tokens a caption (end marks included) and the share of
    unknown tokens. Raises UserError for a used folder, an unknown kind, and a vocabulary too small for its alphabet.
    """
    out = Path(out)
    if kind not in KINDS:
        raise UserError(f"--kind {kind}: not a kind of tokeniser. Valid: {', '.join(KINDS)}")
    recipe = KINDS[kind]
    if vocab_size < recipe.smallest:
        raise UserError(f"--vocab-size {vocab_size}: too few for {kind}. Give at least {recipe.smallest}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already and not an empty folder. Give a new folder")
    manifest = Manifest.load(directory)
    seen = Counter()

    def captions() -> Iterator[str]:
        seen.clear()
        for caption in iterate_captions(manifest):
            seen.update(captions=1)
            yield caption

    tokenizer = recipe.train(captions, vocab_size, list(dict.fromkeys(recipe.special_tokens.values())), lowercase)
    if not seen["captions"]:
        raise UserError(f"{directory}: no captions. A tokeniser is trained on captions")
    facts = {"kind": kind, "lowercase": lowercase, "captions": seen["captions"]}
    facts |= {"vocab_size": tokenizer.get_vocab_size(), **_measure(tokenizer, recipe, iterate_captions(manifest))}
    _write_folder(out, tokenizer, recipe)
    return facts


def iterate_captions(manifest: Manifest) -> Iterator[str]:
    """All captions of a dataset in its order, from the sidecars; from the tars where a sidecar is missing."""
    with closing(ShardReader(manifest)) as reader:
        for number, shard in enumerate(manifest.shards):
            if manifest.indexes.size(sidecar_name(shard.name)) is not None:
                for row in manifest.read_sidecar(number, ["captions", "caption"], missing_ok=True).to_pylist():
                    yield from row["captions"] or [row["caption"]]
            else:
                for place in manifest.places(number).tolist():
                    yield from read_captions(reader.read_place(number, place))


def describe_tokenizer(out: str | Path, facts: dict[str, Any]) -> str:
    """The result of `train_tokenizer` in two lines for people."""
    return (
        f"{out}: {facts['kind']}, {facts['vocab_size']} entries, from {facts['captions']} captions\n"
        f"tokens a caption, end marks included: mean {facts['tokens_mean']:.1f}, 95 of 100 have at most "
        f"{facts['tokens_95']}, longest {facts['tokens_max']}; unknown {facts['unknown_share']:.2%} "
        f"(of the first {facts['measured_captions']} captions)"
    )


def _train_wordpiece(captions: Captions, vocab_size: int, special_tokens: list[str], lowercase: bool) -> Tokenizer:
    """Characters beyond half of the vocabulary, the rarest, are left to [UNK].

    The trainer numbers the pieces of one character ("##a") in the random order of a hash map, and breaks ties between
    merges by number. So they are learned first, sorted, and handed to the training proper in the place of special
    tokens, which keep their order.
    """
    normalizer = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, lowercase=lowercase)
    alphabet = _choose_alphabet(map(normalizer.normalize_str, captions()), (vocab_size - len(special_tokens)) // 2)

    def train(size: int, first: list[str]) -> list[str]:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=size,
            min_frequency=MIN_FREQUENCY,
            special_tokens=first,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        tokenizer.train_from_iterator(captions(), trainer)
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        return sorted(vocabulary, key=vocabulary.__getitem__)

    letters = sorted(set(train(0, special_tokens)) - set(special_tokens))
    pieces = train(vocab_size, [*special_tokens, *letters])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special_tokens)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return tokenizer


def _choose_alphabet(texts: Iterable[str], limit: int) -> list[str]:
    """The `limit` most frequent characters, white space aside; of equally frequent ones the lower code point."""
    counts = Counter()
    for text in texts:
        counts.update(text)
    visible = [character for character in counts if not character.isspace()]
    return sorted(sorted(visible, key=lambda character: (-counts[character], character))[:limit])


def _train_bpe(captions: Captions, vocab_size: int, special_tokens: list[str], lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    parts = [normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])]
    tokenizer.normalizer = normalizers.Sequence(parts)
    # With a space before the first word, a word is the same tokens wherever it stands.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions(), trainer)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", tokenizer.token_to_id("</s>")), ("<s>", tokenizer.token_to_id("<s>")), add_prefix_space=True
    )
    return tokenizer


KINDS: dict[str, _Kind] = {
    "wordpiece": _Kind(
        {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        },
        100,
        _train_wordpiece,
    ),
    "bpe": _Kind(
        {
            "bos_token": "<s>",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
            "cls_token": "<s>",
            "sep_token": "</s>",
        },
        300,
        _train_bpe,
    ),
}
"""The order of ids is that of BERT (where [PAD] is 0) and of RoBERTa (where <s> is 0 and <pad> is 1)."""


def _measure(tokenizer: Tokenizer, recipe: _Kind, captions: Iterator[str]) -> dict[str, Any]:
    """How long the first captions are in tokens, and how much of them is unknown."""
    unknown_id = tokenizer.token_to_id(recipe.special_tokens["unk_token"])
    encoded = tokenizer.encode_batch(list(islice(captions, MEASURED_CAPTIONS)))
    lengths = np.array([len(entry.ids) for entry in encoded])
    unknown = sum(entry.ids.count(unknown_id) for entry in encoded)
    return {
        "measured_captions": len(lengths),
        "tokens_mean": round(float(lengths.mean()), 3),
        "tokens_95": int(np.quantile(lengths, 0.95, method="higher")),
        "tokens_max": int(lengths.max()),
        "unknown_share": round(unknown / int(lengths.sum()), 6),
    }


def _write_folder(out: Path, tokenizer: Tokenizer, recipe: _Kind) -> None:
    """Write the files into a folder of another name beside `out`, and rename it when it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    temporary.mkdir()
    try:
        added = tokenizer.get_added_tokens_decoder()
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
            **recipe.special_tokens,
            "added_tokens_decoder": {
                str(number): {
                    "content": token.content,
                    "lstrip": token.lstrip,
                    "normalized": token.normalized,
                    "rstrip": token.rstrip,
                    "single_word": token.single_word,
                    "special": token.special,
                }
                for number, token in sorted(added.items())
            },
        }
        write_atomic(temporary / "tokenizer.json", (tokenizer.to_str(pretty=True) + "\n").encode())
        write_json_atomic(temporary / "tokenizer_config.json", config)
        write_json_atomic(temporary / "special_tokens_map.json", recipe.special_tokens)
        os.replace(temporary, out)
        sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def print_tokenizer(directory: str, out: str, vocab_size: int, kind: str, lowercase: bool, as_json: bool) -> None:
    """The command: train, write, and print what came of it."""
    facts = train_tokenizer(directory, out, vocab_size, kind=kind, lowercase=lowercase)
    print(json.dumps({"out": str(out), **facts}, ensure_ascii=False) if as_json else describe_tokenizer(out, facts))

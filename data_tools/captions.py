"""Captions as they are found -> captions to train on: cleaned, or refused for one of few reasons."""

import html
import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_tools.errors import UserError

MAX_CHARS = 10_000

_CONTROL = re.compile("[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]")
"""Characters that show nothing and are no white space; U+FEFF is the byte order mark of a file that was cut up."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
"""Scripts whose words do not stand between spaces, or carry endings: Thai, Lao, Burmese, Khmer, Han, Kana, Hangul."""
_MARKS = (
    "\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u0900-\u0963\u0966-\u0dff"
)
"""Accents and vowel signs that are part of words but no letters to `re`."""
_TOKEN = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[\w{_MARKS}])+|[^\w\s]")
_MAX_UNESCAPES = 3
_MOST_SHRINKING = 64


class CaptionError(Exception):
    """A caption that cannot be used; `reason` is one of a few: empty, too short, too long or blocked."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class CaptionPolicy:
    """How captions are cleaned and which are refused. Limits are inclusive and of the cleaned caption; 0 sets none.

    `fix_text` resolves HTML entities and repairs text that was decoded wrongly ("schÃ¶n"); it leaves quotes, ligatures
    and full-width characters as they were written. Words are what stands between white space, so a whole sentence of
    Chinese may be one. Entries of `blocklist` are words or phrases: a caption that holds one is refused, whatever its
    case and width ("Ad" blocks "an AD." but not "bread"); in scripts that put no spaces between words an entry is
    found anywhere. Raises UserError for values that make no sense.
    """

    fix_text: bool = False
    min_words: int = 0
    max_words: int = 0
    min_chars: int = 0
    max_chars: int = MAX_CHARS
    blocklist: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for unit in ("words", "chars"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if least < 0 or most < 0 or 0 < most < least:
                raise UserError(f"caption length: {least} to {most} {unit}. Give numbers from 0 (no limit) in order")
        for entry in self.blocklist:
            if not _split(entry):
                raise UserError(f"blocklist: the entry {entry!r} has no character to look for")

    @cached_property
    def _blocked_phrases(self) -> dict[int, set[tuple[str, ...]]]:
        """The entries of the blocklist as their tokens, by how many these are."""
        phrases: dict[int, set[tuple[str, ...]]] = {}
        for entry in self.blocklist:
            tokens = tuple(_split(entry))
            phrases.setdefault(len(tokens), set()).add(tokens)
        return phrases


def load_blocklist(path: str | Path) -> tuple[str, ...]:
    """The words and phrases of a file, one a line. Raises UserError when it is not UTF-8 text or holds none."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text. Give a list with one word or phrase a line") from None
    entries = tuple(dict.fromkeys(filter(None, (" ".join(line.split()) for line in lines))))
    if not entries:
        raise UserError(f"{path}: the list is empty. Give one word or phrase a line")
    return entries


def clean_caption(text: str, policy: CaptionPolicy) -> str:
    """The caption on one line with single spaces, without control characters and half surrogate pairs.

    What comes out can always be written as UTF-8. Raises CaptionError for one that the policy refuses.
    """
    text = _fold_space(text)
    if policy.fix_text and ("&" in text or not text.isascii()):  # in others there is nothing to repair
        if policy.max_chars and len(text) > _MOST_SHRINKING * policy.max_chars:
            raise CaptionError("caption too long")  # repair is slow, and does not make it so much shorter
        text = _fold_space(_repair(text))
    words = len(text.split(" ")) if text else 0
    if not text:
        raise CaptionError("empty caption")
    if len(text) < policy.min_chars or words < policy.min_words:
        raise CaptionError("caption too short")
    if len(text) > (policy.max_chars or math.inf) or words > (policy.max_words or math.inf):
        raise CaptionError("caption too long")
    if policy.blocklist and _is_blocked(text, policy):
        raise CaptionError("blocked caption")
    return text


def _fold_space(text: str) -> str:
    if _SURROGATE.search(text):
        # Halves of a pair that belong together (as from JSON in pieces) are joined, others are dropped.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")
    return " ".join(_CONTROL.sub("", text).split())


def _repair(text: str) -> str:
    import ftfy

    for _ in range(_MAX_UNESCAPES):  # "&amp;quot;": pages escape what was escaped already
        unescaped = html.unescape(text)
        if unescaped == text:
            break
        text = unescaped
    return ftfy.fix_text(
        _fold_space(text),
        unescape_html=False,
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
    )


def _split(text: str) -> list[str]:
    """Words, single characters of scripts without spaces, and signs; without differences of case and width."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()))


def _is_blocked(text: str, policy: CaptionPolicy) -> bool:
    tokens = _split(text)
    return any(
        phrase in phrases for length, phrases in policy._blocked_phrases.items() for phrase in _windows(tokens, length)
    )


def _windows(tokens: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[start:] for start in range(length)), strict=False)

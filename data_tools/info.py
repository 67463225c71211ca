"""What a finished shard folder holds: gathered in one pass over the sidecars, printed in lines of at most 80 columns."""

import json as json_format
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.files import format_bytes, format_counts
from data_tools.folder import read_sidecar_rows
from data_tools.shards import Manifest

_COLUMNS = 80
_NAME_COLUMNS = 13
_EXAMPLES = 5
_MOST_REASONS = 1000
_SCRIPTS = {"CJK": "Han", "HANGUL": "Hangul", "KATAKANA-HIRAGANA": "Katakana", "IDEOGRAPHIC": "Han"}
_FORMS = ("FULLWIDTH", "HALFWIDTH", "MATHEMATICAL", "SUPERSCRIPT", "SUBSCRIPT", "MODIFIER")


@dataclass
class Facts:
    """Counts over the samples of a dataset, and over its failures by reason.

    All are counts by value, so their size is bounded by the number of different sizes and lengths, not of samples.
    """

    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    shorter_sides: Counter[int] = field(default_factory=Counter)
    aspects: Counter[float] = field(default_factory=Counter)  # width / height, to three digits
    pixels: int = 0
    captions_per_image: Counter[int] = field(default_factory=Counter)
    caption_words: Counter[int] = field(default_factory=Counter)  # parted by white space
    caption_characters: Counter[int] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)  # letters by script
    failures: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)


def gather_facts(manifest: Manifest) -> Facts:
    """Read the sidecars of all shards once, in constant memory. Raises UserError when one is missing or unreadable."""
    facts, characters = Facts(), Counter()
    for row in read_sidecar_rows(manifest, ["status", "error", "captions", "caption", "width", "height"]):
        if row["status"] != "success":
            reason = (row["error"] or row["status"]).partition(": ")
            # What a privacy run took out is told by what it was; other details are about one sample.
            name = row["error"] if reason[0] in ("removed", "dropped") else reason[0]
            facts.failures[name if name in facts.failures or len(facts.failures) < _MOST_REASONS else "others"] += 1
            continue
        captions, width, height = row["captions"] or [], row["width"], row["height"]
        facts.captions_per_image[len(captions)] += 1
        for caption in captions:
            facts.caption_words[len(caption.split())] += 1
            facts.caption_characters[len(caption)] += 1
            characters.update(caption)
        if width and height:
            facts.widths[width] += 1
            facts.heights[height] += 1
            facts.shorter_sides[min(width, height)] += 1
            facts.aspects[float(f"{width / height:.3g}")] += 1
            facts.pixels += width * height
        if captions and len(facts.examples) < _EXAMPLES:
            facts.examples.append(captions[0])
    for character, number in characters.items():
        if character.isalpha():
            facts.scripts[name_script(character)] += number
    return facts


def name_script(letter: str) -> str:
    """The script of a letter, by its Unicode name: "Latin", "Han", "Cyrillic", ...; "Other" for one without a name."""
    words = unicodedata.name(letter, "OTHER").split()
    while len(words) > 1 and words[0] in _FORMS:
        words = words[1:]
    return _SCRIPTS.get(words[0], words[0].capitalize())


def find_quantile(counts: Mapping[Any, int], share: float) -> Any:
    """The least value that at least `share` of all values are not above (the median for 0.5); None without values."""
    total, so_far = sum(counts.values()), 0
    for value in sorted(counts):
        so_far += counts[value]
        if so_far >= share * total:
            return value
    return None


def print_info(directory: str | Path, json: bool = False) -> None:
    """Print counts, sizes, caption lengths, scripts, failures by reason, examples of captions and the fingerprint.

    Raises UserError when `directory` holds no finished build.
    """
    manifest = Manifest.load(directory)
    facts = gather_facts(manifest)
    beside = sum(size for name, size in manifest.indexes.sizes().items() if not name.endswith(".tar"))
    print(_render_json(manifest, facts, beside) if json else _render_lines(manifest, facts, beside))


def _render_lines(manifest: Manifest, facts: Facts, beside: int) -> str:
    per_image = format_numbers(facts.captions_per_image)
    letters = facts.scripts.total()
    scripts = ", ".join(f"{name} {format_share(number, letters)}" for name, number in facts.scripts.most_common())
    failed = f" ({format_counts(facts.failures)})" if facts.failures else ""
    entries = {
        "samples": f"{manifest.samples}, {format_bytes(manifest.bytes)} in {len(manifest.shards)} tars, "
        f"{format_bytes(beside)} beside them",
        "captions": f"{manifest.captions} (images with so many captions: {per_image})",
        "words": f"{_describe(facts.caption_words)} a caption",
        "characters": f"{_describe(facts.caption_characters)} a caption",
        "scripts": f"{scripts or 'no letters'}",
        "width px": _describe(facts.widths),
        "height px": _describe(facts.heights),
        "pixels": f"{facts.pixels / 1e6:.1f} million",
        "failures": f"{manifest.failures}{failed}",
        "fingerprint": manifest.fingerprint,
    }
    lines = [str(manifest.directory)]
    for name, text in entries.items():
        lines += _wrap(name, text)
    lines.append("examples")
    lines += [_cut(f"  {' '.join(caption.split())}") for caption in facts.examples]
    return "\n".join(lines)


def _render_json(manifest: Manifest, facts: Facts, beside: int) -> str:
    content = {
        "directory": str(manifest.directory),
        "samples": manifest.samples,
        "failures": manifest.failures,
        "failures_by_reason": dict(facts.failures.most_common()),
        "captions": manifest.captions,
        "captions_per_image": {
            str(number): facts.captions_per_image[number] for number in sorted(facts.captions_per_image)
        },
        "caption_words": _summarise(facts.caption_words),
        "caption_characters": _summarise(facts.caption_characters),
        "letters_by_script": dict(facts.scripts.most_common()),
        "width": _summarise(facts.widths),
        "height": _summarise(facts.heights),
        "pixels": facts.pixels,
        "tars": len(manifest.shards),
        "tar_bytes": manifest.bytes,
        "bytes": manifest.bytes + beside,
        "fingerprint": manifest.fingerprint,
    }
    return json_format.dumps(content, ensure_ascii=False, indent=2)


def format_numbers(counts: Mapping[int, int]) -> str:
    """Counts by number, in order: "1: 20, 5: 300"."""
    return ", ".join(f"{number}: {counts[number]}" for number in sorted(counts))


def format_share(part: int, whole: int) -> str:
    """A part in percent, never shown as nothing when it is something."""
    return "<0.1 %" if 0 < part < whole / 1000 else f"{100 * part / max(whole, 1):.1f} %"


def _summarise(counts: Mapping[int, int]) -> dict[str, int] | None:
    if not counts:
        return None
    median, high = find_quantile(counts, 0.5), find_quantile(counts, 0.95)
    return {"min": min(counts), "median": median, "p95": high, "max": max(counts)}


def _describe(counts: Mapping[int, int]) -> str:
    summary = _summarise(counts)
    return ", ".join(f"{name} {value}" for name, value in summary.items()) if summary else "unknown"


def _wrap(name: str, text: str) -> list[str]:
    """The entry in lines of at most 80 columns, broken at spaces."""
    lines, line = [], f"{name:<{_NAME_COLUMNS}}"
    for number, word in enumerate(text.split(" ")):
        longer = line + word if number == 0 else f"{line} {word}"
        if len(longer) > _COLUMNS and line.strip() and number > 0:
            lines.append(line)
            longer = " " * _NAME_COLUMNS + word
        line = longer
    return [_cut(line) for line in (*lines, line)]


def _cut(line: str) -> str:
    """At most 80 columns, where characters of East Asian width take two."""
    columns = 0
    for place, character in enumerate(line):
        columns += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if columns > _COLUMNS:
            kept = line[:place]
            while sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in kept) > _COLUMNS - 3:
                kept = kept[:-1]
            return kept + "..."
    return line

"""A page that shows a shard folder: pictures with their captions, histograms, failures. One file, no scripts, no network."""

import base64
import html
import io
import json
import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from data_tools.errors import UserError
from data_tools.files import format_bytes, write_atomic
from data_tools.info import Facts, find_quantile, format_share, gather_facts
from data_tools.shards import Manifest, RawSample, ShardReader

_PICTURES = ("jpg", "jpeg", "png", "webp")
_THUMBNAIL_PIXELS = 320
_THUMBNAIL_QUALITY = 80
_MAX_PIXELS = 89_000_000
_CAPTIONS_SHOWN = 5
_CHARACTERS_SHOWN = 400
_BINS = 24
_WIDEST_BAR = 40

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --card: #f4f5f7; --ink: #1c2024; --soft: #5b6470; --line: #d9dde3;
        --bar: #3b6fd4; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171a; --card: #1f2429; --ink: #e8eaed; --soft: #a3adb8; --line: #363d45; --bar: #7aa5f5;
          --bad: #f2877f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 90rem; background: var(--ground); color: var(--ink);
       font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 2rem 0 .7rem; }
.soft { color: var(--soft); } .print { font: 12px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: .4rem 2rem; margin: 1rem 0; padding: 0; }
.facts div { display: flex; flex-direction: column-reverse; } .facts dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
.facts dt { color: var(--soft); font-size: .8rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem; background: var(--card); border-radius: 8px; }
figcaption { font-size: .85rem; margin-bottom: .4rem; } svg { display: block; width: 100%; height: auto; }
svg rect { fill: var(--bar); } svg line { stroke: var(--line); } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .25rem 1.2rem .25rem 0; vertical-align: top;
        border-bottom: 1px solid var(--line); overflow-wrap: anywhere; } .number { text-align: right; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
.sample { background: var(--card); border-radius: 8px; overflow: hidden; }
.picture { height: 12rem; display: flex; align-items: center; justify-content: center; background: var(--line); }
.picture img { max-width: 100%; max-height: 100%; display: block; } .bad { color: var(--bad); padding: 1rem; text-align: center; }
.words { padding: .6rem .75rem .75rem; } .words p, .words ul { margin: 0 0 .4rem; overflow-wrap: anywhere; }
.words ul { padding-left: 1.1rem; } .words p:last-child { margin: 0; }
"""


def write_preview(directory: str | Path, out: str | Path, *, count: int = 60, seed: int = 0) -> None:
    """Write the page for the shard folder `directory` to `out`: `count` samples drawn by `seed`, in the order of the shards.

    The same folder, count and seed make the same bytes. A sample whose picture cannot be shown stands there with the
    reason. Raises UserError when `directory` holds no finished build, for a count below 1, and for another suffix of
    `out` than .html (it would be replaced).
    """
    out = Path(out)
    if count < 1:
        raise UserError(f"--count {count}: give at least 1")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out}: the page is a file that ends in .html. Give such a name")
    manifest = Manifest.load(directory)
    facts = gather_facts(manifest)
    numbers = sorted(random.Random(seed).sample(range(manifest.samples), min(count, manifest.samples)))
    with closing(ShardReader(manifest)) as reader:
        cards = [_render_sample(reader.read(number)) for number in numbers]
    write_atomic(out, _render_page(manifest, facts, cards, seed).encode())
    print(f"{out}: {len(cards)} of {manifest.samples} samples, {format_bytes(out.stat().st_size)}")


def _render_page(manifest: Manifest, facts: Facts, cards: list[str], seed: int) -> str:
    name = html.escape(str(manifest.directory).rstrip("/").rpartition("/")[2])
    numbers = {
        "samples": f"{manifest.samples:,}",
        "captions": f"{manifest.captions:,}",
        "failures": f"{manifest.failures:,}",
        "tars": f"{len(manifest.shards):,}",
        "bytes of tars": format_bytes(manifest.bytes),
        "million pixels": f"{facts.pixels / 1e6:,.1f}",
    }
    facts_list = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in numbers.items())
    charts = "".join(
        _render_histogram(title, counts, scale, show)
        for title, counts, scale, show in (
            ("shorter side, pixels", facts.shorter_sides, _even_bins, str),
            ("aspect, width : height", facts.aspects, _ratio_bins, lambda value: f"{value:.2f}"),
            ("caption length, words", facts.caption_words, _even_bins, str),
            ("caption length, characters", facts.caption_characters, _even_bins, str),
        )
    )
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{name}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # A caption that found a way to become mark-up would still load and run nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
        f"<style>{_STYLE}</style></head><body>",
        f'<h1>{name}</h1><div class="soft print">fingerprint {manifest.fingerprint}</div>',
        f'<dl class="facts">{facts_list}</dl>',
        f'<h2>Sizes and lengths</h2><div class="charts">{charts}</div>',
        _render_table("Scripts of the captions' letters", facts.scripts),
        _render_table("Failures by reason", facts.failures),
        f'<h2>{len(cards)} of {manifest.samples:,} samples <span class="soft">(seed {seed})</span></h2>',
        f'<div class="sheet">{"".join(cards)}</div></body></html>',
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _render_table(title: str, counts: Mapping[str, int]) -> str:
    if not counts:
        return ""
    total = sum(counts.values())
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="number">{number:,}</td>'
        f'<td class="number soft">{html.escape(format_share(number, total))}</td></tr>'
        for name, number in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    )
    return f"<h2>{html.escape(title)}</h2><table>{rows}</table>"


# Pictures


def _render_sample(sample: RawSample) -> str:
    captions, facts = _read_captions(sample)
    shown = [_shorten(caption) for caption in captions[:_CAPTIONS_SHOWN]]
    if len(captions) > _CAPTIONS_SHOWN:
        shown.append(f"... and {len(captions) - _CAPTIONS_SHOWN} more")
    lines = [html.escape(caption) for caption in shown]
    text = f"<p>{lines[0]}</p>" if len(lines) == 1 else f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>"
    picture, size = _render_picture(sample)
    source = f"<br>{html.escape(_shorten(facts['source']))}" if isinstance(facts.get("source"), str) else ""
    return (
        f'<div class="sample"><div class="picture">{picture}</div><div class="words" dir="auto">{text}'
        f'<p class="soft print" dir="ltr">{html.escape(sample.key)} · {size.replace(" ", "&nbsp;")}{source}</p></div></div>\n'
    )


def _read_captions(sample: RawSample) -> tuple[list[str], dict[str, Any]]:
    """All captions of the sample, and what else its json says (nothing, when it has none that can be read)."""
    try:
        facts = json.loads(sample.fields.get("json", b""))
    except (ValueError, RecursionError):
        facts = None
    facts = facts if isinstance(facts, dict) else {}
    captions = [caption for caption in facts.get("captions") or [] if isinstance(caption, str)]
    if not captions and "txt" in sample.fields:
        captions = [sample.fields["txt"].decode(errors="replace")]
    return captions or ["(no caption)"], facts


def _shorten(text: str) -> str:
    return text if len(text) <= _CHARACTERS_SHOWN else text[:_CHARACTERS_SHOWN] + "..."


def _render_picture(sample: RawSample) -> tuple[str, str]:
    """An <img> with the thumbnail in it, and the size of the stored picture in words."""
    data = next((sample.fields[name] for name in _PICTURES if name in sample.fields), None)
    if data is None:
        return '<div class="bad">no picture</div>', "no picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            size = f"{image.width} x {image.height}"
            if image.width * image.height > _MAX_PIXELS:
                raise ValueError(f"{size} pixels are too many to show")
            image.draft("RGB", (_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
            image = ImageOps.exif_transpose(image).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders answer to damaged files with almost any exception
        return f'<div class="bad">{html.escape(_shorten(str(error)))}</div>', format_bytes(len(data))
    image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_THUMBNAIL_QUALITY)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img src="data:image/jpeg;base64,{encoded}" width="{image.width}" height="{image.height}" alt="">',
        f"{size}, {format_bytes(len(data))}",
    )


# Histograms


def _even_bins(counts: Mapping[int, int]) -> list[tuple[float, float]]:
    """Bins of one whole width, from the least value to the 99th of 100; the last also takes what is above."""
    low, high = min(counts), max(find_quantile(counts, 0.99), min(counts))
    step = max(1, math.ceil((high - low + 1) / _BINS))
    return [(start, start + step) for start in range(low, high + 1, step)]


def _ratio_bins(counts: Mapping[float, int]) -> list[tuple[float, float]]:
    """Bins of one ratio, that have 1 : 1 in the middle of one; from the 1st of 100 to the 99th, ends taking the rest."""
    step = 2 ** (1 / 6)
    low, high = (round(math.log(find_quantile(counts, share), step)) for share in (0.01, 0.99))
    while high - low + 1 > _BINS:
        step, low, high = step**2, low // 2, -(-high // 2)
    return [(step ** (place - 0.5), step ** (place + 0.5)) for place in range(low, high + 1)]


def _render_histogram(
    title: str,
    counts: Mapping[Any, int],
    cut: Callable[[Mapping[Any, int]], list[tuple[float, float]]],
    show: Callable[[Any], str],
) -> str:
    """A figure with bars; it names the least, the middle and the greatest value, for the bars do not."""
    if not counts:
        return f"<figure><figcaption>{title}: <span class='soft'>unknown</span></figcaption></figure>"
    bins = cut(counts)
    heights: Counter[int] = Counter()
    for value, number in counts.items():
        place = next((place for place, (_, end) in enumerate(bins) if value < end), len(bins) - 1)
        heights[place] += number
    width, height, base = 360, 130, 108
    left, room = 4, 352
    most, slot = max(heights.values()), min(_WIDEST_BAR, room / len(bins))
    left += (room - slot * len(bins)) / 2  # few bars stand in the middle
    room = slot * len(bins)
    open_end = max(counts) >= bins[-1][1]
    bars = "".join(
        f'<rect x="{left + place * slot:.1f}" y="{base - 96 * heights[place] / most:.1f}" '
        f'width="{max(1.0, slot - 1.5):.1f}" height="{96 * heights[place] / most:.1f}">'
        f"<title>{_name_bin(bins, place, show, open_end)}: {heights[place]:,}</title></rect>"
        for place in range(len(bins))
        if heights[place]
    )
    labels = []
    for place in sorted({0, len(bins) // 2 if len(bins) >= 5 else 0, len(bins) - 1}):
        anchor = "start" if place == 0 and len(bins) > 1 else "end" if place == len(bins) - 1 and place else "middle"
        x = left if anchor == "start" else left + room if anchor == "end" else left + (place + 0.5) * slot
        labels.append(
            f'<text x="{x:.1f}" y="{base + 16}" text-anchor="{anchor}">{_name_bin(bins, place, show, open_end)}</text>'
        )
    median = show(find_quantile(counts, 0.5))
    summary = (
        f"min {show(min(counts))}, median {median}, p95 {show(find_quantile(counts, 0.95))}, max {show(max(counts))}"
    )
    return (
        f'<figure><figcaption>{title}<br><span class="soft">{summary}</span></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}: {summary}">{bars}'
        f'<line x1="{left:.1f}" y1="{base}" x2="{left + room:.1f}" y2="{base}"/>{"".join(labels)}</svg></figure>'
    )


def _name_bin(bins: list[tuple[float, float]], place: int, show: Callable[[Any], str], open_end: bool) -> str:
    """Whole numbers by their first and last, ratios by their middle; "24+" for a last bin that takes what is above."""
    start, end = bins[place]
    if open_end and place == len(bins) - 1 and not isinstance(start, float):
        return f"{show(start)}+"
    if isinstance(start, float):
        return show(math.sqrt(start * end))
    return show(start) if end - start == 1 else f"{show(start)} to {show(end - 1)}"

"""`report RUN`: where a run's time went, what ended its lives, and a timeline; as text, and as one page of HTML."""

import html
import math
import time

from data_tools.errors import UserError
from data_tools.files import write_atomic
from launch.ledger import KINDS, Ledger, Life, read_ledger

WIDTH = 80
SIGNS = {"queue": ".", "start": "s", "productive": "#", "checkpoint": "c", "lost": "x", "detect": "?", "restart": "r"}
# Told apart by people who do not see red and green alike, and in grey.
COLOURS = {
    "queue": "#d9d9d9", "start": "#9ecae1", "productive": "#2b8a57", "checkpoint": "#f2c14e", "lost": "#d1495b",
    "detect": "#7b2d8b", "restart": "#5b8def",
}  # fmt: skip
MEANINGS = {
    "queue": "waiting for nodes",
    "start": "until a job's first step",
    "productive": "steps that count",
    "checkpoint": "standing still for a save",
    "lost": "steps done again after failures",
    "detect": "from failure to notice",
    "restart": "from notice to the next step",
}
LIVES_SHOWN = 40


def run(folder: str, page: str | None) -> int:
    """Print the report of a run; write the page, too, if one is named."""
    ledger = read_ledger(folder)
    if not ledger.spans and not ledger.lives:
        raise UserError(
            f"{folder}/launch/events.jsonl: no events. Is it the folder of a run of `python -m launch submit`?"
        )
    print(render_text(folder, ledger))
    if page:
        write_atomic(page, render_page(folder, ledger).encode())
        print(f"\npage        {page}"[: WIDTH + 1])
    return 0


def span_text(seconds: float) -> str:
    """3.4 s, 12:05 (minutes), 3:12:05 (hours), 4 d 03 h."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    if whole < 2 * 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def clip(text: str, width: int = WIDTH) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def render_text(folder: str, ledger: Ledger) -> str:
    booked, total_s = ledger.seconds, ledger.total_s
    failed = sum(int(entry["failures"]) for entry in ledger.causes().values())
    lines = [
        clip(f"run         {folder}"),
        f"wall time   {span_text(total_s)}: jobs {len(set(ledger.jobs)) or 1}, lives {len(ledger.lives)}, failures {failed}",
        f"goodput     {ledger.goodput:.1%} of the time in which there were nodes",
        "",
        "where the time went",
    ]
    for kind in KINDS:
        share = booked[kind] / total_s if total_s else 0.0
        bar = SIGNS[kind] * round(14 * share)
        lines.append(
            f"  {kind:<11}{span_text(booked[kind]):>10} {share:>6.1%}  {bar:<14} {MEANINGS[kind]}"[:WIDTH].rstrip()
        )
    lines += ["", *render_timeline(ledger)]
    causes = ledger.causes()
    if causes:
        lines += ["", "failures by cause              what they cost: lost, detect, restart"]
        for cause, entry in causes.items():
            lines.append(f"  {cause:<12}{entry['failures']:>4.0f}         {span_text(entry['seconds']):>10}")
        often = ", ".join(f"{node} {count}" for node, count in ledger.nodes().most_common(6))
        if often:
            lines.append(clip(f"  first to fail: {often}"))
    lines += ["", "lives", "  life  began     trained   steps           end"]
    shown = ledger.lives[-LIVES_SHOWN:]
    if len(shown) < len(ledger.lives):
        lines.append(f"  ... {len(ledger.lives) - len(shown)} before")
    origin_s = ledger.spans[0].begin_s if ledger.spans else 0.0
    for life in shown:
        seconds = sum(
            span.seconds for span in ledger.spans if span.life == life.number and span.kind in ("productive", "lost")
        )
        began = f"+{span_text(life.began_s - origin_s)}"
        lines.append(clip(f"  {life.name:>4}  {began:<9} {span_text(seconds):<9} {steps_of(life):<15} {end_of(life)}"))
    last = next((life for life in reversed(ledger.lives) if life.verdict), None)
    if ledger.ended is not None:
        lines += ["", clip(f"ended       {ledger.ended.get('reason') or 'exit code ' + str(ledger.ended.get('code'))}")]
    if last and last.verdict.get("stop") and last.verdict.get("excerpt"):
        lines += [
            "",
            "what the first rank to fail has said",
            *(clip("  " + line) for line in last.verdict["excerpt"].splitlines()),
        ]
    return "\n".join(line.rstrip() for line in lines)


def steps_of(life: Life) -> str:
    return "none" if life.first_step is None else f"{life.first_step} to {'?' if life.step is None else life.step}"


def end_of(life: Life) -> str:
    if life.verdict:
        return f"{life.verdict['cause']}: {life.verdict.get('reason', '')}"
    return "goes on" if life.code is None else f"exit code {life.code}"


def render_timeline(ledger: Ledger, width: int = WIDTH - 2) -> list[str]:
    """One line in which each letter is what took most of that piece of time."""
    if not ledger.spans:
        return []
    begin_s, end_s = ledger.spans[0].begin_s, ledger.spans[-1].end_s
    piece_s = max(end_s - begin_s, 1e-9) / width
    most: list[dict[str, float]] = [{} for _ in range(width)]
    for span in ledger.spans:
        first = min(width - 1, int((span.begin_s - begin_s) / piece_s))
        last = min(width - 1, int((span.end_s - begin_s) / piece_s))
        for place in range(first, last + 1):
            inside = min(span.end_s, begin_s + (place + 1) * piece_s) - max(span.begin_s, begin_s + place * piece_s)
            most[place][span.kind] = most[place].get(span.kind, 0.0) + max(0.0, inside)
    line = "".join(SIGNS[max(piece, key=piece.get)] if any(piece.values()) else " " for piece in most)
    legend = "  ".join(f"{SIGNS[kind]} {kind}" for kind in KINDS)
    return [f"timeline    one letter is {span_text(piece_s)}", f"  {line}", f"  {legend}"]


# --- the page ----------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #1c1c1c; background: #fff }
h1 { font-size: 1.4em; margin-bottom: .2em } h2 { font-size: 1.1em; margin-top: 1.8em }
.big { font-size: 2.2em; font-weight: 600 } .facts { display: flex; gap: 3em; flex-wrap: wrap; margin: 1em 0 }
.facts div span { display: block; color: #666; font-size: .85em }
table { border-collapse: collapse; width: 100%; font-size: .92em } td, th { padding: .25em .7em .25em 0; text-align: left; vertical-align: top }
th { color: #666; font-weight: 500; border-bottom: 1px solid #ccc } td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
pre { background: #f6f6f6; padding: .8em; overflow-x: auto; font-size: .85em } .key { display: inline-block; width: .9em; height: .9em; margin-right: .5em }
svg { width: 100%; height: auto; display: block } tr.bad td { color: #a32638 }
"""  # noqa: E501


def render_page(folder: str, ledger: Ledger) -> str:
    """One file without anything from elsewhere."""
    booked, total_s = ledger.seconds, ledger.total_s
    name = html.escape(str(folder))
    rows = "".join(
        f'<tr><td><span class="key" style="background:{COLOURS[kind]}"></span>{kind}</td>'
        f'<td class="n">{span_text(booked[kind])}</td><td class="n">{booked[kind] / total_s if total_s else 0:.1%}</td>'
        f"<td>{MEANINGS[kind]}</td></tr>"
        for kind in KINDS
    )
    causes = "".join(
        f'<tr><td>{html.escape(cause)}</td><td class="n">{entry["failures"]:.0f}</td>'
        f'<td class="n">{span_text(entry["seconds"])}</td></tr>'
        for cause, entry in ledger.causes().items()
    )
    origin_s = ledger.spans[0].begin_s if ledger.spans else 0.0
    lives = "".join(render_life(life, origin_s) for life in ledger.lives)
    stop = next((life for life in reversed(ledger.lives) if life.verdict), None)
    excerpt = ""
    if stop and stop.verdict.get("stop") and stop.verdict.get("excerpt"):
        excerpt = (
            f"<h2>What the first rank to fail has said</h2><p>{html.escape(str(stop.verdict.get('reason', '')))}</p>"
            f"<pre>{html.escape(stop.verdict['excerpt'])}</pre>"
        )
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(origin_s))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style></head><body>
<h1>{name}</h1>
<div class="facts">
<div><span>goodput</span><b class="big">{ledger.goodput:.1%}</b></div>
<div><span>wall time, from {when}</span><b class="big">{span_text(total_s)}</b></div>
<div><span>jobs</span><b class="big">{len(set(ledger.jobs)) or 1}</b></div>
<div><span>lives</span><b class="big">{len(ledger.lives)}</b></div>
<div><span>failures</span><b class="big">{sum(int(entry["failures"]) for entry in ledger.causes().values())}</b></div>
</div>
<h2>Timeline</h2>
{render_svg(ledger)}
{excerpt}
<h2>Where the time went</h2>
<table style="width:auto"><tr><th>kind</th><th class="n">time</th><th class="n">share</th><th>what it is</th></tr>{rows}</table>
<h2>Failures by cause</h2>
<table style="width:auto"><tr><th>cause</th><th class="n">failures</th><th class="n">lost, detect, restart</th></tr>{causes}</table>
<h2>Lives</h2>
<table><tr><th class="n">life</th><th class="n">job</th><th class="n">began</th><th>nodes</th><th class="n">steps</th><th>end</th><th>then</th></tr>{lives}</table>
</body></html>
"""


def render_life(life: Life, origin_s: float) -> str:
    bad = life.verdict is not None and life.verdict["cause"] not in ("finished", "stopped", "time_limit", "preemption")
    nodes = ", ".join(life.nodes[:6]) + (f" and {len(life.nodes) - 6} more" if len(life.nodes) > 6 else "")
    then = (life.repair or {}).get("action", "")
    row = '<tr class="bad">' if bad else "<tr>"
    return row + (
        f'<td class="n">{html.escape(life.name)}</td><td class="n">{html.escape(life.job)}</td>'
        f'<td class="n">+{span_text(life.began_s - origin_s)}</td>'
        f'<td>{html.escape(nodes)}</td><td class="n">{steps_of(life)}</td><td>{html.escape(end_of(life))}</td>'
        f"<td>{html.escape(then)}</td></tr>"
    )


def render_svg(ledger: Ledger) -> str:
    """The whole run as one band, failures marked above it; below it rows of equal length, so that short spans are seen."""
    if not ledger.spans:
        return ""
    begin_s, end_s = ledger.spans[0].begin_s, ledger.spans[-1].end_s
    total_s = max(end_s - begin_s, 1e-9)
    left, width, right = 70, 1000, 36
    rows = min(8, max(1, math.ceil(len(ledger.spans) / 60)))
    parts = [draw_band(ledger, begin_s, total_s, left, 34, width, 26)]
    for life in ledger.lives:
        for fault in life.faults:
            x = left + width * (min(max(fault["time"], begin_s), end_s) - begin_s) / total_s
            told = html.escape(f"{fault.get('kind', 'fault')} {fault.get('node') or ''}: {end_of(life)}")
            parts.append(f'<path d="M{x:.1f} 32 l-5 -9 h10 z" fill="{COLOURS["lost"]}"><title>{told}</title></path>')
    parts.append(f'<text x="{left - 8}" y="52" text-anchor="end">all</text>')
    y = 66
    parts.append(draw_axis(total_s, left, y, width))
    y += 26
    if rows > 1:
        for row in range(rows):
            from_s, row_s = begin_s + row * total_s / rows, total_s / rows
            parts.append(draw_band(ledger, from_s, row_s, left, y, width, 16))
            parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">+{span_text(from_s - begin_s)}</text>')
            y += 22
    x = left
    for kind in KINDS:
        parts.append(f'<rect x="{x}" y="{y + 4}" width="11" height="11" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 16}" y="{y + 14}">{kind}</text>')
        x += 40 + 8 * len(kind)
    height = y + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + right} {height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#333">{"".join(parts)}</svg>'
    )


def draw_band(ledger: Ledger, from_s: float, length_s: float, left: int, y: int, width: int, height: int) -> str:
    parts = [f'<rect x="{left}" y="{y}" width="{width}" height="{height}" fill="#f4f4f4"/>']
    for span in ledger.spans:
        begin_s, end_s = max(span.begin_s, from_s), min(span.end_s, from_s + length_s)
        if end_s <= begin_s:
            continue
        x = left + width * (begin_s - from_s) / length_s
        wide = max(0.4, width * (end_s - begin_s) / length_s)
        told = f"{span.kind}, {span_text(span.seconds)}" + (
            f", life {ledger.lives[span.life].name}" if span.life >= 0 else ""
        )
        parts.append(
            f'<rect x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{height}" fill="{COLOURS[span.kind]}">'
            f"<title>{told}</title></rect>"
        )
    return "".join(parts)


def draw_axis(total_s: float, left: int, y: int, width: int) -> str:
    """Ticks at round times."""
    steps = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400, 172800, 604800)
    step_s = next((step for step in steps if total_s / step <= 10), 2592000)
    parts = []
    for number in range(int(total_s // step_s) + 1):
        x = left + width * number * step_s / total_s
        parts.append(f'<line x1="{x:.1f}" y1="{y - 6}" x2="{x:.1f}" y2="{y}" stroke="#888"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 13}" text-anchor="middle">+{span_text(number * step_s)}</text>')
    return "".join(parts)

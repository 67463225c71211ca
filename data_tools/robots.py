"""What a site has asked of robots: robots.txt (RFC 9309) and opt-outs in HTTP headers. Pure: text in, answers out."""

import re
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import quote

OPT_OUT_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
"""Words of X-Robots-Tag that keep a picture out of a dataset (`none` means `noindex, nofollow`)."""

_VALUED_DIRECTIVES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
_TOKEN = re.compile(r"\*|[A-Za-z_][\w-]*")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


class Rule(NamedTuple):
    """One line of robots.txt: whether paths that match the pattern are allowed, with `*` and a final `$`."""

    allowed: bool
    pattern: str


def parse_robots(text: bytes, agent: str) -> list[Rule]:
    """The rules of a robots.txt for the robot `agent` (a product token): its own groups, or those for `*`.

    Whatever is no line of a known kind is passed over, as RFC 9309 asks; no rules allow everything.
    """
    groups: dict[str, list[Rule]] = {}
    named: list[str] = []
    in_rules = False
    for line in text.decode("utf-8-sig", errors="replace").splitlines():
        field, colon, value = line.partition("#")[0].partition(":")
        field, value = field.strip().lower(), value.strip()
        if field == "user-agent" and colon:
            if in_rules:
                named, in_rules = [], False
            token = _TOKEN.match(value)
            if token:
                named.append(token.group().lower())
                groups.setdefault(named[-1], [])
        elif field in ("allow", "disallow") and colon:
            in_rules = True
            for name in named if value else ():
                groups[name].append(Rule(field == "allow", _normalise(value)))
    return groups.get(agent.lower(), groups.get("*", []))


def is_allowed(rules: list[Rule], path: str) -> bool:
    """Whether the rules let a robot ask for `path` (with its query): the longest pattern counts, a tie allows."""
    path = _normalise(path)
    best = Rule(True, "")
    for rule in rules:
        if (len(rule.pattern), rule.allowed) > (len(best.pattern), best.allowed) and _matches(rule.pattern, path):
            best = rule
    return best.allowed


def find_opt_out(values: Iterable[str], agent: str) -> str:
    """The directive of these X-Robots-Tag headers that keeps the answer from the robot `agent`, or "".

    A directive may be meant for one robot (`somebot: noai`); one without a name is for all, or for the robot that was
    named last on its line.
    """
    for value in values:
        scope = "*"
        for part in value.lower().split(","):
            name, colon, directive = (piece.strip() for piece in part.partition(":"))
            if colon and (name in _VALUED_DIRECTIVES or not _TOKEN.fullmatch(name)):
                continue  # a value, or a piece of a date
            scope = name if colon else scope
            directive = directive if colon else name
            if scope in ("*", agent.lower()) and directive in OPT_OUT_DIRECTIVES:
                return directive
    return ""


def _normalise(path: str) -> str:
    """One spelling of a path: what needs no escape has none, and escapes are in capitals."""

    def respell(escape: re.Match) -> str:
        character = chr(int(escape.group(1), 16))
        return character if character in _UNRESERVED else escape.group().upper()

    return _ESCAPE.sub(respell, quote(path, safe="".join(map(chr, range(0x21, 0x7F)))))


def _matches(pattern: str, path: str) -> bool:
    """Match from the start, in one pass over the path: a regular expression could be made to backtrack for ages."""
    anchored = pattern.endswith("$")
    first, *pieces = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    position = len(first)
    if anchored and not pieces:
        return position == len(path)
    last = pieces.pop() if anchored else ""
    for piece in pieces:
        position = path.find(piece, position)
        if position < 0:
            return False
        position += len(piece)
    return not anchored or (path.endswith(last) and len(path) - len(last) >= position)

"""Finds personal data in captions: e-mail and IP addresses, card and phone numbers, handles of social networks.

Rules, not a model: what is found has the shape of such data and not the shape of a year, a size in pixels, a time, a
date, a price, a version or a range. What has no such shape (names, street addresses, "john at example dot com") stays.
Patterns are bounded, so that a megabyte of hostile text costs no more than one of prose.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

KINDS = {
    "email": "e-mail address",
    "ip": "IP address",
    "card": "card number",
    "phone": "phone number",
    "handle": "social handle",
}
"""The name that masks and counts use for a kind, and its name in words."""

_BLANK = "\uffff"
"""Stands where something was found already: no letter, digit or white space, so that no pattern reaches over it."""

# Every replacement is one character for one, so that a place in the plain text is the same place in the caption.
_PLAIN = {0xFF10 + digit: 0x30 + digit for digit in range(10)}
_PLAIN |= {start + digit: 0x30 + digit for start in (0x0660, 0x06F0, 0x0966) for digit in range(10)}
_PLAIN |= dict(
    zip(map(ord, "＠．＋－（）：／\u00a0\u2007\u2009\u202f\u2010\u2011\u2012\u2013"), "@.+-():/    ----", strict=True)
)
_SUSPECT = re.compile(r"[@0-9:/\[({<]")
_MAX_ROUNDS = 8

_LETTERS = r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0370-\u03ff\u0400-\u052f"
"""Of scripts that part words by spaces: in Chinese text an address stands right beside other characters."""
_LOCAL = rf"(?<![{_LETTERS}0-9._%+-])[{_LETTERS}0-9_%+-][{_LETTERS}0-9._%+'-]{{0,63}}"
_LABEL = rf"[{_LETTERS}0-9](?:[{_LETTERS}0-9-]{{0,61}}[{_LETTERS}0-9])?"
_DOMAIN_END = rf"(?P<top>[{_LETTERS}]{{2,24}})(?![{_LETTERS}0-9_]|-[{_LETTERS}0-9])"
_FILE_ENDINGS = {
    "jpg",
    "jpeg",
    "png",
    "gif",
    "webp",
    "svg",
    "bmp",
    "tif",
    "tiff",
    "pdf",
    "mp",
    "css",
    "js",
    "psd",
    "ico",
}
_EMAIL = re.compile(rf"{_LOCAL}@(?:{_LABEL}\.){{1,6}}{_DOMAIN_END}")
_EMAIL_SPELT = re.compile(
    rf"{_LOCAL}[ ]?[\[({{<][ ]?at[ ]?[\])}}>][ ]?(?:{_LABEL}(?:\.|[ ]?[\[({{<][ ]?dot[ ]?[\])}}>][ ]?)){{1,6}}{_DOMAIN_END}",
    re.IGNORECASE,
)

_IPV4 = re.compile(r"(?<![A-Za-z0-9_])(?<![0-9]\.)[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![A-Za-z0-9_]|\.[0-9])")
_IPV6 = re.compile(
    r"(?<![A-Za-z0-9_:.])(?:[0-9A-Fa-f:]{1,30}:(?:[0-9]{1,3}\.){3}[0-9]{1,3}|[0-9A-Fa-f:]{2,39})(?![A-Za-z0-9_:])"
)
_BEFORE_A_VERSION = re.compile(
    r"(?:\b(?:v|ver|version|release|build|firmware|driver|rev|revision|chapter|section|figure|fig|clause|table|rule|"
    r"article|update|patch|edition)|§|版本|第)[\s.:#]*$",
    re.IGNORECASE,
)

_CARD = re.compile(
    r"(?<![A-Za-z0-9_.,+-])(?:[0-9]{12,19}|[0-9]{4}(?P<by>[ -])[0-9]{4}(?P=by)[0-9]{4}(?P=by)[0-9]{4}(?:(?P=by)[0-9]{3})?"
    r"|[0-9]{4}(?P<by2>[ -])[0-9]{6}(?P=by2)[0-9]{4,5})(?![A-Za-z0-9_]|[.,-][0-9])"
)
_CARD_ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|6(?:011|4[4-9]\d|5\d\d)\d{12}|3(?:0[0-5]|[689]\d)\d{11}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}|5[0678]\d{14}|67\d{14}"
)

_NOT_AFTER = r"(?<![A-Za-z0-9_@#$€£¥=])(?<![0-9][.,:/+-])"
_NOT_BEFORE = r"(?![A-Za-z0-9_%$€£¥°]|[.,:/-][0-9])"
_PHONES = (
    # (pattern, group that holds the number, least digits)
    *(
        (re.compile(_NOT_AFTER + pattern + _NOT_BEFORE), 0, least_digits)
        for pattern, least_digits in (
            (r"(?<!\+)\+[1-9](?:[ .()/-]{0,3}[0-9]){7,14}", 8),  # +49 (0)30 123456
            (r"00[1-9][0-9]{0,2}(?:[ -]\(?[0-9]{1,9}\)?){2,6}", 10),  # 0049 30 123456
            # 212 555 0123, (212) 555-0123
            (r"(?:1[ .-])?(?:\([2-9][0-9]{2}\)[ .-]?|[2-9][0-9]{2}[ .-])[2-9][0-9]{2}[ .-][0-9]{4}", 10),
            (
                r"(?<![0-9] )\(?0[1-9][0-9]{0,4}\)?(?:[ /-]{1,2}[0-9]{2,8}){1,4}(?! [0-9]+ [0-9])",
                9,
            ),  # 030 / 123456, 020 7946 0958
            (r"(?<![0-9] )0[1-9](?:\.[0-9]{2}){4}", 10),  # 01.23.45.67.89
            (r"(?:86[ -]?)?1[3-9][0-9](?:[0-9]{8}|[ -][0-9]{4}[ -][0-9]{4})", 11),  # 138 1234 5678
        )
    ),
    (
        re.compile(
            r"(?:(?<![A-Za-z])(?:tel|telephone|phone|phones|ph|call|calls|fax|mobile|mob|cell|whatsapp|sms|text|dial|ring|"
            r"hotline|telefon|tél|téléphone|telefono|teléfono|handy|тел|телефон)"
            r"|电话|電話|手机|手機|热线|联系方式|微信)"
            r"(?:[ ](?:us|me|him|her|them|now|today|at|on|is|no|number|toll|free)){0,3}\.?[ :#.]{0,3}"
            r"(?P<number>\(?\+?[0-9](?:[ .()-]{0,2}[0-9]){6,14})" + _NOT_BEFORE,
            re.IGNORECASE,
        ),
        "number",
        7,
    ),
)
_YEAR = r"(?:1[89]|20)[0-9]{2}"
_DATE_OR_RANGE = re.compile(
    rf"{_YEAR} ?[ -] ?{_YEAR}|[0-9]{{1,2}}([ .-])[0-9]{{1,2}}\1{_YEAR}|{_YEAR}([ .-])[0-9]{{1,2}}\2[0-9]{{1,2}}"
    rf"|{_YEAR}[01][0-9][0-3][0-9]"
)

_HANDLE_NAME = rf"(?:[{_LETTERS}_][{_LETTERS}0-9_.]{{0,29}}|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af][\w.]{{0,29}})"
_HANDLE = re.compile(
    rf"(?<![{_LETTERS}0-9_@.])@(?P<name>{_HANDLE_NAME}(?<!\.))(?P<server>@(?:{_LABEL}\.){{1,4}}[A-Za-z]{{2,24}})?"
)
_PROFILE = re.compile(
    r"(?:https?://)?(?<![A-Za-z0-9-])(?:www\.|m\.)?(?:twitter|x|instagram|tiktok|facebook|fb|t|snapchat|threads|weibo|vk)\."
    r"(?:com|net|me)/(?:add/|u/|n/)?@?(?P<name>[A-Za-z0-9_.-]{1,50}(?<![.-]))",
    re.IGNORECASE,
)
_ACCOUNT = re.compile(
    r"(?<![A-Za-z])(?:ig|insta|instagram|twitter|snap|snapchat|tiktok|telegram|weibo|wechat|skype|vk|kik)[ ]?:[ ]?"
    r"(?P<name>[A-Za-z0-9_.]{3,30}(?<!\.))(?![A-Za-z0-9_])",
    re.IGNORECASE,
)
_AFTER_AT = frozenset(
    "a all an any around beach christmas church dawn dinner dusk each ease every first gym her his home hotel last least "
    "lunch midnight most my night no noon office once our park party peace play rest school sea sunrise sunset that the "
    "their this times university war work your".split()
)
"""Words that follow an `@` written for "at": "sunday @home" names a place, not a person."""
_NOT_A_PROFILE = frozenset(
    "hashtag explore watch search share sharer home login about help p reel status intent tag".split()
)


class Finding(NamedTuple):
    """What was found: its kind (see KINDS), and where it starts and ends in the text, in characters."""

    kind: str
    start: int
    end: int


def find_personal_data(text: str) -> list[Finding]:
    """All personal data in `text`, in order, none overlapping."""
    if not _SUSPECT.search(plain := text.translate(_PLAIN)):
        return []
    findings: list[Finding] = []
    for kind, find in _FINDERS:
        parts, position = [], 0
        for start, end in sorted(find(plain)):
            if start >= position:  # else two patterns found the same, or parts of it
                findings.append(Finding(kind, start, end))
                parts += [plain[position:start], _BLANK * (end - start)]
                position = end
        plain = "".join((*parts, plain[position:]))
    return sorted(findings, key=lambda finding: finding.start)


def mask_personal_data(text: str) -> tuple[str, Counter[str]]:
    """`text` with [email], [phone], ... in place of what was found, and how many of each kind.

    Masking what was masked changes nothing: what comes to light beside a mask is masked too (in up to 8 rounds).
    """
    counts: Counter[str] = Counter()
    for _ in range(_MAX_ROUNDS):
        findings = find_personal_data(text)
        if not findings:
            break
        parts, position = [], 0
        for kind, start, end in findings:
            parts += [text[position:start], f"[{kind}]"]
            position = end
            counts[kind] += 1
        text = "".join((*parts, text[position:]))
    return text, counts


Spans = list[tuple[int, int]]


def _find_emails(text: str) -> Spans:
    matches = [match for pattern in (_EMAIL, _EMAIL_SPELT) for match in pattern.finditer(text)]
    # "icon@2x.png" is the name of a picture for screens of double density, not an address.
    return [match.span() for match in matches if match["top"].lower() not in _FILE_ENDINGS]


def _find_ip_addresses(text: str) -> Spans:
    spans = []
    for match in _IPV6.finditer(text):
        candidate = match[0]
        groups = [group for group in candidate.split(":") if group]
        # "10::20" and "ab::cd" can be read as addresses too; real ones have longer groups, and digits.
        long_enough = len(groups) >= 3 or candidate.lower().startswith("fe80:") or "." in candidate
        if long_enough and max(map(len, groups)) >= 3 and re.search("[0-9]", candidate) and _is_ipv6(candidate):
            spans.append(match.span())
    for match in _IPV4.finditer(text):
        plausible = all(int(part) <= 255 and str(int(part)) == part for part in match[0].split("."))
        if plausible and not _BEFORE_A_VERSION.search(text[max(0, match.start() - 16) : match.start()]):
            spans.append(match.span())
    return spans


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _find_cards(text: str) -> Spans:
    spans = []
    for match in _CARD.finditer(text):
        digits = re.sub(r"[ -]", "", match[0])
        if _CARD_ISSUERS.fullmatch(digits) and passes_luhn(digits):
            spans.append(match.span())
    return spans


def passes_luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others. Source: ISO/IEC 7812-1, annex B."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def _find_phones(text: str) -> Spans:
    spans = []
    for pattern, group, least_digits in _PHONES:
        for match in pattern.finditer(text):
            number = match[group]
            digits = sum(map(str.isdigit, number))
            if least_digits <= digits <= 15 and not _DATE_OR_RANGE.fullmatch(number) and not _is_round(number):
                start, end = match.span(group)
                start += number.startswith("(") and ")" not in number  # a parenthesis around the number is not of it
                end -= number.endswith(")") and "(" not in number
                spans.append((start, end))
    return spans


def _is_round(number: str) -> bool:
    """Whether this is an amount such as +100 000 000."""
    return bool(re.fullmatch(r"\+[0-9]{1,3}([ .]000)+", number))


def _find_handles(text: str) -> Spans:
    profiles = [match.span() for match in _PROFILE.finditer(text) if match["name"].lower() not in _NOT_A_PROFILE]
    mentions = [match.span() for match in _HANDLE.finditer(text) if match["name"].lower() not in _AFTER_AT]
    # "instagram: photo by ..." names no account: a name counts when its digits, dots or lines say that it is one.
    accounts = [match.span("name") for match in _ACCOUNT.finditer(text) if _looks_chosen(match["name"])]
    return [*profiles, *mentions, *accounts]


def _looks_chosen(name: str) -> bool:
    return bool(re.search(r"[0-9_.]", name) and re.search(r"[A-Za-z]", name))


def _find_federated_handles(text: str) -> Spans:
    return [match.span() for match in _HANDLE.finditer(text) if match["server"]]


_FINDERS: tuple[tuple[str, Callable[[str], Spans]], ...] = (
    ("handle", _find_federated_handles),  # before the addresses: @name@server.example holds one
    ("email", _find_emails),
    ("ip", _find_ip_addresses),
    ("card", _find_cards),
    ("phone", _find_phones),
    ("handle", _find_handles),
)

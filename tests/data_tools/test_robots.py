"""What sites ask of robots, read as RFC 9309 says."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.robots import Rule, find_opt_out, is_allowed, parse_robots

ROBOTS = b"""\xef\xbb\xbf# a comment
Sitemap: https://example.org/map.xml
User-agent: otherbot
User-Agent: My-Bot/2.0   # two names, one group
Disallow: /private
Allow: /private/open
crawl-delay: 10
Disallow: /*.gif$
Disallow:

User-agent: *
Disallow: /
User-agent: my-bot
Disallow: /also%7Ehere?size=*&big
"""


@pytest.mark.parametrize(
    ("agent", "path", "allowed"),
    [
        ("my-bot", "/", True),
        ("my-bot", "/private/x.jpg", False),
        ("MY-BOT", "/private", False),
        ("my-bot", "/private/open/x.jpg", True),
        ("my-bot", "/a/b.gif", False),
        ("my-bot", "/a/b.gif?x=1", True),
        ("my-bot", "/also~here?size=3&big=1", False),
        ("my-bot", "/also%7ehere?size=&big", False),
        ("otherbot", "/also~here?size=3&big=1", True),
        ("otherbot", "/private/x.jpg", False),
        ("third", "/x.jpg", False),
        ("my", "/x.jpg", False),
    ],
)
def test_groups_and_longest_rules_count(agent, path, allowed):
    assert is_allowed(parse_robots(ROBOTS, agent), path) is allowed


def test_text_that_is_no_robots_file_allows_all():
    for text in (b"", b"<html>not found</html>", b"\xff\xfe\x00", b"Disallow: /", b"User-agent\nDisallow: /"):
        assert parse_robots(text, "my-bot") == []
    assert is_allowed([], "/x")


def test_a_tie_allows_and_accents_have_one_spelling():
    assert is_allowed([Rule(False, "/a"), Rule(True, "/a")], "/a")
    assert not is_allowed(parse_robots("User-agent: *\nDisallow: /é".encode(), "my-bot"), "/%c3%a9/x.jpg")


@given(st.text("ab*$", max_size=8), st.text("ab", max_size=10))
def test_patterns_match_as_a_regular_expression_would(pattern, path):
    expression = re.escape(pattern.removesuffix("$")).replace(r"\*", ".*") + ("$" if pattern.endswith("$") else "")
    rules = [Rule(False, pattern)]
    if pattern:
        assert is_allowed(rules, path.replace("$", "")) is (re.match(expression, path) is None)


@given(st.binary(max_size=200))
def test_any_bytes_are_read(data):
    is_allowed(parse_robots(b"User-agent: *\nDisallow: " + data, "my-bot"), "/x")


@pytest.mark.parametrize(
    ("values", "directive"),
    [
        (["noai"], "noai"),
        (["index, NoImageAI"], "noimageai"),
        (["nofollow", "noindex"], "noindex"),
        (["none"], "none"),
        (["my-bot: noimageindex"], "noimageindex"),
        (["otherbot: nofollow, my-bot: noai"], "noai"),
        (["*: noindex"], "noindex"),
        (["otherbot: noai"], ""),
        (["otherbot: nofollow, noindex"], ""),
        (["nofollow, noarchive, max-image-preview: none, notranslate"], ""),
        (["unavailable_after: Sunday, 25-Jun-10 15:00:00 UTC, noindex"], "noindex"),
        (["", ":", ",,:,"], ""),
    ],
)
def test_opt_outs_are_found_where_they_are_meant_for_us(values, directive):
    assert find_opt_out(values, "My-Bot") == directive

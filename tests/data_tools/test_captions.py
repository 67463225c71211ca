"""Captions are cleaned, refused by length and by a blocklist, and always fit for UTF-8."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.captions import CaptionError, CaptionPolicy, clean_caption, load_blocklist
from data_tools.errors import UserError


def refusal(text: str, **options) -> str:
    with pytest.raises(CaptionError) as caught:
        clean_caption(text, CaptionPolicy(**options))
    return caught.value.reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a \t dog\r\n\u3000on\u00a0grass\u2028", "a dog on grass"),
        ("a\0 d\x07og\x7f\ufeff", "a dog"),
        ("\ud83d\ude00 smile", "\U0001f600 smile"),  # the halves of one character
        ("a \ud83d dog", "a dog"),
        ("\ude00", None),
        ("&amp; schÃ¶n", "&amp; schÃ¶n"),
        (" \n\0\u200a", None),
    ],
)
def test_space_is_folded_and_what_shows_nothing_goes(text, expected):
    if expected is None:
        assert refusal(text) == "empty caption"
    else:
        assert clean_caption(text, CaptionPolicy()) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("&amp;quot;big&amp;quot; &#8364;5", '"big" €5'),
        ("schÃ¶nes CafÃ©", "schönes Café"),
        ("sch&Atilde;&para;n", "schön"),  # a wrong decoding that was then escaped
        ("a&nbsp;&#10;b", "a b"),
        ("“quoted”，ﬁne", "“quoted”，ﬁne"),  # how it was written is no damage
        ("cafe\u0301", "café"),
        ("plain 5 < 6", "plain 5 < 6"),
    ],
)
def test_repair_of_entities_and_wrong_decoding(text, expected):
    assert clean_caption(text, CaptionPolicy(fix_text=True)) == expected


def test_entities_cannot_smuggle_in_what_is_removed():
    assert clean_caption("a&#7;b&#xD83D; c&#xFEFF;", CaptionPolicy(fix_text=True)) in ("ab c", "ab\ufffd c")
    assert refusal("&nbsp;&#32;", fix_text=True) == "empty caption"


def test_limits_are_inclusive_and_of_the_cleaned_caption():
    text = "one  two &amp; three"
    assert clean_caption(text, CaptionPolicy(True, min_words=4, max_words=4, min_chars=15, max_chars=15)) == (
        "one two & three"
    )
    assert refusal(text, min_words=5) == refusal(text, fix_text=True, min_chars=16) == "caption too short"
    assert refusal(text, max_words=3) == refusal(text, fix_text=True, max_chars=14) == "caption too long"
    assert clean_caption("word " * 5000, CaptionPolicy(max_chars=0)) == " ".join(["word"] * 5000)
    assert refusal("word " * 5000) == "caption too long"


@pytest.mark.parametrize("text", ["a" * 2**20, "&amp;" * 200_000, "Ã¶ " * 350_000, "\0" * 2**20, "\ud83d" * 2**20])
def test_a_megabyte_is_refused_at_once(text):
    started = time.process_time()
    assert refusal(text, fix_text=True, blocklist=("x",)) in ("caption too long", "empty caption")
    assert time.process_time() - started < 2


BLOCKLIST = ("Ad", "click  here!", "广告", "C++", "नमस्ते", "straße")


@pytest.mark.parametrize(
    ("text", "blocked"),
    [
        ("an AD.", True),
        ("bread and ads", False),
        ("ad_hoc", False),
        ("ＡＤ", True),
        ("click here", False),
        ("please CLICK\there ! now", True),
        ("click right here!", False),
        ("这是广告吗", True),
        ("广 告", True),
        ("告广", False),
        ("学习ad技术", True),
        ("learn c++ now", True),
        ("c+", False),
        ("नमस्ते जी", True),
        ("नमस्तेजी", False),
        ("STRASSE 5", True),
    ],
)
def test_the_blocklist_is_of_whole_words_in_any_case(text, blocked):
    if blocked:
        assert refusal(text, blocklist=BLOCKLIST) == "blocked caption"
    else:
        assert clean_caption(text, CaptionPolicy(blocklist=BLOCKLIST)) == text


def test_a_blocklist_file_has_an_entry_a_line(tmp_path):
    path = tmp_path / "blocked.txt"
    path.write_bytes("\ufeffad\r\n\r\n click   here \nad\n广告".encode())
    assert load_blocklist(path) == ("ad", "click here", "广告")
    path.write_bytes(b" \n\n")
    with pytest.raises(UserError, match="the list is empty"):
        load_blocklist(path)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        load_blocklist(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_words": 5, "max_words": 4}, "5 to 4 words"),
        ({"min_chars": -1}, "-1 to"),
        ({"blocklist": ("a", " ")}, "no character"),
    ],
)
def test_policies_without_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        CaptionPolicy(**options)


@settings(deadline=None, max_examples=150)
@given(
    st.text(st.characters(exclude_categories=()) | st.sampled_from("\0\ud83d\ude00\ufeff\x85 &;#Ã¶"), max_size=40),
    st.booleans(),
)
def test_any_text_becomes_a_clean_line_or_one_of_the_reasons(text, fix_text):
    policy = CaptionPolicy(fix_text, min_chars=2, max_chars=30, blocklist=("a", "ö ö"))
    try:
        cleaned = clean_caption(text, policy)
    except CaptionError as error:
        assert error.reason in ("empty caption", "caption too short", "caption too long", "blocked caption")
        return
    assert cleaned == " ".join(cleaned.split())
    assert 2 <= len(cleaned) <= 30
    assert cleaned.encode().decode() == cleaned
    assert "\0" not in cleaned and "\ufeff" not in cleaned
    assert clean_caption(cleaned, CaptionPolicy()) == cleaned

"""The quick tokeniser gives the ids of open_clip's own, for any text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.text import ClipTokenizerConfig, Tokenizer, build_tokenizer
from pretrain.torchvision_ops import prepare_torchvision


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(ClipTokenizerConfig(), 24)


@pytest.fixture(scope="module")
def theirs():
    prepare_torchvision()
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=24)


def test_captions_and_corner_cases(tokenizer: Tokenizer, theirs) -> None:
    texts = [
        "A small red circle left of a large blue square!",
        "it's we'VE I'm he'll they'd 'sx ''s don't",
        "<start_of_text> a <END_OF_TEXT>b!!<end_of_text>",
        "&amp;lt;b&gt; fish &amp; chips",
        "caf\u00e9 \u201cquoted\u201d \u4e2d\u6587 \ufb01sh \x1b[31mred\x00",
        "two\nlines\tand  spaces ",
        "1234 5.6%%% a_b_c",
        "a " * 500,
        "x" * 1000,
        "",
    ]
    assert torch.equal(tokenizer(texts)[0], theirs(texts))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8"), max_size=60) | st.text("aAbz0 9'\"!<>&;s_-\n", max_size=60), min_size=1
    )
)
def test_any_text(tokenizer: Tokenizer, theirs, texts: list[str]) -> None:
    assert torch.equal(tokenizer(texts)[0], theirs(texts))


def test_the_mask_covers_the_end_mark_and_no_padding(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer(["a small red circle!", "x " * 100, "!"])
    for row in range(3):
        real = ids[row][mask[row]]
        assert real[0] == 49406 and real[-1] == 49407 and (ids[row][~mask[row]] == 0).all()
    assert mask[1].all()

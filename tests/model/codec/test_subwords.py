"""Subwords: every text comes back, frequent words are one token, and merges are learned from texts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concord.model.codec import CodecError, parse, render, subwords
from concord.model.codec.text import normalised
from concord.model.modality import TextModality, check_array, missing_statistics

TEXTS = ["a red bird with a red crown", "a blue bird with a white belly", "this bird is red"] * 4
MERGES = subwords.learn(TEXTS, 300)
CAPTION = TextModality(name="caption", length=40, unit="subword", merges=MERGES, likelihood="autoregressive")


def test_learn_merges_frequent_pairs_up_to_the_size() -> None:
    assert 20 < len(MERGES) <= 300 - 256
    assert len(subwords.learn(TEXTS, 260)) == 4
    assert subwords.learn(["ab"], 300) == ()
    tokens = parse(CAPTION, "a red bird")
    assert np.count_nonzero(tokens) == 3
    assert CAPTION.categories == 1 + 256 + len(MERGES)


@given(st.text(max_size=9))
def test_text_comes_back_from_its_subwords(text: str) -> None:
    text = normalised(text.encode("utf-8", "ignore").decode(), lowercase=True)
    if not text:
        return
    tokens = parse(CAPTION, text)
    check_array(CAPTION, tokens)
    assert render(CAPTION, tokens)["text"] == text.replace("\ufffd", "").strip()


def test_text_of_bytes_that_are_no_utf8_leaves_them_out() -> None:
    tokens = parse(CAPTION, "bird \u6771")
    last = np.flatnonzero(tokens)[-1]
    tokens[last] = 0
    assert render(CAPTION, tokens)["text"] == "bird"


def test_parse_too_long_or_empty_text_is_rejected_or_cut() -> None:
    with pytest.raises(CodecError, match="the text is empty"):
        parse(CAPTION, " \n")
    with pytest.raises(CodecError, match=r"the text has 41 subwords, at most 40 are allowed"):
        parse(CAPTION, "q" * 41)
    cut = CAPTION.model_copy(update={"too_long": "cut"})
    assert render(cut, parse(cut, "q" * 41))["text"] == "q" * 40


def test_subwords_need_merges_and_the_autoregressive_likelihood() -> None:
    assert missing_statistics(CAPTION.model_copy(update={"merges": None})) == "merges"
    assert missing_statistics(CAPTION) is None
    with pytest.raises(ValueError, match="needs likelihood"):
        TextModality(name="caption", length=4, unit="subword")
    with pytest.raises(ValueError, match="merges with unit"):
        TextModality(name="caption", length=4, unit="word", merges=("a b",))
    assert "merges" not in TextModality(name="caption", length=4).model_dump()

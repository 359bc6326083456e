"""Characters and words outside what a model knows, and texts that are too long."""

import numpy as np
import pytest

from model.codec import decode, decode_bytes, encode
from model.modality import TextModality, check_array
from model.wire import CodecError

TITLE = TextModality(name="title", length=4, unit="word", vocabulary=("blue", "cup", "don't", "x-ray", "3.5"))
CODE = TextModality(name="code", length=4, alphabet=" ab\ufffd")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("blue cup", [2, 3, 0, 0]),
        (" Blue,  CUP! ", [2, 3, 0, 0]),
        ("red cup", [1, 3, 0, 0]),
        ("nothing known here", [1, 1, 1, 0]),
        ("Don't x-ray 3.5", [4, 5, 6, 0]),
        ("\uff42\uff4c\uff55\uff45", [2, 0, 0, 0]),
    ],
)
def test_words(text: str, tokens: list[int]) -> None:
    for row in (decode(TITLE, text), decode_bytes(TITLE, text.encode())):
        check_array(TITLE, row)
        assert row.tolist() == tokens


@pytest.mark.parametrize(
    ("text", "detail"),
    [("", "is empty"), ("?! --", "has no word"), ("a b c d e", "5 words, at most 4"), (7, "a number")],
)
def test_what_has_no_words_is_refused(text: object, detail: str) -> None:
    with pytest.raises(CodecError, match=detail):
        decode(TITLE, text)


def test_a_text_is_cut_where_the_modality_says_so() -> None:
    assert decode(TITLE.model_copy(update={"too_long": "cut"}), "cup " * 9).tolist() == [3, 3, 3, 3]
    assert decode(CODE.model_copy(update={"too_long": "cut"}), "ababab").tolist() == [1, 2, 1, 2]


def test_an_alphabet_may_read_any_other_character_as_one() -> None:
    assert decode(CODE, "aXb\0").tolist() == [1, 3, 2, 3]
    assert decode(CODE, "\ufffd").tolist() == [3, 0, 0, 0]


def test_the_unknown_is_never_generated() -> None:
    likeliest = np.zeros((4, 7), dtype=np.float32)
    likeliest[[0, 1, 2, 3], [1, 3, 0, 1]] = 2.0
    likeliest[[0, 3], [2, 0]] = 1.0
    assert encode(TITLE, likeliest) == {"text": "blue cup"}
    likeliest = np.array([[0, 1, 0, 2], [0, 0, 1, 2], [1, 0, 0, 2], [1, 0, 0, 0]], dtype=np.float32)
    assert encode(CODE, likeliest) == {"text": "ab"}


@pytest.mark.parametrize("text", ["seven", "s", "to be", "a  b", "eighteen"])
def test_a_text_whose_place_says_nothing_begins_at_its_beginning(text: str) -> None:
    modality = TextModality(name="word", length=8, alphabet=" abeghinostv", likelihood="shifted")
    tokens = decode(modality, text)
    for shift in range(8 if 0 in tokens else 1):  # a ring without padding has no beginning
        likeliest = np.eye(modality.categories, dtype=np.float32)[np.roll(tokens, shift)]
        assert encode(modality, likeliest) == {"text": text}


def test_a_text_of_padding_alone_is_empty() -> None:
    modality = TextModality(name="word", length=3, alphabet=" ab", likelihood="shifted")
    assert encode(modality, np.eye(3, dtype=np.float32)[[0, 0, 0]]) == {"text": ""}

"""Text codec: words, characters and words outside the vocabulary, texts that are too long, shifted texts."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concord.model.codec import parse, parse_bytes, render
from concord.model.codec.errors import CodecError
from concord.model.codec.text import is_unspaced, text_from_tokens, tokenize
from concord.model.modality import TextModality, check_array

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
def test_parse_words_gives_tokens(text: str, tokens: list[int]) -> None:
    for row in (parse(TITLE, text), parse_bytes(TITLE, text.encode())):
        check_array(TITLE, row)
        assert row.tolist() == tokens


@pytest.mark.parametrize(
    ("text", "detail"),
    [("", "is empty"), ("?! --", "has no word"), ("a b c d e", "5 words, at most 4"), (7, "a number")],
)
def test_parse_words_invalid_text_raises(text: object, detail: str) -> None:
    with pytest.raises(CodecError, match=detail):
        parse(TITLE, text)


def test_parse_too_long_cut_drops_the_rest() -> None:
    assert parse(TITLE.model_copy(update={"too_long": "cut"}), "cup " * 9).tolist() == [3, 3, 3, 3]
    assert parse(CODE.model_copy(update={"too_long": "cut"}), "ababab").tolist() == [1, 2, 1, 2]


def test_parse_unknown_character_becomes_the_unknown_token() -> None:
    assert parse(CODE, "aXb\0").tolist() == [1, 3, 2, 3]
    assert parse(CODE, "\ufffd").tolist() == [3, 0, 0, 0]


def test_render_never_generates_the_unknown_token() -> None:
    array = np.zeros((4, 7), dtype=np.float32)
    array[[0, 1, 2, 3], [1, 3, 0, 1]] = 2.0
    array[[0, 3], [2, 0]] = 1.0
    assert render(TITLE, array) == {"text": "blue cup"}
    array = np.array([[0, 1, 0, 2], [0, 0, 1, 2], [1, 0, 0, 2], [1, 0, 0, 0]], dtype=np.float32)
    assert render(CODE, array) == {"text": "ab"}


@pytest.mark.parametrize("text", ["seven", "s", "to be", "a  b", "eighteen"])
def test_render_shifted_text_starts_after_its_padding(text: str) -> None:
    modality = TextModality(name="word", length=8, alphabet=" abeghinostv", likelihood="shifted")
    tokens = parse(modality, text)
    for shift in range(8 if 0 in tokens else 1):  # without padding the start cannot be found
        array = np.eye(modality.categories, dtype=np.float32)[np.roll(tokens, shift)]
        assert render(modality, array) == {"text": text}


def test_render_shifted_padding_only_is_empty() -> None:
    modality = TextModality(name="word", length=3, alphabet=" ab", likelihood="shifted")
    assert render(modality, np.eye(3, dtype=np.float32)[[0, 0, 0]]) == {"text": ""}


WORDS = {  # a word, and the same word with another vowel, point or joiner
    "Hindi": ("दिन", "दीन"),
    "Tamil": ("பல்", "பால்"),
    "Bengali": ("দিন", "দীন"),
    "Telugu": ("పలు", "పాలు"),
    "Malayalam": ("മല", "മാല"),
    "Sinhala": ("ක්\u200dෂය", "කෂය"),
    "Hebrew": ("סֵפֶר", "סַפָּר"),
    "Arabic": ("كَتَبَ", "كُتُب"),
    "Persian": ("می\u200cرود", "میرود"),
    "Yoruba": ("ọkọ́", "ọkọ̀"),
    "Tibetan": ("བོད", "བུད"),
    "Navajo": ("t\u02bcą́ą́", "t\u02bcąą"),
    "Greek, polytonic": ("ἄρᾱ", "ἀρᾱ\u0301"),
    "keycap": ("1\u20e3", "2\u20e3"),
}


@pytest.mark.parametrize("pair", WORDS.values(), ids=WORDS)
def test_parse_words_that_differ_in_a_mark_give_different_tokens(pair: tuple[str, str]) -> None:
    words = [unicodedata.normalize("NFKC", word) for word in pair]
    modality = TextModality(name="title", length=2, unit="word", segmentation="unicode", vocabulary=tuple(words))
    assert parse(modality, f"{pair[0]}, {pair[1]}!").tolist() == [2, 3]
    assert text_from_tokens(modality, np.array([2, 3])) == " ".join(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("今天天气很好", ["今", "天", "天", "气", "很", "好"]),
        ("Nike 运动鞋 2019款", ["nike", "运", "动", "鞋", "2019", "款"]),
        ("スマートフォン用ケース", ["スマートフォン", "用", "ケース"]),
        ("らーめん", ["ら", "ー", "め", "ん"]),
        ("น้ำดื่ม", ["น้ำ", "ดื่", "ม"]),
        ("ສະບາຍດີ", ["ສ", "ະ", "ບ", "າ", "ຍ", "ດີ"]),
        ("ភាសាខ្មែរ", ["ភា", "សា", "ខ្", "មែ", "រ"]),
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("İSTANBUL İzmir I\u0307zmit", ["istanbul", "izmir", "izmit"]),
        ("ΟΔΟΣ", ["οδος"]),
        ("co\u00adoperate \u200eabc\u200f \ufeffx", ["cooperate", "abc", "x"]),
        ("a\u200bb", ["a", "b"]),
        ("कर\u200d ना\u200c", ["कर", "ना"]),
        ("❤️ \u0301abc", ["abc"]),
        ("Don't x-ray 3.5 a_b", ["don't", "x-ray", "3.5", "a_b"]),
        ("a\0b \ud800c", ["a", "b", "c"]),
    ],
)
def test_tokenize_splits_words_of_every_script(text: str, words: list[str]) -> None:
    assert tokenize(text, "word", lowercase=True) == words


def test_tokenize_letters_rule_is_that_of_older_bundles() -> None:
    """Their vocabularies hold what it splits off: they must find it again."""
    assert tokenize("दिन می\u200cرود İx 今天天气", "word", True, "letters") == ["द", "न", "می", "رود", "i", "x", "今天天气"]


SPACED = st.text(st.characters(categories=["L", "N", "P", "S", "Z", "Cc", "Cs"], exclude_characters="İ")).filter(
    lambda text: (
        not any(is_unspaced(c) for c in unicodedata.normalize("NFKC", text))
        and not any(unicodedata.category(c)[0] == "M" for c in unicodedata.normalize("NFKC", text).lower())
    )
)


@given(text=SPACED, lowercase=st.booleans())
def test_tokenize_both_rules_agree_without_marks_and_unspaced_scripts(text: str, lowercase: bool) -> None:
    assert tokenize(text, "word", lowercase) == tokenize(text, "word", lowercase, "letters")


ANY_TEXT = st.text(st.characters() | st.sampled_from("\u200c\u200d\u00ad\u0301\u093fकमদীหน้ำ漢カーひກາမာខ្a1_'-.\u2019 İ"))


@given(text=ANY_TEXT)
def test_tokenize_never_splits_a_character_with_its_marks(text: str) -> None:
    """Every letter, digit and mark after a letter is in a word, in order; no word begins with a mark."""
    words = tokenize(text, "word", lowercase=False)
    assert not any(unicodedata.category(word[0])[0] == "M" for word in words)
    normalised = unicodedata.normalize("NFKC", text)
    letters = [c for c in normalised if c == "_" or unicodedata.category(c)[0] in "LN"]
    kept = [c for c in unicodedata.normalize("NFKC", "".join(words)) if c == "_" or unicodedata.category(c)[0] in "LN"]
    assert kept == letters


@given(text=ANY_TEXT)
def test_tokenize_generated_text_gives_the_same_words(text: str) -> None:
    words = tokenize(text, "word", lowercase=True)
    modality = TextModality(
        name="x", length=1, unit="word", segmentation="unicode", vocabulary=tuple(dict.fromkeys(words)) or ("a",)
    )
    tokens = np.array([modality.token_ids[word] for word in words], dtype=np.int64)
    assert tokenize(text_from_tokens(modality, tokens), "word", lowercase=True) == words


def test_text_from_tokens_has_no_spaces_in_scripts_without_them() -> None:
    for text in ("今天天气很好", "น้ำดื่ม", "スマートフォン用ケース", "佐々木", "nike 运动鞋 2019 款", "テレビ ゲーム", "မြန်မာ"):
        words = tuple(dict.fromkeys(tokenize(text, "word", lowercase=True)))
        modality = TextModality(name="x", length=20, unit="word", segmentation="unicode", vocabulary=words)
        assert text_from_tokens(modality, parse(modality, text)) == text
    older = TextModality(name="x", length=2, unit="word", vocabulary=("今", "天"))
    assert text_from_tokens(older, np.array([2, 3])) == "今 天"

"""Pictures and texts as inputs of frozen encoders."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from concord.model import codec
from concord.model.codec.columns import ColumnReader
from concord.model.codec.errors import DEFAULT_LIMITS, CodecError, Limits
from concord.model.codec.frozen import MAX_TEXTS, Preprocessor, count_inputs, is_input, joined, separated
from concord.model.encoder import EncoderDescription, ImagePreprocessing, TextPreprocessing
from concord.model.modality import EncodedModality, TextModality
from tests.support.encoders import WINDOW, WORDS, write_text_encoder

TITLE = EncodedModality(name="title", kind="text", encoder="t", size=3, mean=(1.0, 2.0, 3.0), std=(2.0, 2.0, 2.0))
PHOTO = EncodedModality(name="photo", kind="image", encoder="e", size=3, mean=(1.0, 2.0, 3.0), std=(2.0, 2.0, 2.0))


def image_preprocessor(**fields: Any) -> Preprocessor:
    return Preprocessor(EncoderDescription(preprocessing=ImagePreprocessing(height=4, width=4, **fields)), None)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Preprocessor:
    folder = tmp_path_factory.mktemp("text")
    write_text_encoder(folder)
    description = EncoderDescription(preprocessing=TextPreprocessing(length=WINDOW))
    return Preprocessor(description, (folder / "tokenizer.json").read_bytes())


def test_picture_is_cut_to_its_centre_after_resizing() -> None:
    picture = np.zeros((12, 24, 3), np.uint8)
    picture[1:11, 7:17] = 200  # a shorter side of 8, of which 4 are kept, shows rows 3 to 9 and columns 9 to 15
    pixels = image_preprocessor(resize=8, resampling="bilinear").pixels(png(picture), DEFAULT_LIMITS)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.full((3, 4, 4), 200))
    largest = image_preprocessor(resampling="bilinear").pixels(png(picture), DEFAULT_LIMITS)
    assert largest[0, 0, 0] < 200


def test_stretched_picture_shows_all_of_it() -> None:
    picture = np.zeros((4, 8, 3), np.uint8)
    picture[:, 4:] = 255
    pixels = image_preprocessor(stretch=True).pixels(png(picture), DEFAULT_LIMITS)
    assert (pixels[:, :, 0] < 20).all()
    assert (pixels[:, :, 3] > 235).all()


def test_grey_and_transparent_pictures_become_rgb() -> None:
    assert (
        image_preprocessor().pixels(png(np.full((4, 4), 9, np.uint8)), DEFAULT_LIMITS).tolist()
        == np.full((3, 4, 4), 9).tolist()
    )
    clear = np.full((4, 4, 4), 9, np.uint8)
    clear[..., 3] = 0
    assert not image_preprocessor(background="black").pixels(png(clear), DEFAULT_LIMITS).any()


def test_picture_above_the_limit_of_pixels_is_rejected() -> None:
    with pytest.raises(CodecError, match="allowed in total") as error:
        image_preprocessor().pixels(png(np.zeros((9, 9, 3), np.uint8)), Limits(image_pixels=80))
    assert error.value.code == "too_large"


def test_long_text_is_cut_and_keeps_its_last_special_token(texts: Preprocessor) -> None:
    text = "red " * WINDOW
    tokens = texts.tokens(text, "cut", DEFAULT_LIMITS)
    assert [WORDS[token] for token in tokens] == ["[CLS]", *["red"] * (WINDOW - 2), "[SEP]"]
    assert is_input(tokens)
    assert texts.is_too_long(text)
    with pytest.raises(CodecError, match=rf"{WINDOW + 2} tokens, the encoder reads {WINDOW}"):
        texts.tokens(text, "refuse", DEFAULT_LIMITS)


@pytest.mark.parametrize(("value", "code"), [(" ", "bad_text"), (3, "wrong_type"), ("x" * 20_000, "too_large")])
def test_invalid_text_is_rejected(texts: Preprocessor, value: object, code: str) -> None:
    with pytest.raises(CodecError) as error:
        texts.tokens(value, "cut", DEFAULT_LIMITS)
    assert error.value.code == code


def test_value_may_be_the_feature_vector_itself() -> None:
    packed = base64.b64encode(np.array([3, 2, 1], "<f4").tobytes()).decode()
    for value in ([3, 2, 1], {"data": packed, "dtype": "float32"}):
        array = codec.parse(PHOTO, value, preprocessor=image_preprocessor())
        np.testing.assert_array_equal(array, np.array([1, 0, -1], np.float32))
    with pytest.raises(CodecError, match="2 entries, 3 are expected"):
        codec.parse(PHOTO, [1, 2], preprocessor=image_preprocessor())
    rendered = codec.render(PHOTO, np.array([1, 0, -1], np.float32))
    assert rendered == {"data": [3.0, 2.0, 1.0]}


def test_several_texts_are_one_input(texts: Preprocessor) -> None:
    tokens = codec.parse(TITLE, ["red cup", "a lamp", "new"], preprocessor=texts)
    assert (is_input(tokens), count_inputs(tokens)) == (True, 3)
    parts = [[WORDS[token] for token in part] for part in separated(tokens)]
    assert parts == [["[CLS]", *words, "[SEP]"] for words in (["red", "cup"], ["a", "lamp"], ["new"])]
    one = codec.parse(TITLE, ["red cup"], preprocessor=texts)
    np.testing.assert_array_equal(one, codec.parse(TITLE, "red cup", preprocessor=texts))
    assert count_inputs(one) == 1
    assert count_inputs(np.zeros((3, 4, 4), np.uint8)) == 1
    assert count_inputs(np.full(3, -1, np.float32)) == 0


def test_features_of_several_texts_are_averaged() -> None:
    features = [np.float32([1, 0, -1]), np.float32([3, 0, 0]), np.float32([2, 3, -2])]
    np.testing.assert_array_equal(joined(features), np.float32([2, 1, -1]))
    assert joined(features).dtype == np.float32


@pytest.mark.parametrize(
    ("value", "code", "pointer", "detail"),
    [
        ([], "bad_text", "", "0 texts, 1 to 16 are allowed: leave the modality out"),
        (["a"] * (MAX_TEXTS + 1), "bad_text", "", "17 texts, 1 to 16 are allowed: send fewer"),
        (["x" * 6_000, "y" * 6_000], "too_large", "", "12000 characters in total, 10000 are allowed"),
        (["a", 3], "wrong_type", "/1", "received a number"),
        (["a", " "], "bad_text", "/1", "the text is empty"),
        (["red", "red " * WINDOW], "bad_text", "/1", "10 tokens, the encoder reads 8: shorten it"),
        ([1.0, "a", 3.0], "bad_vector", "/1", "a vector holds numbers"),
    ],
)
def test_invalid_list_of_texts_is_rejected(texts: Preprocessor, value: object, code: str, pointer: str, detail: str) -> None:
    with pytest.raises(CodecError) as error:
        codec.parse(TITLE, value, preprocessor=texts)
    assert (error.value.code, error.value.pointer) == (code, pointer)
    assert detail in error.value.detail


def test_list_of_texts_without_encoder_is_rejected() -> None:
    with pytest.raises(CodecError, match="received a list: only a text with a frozen encoder may be a list"):
        codec.parse(TextModality(name="word", length=5), ["a", "b"])


def test_picture_may_be_base64_a_data_url_or_an_object() -> None:
    content = png(np.full((5, 5, 3), 7, np.uint8))
    encoded = base64.b64encode(content).decode()
    for value in (encoded, f"data:image/png;base64,{encoded}", {"data": encoded, "media_type": "image/png"}):
        assert codec.parse(PHOTO, value, preprocessor=image_preprocessor()).tolist() == np.full((3, 4, 4), 7).tolist()
    with pytest.raises(CodecError) as error:
        codec.parse(PHOTO, {"data": encoded[:40]}, preprocessor=image_preprocessor())
    assert (error.value.code, error.value.pointer) == ("bad_image", "/data")


def test_cells_hold_inputs_of_the_encoder(texts: Preprocessor, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    content = png(np.full((5, 5, 3), 7, np.uint8))
    (tmp_path / "a.png").write_bytes(content)
    reader = ColumnReader(
        PHOTO, ("photo",), preprocessor=image_preprocessor(), read_file=lambda name: (tmp_path / name).read_bytes()
    )
    for array in (pyarrow.array([content]), pyarrow.array(["a.png"]), pyarrow.array([np.full((4, 4, 3), 7).tolist()])):
        white = 255.0 if pyarrow.types.is_list(array.type) else 1.0
        (cell,) = ColumnReader(**{**vars(reader), "white": white}).cells([array])
        assert cell.values[0].tolist() == np.full((3, 4, 4), 7).tolist()
    title = EncodedModality(name="title", kind="text", encoder="t", size=3)
    cells = list(ColumnReader(title, ("title",), preprocessor=texts).cells([pyarrow.array([["red", "blue"], [], None])]))
    assert [len(cell.values) for cell in cells] == [2, 0, 0]
    joining = ColumnReader(title, ("title",), preprocessor=texts, all_texts=False)
    (cell,) = joining.cells([pyarrow.array([["red", None, " ", *["blue"] * MAX_TEXTS]])])
    assert [count_inputs(value) for value in cell.values] == [1 + MAX_TEXTS], "a row may have more texts than a request"


def test_encoder_of_texts_without_or_with_a_damaged_tokenizer_is_rejected() -> None:
    description = EncoderDescription(preprocessing=TextPreprocessing(length=9))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        Preprocessor(description, None)
    with pytest.raises(ValueError, match="cannot be read"):
        Preprocessor(description, b"{}")
    with pytest.raises(ValueError, match="are allowed"):
        Preprocessor(description, b" " * (33 << 20))

"""Galleries of training examples: the search, the file, and damaged files."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from concord.model.gallery import MAX_ROWS, Gallery

LATENT = 8


def unit_vectors(rows: int) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(rows, LATENT)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def make_gallery(rows: int = 50, **values: Any) -> Gallery:
    return Gallery(unit_vectors(rows), [f"no. {row}" for row in range(rows)], **values)


def webp(level: int, side: int = 16) -> bytes:
    file = io.BytesIO()
    Image.new("L", (side, side), level).save(file, "webp")
    return file.getvalue()


def test_nearest_returns_the_largest_cosine_similarities_in_descending_order() -> None:
    gallery = make_gallery()
    query = np.random.default_rng(1).normal(size=LATENT).astype(np.float32) * 7
    cosines = gallery.mean @ query / np.linalg.norm(query)
    found = gallery.nearest(query, 5)
    assert [row for row, _ in found] == np.argsort(-cosines)[:5].tolist()
    np.testing.assert_allclose([similarity for _, similarity in found], np.sort(cosines)[::-1][:5], rtol=1e-5)


def test_nearest_of_equal_examples_is_the_first_row() -> None:
    gallery = Gallery(np.repeat(unit_vectors(1), 9, axis=0), list("abcdefghi"))
    assert [row for row, _ in gallery.nearest(gallery.mean[0], 3)] == [0, 1, 2]


def test_nearest_of_a_small_gallery_returns_all_rows() -> None:
    gallery = make_gallery(3)
    assert sorted(row for row, _ in gallery.nearest(gallery.mean[0], 10)) == [0, 1, 2]


def test_nearest_of_a_zero_mean_has_similarity_zero() -> None:
    assert [similarity for _, similarity in make_gallery().nearest(np.zeros(LATENT, np.float32), 2)] == [0, 0]


def test_similarity_is_at_most_one() -> None:
    gallery = make_gallery(200)
    assert max(gallery.nearest(mean, 1)[0][1] for mean in gallery.mean) <= 1


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"texts": [["a red cup", "tasse \u00e0 th\u00e9"], ["\u65b0\u3057\u3044"]]},
        {"thumbnails": [webp(0), webp(200)], "side": 16},
    ],
)
def test_file_holds_the_gallery(values: dict[str, Any]) -> None:
    gallery = make_gallery(2, **values)
    read = Gallery.from_bytes(gallery.to_bytes(), LATENT)
    assert np.array_equal(read.mean, gallery.mean)
    assert (read.ids, read.side, read.has_values) == (gallery.ids, gallery.side, bool(values))
    assert [read.values(row) for row in range(2)] == [gallery.values(row) for row in range(2)]
    assert gallery.to_bytes() == read.to_bytes(), "the same gallery has the same file"


def test_values_have_the_form_of_generated_ones() -> None:
    assert make_gallery(1).values(0) == []
    assert make_gallery(1, texts=[["one", "two"]]).values(0) == [{"text": "one"}, {"text": "two"}]
    (picture,) = make_gallery(1, thumbnails=[webp(3)], side=16).values(0)
    assert (picture["media_type"], picture["width"], picture["height"]) == ("image/webp", 16, 16)


def archive(**changes: Any) -> bytes:
    """The file of two thumbnails, with some arrays changed. None removes one."""
    with np.load(io.BytesIO(make_gallery(2, thumbnails=[webp(0), webp(9)], side=16).to_bytes())) as stored:
        arrays = {**stored, **changes}
    content = io.BytesIO()
    np.savez(content, **{name: array for name, array in arrays.items() if array is not None})
    return content.getvalue()


def text(content: str) -> np.ndarray:
    return np.frombuffer(content.encode(), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive", "not a gallery|pickled|Cannot load"),
        (archive()[:200], "not a gallery"),
        (archive(mean=None), "not a gallery .*mean"),
        (archive(ids=None), "not a gallery .*ids"),
        (archive(ids=text("[1, 2]")), "ids are 2 texts"),
        (archive(ids=text('["a"]')), "ids are 2 texts"),
        (archive(ids=text("{")), "Expecting"),
        (archive(texts=text('[["a"]]')), "texts 2 lists"),
        (archive(texts=text('["a", "b"]')), "texts 2 lists"),
        (archive(mean=np.ones((2, LATENT + 1), np.float32)), r"shape \[2, 9\]"),
        (archive(mean=np.ones((2, LATENT))), "type float64"),
        (archive(mean=np.full((2, LATENT), np.nan, np.float32)), "not finite"),
        (archive(mean=np.ones((0, LATENT), np.float32)), "1 to 100,000 rows"),
        (archive(mean=np.broadcast_to(np.float32(0), (MAX_ROWS + 1, LATENT))), "1 to 100,000 rows"),
        (archive(ends=np.array([5, 3])), "thumbnails are 2 files"),
        (archive(ends=np.array([1, 10_000])), "thumbnails are 2 files"),
        (archive(ends=np.array([-1, 3])), "thumbnails are 2 files"),
        (archive(thumbnails=None), "not a gallery .*thumbnails"),
        (archive(ids=np.array(["pickle"], dtype=object)), "Object arrays cannot be loaded"),
    ],
)
def test_damaged_file_is_rejected(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gallery.from_bytes(content, LATENT)

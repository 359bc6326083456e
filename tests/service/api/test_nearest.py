"""Option ``nearest`` of POST /cross-generate: training examples of a bundle with galleries."""

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from concord.client.client import Client
from concord.model import bundle
from concord.model.bundle import BundleError
from concord.model.gallery import Gallery
from concord.model.runtime import Runtime
from tests.support.bundles import write_copy

Serve = Callable[..., AbstractContextManager[httpx.Client]]
WORDS = ("one", "two", "three", "seven")
SIDE = 16


def webp(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (level, 0, 0)).save(file, "webp")
    return file.getvalue()


def embeddings(client: httpx.Client) -> np.ndarray:
    """Embeddings of the words, of unit length."""
    response = client.post("/embed", json={"inputs": [{"word": word} for word in WORDS], "normalize": True})
    return np.array([one["embedding"] for one in response.json()["data"]], np.float32)


@pytest.fixture(scope="module")
def with_galleries(client: httpx.Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in bundle with the words as training examples of ``word``, and one with thumbnails of ``digit``."""
    folder, mean = tmp_path_factory.mktemp("galleries"), embeddings(client)
    galleries = {
        "word": Gallery(mean, [f"no. {word}" for word in WORDS], [[word, word.upper()] for word in WORDS]),
        "digit": Gallery(mean, list(WORDS), (), [webp(60 * row) for row in range(len(WORDS))], SIDE),
    }
    facts = {}
    for name, gallery in galleries.items():
        (folder / f"gallery-{name}.npz").write_bytes(gallery.to_bytes())
        facts[name] = {"file": f"gallery-{name}.npz", "rows": len(WORDS), "values": True}
    return write_copy(
        folder / "bundle", name="shown", galleries=facts, more=[folder / f"gallery-{name}.npz" for name in galleries]
    ).path


@pytest.fixture(scope="module")
def shown(serve: Serve, with_galleries: Path) -> Iterator[httpx.Client]:
    with serve(Runtime.load(with_galleries, threads=1)) as client:
        yield client


def generate(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/cross-generate", json={"inputs": [{"word": "seven"}], **body})


def test_nearest_returns_the_examples_of_each_target_with_a_gallery(shown: httpx.Client) -> None:
    (item,) = generate(shown, targets=["word", "digit", "photo"], nearest=2).json()["data"]
    assert item["nearest"].keys() == {"word", "digit"}
    first, second = item["nearest"]["word"]
    assert first["id"] == "no. seven"
    assert first["similarity"] == pytest.approx(1, abs=1e-5)
    assert first["similarity"] > second["similarity"]
    assert first["values"] == [{"text": "seven"}, {"text": "SEVEN"}]
    (picture,) = item["nearest"]["digit"][0]["values"]
    assert (picture["media_type"], picture["width"], picture["height"]) == ("image/webp", SIDE, SIDE)


def test_nearest_does_not_depend_on_the_samples(shown: httpx.Client) -> None:
    responses = [generate(shown, seed=seed, num_samples=2, nearest=3).json()["data"][0]["nearest"] for seed in (0, 1)]
    assert responses[0] == responses[1]


def test_nearest_follows_the_refined_posterior(shown: httpx.Client, values: dict[str, str]) -> None:
    options = {"inputs": [values], "targets": ["digit"], "nearest": 4}
    before, after = (generate(shown, **options, refine={"steps": steps}).json()["data"][0] for steps in (0, 4))
    similarities = [[one["similarity"] for one in item["nearest"]["digit"]] for item in (before, after)]
    assert similarities[0] != similarities[1]


@pytest.mark.parametrize("nearest", [None, 0])
def test_response_without_nearest_has_no_such_field(shown: httpx.Client, nearest: int | None) -> None:
    (item,) = generate(shown, nearest=nearest).json()["data"]
    assert "nearest" not in item


def test_targets_without_a_gallery_do_not_count_for_the_limit(shown: httpx.Client) -> None:
    assert generate(shown, nearest=256, targets=["digit", "photo"]).status_code == 200


def test_form_and_query_take_nearest(shown: httpx.Client) -> None:
    response = shown.post("/cross-generate", params={"nearest": 1, "targets": "digit"}, files={"word": (None, "two")})
    (item,) = response.json()["data"]
    assert [example["id"] for example in item["nearest"]["digit"]] == ["two"]


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({"nearest": 1, "targets": ["photo"]}, "the bundle has training examples of word, digit only"),
        (
            {"nearest": 200, "targets": ["digit", "word"]},
            "400 examples (items x targets with a gallery x nearest); at",
        ),
        ({"nearest": -1}, "greater than or equal to 0"),
    ],
)
def test_invalid_nearest_is_rejected(shown: httpx.Client, body: dict[str, Any], detail: str) -> None:
    response = generate(shown, **body)
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert error["pointer"] == "/nearest"
    assert detail in error["detail"]


def test_bundle_without_gallery_rejects_nearest(client: httpx.Client) -> None:
    response = generate(client, nearest=1)
    assert (response.status_code, response.json()["code"]) == (422, "no_gallery")
    assert "/nearest: the bundle has no training examples: leave nearest out" in response.json()["detail"]


def test_models_name_the_galleries(shown: httpx.Client, client: httpx.Client) -> None:
    (model,) = shown.get("/v1/models").json()["data"]
    galleries = {modality["name"]: modality.get("gallery") for modality in model["modalities"]}
    held = {"rows": len(WORDS), "values": True}
    assert galleries == {"digit": held, "photo": None, "word": held}
    assert all("gallery" not in modality for modality in client.get("/v1/models").json()["data"][0]["modalities"])


def test_client_returns_examples_with_pictures_and_texts(shown: httpx.Client) -> None:
    with Client(str(shown.base_url)) as client:
        (result,) = client.cross_generate({"word": "three"}, targets=["digit", "word"], nearest=1).results
        assert client.cross_generate({"word": "three"}).results[0].nearest == {}
    (word,), (digit,) = result.nearest["word"], result.nearest["digit"]
    assert (word.id, word.values) == ("no. three", ["three", "THREE"])
    (thumbnail,) = digit.values
    assert isinstance(thumbnail, Image.Image)
    assert thumbnail.size == (SIDE, SIDE)


def test_bundle_with_a_changed_gallery_is_refused(with_galleries: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(with_galleries, tmp_path / "damaged"))
    content = bytearray((damaged / "gallery-word.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "gallery-word.npz").write_bytes(content)
    with pytest.raises(BundleError, match=r"gallery-word\.npz.*changed or cut short"):
        bundle.read(damaged)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"file": "gallery-word.npz", "rows": 3, "values": True}, "does not fit the manifest"),
        ({"file": "gallery-word.npz", "rows": 4, "values": False}, "does not fit the manifest"),
        ({"file": "golden.npz", "rows": 4, "values": False}, "not a gallery"),
    ],
)
def test_gallery_that_does_not_fit_the_manifest_is_refused(
    with_galleries: Path, tmp_path: Path, facts: dict[str, Any], message: str
) -> None:
    copy = write_copy(tmp_path / "copy", with_galleries, galleries={"word": facts})
    with pytest.raises(BundleError, match=message):
        Runtime(copy, threads=1)


@pytest.mark.parametrize(
    ("galleries", "message"),
    [
        ({"sound": {"file": "gallery-word.npz", "rows": 4, "values": True}}, r"galleries names \['sound'\]"),
        ({"word": {"file": "other.npz", "rows": 4, "values": True}}, r"no hash for \['other.npz'\]"),
    ],
)
def test_manifest_with_a_wrong_gallery_is_refused(
    with_galleries: Path, tmp_path: Path, galleries: dict[str, Any], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        write_copy(tmp_path / "copy", with_galleries, galleries=galleries)


def test_only_bundles_with_galleries_have_the_new_format_and_field(with_galleries: Path, tmp_path: Path) -> None:
    assert bundle.read(with_galleries).manifest.format == 7
    original = bundle.builtin("digits")
    copy = write_copy(tmp_path / "copy", original)
    assert (copy.path / bundle.MANIFEST).read_bytes() == (original / bundle.MANIFEST).read_bytes()

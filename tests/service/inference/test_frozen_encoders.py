"""Frozen encoders in the scheduler: batches, absent modalities, errors of single rows."""

from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from concord.model.codec.errors import DEFAULT_LIMITS
from concord.model.runtime import Runtime
from concord.model.runtime.frozen import FrozenEncoder
from concord.service.inference.jobs import InferenceJob, InferenceResult, RefinementLimits
from concord.service.inference.scheduler import NullObserver, Row, Scheduler
from tests.support.encoders import FEATURES, SIDE, encoded_modalities
from tests.support.graphs import write_bundle


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory, tiny_facts: dict[str, Any]) -> Runtime:
    folder = tmp_path_factory.mktemp("encoded")
    modalities, files = encoded_modalities(folder)
    return Runtime(write_bundle(folder / "bundle", modalities, tiny_facts, encoders=files), threads=1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rows of each run of a frozen encoder."""
    found: list[int] = []
    run = FrozenEncoder.features

    def features(encoder: FrozenEncoder, inputs: Any) -> Any:
        found.append(len(inputs))
        if any(array.dtype == np.uint8 and array.min() == 255 for array in inputs):
            raise RuntimeError("a white picture")
        return run(encoder, inputs)

    monkeypatch.setattr(FrozenEncoder, "features", features)
    return found


def picture(level: int) -> NDArray[np.uint8]:
    return np.full((3, SIDE, SIDE), level, np.uint8)


def run(runtime: Runtime, *rows: dict[str, Any], steps: int = 0) -> list[Row]:
    scheduler = Scheduler(runtime, max_batch=32, observer=NullObserver())
    submitted = [
        Row(InferenceJob(row, 0, index, refine=RefinementLimits(steps=steps)), monotonic()) for index, row in enumerate(rows)
    ]
    scheduler.add(submitted)
    while scheduler.active:
        scheduler.step()
    return submitted


def mean(row: Row) -> NDArray[np.float32]:
    assert isinstance(row.result, InferenceResult), row.result
    return row.result.mean


def test_rows_with_a_picture_share_a_run_and_others_are_skipped(runtime: Runtime, calls: list[int]) -> None:
    price = np.zeros(1, np.float32)
    rows = run(runtime, {"photo": picture(1)}, {"price": price}, {"photo": picture(9), "price": price})
    assert calls == [2]
    assert mean(rows[0]).shape == (6,)
    run(runtime, {"price": price}, {"photo": np.zeros(FEATURES, np.float32)})
    assert calls == [2], "an encoder ran for rows without its input"


def test_input_and_its_features_have_the_same_result(runtime: Runtime) -> None:
    title = runtime.preprocessors["title"].tokens("a red cup", "cut", DEFAULT_LIMITS)
    inputs = {"photo": picture(30), "back": picture(200), "title": title}
    features = {name: runtime.features(name, [array])[0] for name, array in inputs.items()}
    for steps in (0, 2):
        as_input, as_features = run(runtime, inputs, features, steps=steps)
        np.testing.assert_allclose(mean(as_input), mean(as_features), rtol=1e-5, atol=1e-6)


def test_several_texts_have_the_result_of_their_mean(runtime: Runtime) -> None:
    preprocessor, texts = runtime.preprocessors["title"], ["a red cup", "a lamp", "new"]
    features = runtime.features("title", [preprocessor.tokens(text, "cut", DEFAULT_LIMITS) for text in texts])
    as_texts, as_mean = run(
        runtime, {"title": preprocessor.texts(texts, "cut", DEFAULT_LIMITS)}, {"title": features.mean(axis=0)}
    )
    np.testing.assert_allclose(mean(as_texts), mean(as_mean), rtol=1e-5, atol=1e-6)


def test_error_of_an_encoder_is_contained_to_its_row(runtime: Runtime, calls: list[int]) -> None:
    rows = run(
        runtime, {"photo": picture(1)}, {"photo": picture(255)}, {"photo": picture(2)}, {"price": np.zeros(1, np.float32)}
    )
    assert isinstance(rows[1].result, RuntimeError)
    assert all(isinstance(rows[index].result, InferenceResult) for index in (0, 2, 3))
    assert max(calls) == 3


def test_runs_count_frozen_encoders(runtime: Runtime) -> None:
    assert InferenceJob({"photo": picture(1), "price": np.zeros(1, np.float32)}, 0, 0).runs({}) == 2
    assert InferenceJob({"word": np.zeros(3, np.int64)}, 0, 0).runs({}) == 1
    titles = runtime.preprocessors["title"].texts(["a red cup", "a lamp", "new"], "cut", DEFAULT_LIMITS)
    job = InferenceJob({"title": titles}, 0, 0)
    scheduler = Scheduler(runtime, max_batch=32, observer=NullObserver())
    scheduler.add([Row(job, monotonic())])
    assert scheduler.runs == job.runs({}) == 4, "the time of a waiting request is estimated from both"
    runtime.warm_up(2)
    assert runtime.replay_golden() <= 1e-4
    assert {"encoder-photos.onnx", "encoder-texts.onnx"} < set(runtime.nodes_by_provider())


def test_two_modalities_share_one_network(runtime: Runtime) -> None:
    assert runtime.encoders["photo"] is runtime.encoders["back"]
    assert len([name for name in runtime.bundle.manifest.files if name.startswith("encoder-")]) == 2


def test_bundle_is_written_and_read_without_a_path_of_the_machine(runtime: Runtime) -> None:
    manifest = Path(runtime.bundle.path / "manifest.json").read_text()
    assert str(Path.cwd()) not in manifest
    assert "/tmp" not in manifest

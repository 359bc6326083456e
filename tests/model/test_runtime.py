"""Encode, refine and decode on arrays; the golden replay; what happens where CUDA is asked for."""

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

from model import bundle
from model.manifest import FileEntry
from model.runtime import Posterior, Runtime

LATENT, SAMPLES = 6, 2


@pytest.fixture(scope="module")
def runtime(tiny_bundle: bundle.Bundle) -> Runtime:
    return Runtime(tiny_bundle, threads=1)


def arguments(make_rows: Any, runtime: Runtime, rows: int, seed: int = 0) -> tuple[Any, ...]:
    """Of ``refine``: every row has a subset of its own."""
    generator = np.random.default_rng(seed)
    inputs = {name: x.numpy() for name, x in make_rows(runtime.modalities, rows, seed).items()}
    codes = generator.integers(1, 16, rows)
    present = (codes[:, None] >> np.arange(4) & 1).astype(bool)
    q, anchor = (Posterior(*generator.normal(0, 0.5, (2, rows, LATENT)).astype(np.float32)) for _ in range(2))
    return inputs, present, q, anchor, generator.normal(size=(rows, SAMPLES, LATENT)).astype(np.float32)


def resealed(opened: bundle.Bundle, folder: Path, name: str) -> bundle.Bundle:
    """A copy in ``folder``, its manifest in line with what ``name`` holds now."""
    content = (folder / name).read_bytes()
    entry = FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    manifest = opened.manifest.model_copy(update={"files": {**opened.manifest.files, name: entry}})
    return bundle.Bundle(folder, manifest, opened.sha256)


@pytest.mark.parametrize("rows", [1, 5])
def test_shapes(runtime: Runtime, make_rows: Any, rows: int) -> None:
    inputs, present, *rest = arguments(make_rows, runtime, rows)
    encoded = runtime.encode(inputs, present)
    refined, objective = runtime.refine(inputs, present, *rest)
    for posterior in (encoded, refined):
        assert posterior.mean.shape == posterior.log_var.shape == (rows, LATENT)
        assert posterior.mean.dtype == posterior.log_var.dtype == np.float32
    assert objective.shape == (rows,)
    shapes = {m.name: runtime.decode(m.name, encoded.mean).shape for m in runtime.modalities}
    assert shapes == {"image": (rows, 1, 8, 8), "text": (rows, 3, 4), "vector": (rows, 5), "binary": (rows, 2)}


def test_decoded_values_are_in_range(runtime: Runtime) -> None:
    z = 10 * np.random.default_rng(0).normal(size=(50, LATENT)).astype(np.float32)
    for name in ("image", "binary"):
        values = runtime.decode(name, z)
        assert values.min() >= 0
        assert values.max() <= 1
    np.testing.assert_allclose(np.exp(runtime.decode("text", z)).sum(-1), 1, rtol=1e-5)


def test_a_row_has_the_same_answer_in_any_company(runtime: Runtime, make_rows: Any) -> None:
    inputs, present, q, anchor, noise = arguments(make_rows, runtime, 12)
    together, objectives = runtime.refine(inputs, present, q, anchor, noise)
    encoded = runtime.encode(inputs, present)
    for i in range(12):
        row = {name: x[i : i + 1] for name, x in inputs.items()}
        part = [Posterior(p.mean[i : i + 1], p.log_var[i : i + 1]) for p in (q, anchor)]
        alone, objective = runtime.refine(row, present[i : i + 1], *part, noise[i : i + 1])
        np.testing.assert_allclose(alone.mean[0], together.mean[i], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(objective[0], objectives[i], rtol=1e-4)
        np.testing.assert_allclose(runtime.encode(row, present[i : i + 1]).mean[0], encoded.mean[i], rtol=1e-4, atol=1e-5)


def test_calls_from_many_threads_equal_those_from_one(runtime: Runtime, make_rows: Any) -> None:
    work = [arguments(make_rows, runtime, 1 + seed % 7, seed) for seed in range(60)]

    def run(task: tuple[Any, ...]) -> list[np.ndarray]:
        encoded = runtime.encode(*task[:2])
        refined, objective = runtime.refine(*task)
        return [encoded.mean, encoded.log_var, refined.mean, refined.log_var, objective, runtime.decode("image", encoded.mean)]

    with ThreadPoolExecutor(8) as pool:
        concurrent = list(pool.map(run, work))
    for task, found in zip(work, concurrent, strict=True):
        for expected, answer in zip(run(task), found, strict=True):
            assert np.array_equal(answer, expected)


def test_golden_examples_are_met(runtime: Runtime) -> None:
    assert runtime.replay_golden(1e-4) <= 1e-4


@pytest.mark.parametrize("spoil", [lambda w: w + 0.01, lambda w: np.full_like(w, np.nan)], ids=["moved", "nan"])
@pytest.mark.parametrize("weight", ["decoders.image.layers.2.weight", "aligned.fusion.2.weight", "refiner.rates.2.weight"])
def test_other_weights_are_noticed(tiny_bundle: bundle.Bundle, tmp_path: Path, weight: str, spoil: Any) -> None:
    """Past the hashes, which would refuse them first."""
    shutil.copytree(tiny_bundle.path, tmp_path / "b")
    weights = load_file(tmp_path / "b" / bundle.WEIGHTS)
    save_file({**weights, weight: spoil(weights[weight])}, tmp_path / "b" / bundle.WEIGHTS)
    runtime = Runtime(resealed(tiny_bundle, tmp_path / "b", bundle.WEIGHTS), threads=1)
    with pytest.raises(bundle.BundleError, match="golden examples differ"):
        runtime.replay_golden()


def test_load_verifies(tiny_bundle: bundle.Bundle, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "b")
    assert Runtime.load(tmp_path / "b", threads=1).replay_golden() <= 1e-3
    with (tmp_path / "b" / bundle.WEIGHTS).open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(bundle.BundleError, match="changed or cut short"):
        Runtime.load(tmp_path / "b", threads=1)


def test_a_graph_that_does_not_run_is_refused_by_name(tiny_bundle: bundle.Bundle, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "b")
    (tmp_path / "b" / "refine.onnx").write_bytes(b"")
    with pytest.raises(bundle.BundleError, match=r"refine\.onnx: ONNX Runtime refuses"):
        Runtime(resealed(tiny_bundle, tmp_path / "b", "refine.onnx"), threads=1)


needs_no_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="tells what happens without CUDA"
)


@needs_no_cuda
def test_cuda_that_is_not_installed(tiny_bundle: bundle.Bundle) -> None:
    with pytest.raises(bundle.BundleError, match=r"CUDA was asked for.*gpu extra"):
        Runtime(tiny_bundle, device="cuda", threads=1)
    assert Runtime(tiny_bundle, device="auto", threads=1).device == "cpu"


@needs_no_cuda
@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")  # ONNX Runtime's own word on it
def test_cuda_that_is_installed_and_does_not_start(
    tiny_bundle: bundle.Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The gpu package on a machine without a driver lists CUDA and then runs on the CPU without a word."""
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    with pytest.raises(bundle.BundleError, match="could not start CUDAExecutionProvider"):
        Runtime(tiny_bundle, device="cuda", threads=1)
    runtime = Runtime(tiny_bundle, device="auto", threads=1)
    assert runtime.device == "cpu"
    assert "could not start CUDAExecutionProvider" in caplog.text
    assert runtime.replay_golden() <= 1e-3
    assert Runtime(tiny_bundle, device="cpu", threads=1).device == "cpu"

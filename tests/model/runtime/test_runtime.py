"""Runtime: encode, refine and decode arrays; golden examples; selection of the device."""

import hashlib
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

from concord.model import bundle
from concord.model.bundle.manifest import FileEntry
from concord.model.modality import CategoricalModality
from concord.model.runtime import Posterior, Runtime
from tests.support.graphs import write_bundle
from tests.support.sounds import SOUND

LATENT, SAMPLES = 6, 2


@pytest.fixture(scope="module")
def runtime(tiny_bundle: bundle.Bundle) -> Runtime:
    return Runtime(tiny_bundle, threads=1)


def arguments(make_rows: Any, runtime: Runtime, rows: int, seed: int = 0) -> tuple[Any, ...]:
    """Arguments of ``refine``. Each row has a random subset of the modalities."""
    generator = np.random.default_rng(seed)
    inputs = {name: x.numpy() for name, x in make_rows(runtime.modalities, rows, seed).items()}
    codes = generator.integers(1, 16, rows)
    present = (codes[:, None] >> np.arange(4) & 1).astype(bool)
    q, anchor = (Posterior(*generator.normal(0, 0.5, (2, rows, LATENT)).astype(np.float32)) for _ in range(2))
    return inputs, present, q, anchor, generator.normal(size=(rows, SAMPLES, LATENT)).astype(np.float32)


def with_current_hash(opened: bundle.Bundle, folder: Path, name: str) -> bundle.Bundle:
    """The bundle in ``folder`` with the current hash of the file ``name`` in its manifest."""
    content = (folder / name).read_bytes()
    entry = FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    manifest = opened.manifest.model_copy(update={"files": {**opened.manifest.files, name: entry}})
    return bundle.Bundle(folder, manifest, opened.sha256)


@pytest.mark.parametrize("rows", [1, 5])
def test_runtime_outputs_have_documented_shapes(runtime: Runtime, make_rows: Any, rows: int) -> None:
    inputs, present, *rest = arguments(make_rows, runtime, rows)
    encoded = runtime.encode(inputs, present)
    refined, objective = runtime.refine(inputs, present, *rest)
    for posterior in (encoded, refined):
        assert posterior.mean.shape == posterior.log_var.shape == (rows, LATENT)
        assert posterior.mean.dtype == posterior.log_var.dtype == np.float32
    assert objective.shape == (rows,)
    shapes = {m.name: runtime.decode(m.name, encoded.mean).shape for m in runtime.modalities}
    assert shapes == {"image": (rows, 1, 8, 8), "text": (rows, 3, 4), "vector": (rows, 5), "binary": (rows, 2)}


def test_decode_values_are_in_range(runtime: Runtime) -> None:
    z = 10 * np.random.default_rng(0).normal(size=(50, LATENT)).astype(np.float32)
    for name in ("image", "binary"):
        values = runtime.decode(name, z)
        assert values.min() >= 0
        assert values.max() <= 1
    np.testing.assert_allclose(np.exp(runtime.decode("text", z)).sum(-1), 1, rtol=1e-5)


def test_runtime_row_results_do_not_depend_on_the_batch(runtime: Runtime, make_rows: Any) -> None:
    inputs, present, q, anchor, noise = arguments(make_rows, runtime, 12)
    together, objectives = runtime.refine(inputs, present, q, anchor, noise)
    encoded = runtime.encode(inputs, present)
    for i in range(12):
        row = {name: x[i : i + 1] for name, x in inputs.items()}
        part = [Posterior(p.mean[i : i + 1], p.log_var[i : i + 1]) for p in (q, anchor)]
        single, objective = runtime.refine(row, present[i : i + 1], *part, noise[i : i + 1])
        np.testing.assert_allclose(single.mean[0], together.mean[i], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(objective[0], objectives[i], rtol=1e-4)
        np.testing.assert_allclose(runtime.encode(row, present[i : i + 1]).mean[0], encoded.mean[i], rtol=1e-4, atol=1e-5)


def test_runtime_calls_from_many_threads_equal_sequential_calls(runtime: Runtime, make_rows: Any) -> None:
    calls = [arguments(make_rows, runtime, 1 + seed % 7, seed) for seed in range(60)]

    def run(call: tuple[Any, ...]) -> list[np.ndarray]:
        encoded = runtime.encode(*call[:2])
        refined, objective = runtime.refine(*call)
        return [encoded.mean, encoded.log_var, refined.mean, refined.log_var, objective, runtime.decode("image", encoded.mean)]

    with ThreadPoolExecutor(8) as pool:
        concurrent = list(pool.map(run, calls))
    for call, results in zip(calls, concurrent, strict=True):
        for expected, actual in zip(run(call), results, strict=True):
            assert np.array_equal(actual, expected)


def test_replay_golden_exported_bundle_is_within_tolerance(runtime: Runtime) -> None:
    assert runtime.replay_golden(1e-4) <= 1e-4


@pytest.mark.parametrize("damage", [lambda w: w + 0.01, lambda w: np.full_like(w, np.nan)], ids=["shifted", "nan"])
@pytest.mark.parametrize("weight", ["decoders.image.layers.2.weight", "aligned.fusion.2.weight", "refiner.rates.2.weight"])
def test_replay_golden_changed_weights_raise(tiny_bundle: bundle.Bundle, tmp_path: Path, weight: str, damage: Any) -> None:
    """The hashes in the manifest match the changed weights, so only the golden examples can detect them."""
    shutil.copytree(tiny_bundle.path, tmp_path / "b")
    weights = load_file(tmp_path / "b" / bundle.WEIGHTS)
    save_file({**weights, weight: damage(weights[weight])}, tmp_path / "b" / bundle.WEIGHTS)
    runtime = Runtime(with_current_hash(tiny_bundle, tmp_path / "b", bundle.WEIGHTS), threads=1)
    with pytest.raises(bundle.BundleError, match="golden examples differ"):
        runtime.replay_golden()


def test_load_opens_a_valid_bundle_and_rejects_a_changed_one(tiny_bundle: bundle.Bundle, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "b")
    assert Runtime.load(tmp_path / "b", threads=1).replay_golden() <= 1e-3
    with (tmp_path / "b" / bundle.WEIGHTS).open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(bundle.BundleError, match="changed or cut short"):
        Runtime.load(tmp_path / "b", threads=1)


def test_runtime_invalid_graph_raises_with_its_name(tiny_bundle: bundle.Bundle, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "b")
    (tmp_path / "b" / "refine.onnx").write_bytes(b"")
    with pytest.raises(bundle.BundleError, match=r"refine\.onnx: ONNX Runtime cannot load"):
        Runtime(with_current_hash(tiny_bundle, tmp_path / "b", "refine.onnx"), threads=1)


def test_runtime_of_a_bundle_with_sound_without_its_packages_names_the_extra(
    tiny_facts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = write_bundle(tmp_path / "bundle", [SOUND, CategoricalModality(name="word", classes=("one", "two"))], tiny_facts)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(bundle.BundleError, match=r"bundle: .*pip install .*\[audio\]"):
        Runtime(opened, threads=1)


without_cuda = pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA is available")


@without_cuda
def test_runtime_cuda_not_installed_raises_and_auto_uses_cpu(tiny_bundle: bundle.Bundle) -> None:
    with pytest.raises(bundle.BundleError, match=r"device is cuda.*gpu extra"):
        Runtime(tiny_bundle, device="cuda", threads=1)
    assert Runtime(tiny_bundle, device="auto", threads=1).device.is_cpu


@without_cuda
@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")  # from ONNX Runtime
def test_runtime_cuda_that_does_not_start_raises_and_auto_uses_cpu(
    tiny_bundle: bundle.Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a machine without a driver, ONNX Runtime's GPU package lists CUDA and then silently uses the CPU."""
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    with pytest.raises(bundle.BundleError, match="could not start CUDAExecutionProvider"):
        Runtime(tiny_bundle, device="cuda", threads=1)
    runtime = Runtime(tiny_bundle, device="auto", threads=1)
    assert runtime.device.is_cpu
    assert "could not start CUDAExecutionProvider" in caplog.text
    assert runtime.replay_golden() <= 1e-3
    assert Runtime(tiny_bundle, device="cpu", threads=1).device.is_cpu

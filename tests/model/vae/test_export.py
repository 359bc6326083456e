"""The bundle computes what the model computes, holds every number once, and appears only when both hold."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from model import bundle
from model.modality import CategoricalModality, ImageModality, TextModality, VectorModality
from model.runtime import Posterior, Runtime
from model.skipping import skip_absent
from model.vae import export
from model.vae.export import PARITY_TOLERANCE, ExportError, export_bundle
from model.vae.gaussian import Gaussian, sample
from model.vae.golden import golden_examples, parity
from model.vae.graphs import INLINE_BYTES
from model.vae.multimodal import MultimodalVAE

SUBSETS = [mask for mask in itertools.product([True, False], repeat=4) if any(mask)]
PLAIN = (VectorModality(name="first", size=3), VectorModality(name="second", size=2))


@pytest.fixture(scope="module")
def runtime(tiny_bundle: bundle.Bundle) -> Runtime:
    return Runtime(tiny_bundle, threads=1)


def numbers(arrays: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: x.numpy() for name, x in arrays.items()}


def difference(found: np.ndarray, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected.numpy()).max() / max(1.0, expected.abs().max().item()))


def draw(rows: int, vae: MultimodalVAE, samples: int = 2) -> tuple[Gaussian, Gaussian, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    posteriors = [Gaussian(*(0.5 * torch.randn(rows, vae.latent, generator=generator) for _ in range(2))) for _ in range(2)]
    return *posteriors, torch.randn(rows, samples, vae.latent, generator=generator)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("subset", SUBSETS, ids=lambda mask: "".join("01"[bit] for bit in mask))
def test_graphs_agree_with_the_model(
    tiny_vae: MultimodalVAE, runtime: Runtime, make_rows, subset: tuple[bool, ...], rows: int
) -> None:
    arrays, present = make_rows(tiny_vae.modalities, rows, seed=rows), torch.tensor([subset] * rows)
    encoded, expected = runtime.encode(numbers(arrays), present.numpy()), tiny_vae.aligned(arrays, present)
    assert difference(encoded.mean, expected.mean) <= PARITY_TOLERANCE
    assert difference(encoded.log_var, expected.log_var) <= PARITY_TOLERANCE
    q, anchor, noise = draw(rows, tiny_vae)
    after, objective = runtime.refine(
        numbers(arrays), present.numpy(), *(Posterior(g.mean.numpy(), g.log_var.numpy()) for g in (q, anchor)), noise.numpy()
    )
    refined, value = tiny_vae.refine_step(arrays, present, q, anchor, noise)
    assert difference(after.mean, refined.mean) <= PARITY_TOLERANCE
    assert difference(after.log_var, refined.log_var) <= PARITY_TOLERANCE
    assert difference(objective, value) <= PARITY_TOLERANCE


def test_a_flow_is_exported_and_samples_go_through_it(
    tiny_modalities, make_vae, make_rows, tiny_facts: dict[str, Any], tmp_path: Path
) -> None:
    vae, examples = make_vae(tiny_modalities, couplings=3, spread=0.6), make_rows(tiny_modalities, 15)
    q, _, noise = draw(4, vae)
    assert (vae.draw(q, noise) - sample(q, noise)).abs().max() > 0.01
    made = export_bundle(vae, tmp_path / "b", facts=tiny_facts, samples=2, horizon=3, examples=examples, card="")
    assert (made.manifest.format, made.manifest.graphs.draw) == (3, "draw.onnx")
    runtime = Runtime(made, threads=1)
    for rows in (1, 3, 16):
        q, _, noise = draw(rows, vae, samples=1)
        z = runtime.draw(Posterior(q.mean.numpy(), q.log_var.numpy()), noise[:, 0].numpy())
        assert difference(z, vae.draw(q, noise)[:, 0]) <= PARITY_TOLERANCE
        assert parity(vae, runtime, make_rows(tiny_modalities, rows, seed=rows)) <= PARITY_TOLERANCE
    for weight in vae.flow.parameters():
        weight.data *= 1.1
    assert parity(vae, runtime, examples) > PARITY_TOLERANCE, "parity looks at samples too"


def test_a_flow_that_differs_is_found_by_the_golden_examples(
    tiny_modalities, make_vae, make_rows, tiny_facts: dict[str, Any], tmp_path: Path
) -> None:
    vae, examples = make_vae(tiny_modalities, couplings=3), make_rows(tiny_modalities, 15)
    made = export_bundle(vae, tmp_path / "b", facts=tiny_facts, samples=2, horizon=3, examples=examples, card="")
    runtime = Runtime(made, threads=1)
    runtime.replay_golden(PARITY_TOLERANCE)
    runtime._draw = None
    with pytest.raises(bundle.BundleError, match="golden examples differ"):
        runtime.replay_golden(PARITY_TOLERANCE)


def test_without_a_flow_samples_are_the_gaussians(
    tiny_vae: MultimodalVAE, tiny_bundle: bundle.Bundle, runtime: Runtime
) -> None:
    q, _, noise = draw(5, tiny_vae, samples=1)
    z = runtime.draw(Posterior(q.mean.numpy(), q.log_var.numpy()), noise[:, 0].numpy())
    assert difference(z, sample(q, noise)[:, 0]) <= PARITY_TOLERANCE
    assert tiny_bundle.manifest.format < 3
    stated = json.loads((tiny_bundle.path / bundle.MANIFEST).read_text())
    assert "draw" not in stated["graphs"], "which older readers would refuse"


def test_a_product_of_experts_is_exported_and_skips_what_is_absent(
    tiny_modalities, make_vae, make_rows, tiny_facts: dict[str, Any], tmp_path: Path
) -> None:
    vae, examples = make_vae(tiny_modalities, fusion="product"), make_rows(tiny_modalities, 15)
    made = export_bundle(vae, tmp_path / "b", facts=tiny_facts, samples=2, horizon=3, examples=examples, card="")
    runtime = Runtime(made, threads=1)
    for rows in (1, 3, 16):
        assert parity(vae, runtime, make_rows(tiny_modalities, rows, seed=rows)) <= PARITY_TOLERANCE
        for subset in SUBSETS:
            arrays, present = make_rows(tiny_modalities, rows, seed=1), torch.tensor([subset] * rows)
            encoded, expected = runtime.encode(numbers(arrays), present.numpy()), vae.aligned(arrays, present)
            assert difference(encoded.mean, expected.mean) <= PARITY_TOLERANCE
            assert difference(encoded.log_var, expected.log_var) <= PARITY_TOLERANCE
    names = [m.name for m in tiny_modalities]
    graph = onnx.load_model_from_string(skip_absent(made.content(made.manifest.graphs.encode), names)).graph
    assert sum(node.op_type == "Compress" for node in graph.node) == len(names)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_decoders_agree_with_the_model(tiny_vae: MultimodalVAE, runtime: Runtime, rows: int) -> None:
    z = torch.randn(rows, tiny_vae.latent)
    for modality in tiny_vae.modalities:
        assert difference(runtime.decode(modality.name, z.numpy()), tiny_vae.decode(modality.name, z)) <= PARITY_TOLERANCE


@pytest.mark.parametrize("filler", [float("nan"), float("inf"), 1e30])
def test_fillers_do_not_change_the_graphs_answers(tiny_vae: MultimodalVAE, runtime: Runtime, make_rows, filler: float) -> None:
    rows = len(SUBSETS)
    arrays, present = numbers(make_rows(tiny_vae.modalities, rows)), np.array(SUBSETS)
    spoiled = {}
    for m, (name, x) in enumerate(arrays.items()):
        spoiled[name] = x.copy()
        spoiled[name][~present[:, m]] = 10**9 if x.dtype == np.int64 else filler
    q, anchor, noise = draw(rows, tiny_vae)
    start, stay = (Posterior(g.mean.numpy(), g.log_var.numpy()) for g in (q, anchor))
    answers = []
    for inputs in (arrays, spoiled):
        encoded = runtime.encode(inputs, present)
        refined, objective = runtime.refine(inputs, present, start, stay, noise.numpy())
        answers.append((encoded.mean, encoded.log_var, refined.mean, refined.log_var, objective))
    for expected, found in zip(*answers, strict=True):
        assert np.array_equal(found, expected)


def test_every_number_is_stored_once(tiny_bundle: bundle.Bundle, tiny_vae: MultimodalVAE) -> None:
    weights = tiny_bundle.path / bundle.WEIGHTS
    stated = sum(p.numel() for p in tiny_vae.parameters()) * 4
    assert stated < weights.stat().st_size < stated + 20_000
    shared = 0
    for file in tiny_bundle.path.glob("*.onnx"):
        assert file.stat().st_size < 300_000
        for tensor in onnx.load(file, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = {entry.key: entry.value for entry in tensor.external_data}
                assert place["location"] == bundle.WEIGHTS
                assert int(place["offset"]) + int(place["length"]) <= weights.stat().st_size
                shared += 1
            else:
                assert onnx.numpy_helper.to_array(tensor).nbytes <= INLINE_BYTES
    assert shared > 20


def test_the_manifest_says_what_the_model_is(tiny_bundle: bundle.Bundle, tiny_vae: MultimodalVAE) -> None:
    manifest = tiny_bundle.manifest
    assert tuple(manifest.modalities) == tiny_vae.modalities
    assert (manifest.latent, manifest.beta, manifest.weights) == (tiny_vae.latent, tiny_vae.beta, tiny_vae.weights)
    assert (manifest.refinement.samples, manifest.refinement.horizon) == (2, 3)


def test_golden_examples_cover_every_subset(tiny_bundle: bundle.Bundle) -> None:
    with np.load(tiny_bundle.path / bundle.GOLDEN) as golden:
        assert {tuple(mask) for mask in golden["present"].tolist()} == set(SUBSETS)
        complete = golden["present"].all(1)
        assert np.all(golden["anchor_mean"][complete] == 0)
        assert np.array_equal(golden["anchor_mean"][~complete], golden["mean"][~complete])
        assert any(np.abs(golden[f"input.{name}"][~golden["present"][:, 0]]).max() > 0 for name in ("image",))


def test_awkward_sizes_export(tmp_path: Path, tiny_facts: dict[str, Any], make_vae, make_rows) -> None:
    """Layers whose axes equal the batch that is traced, odd pictures, an alphabet whose one-hot codes are no small constant."""
    letters = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 300))
    modalities = (
        ImageModality(name="square", channels=1, height=24, width=24, likelihood="bernoulli"),
        ImageModality(name="oblong", channels=3, height=13, width=7, likelihood="gaussian"),
        TextModality(name="sign", length=9, alphabet=letters, likelihood="shifted"),
    )
    vae = make_vae(modalities, width=2)
    examples = make_rows(modalities, 7)
    opened = export_bundle(vae, tmp_path / "b", facts=tiny_facts, samples=4, horizon=1, examples=examples, card="")
    assert opened.manifest.format == 2
    assert not any(b".py" in graph.read_bytes() for graph in (tmp_path / "b").glob("*.onnx"))  # no path of this machine
    runtime = Runtime(opened, threads=1)
    for rows in (1, 2, 3, 16):
        assert parity(vae, runtime, make_rows(modalities, rows, seed=rows)) <= PARITY_TOLERANCE


def test_the_kinds_of_the_second_format_export(tmp_path: Path, tiny_facts: dict[str, Any], make_vae, make_rows) -> None:
    modalities = (
        ImageModality(name="scan", channels=2, height=8, width=8),
        TextModality(name="title", length=5, unit="word", vocabulary=tuple(f"w{n}" for n in range(300))),
        TextModality(name="code", length=2, alphabet=" ab\ufffd", too_long="cut"),
        CategoricalModality(name="brand", classes=("a", "b", "c")),
    )
    vae = make_vae(modalities, width=2)
    examples = make_rows(modalities, 15)
    opened = export_bundle(vae, tmp_path / "b", facts=tiny_facts, samples=2, horizon=1, examples=examples, card="")
    assert opened.manifest.format == 2
    assert tuple(opened.manifest.modalities) == modalities
    runtime = Runtime(opened, threads=1)
    for rows in (1, 3, 16):
        arrays = make_rows(modalities, rows, seed=rows)
        assert parity(vae, runtime, arrays) <= PARITY_TOLERANCE
        z = torch.randn(rows, vae.latent)
        for modality in modalities:
            assert difference(runtime.decode(modality.name, z.numpy()), vae.decode(modality.name, z)) <= PARITY_TOLERANCE
    present = np.array([[True, False, False, False]] * 16)
    encoded = runtime.encode(numbers(arrays), present)
    arrays |= {name: torch.full_like(arrays[name], 10**9) for name in ("title", "code", "brand")}
    assert np.array_equal(runtime.encode(numbers(arrays), present).mean, encoded.mean)


def test_golden_examples_of_many_modalities_have_subsets_of_every_size(make_vae, make_rows) -> None:
    modalities = tuple(VectorModality(name=f"v{n}", size=1) for n in range(8))
    present = golden_examples(make_vae(modalities), make_rows(modalities, 64), 2)["present"]
    assert len(np.unique(present, axis=0)) == 64
    assert set(present.sum(1)) >= {1, 2, 3, 4, 5, 6, 8}
    assert np.all((present.mean(0) > 0.3) & (present.mean(0) < 0.7))


@pytest.fixture
def plain(make_vae, make_rows, tiny_facts: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an export that takes little time."""
    examples = make_rows(PLAIN, 3)
    return {"vae": make_vae(PLAIN), "facts": tiny_facts, "samples": 2, "horizon": 1, "examples": examples, "card": "# plain"}


def test_graphs_that_differ_from_the_model_are_not_written(
    tmp_path: Path, plain: dict[str, Any], tiny_bundle: bundle.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "b")
    honest = export.golden_examples

    def after_a_change(vae: MultimodalVAE, *rest: Any) -> dict[str, Any]:
        vae.decoders["first"][0].weight.add_(0.01)  # between the graphs, which are written, and the golden answers
        return honest(vae, *rest)

    monkeypatch.setattr(export, "golden_examples", after_a_change)
    with pytest.raises(ExportError, match="differ"):
        export_bundle(path=tmp_path / "b", **plain)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert bundle.read(tmp_path / "b").sha256 == tiny_bundle.sha256


def test_a_bundle_already_there_is_replaced(tmp_path: Path, plain: dict[str, Any], tiny_bundle: bundle.Bundle) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "b")
    newer = export_bundle(path=tmp_path / "b", **plain)
    assert [m.name for m in newer.manifest.modalities] == ["first", "second"]
    assert bundle.read(tmp_path / "b") == newer
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert not (tmp_path / "b" / "decode-image.onnx").exists()
    assert (newer.path / bundle.CARD).read_text() == "# plain"


def test_the_card_and_the_manifest_are_plain_text(tiny_bundle: bundle.Bundle) -> None:
    assert json.loads((tiny_bundle.path / bundle.MANIFEST).read_text())["format"] == 1  # what every reader knows
    assert (tiny_bundle.path / bundle.CARD).read_text() == "# tiny\n"

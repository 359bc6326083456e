"""Export: graphs equal the model, weights are stored once, and a bundle is written only if both hold."""

import copy
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

from concord.model import bundle
from concord.model.bundle.manifest import GRAPH_VALUES, graph_input
from concord.model.modality import CategoricalModality, ImageModality, TextModality, VectorModality
from concord.model.runtime import Posterior, Runtime
from concord.model.runtime.branch_absent import branch_absent
from concord.model.runtime.skip_absent import skip_absent
from concord.model.vae import export
from concord.model.vae.export import PARITY_TOLERANCE, ExportError, export_bundle
from concord.model.vae.export.golden import golden_examples, parity
from concord.model.vae.export.onnx_functions import INLINE_BYTES
from concord.model.vae.gaussian import Gaussian, sample
from concord.model.vae.multimodal import MultimodalVAE

pytestmark = pytest.mark.slow
SUBSETS = [mask for mask in itertools.product([True, False], repeat=4) if any(mask)]
TWO_VECTORS = (
    VectorModality(name="noise", size=3),
    VectorModality(name="training", size=2),
)  # names that PyTorch and the graphs use


@pytest.fixture(scope="module")
def runtime(tiny_bundle: bundle.Bundle) -> Runtime:
    return Runtime(tiny_bundle, threads=1)


def numbers(arrays: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: x.numpy() for name, x in arrays.items()}


def difference(actual: np.ndarray, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value (at least 1)."""
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected.numpy()).max() / max(1.0, expected.abs().max().item()))


def random_posteriors(rows: int, vae: MultimodalVAE, samples: int = 2) -> tuple[Gaussian, Gaussian, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    posteriors = [Gaussian(*(0.5 * torch.randn(rows, vae.latent, generator=generator) for _ in range(2))) for _ in range(2)]
    return *posteriors, torch.randn(rows, samples, vae.latent, generator=generator)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("subset", SUBSETS, ids=lambda mask: "".join("01"[bit] for bit in mask))
def test_exported_graphs_equal_the_model_for_every_subset(
    tiny_vae: MultimodalVAE, runtime: Runtime, make_rows, subset: tuple[bool, ...], rows: int
) -> None:
    arrays, present = make_rows(tiny_vae.modalities, rows, seed=rows), torch.tensor([subset] * rows)
    encoded, expected = runtime.encode(numbers(arrays), present.numpy()), tiny_vae.aligned(arrays, present)
    assert difference(encoded.mean, expected.mean) <= PARITY_TOLERANCE
    assert difference(encoded.log_var, expected.log_var) <= PARITY_TOLERANCE
    q, anchor, noise = random_posteriors(rows, tiny_vae)
    after, objective = runtime.refine(
        numbers(arrays), present.numpy(), *(Posterior(g.mean.numpy(), g.log_var.numpy()) for g in (q, anchor)), noise.numpy()
    )
    refined, value = tiny_vae.refine_step(arrays, present, q, anchor, noise)
    assert difference(after.mean, refined.mean) <= PARITY_TOLERANCE
    assert difference(after.log_var, refined.log_var) <= PARITY_TOLERANCE
    assert difference(objective, value) <= PARITY_TOLERANCE


@pytest.fixture(scope="module")
def flow_vae(tiny_modalities, make_vae) -> MultimodalVAE:
    return make_vae(tiny_modalities, couplings=3, spread=0.6)


@pytest.fixture(scope="module")
def flow_bundle(
    flow_vae: MultimodalVAE, make_rows, tiny_facts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> bundle.Bundle:
    path, examples = tmp_path_factory.mktemp("flow") / "b", make_rows(flow_vae.modalities, 15)
    return export_bundle(flow_vae, path, facts=tiny_facts, samples=2, horizon=3, examples=examples, card="")


def test_export_with_flow_samples_through_the_flow(flow_vae: MultimodalVAE, flow_bundle: bundle.Bundle, make_rows) -> None:
    vae, runtime = copy.deepcopy(flow_vae), Runtime(flow_bundle, threads=1)
    q, _, noise = random_posteriors(4, vae)
    assert (vae.sample(q, noise) - sample(q, noise)).abs().max() > 0.01
    assert (flow_bundle.manifest.format, flow_bundle.manifest.graphs.draw) == (3, "draw.onnx")
    for rows in (1, 3, 16):
        q, _, noise = random_posteriors(rows, vae, samples=1)
        z = runtime.sample(Posterior(q.mean.numpy(), q.log_var.numpy()), noise[:, 0].numpy())
        assert difference(z, vae.sample(q, noise)[:, 0]) <= PARITY_TOLERANCE
        arrays = make_rows(vae.modalities, rows, seed=rows)
        assert parity(vae, runtime, arrays) <= PARITY_TOLERANCE
    for weight in vae.flow.parameters():
        weight.data *= 1.1
    assert parity(vae, runtime, arrays) > PARITY_TOLERANCE, "parity must compare samples too"


def test_replay_golden_different_samples_raise(flow_bundle: bundle.Bundle) -> None:
    runtime = Runtime(flow_bundle, threads=1)
    runtime.replay_golden(PARITY_TOLERANCE)
    runtime._sample = None
    with pytest.raises(bundle.BundleError, match="golden examples differ"):
        runtime.replay_golden(PARITY_TOLERANCE)


def test_export_without_flow_samples_the_gaussian(
    tiny_vae: MultimodalVAE, tiny_bundle: bundle.Bundle, runtime: Runtime
) -> None:
    q, _, noise = random_posteriors(5, tiny_vae, samples=1)
    z = runtime.sample(Posterior(q.mean.numpy(), q.log_var.numpy()), noise[:, 0].numpy())
    assert difference(z, sample(q, noise)[:, 0]) <= PARITY_TOLERANCE
    assert tiny_bundle.manifest.format < 3
    manifest = json.loads((tiny_bundle.path / bundle.MANIFEST).read_text())
    assert "draw" not in manifest["graphs"], "older versions would reject the field"


def test_export_product_encoder_equals_model_and_skips_absent_modalities(
    tiny_modalities, make_vae, make_rows, tiny_facts: dict[str, Any], tmp_path: Path
) -> None:
    modalities = tiny_modalities[:2]
    vae, examples = make_vae(modalities, fusion="product"), make_rows(modalities, 15)
    exported = export_bundle(vae, tmp_path / "b", facts=tiny_facts, samples=2, horizon=3, examples=examples, card="")
    runtime = Runtime(exported, threads=1)
    for rows in (1, 3, 16):
        assert parity(vae, runtime, make_rows(modalities, rows, seed=rows)) <= PARITY_TOLERANCE
        for subset in ((True, False), (False, True), (True, True), (False, False)):
            arrays, present = make_rows(modalities, rows, seed=1), torch.tensor([subset] * rows)
            encoded, expected = runtime.encode(numbers(arrays), present.numpy()), vae.aligned(arrays, present)
            assert difference(encoded.mean, expected.mean) <= PARITY_TOLERANCE
            assert difference(encoded.log_var, expected.log_var) <= PARITY_TOLERANCE
    names = [m.name for m in modalities]
    graph = onnx.load_model_from_string(skip_absent(exported.content(exported.manifest.graphs.encode), names)).graph
    assert sum(node.op_type == "Compress" for node in graph.node) == len(names)


def test_graphs_use_operators_of_opset_18_and_name_the_batch_axis(tiny_bundle: bundle.Bundle) -> None:
    graphs = [onnx.load_model_from_string(tiny_bundle.content(f)) for f in tiny_bundle.manifest.files if f.endswith(".onnx")]
    assert len(graphs) == 2 + len(tiny_bundle.manifest.modalities)
    for model in graphs:
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
        for node in model.graph.node:
            assert onnx.defs.get_schema(node.op_type, 18, node.domain).since_version <= 18
        for value in (*model.graph.input, *model.graph.output):
            assert value.type.tensor_type.shape.dim[0].dim_param == "batch", value.name


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_exported_decoders_equal_the_model(tiny_vae: MultimodalVAE, runtime: Runtime, rows: int) -> None:
    z = torch.randn(rows, tiny_vae.latent)
    for modality in tiny_vae.modalities:
        assert difference(runtime.decode(modality.name, z.numpy()), tiny_vae.decode(modality.name, z)) <= PARITY_TOLERANCE


@pytest.mark.parametrize("filler", [float("nan"), float("inf"), 1e30])
def test_exported_graphs_filler_of_absent_modalities_has_no_effect(
    tiny_vae: MultimodalVAE, runtime: Runtime, make_rows, filler: float
) -> None:
    rows = len(SUBSETS)
    arrays, present = numbers(make_rows(tiny_vae.modalities, rows)), np.array(SUBSETS)
    filled = {}
    for m, (name, x) in enumerate(arrays.items()):
        filled[name] = x.copy()
        filled[name][~present[:, m]] = 10**9 if x.dtype == np.int64 else filler
    q, anchor, noise = random_posteriors(rows, tiny_vae)
    start, anchor = (Posterior(g.mean.numpy(), g.log_var.numpy()) for g in (q, anchor))
    outputs = []
    for inputs in (arrays, filled):
        encoded = runtime.encode(inputs, present)
        refined, objective = runtime.refine(inputs, present, start, anchor, noise.numpy())
        outputs.append((encoded.mean, encoded.log_var, refined.mean, refined.log_var, objective))
    for expected, actual in zip(*outputs, strict=True):
        assert np.array_equal(actual, expected)


def test_export_stores_every_weight_once(tiny_bundle: bundle.Bundle, tiny_vae: MultimodalVAE) -> None:
    weights = tiny_bundle.path / bundle.WEIGHTS
    parameter_bytes = sum(p.numel() for p in tiny_vae.parameters()) * 4
    assert parameter_bytes < weights.stat().st_size < parameter_bytes + 20_000
    shared = 0
    for file in tiny_bundle.path.glob("*.onnx"):
        assert file.stat().st_size < 300_000
        for tensor in onnx.load(file, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                reference = {entry.key: entry.value for entry in tensor.external_data}
                assert reference["location"] == bundle.WEIGHTS
                assert int(reference["offset"]) + int(reference["length"]) <= weights.stat().st_size
                shared += 1
            else:
                assert onnx.numpy_helper.to_array(tensor).nbytes <= INLINE_BYTES
    assert shared > 20


def test_export_manifest_describes_the_model(tiny_bundle: bundle.Bundle, tiny_vae: MultimodalVAE) -> None:
    manifest = tiny_bundle.manifest
    assert tuple(manifest.modalities) == tiny_vae.modalities
    assert (manifest.latent, manifest.beta, manifest.weights) == (tiny_vae.latent, tiny_vae.beta, tiny_vae.weights)
    assert (manifest.refinement.samples, manifest.refinement.horizon) == (2, 3)


def test_golden_examples_have_every_subset(tiny_bundle: bundle.Bundle) -> None:
    with np.load(tiny_bundle.path / bundle.GOLDEN) as golden:
        assert {tuple(mask) for mask in golden["present"].tolist()} == set(SUBSETS)
        complete = golden["present"].all(1)
        assert np.all(golden["anchor_mean"][complete] == 0)
        assert np.array_equal(golden["anchor_mean"][~complete], golden["mean"][~complete])
        assert any(np.abs(golden[f"input.{name}"][~golden["present"][:, 0]]).max() > 0 for name in ("image",))


def test_export_unusual_sizes_equal_the_model(tmp_path: Path, tiny_facts: dict[str, Any], make_vae, make_rows) -> None:
    """Layers with axes of the traced batch size, images of odd sizes, an alphabet whose one-hot table is large."""
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
    assert not any(b".py" in graph.read_bytes() for graph in (tmp_path / "b").glob("*.onnx"))  # no paths of this machine
    runtime = Runtime(opened, threads=1)
    for rows in (1, 2, 3, 16):
        assert parity(vae, runtime, make_rows(modalities, rows, seed=rows)) <= PARITY_TOLERANCE


@pytest.mark.parametrize("blocks", [0, 2])
def test_export_of_pictures_with_blocks_and_every_likelihood_equals_the_model(
    tmp_path: Path, tiny_facts: dict[str, Any], make_vae, make_rows, blocks: int
) -> None:
    """Subsets of each size are in the golden examples, and in the rows below."""
    modalities: tuple[ImageModality, ...] = (
        ImageModality(name="oblong", channels=3, height=13, width=7, likelihood="logistic_mixture", components=2),
        ImageModality(name="square", channels=1, height=16, width=16, likelihood="bernoulli"),
        ImageModality(name="photo", channels=3, height=9, width=12, likelihood="laplace", learned_scale="channel"),
        ImageModality(name="scan", channels=2, height=8, width=8, likelihood="gaussian", learned_scale="modality", scale=0.2),
    )
    if blocks:
        modalities = (modalities[0], modalities[-1])  # the likelihoods do not depend on the blocks, which take long to trace
    vae = make_vae(modalities, width=4, blocks=blocks)
    examples = make_rows(modalities, 15)
    opened = export_bundle(vae, tmp_path / "b", facts=tiny_facts, samples=2, horizon=1, examples=examples, card="")
    assert tuple(opened.manifest.modalities) == modalities
    assert opened.manifest.format == 7
    assert {entry.version for file in (tmp_path / "b").glob("*.onnx") for entry in onnx.load(file).opset_import} == {18}
    runtime = Runtime(opened, threads=1)
    for rows in (1, 3, 64):
        assert parity(vae, runtime, make_rows(modalities, rows, seed=rows)) <= PARITY_TOLERANCE
        z = torch.randn(rows, vae.latent)
        for modality in modalities:
            assert difference(runtime.decode(modality.name, z.numpy()), vae.decode(modality.name, z)) <= PARITY_TOLERANCE
    present = np.array([[True, *[False] * (len(modalities) - 1)]] * 64)
    arrays = make_rows(modalities, 64)
    encoded = runtime.encode(numbers(arrays), present)
    arrays |= {modality.name: torch.full_like(arrays[modality.name], torch.nan) for modality in modalities[1:]}
    assert np.array_equal(runtime.encode(numbers(arrays), present).mean, encoded.mean)
    alone = runtime.encode({name: x[:1] for name, x in numbers(arrays).items()}, present[:1])
    assert difference(alone.mean, torch.from_numpy(encoded.mean[:1])) <= PARITY_TOLERANCE


def test_export_kinds_of_format_2_equal_the_model(tmp_path: Path, tiny_facts: dict[str, Any], make_vae, make_rows) -> None:
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


def test_golden_examples_many_modalities_have_subsets_of_every_size(make_vae, make_rows) -> None:
    modalities = tuple(VectorModality(name=f"v{n}", size=1) for n in range(8))
    present = golden_examples(make_vae(modalities), make_rows(modalities, 64), 2)["present"]
    assert len(np.unique(present, axis=0)) == 64
    assert set(present.sum(1)) >= {1, 2, 3, 4, 5, 6, 8}
    assert np.all((present.mean(0) > 0.3) & (present.mean(0) < 0.7))


@pytest.fixture
def arguments(make_vae, make_rows, tiny_facts: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a fast export."""
    examples = make_rows(TWO_VECTORS, 3)
    return {
        "vae": make_vae(TWO_VECTORS),
        "facts": tiny_facts,
        "samples": 2,
        "horizon": 1,
        "examples": examples,
        "card": "# two vectors",
    }


def test_export_graphs_that_differ_from_the_model_raise_and_write_nothing(
    tmp_path: Path, arguments: dict[str, Any], tiny_bundle: bundle.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "b")
    original = export.golden_examples

    def change_weights_first(vae: MultimodalVAE, *rest: Any) -> dict[str, Any]:
        vae.decoders["noise"][0].weight.add_(0.01)  # after the graphs are made, before the golden examples
        return original(vae, *rest)

    monkeypatch.setattr(export, "golden_examples", change_weights_first)
    with pytest.raises(ExportError, match="differ"):
        export_bundle(path=tmp_path / "b", **arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert bundle.read(tmp_path / "b").sha256 == tiny_bundle.sha256


def test_export_replaces_an_existing_bundle(tmp_path: Path, arguments: dict[str, Any], tiny_bundle: bundle.Bundle) -> None:
    """Its modalities have names that the graphs use, which needs the newest format."""
    shutil.copytree(tiny_bundle.path, tmp_path / "b")
    exported = export_bundle(path=tmp_path / "b", **arguments)
    assert [m.name for m in exported.manifest.modalities] == ["noise", "training"]
    assert bundle.read(tmp_path / "b") == exported
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert not (tmp_path / "b" / "decode-image.onnx").exists()
    assert (exported.path / bundle.CARD).read_text() == "# two vectors"
    assert exported.manifest.format == 4
    graph = onnx.load(exported.path / "refine.onnx", load_external_data=False).graph
    assert [value.name for value in graph.input[:3]] == ["input.noise", "training", "present"]
    assert any(node.op_type == "If" for node in onnx.load_from_string(optimised(exported)).graph.node)


def test_exported_graphs_have_no_value_that_a_modality_could_be_named_after(tiny_bundle: bundle.Bundle) -> None:
    """Names of modalities are lower-case letters, digits and _."""
    modalities = {m.name for m in tiny_bundle.manifest.modalities}
    for file in tiny_bundle.manifest.graphs.names:
        graph = onnx.load(tiny_bundle.path / file, load_external_data=False).graph
        values = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
        values |= {name for node in graph.node for name in node.output}
        own = GRAPH_VALUES if file.startswith(("encode", "refine")) else {"z", "value", "mean", "log_var", "noise"}
        assert all("." in name for name in values - modalities - own)


def optimised(exported: bundle.Bundle) -> bytes:
    """The refine graph as it runs on a CPU, without the decoders of absent modalities."""
    names = [graph_input(m.name) for m in exported.manifest.modalities]
    return branch_absent(exported.content("refine.onnx"), exported.content(bundle.WEIGHTS), names)


def test_export_card_and_manifest_are_readable_text(tiny_bundle: bundle.Bundle) -> None:
    assert json.loads((tiny_bundle.path / bundle.MANIFEST).read_text())["format"] == 1  # readable by every version
    assert (tiny_bundle.path / bundle.CARD).read_text() == "# tiny\n"

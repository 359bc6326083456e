"""Graph pass ``branch_absent``: the outputs stay the same, and decoders of modalities that no row has do not run."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from concord.model import bundle
from concord.model.runtime.branch_absent import CONVOLUTION_AXES, branch_absent
from concord.model.runtime.refinement_table import table, with_tables

OUTPUTS = ["next_mean", "next_log_var", "objective"]
BUNDLES = (pytest.param("tiny", marks=pytest.mark.slow), "digits", "digits-sound", "birds")


@pytest.fixture(params=BUNDLES, scope="module")
def opened(request: pytest.FixtureRequest) -> bundle.Bundle:
    if request.param == "tiny":
        tiny: bundle.Bundle = request.getfixturevalue("tiny_bundle")
        return tiny
    return bundle.read(bundle.builtin(request.param))


@pytest.fixture(scope="module")
def branched(opened: bundle.Bundle) -> bytes:
    content = opened.content(opened.manifest.graphs.refine)
    changed = branch_absent(content, opened.content(bundle.WEIGHTS), names(opened))
    assert changed != content
    return changed


def names(opened: bundle.Bundle) -> list[str]:
    return [m.name for m in opened.manifest.modalities]


def session(opened: bundle.Bundle, content: bytes, profile: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    weights = opened.content(bundle.WEIGHTS)
    options.add_external_initializers_from_files_in_memory([bundle.WEIGHTS], [weights], [len(weights)])
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def feed(make_rows: Any, opened: bundle.Bundle, present: np.ndarray) -> dict[str, Any]:
    inputs = make_rows(opened.manifest.modalities, len(present))
    generator, latent = np.random.default_rng(0), opened.manifest.latent
    shape = {"noise": (opened.manifest.refinement.samples, latent)}
    parts = ("mean", "log_var", "anchor_mean", "anchor_log_var", "noise")
    posteriors = {p: generator.normal(size=(len(present), *shape.get(p, (latent,)))).astype(np.float32) for p in parts}
    return {**{name: values.numpy() for name, values in inputs.items()}, "present": present, **posteriors}


def test_branch_absent_outputs_stay_the_same_for_every_subset(opened: bundle.Bundle, branched: bytes, make_rows: Any) -> None:
    before, after = session(opened, opened.content(opened.manifest.graphs.refine)), session(opened, branched)
    subsets = [np.array(mask) for mask in product([False, True], repeat=len(names(opened))) if any(mask)]
    for present in [*(np.tile(subset, (rows, 1)) for subset in subsets for rows in (1, 3)), np.stack(subsets)]:
        inputs = feed(make_rows, opened, present)
        for expected, actual in zip(before.run(OUTPUTS, inputs), after.run(OUTPUTS, inputs), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_branch_absent_decoders_of_absent_modalities_do_not_run(
    opened: bundle.Bundle, branched: bytes, make_rows: Any, tmp_path: Path
) -> None:
    """Counts the convolutions and matrix products that run, from ONNX Runtime's profile."""
    expensive = ("Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedGemm")
    count = len(names(opened))

    def kernels(present: list[bool]) -> int:
        profiled = session(opened, branched, tmp_path / "profile")
        profiled.run(OUTPUTS, feed(make_rows, opened, np.array([present])))
        events = json.loads(Path(profiled.end_profiling()).read_text())
        return sum(e.get("args", {}).get("op_name") in expensive for e in events if e["name"].endswith("kernel_time"))

    unimodal = [kernels([column == modality for column in range(count)]) for modality in range(count)]
    shared = (sum(unimodal) - kernels([True] * count)) / (count - 1)  # those of the refiner, which always runs
    assert shared.is_integer()
    assert 0 < shared < min(unimodal)


def test_branch_absent_reads_only_the_tables_of_modalities_that_a_row_has(opened: bundle.Bundle) -> None:
    """The rows of absent modalities are not even copied: reading their table is a node of their branch."""
    content = with_tables(opened.content(opened.manifest.graphs.refine))
    tables = [table(name) for name in names(opened)]
    branched = onnx.load_model_from_string(branch_absent(content, opened.content(bundle.WEIGHTS), tables))
    outside = {tensor for node in branched.graph.node for tensor in node.input}
    assert not outside.intersection(tables)
    branches = {
        tensor for node in branched.graph.node for branch in node.attribute for inner in branch.g.node for tensor in inner.input
    }
    assert branches.issuperset(tables)


def test_branch_absent_branches_hold_the_weights_of_convolutions_only(branched: bytes) -> None:
    """Weights in a branch are kept three times."""
    graph = onnx.load_model_from_string(branched).graph
    inside = [tensor for node in graph.node for branch in node.attribute for tensor in branch.g.initializer]
    assert all(len(tensor.dims) >= CONVOLUTION_AXES and tensor.raw_data for tensor in inside)
    constant = {tensor.name for tensor in (*inside, *graph.initializer)}
    readers = [n for n in (*graph.node, *(m for o in graph.node for a in o.attribute for m in a.g.node)) if "Conv" in n.op_type]
    assert inside or not readers
    assert all(node.input[1] not in constant or node.input[1] in {tensor.name for tensor in inside} for node in readers)


def test_branch_absent_inseparable_modalities_return_the_graph_unchanged() -> None:
    """The first node reads both modalities."""
    nodes = [
        helper.make_node("Mul", ["x", "y"], ["both"]),
        helper.make_node("ReduceSum", ["both"], ["objective"], keepdims=1),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 5]) for name in ("x", "y")]
    inputs.append(helper.make_tensor_value_info("present", TensorProto.BOOL, ["batch", 2]))
    inputs.append(helper.make_tensor_value_info("noise", TensorProto.FLOAT, ["batch", 4, 6]))
    output = helper.make_tensor_value_info("objective", TensorProto.FLOAT, [1, 1])
    content = helper.make_model(helper.make_graph(nodes, "graph", inputs, [output])).SerializeToString()
    assert branch_absent(content, b"", ["x", "y"]) == content

"""Bundles of any modalities with hand-written graphs. They are made in milliseconds; an export takes half a minute."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import save_file

from concord.model import bundle
from concord.model.encoder import EncoderFiles
from concord.model.modality import AudioModality, CategoricalModality, ImageModality, Modality, TextModality, VectorModality

LATENT = 6
SAMPLES = 2
_OPSET = 18
_RNG = np.random.default_rng(0)


def write_bundle(
    path: Path,
    modalities: Sequence[Modality],
    facts: dict[str, Any],
    rows: int = 9,
    encoders: Sequence[EncoderFiles] = (),
) -> bundle.Bundle:
    """Write a bundle whose encoders and decoders are random projections. A refinement step halves the mean.

    Args:
        facts: the manifest's ``name``, ``version``, ``provenance`` and ``metrics``.
        rows: number of golden examples, with random inputs.
        encoders: frozen encoders that the modalities name.
    """
    decode = {m.name: f"decode-{m.name}.onnx" for m in modalities}
    graphs = {"encode.onnx": _encode(modalities), "refine.onnx": _refine(modalities)}
    graphs |= {decode[m.name]: _decode(m) for m in modalities}
    folder = path.parent / f"{path.name}-files"
    folder.mkdir()
    for name, graph in graphs.items():
        onnx.save(graph, folder / name)
    save_file({"none": np.zeros(1, np.float32)}, folder / bundle.WEIGHTS)
    described = {files.name: files.in_bundle() for files in encoders}
    for files in encoders:
        shutil.copy(files.graph, folder / described[files.name].graph)
        if files.tokenizer is not None:
            shutil.copy(files.tokenizer, folder / str(described[files.name].tokenizer))
    np.savez(folder / bundle.GOLDEN, **_golden(modalities, graphs, rows), **_golden_files(encoders))
    manifest = {
        **facts,
        "modalities": [m.model_dump() for m in modalities],
        "latent": LATENT,
        "beta": 1.0,
        "weights": {m.name: 1.0 for m in modalities},
        "graphs": {"encode": "encode.onnx", "refine": "refine.onnx", "decode": decode},
        "refinement": {"samples": SAMPLES, "horizon": 1},
        "encoders": {name: encoder.model_dump(mode="json") for name, encoder in described.items()},
    }
    return bundle.write(path, manifest, sorted(folder.iterdir()), f"# {facts['name']}\n")


def _golden_files(encoders: Sequence[EncoderFiles]) -> dict[str, NDArray[Any]]:
    if not encoders:
        return {}
    from concord.model.vae.export.golden import golden_files  # noqa: PLC0415 - imports torch, which most bundles do without

    return golden_files(encoders)


def _encode(modalities: Sequence[Modality]) -> onnx.ModelProto:
    """Each present modality adds its projection to the mean and subtracts 0.3 from the log variance."""
    log_var_terms = np.full((len(modalities), LATENT), -0.3, np.float32)
    nodes, constants = [], {"zero": np.zeros((), np.float32), "log_var_terms": log_var_terms}
    for column, modality in enumerate(modalities):
        name, size = modality.name, int(np.prod(modality.shape))
        scale = np.float32(1 / modality.categories) if modality.dtype is np.int64 else np.float32(1)  # indices may be large
        constants |= {f"{name}.projection": scale * _projection(size, LATENT), f"{name}.column": np.array([column])}
        nodes += [
            helper.make_node("Cast", [name], [f"{name}.float"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", [f"{name}.float"], [f"{name}.flat"]),
            helper.make_node("MatMul", [f"{name}.flat", f"{name}.projection"], [f"{name}.projected"]),
            helper.make_node("Gather", ["present", f"{name}.column"], [f"{name}.present"], axis=1),
            helper.make_node("Where", [f"{name}.present", f"{name}.projected", "zero"], [f"{name}.term"]),
        ]
    nodes += [
        helper.make_node("Sum", [f"{m.name}.term" for m in modalities], ["mean"]),
        helper.make_node("Cast", ["present"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["mask", "log_var_terms"], ["log_var"]),
    ]
    return _model(nodes, [*_inputs(modalities)], {"mean": [LATENT], "log_var": [LATENT]}, constants)


def _refine(modalities: Sequence[Modality]) -> onnx.ModelProto:
    constants = {"half": np.array(0.5, np.float32), "axis": np.array([1])}
    nodes = [
        helper.make_node("Mul", ["mean", "half"], ["next_mean"]),
        helper.make_node("Identity", ["log_var"], ["next_log_var"]),
        helper.make_node("ReduceL1", ["mean", "axis"], ["distance"], keepdims=0),
        helper.make_node("Neg", ["distance"], ["objective"]),
    ]
    posterior = {name: [LATENT] for name in ("mean", "log_var", "anchor_mean", "anchor_log_var")}
    rest = [_tensor(name, shape) for name, shape in {**posterior, "noise": [SAMPLES, LATENT]}.items()]
    return _model(
        nodes, [*_inputs(modalities), *rest], {"next_mean": [LATENT], "next_log_var": [LATENT], "objective": []}, constants
    )


def _decode(modality: Modality) -> onnx.ModelProto:
    shape, activation = [*modality.shape], "Sigmoid"
    if isinstance(modality, TextModality):
        shape, activation = [modality.length, modality.categories], "LogSoftmax"
    elif isinstance(modality, CategoricalModality):
        shape, activation = [modality.categories], "Softmax"
    elif isinstance(modality, VectorModality):
        activation = "Identity"
    constants = {"projection": _projection(LATENT, int(np.prod(shape))), "shape": np.array([-1, *shape])}
    nodes = [
        helper.make_node("MatMul", ["z", "projection"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["raw"]),
        helper.make_node(activation, ["raw"], ["value"]),
    ]
    return _model(nodes, [_tensor("z", [LATENT])], {"value": shape}, constants)


def _golden(modalities: Sequence[Modality], graphs: dict[str, onnx.ModelProto], rows: int) -> dict[str, NDArray[Any]]:
    inputs = {m.name: _values(m, rows) for m in modalities}
    present = np.ones((rows, len(modalities)), dtype=bool)
    mean, log_var = ReferenceEvaluator(graphs["encode.onnx"]).run(None, {**inputs, "present": present})
    posterior = {"mean": mean, "log_var": log_var, "anchor_mean": 0 * mean, "anchor_log_var": 0 * mean}
    noise = np.zeros((rows, SAMPLES, LATENT), np.float32)
    step = {**inputs, "present": present, **posterior, "noise": noise}
    refined = ReferenceEvaluator(graphs["refine.onnx"]).run(None, step)
    return {
        **{f"input.{name}": array for name, array in inputs.items()},
        "present": present,
        "noise": noise,
        **posterior,
        **dict(zip(("next_mean", "next_log_var", "objective"), refined, strict=True)),
        **{
            f"value.{m.name}": ReferenceEvaluator(graphs[f"decode-{m.name}.onnx"]).run(None, {"z": mean})[0] for m in modalities
        },
    }


def _values(modality: Modality, rows: int) -> NDArray[Any]:
    shape = (rows, *modality.shape)
    if isinstance(modality, TextModality | CategoricalModality):
        return _RNG.integers(modality.categories, size=shape)
    if isinstance(modality, ImageModality | AudioModality):
        return _RNG.random(shape, np.float32)
    return (
        _RNG.standard_normal(shape, np.float32)
        if isinstance(modality, VectorModality)
        else np.rint(_RNG.random(shape, np.float32))
    )


def _projection(rows: int, columns: int) -> NDArray[np.float32]:
    return _RNG.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(rows))


def _inputs(modalities: Sequence[Modality]) -> list[onnx.ValueInfoProto]:
    arrays = [_tensor(m.name, [*m.shape], TensorProto.INT64 if m.dtype is np.int64 else TensorProto.FLOAT) for m in modalities]
    return [*arrays, _tensor("present", [len(modalities)], TensorProto.BOOL)]


def _tensor(name: str, shape: Sequence[int], dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, ["batch", *shape])


def _model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: dict[str, list[int]],
    constants: dict[str, NDArray[Any]],
) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "graph", inputs, [_tensor(name, shape) for name, shape in outputs.items()], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=10)

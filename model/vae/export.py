"""From a trained model to a bundle: graphs, shared weights, golden examples, parity check."""

import json
import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from numpy.typing import NDArray
from onnxscript import optimizer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from model import bundle
from model.runtime import Posterior, Runtime
from model.vae.gaussian import Gaussian, antithetic, served_anchor
from model.vae.multimodal import MultimodalVAE
from model.vae.tracing import MAX_BATCH, trace

Arrays = Mapping[str, Tensor]
PARITY_TOLERANCE = 1e-4  # relative to the largest value of an answer
INLINE_BYTES = 1024  # smaller tensors stay in their graph
SUBSET_STRIDE = 101  # divides 2^M - 1 for no M up to 8, so that steps of it meet every subset

for library in ("onnxscript", "onnx_ir"):  # they tell of every constant and function that they leave alone
    logging.getLogger(library).setLevel(logging.ERROR)


class ExportError(Exception):
    """A graph that does not compute what the model computes. Nothing was written."""


def export_bundle(
    vae: MultimodalVAE,
    path: Path,
    *,
    facts: Mapping[str, Any],
    samples: int,
    horizon: int,
    examples: Arrays,
    card: str,
    landmarks: Mapping[str, NDArray[Any]] | None = None,
    pictures: Sequence[Path] = (),
) -> bundle.Bundle:
    """Write the model as a bundle; nothing appears in ``path`` unless its graphs agree with the model.

    Args:
        facts: the manifest's ``name``, ``version``, ``provenance`` and ``metrics``.
        samples: noise samples of the refine graph, an even number (antithetic pairs).
        horizon: steps the refiner was trained for.
        examples: complete rows (batch, *shape), best at least 2^M - 1 of them, so that every subset is among the golden
            examples.
        landmarks: what goes into the map: ``mean`` (rows, latent) and, where the rows have classes, ``label`` (rows,).
        pictures: files that the card shows, copied under their own names.

    Raises:
        ExportError: the graphs and the model differ by more than PARITY_TOLERANCE.
        bundle.BundleError: ``path`` holds something else than a bundle.
    """
    vae = vae.cpu().eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = {key: value.contiguous() for key, value in vae.state_dict().items()}
        save_file(weights, folder / bundle.WEIGHTS)
        graphs = {"encode.onnx": _encode_graph(vae), "refine.onnx": _refine_graph(vae, samples)}
        decode = {m.name: f"decode-{m.name}.onnx" for m in vae.modalities}
        graphs |= {file: _decode_graph(vae, modality) for modality, file in decode.items()}
        named: dict[str, Any] = {"encode": "encode.onnx", "refine": "refine.onnx", "decode": decode}
        if vae.flow is not None:
            graphs["draw.onnx"] = _draw_graph(vae)
            named["draw"] = "draw.onnx"
        for file, graph in graphs.items():
            onnx.save(_share_weights(graph, folder / bundle.WEIGHTS, weights), folder / file)
        np.savez(folder / bundle.GOLDEN, **golden_examples(vae, examples, samples))
        files = [*graphs, bundle.WEIGHTS, bundle.GOLDEN]
        if landmarks is not None:
            np.savez_compressed(folder / bundle.MAP, allow_pickle=False, **landmarks)
            files.append(bundle.MAP)
        manifest = {
            **facts,
            "modalities": [m.model_dump() for m in vae.modalities],
            "latent": vae.latent,
            "beta": vae.beta,
            "weights": vae.weights,
            "graphs": named,
            "refinement": {"samples": samples, "horizon": horizon},
        }
        trial = bundle.write(folder / "trial", manifest, [*(folder / f for f in files), *pictures], card)
        try:
            Runtime(trial, device="cpu").replay_golden(PARITY_TOLERANCE)
        except bundle.BundleError as error:
            raise ExportError(f"the exported graphs differ from the model: {error}") from error
        return bundle.write(path, manifest, [trial.path / f for f in trial.manifest.files], card)


def golden_examples(vae: MultimodalVAE, examples: Arrays, samples: int) -> dict[str, Any]:
    """Inputs with the answers that PyTorch gives: what every opened bundle is checked against.

    Rows take their subsets in turn, all of them first; where there are fewer rows than subsets, these are of every size.
    Fillers of absent slots are not zero, so that a leak shows.
    """
    rows = len(next(iter(examples.values())))
    count = len(vae.modalities)
    stride = 1 if rows >= 2**count - 1 else SUBSET_STRIDE
    subsets = [s * stride % (2**count - 1) for s in range(rows)]
    present = torch.tensor([[bool((2**count - 1 - s) >> m & 1) for m in range(count)] for s in subsets])
    generator = torch.Generator().manual_seed(0)
    noise = antithetic(torch.randn(rows, samples // 2, vae.latent, generator=generator))
    with torch.no_grad():
        start = vae.aligned(examples, present)
        anchor = served_anchor(start, present)
        refined, objective = vae.refine_step(examples, present, start, anchor, noise)
        values = {f"value.{m.name}": vae.decode(m.name, start.mean) for m in vae.modalities}
        if vae.flow is not None:
            values["drawn"] = vae.draw(start, noise[:, :1])[:, 0]
    tensors = {
        **{f"input.{name}": array for name, array in examples.items()},
        "present": present,
        "noise": noise,
        "mean": start.mean,
        "log_var": start.log_var,
        "anchor_mean": anchor.mean,
        "anchor_log_var": anchor.log_var,
        "next_mean": refined.mean,
        "next_log_var": refined.log_var,
        "objective": objective,
        **values,
    }
    return {key: tensor.numpy() for key, tensor in tensors.items()}


def parity(vae: MultimodalVAE, runtime: Runtime, examples: Arrays) -> float:
    """Largest difference between the graphs and the model over one encode, one refinement step and one sample, relative to the
    largest value of each answer. For batch sizes and inputs of the caller's choice."""
    golden = golden_examples(vae, examples, runtime.samples)
    inputs = {m.name: golden[f"input.{m.name}"] for m in vae.modalities}
    encoded = runtime.encode(inputs, golden["present"])
    refined, objective = runtime.refine(
        inputs,
        golden["present"],
        Posterior(golden["mean"], golden["log_var"]),
        Posterior(golden["anchor_mean"], golden["anchor_log_var"]),
        golden["noise"],
    )
    pairs = {
        "mean": encoded.mean,
        "log_var": encoded.log_var,
        "next_mean": refined.mean,
        "next_log_var": refined.log_var,
        "objective": objective,
    }
    if "drawn" in golden:
        start = Posterior(golden["mean"], golden["log_var"])
        pairs["drawn"] = runtime.draw(start, np.ascontiguousarray(golden["noise"][:, 0]))
    differences = [
        np.max(np.abs(answer - golden[key])) / max(1.0, float(np.max(np.abs(golden[key])))) for key, answer in pairs.items()
    ]
    return float(np.max(differences))  # NaN if any is, which Python's max would pass over


class _Encode(nn.Module):
    def __init__(self, vae: MultimodalVAE) -> None:
        super().__init__()
        self.names = [m.name for m in vae.modalities]
        self.aligned = vae.aligned

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        *arrays, present = tensors
        return tuple(self.aligned(dict(zip(self.names, arrays, strict=True)), present))


class _Draw(nn.Module):
    def __init__(self, vae: MultimodalVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, mean: Tensor, log_var: Tensor, noise: Tensor) -> Tensor:
        return self.vae.draw(Gaussian(mean, log_var), noise.unsqueeze(1)).squeeze(1)


class _Decode(nn.Module):
    def __init__(self, vae: MultimodalVAE, modality: str) -> None:
        super().__init__()
        self.vae, self.modality = vae, modality

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(self.modality, z)


def _encode_graph(vae: MultimodalVAE) -> onnx.ModelProto:
    *arrays, present = _tracing_rows(vae)
    inputs = [*(m.name for m in vae.modalities), "present"]
    return _convert(_program(_Encode(vae), (*arrays, present)), inputs, ["mean", "log_var"])


def _draw_graph(vae: MultimodalVAE) -> onnx.ModelProto:
    rows = tuple(torch.zeros(3, vae.latent) for _ in range(3))
    return _convert(_program(_Draw(vae), rows), ["mean", "log_var", "noise"], ["z"])


def _decode_graph(vae: MultimodalVAE, modality: str) -> onnx.ModelProto:
    return _convert(_program(_Decode(vae, modality), (torch.zeros(3, vae.latent),)), ["z"], ["value"])


def _refine_graph(vae: MultimodalVAE, samples: int) -> onnx.ModelProto:
    names = [m.name for m in vae.modalities]

    def step(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        arrays = dict(zip(names, tensors, strict=False))
        present, mean, log_var, anchor_mean, anchor_log_var, noise = tensors[len(names) :]
        after, objective = vae.refine_step(
            arrays, present, Gaussian(mean, log_var), Gaussian(anchor_mean, anchor_log_var), noise
        )
        return after.mean, after.log_var, objective

    rows = _tracing_rows(vae, samples)
    posterior = [torch.zeros(len(rows[0]), vae.latent) for _ in range(4)]
    program = trace(step, (*rows, *posterior, torch.zeros(len(rows[0]), samples, vae.latent)))
    inputs = [*names, "present", "mean", "log_var", "anchor_mean", "anchor_log_var", "noise"]
    return _convert(program, inputs, ["next_mean", "next_log_var", "objective"])


def _tracing_rows(vae: MultimodalVAE, samples: int = 0) -> list[Tensor]:
    """Blank rows of every modality, and their presence. Tracing takes equal axes for the same axis, so their number is one
    that no other axis has."""
    taken = {size for key in vae.state_dict().values() for size in key.shape}
    taken |= {size for m in vae.modalities for size in m.shape} | {samples}
    rows = next(n for n in range(3, len(taken) + 4) if n not in taken)
    arrays = [torch.zeros(rows, *m.shape, dtype=torch.int64 if m.dtype is np.int64 else torch.float32) for m in vae.modalities]
    return [*arrays, torch.ones(rows, len(vae.modalities), dtype=torch.bool)]


def _program(module: nn.Module, example: tuple[Tensor, ...]) -> ExportedProgram:
    shapes = tuple({0: Dim("batch", min=1, max=MAX_BATCH)} for _ in example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        dynamic: Any = (shapes,) if isinstance(module, _Encode) else shapes
        return torch.export.export(module.eval(), example, dynamic_shapes=dynamic, strict=False)


def _convert(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        converted = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
    assert converted is not None
    model = converted.model
    optimizer.optimize(model, input_size_limit=INLINE_BYTES, output_size_limit=INLINE_BYTES)
    # Traced names would clash with the names that callers use.
    for number, value in enumerate(value for node in model.graph for value in node.outputs):
        value.name = f"v{number}"
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        value.name = name
    return _without_traces(onnx_ir.to_proto(model))


def _without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop what the exporter notes beside each node: its stack of source files, which tells of the machine it ran on."""
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model


def _share_weights(graph: onnx.ModelProto, file: Path, weights: Mapping[str, Tensor]) -> onnx.ModelProto:
    """Point every large tensor of the graph at the same numbers in the safetensors file.

    safetensors is a header and then plain arrays, which is what ONNX's external data reads. A tensor that the exporter
    transposed is read as it lies and transposed in the graph; ONNX Runtime does that once, when it loads.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    places: dict[tuple[tuple[int, ...], bytes], tuple[str, bool]] = {}
    for name, tensor in weights.items():
        array = tensor.numpy()
        if array.ndim == 2:
            places[array.T.shape, np.ascontiguousarray(array.T).tobytes()] = (name, True)
        places[array.shape, array.tobytes()] = (name, False)
    for initializer in graph.graph.initializer:
        array = onnx.numpy_helper.to_array(initializer)
        if array.nbytes <= INLINE_BYTES or array.dtype.kind == "i":  # integers count characters; they are no weights
            continue
        found = places.get((array.shape, array.tobytes()))
        if found is None and np.isin(array, (0, 1)).all():
            continue  # a table of what meets what
        if found is None:
            raise ExportError(f"a tensor of the graph, {initializer.name} {array.shape}, is none of the model's weights")
        name, transposed = found
        begin, end = header[name]["data_offsets"]
        if transposed:
            lying = f"{initializer.name}.lying"
            graph.graph.node.insert(0, onnx.helper.make_node("Transpose", [lying], [initializer.name], perm=[1, 0]))
            initializer.name = lying
            initializer.dims[:] = reversed(initializer.dims)
        initializer.ClearField("raw_data")
        initializer.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", file.name), ("offset", 8 + length + begin), ("length", end - begin)):
            initializer.external_data.add(key=key, value=str(value))
    return graph

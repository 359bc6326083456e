"""From a trained model to a bundle: graphs, shared weights, golden examples, parity check."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from model import bundle
from model.runtime import Runtime
from model.vae.golden import Arrays, golden_examples
from model.vae.graphs import INLINE_BYTES, decode_graph, draw_graph, encode_graph, refine_graph
from model.vae.multimodal import MultimodalVAE

PARITY_TOLERANCE = 1e-4  # relative to the largest value of an answer


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
        graphs = {"encode.onnx": encode_graph(vae), "refine.onnx": refine_graph(vae, samples)}
        decode = {m.name: f"decode-{m.name}.onnx" for m in vae.modalities}
        graphs |= {file: decode_graph(vae, modality) for modality, file in decode.items()}
        named: dict[str, Any] = {"encode": "encode.onnx", "refine": "refine.onnx", "decode": decode}
        if vae.flow is not None:
            graphs["draw.onnx"] = draw_graph(vae)
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

"""Export of a trained model to a bundle: graphs, shared weights, golden examples, parity check."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from concord.model import bundle
from concord.model.encoder import EncoderFiles
from concord.model.gallery import Gallery
from concord.model.runtime import Runtime
from concord.model.vae.export.golden import Arrays, golden_examples, golden_files
from concord.model.vae.export.graphs import decode_graph, encode_graph, refine_graph, sample_graph
from concord.model.vae.export.onnx_functions import INLINE_BYTES
from concord.model.vae.multimodal import MultimodalVAE

PARITY_TOLERANCE = 1e-4  # of a graph's output, relative to the largest value of the output


class ExportError(Exception):
    """The graphs do not compute the same as the model. No bundle was written."""


def export_bundle(
    vae: MultimodalVAE,
    path: Path,
    *,
    facts: Mapping[str, Any],
    samples: int,
    horizon: int,
    examples: Arrays,
    card: str,
    reference_embeddings: Mapping[str, NDArray[Any]] | None = None,
    pictures: Sequence[Path] = (),
    encoders: Sequence[EncoderFiles] = (),
    galleries: Mapping[str, Gallery] = MappingProxyType({}),
) -> bundle.Bundle:
    """Export a model as a bundle. The bundle is written only if its graphs agree with the model.

    Args:
        vae: the model. It is moved to the CPU and set to evaluation mode, without gradients.
        path: the bundle's folder. A bundle that is already there is replaced.
        facts: the manifest's ``name``, ``version``, ``provenance`` and ``metrics``.
        samples: noise samples of the refine graph, an even number (antithetic pairs).
        horizon: number of steps that the refiner was trained for.
        examples: complete rows (batch, *shape) by modality, preferably at least 2^M - 1 for M modalities, so that the golden
            examples have every subset.
        card: the model card, Markdown.
        reference_embeddings: content of the map: ``mean`` (rows, latent) and, if the rows have classes, ``label`` (rows,).
        pictures: image files that the card shows. They are copied and keep their names.
        encoders: the frozen encoders that modalities name.
        galleries: training examples by modality.

    Raises:
        ExportError: graphs and model differ by more than ``PARITY_TOLERANCE``.
        bundle.BundleError: ``path`` exists and is not a bundle.
    """
    vae = vae.cpu().eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = {key: value.contiguous() for key, value in vae.state_dict().items()}
        save_file(weights, folder / bundle.WEIGHTS)
        graphs = {"encode.onnx": encode_graph(vae), "refine.onnx": refine_graph(vae, samples)}
        decode = {m.name: f"decode-{m.name}.onnx" for m in vae.modalities}
        graphs |= {file: decode_graph(vae, modality) for modality, file in decode.items()}
        graph_files: dict[str, Any] = {"encode": "encode.onnx", "refine": "refine.onnx", "decode": decode}
        if vae.flow is not None:
            graphs["draw.onnx"] = sample_graph(vae)
            graph_files["draw"] = "draw.onnx"
        for file, graph in graphs.items():
            onnx.save(_share_weights(graph, folder / bundle.WEIGHTS, weights), folder / file)
        np.savez(folder / bundle.GOLDEN, **golden_examples(vae, examples, samples), **golden_files(encoders))
        files = [*graphs, bundle.WEIGHTS, bundle.GOLDEN]
        described = {encoder.name: encoder.in_bundle() for encoder in encoders}
        for encoder in encoders:
            for source, name in (
                (encoder.graph, described[encoder.name].graph),
                (encoder.tokenizer, described[encoder.name].tokenizer),
            ):
                if source is not None and name is not None:
                    shutil.copyfile(source, folder / name)
                    files.append(name)
        gallery_facts = {}
        for name, gallery in galleries.items():
            file = f"gallery-{name}.npz"
            (folder / file).write_bytes(gallery.to_bytes())
            files.append(file)
            gallery_facts[name] = {"file": file, "rows": len(gallery.ids), "values": gallery.has_values}
        if reference_embeddings is not None:
            np.savez_compressed(folder / bundle.MAP, allow_pickle=False, **reference_embeddings)
            files.append(bundle.MAP)
        manifest = {
            **facts,
            "modalities": [m.model_dump() for m in vae.modalities],
            "latent": vae.latent,
            "beta": vae.beta,
            "weights": vae.weights,
            "graphs": graph_files,
            "refinement": {"samples": samples, "horizon": horizon},
            "encoders": {name: encoder.model_dump(mode="json") for name, encoder in described.items()},
            "galleries": gallery_facts,
        }
        candidate = bundle.write(folder / "candidate", manifest, [*(folder / f for f in files), *pictures], card)
        try:
            Runtime(candidate, device="cpu").replay_golden(PARITY_TOLERANCE)
        except bundle.BundleError as error:
            raise ExportError(f"the exported graphs differ from the model: {error}") from error
        return bundle.write(path, manifest, [candidate.path / f for f in candidate.manifest.files], card)


def _share_weights(graph: onnx.ModelProto, file: Path, weights: Mapping[str, Tensor]) -> onnx.ModelProto:
    """The graph with every large tensor replaced by a reference to the same values in the safetensors file.

    A safetensors file is a header followed by plain arrays, which ONNX can read as external data. If the exporter transposed a
    tensor, the graph refers to the stored array and transposes it. ONNX Runtime does that once, when it loads the graph.

    Raises:
        ExportError: a large tensor of the graph is not one of the weights.
    """
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    stored: dict[tuple[tuple[int, ...], bytes], tuple[str, bool]] = {}
    for name, tensor in weights.items():
        array = tensor.numpy()
        if array.ndim == 2:
            stored[array.T.shape, np.ascontiguousarray(array.T).tobytes()] = (name, True)
        stored[array.shape, array.tobytes()] = (name, False)
    for initializer in graph.graph.initializer:
        array = onnx.numpy_helper.to_array(initializer)
        if array.nbytes <= INLINE_BYTES or array.dtype.kind == "i":  # integer tensors are positions and ids, not weights
            continue
        match = stored.get((array.shape, array.tobytes()))
        if match is None and np.isin(array, (0, 1)).all():
            continue  # a constant 0/1 table, as in the ``shifted`` likelihood
        if match is None:
            raise ExportError(f"the graph's tensor {initializer.name} of shape {array.shape} is not one of the model's weights")
        name, transposed = match
        begin, end = header[name]["data_offsets"]
        if transposed:
            untransposed = f"{initializer.name}.untransposed"
            graph.graph.node.insert(0, onnx.helper.make_node("Transpose", [untransposed], [initializer.name], perm=[1, 0]))
            initializer.name = untransposed
            initializer.dims[:] = reversed(initializer.dims)
        initializer.ClearField("raw_data")
        initializer.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", file.name), ("offset", 8 + header_bytes + begin), ("length", end - begin)):
            initializer.external_data.add(key=key, value=str(value))
    return graph

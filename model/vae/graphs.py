"""The networks as ONNX graphs, for any number of rows."""

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from model.vae.gaussian import Gaussian
from model.vae.multimodal import MultimodalVAE
from model.vae.tracing import MAX_BATCH, trace

INLINE_BYTES = 1024  # smaller tensors stay in their graph

for library in ("onnxscript", "onnx_ir"):  # they tell of every constant and function that they leave alone
    logging.getLogger(library).setLevel(logging.ERROR)


def encode_graph(vae: MultimodalVAE) -> onnx.ModelProto:
    """Values of all modalities by name and ``present`` (batch, modality) -> ``mean``, ``log_var`` (batch, latent)."""
    *arrays, present = _tracing_rows(vae)
    inputs = [*(m.name for m in vae.modalities), "present"]
    return _convert(_program(_Encode(vae), (*arrays, present)), inputs, ["mean", "log_var"])


def draw_graph(vae: MultimodalVAE) -> onnx.ModelProto:
    """``mean``, ``log_var`` and ``noise`` -> ``z``, all (batch, latent). Of a model with a flow."""
    rows = tuple(torch.zeros(3, vae.latent) for _ in range(3))
    return _convert(_program(_Draw(vae), rows), ["mean", "log_var", "noise"], ["z"])


def decode_graph(vae: MultimodalVAE, modality: str) -> onnx.ModelProto:
    """``z`` (batch, latent) -> ``value`` (batch, *shape), its expectation."""
    return _convert(_program(_Decode(vae, modality), (torch.zeros(3, vae.latent),)), ["z"], ["value"])


def refine_graph(vae: MultimodalVAE, samples: int) -> onnx.ModelProto:
    """One refinement step, gradient included: values, ``present``, posterior, anchor and ``noise`` (batch, ``samples``, latent)
    -> ``next_mean``, ``next_log_var`` (batch, latent) and ``objective`` (batch,) in nats, see ``MultimodalVAE.refine_step``."""
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

"""The networks as ONNX graphs with a dynamic batch size."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from concord.model.bundle.manifest import graph_input
from concord.model.vae.export.onnx_functions import converted
from concord.model.vae.export.tracing import trace, trace_forward
from concord.model.vae.gaussian import Gaussian
from concord.model.vae.multimodal import MultimodalVAE
from concord.model.vae.sequence_decoder import SequenceDecoder


def encode_graph(vae: MultimodalVAE) -> onnx.ModelProto:
    """Graph of the aligned encoder.

    Inputs: each modality (batch, *shape), named by ``manifest.graph_input``, and ``present`` (batch, modality). Outputs:
    ``mean`` and ``log_var`` (batch, latent).
    """
    *arrays, present = _tracing_rows(vae)
    inputs = [*(graph_input(m.name) for m in vae.modalities), "present"]
    return _convert(trace_forward(_Encode(vae).eval(), (*arrays, present)), inputs, ["mean", "log_var"])


def sample_graph(vae: MultimodalVAE) -> onnx.ModelProto:
    """Graph of a posterior sample, for a model with a flow. ``mean``, ``log_var``, ``noise`` -> ``z``, all (batch, latent)."""
    rows = tuple(torch.zeros(3, vae.latent) for _ in range(3))
    return _convert(trace_forward(_Sample(vae).eval(), rows), ["mean", "log_var", "noise"], ["z"])


def decode_graph(vae: MultimodalVAE, modality: str) -> onnx.ModelProto:
    """Graph of a decoder. ``z`` (batch, latent) -> ``value``, the expected value, see ``likelihood.expectation``.

    Of a text with the autoregressive likelihood: the graph of one token, see ``SequenceDecoder.step``. ``z``, ``token`` and
    ``position`` (batch,), ``state`` (batch, part, length, feature) -> ``log_probabilities`` (batch, token), ``next_state``.
    """
    network = vae.decoders[modality]
    if isinstance(network, SequenceDecoder):
        rows = _tracing_batch(vae)
        token, position = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
        example = (torch.zeros(rows, vae.latent), token, position, torch.zeros(rows, *network.state_shape))
        names = ["z", "token", "position", "state"]
        return _convert(trace_forward(_Step(network).eval(), example), names, ["log_probabilities", "next_state"])
    return _convert(trace_forward(_Decode(vae, modality).eval(), (torch.zeros(3, vae.latent),)), ["z"], ["value"])


def refine_graph(vae: MultimodalVAE, samples: int) -> onnx.ModelProto:
    """Graph of one refinement step, including the gradient of the objective. See ``MultimodalVAE.refine_step``.

    Inputs: each modality (batch, *shape), named by ``manifest.graph_input``, ``present`` (batch, modality), ``mean``,
    ``log_var``, ``anchor_mean`` and ``anchor_log_var`` (batch, latent), ``noise`` (batch, samples, latent). Outputs:
    ``next_mean`` and ``next_log_var`` (batch, latent), ``objective`` (batch,) in weighted nats.
    """
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
    inputs = [*map(graph_input, names), "present", "mean", "log_var", "anchor_mean", "anchor_log_var", "noise"]
    return _convert(program, inputs, ["next_mean", "next_log_var", "objective"])


class _Encode(nn.Module):
    def __init__(self, vae: MultimodalVAE) -> None:
        super().__init__()
        self.names = [m.name for m in vae.modalities]
        self.aligned = vae.aligned

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        *arrays, present = tensors
        return tuple(self.aligned(dict(zip(self.names, arrays, strict=True)), present))


class _Sample(nn.Module):
    def __init__(self, vae: MultimodalVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, mean: Tensor, log_var: Tensor, noise: Tensor) -> Tensor:
        return self.vae.sample(Gaussian(mean, log_var), noise.unsqueeze(1)).squeeze(1)


class _Decode(nn.Module):
    def __init__(self, vae: MultimodalVAE, modality: str) -> None:
        super().__init__()
        self.vae, self.modality = vae, modality

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(self.modality, z)


class _Step(nn.Module):
    def __init__(self, network: SequenceDecoder) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, token: Tensor, position: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.step(z, token, position, state)


def _tracing_batch(vae: MultimodalVAE, samples: int = 0) -> int:
    """A batch size to trace with. Tracing treats axes of equal size as the same axis, so no other axis has this size."""
    sizes = {size for weight in vae.state_dict().values() for size in weight.shape} | {samples}
    sizes |= {size for m in vae.modalities for size in m.shape}
    sizes |= {size for network in vae.decoders.values() if isinstance(network, SequenceDecoder) for size in network.axes}
    return next(n for n in range(3, len(sizes) + 4) if n not in sizes)


def _tracing_rows(vae: MultimodalVAE, samples: int = 0) -> list[Tensor]:
    """Zeros for every modality and a mask of ones, to trace with."""
    rows = _tracing_batch(vae, samples)
    arrays = [torch.zeros(rows, *m.shape, dtype=torch.int64 if m.dtype is np.int64 else torch.float32) for m in vae.modalities]
    return [*arrays, torch.ones(rows, len(vae.modalities), dtype=torch.bool)]


def _convert(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    model = converted(program)
    # Names from tracing could be equal to names of inputs and outputs. Those of modalities have no dots.
    for number, value in enumerate(value for node in model.graph for value in node.outputs):
        value.name = f"value.{number}"
    for value in list(model.graph.initializers.values()):
        value.name = f"constant.{value.name}"
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        value.name = name
    return _with_named_batch_axis(_without_metadata(onnx_ir.to_proto(model)))


def _with_named_batch_axis(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with ``batch`` as the name of its batch axis, which a session may then fix to a size."""
    name = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param == name:
                axis.dim_param = "batch"
    return model


def _without_metadata(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without the exporter's metadata: a stack trace per node, which reveals paths of the machine it ran on."""
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model

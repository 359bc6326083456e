"""PyTorch network -> ONNX graph of a frozen encoder."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from concord.model.encoder import MASK, PIXELS, TOKENS
from concord.training.errors import ConfigError

OPSET = 18
MAX_BATCH, MAX_TOKENS = 1024, 8192
PARITY_TOLERANCE = 1e-4
"""Of the graph's output, relative to its largest value."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporter logs of every step."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    registration.setLevel(logging.ERROR)  # its level is set
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def write_graph(network: nn.Module, example: Sequence[Tensor], folder: Path, max_tokens: int = MAX_TOKENS) -> None:
    """Write ``graph.onnx`` into a folder, and compare it with the network.

    Args:
        network: in evaluation mode. It takes pixels (batch, 3, height, width), or tokens and their mask, both (batch, tokens).
        example: its inputs, of at least two rows.
        max_tokens: that the network reads.

    Raises:
        ConfigError: the network cannot be converted, or the graph computes something else.
    """
    from concord.model.runtime.frozen import run_once  # noqa: PLC0415 - encoders in the cache need no ONNX Runtime

    is_text = len(example) > 1
    batch, tokens = Dim("batch", min=1, max=MAX_BATCH), Dim("tokens", min=1, max=max_tokens)
    shapes = tuple({0: batch, 1: tokens} if is_text else {0: batch} for _ in example)
    names = [TOKENS, MASK] if is_text else [PIXELS]
    try:
        with warnings.catch_warnings(), _quiet(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter uses deprecated functions
            program = torch.export.export(network.eval(), tuple(example), dynamic_shapes=shapes, strict=False)
            converted = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=OPSET, input_names=names)
            assert converted is not None
            expected = network(*example).numpy()
    except Exception as error:  # the exporter raises many classes
        raise ConfigError(f"the network cannot be converted to ONNX ({type(error).__name__}: {error})") from error
    model = converted.model_proto
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")  # a stack trace for each node, with paths of this machine
        part.ClearField("doc_string")
    (folder / "graph.onnx").write_bytes(model.SerializeToString())
    (output, *_) = run_once(folder / "graph.onnx", {name: value.numpy() for name, value in zip(names, example, strict=True)})
    difference = float(np.abs(output - expected).max()) / max(1.0, float(np.abs(expected).max()))
    if not difference <= PARITY_TOLERANCE:
        raise ConfigError(
            f"the ONNX graph of the network differs from it by {difference:.2g} ({PARITY_TOLERANCE:g} is allowed)"
        )

"""PyTorch operators -> ONNX operators: which of them ONNX has, and the conversion of a traced program.

``torch.onnx.export`` decomposes and traces every program once more, and builds its table of functions anew for each of them.
Here the table is built once, and ``tracing`` has decomposed the programs already: an export takes a quarter of the time. The
module uses private parts of PyTorch and onnxscript, so their versions are pinned and the parity of every exported bundle is
checked.
"""

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import onnx_ir
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _core, _decomp, _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

OPSET = 18  # ONNX Runtime's GPU providers lack kernels for some operators of newer ones
INLINE_BYTES = 1024  # tensors up to this size are stored in the graph, larger ones in the weights file

# They log every constant, function and node that they do not change.
for module in ("onnxscript", "onnx_ir", "torch.onnx._internal.exporter._core", "torch.onnx._internal.exporter._registration"):
    logging.getLogger(module).setLevel(logging.ERROR)


@functools.cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return how PyTorch computes each operator that ONNX lacks from operators that it has."""
    return dict(_decomp.create_onnx_friendly_decomposition_table(set(_decomp.get_onnx_implemented_overloads(_functions()))))


def converted(program: ExportedProgram) -> onnx_ir.Model:
    """Return the optimised ONNX graph of a program whose operators ONNX has, see ``tracing``.

    Constants of up to ``INLINE_BYTES`` are computed in advance.

    Raises:
        torch.onnx.OnnxExporterError: ONNX has no function for an operator.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter uses deprecated functions
        _fx_passes.insert_type_promotion_nodes(program.graph_module)
        _fx_passes.remove_assertion_nodes(program.graph_module)
        model = _core._exported_program_to_onnx_program(program, registry=_functions()).model
    _optimize(model)
    return model


@functools.cache
def _functions() -> ONNXRegistry:
    """The ONNX function of each PyTorch operator. To read them all takes a second."""
    return ONNXRegistry.from_torchlib(OPSET)


def _optimize(model: onnx_ir.Model) -> None:
    """``onnxscript.optimizer.optimize`` without the rule that merges two slices into a split. It compares all pairs of nodes,
    which takes longer than all other rules together, and never applies: ``chunk`` is a split already."""
    rules = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule.name != "SlicesSplit"]
    optimizer.inline(model)
    for _ in range(2):
        optimizer.fold_constants_ir(
            model, onnx_shape_inference=True, input_size_limit=INLINE_BYTES, output_size_limit=INLINE_BYTES
        )
        rewriter.rewrite(model, rules)
    for change in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        change(model)

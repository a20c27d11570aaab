"""Translate an exported program to an ONNX graph, with TrAct's calls marked in it."""

from __future__ import annotations

import functools
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript.values import Opset
from torch.export import ExportedProgram

from tract_fx import torch_private
from tract_fx.errors import ExportError
from tract_fx.export.quiet import quiet
from tract_fx.export.value_names import refuse_shared_names, values_apart
from tract_fx.passes.onnx_graph.markers import LAMBDA, MARKER, MARKER_DOMAIN
from tract_fx.passes.onnx_graph.repairs import (
    extrema_as_primitives,
    inferred_shapes,
    named_nodes,
    sequences_as_splits,
    strip_exporter_metadata,
    train_batch_norm,
    train_dropout,
    training_batch_norms,
)
from tract_fx.preconditioner import PRECONDITION_GRAD_OPERATOR, to_training_graph

__all__ = ["OPSET", "to_onnx", "translate"]

OPSET = 18
"""ONNX Runtime 1.19 builds gradients up to opset 21, but has CUDA kernels for all of a step's
operators up to 18 alone: it takes a kernel only for the very version that its schema names, and
those of Size, Pad, Equal and ReduceMax stayed behind."""


def to_onnx(program: ExportedProgram) -> ir.Model:
    """Translate a program to ONNX.

    Args:
        program: A program, in which TrAct's operator stands before the calls that it is on.

    Returns:
        A forward graph. Parameters and buffers are initializers under their state_dict keys, and
        TrAct's operator is a marker node (see `tract_fx.passes.onnx_graph.markers`).

    Raises:
        ExportError: An operator of the program has no translation.
    """  # noqa: DOC502 (raised by translate)
    _register_marker()
    model = translate(program, {PRECONDITION_GRAD_OPERATOR: _translate_marker})
    train_batch_norm(model, training_batch_norms(model))
    train_dropout(model)  # one that is off is not exported
    named_nodes(model)
    inferred_shapes(model)
    sequences_as_splits(model)
    extrema_as_primitives(model)  # the metadata tells max(dim) from amax, whose ties differ
    strip_exporter_metadata(model)
    return model


def translate(program: ExportedProgram, table: dict[Any, Any] | None = None) -> ir.Model:
    """Translate a program to ONNX with PyTorch's exporter, unoptimised.

    Args:
        program: The program.
        table: Translations of custom operators.

    Returns:
        The graph, with the exporter's metadata.

    Raises:
        ExportError: An operator of the program has no translation, or one name is of two things.
    """
    token = to_training_graph.set(True)
    try:
        with quiet(), torch_private.kept_translations():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table=table,
            )
    except Exception as error:  # whatever a translation raises
        raise ExportError(
            f"torch.onnx.export failed ({_innermost(error)})",
            "PyTorch's exporter has no translation of an operator, or not in this form",
            "Write that part of the model with other operators",
        ) from error
    finally:
        to_training_graph.reset(token)
    assert exported is not None
    refuse_shared_names(exported.model)
    values_apart(exported.model, set(exported.model.graph.initializers))
    return ir.from_proto(exported.model_proto)  # a copy, whose tensors are its own


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _translate_marker(
    weight: Any,
    input: Any,  # noqa: A002  (the operator's own argument)
    lambda_: float,
    *geometry: Any,
) -> Any:
    return getattr(Opset(MARKER_DOMAIN, 1), MARKER)(weight, input, lambda_=float(lambda_))


@functools.cache
def _register_marker() -> None:
    """Make the marker known to onnx; without a schema the exporter does not write it."""
    formal = onnx.defs.OpSchema.FormalParameter
    floats = [f"tensor({name})" for name in ("float", "double", "float16", "bfloat16")]
    onnx.defs.register_schema(
        onnx.defs.OpSchema(
            MARKER,
            MARKER_DOMAIN,
            1,
            doc="The identity on a weight; training multiplies its gradient by (XᵀX/R + λI)⁻¹.",
            inputs=[formal("weight", "T"), formal("input", "T")],
            outputs=[formal("output", "T")],
            type_constraints=[("T", floats, "Any float.")],
            attributes=[
                onnx.defs.OpSchema.Attribute(LAMBDA, onnx.defs.OpSchema.AttrType.FLOAT, "λ > 0.")
            ],
        )
    )

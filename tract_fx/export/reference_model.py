"""A forward graph in float64, by `onnx.reference`: nothing of it is ONNX Runtime's or ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import AttributeProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from tract_fx.export.reference_kernels import KERNELS
from tract_fx.passes.onnx_graph.cutting import cut

_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_DTYPES = ("to", "dtype")  # attributes that name a dtype


class NoReferenceError(Exception):
    """A graph that `onnx.reference` can't evaluate in float64; internal, always caught."""


class ReferenceModel:
    """A forward graph's values as functions of its inputs; it draws no random numbers.

    Values that no node makes are left out of `outputs`, the names of what it computes. A graph that
    has an operator or a dtype that is not known there raises `NoReferenceError`.
    """

    def __init__(self, model: ir.Model, outputs: Sequence[str]) -> None:
        copy = ir.from_proto(ir.to_proto(model))
        made = {value.name: value for node in copy.graph for value in node.outputs}
        self.outputs = tuple(name for name in dict.fromkeys(outputs) if name in made)
        cut(copy.graph, [made[name] for name in self.outputs])
        proto = ir.to_proto(copy)
        _widen(proto.graph)
        self._inputs = [value.name for value in proto.graph.input]
        try:
            self._evaluator = ReferenceEvaluator(proto, new_ops=KERNELS)
        except Exception as error:
            raise NoReferenceError(_reason(error)) from error

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the values."""
        given = {n: feeds[n] for n in self._inputs if n in feeds}
        given = {n: v.astype(np.float64) if v.dtype == np.float32 else v for n, v in given.items()}
        try:
            with np.errstate(all="ignore"):
                values = self._evaluator.run(None, given)
        except Exception as error:  # whatever a kernel raises
            raise NoReferenceError(_reason(error)) from error
        return dict(zip(self.outputs, map(np.asarray, values), strict=True))


def _reason(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "no reason given")
    return f"{type(error).__name__}: {line[:200]}"


def _widen(graph: onnx.GraphProto) -> None:
    """Turn a graph's float32 into float64, in place, those of its subgraphs too."""
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type
        _refuse_half(kind.elem_type)
        if kind.elem_type == TensorProto.FLOAT:
            kind.elem_type = TensorProto.DOUBLE
    del graph.value_info[:]
    for node in graph.node:
        if node.op_type == "ConstantOfShape" and not node.attribute:
            node.attribute.append(onnx.helper.make_attribute("value", _tensor(np.zeros(1))))
        for attribute in node.attribute:
            _widen_attribute(attribute)
            one = attribute.type == AttributeProto.GRAPH
            for inner in [attribute.g] if one else attribute.graphs:
                _widen(inner)


def _widen_attribute(attribute: AttributeProto) -> None:
    if attribute.type == AttributeProto.TENSOR:
        _widen_tensor(attribute.t)
    elif attribute.name in _DTYPES and attribute.type == AttributeProto.INT:
        _refuse_half(attribute.i)
        if attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.DOUBLE
    elif attribute.name in ("value_float", "value_floats"):
        single = attribute.name == "value_float"
        numbers = np.asarray(attribute.f if single else list(attribute.floats), np.float64)
        attribute.CopyFrom(onnx.helper.make_attribute("value", _tensor(numbers)))


def _widen_tensor(tensor: TensorProto) -> None:
    _refuse_half(tensor.data_type)
    if tensor.data_type == TensorProto.FLOAT:
        tensor.CopyFrom(_tensor(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


def _tensor(array: np.ndarray, name: str = "") -> TensorProto:
    return numpy_helper.from_array(np.asarray(array, np.float64), name)


def _refuse_half(dtype: int) -> None:
    """Half precision is part of what such a graph computes, and no bound of float32's holds."""
    if dtype in _HALF:
        raise NoReferenceError(f"values in {TensorProto.DataType.Name(dtype).lower()}")

"""From an ONNX graph to an fx graph that computes the same."""

from __future__ import annotations

import inspect
import keyword
import operator as python
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tract_fx.errors import UnsupportedTrainingError
from tract_fx.importer import elementwise, layers, recurrent_layers, reductions, shapes
from tract_fx.importer.host import as_host
from tract_fx.importer.layers import batch_norm, split_pads
from tract_fx.importer.modes import training_switch
from tract_fx.importer.shapes import pad_sides, wrapped_indices
from tract_fx.importer.table import OPERATORS, unsupported
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.node_names import described
from tract_fx.passes.onnx_graph.values import ancestors, operands, static_shape
from tract_fx.preconditioner import LAYER_KINDS, precondition_grad

assert elementwise and layers and recurrent_layers and reductions and shapes  # which fill the table

# Operators whose functions give a tuple.
_SEVERAL = frozenset({"Split", "LSTM", "GRU", "RNN"})
_SMALL = 64
"""Integers up to this many are taken for sizes and the like."""

# torch.onnx.export writes `detach()` as Identity, and notes the operator that it came from.
_NOTE, _DETACH = "pkg.torch.onnx.fx_node", ("aten.detach.", "aten.detach_.")

# What the code of an fx graph reads by these names.
_OF_CODE = frozenset({"self", "torch", "device", "inf", "nan", "NoneType", "pytree", "fx_pytree"})

# Inputs that are numbers, and never data.
_NUMBERS = frozenset(
    {
        *(("Clip", 1), ("Clip", 2), ("Pad", 2), ("Resize", 1), ("Resize", 2), ("Dropout", 1)),
        *(("Dropout", 2), ("Range", 0), ("Range", 1), ("Range", 2)),
    }
)


@dataclass(frozen=True)
class Imported:
    """An ONNX model in PyTorch.

    Attributes:
        module: Takes the model's inputs in order, and gives its outputs by name, those that can't
            be translated and are not needed left out.
        keys: The state_dict's key of each initializer that is a tensor of it.
    """

    module: fx.GraphModule
    keys: Mapping[str, str]


class Mode(nn.Module):
    """Tells whether the model trains."""

    def forward(self) -> bool:
        """Tell it."""
        return self.training


def import_graph(
    model: ir.Model,
    *,
    trained: Collection[str],
    frozen: Collection[str] = (),
    trains: Collection[str] = (),
    lambdas: Mapping[str, float] | None = None,
    needed: Collection[str] = (),
) -> Imported:
    """Import a graph."""
    parameters = {**dict.fromkeys(trained, True), **dict.fromkeys(frozen, False)}
    return _Builder(model, parameters, trains, lambdas or {}).build(needed)


class _Builder:
    def __init__(
        self,
        model: ir.Model,
        parameters: Mapping[str, bool],
        trains: Collection[str],
        lambdas: Mapping[str, float],
    ) -> None:
        self.model, self.trains, self.lambdas = model, trains, lambdas
        self.parameters = parameters  # and whether each is trained
        self.root = nn.Module()
        self.root.mode = Mode()
        self.graph = fx.Graph()
        self.keys: dict[str, str] = {}
        self.values: dict[ir.Value, Any] = {}
        self.problems: dict[ir.Value, str] = {}
        self.training: fx.Node | None = None

    def build(self, needed: Collection[str]) -> Imported:
        graph = self.model.graph
        for value in graph.inputs:
            taken = {str(node.target) for node in self.graph.nodes}
            self.values[value] = self.graph.placeholder(_argument_name(str(value.name), taken))
        self.training = self.graph.call_module("mode")
        for node in graph:
            self._visit(node)
        outputs = {}
        for value in graph.outputs:
            name = str(value.name)
            if value in self.problems and name in needed:
                raise UnsupportedTrainingError(
                    self.problems[value],
                    "it has no counterpart in PyTorch that is tested",
                    "Write that part of the model with other operators, or export the model from "
                    "its own framework otherwise",
                )
            if value not in self.problems:
                outputs[name] = self._read(value)
        self.graph.output(outputs)
        module = fx.GraphModule(self.root, self.graph, "OnnxModel")
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
        return Imported(module.train(), self.keys)

    def _visit(self, node: ir.Node) -> None:
        behind = [self.problems[v] for v in node.inputs if v is not None and v in self.problems]
        try:
            problem = behind[0] if behind else self._translate(node)
        except UnsupportedTrainingError as error:
            problem = error.found
        if problem is not None:
            self.problems.update(dict.fromkeys(node.outputs, problem))

    def _translate(self, node: ir.Node) -> str | None:
        """Write a node; say what stands in the way if it can't be."""
        domain = "" if node.domain == "ai.onnx" else node.domain
        if (domain, node.op_type) == ("", "Constant"):
            self.values[node.outputs[0]] = self._held(node.outputs[0])
            return None
        special = _SPECIAL.get((domain, node.op_type))
        function = OPERATORS.get((domain, node.op_type))
        if special is None and function is None:
            return f"{described(node)}"
        arguments = [
            None if value is None else self._argument(node, place, value)
            for place, value in enumerate(node.inputs)
        ]
        attributes = {name: _attribute(a) for name, a in node.attributes.items()}
        if special is not None:
            result = special(self, node, arguments, attributes)
        else:
            assert function is not None
            if node.op_type == "Dropout":
                arguments = [*arguments[:2], *[None] * (2 - len(arguments)), self._mode(node)]
            unknown = _unknown(function, attributes)
            if unknown:
                return f"{described(node)} with {', '.join(unknown)}"
            result = self.graph.call_function(function, tuple(arguments), attributes)
        if node.op_type in _SEVERAL:
            for index, value in enumerate(node.outputs):
                self.values[value] = self.graph.call_function(python.getitem, (result, index))
            return None
        if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
            return f"{described(node)} with several outputs"
        if is_standard(node, "Identity") and any(
            name in node.metadata_props.get(_NOTE, "") for name in _DETACH
        ):
            result = self.graph.call_method("detach", (result,))
        self.values[node.outputs[0]] = result
        return None

    def is_constant(self, value: ir.Value) -> bool:
        """Whether nothing of the model's inputs is in a value."""
        made = ancestors(value)
        read = {value, *(v for node in made for v in operands(node))}
        return read.isdisjoint(self.model.graph.inputs)

    def _mode(self, node: ir.Node) -> Any:
        if node.name in self.trains:
            return self.training
        if node.op_type == "BatchNormalization":
            return bool(node.attributes.get_int("training_mode", 0))
        return bool(training_switch(node))

    def _read(self, value: ir.Value) -> Any:
        """The node of a value; an initializer's is made when it is first read."""
        if value not in self.values:
            self.values[value] = self._held(value)
        found = self.values[value]
        if not isinstance(found, _Numbers):
            return found
        return self.graph.call_function(torch.tensor, (found.entries,), {"dtype": found.dtype})

    def _argument(self, node: ir.Node, place: int, value: ir.Value) -> Any:
        """The node of a value as an operand, which may be numbers that are no tensor."""
        if value not in self.values:
            self.values[value] = self._held(value)
        found = self.values[value]
        if isinstance(found, _Numbers):
            is_integer = not found.dtype.is_floating_point and found.dtype != torch.bool
            if is_integer or (node.op_type, place) in _NUMBERS:
                kind = "int64" if is_integer else "float32" if found.dtype != torch.bool else "bool"
                return self.graph.call_function(as_host, (found.entries, kind))
        return self._read(value)

    def _held(self, value: ir.Value) -> Any:
        """What a constant or an initializer is: numbers in the graph, or a tensor of the module."""
        name, constant = str(value.name), ir.convenience.get_const_tensor(value)
        if constant is None:
            maker = value.producer()
            assert maker is not None, name
            raise unsupported(described(maker))
        array = constant.numpy()
        readers = {(use.node.op_type, use.idx) for use in value.uses()}
        small = array.size <= _SMALL and name not in self.parameters
        is_sizes = array.dtype.kind in "iu" and not value.is_graph_output()
        try:
            tensor = torch.from_numpy(np.array(array))
        except TypeError as error:  # text, say
            raise unsupported(f"{name!r} of {array.dtype}") from error
        if small and (is_sizes or (readers and readers <= _NUMBERS)):
            return _Numbers(array.tolist(), tensor.dtype)
        key = _place(self.root, name, tensor, self.parameters.get(name))
        self.keys[name] = key
        return self.graph.get_attr(key)


@dataclass(frozen=True)
class _Numbers:
    """A constant that is written into the graph."""

    entries: Any
    dtype: torch.dtype


def _argument_name(name: str, taken: Collection[str]) -> str:
    """An input's name as that of an argument of `forward`."""
    name = re.sub(r"\W", "_", name)
    if not name.isidentifier() or keyword.iskeyword(name) or name in _OF_CODE:
        name = f"x_{name}"
    while name in taken:
        name += "_"
    return name


def _attribute(attribute: ir.Attr) -> Any:
    if attribute.type == ir.AttributeType.TENSOR:
        array = attribute.as_tensor().numpy()
        return array.reshape(-1)[0].item() if array.size == 1 else array.tolist()
    value = attribute.value
    if attribute.type == ir.AttributeType.STRING:
        return attribute.as_string()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _unknown(function: Any, attributes: Mapping[str, Any]) -> list[str]:
    """Attributes that a function doesn't take."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # one of PyTorch's own
        return sorted(attributes)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    return sorted(attributes.keys() - parameters.keys())


def _place(root: nn.Module, name: str, tensor: Tensor, trained: bool | None) -> str:
    """Register a tensor under its name, whose dots make modules; as a buffer where that is None."""
    *path, last = [part or "_" for part in name.split(".")]
    owner, taken = root, []
    for part in path:
        while not isinstance(getattr(owner, part, None), nn.Module):
            if not _has(owner, part):
                owner.add_module(part, nn.Module())
            else:
                part += "_"
        owner = getattr(owner, part)
        taken.append(part)
    while _has(owner, last):
        last += "_"
    if trained is None:
        owner.register_buffer(last, tensor)
    else:
        owner.register_parameter(last, nn.Parameter(tensor, requires_grad=trained))
    return ".".join([*taken, last])


def _has(owner: nn.Module, name: str) -> bool:
    """Whether a module, or the GraphModule that is made of it, has an attribute already."""
    return name == "self" or hasattr(owner, name) or hasattr(fx.GraphModule, name)


# --- Conv, Gemm, MatMul and BatchNormalization, written as PyTorch's own layers are -------------


def _convolution(
    builder: _Builder, node: ir.Node, arguments: list[Any], attributes: dict[str, Any]
) -> fx.Node:
    x, weight, *bias = arguments
    shape = None if node.inputs[1] is None else static_shape(node.inputs[1])
    if shape is None:
        raise unsupported(f"{described(node)} with a weight of unknown shape")
    dims = len(shape) - 2
    before, after = split_pads(attributes.get("pads"), dims)
    graph = builder.graph
    if before != after:
        x = graph.call_function(pad_sides, (x, before, after))
        before = [0] * dims
    geometry = {
        "stride": attributes.get("strides") or [1] * dims,
        "padding": before,
        "dilation": attributes.get("dilations") or [1] * dims,
        "groups": attributes.get("group", 1),
    }
    if node.name in builder.lambdas:
        weight = graph.call_function(
            precondition_grad, (weight, x), {"lambda_": builder.lambdas[str(node.name)], **geometry}
        )
    return graph.call_function(LAYER_KINDS[dims].function, (x, weight, *(bias or [None])), geometry)


def _matmul(
    builder: _Builder, node: ir.Node, arguments: list[Any], attributes: dict[str, Any]
) -> fx.Node:
    x, weight = arguments
    given = node.inputs[1]
    assert given is not None
    is_weight = len(given.shape or ()) == 2 and builder.is_constant(given)
    if node.name not in builder.lambdas and not is_weight:
        return builder.graph.call_function(_product, (x, weight))
    return _linear(builder, node, x, builder.graph.call_function(torch.t, (weight,)), None)


def _product(one: Any, other: Any) -> Any:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.matmul(one, other)
    return torch.matmul(one, other)


def _linear(builder: _Builder, node: ir.Node, x: Any, weight: Any, bias: Any) -> fx.Node:
    if node.name in builder.lambdas:
        weight = builder.graph.call_function(
            precondition_grad, (weight, x), {"lambda_": builder.lambdas[str(node.name)]}
        )
    return builder.graph.call_function(F.linear, (x, weight, bias))


def _gemm(
    builder: _Builder, node: ir.Node, arguments: list[Any], attributes: dict[str, Any]
) -> fx.Node:
    x, weight, *rest = arguments
    graph, added = builder.graph, rest[0] if rest else None
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    x = graph.call_function(torch.t, (x,)) if attributes.get("transA") else x
    if not attributes.get("transB"):
        weight = graph.call_function(torch.t, (weight,))
    given = node.inputs[2] if added is not None else None
    if alpha == beta == 1 and (given is None or len(given.shape or (1, 1)) == 1):
        sizes = None if given is None else static_shape(given)
        if sizes is None or sizes != (1,):
            return _linear(builder, node, x, weight, added)
    result = _linear(builder, node, x, weight, None)
    if alpha != 1:
        result = graph.call_function(torch.mul, (result, alpha))
    if added is None:
        return result
    scaled = graph.call_function(torch.mul, (added, beta)) if beta != 1 else added
    return graph.call_function(torch.add, (result, scaled))


def _batch_normalization(
    builder: _Builder, node: ir.Node, arguments: list[Any], attributes: dict[str, Any]
) -> fx.Node:
    options = {k: v for k, v in attributes.items() if k in ("momentum", "epsilon")}
    return builder.graph.call_function(batch_norm, (*arguments, builder._mode(node)), options)


def _gather(
    builder: _Builder, node: ir.Node, arguments: list[Any], attributes: dict[str, Any]
) -> fx.Node:
    """Look rows of a table up as an embedding does, which is no layer that multiplies."""
    (table, indices), graph = arguments, builder.graph
    given = node.inputs[0]
    is_table = (
        given is not None and given.name in builder.parameters and len(given.shape or ()) == 2
    )
    if not is_table or attributes.get("axis", 0) % 2:
        return graph.call_function(OPERATORS["", "Gather"], (table, indices), attributes)
    count = graph.call_method("size", (table, 0))
    index = graph.call_function(wrapped_indices, (indices, count))
    return graph.call_function(F.embedding, (index, table))


def _shape(
    builder: _Builder, node: ir.Node, arguments: list[Any], attributes: dict[str, Any]
) -> fx.Node:
    """Read a shape as models do, by an attribute: no entry of the tensor goes that way."""
    sizes = builder.graph.call_function(getattr, (*arguments, "shape"))
    return builder.graph.call_function(OPERATORS["", "Shape"], (sizes,), attributes)


_SPECIAL = {
    ("", "Gather"): _gather,
    ("", "Shape"): _shape,
    ("", "Conv"): _convolution,
    ("", "MatMul"): _matmul,
    ("", "Gemm"): _gemm,
    ("", "BatchNormalization"): _batch_normalization,
}

"""Which nodes of a model have a CUDA kernel in ONNX Runtime Training 1.19.2, asked without a GPU.

``data/cuda_kernels_1_19_2.csv`` holds every kernel that the CUDA provider of the wheel
onnxruntime-training 1.19.2 (cp311, CUDA 11.8) registers, one line each, with what its definition
says: versions, type constraints, and the inputs and outputs that it keeps in host memory. It was
written down from the library's own registration, run in an emulator.

A kernel fits a node the way ``KernelRegistry::VerifyKernelDef`` has it: the schema's version is
the kernel's first, or lies in its closed range (one without an end fits its first version only),
and the dtype of each value that a type constraint names is one that it allows. onnx has no schemas
for ONNX Runtime's own operators: there every constraint must be met by some value, and every
floating-point value allowed by some constraint.

Not seen: operators that ONNX Runtime fuses or folds away when it loads a graph, and attributes with
which the provider declines a node (recurrent layers, ConvTranspose, ArgMax, ArgMin).
"""

from __future__ import annotations

import contextlib
import csv
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx
import onnx.checker
import onnx.inliner
import onnx.shape_inference

TABLE = pathlib.Path(__file__).parent / "data" / "cuda_kernels_1_19_2.csv"
COLUMNS = ("op", "domain", "since_version", "end_version", "types", "host_inputs", "host_outputs")

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
FLOATS = ("float", "double", "bfloat16", "float16")
FLOATS8 = ("float8e4m3fn", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz")
TENSOR = ("bool", *INTEGERS, *FLOATS)
# What the table abbreviates: ONNX Runtime's lists of types, by their parts.
GROUPS: dict[str, tuple[str, ...]] = {
    "tensor": TENSOR,
    "float8": FLOATS8,
    "seq": tuple(f"seq({name})" for name in TENSOR),
    "seq8": tuple(f"seq({name})" for name in FLOATS8),
}

# Operators with neither a CUDA nor a CPU kernel but with a body in their schema, which replaces the
# node; found by loading each with 1.19.2. Others with a body, such as Celu and
# MeanVarianceNormalization, have a CPU kernel, and then the node goes to the CPU whole.
EXPANDED = (
    *("Bernoulli", "CastLike", "CenterCropPad", "GroupNormalization", "HardSwish", "Mish"),
    *("NegativeLogLikelihoodLoss", "SequenceMap"),
)

CPU_BY_DESIGN = """\
ONNX Runtime keeps a node on the CPU, CUDA kernel or not, by GetCpuPreferredNodes
(onnxruntime/core/framework/fallback_cpu_capability.cc). In topological order: a node that reads a
value which lies in host memory goes to the CPU, and its outputs then lie there too, if each of its
inputs

- is an initializer of at most 100 elements, or an input of the graph, or
- lies in host memory while the node's CUDA kernel would want it on the device,

and none is float16, bfloat16 or float8. Values come to lie in host memory through kernels that put
them there: Shape, Size, the flags of InPlaceAccumulatorV2 and of the optimizers. So the arithmetic
on a shape stays on the CPU, up to the Reshape or Slice whose CUDA kernel wants it in host memory
anyway. Every subgraph is looked at by itself.

Two additions, as this is about speed. A node without a CUDA kernel that meets the same conditions
is no finding either, unless small inputs don't keep it small (``UNBOUNDED``). A node that the rule
takes to the CPU with a graph input of more than 100 elements, such as a parameter, is a finding.
"""

UNBOUNDED = "ConstantOfShape Expand If Loop OneHot Pad Range Resize Scan Tile".split()
SMALL = 100  # elements; kSmallInitializerThreshold
# Outputs of ONNX Runtime's own operators that differ in type from the first input, where the graph
# has no value_info for them: the index of the input to go by, or the type.
OUTPUT_TYPES: dict[str, tuple[int | str, ...]] = {
    "AdamWOptimizer": ("int64", 2, 4, 5),
    "BiasDropout": (0, "bool"),
    **dict.fromkeys(("BitmaskBiasDropout", "BitmaskDropout"), (0, "uint32")),
    "ConcatTraining": (0, "int64"),
    **dict.fromkeys(("GatherGrad", "GatherNDGrad"), (2,)),
    "InPlaceAccumulatorV2": ("bool", 0),
    "SGDOptimizerV2": ("bool", 1),
}

NOT_INFERRED = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)
Types: TypeAlias = dict[str, onnx.TypeProto]


@dataclass(frozen=True)
class Kernel:
    """A kernel as registered.

    Attributes:
        since: First version of the operator that it implements, and the only one without ``end``.
        types: Per constraint (the schema's type variable or a parameter's name) what it allows.
        host_inputs: Indices of the inputs that it reads from host memory.
        host_outputs: Indices of the outputs that it writes to host memory.
    """

    since: int
    end: int | None
    types: Mapping[str, frozenset[str]]
    host_inputs: frozenset[int]
    host_outputs: frozenset[int]

    def is_for(self, version: int) -> bool:
        return self.since == version or (self.end is not None and self.since <= version <= self.end)


@functools.cache
def kernels() -> Mapping[tuple[str, str], Sequence[Kernel]]:
    """Returns the table: from (domain, operator) to its kernels."""
    found: dict[tuple[str, str], list[Kernel]] = {}
    with TABLE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            types = {}
            for constraint in filter(None, row["types"].split(";")):
                name, _, allowed = constraint.partition("=")
                parts = (GROUPS.get(part, (part,)) for part in allowed.split("+"))
                types[name] = frozenset(type_ for part in parts for type_ in part)
            end = int(row["end_version"]) if row["end_version"] else None
            host = [frozenset(map(int, row[column].split())) for column in COLUMNS[-2:]]
            kernel = Kernel(int(row["since_version"]), end, types, *host)
            found.setdefault((row["domain"], row["op"]), []).append(kernel)
    return found


def missing_cuda_kernels(model: onnx.ModelProto) -> list[str]:
    """Finds the nodes that would leave the GPU, subgraphs and functions included.

    Args:
        model: A model as ONNX Runtime 1.19.2 is to load it, its nodes in topological order.

    Returns:
        One line for each node that has no CUDA kernel for its version and dtypes and isn't on the
        CPU by design (see ``CPU_BY_DESIGN``); empty if there is none.
    """
    model = onnx.inliner.inline_local_functions(model)
    model = onnx.inliner.inline_selected_functions(
        model, [("", op) for op in EXPANDED], inline_schema_functions=True
    )
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    return _Graph(model.graph, opsets, None, "").findings


class _Graph:
    """One graph's walk: types of its values, and which of them lie in host memory."""

    def __init__(
        self, graph: onnx.GraphProto, opsets: Mapping[str, int], outer: _Graph | None, where: str
    ) -> None:
        self.opsets, self.where = opsets, where
        self.findings: list[str] = []
        self.host: set[str] = set()
        self.small: set[str] = set(outer.small) if outer else set()
        self.types: Types = dict(outer.types) if outer else {}
        for value in (*graph.value_info, *graph.output, *graph.input):
            if _dtype(value.type):
                self.types[value.name] = value.type
        for tensor in graph.initializer:
            self._add_constant(tensor.name, tensor)
        self.inputs = {i.name for i in graph.input} - {tensor.name for tensor in graph.initializer}
        for node in graph.node:
            self._visit(node)

    def _add_constant(self, name: str, tensor: onnx.TensorProto) -> None:
        self.types[name] = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        if math.prod(tensor.dims) <= SMALL:
            self.small.add(name)

    def _visit(self, node: onnx.NodeProto) -> None:
        schema = _schema(node, self.opsets)
        self._infer(node, schema)
        if node.op_type == "Constant" and not node.domain:  # made an initializer on loading
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    self._add_constant(node.output[0], attribute.t)
                else:
                    self.small.add(node.output[0])
            return
        for attribute, graph in _subgraphs(node):
            where = f"{self.where}{node.name or node.op_type}.{attribute}: "
            inner = _Graph(graph, self.opsets, self, where)
            self.findings += inner.findings
            if node.op_type == "If":
                for name, value in zip(node.output, graph.output, strict=True):
                    self.types.setdefault(name, inner.types.get(value.name, value.type))
        self._place(node, self._kernel(node, schema))

    def _infer(self, node: onnx.NodeProto, schema: onnx.defs.OpSchema | None) -> None:
        """Fills in the types of the node's outputs that the graph doesn't state."""
        read = [name for name in node.input if name]
        inferred: Types = {}
        if schema is None:
            guesses = OUTPUT_TYPES.get(node.op_type, ())
            for index, name in enumerate(node.output):
                guess = guesses[index] if index < len(guesses) else 0
                if isinstance(guess, str):
                    element = onnx.TensorProto.DataType.Value(guess.upper())
                    inferred[name] = onnx.helper.make_tensor_type_proto(element, None)
                elif guess < len(node.input) and node.input[guess] in self.types:
                    inferred[name] = self.types[node.input[guess]]
        elif all(name in self.types for name in read) and not _subgraphs(node):
            known = {name: self.types[name] for name in read}
            imports = [onnx.helper.make_opsetid(*item) for item in self.opsets.items()]
            with contextlib.suppress(*NOT_INFERRED):  # the type stays unknown, which fits nothing
                inferred = onnx.shape_inference.infer_node_outputs(
                    schema, node, known, opset_imports=imports
                )
        for name, type_ in inferred.items():
            if name and _dtype(type_):
                self.types.setdefault(name, type_)

    def _dtypes(self, names: Sequence[str]) -> list[str]:
        return [_dtype(self.types.get(name, onnx.TypeProto())) or "?" for name in names]

    def _is_small(self, name: str) -> bool:
        tensor = self.types.get(name, onnx.TypeProto()).tensor_type
        sizes = [dim.dim_value for dim in tensor.shape.dim if dim.HasField("dim_value")]
        known = tensor.HasField("shape") and len(sizes) == len(tensor.shape.dim)
        return known and math.prod(sizes) <= SMALL

    def _kernel(self, node: onnx.NodeProto, schema: onnx.defs.OpSchema | None) -> Kernel | None:
        """The kernel that ONNX Runtime would take, if there is one."""
        for kernel in kernels().get((node.domain, node.op_type), ()):
            if schema is None:
                if self._fits_without_schema(node, kernel):
                    return kernel
            elif kernel.is_for(schema.since_version) and self._fits(node, kernel, schema):
                return kernel
        return None

    def _fits(self, node: onnx.NodeProto, kernel: Kernel, schema: onnx.defs.OpSchema) -> bool:
        for formal, actual in ((schema.inputs, node.input), (schema.outputs, node.output)):
            for index, name in enumerate(actual):
                parameter = formal[min(index, len(formal) - 1)]
                allowed = kernel.types.get(parameter.type_str, kernel.types.get(parameter.name))
                if name and allowed is not None and self._dtypes([name])[0] not in allowed:
                    return False
        return True

    def _fits_without_schema(self, node: onnx.NodeProto, kernel: Kernel) -> bool:
        dtypes = set(self._dtypes([name for name in (*node.input, *node.output) if name]))
        floating = {d for d in dtypes if d.removeprefix("seq(").removesuffix(")") in {*FLOATS, "?"}}
        constraints = kernel.types.values()
        allowed = frozenset().union(*constraints)
        return not constraints or (
            floating <= allowed and all(dtypes & each for each in constraints)
        )

    def _place(self, node: onnx.NodeProto, kernel: Kernel | None) -> None:
        """Follows ``CPU_BY_DESIGN`` and notes what isn't covered by it."""
        read = [(index, name) for index, name in enumerate(node.input) if name]
        on_cpu = any(name in self.host for _, name in read) and all(
            name in self.small
            or name in self.inputs
            or (name in self.host and (kernel is None or index not in kernel.host_inputs))
            for index, name in read
        )
        on_cpu &= not {"float16", "bfloat16", *FLOATS8} & set(self._dtypes(node.input))
        if kernel is not None and not on_cpu:
            self.host.update(node.output[i] for i in kernel.host_outputs if i < len(node.output))
            return
        large = [n for n in node.input if n in self.inputs and not self._is_small(n)]
        if on_cpu and not large and (kernel or node.op_type not in UNBOUNDED):
            self.host.update(filter(None, node.output))
            return
        dtypes = " -> ".join(f"({', '.join(self._dtypes(n))})" for n in (node.input, node.output))
        operator = f"{node.domain or 'ai.onnx'}::{node.op_type} {self.opsets.get(node.domain)}"
        problem = f"goes to the CPU along with {large}" if kernel else "has no CUDA kernel"
        name = node.name or next(iter(node.output), "")
        self.findings.append(f"{self.where}{name}: {operator} {dtypes} {problem}")


def _schema(node: onnx.NodeProto, opsets: Mapping[str, int]) -> onnx.defs.OpSchema | None:
    version = opsets.get(node.domain, 0)
    if not onnx.defs.has(node.op_type, version, node.domain):
        return None
    return onnx.defs.get_schema(node.op_type, version, node.domain)


def _subgraphs(node: onnx.NodeProto) -> list[tuple[str, onnx.GraphProto]]:
    return [
        (attribute.name, attribute.g) for attribute in node.attribute if attribute.HasField("g")
    ]


def _dtype(type_: onnx.TypeProto) -> str:
    """``"float"`` for a tensor, ``"seq(float)"`` for a sequence, empty if not known."""
    if type_.HasField("sequence_type"):
        inner = _dtype(type_.sequence_type.elem_type)
        return f"seq({inner})" if inner else ""
    element = type_.tensor_type.elem_type
    return onnx.TensorProto.DataType.Name(element).lower() if element else ""

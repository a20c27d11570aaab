"""Fx graphs to ONNX: by PyTorch's private names where they are tested, else by its public ones.

Tested with torch 2.11 to 2.15. `torch.onnx.export` translates the same graph with the same tables,
and takes several times as long: it traces and decomposes the graph again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from tract_fx import torch_private
from tract_fx.errors import ExportError, TractWarning
from tract_fx.preconditioner import to_training_graph
from tract_fx.quiet import quiet
from tract_fx.torch_version import NEWEST_TESTED, TESTED, version_number

# PyTorch's translations of these give outputs that a backward pass reads another meaning.
_INEXACT = ("batch_norm", "native_layer_norm", "native_group_norm", "nll_loss", "native_dropout")

OPSET = 18
"""ONNX Runtime 1.19 has CUDA kernels for all of a step's operators up to 18 alone: it takes a
kernel only for the very version that its schema names, and those of Size, Pad, Equal and ReduceMax
stayed behind."""

Translations = Mapping[Any, Callable[..., Any]]


@cache
def _exporter() -> Any:
    """The exporter's modules, None where their names are not known to be what they were."""
    if version_number(torch.__version__) <= NEWEST_TESTED:
        try:
            from torch.onnx._internal import exporter
            from torch.onnx._internal.exporter import _core, _decomp, _fx_passes, _registration
        except ImportError:
            pass
        else:
            assert _core and _decomp and _fx_passes and _registration
            return exporter
    warnings.warn(
        TractWarning(
            f"torch {torch.__version__}: steps are translated by torch.onnx.export, which takes "
            f"several times as long as what was tested with {TESTED}"
        ),
        stacklevel=2,
    )
    return None


def _registry() -> Any:
    """PyTorch's translations, as a copy that may be added to."""
    with torch_private.kept_translations(), quiet():
        return _exporter()._registration.ONNXRegistry.from_torchlib(opset_version=OPSET)


def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """Give PyTorch's decompositions of what has no exact translation."""
    return _decompositions(len(torch._decomp.decomposition_table))


@cache
def _decompositions(known: int) -> Mapping[Any, Callable[..., Any]]:
    """Make the table, a fifth of a small export's time, anew only for other formulas."""
    core = torch.export.default_decompositions()
    table = {
        operator: core[operator]
        for operator in core
        if "backward" in str(operator) or any(name in str(operator) for name in _INEXACT)
    }
    if _exporter() is not None:
        make = _exporter()._decomp
        translated = set(make.get_onnx_implemented_overloads(_registry()))
        table = make.create_onnx_friendly_decomposition_table(translated) | table
    # Decomposed, a squeeze becomes views with sizes that have to be computed.
    return {k: v for k, v in table.items() if "squeeze" not in str(k)}


def open_sizes(batch: Sequence[Tensor], dynamic_batch: bool) -> list[tuple[int, ...]]:
    """Tell which axes of a batch are its size."""
    size = next((len(tensor) for tensor in batch if tensor.dim()), None)
    return [(0,) if dynamic_batch and t.dim() and len(t) == size else () for t in batch]


def fake_arguments(
    state: Mapping[str, Tensor], batch: Sequence[Tensor], opened: Sequence[Sequence[int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Make fake tensors to trace with, those of the batch with open sizes."""

    class Related(nn.Module):
        """Adds all up along the first axis, so that what is left open there is one size."""

        def forward(self, *tensors: Tensor) -> list[Tensor]:
            open_ones = [t for t, axes in zip(tensors, opened, strict=True) if 0 in axes]
            sums: list[Any] = [t.reshape(t.shape[0], -1).sum(1).float() for t in open_ones]
            return [t + 0 if t.is_floating_point() else t.clone() for t in tensors] + [sum(sums)]

    # A size of one would be taken for one that is always one.
    given = [
        torch.cat([t, t]) if 0 in axes and len(t) == 1 else t
        for t, axes in zip(batch, opened, strict=True)
    ]
    shapes = tuple(dict.fromkeys(axes, Dim.DYNAMIC) or None for axes in opened)
    program = torch.export.export(
        Related(), tuple(given), dynamic_shapes={"tensors": shapes}, strict=False
    )
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    fakes = [node.meta["val"] for node in placeholders[-len(batch) :]]
    mode = fakes[0].fake_mode
    mode.allow_non_fake_inputs = True  # constants that a module keeps as plain attributes
    fixed = [mode.from_tensor(tensor, static_shapes=True) for tensor in state.values()]
    return fixed, fakes


def refuse_bounded_batch(batch: Sequence[Tensor]) -> None:
    """Refuse a trace that holds for some sizes of the batch alone."""
    environment = batch[0].fake_mode.shape_env  # type: ignore[attr-defined]
    firsts: list[Any] = [t.shape[0] for t in batch if t.dim() and not isinstance(t.shape[0], int)]
    expressions = [size.node.expr for size in firsts]
    sizes = {symbol for expression in expressions for symbol in expression.free_symbols}
    bounded = [f"size == {expression}" for expression in expressions if expression.is_number]
    bounded += [
        str(bounds)
        for symbol, bounds in environment.var_to_range.items()
        if symbol in sizes and (bounds.lower > 2 or bounds.upper < 1 << 20)
    ]
    guards = [g.expr for g in environment.guards if set(g.expr.free_symbols) <= sizes]
    relations = [condition for condition in guards if not _holds(condition)]
    if bounded or relations:
        conditions = ", ".join([*bounded, *map(str, relations)])
        raise ExportError(
            f"a model that takes a branch by the batch's size ({conditions})",
            "the graph would hold for some sizes alone",
            "Leave the size out of forward(), or use dynamic_batch=False",
        )


def _holds(condition: Any) -> bool:
    """Whether a condition on open sizes holds for whatever size, all of them being the same."""
    symbols = list(condition.free_symbols)
    return all(bool(condition.subs(dict.fromkeys(symbols, n))) for n in (2, 3, 5, 16, 97, 4096))


def translate_graph(
    graph: fx.GraphModule, translations: Translations
) -> tuple[ir.Model, list[ir.Value]]:
    """Translate an fx graph of aten operators to ONNX."""
    way = _translate_publicly if _exporter() is None else _translate_privately
    graph = fx.GraphModule(graph, torch_private.copy_graph(graph.graph))
    constants = _as_arguments(graph)
    try:
        with quiet():
            model, results = way(graph, translations)
    except ExportError:
        raise
    except Exception as error:  # whatever a translation raises
        raise ExportError(
            f"translating the training step to ONNX failed ({type(error).__name__}: {error})",
            "PyTorch has no translation of an operator, or not in this form",
            "Write that part of the model with other operators",
        ) from error
    given = list(model.graph.inputs)
    for value, tensor in zip(given[len(given) - len(constants) :], constants, strict=True):
        value.name = f"constant/{value.name}"
        value.const_value = ir.tensor(tensor.detach().cpu().numpy().copy(), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model, results


def _as_arguments(graph: fx.GraphModule) -> list[Tensor]:
    """Turn the constants that a graph holds into its last arguments; give their values."""
    nodes = list(graph.graph.find_nodes(op="get_attr"))
    last = list(graph.graph.find_nodes(op="placeholder"))[-1]
    constants = []
    for node in nodes:
        constants.append(getattr(graph, str(node.target)))
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"constant_{len(constants)}")
        last.meta["val"] = node.meta.get("val", constants[-1])
        node.replace_all_uses_with(last)
        graph.graph.erase_node(node)
    graph.recompile()
    return constants


def _translate_privately(
    graph: fx.GraphModule, translations: Translations
) -> tuple[ir.Model, list[ir.Value]]:
    """Translate node by node, with the shapes that tracing has found."""
    registry = _registry()
    for target, translation in translations.items():
        registry.register_op(target, translation)
    _exporter()._fx_passes.insert_type_promotion_nodes(graph)
    model = ir.Model(
        ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="step"), ir_version=10
    )
    values = _exporter()._core._translate_fx_graph(
        graph.graph,
        model,
        graph_like=model.graph,
        owned_graphs={},
        lower="at_conversion",
        registry=registry,
    )
    results: Any = graph.graph.output_node().args[0]
    model.graph.outputs.clear()
    return model, [values[node.name] for node in results]


def _translate_publicly(
    graph: fx.GraphModule, translations: Translations
) -> tuple[ir.Model, list[ir.Value]]:
    """Translate by `torch.export` and `torch.onnx.export`, on numbers of the traced shapes."""
    traced = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    zeros = tuple(torch.zeros([int(size) for size in t.shape], dtype=t.dtype) for t in traced)
    dynamic = tuple(
        {i: Dim.DYNAMIC for i, size in enumerate(t.shape) if not isinstance(size, int)}
        for t in traced
    )
    token = to_training_graph.set(True)
    try:
        program = torch.export.export(graph, zeros, dynamic_shapes=dynamic, strict=False)
        with torch_private.kept_translations():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table=dict(translations),
            )
    finally:
        to_training_graph.reset(token)
    assert exported is not None
    model = ir.from_proto(exported.model_proto)  # a copy, whose tensors are its own
    results = list(model.graph.outputs)
    model.graph.outputs.clear()
    model.ir_version = 10
    return model, results

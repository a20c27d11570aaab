"""Taps on calls of layers: what each multiplies, and the gradients that come back to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tract_fx import torch_private
from tract_fx.errors import UnsupportedLayerError, UnsupportedModelError
from tract_fx.function_mode import FunctionMode
from tract_fx.modules import copy_tree
from tract_fx.passes.fx_graph.calls import match_function, match_module
from tract_fx.passes.fx_graph.regions import graphs
from tract_fx.passes.records import InputLayer
from tract_fx.preconditioner import LAYER_CALLS, OPERANDS
from tract_fx.reference.observed import ObservedCall


@dataclass
class TappedCall:
    """One call while the model runs; filled by the backward pass.

    Attributes:
        record: What locating says of the call.
        x: What is multiplied, detached.
        operation: The call's own operation on (x, weight), without bias.
        weight: The weight that this call multiplies with and nothing else does: an alias, whose
            gradient is the call's own.
        rounding: To which the global flags cut its products, 0 for full precision.
        output_gradient: The gradient of the output, of the last backward pass.
        first_order: Whether no backward pass so far was itself differentiated.
    """

    record: InputLayer
    x: Tensor
    operation: Callable[[Tensor, Tensor], Tensor]
    weight: Tensor
    rounding: float
    output_gradient: Tensor | None = None
    first_order: bool = True

    def keep(self, gradient: Tensor) -> None:
        """Keep a gradient of the output; a hook."""
        if torch.is_grad_enabled():  # only with create_graph=True
            self.first_order = False
        self.output_gradient = gradient.detach()

    def observed(self, incoming: Tensor | None) -> ObservedCall:
        """Give the record of the call."""
        shape = tuple(self.weight.shape)
        dims = len(shape) - 2
        return ObservedCall(
            record=self.record,
            x=self.x,
            operation=self.operation,
            weight_shape=shape,
            groups=self.x.shape[-1 - dims] // shape[1] if dims else 1,
            incoming=None if incoming is None else incoming.detach(),
            output_gradient=self.output_gradient,
            product_rounding=self.rounding,
            first_order=self.first_order,
        )


class Taps:
    """The taps on one model, and the calls that they have seen."""

    def __init__(self) -> None:
        self.calls: list[TappedCall] = []
        self._listening = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Let the taps see calls.

        Outside they do not: checkpointing runs layers again during the backward pass.
        """
        self._listening = True
        try:
            yield
        finally:
            self._listening = False

    def around(self, call: Callable[..., Any], records: Sequence[InputLayer]) -> Callable[..., Any]:
        """Put a tap around a function or module."""
        left = list(records)

        def tapped(*args: Any, **kwargs: Any) -> Any:
            if not self._listening:
                return call(*args, **kwargs)
            record = left.pop(0) if len(left) > 1 else left[0]
            with _Product(record) as mode:
                result = call(*args, **kwargs)
            if len(mode.calls) != 1:
                raise UnsupportedLayerError(
                    f"{record} makes {len(mode.calls)} products with a weight",
                    "one is expected, whose input and weight are looked at",
                    "Compute the weight (in a parametrization or a hook, say) by other functions "
                    "than torch.nn.functional.linear and conv",
                )
            self.calls += mode.calls
            return result

        return tapped


class _Product(FunctionMode):
    """Listens to one call of a layer: to the linear function or convolution inside."""

    def __init__(self, record: InputLayer) -> None:
        super().__init__()
        self.record = record
        self.calls: list[TappedCall] = []

    def _call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if function not in LAYER_CALLS:
            return function(*args, **kwargs)
        operands = dict(zip(OPERANDS, args, strict=False))
        operands |= {name: kwargs.pop(name) for name in OPERANDS if name in kwargs}
        geometry = args[len(OPERANDS) :]

        def operation(x: Tensor, weight: Tensor) -> Tensor:
            product: Tensor = function(x, weight, None, *geometry, **kwargs)
            return product

        x, weight = operands["input"], operands["weight"]
        call = TappedCall(
            self.record,
            _as_multiplied(x),
            operation,
            weight.view_as(weight),
            _rounding(x, weight),
        )
        self.calls.append(call)
        output: Tensor = function(x, call.weight, operands.get("bias"), *geometry, **kwargs)
        if output.requires_grad:
            output.register_hook(call.keep)
        return output


def _as_multiplied(x: Tensor) -> Tensor:
    """A copy (the model may write to its tensors later), rounded as autocast does."""
    dtype = torch_private.autocast_dtype(x)
    return x.detach().to(dtype or x.dtype, copy=True)


def _rounding(x: Tensor, weight: Tensor) -> float:
    if weight.dtype != torch.float32:
        return 0.0
    return torch_private.product_rounding(x.device, convolution=weight.dim() > 2)


class _Tap(nn.Module):
    """A tap as a node's target. What it calls lies in a closure and is no submodule."""

    def __init__(self, tapped: Callable[..., Any]) -> None:
        super().__init__()
        self.tapped = tapped

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self.tapped(*args, **kwargs)


def tap(model: nn.Module, records: Sequence[InputLayer]) -> tuple[nn.Module, Taps]:
    """Put taps on calls of a model."""
    copied, taps = copy_tree(model), Taps()
    if isinstance(copied, fx.GraphModule):
        _tap_nodes(copied, taps, records)
    else:
        _tap_modules(copied, taps, records)
    return copied, taps


def _tap_nodes(gm: fx.GraphModule, taps: Taps, records: Sequence[InputLayer]) -> None:
    nodes = {
        prefix + node.name: (graph, node)
        for prefix, graph in graphs(gm)
        for node in graph.graph.nodes
    }
    for number, record in enumerate(records):
        owner, node = nodes.get(record.node, (gm, None))
        if node is None or node.op not in ("call_function", "call_module"):
            raise no_such_call(gm, record, "no node of that name in its graph calls a layer")
        is_function = callable(node.target)
        call = node.target if is_function else owner.get_submodule(str(node.target))
        name = f"tract_tap_{number}"
        owner.add_submodule(name, _Tap(taps.around(call, [record])))
        node.op, node.target = "call_module", name
    for _, graph in list(graphs(gm)):
        graph.recompile()


def _tap_modules(model: nn.Module, taps: Taps, records: Sequence[InputLayer]) -> None:
    by_module: dict[nn.Module, list[InputLayer]] = {}
    for record in records:
        try:
            module = model.get_submodule(record.module or record.name)
        except AttributeError:
            raise no_such_call(model, record, "it has no module of that name") from None
        if record.module is None and _layer_calls(module) > 1:
            raise no_such_call(model, record, "what has its name makes other calls too")
        by_module.setdefault(module, []).append(record)
    for module, calls in by_module.items():
        vars(module)["forward"] = taps.around(module.forward, calls)


def _layer_calls(module: nn.Module) -> int:
    """How many calls of layers a graph has; 1 for a module that has none."""
    if not isinstance(module, fx.GraphModule):
        return 1
    calls = 0
    for node in module.graph.nodes:
        called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        layer = called is not None and match_module(node, called) is not None
        calls += layer or match_function(node) is not None
    return calls


def no_such_call(model: nn.Module, record: InputLayer, reason: str) -> UnsupportedModelError:
    """Make the error that says that the plain model does not make a call, or not as a module's."""
    if isinstance(model, fx.GraphModule):
        inner = []
    else:
        inner = [n for n, m in model.named_modules() if n and isinstance(m, fx.GraphModule)]
    holding = [n for n in inner if any(w.startswith(f"{n}.") for w in record.weight)]
    if holding:
        path = max(holding, key=len)
        return UnsupportedModelError(
            f"the call {record} in the eager model {type(model).__name__}",
            f"it is a function call in the graph module {path!r}, and an eager model's calls are "
            "looked at by their modules",
            "Inspect that graph module itself, on what it reads: "
            f"inspect_graph(model.get_submodule({path!r}), …)",
        )
    return UnsupportedModelError(
        f"the plain model and the call {record}",
        reason,
        "Give remove_tract(model) as the plain model, and records that locating found in the model",
    )

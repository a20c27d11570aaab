"""The joint graph of a model: its forward and backward pass as one fx graph.

Two ways lead there. AOTAutograd runs on fake tensors and knows which node of the backward pass
belongs to which of the forward pass. What it can't trace (a branch on a value) is recorded while
the batch runs, with real tensors.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from tract_fx import torch_private
from tract_fx.errors import UntraceableModelError
from tract_fx.inspection.batch import tensors_in
from tract_fx.inspection.records import Kind, Part
from tract_fx.inspection.sources import SourceLines
from tract_fx.inspection.undisturbed import undisturbed
from tract_fx.program import first_line_of

_BACKWARD = "tract_backward"
"""Key in `node.meta["custom"]` of the backward pass's nodes, where the tracer marks them not."""
_LEAVE_OUT = "Leave it out with backward=None; layers, verification and statistics need no trace"


@dataclass(frozen=True)
class Role:
    """What an input or output of a graph is to the model.

    Attributes:
        label: `"conv1.weight"`, `"gradient of conv1.weight"`, `"pixel_values"`.
        kind: As a picture's node has it.
        part: The pass over the graph that it belongs to.
    """

    label: str
    kind: Kind
    part: Part = "forward"


@dataclass(frozen=True)
class JointGraph:
    """Forward and backward pass of a model.

    Attributes:
        module: The graph, functional: it takes and gives all state.
        inputs: What each placeholder is.
        outputs: What each of the output node's values is, None for what means nothing to a reader.
        note: What a reader has to know of how it was made, empty where there is nothing.
    """

    module: fx.GraphModule
    inputs: tuple[Role, ...]
    outputs: tuple[Role | None, ...]
    note: str = ""


def is_backward(node: fx.Node) -> bool:
    """Tell the nodes of the backward pass."""
    return (
        # The first is autograd's own mark, which torch 2.11 does not write; the second stands for
        # what AOTAutograd traces after the forward pass.
        bool(node.meta.get("autograd_backward"))
        or node.meta.get("partitioner_tag") == "is_backward"
        or _BACKWARD in (node.meta.get("custom") or ())
    )


def output_roles(count: int) -> list[Role]:
    """Name the values that a model returns."""
    return [Role(f"output {i}" if count > 1 else "the output", "output") for i in range(count)]


def trace_joint_graph(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> JointGraph:
    """Trace forward and backward pass of a model."""
    found = f"the backward pass of {type(model).__name__}"
    if not any(p.requires_grad for p in model.parameters()):
        raise UntraceableModelError(found, "nothing in it requires a gradient", _LEAVE_OUT)
    try:
        with undisturbed(model):
            return _by_aot_autograd(model, args, kwargs)
    except Exception:  # whatever it can't trace
        pass
    try:
        with undisturbed(model):
            return _by_running(model, args, kwargs)
    except Exception as error:
        why = f"it can't be traced, nor recorded while it runs ({first_line_of(error)})"
        raise UntraceableModelError(found, why, _LEAVE_OUT) from error


def _names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Name the leaves of a call's arguments."""
    return [_name(model, path) for path, _ in pytree.tree_flatten_with_path((args, kwargs))[0]]


def _name(model: nn.Module, path: tuple[Any, ...]) -> str:
    """Name a leaf of (args, kwargs) as the model's forward method does."""
    (place, key), rest = path[:2], path[2:]
    name = str(getattr(key, "key", ""))
    if place.idx == 0:
        names = _positional_names(model)
        name = names[key.idx] if key.idx < len(names) else f"input {key.idx}"
    return name + pytree.keystr(rest)


def _positional_names(model: nn.Module) -> list[str]:
    if isinstance(model, fx.GraphModule):
        return [str(n.target) for n in model.graph.find_nodes(op="placeholder")]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in kinds]


def _by_aot_autograd(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> JointGraph:
    names = _names(model, args, kwargs)
    with SourceLines(model):
        module, inputs, outputs = torch_private.joint_graph(model, args, kwargs)
    several = sum(kind == "output" for kind, _ in outputs) > 1
    roles = [_input_role(what, names, several) for what in inputs]
    return JointGraph(module, tuple(roles), tuple(_output_role(w, several) for w in outputs))


def _input_role(what: tuple[str, Any], names: list[str], several: bool) -> Role:
    match what:
        case "parameter", name:
            return Role(name, "parameter")
        case "buffer", name:
            return Role(name, "constant")
        case "input", number:
            return Role(names[number], "input")
        case "tangent", output:
            return Role(f"gradient of {_output_name(output, several)}", "input", "backward")
    return Role("(calling convention)", "constant")


def _output_role(what: tuple[str, Any], several: bool) -> Role | None:
    match what:
        case "output", _:
            return Role(_output_name(what, several), "output")
        case "gradient", ("parameter", name):
            return Role(f"gradient of {name}", "output", "backward")
        case "gradient", _:
            return Role("gradient of the input", "output", "backward")
        case "update", (_, name):
            return Role(f"new {name}", "constant")
    return None


def _output_name(what: tuple[str, Any], several: bool) -> str:
    return f"output {what[1]}" if several and what[0] == "output" else "the output"


def _by_running(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> JointGraph:
    """Record what the batch runs through, with a gradient of ones for every output."""
    given, spec = pytree.tree_flatten((args, kwargs))
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    trainable = [name for name, p in parameters.items() if p.requires_grad]
    at = [i for i, leaf in enumerate(given) if isinstance(leaf, Tensor)]

    def step(parameters: list[Tensor], buffers: list[Tensor], inputs: list[Tensor]) -> Any:
        leaves = list(given)
        for i, value in zip(at, inputs, strict=True):
            leaves[i] = value
        state = {
            **dict(zip(names, parameters, strict=True)),
            **dict(zip(own, buffers, strict=True)),
        }
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        with SourceLines(model), torch_private.without_checkpoints():
            result = functional_call(model, state, args, kwargs)
        outputs = [t for _, t in tensors_in(result, "") if t.requires_grad]
        with fx.traceback.annotate({_BACKWARD: True}):
            ones = [torch.ones_like(t) for t in outputs]
            wanted = [state[name] for name in trainable]
            gradients = torch.autograd.grad(outputs, wanted, ones, allow_unused=True)
        return [t.detach() for t in outputs], gradients

    names, own = list(parameters), list(buffers)
    inputs = [given[i].detach() for i in at]
    state = [b.clone() for b in buffers.values()]
    with fx.traceback.preserve_node_meta():
        module = torch_private.record_run(step, list(parameters.values()), state, inputs)
    roles = [Role(name, "parameter") for name in names]
    roles += [Role(name, "constant") for name in own]
    named = _names(model, args, kwargs)
    roles += [Role(named[i], "input") for i in at]
    count = len(pytree.tree_leaves(module.graph.output_node().args)) - len(trainable)
    outputs = output_roles(count)
    outputs += [Role(f"gradient of {name}", "output", "backward") for name in trainable]
    note = "Recorded while the batch ran, for the model can't be traced without"
    return JointGraph(module, tuple(roles), tuple(outputs), note)

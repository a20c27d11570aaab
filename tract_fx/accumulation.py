"""One Gram for a whole optimizer step: over micro-batches, and over processes.

`tract_step` is told where a step begins and ends; `tract_steps` sees it by the gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, finalize, ref

import torch
from torch import Tensor, fx, nn

from tract_fx import torch_private
from tract_fx.errors import NoInputLayerError, TrainerStateError, UnsupportedLayerError
from tract_fx.modules import is_standard, tract_lambda, tract_scope
from tract_fx.passes.fx_graph import treated_layers
from tract_fx.preconditioner import WORLD, GramScope, PatchGeometry, group_of
from tract_fx.preconditioner.running_gram import RunningGram
from tract_fx.preconditioner.step_gram import Counting, StepGram, close_step, open_step

_numbers = itertools.count()
_tokens: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@contextmanager
def tract_step(model: nn.Module) -> Iterator[None]:
    """Give all backward passes inside one Gram: TrAct's gradient of the one large batch.

    Without it each micro-batch has a P = (XᵀX/R + λI)⁻¹ of its own. Inside, the layers' gradients
    stay plain while their rows are counted, and at the end each is multiplied once by the P of all
    rows, in place. X holds the rows of all calls of a layer within the step, and where a process
    group is running, those of all processes, which all have to enter and leave:

        with tract_step(model):
            for images, labels in micro_batches:
                loss(model(images), labels).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    Gradients have to be zero before. What a loss adds to the weight's gradient by itself (a penalty
    on the weight, say, in one backward pass with a call of the layer) is multiplied too. With an
    exception nothing is multiplied, and the gradients are to be thrown away.

    Args:
        model: What `tract_pass` or `tract_module` returned, also inside DDP, FSDP2 or
            `torch.compile`.

    Yields:
        Nothing.

    Raises:
        NoInputLayerError: No layer that is trained has TrAct.
        UnsupportedLayerError: A layer's gradient is not one that can be multiplied at the end: of a
            function call, of a computed or shared weight, or of one that is split otherwise than by
            its rows.
        TrainerStateError: A gradient is there already, or the step of the layer is open already, or
            a backward pass was not counted, or the optimizer has changed the weight inside.
    """
    layers = _layers(model, "tract_step")
    for name, layer in layers.items():
        _check(name, layer, model)
    opened: list[tuple[Any, StepGram, int]] = []
    with ExitStack() as stack:
        for name, layer in layers.items():
            group = group_of(tract_scope(layer)) or WORLD
            scope = GramScope(group, name, _tokens.setdefault(layer, str(next(_numbers))))
            gram = StepGram(scope, PatchGeometry.of_module(layer), _columns(layer))
            stack.callback(_close, layer)
            _open(layer, scope, gram)
            weight: Any = layer.weight
            stack.callback(weight.register_hook(partial(gram.require_counted, weight)).remove)
            opened.append((layer, gram, torch_private.version(weight)))
        yield
    for layer, gram, version in opened:
        _require_unchanged(gram.scope.layer, layer, version)
        lambda_ = tract_lambda(layer)
        assert lambda_ is not None
        gram.apply_(layer.weight, lambda_)


def tract_steps(model: nn.Module) -> TractSteps:
    """Give all backward passes between two `zero_grad` one Gram, whoever calls them.

    For loops that somebody else writes: a trainer's, or your own with Accelerate. From now on the
    first layers' gradients are after each backward pass those of the one large batch of all
    micro-batches since `zero_grad`, in time for clipping and for any optimizer:

        model = tract_module(model, images, gram="global")
        tract_steps(model)

    With `gram="global"` the rows are those of all processes, with `"local"` of this one. Each
    backward pass solves once and, with `"global"`, adds up once over processes, as without it;
    `tract_step` does once in a step. Three numbers per weight are kept, and the Gram.

    What changes gradients (clipping, unscaling) comes after a step's last backward pass and before
    `zero_grad`; else the next backward pass raises a `TrainerStateError`, as it does where
    gradients are not kept in `.grad`. A gradient that `torch.autograd.grad` returns, and one of
    another tensor that `functional_call` puts in the weight's place, is of its call's own rows.
    Copies and pickles of the model are as without it.

    Args:
        model: What `tract_pass` or `tract_module` returned, also inside DDP, FSDP2 or
            `torch.compile`.

    Returns:
        What ends it.

    Raises:
        NoInputLayerError: No layer that is trained has TrAct.
        UnsupportedLayerError: A layer is a function call, or has no parameter `weight` (a computed
            weight).
        TrainerStateError: A step of the layer is open already.
    """
    layers = _layers(model, "tract_steps")
    for name, layer in layers.items():
        if layer._parameters.get("weight") is None:
            raise _unsupported(
                name,
                "its weight is computed, and it has several gradients to be told by",
                "Remove the parametrization, weight norm or pruning, or train without tract_steps",
                "tract_steps",
            )
    for name, layer in layers.items():
        token = str(next(_numbers))
        scope = GramScope(group_of(tract_scope(layer)) or "", name, token)
        _open(layer, scope, RunningGram(scope, layer))
        finalize(layer, close_step, token)
    return TractSteps([*layers.values()])


class TractSteps:
    """What `tract_steps` has begun.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = [ref(layer) for layer in layers]

    def remove(self) -> None:
        """Let each backward pass have a Gram of its own again."""
        while self._layers:
            layer = self._layers.pop()()
            if layer is not None:
                _close(layer)


def _open(layer: nn.Module, scope: GramScope, counting: Counting) -> None:
    vars(layer)["tract_scope_of_copies"] = tract_scope(layer)
    vars(layer)["tract_scope"] = str(scope)
    open_step(scope.step, counting)


def _close(layer: nn.Module) -> None:
    close_step(GramScope.read(vars(layer)["tract_scope"]).step)
    vars(layer)["tract_scope"] = vars(layer).pop("tract_scope_of_copies")


def _layers(model: nn.Module, call: str) -> dict[str, nn.Module]:
    """The trained layers with TrAct by name, none of which is in a step."""
    modules = {n: m for n, m in model.named_modules() if tract_lambda(m) is not None}
    for name, _, _ in treated_layers(model):
        if name not in modules:
            raise _unsupported(
                name,
                "it is a function call in a graph, and its weight may have other uses too",
                "Apply tract_module to the eager model, or tract_pass to a symbolic_trace of it",
                call,
            )
    trained = {n: m for n, m in modules.items() if any(p.requires_grad for p in m.parameters())}
    if not trained:
        raise NoInputLayerError(
            f"a {type(model).__name__} in which no trained layer has TrAct",
            "there is no gradient that a step could be of",
            "Apply tract_pass or tract_module first",
        )
    for name, layer in trained.items():
        if "tract_scope_of_copies" in vars(layer):
            raise TrainerStateError(
                f"{call} inside a tract_step or after tract_steps of {name}",
                "a backward pass is of one step",
                "Leave the first, or call remove() on what tract_steps returned, before you enter "
                "the second",
            )
    return trained


def _check(name: str, layer: nn.Module, model: nn.Module) -> None:
    weight = layer._parameters.get("weight")
    if weight is None or not is_standard(layer):
        raise _unsupported(
            name,
            "what it multiplies with may be computed from its parameters, whose gradients are not "
            "to be multiplied by P",
            "Remove the parametrization, weight norm, pruning or own forward method, or train "
            "without tract_step",
        )
    others = (m for m in model.modules() if m is not layer)
    tied = [m for m in others if any(p is weight for p in m._parameters.values())]
    plain = _called_plain(model, layer) or any(tract_lambda(m) is None for m in tied)
    if plain or tied:
        use = "used without TrAct too" if plain else "another layer's too, which has its own rows"
        raise _unsupported(
            name,
            f"its weight is {use}, and the gradient is the sum of both uses",
            "Untie the weight, or train without tract_step",
        )
    if not _by_rows(weight, layer):
        raise _unsupported(
            name,
            "its weight is split over processes otherwise than by rows, or is a convolution's in "
            "groups",
            "Leave this layer whole, or split it by rows (FSDP2, ColwiseParallel)",
        )
    before = torch_private.local_part(weight.grad)
    if before is not None and bool(before.any()):
        raise TrainerStateError(
            f"a gradient of {name} from before tract_step",
            "it would be multiplied by a P of other rows",
            "Call optimizer.zero_grad() before you enter, and run all of a step's backward passes "
            "inside",
        )


def _require_unchanged(name: str, layer: Any, version: int) -> None:
    if torch_private.version(layer.weight) != version:
        raise TrainerStateError(
            f"the weight of {name}, changed inside tract_step",
            "the optimizer has gone by the plain gradient, which is TrAct's from the end on",
            "Call optimizer.step() behind the `with`, and take an optimizer out of the backward "
            "pass",
        )


def _unsupported(
    name: str, reason: str, remedy: str, call: str = "tract_step"
) -> UnsupportedLayerError:
    return UnsupportedLayerError(f"{call} with TrAct on {name}", reason, remedy)


def _called_plain(model: nn.Module, layer: nn.Module) -> bool:
    """Tell whether a graph calls the layer on features too, without TrAct."""
    return any(
        node.op == "call_module"
        and not node.kwargs.get("tract", True)
        and graph.get_submodule(str(node.target)) is layer
        for graph in model.modules()
        if isinstance(graph, fx.GraphModule)
        for node in graph.graph.nodes
    )


def _by_rows(weight: Tensor, layer: nn.Module) -> bool:
    if not torch_private.is_dtensor(weight):
        return True
    split = [p for p in weight.placements if not p.is_replicate()]  # type: ignore[attr-defined]
    return all(p.is_shard(0) for p in split) and (not split or getattr(layer, "groups", 1) == 1)


def _columns(layer: Any) -> int:
    """n of one group: a split weight's shape is that of the whole."""
    return int(torch.Size(layer.weight.shape[1:]).numel())

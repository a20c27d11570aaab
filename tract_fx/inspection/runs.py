"""Run the rewritten and the plain model on one batch, and see what the calls with TrAct read.

The rewritten model runs as it is. The plain one runs as a copy with taps on the calls that have
TrAct in the rewritten one. Both start from the same buffers and random state, which are put back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tract_fx import torch_private
from tract_fx.errors import UnsupportedTrainingError
from tract_fx.inspection.observed import ObservedCall
from tract_fx.inspection.taps import TappedCall, Taps, no_such_call, tap
from tract_fx.inspection.undisturbed import undisturbed
from tract_fx.passes.records import InputLayer

__all__ = ["Chain", "Loss", "Run", "Runs", "observe", "observe_forward"]

Loss = Callable[[Any], Tensor]
"""The loss as a function of a model's output."""

Chain = Callable[[Tensor], Mapping[str, Tensor]]
"""From a gradient of the weight that a call multiplies with to the gradients of the parameters that
the weight is computed from, by name, in float64. Linear; computed in the weight's dtype."""

_SEED = 0


@dataclass(frozen=True)
class Run:
    """What one model gave. Tensors are detached.

    Attributes:
        outputs: Floating outputs by name: `"output"`, or `"output[0]"`, `"output['logits']"`.
        gradients: Of the parameters that require one, by name; None where none reaches one.
        input_gradients: Of the batch's floating tensors, by the arguments' names, likewise.
    """

    outputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor | None]
    input_gradients: Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Runs:
    """What both models gave on a batch.

    Attributes:
        calls: The calls of the records, in the plain model: what they read, and what came back.
        chains: For each of `calls` the way from its gW to the parameters.
        rewritten: The model with TrAct.
        plain: The model without.
        autocast: Autocast's dtype, None where it was off.
        note: On what was run, and with which loss.
    """

    calls: tuple[ObservedCall, ...]
    chains: tuple[Chain, ...]
    rewritten: Run
    plain: Run
    autocast: torch.dtype | None
    note: str


def observe(
    rewritten: nn.Module,
    plain: nn.Module,
    records: Sequence[InputLayer],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    loss: Loss | None,
) -> Runs:
    """Run both models forward and backward, each in the mode that it is in.

    Parameters, their `.grad`, buffers, random state, attributes and the batch stay as they are.

    Args:
        rewritten: The model with TrAct.
        plain: `remove_tract(rewritten)`.
        records: The calls with TrAct, as locating found them in the rewritten model.
        args: Positional arguments of a call.
        kwargs: Keyword arguments.
        loss: The loss of the output. None for the output itself, where it is or holds a single
            number that has a gradient; else for the outputs' product with fixed normal numbers.

    Returns:
        What both gave.

    Raises:
        UnsupportedTrainingError: The loss is no number, or there is nothing to make one of.
        UnsupportedModelError: The plain model does not make one of the calls.
        UnsupportedLayerError: A call multiplies with several weights.
    """  # noqa: DOC502 (some are raised by what it calls)
    guarded = [loss] if isinstance(loss, nn.Module) else []
    with undisturbed(rewritten, *guarded):
        first, _, _ = _run(rewritten, _Batch(rewritten, args, kwargs), loss, None)
    tapped, taps = tap(plain, records)
    batch = _Batch(plain, args, kwargs)
    with undisturbed(plain, tapped, *guarded):
        second, own, loss_name = _run(tapped, batch, loss, taps)
        parameters = _trained(tapped)
    calls = _in_order(records, taps)
    mode = "training" if rewritten.training else "evaluation"
    cast = batch.autocast
    return Runs(
        calls=tuple(call.observed(own[id(call)]) for call in calls),
        chains=tuple(_chain(call.weight, parameters) for call in calls),
        rewritten=first,
        plain=second,
        autocast=cast,
        note=f"Measured on {batch}, in {mode} mode"
        + (f", under autocast to {_dtype_name(cast)}" if cast is not None else "")
        + f". Loss: {loss_name}",
    )


def observe_forward(
    model: nn.Module,
    records: Sequence[InputLayer],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[ObservedCall, ...]:
    """Run the plain model forward alone, to see what its calls read.

    Args:
        model: The plain model. It and the batch stay as they are.
        records: The calls.
        args: Positional arguments of a call.
        kwargs: Keyword arguments.

    Returns:
        The calls, in the order of `records`, without gradients.

    Raises:
        UnsupportedModelError: The model does not make one of the calls.
        UnsupportedLayerError: A call multiplies with several weights.
    """  # noqa: DOC502 (raised by what it calls)
    tapped, taps = tap(model, records)
    batch = _Batch(model, args, kwargs)
    with undisturbed(model, tapped), torch.no_grad(), taps.listening():
        tapped(*batch.args, **batch.kwargs)
    return tuple(call.observed(None) for call in _in_order(records, taps))


def _run(
    model: nn.Module, batch: _Batch, loss: Loss | None, taps: Taps | None
) -> tuple[Run, dict[int, Tensor | None], str]:
    """Run forward and backward; also the gradients of the tapped calls' own weights, by id."""
    if taps is None:
        output = model(*batch.args, **batch.kwargs)
    else:
        with taps.listening():
            output = model(*batch.args, **batch.kwargs)
    outputs = {name: value for name, value in _tensors(output, "output") if _is_floating(value)}
    value, loss_name = _loss(output, outputs, loss)
    # After the loss, which may do backward passes of its own, and which the hooks have seen.
    calls = [] if taps is None else taps.calls
    for call in calls:
        call.output_gradient = None
    parameters = _trained(model)
    weights = [call.weight for call in calls if call.weight.requires_grad]
    wanted = [*parameters.values(), *batch.leaves.values(), *weights]
    gradients: Sequence[Tensor | None] = [None] * len(wanted)
    if value.requires_grad and wanted:
        with torch_private.without_autocast(value.device):
            gradients = torch.autograd.grad(
                value, wanted, allow_unused=True, retain_graph=taps is not None
            )
    found = iter([None if g is None else g.detach() for g in gradients])
    run = Run(
        {name: tensor.detach() for name, tensor in outputs.items()},
        dict(zip(parameters, found, strict=False)),
        dict(zip(batch.leaves, found, strict=False)),
    )
    own = {id(call): next(found) if call.weight.requires_grad else None for call in calls}
    return run, own, loss_name


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _in_order(records: Sequence[InputLayer], taps: Taps) -> list[TappedCall]:
    """Sort the tapped calls as the records are; all of these have to be there."""
    by_record: dict[int, list[TappedCall]] = {id(record): [] for record in records}
    for call in taps.calls:
        by_record[id(call.record)].append(call)
    for record in records:
        if not by_record[id(record)]:
            raise no_such_call(record, "on this batch it never makes it")
    return [call for record in records for call in by_record[id(record)]]


def _chain(weight: Tensor, parameters: Mapping[str, Tensor]) -> Chain:
    """Keep the graph from the parameters to an effective weight, and nothing behind it."""

    def chain(gradient: Tensor) -> dict[str, Tensor]:
        if not weight.requires_grad:
            return {}
        with torch_private.without_autocast(weight.device):
            parts = torch.autograd.grad(
                weight,
                list(parameters.values()),
                gradient.to(weight.dtype),
                retain_graph=True,
                allow_unused=True,
            )
        named = zip(parameters, parts, strict=True)
        return {name: part.double() for name, part in named if part is not None}

    return chain


def _loss(output: Any, outputs: Mapping[str, Tensor], loss: Loss | None) -> tuple[Tensor, str]:
    """Compute the loss, and say which it is."""
    if loss is not None:
        value = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1 or not _is_floating(value):
            shape = tuple(value.shape) if isinstance(value, Tensor) else None
            raise UnsupportedTrainingError(
                f"a loss that is {type(value).__name__}" + (f" {shape}" if shape else ""),
                "gradients are those of one floating number",
                "Give a function of the model's output that returns a tensor with one entry",
            )
        name = type(loss).__name__ if isinstance(loss, nn.Module) else None
        return value, f"the given one ({name or getattr(loss, '__name__', type(loss).__name__)})"
    for name, tensor in outputs.items():
        if tensor.dim() == 0 and tensor.requires_grad:
            return tensor, f"the model's own ({name})"
    terms = [_random_product(tensor) for tensor in outputs.values()]
    if not terms:
        raise UnsupportedTrainingError(
            f"an output of class {type(output).__name__} without a floating tensor",
            "there is nothing to take a gradient of",
            "Give loss=, a function of the model's output that returns a number",
        )
    return torch.stack([t.to(terms[0].device) for t in terms]).sum(), (
        "none was given, so that of the output's product with fixed normal random numbers"
    )


def _random_product(tensor: Tensor) -> Tensor:
    """⟨output, c⟩ / √size, for fixed standard normal numbers c: of size one."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    generator = torch.Generator().manual_seed(_SEED)
    c = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    product: Tensor = (wide * c.to(wide)).sum().double() / max(tensor.numel(), 1) ** 0.5
    return product


class _Batch:
    """A batch whose floating tensors gather gradients, apart from the user's.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        leaves: The tensors whose gradients are wanted, by the arguments' names.
        autocast: Autocast's dtype on the batch's device, None where it is off.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.leaves: dict[str, Tensor] = {}
        self.autocast: torch.dtype | None = None
        self._words: list[str] = []
        copies: dict[int, Tensor] = {}
        with torch.inference_mode(False), torch.enable_grad():
            for argument, value in _by_name(model, args, kwargs).items():
                for name, tensor in _tensors(value, argument):
                    if id(tensor) not in copies:
                        copies[id(tensor)] = self._copy(name, tensor)

        def copied(value: Any) -> Any:
            return copies.get(id(value), value) if isinstance(value, Tensor) else value

        self.args, self.kwargs = pytree.tree_map(copied, (tuple(args), dict(kwargs)))

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        self._words.append(f"{_dtype_name(tensor.dtype)} {tuple(tensor.shape)}")
        if not _is_floating(tensor):
            return tensor.clone()
        self.autocast = self.autocast or torch_private.autocast_dtype(tensor)
        leaf = self.leaves[name] = tensor.detach().clone().requires_grad_()
        return leaf.clone()  # no leaf: the model may write to it

    def __str__(self) -> str:
        return ", ".join(self._words) or "no tensor"


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Give the arguments of a call by their names."""
    try:
        return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):  # the model will say itself what it does not take
        return {**{f"args[{i}]": value for i, value in enumerate(args)}, **kwargs}


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Go through the tensors in a nested value, with what leads to each."""
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        at = name + pytree.keystr(path)
        if isinstance(leaf, Tensor):
            yield at, leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            for field in fields(leaf):
                yield from _tensors(getattr(leaf, field.name), f"{at}.{field.name}")


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Run the rewritten and the plain model on one batch, and see what the calls with TrAct read.

The rewritten model runs as it is. The plain one runs as a copy with taps on the calls that have
TrAct in the rewritten one. Both start from the same buffers and random state, which are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tract_fx import torch_private
from tract_fx.errors import TractError, UnsupportedModelError, UnsupportedTrainingError
from tract_fx.inspection.all_processes import with_all_processes
from tract_fx.inspection.batch import Batch, dtype_name, has_gradient, tensors_in
from tract_fx.inspection.given import FailedLossError, call_loss
from tract_fx.inspection.taps import TappedCall, Taps, no_such_call, tap
from tract_fx.inspection.undisturbed import undisturbed
from tract_fx.passes.records import InputLayer
from tract_fx.program import first_line_of
from tract_fx.reference.observed import ObservedCall

Loss = Callable[[Any], Tensor]
"""The loss as a function of a model's output."""

_SEED = 0


@dataclass(frozen=True)
class Run:
    """What one model gave. Tensors are detached.

    Attributes:
        outputs: Floating outputs by name: `"output"`, or `"output[0]"`, `"output['logits']"`.
        gradients: Of the parameters that require one, by name; None where none reaches one.
        input_gradients: Of the batch's floating tensors, by the arguments' names, likewise.
        loss: The loss.
    """

    outputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor | None]
    input_gradients: Mapping[str, Tensor | None]
    loss: float


@dataclass(frozen=True)
class Terms:
    """What one call gives to the gradients of the parameters that its weight is computed from.

    By the parameters' names, in float64.

    Attributes:
        plain: With gW as it is.
        tract: With gW preconditioned.
        own: With gW computed in float64 and preconditioned; None where gW has other terms.
    """

    plain: Mapping[str, Tensor]
    tract: Mapping[str, Tensor]
    own: Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Runs:
    """What both models gave on a batch.

    Attributes:
        calls: The calls of the records, in the plain model: what they read, and what came back.
        terms: What each of `calls` gives to parameters' gradients; None without a gradient.
        rewritten: The model with TrAct.
        plain: The model without.
        autocast: Autocast's dtype, None where it was off.
        note: On what was run, and with which loss.
        unrun_hooks: Parameters with hooks that run once `.grad` is written, as it is not here.
        plain_again: Runs the plain model once more, from where the others started.
    """

    calls: tuple[ObservedCall, ...]
    terms: tuple[Terms | None, ...]
    rewritten: Run
    plain: Run
    autocast: torch.dtype | None
    note: str
    unrun_hooks: tuple[str, ...]
    plain_again: Callable[[], Run]


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
    """
    try:
        return _observe(rewritten, plain, records, (args, kwargs), loss)
    except Exception as error:
        refused = isinstance(error, TractError) and not isinstance(error, FailedLossError)
        if refused or not any(has_gradient(t) for _, t in tensors_in((args, kwargs), "")):
            raise
        # On a batch that gathers no gradients, as in training, model and loss may do what they else
        # can't.
        runs = _observe(rewritten, plain, records, (args, kwargs), loss, of_the_batch=False)
        cause = error.__cause__ if isinstance(error, FailedLossError) else error
        left_out = (
            "The gradients of the batch itself are not compared, for with them the model fails "
            f"({first_line_of(cause)})"
        )
        return replace(runs, note=f"{runs.note}. {left_out}")


def _observe(
    rewritten: nn.Module,
    plain: nn.Module,
    records: Sequence[InputLayer],
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]],
    loss: Loss | None,
    *,
    of_the_batch: bool = True,
) -> Runs:
    """Run both models, with the gradients of the batch or without."""
    guarded = [loss] if isinstance(loss, nn.Module) else []

    def batch_for(model: nn.Module) -> Batch:
        return Batch(model, *arguments, with_gradients=of_the_batch)

    with undisturbed(rewritten, *guarded):
        first, _, _ = _run(rewritten, batch_for(rewritten), loss, Taps())
    tapped, taps = tap(plain, records)
    batch = batch_for(plain)
    with undisturbed(plain, tapped, *guarded):
        second, own, loss_name = _run(tapped, batch, loss, taps)
        calls = _in_order(plain, records, taps)
        observed = tuple(with_all_processes(call.observed(own[id(call)])) for call in calls)
        # Here, for what the weight is computed from is put back behind.
        parameters = _trained(tapped)
        pairs = zip(calls, observed, strict=True)
        terms = tuple(_terms(call.weight, seen, parameters) for call, seen in pairs)

    def plain_again() -> Run:
        with undisturbed(plain, tapped, *guarded):
            return _run(tapped, batch_for(plain), loss, Taps())[0]

    mode = "training" if rewritten.training else "evaluation"
    cast = batch.autocast
    return Runs(
        calls=observed,
        terms=terms,
        rewritten=first,
        plain=second,
        autocast=cast,
        note=f"Measured on {batch}, in {mode} mode"
        + (f", under autocast to {dtype_name(cast)}" if cast is not None else "")
        + f". Loss: {loss_name}",
        unrun_hooks=tuple(
            n for n, p in _trained(rewritten).items() if torch_private.post_accumulate_hooks(p)
        ),
        plain_again=plain_again,
    )


def observe_forward(
    model: nn.Module,
    records: Sequence[InputLayer],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[ObservedCall, ...]:
    """Run the plain model forward alone, to see what its calls read."""
    tapped, taps = tap(model, records)
    batch = Batch(model, args, kwargs)
    with undisturbed(model, tapped), torch.no_grad(), taps.listening():
        tapped(*batch.args, **batch.kwargs)
    return tuple(call.observed(None) for call in _in_order(model, records, taps))


def _run(
    model: nn.Module, batch: Batch, loss: Loss | None, taps: Taps
) -> tuple[Run, dict[int, Tensor | None], str]:
    """Run forward and backward; also the gradients of the tapped calls' own weights, by id."""
    with taps.listening():
        output = model(*batch.args, **batch.kwargs)
    outputs = {name: value for name, value in tensors_in(output, "output") if has_gradient(value)}
    value, loss_name = _loss(output, outputs, loss)
    # After the loss, which may do backward passes of its own, and which the hooks have seen.
    calls = taps.calls
    for call in calls:
        call.output_gradient = None
    parameters = _trained(model)
    weights = [call.weight for call in calls if call.weight.requires_grad]
    wanted = [*parameters.values(), *batch.leaves.values(), *weights]
    gradients: Sequence[Tensor | None] = [None] * len(wanted)
    if value.requires_grad and wanted:
        gradients = _gradients(value, wanted, retain_graph=bool(calls))
    found = iter([None if g is None else g.detach() for g in gradients])
    run = Run(
        # Copies: an output may be a buffer, which is put back.
        {name: tensor.detach().clone() for name, tensor in outputs.items()},
        dict(zip(parameters, found, strict=False)),
        dict(zip(batch.leaves, found, strict=False)),
        float(value.detach()),
    )
    own = {id(call): next(found) if call.weight.requires_grad else None for call in calls}
    return run, own, loss_name


def _gradients(
    value: Tensor, wanted: Sequence[Tensor], *, retain_graph: bool
) -> Sequence[Tensor | None]:
    try:
        with torch_private.without_autocast(value.device):
            return torch.autograd.grad(value, wanted, allow_unused=True, retain_graph=retain_graph)
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise UnsupportedModelError(
            "torch.utils.checkpoint.checkpoint(…, use_reentrant=True) in the model",
            "it works with .backward() alone, which would write to the parameters' .grad",
            "Give it use_reentrant=False, which computes the same gradients (transformers: "
            "gradient_checkpointing_kwargs={'use_reentrant': False})",
        ) from error


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _in_order(model: nn.Module, records: Sequence[InputLayer], taps: Taps) -> list[TappedCall]:
    """Sort the tapped calls as the records are; all of these have to be there."""
    by_record: dict[int, list[TappedCall]] = {id(record): [] for record in records}
    for call in taps.calls:
        by_record[id(call.record)].append(call)
    for record in records:
        if not by_record[id(record)]:
            raise no_such_call(model, record, "on this batch it never makes it")
    return [call for record in records for call in by_record[id(record)]]


def _terms(weight: Tensor, call: ObservedCall, parameters: Mapping[str, Tensor]) -> Terms | None:
    """Lead a call's gW, plain and preconditioned, on to the parameters."""
    if call.incoming is None:
        return None

    def lead(gradient: Tensor) -> dict[str, Tensor]:
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

    own = call.own_gradient if call.first_order else None
    return Terms(
        plain=lead(call.incoming),
        tract=lead(call.precondition(call.incoming)),
        own=None if own is None else lead(call.precondition(own)),
    )


def _loss(output: Any, outputs: Mapping[str, Tensor], loss: Loss | None) -> tuple[Tensor, str]:
    """Compute the loss, and say which it is."""
    if loss is not None:
        value = call_loss(loss, output)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            shape = tuple(value.shape) if isinstance(value, Tensor) else None
            raise UnsupportedTrainingError(
                f"a loss that is {type(value).__name__}" + (f" {shape}" if shape else ""),
                "gradients are those of one floating number",
                "Give a function of the model's output that returns a tensor with one entry",
            )
        name = type(loss).__name__ if isinstance(loss, nn.Module) else None
        return value, f"the given one ({name or getattr(loss, '__name__', type(loss).__name__)})"
    for name, tensor in outputs.items():
        if tensor.dim() == 0 and tensor.requires_grad and not tensor.is_complex():
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
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    wide = real.to(torch.promote_types(real.dtype, torch.float32))
    generator = torch.Generator().manual_seed(_SEED)
    c = torch.randn(wide.shape, generator=generator, dtype=torch.float64)
    product: Tensor = (wide * c.to(wide)).sum().double() / max(tensor.numel(), 1) ** 0.5
    return product

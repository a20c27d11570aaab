"""Inspecting as users call it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from tract_fx import extras
from tract_fx.errors import UnsupportedModelError, UntraceableModelError
from tract_fx.inspection.backward import backward as show_backward
from tract_fx.inspection.batch import describe
from tract_fx.inspection.forward_diff import forward_diff
from tract_fx.inspection.given import check_arguments, subject_of
from tract_fx.inspection.inspection import Inspection
from tract_fx.inspection.layers import layer_reports, read_layers
from tract_fx.inspection.marks import lost_marks
from tract_fx.inspection.runs import observe, observe_forward
from tract_fx.inspection.statistics import statistics as measure
from tract_fx.inspection.verify import verify as compare
from tract_fx.modules import outside_steps
from tract_fx.passes.fx_graph import refuse_wrapped, remove_tract
from tract_fx.program import arguments, captured, running
from tract_fx.reference.observed import ObservedCall
from tract_fx.version import __version__

Detail = Literal["short", "expanded"]

_REMEDY = (
    "Make sure that the model runs on the batch, or inspect a graph of the part with the input "
    "layer"
)


def inspect_graph(
    gm: Any,
    example_inputs: Any = None,
    *,
    loss: Callable[[Any], torch.Tensor] | None = None,
    backward: Detail | None = "short",
    verify: bool = True,
    statistics: bool = True,
    whole: bool = False,
    name: str | None = None,
) -> Inspection:
    """Show what the pass did to a model, why, and whether it is right.

    Nothing changes: parameters, their gradients, buffers, random state and files stay as they are.
    Model and loss run several times, and with them what they do outside of PyTorch: hooks of the
    user's own, a print, a counter in a list that they write to.

    Args:
        gm: What `tract_pass` or `tract_module` gave, an ExportedProgram, or any other model, to see
            what the pass would take. Or ONNX: the path of a training graph, of a forward model or
            of a directory that `export_training` wrote, or a ModelProto.
        example_inputs: A batch: a tuple of positional arguments, a mapping of keyword arguments, or
            one tensor. It may be left out for a graph, with the layers and the forward pass alone
            shown, and for an ExportedProgram that has one itself. For ONNX, a tuple or mapping of
            inputs and targets; by default noise.
        loss: The loss as a function of the model's output, with the batch's labels in a closure,
            say. By default the output itself where it is a number that has a gradient, else its
            product with fixed random numbers. It is called several times. An ONNX training graph
            has its own.
        backward: `"short"` for TrAct as one node, `"expanded"` for that and the Gram, factorisation
            and solve as primitive operations, None to leave the backward pass out.
        verify: Whether to compare gradients and outputs with float64 and with the plain model. Two
            forward and backward passes.
        statistics: Whether to measure the Gram's spectrum and each image's share in the update.
        whole: Whether the pictures show whole graphs instead of TrAct's neighbourhood.
        name: What the model is called in the report; by default by the class that was traced, or
            the file.

    Returns:
        The inspection, to be printed, saved, or shown in a notebook.

    Raises:
        UnsupportedModelError: `gm` is no model that can be inspected, it or the loss fails on the
            batch, or batch or loss are of another kind.
        UnsupportedFormatError: `backward` is no form of it.
        UntraceableModelError: `torch.export` fails on an eager model.
        MissingRuntimeError: `gm` is an ONNX model, and the extra `ort-training` is missing.
    """
    check_arguments(gm, example_inputs, loss, backward)
    options: dict[str, Any] = {
        "backward": backward,
        "verify": verify,
        "statistics": statistics,
        "whole": whole,
    }
    if isinstance(gm, (nn.Module, ExportedProgram)):
        own = gm.example_inputs if isinstance(gm, ExportedProgram) else None
        model = gm.module() if isinstance(gm, ExportedProgram) else gm
        args, kwargs = (own or ((), {})) if example_inputs is None else arguments(example_inputs)
        with outside_steps(model):
            inspection = _inspect(model, args, kwargs, loss, **options)
    elif loss is not None:
        raise UnsupportedModelError(
            "loss= with an ONNX model", "a training graph has its own loss", "Leave loss out"
        )
    else:
        inspect_onnx = extras.load("tract_fx.inspection.onnx.inspection", "inspect_onnx")
        inspection = inspect_onnx(gm, example_inputs, **options)
    return inspection if name is None else replace(inspection, subject=name)


def _inspect(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Callable[[Any], torch.Tensor] | None,
    *,
    backward: Detail | None,
    verify: bool,
    statistics: bool,
    whole: bool,
) -> Inspection:
    """Inspect a model of PyTorch's; what takes a run is left out where there is no batch."""
    refuse_wrapped(model)
    has_batch = bool(args or kwargs)
    notes: tuple[str, ...] = ()
    if not has_batch:
        backward, verify, statistics = None, False, False
        notes = ("Without example inputs: no backward pass, verification or statistics",)
    if isinstance(model, fx.GraphModule):
        graph = model
    elif has_batch:
        graph = captured(model, args, kwargs, _REMEDY)
    else:
        raise UnsupportedModelError(
            f"an eager model of class {type(model).__name__} without example inputs",
            "its layers are located in the graph that torch.export makes on a batch",
            "Give inspect_graph(model, example_inputs)",
        )
    plain = remove_tract(model)
    calls = read_layers(graph, model)
    observed: Sequence[ObservedCall] = ()
    verification = shown = None
    with running(model, UnsupportedModelError):
        if verify or statistics:
            runs = observe(model, plain, calls.taken, args, kwargs, loss)
            observed = runs.calls
            if verify:
                verification = compare(runs, lost_marks(model, calls.taken), calls.candidates)
        elif has_batch:
            observed = observe_forward(plain, calls.taken, args, kwargs)
    measured = measure(observed) if statistics else None
    if backward is not None:
        expanded = backward == "expanded"
        try:
            shown = show_backward(model, args, kwargs, observed, expanded=expanded, whole=whole)
        except UntraceableModelError as error:
            notes = (f"The backward pass is not shown. {error}",)
    return Inspection(
        subject=subject_of(model),
        kind="graph" if graph is model else "module",
        batch=describe(args, kwargs),
        layers=layer_reports(calls, observed),
        refusals=calls.findings.refusals,
        others=calls.others,
        forward=forward_diff(plain, model, graph, whole=whole),
        backward=shown,
        verification=verification,
        statistics=measured,
        notes=notes,
        versions={"tract_fx": __version__, "torch": str(torch.__version__)},
    )

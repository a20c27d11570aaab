"""Losses by name, as modules and as callables, and their ONNX graphs.

Every loss is a torch function of (*outputs, *targets). It is exported alone to a small ONNX graph,
which `attach_loss` puts behind a forward graph from any framework.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tract_fx.errors import UnsupportedTrainingError
from tract_fx.export.loss_check import check_loss
from tract_fx.export.loss_decompositions import exact_losses
from tract_fx.export.loss_program import evaluate_loss, trace_loss
from tract_fx.export.onnx_program import translate
from tract_fx.passes.onnx_graph.repairs.casts import casts_like
from tract_fx.passes.onnx_graph.repairs.optional_outputs import optional_outputs

__all__ = ["LOSSES", "TargetSpec", "build_loss", "describe_loss", "loss_function", "loss_targets"]

LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "l1": F.l1_loss,
}
_CLASS_INDICES = {"cross_entropy", F.cross_entropy, nn.CrossEntropyLoss, nn.NLLLoss, F.nll_loss}
_SAME_SHAPE = {
    *("mse", "bce_with_logits", "l1"),
    *(F.mse_loss, F.binary_cross_entropy_with_logits, F.l1_loss),
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCEWithLogitsLoss, nn.BCELoss),
    *(F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy),
}

Loss = str | Callable[..., Tensor]
Dims = Mapping[int, str]


@dataclass(frozen=True)
class TargetSpec:
    """What a loss takes beside the model's output.

    Attributes:
        dtype: The dtype.
        shape: Sizes, a symbol's name where the size is not fixed.
        example: A target that fits the example output.
        classes: For class indices, the number of classes: what is not in [0, classes) has to be
            kept from ONNX Runtime, which reads memory that is not the batch's, or crashes.
        ignore_index: For class indices, the one value outside that range that is right.
    """

    dtype: torch.dtype
    shape: tuple[int | str, ...]
    example: Tensor
    classes: int | None = None
    ignore_index: int | None = None


def loss_function(loss: Loss) -> Callable[..., Tensor]:
    """Find the torch function of a loss.

    Args:
        loss: A name of `LOSSES`, a module, or any callable.

    Returns:
        A function of (*outputs, *targets).

    Raises:
        UnsupportedTrainingError: If the name is not known, the value is neither a name nor
            callable, or a module has parameters to train.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise UnsupportedTrainingError(
                f"loss={loss!r}",
                "no loss has that name",
                f"Use one of {', '.join(map(repr, LOSSES))}, or a callable loss(output, target)",
            )
        return LOSSES[loss]
    if not callable(loss):
        raise UnsupportedTrainingError(
            f"loss={loss!r}, a {type(loss).__name__}",
            "a loss is a name or a callable",
            f"Use one of {', '.join(map(repr, LOSSES))}, or a callable loss(output, target)",
        )
    if isinstance(loss, nn.Module):
        trained = [name for name, p in loss.named_parameters() if p.requires_grad]
        if trained:
            raise UnsupportedTrainingError(
                f"the loss {type(loss).__name__} has parameters to train: {', '.join(trained)}",
                "the exported loss is a function of outputs and targets alone",
                "Make it a part of the model that returns the loss (loss=None)",
            )
    return loss


def describe_loss(loss: Loss | None) -> str:
    """Describe a loss for a manifest or a message.

    Args:
        loss: As given to `export_training`.

    Returns:
        The name, a module's class and settings, or a function's qualified name.
    """
    if loss is None:
        return "returned by the model"
    if isinstance(loss, nn.Module):  # its repr leaves out the settings
        names = [*getattr(loss, "__constants__", ()), *dict(loss.named_buffers())]
        settings = {name: getattr(loss, name, None) for name in dict.fromkeys(names)}
        shown = (
            f"{name}={v.tolist() if isinstance(v, Tensor) else v!r}"
            for name, v in settings.items()
            if v is not None and not name.startswith("_")
        )
        return f"{type(loss).__name__}({', '.join(shown)})"
    return loss if isinstance(loss, str) else getattr(loss, "__qualname__", repr(loss))


def loss_targets(
    loss: Loss, outputs: Sequence[Tensor], dynamic: Sequence[Dims]
) -> tuple[TargetSpec, ...]:
    """Tell what targets a loss takes, where its name or type says so.

    Args:
        loss: The loss.
        outputs: The model's example outputs.
        dynamic: For each output, the name of the symbol at each dimension of no fixed size.

    Returns:
        One record per target.

    Raises:
        UnsupportedTrainingError: If only the user can know.
    """
    key: Any = type(loss) if isinstance(loss, nn.Module) else loss
    indices, same = key in _CLASS_INDICES, key in _SAME_SHAPE
    if not (indices or same):
        raise UnsupportedTrainingError(
            f"the loss {describe_loss(loss)} came without example targets",
            "what a callable takes beside the output can't be known",
            "Give example targets: export_training(…, example_targets=(…,))",
        )
    if len(outputs) != 1:
        raise UnsupportedTrainingError(
            f"the loss {describe_loss(loss)} takes one output, and the model gives {len(outputs)}",
            "which one is meant can't be known",
            "Name it (output=…), or give a callable loss(*outputs, *targets)",
        )
    output, dims = outputs[0], dynamic[0]
    if indices and output.dim() == 0:
        raise UnsupportedTrainingError(
            f"the output of shape () has no classes, and the loss is {describe_loss(loss)}",
            "class scores are along dimension 1",
            "Use another output or loss",
        )
    kept = list(range(output.dim()))
    if indices:
        kept.remove(1 if output.dim() > 1 else 0)
    shape = tuple(dims.get(d, output.shape[d]) for d in kept)
    sizes = [output.shape[d] for d in kept]
    count = torch.Size(sizes).numel()
    if indices:
        classes = output.shape[1 if output.dim() > 1 else 0]
        example = (torch.arange(count) % max(classes, 1)).reshape(sizes)
        ignored = getattr(loss, "ignore_index", -100)
        return (TargetSpec(example.dtype, shape, example, classes, ignored),)
    # Zeros and ones are right for probabilities too.
    example = (torch.arange(count) % 2).float().reshape(sizes)
    return (TargetSpec(example.dtype, shape, example),)


def build_loss(
    loss: Loss,
    outputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    dynamic: Sequence[Dims],
    *,
    trained: Iterable[Tensor] = (),
) -> ir.Model:
    """Make the ONNX graph of a loss, and verify its value and gradients against PyTorch's.

    Args:
        loss: A name, a module, or a callable of (*outputs, *targets).
        outputs: Example outputs, float32.
        targets: Example targets.
        dynamic: For each output, then each target, the name of the symbol at each dimension of no
            fixed size: `{0: "batch"}`. Equal names are equal sizes.
        trained: The model's parameters, which a callable may not hold.

    Returns:
        A model with inputs `output_0`, …, `target_0`, … and the output `loss`, a float32 scalar.

    Raises:
        UnsupportedTrainingError: If the loss, or an output's dtype, can't be taken.
        ExportError: If it can't be brought to ONNX with its meaning kept.
    """  # noqa: DOC502 - some are raised by what it calls
    function = loss_function(loss)
    for number, output in enumerate(outputs):
        if output.dtype != torch.float32:
            raise UnsupportedTrainingError(
                f"output {number} of the model is {output.dtype}",
                "losses are computed in float32",
                "Let the model give float32, or choose another output",
            )
    values = [v.detach().cpu() for v in (*outputs, *targets)]
    sizes = _sizes(values, dynamic)
    # torch.export takes a size of 0 or 1 for a fixed one.
    first = _resized(values, dynamic, {name: max(size, 2) for name, size in sizes.items()})
    second = _resized(first, dynamic, {name: max(size, 2) + 1 for name, size in sizes.items()})
    evaluate_loss(function, first)
    program = exact_losses(trace_loss(function, first, len(outputs), dynamic, trained))
    model = _to_onnx(program, len(outputs), dynamic)
    for examples in (first, second):
        check_loss(model, function, examples, len(outputs))
    return model


def _sizes(values: Sequence[Tensor], dynamic: Sequence[Dims]) -> dict[str, int]:
    """Read the sizes of symbols from examples.

    Args:
        values: Examples.
        dynamic: Their symbols.

    Returns:
        Sizes by symbol.

    Raises:
        UnsupportedTrainingError: If one symbol has two sizes.
    """
    sizes: dict[str, int] = {}
    for value, dims in zip(values, dynamic, strict=True):
        for dim, name in dims.items():
            size = value.shape[dim]
            if sizes.setdefault(name, size) != size:
                raise UnsupportedTrainingError(
                    f"the examples of outputs and targets have {sizes[name]} and {size} as {name}",
                    "that is one size of a batch",
                    "Give example targets that fit the example inputs",
                )
    return sizes


def _resized(
    values: Sequence[Tensor], dynamic: Sequence[Dims], sizes: Mapping[str, int]
) -> list[Tensor]:
    """Make examples of other sizes by repeating or cutting.

    Args:
        values: Examples.
        dynamic: Their symbols.
        sizes: New sizes by symbol.

    Returns:
        The new examples.
    """
    resized = []
    for value, dims in zip(values, dynamic, strict=True):
        for dim, name in dims.items():
            if value.shape[dim]:
                index = torch.arange(sizes[name]) % value.shape[dim]
                value = value.index_select(dim, index)
        resized.append(value)
    return resized


def _to_onnx(
    program: torch.export.ExportedProgram, outputs: int, dynamic: Sequence[Dims]
) -> ir.Model:
    """Export a traced loss.

    Args:
        program: The loss.
        outputs: How many of its inputs are outputs of the model.
        dynamic: For each input, the name of the symbol at each dimension of no fixed size.

    Returns:
        The model, with names for inputs, output and sizes.

    Raises:
        ExportError: If torch.onnx can't.
    """  # noqa: DOC502 - raised by translate
    model = translate(program)
    _rename(model, outputs, dynamic)
    casts_like(model)
    optional_outputs(model)
    return model


def _rename(model: ir.Model, outputs: int, dynamic: Sequence[Dims]) -> None:
    """Name inputs, the output and the symbols of sizes.

    Args:
        model: The loss as torch.onnx gives it, edited in place.
        outputs: How many of its inputs are outputs of the model.
        dynamic: For each input, the name of the symbol at each dimension of no fixed size.
    """
    symbols: dict[str, str] = {}
    for number, (value, dims) in enumerate(zip(model.graph.inputs, dynamic, strict=True)):
        target = number - outputs
        value.name = f"output_{number}" if target < 0 else f"target_{target}"
        assert value.shape is not None
        for dim, name in dims.items():
            symbols.setdefault(str(value.shape[dim]), name)
    loss = model.graph.outputs[0]
    if loss.producer() is None:  # a loss that is its input
        copy = ir.node("Identity", [loss], name="identity")
        copy.outputs[0].type, copy.outputs[0].shape = loss.type, loss.shape
        model.graph.append(copy)
        model.graph.outputs[0] = loss = copy.outputs[0]
    loss.name = "loss"
    for node in model.graph:
        node.metadata_props.clear()
    made = (v for node in model.graph for v in node.outputs)
    for value in {*model.graph.inputs, *made}:
        if value.shape is not None:  # an expression of symbols is left open
            value.shape = ir.Shape(
                d if isinstance(d, int) else symbols.get(str(d)) for d in value.shape
            )

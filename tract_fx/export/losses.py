"""Losses by name, as modules and as callables: what they are, and what targets they take.

Every loss is a torch function of (output, *targets).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tract_fx.artifacts.loss_kinds import LOSSES, loss_kind
from tract_fx.errors import UnsupportedTrainingError, did_you_mean

Loss = str | Callable[..., Tensor]


@dataclass(frozen=True)
class TargetSpec:
    """What a loss takes beside the model's output.

    Attributes:
        example: A target that fits the example output.
        classes: For class indices, the number of classes: what is not in [0, classes) has to be
            kept from ONNX Runtime, which reads memory that is not the batch's, or crashes.
        ignore_index: For class indices, the one value outside that range that is right.
    """

    example: Tensor
    classes: int | None = None
    ignore_index: int | None = None


def loss_function(loss: Loss) -> Callable[..., Tensor]:
    """Find the torch function of a loss."""
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss].function
    if isinstance(loss, str) or not callable(loss):
        named = isinstance(loss, str)
        raise UnsupportedTrainingError(
            f"loss={loss!r}" if named else f"loss={loss!r}, a {type(loss).__name__}",
            "no loss has that name" if named else "a loss is a name or a callable",
            f"{did_you_mean(loss, LOSSES)}Use one of {', '.join(map(repr, LOSSES))}, or a "
            "callable loss(output, target)",
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
    """Describe a loss for a manifest or a message."""
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


def loss_target(loss: Loss, outputs: Sequence[Tensor]) -> TargetSpec:
    """Tell what target a loss takes, where its name or type says so."""
    kind = loss_kind(loss)
    if kind is None:
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
    output = outputs[0]
    if kind.classes and output.dim() == 0:
        raise UnsupportedTrainingError(
            f"the output of shape () has no classes, and the loss is {describe_loss(loss)}",
            "class scores are along dimension 1",
            "Use another output or loss",
        )
    sizes = list(output.shape)
    classes = sizes.pop(1 if len(sizes) > 1 else 0) if kind.classes else 0
    count = math.prod(sizes)
    if kind.classes:
        example = (torch.arange(count) % max(classes, 1)).reshape(sizes)
        ignored = getattr(loss, "ignore_index", -100)
        return TargetSpec(example, classes, ignored)
    # Zeros and ones are right for probabilities too.
    return TargetSpec((torch.arange(count) % 2).float().reshape(sizes))

"""Losses by name, as modules and as callables: what they are, and what targets they take.

Every loss is a torch function of (output, *targets).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tract_fx.errors import UnsupportedTrainingError

__all__ = ["LOSSES", "Loss", "TargetSpec", "describe_loss", "loss_function", "loss_targets"]

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


@dataclass(frozen=True)
class TargetSpec:
    """What a loss takes beside the model's output.

    Attributes:
        dtype: The dtype.
        example: A target that fits the example output.
        classes: For class indices, the number of classes: what is not in [0, classes) has to be
            kept from ONNX Runtime, which reads memory that is not the batch's, or crashes.
        ignore_index: For class indices, the one value outside that range that is right.
    """

    dtype: torch.dtype
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


def loss_targets(loss: Loss, outputs: Sequence[Tensor]) -> tuple[TargetSpec, ...]:
    """Tell what targets a loss takes, where its name or type says so.

    Args:
        loss: The loss.
        outputs: The model's example outputs.

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
    output = outputs[0]
    if indices and output.dim() == 0:
        raise UnsupportedTrainingError(
            f"the output of shape () has no classes, and the loss is {describe_loss(loss)}",
            "class scores are along dimension 1",
            "Use another output or loss",
        )
    kept = list(range(output.dim()))
    if indices:
        kept.remove(1 if output.dim() > 1 else 0)
    sizes = [output.shape[d] for d in kept]
    count = torch.Size(sizes).numel()
    if indices:
        classes = output.shape[1 if output.dim() > 1 else 0]
        example = (torch.arange(count) % max(classes, 1)).reshape(sizes)
        ignored = getattr(loss, "ignore_index", -100)
        return (TargetSpec(example.dtype, example, classes, ignored),)
    # Zeros and ones are right for probabilities too.
    example = (torch.arange(count) % 2).float().reshape(sizes)
    return (TargetSpec(example.dtype, example),)

"""The loss of a PyTorch model: what it reads, and what its targets are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tract_fx.errors import UnsupportedTrainingError
from tract_fx.export.losses import Loss, TargetSpec, describe_loss, loss_function, loss_target
from tract_fx.export.torch_model import TorchModel
from tract_fx.step.names import batch_names, output_names


@dataclass(frozen=True)
class TorchLoss:
    """A loss.

    Attributes:
        function: Of what the model returns, and of the targets.
        targets: Examples of these, by name.
        classes: Number of classes and ignored index by name of a target that holds class indices.
        description: The loss in words.
    """

    function: Callable[..., Tensor]
    targets: Mapping[str, Tensor]
    classes: Mapping[str, tuple[int, int | None]]
    description: str


def choose_loss(
    model: TorchModel,
    loss: Loss | None,
    output: str | None,
    example_targets: Sequence[Tensor] | None,
) -> TorchLoss:
    """Find the function of a loss, and examples of its targets."""
    if loss is None:
        return _returned(model, output)
    reads = _reads(model, loss, output)
    function = loss_function(loss)
    values = list(model.outputs.values()) if reads is None else [model.outputs[reads]]
    spec: TargetSpec | None = None
    if example_targets is None:
        spec = loss_target(loss, values)
        targets = [spec.example]
    else:
        _refuse_targets(loss, example_targets)
        targets = [target.detach().cpu() for target in example_targets]
        with contextlib.suppress(UnsupportedTrainingError):  # a callable's targets aren't known
            spec = loss_target(loss, values)
    names = batch_names(model.training, (), {}, len(targets), model.taken)
    given = dict(zip(names, targets, strict=True))
    classes = {}
    if spec is not None and spec.classes is not None:
        for name, target in given.items():
            if target.dtype == spec.example.dtype:
                classes[name] = (spec.classes, spec.ignore_index)
    taken = model.taken

    def compute(output: Any, *targets: Tensor) -> Tensor:
        read = output if reads is None else output_names(output, taken)[reads]
        return function(read, *targets)

    _refuse_loss(compute, (model.output, *targets))
    return TorchLoss(compute, given, classes, describe_loss(loss))


def _refuse_targets(loss: Loss, targets: Sequence[Tensor]) -> None:
    """Refuse example targets that are no tensors, or more than a loss with a name takes."""
    kinds = [type(target).__name__ for target in targets]
    fits = all(isinstance(target, Tensor) for target in targets)
    if not fits or (isinstance(loss, str) and len(kinds) != 1):
        raise UnsupportedTrainingError(
            f"example targets of class {', '.join(kinds) or 'none'}",
            f"{describe_loss(loss)} takes one tensor" if fits else "targets are tensors",
            "Give example_targets=torch.as_tensor(targets)",
        )


def _returned(model: TorchModel, output: str | None) -> TorchLoss:
    """The output that is the loss: the named one, "loss", or the only scalar."""
    scalars = [name for name, value in model.outputs.items() if not value.dim()]
    named = "loss" if "loss" in model.outputs else scalars[0] if len(scalars) == 1 else None
    name = output or named
    if name is None or name not in scalars:
        raise UnsupportedTrainingError(
            f"a model that returns {list(model.outputs)}, of which {scalars} are scalars, and "
            f"{output=}",
            "without loss= the model has to return its loss, as a scalar",
            "Give loss=, for example loss='cross_entropy', or name the output that is the loss",
        )
    taken = model.taken
    return TorchLoss(lambda output: output_names(output, taken)[name], {}, {}, describe_loss(None))


def _reads(model: TorchModel, loss: Loss, output: str | None) -> str | None:
    """Name the output that a loss reads, None where it takes all that the model returns."""
    outputs = list(model.outputs)
    if output is not None:
        if output not in outputs:
            raise UnsupportedTrainingError(
                f"{output=}",
                "the model has no output of that name",
                f"Name one of {outputs}",
            )
        return output
    if len(outputs) == 1:
        return outputs[0]
    if isinstance(loss, (str, nn.Module)):
        if "logits" in outputs:
            return "logits"
        raise UnsupportedTrainingError(
            f"a model with the outputs {outputs} and the loss {describe_loss(loss)}",
            "which of them the loss reads can't be told",
            "Name it with output=, or give a callable loss(output, *targets)",
        )
    return None


def _refuse_loss(function: Callable[..., Tensor], values: Sequence[Any]) -> None:
    """Refuse what is no loss of the outputs and targets alone."""
    tensors = [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]
    shapes = ", ".join(f"{v.dtype} {tuple(v.shape)}" for v in tensors)
    try:
        with torch.enable_grad():
            loss = function(*values)
    except Exception as error:
        raise UnsupportedTrainingError(
            f"the loss fails on the example outputs and targets ({shapes}): {error}",
            "it is called as loss(*outputs, *targets)",
            "Give example targets of the shape and dtype that it takes, or another loss",
        ) from error
    if not isinstance(loss, Tensor) or loss.dim() != 0 or loss.dtype != torch.float32:
        found = (
            f"a {loss.dtype} tensor of shape {tuple(loss.shape)}"
            if isinstance(loss, Tensor)
            else f"a {type(loss).__name__}"
        )
        raise UnsupportedTrainingError(
            f"the loss of ({shapes}) is {found}",
            "training needs one float32 scalar",
            "Reduce it, by mean() or sum(), and give float32 targets",
        )
    if loss.requires_grad:
        raise UnsupportedTrainingError(
            "the loss has a gradient by a tensor that is neither an output nor a target",
            "exported alone, it would hold that tensor (a model's weight, or a parameter of its "
            "own) as a constant, untrained",
            "Let the model's forward compute and return the loss, and give loss=None",
        )

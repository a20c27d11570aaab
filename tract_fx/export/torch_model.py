"""A PyTorch model as it trains and as it is evaluated, with a batch to try it on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from tract_fx.errors import ExportError, InvalidBatchError, TractWarning
from tract_fx.export.eager_forward import call_on_copies, observed_output
from tract_fx.export.evaluation_mode import in_evaluation
from tract_fx.export.lost_in_graphs import (
    refuse_gradient_hooks,
    refuse_several_processes,
    refuse_shared_memory,
)
from tract_fx.importer.forward_model import refuse_shared_names
from tract_fx.modules import copy_tree, named_tensors
from tract_fx.passes import remove_tract
from tract_fx.program import arguments, running
from tract_fx.step.exporter import open_sizes
from tract_fx.step.names import batch_names, output_names


@dataclass(frozen=True)
class TorchModel:
    """A model to export.

    Attributes:
        training: The model in training mode, a copy that shares its tensors.
        evaluation: The same in evaluation mode.
        args: Positional arguments of the example call; a batch of one is doubled.
        kwargs: Keyword arguments of the example call.
        output: What it returns for them in evaluation mode.
        open_axes: For each tensor of the example call the axes whose sizes are left open.
        names: The names of these tensors.
        hidden: Names of outputs that are for the loss alone.
        file: The ONNX graph that the model was read from; None for a PyTorch model.
    """

    training: nn.Module
    evaluation: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    open_axes: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    hidden: tuple[str, ...] = ()
    file: ir.Model | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The example batch by the names of its tensors."""
        return dict(zip(self.names, _tensors(self.args, self.kwargs), strict=True))

    @property
    def batch(self) -> int | None:
        """The example batch's size, None where that is fixed."""
        sizes = [
            len(tensor)
            for tensor, axes in zip(self.inputs.values(), self.open_axes, strict=True)
            if 0 in axes
        ]
        return sizes[0] if sizes else None

    @property
    def outputs(self) -> dict[str, Tensor]:
        """The tensors that it returns in evaluation mode, by name."""
        return output_names(self.output, self.taken)

    @property
    def taken(self) -> set[str]:
        """Names of parameters, buffers and inputs."""
        return {*named_tensors(self.training), *self.inputs}


def read_torch(
    model: nn.Module | ExportedProgram, example_inputs: Any, *, plain: bool, dynamic_batch: bool
) -> TorchModel:
    """Make a model ready to be traced.

    A model in training mode is taken as it is, with those of its modules that are in evaluation
    mode, a frozen BatchNorm for one; a model in evaluation mode is put in training mode as a whole.
    """
    module = model.module() if isinstance(model, ExportedProgram) else model
    if plain:
        module = remove_tract(module)
    args, kwargs = arguments(example_inputs)
    _refuse_empty(_tensors(args, kwargs))
    args, kwargs = _two_images(args, kwargs) if dynamic_batch else (args, kwargs)
    refuse_several_processes(module)
    refuse_gradient_hooks(module)
    refuse_shared_memory(module)
    _refuse_cumulative_average(module)
    training, evaluation = _modes(module)
    own = named_tensors(training)
    refuse_shared_names(batch_names(training, args, kwargs, 0, set()), own)
    given = batch_names(training, args, kwargs, 0, {*own})
    taken = {*own, *given}
    copies = {n: tensor.detach().clone() for n, tensor in named_tensors(evaluation).items()}
    with running(module):
        trained = output_names(observed_output(training, args, kwargs), taken)
        with torch.no_grad():
            output = call_on_copies(evaluation, copies, args, kwargs)
    names = [*trained], [*output_names(output, taken)]
    if names[0] != names[1]:
        raise ExportError(
            f"a model that returns {names[0]} in training and {names[1]} in evaluation",
            "one loss has to apply to both",
            "Make it return the same in both modes",
        )
    opened = tuple(open_sizes(_tensors(args, kwargs), dynamic_batch))
    return TorchModel(training, evaluation, args, kwargs, output, opened, given)


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]


def _refuse_empty(batch: Sequence[Tensor]) -> None:
    for tensor in batch:
        if not tensor.numel():
            raise InvalidBatchError(
                f"an example input of shape {tuple(tensor.shape)}",
                "an export is tried out on it, and it is empty",
                "Give a batch of a few images",
            )


def _modes(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model in training and in evaluation mode."""
    training = copy_tree(model)
    try:
        if not training.training:
            warnings.warn(
                f"{type(model).__name__} is in evaluation mode: it is exported in training mode, "
                "all of it. Call model.train() first, and .eval() on what is to stay frozen.",
                TractWarning,
                stacklevel=2,
            )
            training.train()
        return training, copy_tree(model).eval()
    except NotImplementedError:  # an exported program's module has its mode in its graph
        assert isinstance(model, torch.fx.GraphModule)
        return copy_tree(model), in_evaluation(model)


def _two_images(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Double a batch of one, which tracing would take for a batch that is always one."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    sized = [v for v in leaves if isinstance(v, torch.Tensor) and v.dim()]
    if not sized or len(sized[0]) != 1:
        return args, kwargs
    doubled = [
        torch.cat([v, v]) if isinstance(v, torch.Tensor) and v.dim() and len(v) == 1 else v
        for v in leaves
    ]
    return pytree.tree_unflatten(doubled, spec)  # type: ignore[no-any-return]


def _refuse_cumulative_average(model: nn.Module) -> None:
    for name, module in model.named_modules():
        averaged = getattr(module, "track_running_stats", False) and module.training
        if averaged and getattr(module, "momentum", 0.1) is None:
            raise ExportError(
                f"{name} ({type(module).__name__} with momentum=None)",
                "its running statistics are cumulative averages, which ONNX does not have",
                "Give it a momentum, 0.1 for example",
            )

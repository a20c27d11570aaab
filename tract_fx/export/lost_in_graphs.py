"""What a PyTorch model has beside its forward pass, and what a graph would lose without a word."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils._sympy.numbers import int_oo

from tract_fx.errors import ExportError, UnsupportedTrainingError
from tract_fx.torch_private import guards

__all__ = [
    "refuse_bounded_batch",
    "refuse_embedding_options",
    "refuse_gradient_hooks",
    "refuse_other_parameters",
    "refuse_shared_memory",
]

# Two inputs of one batch: a trainer checks that.
_SAME_SIZE = re.compile(r"\S+\.size\(\)\[\d+\] [=<>]= \S+\.size\(\)\[\d+\]")
_MODULE_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def refuse_gradient_hooks(model: nn.Module) -> None:
    """Refuse hooks that see or change gradients: the exported graph has none.

    Args:
        model: The model.

    Raises:
        ExportError: A module or a parameter has such a hook.
    """
    for name, module in model.named_modules():
        if any(getattr(module, kind, None) for kind in _MODULE_HOOKS):
            raise ExportError(
                f"a backward hook on {name or 'the model'} ({type(module).__name__})",
                "the training graph runs no Python, so that the hook would be lost",
                "Remove the hook, or train in PyTorch",
            )
    for name, parameter in model.named_parameters():
        if any(getattr(parameter, kind, None) for kind in _TENSOR_HOOKS):
            raise ExportError(
                f"a gradient hook on the parameter {name}",
                "the training graph runs no Python, so that the hook would be lost",
                "Remove the hook, or train in PyTorch",
            )


def refuse_other_parameters(optimizer: object, model: nn.Module) -> None:
    """Refuse a torch optimizer of other parameters than those that the graph would train.

    Args:
        optimizer: What was given as the optimizer.
        model: The model.

    Raises:
        UnsupportedTrainingError: It leaves out a parameter that requires a gradient, or holds one
            of another model.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = {id(p) for p in model.parameters()}
    left_out = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if left_out:
        raise UnsupportedTrainingError(
            f"an optimizer without {left_out[0]} and {len(left_out) - 1} other parameters that "
            "require gradients",
            "the exported optimizer updates all parameters that do",
            "Set requires_grad to False where a parameter is not to be trained",
        )
    if held - own:
        raise UnsupportedTrainingError(
            f"an optimizer with {len(held - own)} parameters that are not the model's",
            "its settings are meant for another model",
            "Make the optimizer from the parameters of the model that is exported",
        )


def refuse_bounded_batch(program: ExportedProgram) -> None:
    """Refuse a program that holds for some batch sizes alone.

    Args:
        program: A model, or a loss, captured with an open batch.

    Raises:
        ExportError: It branched on the batch's size.
    """
    bounded = [
        f"{bounds.lower} <= size <= {bounds.upper}"
        for bounds in program.range_constraints.values()
        if bounds.lower > 2 or bounds.upper != int_oo
    ]
    conditions = [c for c in guards(program) if not _SAME_SIZE.fullmatch(c)] + bounded
    if conditions:
        raise ExportError(
            f"a forward pass that holds for inputs with {conditions[0]} alone",
            "the graph would compute the example batch's branch for batches of every size",
            "Leave such branches out, or export for one batch size with dynamic_batch=False",
        )


def refuse_embedding_options(program: ExportedProgram) -> None:
    """Refuse embeddings whose gradient is not the look-up's own.

    Args:
        program: A model.

    Raises:
        ExportError: One has a padding index, or scales by frequency.
    """
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.embedding.default:
            padding, *scaled = [*node.args[2:], -1, False][:2]
            if padding != -1 or any(scaled):
                raise ExportError(
                    f"an embedding with padding_idx or scale_grad_by_freq (node {node.name!r})",
                    "ONNX has the look-up alone, whose gradient would train the padding row, or "
                    "not be scaled",
                    "Leave the option out",
                )


def refuse_shared_memory(model: nn.Module) -> None:
    """Refuse parameters that are different objects over the same memory.

    Args:
        model: The model.

    Raises:
        ExportError: Two of them are; in a graph they would be trained apart.
    """
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.is_meta or not parameter.numel():
            continue
        other = first.setdefault(parameter.data_ptr(), name)
        if other != name:
            raise ExportError(
                f"the parameters {other} and {name}, which lie in the same memory",
                "in a graph each has memory of its own, so that they would be trained apart",
                "Make them one parameter (b.weight = a.weight), which is kept as one",
            )

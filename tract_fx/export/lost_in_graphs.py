"""What a PyTorch model has beside its forward pass, and what a graph would lose without a word."""

from __future__ import annotations

import torch
from torch import nn

from tract_fx.errors import ExportError, UnsupportedTrainingError
from tract_fx.passes.fx_graph import layers_over_processes

_MODULE_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def refuse_gradient_hooks(model: nn.Module) -> None:
    """Refuse hooks that see or change gradients: the exported graph has none."""
    found = [
        f"a backward hook on {name or 'the model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if any(getattr(module, kind, None) for kind in _MODULE_HOOKS)
    ]
    found += [
        f"a gradient hook on the parameter {name}"
        for name, parameter in model.named_parameters()
        if any(getattr(parameter, kind, None) for kind in _TENSOR_HOOKS)
    ]
    if found:
        raise ExportError(
            found[0],
            "the training graph runs no Python, so that the hook would be lost",
            "Remove the hook, or train in PyTorch",
        )


def refuse_several_processes(model: nn.Module) -> None:
    """Refuse a Gram of the rows of several processes: a graph runs in one."""
    names = layers_over_processes(model)
    if names:
        raise ExportError(
            f"TrAct with gram='global' on {', '.join(names)}",
            "ONNX Runtime's graph runs in one process and has no sum over several",
            "Export tract_pass(model) with gram='local', or train in PyTorch",
        )


def refuse_other_parameters(optimizer: object, model: nn.Module) -> None:
    """Refuse a torch optimizer of other parameters than those that the graph would train."""
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


def refuse_shared_memory(model: nn.Module) -> None:
    """Refuse parameters that are different objects over the same memory."""
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

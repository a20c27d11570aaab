"""One forward pass of a PyTorch model, watched for what a graph would lose without a word."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tract_fx import torch_private
from tract_fx.errors import ExportError
from tract_fx.export.no_dropout import no_dropout
from tract_fx.function_mode import FunctionMode
from tract_fx.modules import named_tensors


def observed_output(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a model forward once, on copies of its tensors."""
    tensors = {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        for name, value in named_tensors(module).items()
    }
    with no_dropout(module) as plain, _NoGradientHooks(), torch.enable_grad():
        numbers = _numbers(plain)
        output = call_on_copies(plain, tensors, args, kwargs)
        _refuse_counting(numbers, _numbers(plain))
    return output


def call_on_copies(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call a model on other tensors than its own, and leave the inputs and random state alone."""
    given, keywords = pytree.tree_map_only(
        Tensor, lambda value: value.detach().clone(), (args, dict(kwargs))
    )
    with torch.random.fork_rng(devices=[]), torch_private.without_checkpoints():
        return torch.func.functional_call(module, dict(tensors), given, keywords)


class _NoGradientHooks(FunctionMode):
    def _call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if function in {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}:
            raise ExportError(
                f"{function.__name__} in the model's forward",
                "the training graph runs no Python, so that the hook would be lost",
                "Write what it does with PyTorch's operators, or train in PyTorch",
            )
        return function(*args, **kwargs)


def _numbers(module: nn.Module) -> dict[str, int | float]:
    """Numbers that modules hold as plain attributes."""
    return {
        f"{name}.{key}".lstrip("."): value
        for name, child in module.named_modules()
        for key, value in vars(child).items()
        if isinstance(value, (int, float))
    }


def _refuse_counting(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    changed = sorted(k for k, value in after.items() if k in before and before[k] != value)
    if changed:
        raise ExportError(
            f"the attributes {changed}, which the forward pass changes",
            "a graph keeps the values that they have while it is exported",
            "Move the change out of forward()",
        )

"""Watch the gradients of layers with TrAct, whoever runs the training loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import oracle
from tract_fx.modules.layer import TractLayer, tract_lambda


@contextmanager
def watched_gradients() -> Iterator[list[float]]:
    """Compare the weight's gradient of each call of a TrAct layer with the oracle's.

    Yields:
        The relative errors, one for each backward pass through a call, as they come. Empty where
        nothing with TrAct was trained. A layer is called once per backward pass.
    """
    errors: list[float] = []

    def after_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, TractLayer) and isinstance(output, Tensor) and output.requires_grad:
            _watch_call(module, args[0].detach(), output, errors)

    handle = register_module_forward_hook(after_forward)
    try:
        yield errors
    finally:
        handle.remove()


def _watch_call(module: TractLayer, x: Tensor, output: Tensor, errors: list[float]) -> None:
    weight, lambda_ = module.weight, tract_lambda(module)
    assert isinstance(weight, Tensor) and lambda_ is not None

    def after_backward(dz: Tensor) -> None:
        dz = dz.detach().clone()

        def compare(gradient: Tensor) -> None:
            handle.remove()
            expected = oracle.tract_gradient(module, x, dz, lambda_)
            errors.append(oracle.relative_error(gradient, expected))

        handle = weight.register_hook(compare)

    output.register_hook(after_backward)

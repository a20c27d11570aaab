"""TrAct's op inside a layer's own forward method, whatever that does besides.

While the method runs, the functions that it calls are looked at: the one linear or convolution
function on the layer's weight gets that weight through TrAct's op. The method may pad or
standardise as it likes; what it returns is what it returns without TrAct.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tract_fx import torch_private
from tract_fx.errors import UnsupportedLayerError, UnsupportedTransformError
from tract_fx.function_mode import FunctionMode
from tract_fx.preconditioner import LAYER_KINDS, multiply
from tract_fx.torch_private import requires_grad_at_any_level

_ARGUMENTS = {kind.function: kind.arguments for kind in LAYER_KINDS}


class OpOnWeight(FunctionMode):
    """A context in which a layer's forward method runs; it counts products with the weight."""

    def __init__(self, layer: nn.Module, lambda_: float, scope: str | None) -> None:
        super().__init__()
        self.layer = layer
        self.lambda_ = lambda_
        self.scope = scope
        self.calls = 0
        self.unrecorded = False
        self._around = self._checkpoint()
        self._recomputed = False

    def enter_class(self) -> None:
        """Note that the layer's class's method runs, in that of the instance.

        What has called it, a checkpoint say, calls it again in the backward pass.
        """
        self._around = self._checkpoint()
        self._recomputed = not torch.is_grad_enabled()

    @staticmethod
    def _checkpoint() -> Any:
        is_compiling = torch.compiler.is_compiling()
        return None if is_compiling else torch_private.innermost_checkpoint()

    def _call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        names = _ARGUMENTS.get(function)
        if names is None:
            return function(*args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        if not self._is_trained(weight):
            return function(*args, **kwargs)
        if not (torch.is_grad_enabled() or torch.compiler.is_exporting()):
            self.unrecorded = True
            return function(*args, **kwargs)
        if isinstance(weight, Tensor) and weight.dim() < 2:
            raise UnsupportedLayerError(
                f"a weight of shape {tuple(weight.shape)} in the forward method of a "
                f"{type(self.layer).__name__}",
                "it is a vector, not a matrix",
                "Write it as torch.nn.functional.linear(x, weight[None]).squeeze(-1)",
            )
        if self._checkpoint() is not self._around:
            raise UnsupportedLayerError(
                f"a checkpoint in the forward method of a {type(self.layer).__name__}",
                "what it computes again in the backward pass would be without TrAct",
                "Checkpoint the layer's call: checkpoint(layer, x, use_reentrant=False)",
            )
        self.calls += 1
        refuse_frozen_value(self.layer, weight, x)
        return multiply(function, x, weight, bias, lambda_=self.lambda_, scope=self.scope, **given)

    def _is_trained(self, weight: Any) -> bool:
        """Tell the layer's weight, or what is computed from it, from a constant filter."""
        known = isinstance(weight, (nn.Parameter, fx.Proxy))
        if known or torch_private.is_expanded_weight(weight):
            return True
        if requires_grad_at_any_level(weight):
            return True
        # What is frozen may be trained again after an export, by then without this method.
        frozen = not any(p.requires_grad for p in self.layer.parameters())
        is_constant = any(weight is b for b in self.layer.buffers())
        return torch.compiler.is_exporting() and frozen and not is_constant

    def check(self, result: Any) -> None:
        """Make sure, of what the method has returned, that its one product had TrAct's op."""
        wants_gradient = any(p.requires_grad for p in self.layer.parameters())
        if self.calls == 1 or not torch.is_grad_enabled() or not (self.calls or wants_gradient):
            return
        found = f"the forward method of a {type(self.layer).__name__}"
        if self.unrecorded and not self.calls:
            tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            if self._recomputed or not any(map(requires_grad_at_any_level, tensors)):
                return
            raise UnsupportedLayerError(
                found,
                "it multiplies with its weight inside an autograd Function (its own, or a "
                "checkpoint's of the reentrant kind), which computes the gradient itself",
                "Checkpoint the layer's call: checkpoint(layer, x, use_reentrant=False); or use "
                "tract_pass on torch.export.export(model, inputs), where the call is a node",
            )
        several = (
            f"it multiplies with trained weights {self.calls} times, each with rows of its own"
        )
        none = (
            "it multiplies with its weight by another function than torch.nn.functional's linear, "
            "conv1d, conv2d and conv3d"
        )
        raise UnsupportedLayerError(
            found,
            several if self.calls else none,
            "Use tract_pass on torch.export.export(model, inputs), where each call is a node",
        )


def refuse_frozen_value(layer: nn.Module, weight: Any, x: Any) -> None:
    """Refuse a computed weight whose value a tracer would keep instead of its computation."""
    if isinstance(x, fx.Proxy) and not isinstance(weight, (nn.Parameter, fx.Proxy)):
        raise UnsupportedTransformError(
            f"the computed weight of a {type(layer).__name__} under an fx tracer",
            "the tracer would freeze the weight's present value, and its parameters would get no "
            "gradient",
            "Trace the plain model and apply the pass to that, or make the layer a leaf of the "
            "tracer",
        )

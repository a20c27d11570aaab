"""Linear and convolution modules whose weight's gradient is preconditioned.

A TrAct layer is the user's module in another class: the same parameters, buffers, hooks and names.
Its class derives from the user's, so that `isinstance`, hooks, pruning, weight_norm and sharding go
on working, also those that are added later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from tract_fx.errors import UnsupportedTransformError
from tract_fx.preconditioner import precondition_grad

__all__ = ["TractLayer", "plain_class", "to_plain", "to_tract", "why_not"]

_FUNCTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: functional.linear,
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}


class TractLayer(nn.Module):
    """What TrAct layers have in common. Made by `to_tract`, never by hand.

    Attributes:
        tract_lambda: λ of this layer, > 0.
    """

    tract_lambda: float

    def forward(self, input: Tensor, *, tract: bool = True) -> Tensor:  # noqa: A002
        """Compute what the plain layer computes.

        Args:
            input: The layer's input.
            tract: Whether this call's weight gradient is preconditioned. The pass sets it to False
                on those calls of a shared layer that do not read the model's input.

        Returns:
            The layer's output, equal to the plain layer's.
        """
        layer: Any = self
        (function,) = (f for base, f in _FUNCTIONS.items() if isinstance(layer, base))
        geometry: dict[str, Any] = {}
        if not isinstance(layer, nn.Linear):
            geometry = {k: getattr(layer, k) for k in ("stride", "padding", "dilation", "groups")}
            if layer.padding_mode != "zeros":
                pads = layer._reversed_padding_repeated_twice
                input = functional.pad(input, pads, mode=layer.padding_mode)  # noqa: A001
                geometry["padding"] = 0
        weight = _traceable_weight(layer, input)
        if tract:
            weight = precondition_grad(weight, input, lambda_=layer.tract_lambda, **geometry)
        return function(input, weight, layer.bias, **geometry)

    def extra_repr(self) -> str:
        """Say what the plain layer says, and λ.

        Returns:
            The text between the parentheses of the layer's representation.
        """
        return f"{super().extra_repr()}, lambda_={self.tract_lambda}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the user's class, since a TrAct class has no importable name."""
        get_state: Any = getattr(
            self, "__getstate__", lambda: self.__dict__
        )  # Python 3.10 has none
        return _empty_tract_layer, (plain_class(type(self)),), get_state()


def _traceable_weight(layer: Any, x: Tensor) -> Tensor:
    """The weight; refused where a tracer would keep its value instead of its computation."""
    weight: Tensor = layer.weight
    if isinstance(x, fx.Proxy) and not isinstance(weight, (nn.Parameter, fx.Proxy)):
        raise UnsupportedTransformError(
            f"the computed weight of a {type(layer).__name__} under an fx tracer",
            "the tracer would freeze the weight's present value, and its parameters would get no "
            "gradient",
            "Trace the plain model and apply the pass to that, or make the layer a leaf of the "
            "tracer",
        )
    return weight


# A TrAct class keeps the user's class alive, not the other way round: parametrized layers have a
# class each.
_tract_classes: WeakValueDictionary[type[nn.Module], type[nn.Module]] = WeakValueDictionary()


def _tract_class(base: type[nn.Module]) -> type[nn.Module]:
    """Derive the TrAct class of a layer class; one per class, so that types can be compared."""
    if base.__module__ == parametrize.__name__:
        # Stays outermost, and the module's own: removing the parametrization takes the class apart.
        return _rebase(base, f"Tract{base.__name__}", (_tract_class(base.__bases__[0]),))
    cls = _tract_classes.get(base)
    if cls is None:
        # The user's __module__, by which fx tells a leaf: inlined, a layer would lose its hooks.
        namespace = {"__doc__": TractLayer.__doc__, "__module__": base.__module__}
        cls = type(f"Tract{base.__name__}", (TractLayer, base), namespace)
        _tract_classes[base] = cls
    return cls


def _empty_tract_layer(base: type[nn.Module]) -> nn.Module:
    """Make a TrAct layer without a state, for unpickling."""
    return object.__new__(_tract_class(base))


def plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Give the class that a TrAct layer's class was made from.

    Args:
        cls: The class of a TrAct layer, or one derived from it since (by a parametrization or by
            sharding).

    Returns:
        The same class without TrAct.
    """
    if TractLayer in cls.__bases__:
        return cls.__bases__[1]
    if not issubclass(cls, TractLayer):
        return cls
    bases = tuple(plain_class(base) for base in cls.__bases__)
    return _rebase(cls, cls.__name__.replace("Tract", "", 1), bases)


def _rebase(cls: type[nn.Module], name: str, bases: tuple[type[nn.Module], ...]) -> type[nn.Module]:
    """Make a class of the same members on other bases."""
    namespace = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(name, bases, namespace)


def to_tract(module: nn.Module, lambda_: float) -> None:
    """Turn a layer into a TrAct layer, in place, or give a TrAct layer another λ.

    Args:
        module: A layer that `why_not` has no objection to.
        lambda_: λ > 0.
    """
    if not isinstance(module, TractLayer):
        cls: Any = _tract_class(type(module))
        module.__class__ = cls
    module.__dict__["tract_lambda"] = lambda_


def to_plain(module: nn.Module) -> None:
    """Turn a TrAct layer back into the layer that it was made from, in place.

    Args:
        module: Any module; one that is no TrAct layer stays as it is.
    """
    if isinstance(module, TractLayer):
        cls: Any = plain_class(type(module))
        module.__class__ = cls
        del module.__dict__["tract_lambda"]


def why_not(module: nn.Module) -> str | None:
    """Say why a module can't become a TrAct layer.

    Args:
        module: Any module.

    Returns:
        The reason, None where it can.
    """
    cls = plain_class(type(module)) if isinstance(module, TractLayer) else type(module)
    if any(base.__module__.partition(".")[0] == "torch_tract" for base in cls.__mro__):
        return "it is wrapped by torch-tract already, which a graph would lose"
    base = next((b for b in _FUNCTIONS if issubclass(cls, b)), None)
    if base is None:
        return "it is neither nn.Linear nor nn.Conv1d, nn.Conv2d or nn.Conv3d"
    if any(is_lazy(p) for p in module.parameters(recurse=False)):
        return "its parameters are not initialised yet (run one batch through the model first)"
    own = [
        m for m in ("forward", "_conv_forward") if getattr(cls, m, None) != getattr(base, m, None)
    ]
    own += [m for m in ("forward", "_conv_forward") if m in vars(module)]
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "it only keeps the weight, which the module around it uses without calling it"
    if own:
        method = own[0]
        return f"it has a {method} method of its own, which may not use the weight as is"
    return None

"""Linear and convolution modules whose weight's gradient is preconditioned.

A TrAct layer is the user's module in another class: the same parameters, buffers, hooks and names.
Its class derives from the user's, so that `isinstance`, hooks, pruning, weight_norm and sharding go
on working, also those that are added later.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from tract_fx.modules.op_on_weight import OpOnWeight, refuse_frozen_value
from tract_fx.preconditioner import GEOMETRY, LAYER_KINDS, group_of, multiply, refuse_script

_FUNCTIONS = {kind.module: kind.function for kind in LAYER_KINDS}
_NAMES = {kind.module: kind.op for kind in LAYER_KINDS}


class TractLayer(nn.Module):
    """What TrAct layers have in common. Made by `to_tract`, never by hand.

    An instance without λ (one that other code has made by its class) is the plain layer.

    Attributes:
        tract_lambda: λ of this layer, > 0.
        tract_scope: Whose rows its Gram is of (see `GramScope`), None for the call's own.
        tract_scope_of_copies: While rows of several calls are added up, the scope without that: a
            copy is another layer, with gradients of its own.
        tract_plain: The user's class.
        tract_kind: PyTorch's class that it derives from.
    """

    tract_lambda: float
    tract_scope: str | None
    tract_scope_of_copies: str | None
    tract_plain: type[nn.Module]
    tract_kind: type[nn.Module]

    def forward(self, *args: Any, tract: bool = True, **kwargs: Any) -> Any:
        """Compute what the plain layer computes.

        Args:
            *args: What the plain layer takes.
            tract: Whether this call's weight gradient is preconditioned. The pass sets it to False
                on those calls of a shared layer that do not read the model's input.
            **kwargs: What the plain layer takes.

        Returns:
            The layer's output, equal to the plain layer's.
        """
        if not isinstance(self, TractLayer):  # a method that was kept, of what is plain by now
            return type(self).forward(self, *args, **kwargs)
        lambda_ = tract_lambda(self)
        if lambda_ is None or not tract or _runs_own(self):
            return super().forward(*args, **kwargs)
        if _is_standard(self, self.tract_plain, self.tract_kind):
            return _run_standard(self, lambda_, *args, **kwargs)
        return _run_with_op(self, lambda_, super().forward, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a forward method of the instance's own runs as the class's does."""
        if name == "forward":
            value = partial(_run_own, self, value)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """Say what the plain layer says, and λ."""
        lambda_ = tract_lambda(self)
        if lambda_ is None:
            return super().extra_repr()
        gram = "" if group_of(tract_scope(self)) is None else ", gram='global'"
        return super().extra_repr() + f", lambda_={lambda_}{gram}"

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse `torch.jit.script`, which calls this, unless the layer is the plain one."""
        return self if tract_lambda(self) is None else refuse_script()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the user's class, since a TrAct class has no importable name."""
        get_state: Any = getattr(
            self, "__getstate__", lambda: self.__dict__
        )  # Python 3.10 has none
        return _empty_tract_layer, (plain_class(type(self)),), state_of_copy(get_state())


def state_of_copy(state: Any) -> Any:
    """Give what a copy of a module has: a layer whose rows are added up over calls is one layer.

    What a class of the user's makes of its attributes stays as it is.
    """
    if not isinstance(state, dict) or "tract_scope_of_copies" not in state:
        return state
    outside = state["tract_scope_of_copies"]
    return {k: v for k, v in state.items() if k != "tract_scope_of_copies"} | {
        "tract_scope": outside
    }


@contextmanager
def outside_steps(model: nn.Module) -> Iterator[None]:
    """Let layers whose rows are added up over calls have a Gram of each call for a while."""
    layers = [vars(m) for m in model.modules() if "tract_scope_of_copies" in vars(m)]
    scopes = [layer["tract_scope"] for layer in layers]
    try:
        for layer in layers:
            layer["tract_scope"] = layer["tract_scope_of_copies"]
        yield
    finally:
        for layer, scope in zip(layers, scopes, strict=True):
            layer["tract_scope"] = scope


def tract_lambda(module: nn.Module) -> float | None:
    """Give a TrAct layer's λ, None for a plain one.

    None too for one whose forward method something has replaced behind `__setattr__`'s back.
    """
    value: float | None = vars(module).get("tract_lambda")
    own = vars(module).get("forward")
    is_replaced = own is not None and getattr(own, "func", None) is not _run_own
    return value if isinstance(module, TractLayer) and not is_replaced else None


def tract_scope(module: nn.Module) -> str | None:
    """Tell whose rows a TrAct layer's Gram is of, None for those of each call alone."""
    scope: str | None = vars(module).get("tract_scope")
    return scope


def _run_standard(layer: Any, lambda_: float, input: Tensor) -> Tensor:  # noqa: A002
    """Run PyTorch's own forward method with the op in it: no mode, which compilers can't always."""
    (function,) = (f for base, f in _FUNCTIONS.items() if isinstance(layer, base))
    geometry: dict[str, Any] = {}
    if not isinstance(layer, nn.Linear):
        geometry = {k: getattr(layer, k) for k in GEOMETRY}
        if layer.padding_mode != "zeros":
            pads = layer._reversed_padding_repeated_twice
            input = functional.pad(input, pads, mode=layer.padding_mode)  # noqa: A001
            geometry["padding"] = 0
    weight = layer.weight
    refuse_frozen_value(layer, weight, input)
    scope = tract_scope(layer)
    return multiply(function, input, weight, layer.bias, lambda_=lambda_, scope=scope, **geometry)


def _run_with_op(layer: nn.Module, lambda_: float, forward: Any, args: Any, kwargs: Any) -> Any:
    op = OpOnWeight(layer, lambda_, tract_scope(layer))
    if "forward" in vars(layer):
        _running()[id(layer)] = op
    with op:
        result = forward(*args, **kwargs)
    op.check(result)
    return result


_inside = threading.local()


def _running() -> dict[int, OpOnWeight | None]:
    """Layers, by identity, whose instance's own forward method this thread runs, with their ops."""
    running: dict[int, OpOnWeight | None] = vars(_inside).setdefault("layers", {})
    return running


def _run_own(layer: nn.Module, forward: Any, *args: Any, tract: bool = True, **kwargs: Any) -> Any:
    """Run an instance's own forward method, which may call its class's."""
    lambda_ = tract_lambda(layer)
    if lambda_ is None or _runs_own(layer):
        return forward(*args, **kwargs)
    _running()[id(layer)] = None
    try:
        if tract:
            return _run_with_op(layer, lambda_, forward, args, kwargs)
        return forward(*args, **kwargs)
    finally:
        del _running()[id(layer)]


def _runs_own(layer: nn.Module) -> bool:
    if not ("forward" in vars(layer) and id(layer) in _running()):
        return False
    if (op := _running()[id(layer)]) is not None:
        op.enter_class()
    return True


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
        kind = next(kind for kind in _FUNCTIONS if issubclass(base, kind))
        namespace = {
            "__doc__": TractLayer.__doc__,
            "__module__": base.__module__,
            "tract_plain": base,
            "tract_kind": kind,
        }
        cls = type(f"Tract{base.__name__}", (TractLayer, base), namespace)
        _tract_classes[base] = cls
    return cls


def _empty_tract_layer(base: type[nn.Module]) -> nn.Module:
    """Make a TrAct layer without a state, for unpickling."""
    return object.__new__(_tract_class(base))


def plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Give the class that a TrAct layer's class was made from.

    Of one that was derived from it since, by a parametrization or by sharding, the same without
    TrAct.
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


def to_tract(module: nn.Module, lambda_: float, scope: str | None) -> None:
    """Turn a layer into a TrAct layer, in place, or give a TrAct layer another λ and scope."""
    if not isinstance(module, TractLayer):
        cls: Any = _tract_class(type(module))
        module.__class__ = cls
        if "forward" in vars(module):
            module.forward = vars(module)["forward"]
    module.__dict__["tract_lambda"] = lambda_
    module.__dict__["tract_scope"] = scope  # also None: compilers don't see what is not there


def to_plain(module: nn.Module) -> None:
    """Turn a TrAct layer back into the layer that it was made from, in place."""
    if isinstance(module, TractLayer):
        cls: Any = plain_class(type(module))
        module.__class__ = cls
        vars(module).pop("tract_lambda", None)
        vars(module).pop("tract_scope", None)
        if "forward" in vars(module):
            vars(module)["forward"] = own_forward(module)


def own_forward(module: nn.Module) -> Any:
    """Give a forward method that was set on an instance, as it was set; None for the class's."""
    found = vars(module).get("forward")
    while isinstance(found, partial) and found.func is _run_own:
        found = found.args[1]
    return found


def is_standard(module: nn.Module) -> bool:
    """Tell whether a layer runs PyTorch's own forward method, so that its attributes say all."""
    cls = plain_class(type(module))
    kind = next((base for base in _FUNCTIONS if issubclass(cls, base)), None)
    return kind is not None and _is_standard(module, cls, kind)


def _is_standard(module: nn.Module, cls: Any, kind: Any) -> bool:
    """Compare by identity alone, which the compiler can trace."""
    forward, beneath = _STANDARD[kind]
    own = "forward" in vars(module) or "_conv_forward" in vars(module)
    same = cls.forward is forward and getattr(cls, "_conv_forward", None) is beneath
    # Mixed precision and profilers wrap what these methods call.
    return same and not own and getattr(functional, _NAMES[kind]) is _FUNCTIONS[kind]


# As they are before anybody replaces one for the whole process.
_STANDARD: dict[type[nn.Module], tuple[Any, Any]] = {
    base: (base.forward, getattr(base, "_conv_forward", None)) for base in _FUNCTIONS
}

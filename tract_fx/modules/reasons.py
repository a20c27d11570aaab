"""Why a module can't become a TrAct layer, and what to do instead."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from tract_fx.modules.layer import TractLayer, plain_class
from tract_fx.preconditioner import kind_of


@dataclass(frozen=True)
class Why:
    """Why a layer or an operation can't be treated.

    Attributes:
        reason: Why that can't be.
        remedy: What to do instead.
        competes: Whether it stands where an input layer would, so that another layer beside it is
            no longer the one obvious choice.
    """

    reason: str
    remedy: str = "Name the layer to treat with layers=[…]"
    competes: bool = True


TORCH_TRACT = Why(
    "it is wrapped by torch-tract already, whose gradient tracing and exporting lose",
    "Build the model with the plain nn.Linear or nn.Conv2d and apply TrAct to that",
)


def why_not(module: nn.Module) -> Why | None:
    """Say why a module can't become a TrAct layer, and the way out; None where it can."""
    cls = plain_class(type(module)) if isinstance(module, TractLayer) else type(module)
    if is_of_torch_tract(cls):
        return TORCH_TRACT
    if kind_of(cls) is None:
        return Why("it is neither nn.Linear nor nn.Conv1d, nn.Conv2d or nn.Conv3d")
    if any(is_lazy(p) for p in module.parameters(recurse=False)):
        return Why(
            "its parameters are not initialised yet",
            "Run one batch through the model, then trace it anew",
        )
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return Why("it only keeps the weight, which the module around it uses without calling it")
    return None


def is_of_torch_tract(kind: type[nn.Module] | str) -> bool:
    """Tell a class that is, or derives from, one of torch_tract's layers; or its full name."""
    names = [kind] if isinstance(kind, str) else [base.__module__ for base in kind.__mro__]
    return any(name.partition(".")[0] == "torch_tract" for name in names)

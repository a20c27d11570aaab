"""The losses that are known: by name, as functions and as modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LOSSES", "LossKind", "loss_kind"]


@dataclass(frozen=True)
class LossKind:
    """One kind of loss. A new one needs a line in the table below, and nothing else.

    Attributes:
        function: PyTorch's function of (output, target).
        module: Its class of the same.
        name: What `loss=` takes, None where it is given as function or module alone.
        classes: Whether the target holds class indices, of the output's dimension 1; otherwise it
            has the output's shape.
        inside: The activation that it has in itself, so that it takes logits.
    """

    function: Callable[..., Tensor]
    module: type[nn.Module]
    name: str | None = None
    classes: bool = False
    inside: Literal["softmax", "sigmoid"] | None = None


_KINDS = (
    LossKind(F.cross_entropy, nn.CrossEntropyLoss, "cross_entropy", classes=True, inside="softmax"),
    LossKind(F.mse_loss, nn.MSELoss, "mse"),
    LossKind(
        F.binary_cross_entropy_with_logits,
        nn.BCEWithLogitsLoss,
        "bce_with_logits",
        inside="sigmoid",
    ),
    LossKind(F.l1_loss, nn.L1Loss, "l1"),
    LossKind(F.nll_loss, nn.NLLLoss, classes=True),
    LossKind(F.smooth_l1_loss, nn.SmoothL1Loss),
    LossKind(F.huber_loss, nn.HuberLoss),
    LossKind(F.binary_cross_entropy, nn.BCELoss),
)
LOSSES = {kind.name: kind for kind in _KINDS if kind.name is not None}
"""Those with a name, by it."""
_BY_VALUE: dict[Any, LossKind] = {
    **LOSSES,
    **{value: kind for kind in _KINDS for value in (kind.function, kind.module)},
}


def loss_kind(loss: object) -> LossKind | None:
    """Tell the kind of a name, a function or a module; None for others, derived classes too."""
    return _BY_VALUE.get(type(loss) if isinstance(loss, nn.Module) else loss)

"""Loss scaling, as `torch.amp.GradScaler` does it, inside a step's graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tract_fx.errors import UnsupportedTrainingError
from tract_fx.passes.onnx_graph.step_names import LOSS_SCALE, STEPS_WITH_SCALE


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """What the loss is multiplied with before gradients are taken, and divided out of them after.

    An update whose gradients are not all finite is skipped, and the scale made smaller. The names,
    and the defaults, are those of `torch.amp.GradScaler`.

    Attributes:
        init_scale: The first scale, above 0.
        growth_factor: The scale is multiplied with it after `growth_interval` updates in a row.
        backoff_factor: The scale is multiplied with it where an update is skipped; from 0 to 1.
        growth_interval: Number of updates.

    Raises:
        UnsupportedTrainingError: A value is out of its range.
    """

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000

    def __post_init__(self) -> None:
        ranges = {
            "init_scale": (0 < self.init_scale <= torch.finfo(torch.float32).max, "above 0"),
            "growth_factor": (1 <= self.growth_factor < math.inf, "1 or above"),
            "backoff_factor": (0 < self.backoff_factor < 1, "between 0 and 1"),
            "growth_interval": (1 <= self.growth_interval <= 2**24, "an int from 1 to 2²⁴"),
        }
        for name, (is_inside, range_) in ranges.items():
            if not is_inside:
                raise UnsupportedTrainingError(
                    f"LossScale({name}={getattr(self, name)!r})",
                    f"{name} must be {range_}",
                    f"Give {name} such a value",
                )


def loss_scale_from(value: LossScale | torch.amp.GradScaler | None) -> LossScale | None:
    """Read what a user gives as loss scaling; a scaler that is not enabled is none."""
    if value is None or isinstance(value, LossScale):
        return value
    if not isinstance(value, torch.amp.GradScaler):
        raise UnsupportedTrainingError(
            f"loss_scale={value!r}",
            "a scale has a first value and rules that change it",
            f"Pass LossScale(init_scale={value!r}), or a torch.amp.GradScaler"
            if isinstance(value, int | float)
            else "Pass a LossScale, a torch.amp.GradScaler, or None",
        )
    if not value.is_enabled():
        return None
    return LossScale(
        init_scale=value.get_scale(),
        growth_factor=value.get_growth_factor(),
        backoff_factor=value.get_backoff_factor(),
        growth_interval=value.get_growth_interval(),
    )


def scale_states(config: LossScale) -> dict[str, Tensor]:
    """Give the states at first: the scale, and the number of updates that it was right for."""
    return {LOSS_SCALE: torch.tensor(config.init_scale), STEPS_WITH_SCALE: torch.tensor(0.0)}


def all_finite(gradients: Mapping[str, Tensor]) -> Tensor:
    """Tell whether there is neither NaN nor infinity in gradients."""
    zeros = torch.stack([(gradient * 0).sum() for gradient in gradients.values()])
    return zeros.sum() == 0


def next_scale(
    config: LossScale, states: Mapping[str, Tensor], finite: Tensor
) -> dict[str, Tensor]:
    """Compute the states after an update, or where it is skipped."""
    scale, steps = states[LOSS_SCALE], states[STEPS_WITH_SCALE] + 1
    grows = steps == config.growth_interval
    larger = torch.where(grows, scale * config.growth_factor, scale)
    return {
        LOSS_SCALE: torch.where(finite, larger, scale * config.backoff_factor),
        STEPS_WITH_SCALE: torch.where(finite & ~grows, steps, 0.0),
    }

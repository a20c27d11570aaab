"""What a user says about the optimizer: records with torch.optim's names and meanings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from tract_fx.errors import UnsupportedTrainingError

__all__ = ["SGD", "AdamW", "OptimizerConfig", "optimizer_from"]

_FLOAT32_MAX = torch.finfo(torch.float32).max
_EXACT_INTEGERS = 2**24  # up to here float32 holds every integer
_KNOWN = '"adamw", "sgd", an AdamW or SGD record, a torch.optim.AdamW or a torch.optim.SGD'


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay, as `torch.optim.AdamW` computes it.

    Attributes:
        lr: Learning rate, which a trainer can change between updates.
        betas: Decay rates of the means of the gradient and of its square.
        eps: Added to the root of the second mean.
        weight_decay: Each update first multiplies a parameter with `1 - lr * weight_decay`.
        max_grad_norm: Before the update, the norm over all gradients is brought down to this as
            `torch.nn.utils.clip_grad_norm_` does; None leaves it.
        accumulate: Micro-batches per update; the gradient used is their mean.

    Raises:
        UnsupportedTrainingError: A value is out of its range.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    max_grad_norm: float | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        _set_number(self, "lr", "at least 0", lambda value: value >= 0)
        _set_betas(self)
        _set_number(self, "eps", "at least 0", lambda value: value >= 0)
        _set_number(self, "weight_decay", "at least 0", lambda value: value >= 0)
        _set_step_options(self)


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent, as `torch.optim.SGD` computes it.

    Attributes:
        lr: Learning rate, which a trainer can change between updates.
        momentum: Decay rate of the sum of past gradients; 0 goes by the gradient alone.
        dampening: Gradients after the first enter that sum times `1 - dampening`.
        weight_decay: This times the parameter is added to its gradient, after clipping.
        nesterov: Step along `gradient + momentum * sum`; needs momentum and no dampening.
        max_grad_norm: Before the update, the norm over all gradients is brought down to this as
            `torch.nn.utils.clip_grad_norm_` does; None leaves it.
        accumulate: Micro-batches per update; the gradient used is their mean.

    Raises:
        UnsupportedTrainingError: A value is out of its range.
    """

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    max_grad_norm: float | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        _set_number(self, "lr", "at least 0", lambda value: value >= 0)
        _set_number(self, "momentum", "at least 0", lambda value: value >= 0)
        _set_number(self, "dampening", "finite", lambda _: True)
        _set_number(self, "weight_decay", "at least 0", lambda value: value >= 0)
        if not isinstance(self.nesterov, bool):
            raise _out_of_range(self, "nesterov", "True or False")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise UnsupportedTrainingError(
                f"SGD(momentum={self.momentum}, dampening={self.dampening}, nesterov=True)",
                "Nesterov's step is defined with momentum above 0 and without dampening",
                "Set momentum above 0 and dampening to 0, or nesterov to False",
            )
        _set_step_options(self)


OptimizerConfig: TypeAlias = AdamW | SGD
_RECORDS: dict[str, type[AdamW] | type[SGD]] = {"adamw": AdamW, "sgd": SGD}


def optimizer_from(value: str | OptimizerConfig | torch.optim.Optimizer) -> OptimizerConfig:
    """Read what a user gives as the optimizer.

    Args:
        value: A name, `"adamw"` or `"sgd"`, for torch's defaults; a record, which comes back as it
            is; or an optimizer of torch, of class AdamW, SGD or (where it is the same) Adam, that
            has one parameter group and has made no step yet. Which parameters it holds is not read.

    Returns:
        The record.

    Raises:
        UnsupportedTrainingError: The optimizer is another one, or has an option without equal here.
    """
    if isinstance(value, AdamW | SGD):
        return value
    if isinstance(value, str) and value in _RECORDS:
        return _RECORDS[value]()
    if isinstance(value, torch.optim.Optimizer):
        return _read_torch(value)
    raise UnsupportedTrainingError(
        f"optimizer={value!r}", "No optimizer of this name is built", f"Use {_KNOWN}"
    )


def _read_torch(optimizer: torch.optim.Optimizer) -> OptimizerConfig:
    name = type(optimizer).__name__
    if type(optimizer) not in {torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD}:
        raise UnsupportedTrainingError(
            f"The optimizer {name}", "No graph is built for this class", f"Use {_KNOWN}"
        )
    if len(optimizer.param_groups) != 1:
        raise UnsupportedTrainingError(
            f"{name} with {len(optimizer.param_groups)} parameter groups",
            "ONNX Runtime's optimizer has one set of settings for all parameters",
            "Use one group, and freeze what must not be trained",
        )
    if any(optimizer.state.values()):
        raise UnsupportedTrainingError(
            f"{name} that has made steps already",
            "Its moments would be lost, as training starts with moments of zero",
            "Pass a record with its settings, and take the fresh start",
        )
    group = optimizer.param_groups[0]
    for option in ("amsgrad", "maximize", "differentiable"):
        if group.get(option):
            raise UnsupportedTrainingError(
                f"{name} with {option}=True", "No graph is built for this option", "Leave it out"
            )
    if group.get("initial_lr", group["lr"]) != group["lr"]:
        raise UnsupportedTrainingError(
            f"{name} whose lr {group['lr']} a scheduler has made of {group['initial_lr']}",
            "The schedule would be lost, and its first step kept as the learning rate",
            "Pass a record with the settings, and set trainer.learning_rate as you go",
        )
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    if any(getattr(optimizer, kind, None) for kind in hooks):
        raise UnsupportedTrainingError(
            f"{name} with step hooks", "The graph runs no Python", "Remove the hooks"
        )
    if isinstance(optimizer, torch.optim.SGD):
        return SGD(**_plain(group, "lr", "momentum", "dampening", "weight_decay", "nesterov"))
    if group["weight_decay"] != 0 and not group.get("decoupled_weight_decay", False):
        raise UnsupportedTrainingError(
            f"Adam with weight_decay={group['weight_decay']}",
            "Its decay goes into both moments, which the AdamW of ONNX Runtime has no place for",
            "Use AdamW, whose weight decay is decoupled, or weight_decay=0",
        )
    return AdamW(**_plain(group, "lr", "betas", "eps", "weight_decay"))


def _plain(group: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Read settings, some of which may be tensors of one element."""

    def number(value: Any) -> Any:
        return value.item() if isinstance(value, torch.Tensor) else value

    values = {name: number(group[name]) for name in names}
    if "betas" in values:
        values["betas"] = tuple(number(beta) for beta in values["betas"])
    return values


def _set_step_options(record: OptimizerConfig) -> None:
    if record.max_grad_norm is not None:
        _set_number(record, "max_grad_norm", "above 0, or None", lambda value: value > 0)
    count = record.accumulate
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _EXACT_INTEGERS:
        raise _out_of_range(record, "accumulate", f"an int from 1 to {_EXACT_INTEGERS}")


def _set_betas(record: AdamW) -> None:
    betas = record.betas
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise _out_of_range(record, "betas", "two numbers")
    numbers = tuple(_number(beta) for beta in betas)
    if not all(0 <= beta < 1 for beta in numbers):
        raise _out_of_range(record, "betas", "two numbers from 0 to below 1")
    object.__setattr__(record, "betas", numbers)


def _set_number(
    record: OptimizerConfig, field: str, range_: str, is_inside: Callable[[float], bool]
) -> None:
    number = _number(getattr(record, field))
    if not math.isfinite(number) or abs(number) > _FLOAT32_MAX or not is_inside(number):
        raise _out_of_range(record, field, f"a number {range_}, within float32")
    object.__setattr__(record, field, number)


def _number(value: object) -> float:
    """Returns the number as a float; NaN, which is in no range, for what is none."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        return math.nan
    return float(value)


def _out_of_range(record: OptimizerConfig, field: str, range_: str) -> UnsupportedTrainingError:
    return UnsupportedTrainingError(
        f"{type(record).__name__}({field}={getattr(record, field)!r})",
        f"{field} must be {range_}",
        f"Give {field} such a value",
    )

"""What a user says about the optimizer: records with torch.optim's names and meanings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from glob import escape
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tract_fx.errors import UnsupportedTrainingError, did_you_mean

_FLOAT32_MAX = torch.finfo(torch.float32).max
_EXACT_INTEGERS = 2**24  # up to here float32 holds every integer


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay, as `torch.optim.AdamW` computes it.

    Attributes:
        lr: Learning rate, which a trainer can change between updates.
        betas: Decay rates of the means of the gradient and of its square.
        eps: Added to the root of the second mean.
        weight_decay: Each update first multiplies a parameter with `1 - lr * weight_decay`.
        weight_decays: The decay of single parameters in place of it, by their name or a pattern of
            names (`"*.bias"`); the first that fits holds.
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
    weight_decays: Mapping[str, float] = field(default_factory=dict, hash=False)
    max_grad_norm: float | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        _set_number(self, "lr", "at least 0", lambda value: value >= 0)
        _set_betas(self)
        _set_number(self, "eps", "at least 0", lambda value: value >= 0)
        _set_decays(self)
        _set_step_options(self)


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent, as `torch.optim.SGD` computes it.

    Attributes:
        lr: Learning rate, which a trainer can change between updates.
        momentum: Decay rate of the sum of past gradients; 0 goes by the gradient alone.
        dampening: Gradients after the first enter that sum times `1 - dampening`.
        weight_decay: This times the parameter is added to its gradient, after clipping.
        weight_decays: The decay of single parameters in place of it, by their name or a pattern of
            names (`"*.bias"`); the first that fits holds.
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
    weight_decays: Mapping[str, float] = field(default_factory=dict, hash=False)
    nesterov: bool = False
    max_grad_norm: float | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        _set_number(self, "lr", "at least 0", lambda value: value >= 0)
        _set_number(self, "momentum", "at least 0", lambda value: value >= 0)
        _set_number(self, "dampening", "finite", lambda _: True)
        _set_decays(self)
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
Parameters: TypeAlias = "Mapping[str, torch.nn.Parameter]"
_RECORDS: dict[str, type[OptimizerConfig]] = {"adamw": AdamW, "sgd": SGD}
# Adam is AdamW without weight decay.
_OF_TORCH: dict[type[torch.optim.Optimizer], type[OptimizerConfig]] = {
    torch.optim.AdamW: AdamW,
    torch.optim.Adam: AdamW,
    torch.optim.SGD: SGD,
}
_OF_STEPS = {"weight_decays", "max_grad_norm", "accumulate"}  # which torch's groups do not hold
_NAMES = [record.__name__ for record in _RECORDS.values()]
_KNOWN = (
    f"{', '.join(map(repr, _RECORDS))}, a record {' or '.join(_NAMES)}, or an optimizer of "
    "torch.optim of these names"
)


def weight_decay_of(config: OptimizerConfig, name: str) -> float:
    """Give a parameter's weight decay."""
    for pattern, decay in config.weight_decays.items():
        if fnmatchcase(name, pattern):
            return decay
    return config.weight_decay


def refuse_patterns(config: OptimizerConfig, names: Sequence[str]) -> None:
    """Refuse weight decays that are of no parameter."""
    for pattern in config.weight_decays:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UnsupportedTrainingError(
                f"weight_decays with {pattern!r}",
                f"no trained parameter has such a name ({', '.join(names[:4])}, …)",
                "Take the names from model.named_parameters(); * stands for any characters",
            )


def optimizer_from(
    value: str | OptimizerConfig | torch.optim.Optimizer, parameters: Parameters | None = None
) -> OptimizerConfig:
    """Read what a user gives as the optimizer.

    A name stands for torch's defaults. An optimizer of torch is of class AdamW, SGD or (where it is
    the same) Adam, has made no step yet, and its parameter groups differ in weight decay alone,
    which is read by the parameters' names.
    """
    if isinstance(value, AdamW | SGD):
        return value
    if isinstance(value, str) and value in _RECORDS:
        return _RECORDS[value]()
    if isinstance(value, torch.optim.Optimizer):
        _refuse_torch(value)
        first, *others = (_read_group(value, group) for group in value.param_groups)
        return replace(first, weight_decays=_decays(value, first, others, parameters or {}))
    raise UnsupportedTrainingError(
        f"optimizer={value!r}",
        "No optimizer of this name is built",
        f"{did_you_mean(value, _RECORDS)}Use {_KNOWN}",
    )


def _decays(
    optimizer: torch.optim.Optimizer,
    first: OptimizerConfig,
    others: Sequence[OptimizerConfig],
    parameters: Parameters,
) -> dict[str, float]:
    """The weight decays of the parameters behind the first group, by name."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    decays: dict[str, float] = {}
    for group, record in zip(optimizer.param_groups[1:], others, strict=True):
        if replace(record, weight_decay=first.weight_decay) != first:
            raise UnsupportedTrainingError(
                f"{type(optimizer).__name__} with parameter groups that differ in more than "
                "weight_decay",
                "a training graph has one learning rate and one set of other settings",
                "Let the groups differ in weight_decay alone, and freeze what must not be trained",
            )
        for parameter in group["params"] if record.weight_decay != first.weight_decay else ():
            if id(parameter) not in names:
                raise UnsupportedTrainingError(
                    f"{type(optimizer).__name__} with a group whose parameters have no names",
                    "a weight decay of its own is given to a parameter by its name",
                    "Make the optimizer from the parameters of the PyTorch model that is exported, "
                    "or pass a record with weight_decays",
                )
            decays[escape(names[id(parameter)])] = record.weight_decay
    return decays


def _refuse_torch(optimizer: torch.optim.Optimizer) -> None:
    """Refuse what no graph is built for."""
    name = type(optimizer).__name__
    if type(optimizer) not in _OF_TORCH:
        raise UnsupportedTrainingError(
            f"The optimizer {name}", "No graph is built for this class", f"Use {_KNOWN}"
        )
    if any(optimizer.state.values()):
        raise UnsupportedTrainingError(
            f"{name} that has made steps already",
            "Its moments would be lost, as training starts with moments of zero",
            "Pass a record with its settings, and take the fresh start",
        )
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    if any(getattr(optimizer, kind, None) for kind in hooks):
        raise UnsupportedTrainingError(
            f"{name} with step hooks", "The graph runs no Python", "Remove the hooks"
        )


def _read_group(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> OptimizerConfig:
    name = type(optimizer).__name__
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
    decoupled = not isinstance(optimizer, torch.optim.Adam) or group.get("decoupled_weight_decay")
    if group["weight_decay"] != 0 and not decoupled:
        raise UnsupportedTrainingError(
            f"Adam with weight_decay={group['weight_decay']}",
            "Its decay goes into both moments, which the AdamW of ONNX Runtime has no place for",
            "Use AdamW, whose weight decay is decoupled, or weight_decay=0",
        )
    record = _OF_TORCH[type(optimizer)]
    names = [entry.name for entry in fields(record) if entry.name not in _OF_STEPS]
    # Some may be tensors of one element.
    return record(**tree_map_only(torch.Tensor, Tensor.item, {name: group[name] for name in names}))


def _set_step_options(record: OptimizerConfig) -> None:
    if record.max_grad_norm is not None:
        _set_number(record, "max_grad_norm", "above 0, or None", lambda value: value > 0)
    count = record.accumulate
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _EXACT_INTEGERS:
        raise _out_of_range(record, "accumulate", f"an int from 1 to {_EXACT_INTEGERS}")


def _set_decays(record: OptimizerConfig) -> None:
    _set_number(record, "weight_decay", "at least 0", lambda value: value >= 0)
    if not isinstance(record.weight_decays, Mapping):
        raise _out_of_range(record, "weight_decays", "numbers by name")
    decays = {name: as_number(value) for name, value in record.weight_decays.items()}
    if not all(0 <= decay <= _FLOAT32_MAX for decay in decays.values()):
        raise _out_of_range(record, "weight_decays", "numbers by name, each at least 0")
    object.__setattr__(record, "weight_decays", decays)


def _set_betas(record: AdamW) -> None:
    betas = record.betas
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise _out_of_range(record, "betas", "two numbers")
    numbers = tuple(as_number(beta) for beta in betas)
    if not all(0 <= beta < 1 for beta in numbers):
        raise _out_of_range(record, "betas", "two numbers from 0 to below 1")
    object.__setattr__(record, "betas", numbers)


def _set_number(
    record: OptimizerConfig, name: str, range_: str, is_inside: Callable[[float], bool]
) -> None:
    number = as_number(getattr(record, name))
    if not math.isfinite(number) or abs(number) > _FLOAT32_MAX or not is_inside(number):
        raise _out_of_range(record, name, f"a number {range_}, within float32")
    object.__setattr__(record, name, number)


def as_number(value: object) -> float:
    """Returns the number as a float; NaN, which is in no range, for what is none."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):  # of several numbers, or beyond float64
        return math.nan


def _out_of_range(record: OptimizerConfig, name: str, range_: str) -> UnsupportedTrainingError:
    return UnsupportedTrainingError(
        f"{type(record).__name__}({name}={getattr(record, name)!r})",
        f"{name} must be {range_}",
        f"Give {name} such a value",
    )

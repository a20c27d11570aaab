"""An optimizer's update as a function of tensors, to be traced behind a step.

Formulas are those of `torch.optim.SGD` and `torch.optim.AdamW`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tract_fx.artifacts.loss_scaling import LossScale, all_finite, next_scale, scale_states
from tract_fx.artifacts.optimizers import SGD, AdamW, OptimizerConfig, weight_decay_of
from tract_fx.passes.onnx_graph.step_names import GRADIENT_SUM, IS_UPDATE, LEARNING_RATE, STEP
from tract_fx.step.trace import Update

Tensors = Mapping[str, Tensor]


def update_of(config: OptimizerConfig, scaling: LossScale | None, parameters: Tensors) -> Update:
    """Make an optimizer's update of some parameters."""
    kinds = _states(config)
    if config.accumulate > 1:
        kinds += (GRADIENT_SUM,)
    inputs = {
        f"{name}.{kind}": torch.zeros_like(parameter)
        for name, parameter in parameters.items()
        for kind in kinds
    }
    inputs |= {LEARNING_RATE: torch.tensor(config.lr), STEP: torch.tensor(0)}
    if config.accumulate > 1:
        inputs[IS_UPDATE] = torch.tensor(True)
    inputs |= {} if scaling is None else scale_states(scaling)
    return Update(inputs, functools.partial(_updated, config, scaling))


def _updated(
    config: OptimizerConfig,
    scaling: LossScale | None,
    parameters: Tensors,
    gradients: Tensors,
    inputs: Tensors,
) -> dict[str, Tensor]:
    """New parameters and states by name."""
    sums: dict[str, Tensor] = {}
    if config.accumulate > 1:
        sums = {n: inputs[f"{n}.{GRADIENT_SUM}"] + g for n, g in gradients.items()}
        gradients = {name: total / config.accumulate for name, total in sums.items()}
    finite = None if scaling is None else all_finite(gradients)
    if config.max_grad_norm is not None:
        gradients = _clipped(gradients, config.max_grad_norm)
    rule, kinds = _RULES[type(config)], _states(config)
    new: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        states = {kind: inputs[f"{name}.{kind}"] for kind in kinds}
        decay, rate, step = weight_decay_of(config, name), inputs[LEARNING_RATE], inputs[STEP]
        new[name], *changed = rule(config, decay, parameters[name], gradient, states, rate, step)
        new |= {f"{name}.{kind}": value for kind, value in zip(kinds, changed, strict=True)}
    before = {**parameters, **inputs}
    if scaling is not None and finite is not None:
        new = {name: torch.where(finite, value, before[name]) for name, value in new.items()}
        new |= next_scale(scaling, inputs, finite)
    if not sums:
        return new
    now = inputs[IS_UPDATE]
    kept = {name: torch.where(now, value, before[name]) for name, value in new.items()}
    ends = {f"{n}.{GRADIENT_SUM}": torch.where(now, 0.0, total) for n, total in sums.items()}
    return {**kept, **ends}


def _clipped(gradients: Tensors, most: float) -> dict[str, Tensor]:
    """As `torch.nn.utils.clip_grad_norm_` does."""
    norms = torch.stack([(gradient * gradient).sum() for gradient in gradients.values()])
    share = (most / (norms.sum().sqrt() + 1e-6)).clamp(max=1.0)
    return {name: gradient * share for name, gradient in gradients.items()}


def _states(config: OptimizerConfig) -> tuple[str, ...]:
    """What a rule keeps of each parameter, in the order in which it gives it back."""
    if isinstance(config, AdamW):
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if config.momentum else ()


def _sgd(
    config: SGD,
    decay: float,
    parameter: Tensor,
    gradient: Tensor,
    states: Tensors,
    rate: Tensor,
    step: Tensor,
) -> tuple[Tensor, ...]:
    if decay:
        gradient = gradient + decay * parameter
    if not config.momentum:
        return (parameter - rate * gradient,)
    buffer = config.momentum * states["momentum_buffer"] + (1 - config.dampening) * gradient
    if config.dampening:
        buffer = torch.where(step == 0, gradient, buffer)
    along = gradient + config.momentum * buffer if config.nesterov else buffer
    return parameter - rate * along, buffer


def _adamw(
    config: AdamW,
    decay: float,
    parameter: Tensor,
    gradient: Tensor,
    states: Tensors,
    rate: Tensor,
    step: Tensor,
) -> tuple[Tensor, ...]:
    """Bias corrections are float64, as 1 − βᵗ cancels."""
    first, second = config.betas
    count = (step + 1).double()
    correction, root = (
        (1 - first**count).to(rate.dtype),
        (1 - second**count).sqrt().to(rate.dtype),
    )
    mean = first * states["exp_avg"] + (1 - first) * gradient
    square = second * states["exp_avg_sq"] + (1 - second) * gradient * gradient
    decayed = parameter * (1 - rate * decay) if decay else parameter
    return decayed - rate / correction * mean / (square.sqrt() / root + config.eps), mean, square


_RULES: dict[type[OptimizerConfig], Callable[..., tuple[Tensor, ...]]] = {SGD: _sgd, AdamW: _adamw}

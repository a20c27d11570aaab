"""Exported training beside PyTorch's training of the same module.

The reference runs in float64 unless a test says otherwise: then all of a difference is float32's
rounding in the exported graph, and none of it PyTorch's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from tract_fx import export_training, load_trainer, tract_pass
from tract_fx.artifacts.optimizers import SGD
from tract_fx.trainers import OrtTrainer

Array: TypeAlias = NDArray[Any]
Batch: TypeAlias = tuple[Any, ...]
Loss: TypeAlias = Callable[..., Tensor]

# Float32 rounds to 6e-8; a gradient collects it over some thousand terms and some dozen layers.
GRADIENT = 1e-5
# TrAct's preconditioner amplifies what is rounded in gW by up to the damped Gram's condition, which
# is near one for noise, and some thousands for photographs.
TRACT_ON_PHOTOGRAPHS = 2e-4
TRACT_ON_NOISE = 1e-5
# What is zero but for rounding, relative to the model's largest gradient: see `vanishing`.
ZERO = 1e-6

onnxruntime.set_default_logger_severity(3)


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model in training mode, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().train()


def without_dropout(net: nn.Module) -> nn.Module:
    """The model, its dropout set to zero: PyTorch and ONNX Runtime draw other numbers."""
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]
    return net


def treated(net: nn.Module, **options: Any) -> nn.Module:
    """The model with TrAct, by the usual way."""
    return tract_pass(torch.fx.symbolic_trace(net), **options)


def labels(batch: int, classes: int = 10) -> Tensor:
    """Class indices: all of them in turn."""
    return torch.arange(batch) % classes


@dataclass(frozen=True)
class Exported:
    """A model and the directory that it was exported to.

    Attributes:
        model: The module that was exported.
        directory: The artifacts.
        loss: The loss in PyTorch, of the model's output and the targets.
        inputs: How many of a batch's values are the model's, in order.
    """

    model: nn.Module
    directory: Path
    loss: Loss
    inputs: int

    def trainer(self) -> OrtTrainer:
        """A trainer from the start."""
        return load_trainer(self.directory)

    def gradients(self, *batch: Any, dtype: torch.dtype = torch.float64) -> dict[str, Array]:
        """PyTorch's gradients on a batch; the model is left alone."""
        model = as_dtype(self.model, dtype)
        self.loss_of(model, *batch).backward()
        named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        aliases = self.trainer().manifest.aliases  # a tied tensor's other names
        return {aliases.get(name, name): gradient.numpy() for name, gradient in named.items()}

    def loss_of(self, model: nn.Module, *batch: Any) -> Tensor:
        """PyTorch's loss on a batch, in the model's dtype."""
        values = cast(batch, next(model.parameters()).dtype)
        return self.loss(model(*values[: self.inputs]), *values[self.inputs :])

    def run(
        self, optimizer: Callable[..., torch.optim.Optimizer], dtype: torch.dtype = torch.float64
    ) -> TorchRun:
        """PyTorch's training from the same start."""
        model = as_dtype(self.model, dtype)
        trained = [p for p in model.parameters() if p.requires_grad]
        return TorchRun(self, model, optimizer(trained))


@dataclass
class TorchRun:
    """PyTorch's training of an exported model.

    Attributes:
        exported: What was exported.
        model: A copy of the model, which is trained.
        optimizer: Its optimizer.
        clip: Norm that the gradients are brought down to.
        losses: The losses so far.
    """

    exported: Exported
    model: nn.Module
    optimizer: torch.optim.Optimizer
    clip: float | None = None
    losses: list[float] = field(default_factory=list)

    def step(self, *batch: Any) -> float:
        """Train on a batch; the loss before the update."""
        self.optimizer.zero_grad()
        loss = self.exported.loss_of(self.model, *batch)
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        return self.losses[-1]

    def predict(self, *inputs: Any) -> Array:
        """The model's output in evaluation mode."""
        dtype = next(self.model.parameters()).dtype
        with torch.no_grad():
            output: Tensor = copy.deepcopy(self.model).eval()(*cast(inputs, dtype))
        return output.numpy()


def export(
    model: nn.Module,
    example: Any,
    directory: Path,
    *,
    loss: Any = "cross_entropy",
    reference: Loss = functional.cross_entropy,
    optimizer: Any = None,
    **options: Any,
) -> Exported:
    """Export a model, and keep it beside the artifacts.

    Unless `verify` is asked for the export is not judged by the library, which takes half of the
    time: tests that use this judge it themselves.

    Args:
        model: The model.
        example: Example inputs.
        directory: Where to.
        loss: The loss, as `export_training` takes it.
        reference: The loss in PyTorch.
        optimizer: The optimizer, as `export_training` takes it.
        **options: Further options of `export_training`.

    Returns:
        Both.
    """
    optimizer = SGD(lr=0.1) if optimizer is None else optimizer
    options.setdefault("verify", False)
    export_training(model, example, directory, loss=loss, optimizer=optimizer, **options)
    inputs = len(load_trainer(directory).manifest.inputs)
    return Exported(model, directory, reference, inputs)


def as_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model in another dtype, without gradients."""
    result = copy.deepcopy(model).to(dtype)
    result.zero_grad(set_to_none=True)
    return result


def cast(values: Any, dtype: torch.dtype) -> Any:
    """Batches in a model's dtype; integers stay."""
    return pytree.tree_map(
        lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values
    )


def relative(found: Any, expected: Any) -> float:
    """||found − expected|| / ||expected|| in float64."""
    wanted = np.asarray(expected, np.float64)
    found = np.asarray(found, np.float64)
    assert found.shape == wanted.shape, f"{found.shape=} {wanted.shape=}"
    scale = float(np.linalg.norm(wanted)) or 1.0
    return float(np.linalg.norm(found - wanted)) / scale


def vanishing(expected: Mapping[str, Array]) -> set[str]:
    """Names of gradients that are zero by the model's own algebra.

    A bias before a BatchNorm is subtracted again with the mean: its gradient is zero, what float64
    gives is rounding, and so is what float32 gives, at another level. Nothing is relative to that.
    """
    scale = max(float(np.linalg.norm(value)) for value in expected.values())
    return {n for n, value in expected.items() if float(np.linalg.norm(value)) < 1e-10 * scale}


def assert_gradients(
    found: Mapping[str, Array],
    expected: Mapping[str, Array],
    tolerances: Mapping[str, float] | None = None,
    *,
    zero: set[str] | None = None,
) -> dict[str, float]:
    """Every parameter's gradient within 1e-5, or its own tolerance; errors come back.

    Args:
        found: What the exported graph gives.
        expected: What PyTorch gives.
        tolerances: Other relative tolerances, by name.
        zero: Names of gradients that vanish; held to an absolute bound.

    Returns:
        The errors.
    """
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    zero = zero or set()
    assert vanishing(expected) == zero, vanishing(expected) ^ zero
    scale = max(float(np.linalg.norm(value)) for value in expected.values())
    errors = {}
    for name, wanted in expected.items():
        if name in zero:
            errors[name] = float(np.linalg.norm(found[name])) / scale
            assert errors[name] < ZERO, name
            continue
        errors[name] = relative(found[name], wanted)
        assert errors[name] < (tolerances or {}).get(name, GRADIENT), (name, errors[name])
    return errors


def assert_same_state(
    trainer: OrtTrainer, run: TorchRun, tolerance: float, keys: Sequence[str] | None = None
) -> float:
    """The trainer's tensors and PyTorch's, the largest error relative to the tensor's norm.

    Args:
        trainer: The trainer.
        run: PyTorch's training.
        tolerance: Bound for that error.
        keys: Keys to look at, None for all.

    Returns:
        The largest error.
    """
    found, expected = trainer.state_dict(), run.model.state_dict()
    assert set(found) == set(expected), set(found) ^ set(expected)
    worst = 0.0
    for key in expected if keys is None else keys:
        if not expected[key].is_floating_point():
            assert torch.equal(found[key], expected[key]), key
            continue
        assert found[key].dtype == torch.float32
        error = relative(found[key], expected[key])
        assert error < tolerance, (key, error)
        worst = max(worst, error)
    return worst

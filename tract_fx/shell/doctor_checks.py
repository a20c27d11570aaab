"""Small steps with TrAct, on each device and in each runtime, against the definition in float64.

The definition is written here once more, in a few lines that use nothing of this library.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tract_fx import extras
from tract_fx.eager import tract_module
from tract_fx.errors import MissingRuntimeError, TractWarning
from tract_fx.passes.fx_graph import tract_pass
from tract_fx.reference.distance import relative_error

TOLERANCE = 1e-4
"""Largest relative error of a float32 gradient. Rounding gives below 1e-6 on these steps, and
the plain gradient is off by more than 0.1."""

_LAMBDA = 0.1
_BATCH, _CLASSES, _SIZE = 8, 5, 12


@dataclass(frozen=True)
class Check:
    """What became of one step.

    Attributes:
        what: The way that the model went.
        device: Where it ran.
        verdict: `"right"`, `"wrong"`, `"failed"` with an error, or `"not made"` where something
            that it needs is not there.
        detail: The error of the gradient, or what is missing.
    """

    what: str
    device: str
    verdict: Literal["right", "wrong", "failed", "not made"]
    detail: str


class Step:
    """A step of a small model: its batch, its loss, and the gradient that TrAct has to give.

    Args:
        first: The first layer, (8, 3, 12, 12) to (8, features).
        rows_of: What the layer multiplies its weight with, as rows: the images to (R, n).
        device: Where it runs.
    """

    def __init__(
        self, first: nn.Module, rows_of: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(_BATCH, 3, _SIZE, _SIZE, generator=generator)
        labels = torch.arange(_BATCH) % _CLASSES
        features = first(self.images).shape[1]
        model = nn.Sequential(first, nn.Tanh(), nn.Linear(features, _CLASSES))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)
        self.expected = _definition(model, self.images, labels, rows_of)
        self.model, self.images = model.to(device), self.images.to(device)
        self.labels = labels.to(device)

    def error(self, weight_gradient: Tensor) -> float:
        """Give the relative error of the first layer's gradient."""
        return relative_error(weight_gradient, self.expected)

    def error_of(self, treat: Callable[[Step], nn.Module]) -> float:
        """Run the step in PyTorch, without TF32 and the like in the plain layers."""
        treated = treat(self)
        weight = next(p for p in treated.parameters() if p.shape == self.expected.shape)
        with torch.backends.cudnn.flags(allow_tf32=False):
            loss = functional.cross_entropy(treated(self.images), self.labels)
            (gradient,) = torch.autograd.grad(loss, [weight])
        return self.error(gradient)

    def error_in_onnx_runtime(self) -> float:
        """Export the step, and train it once with plain gradient descent."""
        export_training: Any = extras.load("tract_fx.export", "export_training")
        gradient_descent: Any = extras.load("tract_fx.export", "SGD")
        load_trainer: Any = extras.load("tract_fx.trainers", "load_trainer")
        images, labels = self.images.cpu(), self.labels.cpu()
        treated = _treat(copy.deepcopy(self.model).cpu())
        (name, before), *_ = treated.state_dict().items()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "run")
            export_training(
                treated, images, path, loss="cross_entropy", optimizer=gradient_descent(lr=1.0)
            )
            trainer = load_trainer(path, device=self.images.device)
            trainer.train_step(images.numpy(), labels.numpy())
            after: Tensor = trainer.state_dict()[name]
        return self.error(before - after)


def _treat(model: nn.Module) -> nn.Module:
    """Trace a model, and apply the pass with the checks' λ."""
    return tract_pass(fx.symbolic_trace(model), lambda_=_LAMBDA)


def _compile(model: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(model, fullgraph=True)
    return cast(nn.Module, compiled)


def _definition(
    model: nn.Module, images: Tensor, labels: Tensor, rows_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """gW (XᵀX/R + λI)⁻¹ in float64 (arXiv 2410.23970, section 3), by the book."""
    wide, images = copy.deepcopy(model).double(), images.double()
    weight = next(wide.parameters())
    loss = functional.cross_entropy(wide(images), labels)
    (gradient,) = torch.autograd.grad(loss, [weight])
    rows = rows_of(images)
    system = rows.T @ rows / len(rows) + _LAMBDA * torch.eye(rows.shape[1], dtype=rows.dtype)
    solved: Tensor = torch.linalg.solve(system, gradient.flatten(1), left=False)
    return solved.reshape(weight.shape)


def devices() -> list[torch.device]:
    """Name the devices that PyTorch can run on here."""
    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        found += [torch.device(kind.type, i) for i in range(torch.accelerator.device_count())]
    return found


def checks() -> Iterator[Check]:
    """Make the checks, one after the other."""
    for device in devices():
        step = convolution(device)
        yield from _in_pytorch("3×3 convolution", step, device)
        yield _compiled("3×3 convolution", step, device)
        if device.type in ("cpu", "cuda"):
            yield _check("ONNX Runtime Training", device, step.error_in_onnx_runtime)
        yield from _in_pytorch("linear, few rows", linear(device), device)


def _in_pytorch(layer: str, step: Step, device: torch.device) -> Iterator[Check]:
    for way, treat in WAYS.items():
        yield _check(f"{way}, {layer}", device, partial(step.error_of, treat))


def convolution(device: torch.device) -> Step:
    """A strided convolution first."""
    first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.Flatten())
    return Step(
        first, lambda x: functional.unfold(x, 3, padding=1, stride=2).mT.flatten(0, 1), device
    )


def linear(device: torch.device) -> Step:
    """A linear layer first."""
    first = nn.Sequential(nn.Flatten(), nn.Linear(3 * _SIZE * _SIZE, 6))
    return Step(first, lambda x: x.flatten(1), device)


WAYS: dict[str, Callable[[Step], nn.Module]] = {
    "eager": lambda s: _treat(s.model),
    "tract_module": lambda s: tract_module(s.model, s.images, lambda_=_LAMBDA),
    "the pass on an exported program": lambda s: tract_pass(
        torch.export.export(s.model, (s.images,)), lambda_=_LAMBDA
    ),
    "exported after the pass": lambda s: torch.export.export(_treat(s.model), (s.images,)).module(),
}


def _compiled(layer: str, step: Step, device: torch.device) -> Check:
    """Compile the step, where a plain model can be compiled at all."""
    what = f"compiled, {layer}"
    try:
        step.error_of(lambda s: _compile(s.model))
    except Exception as error:  # whatever the compiler's tools raise where one is missing
        reason = f"torch.compile does not work here, for a plain model either: {_sentence(error)}"
        return Check(what, str(device), "not made", reason)
    return _check(what, device, partial(step.error_of, lambda s: _compile(_treat(s.model))))


def _check(what: str, device: torch.device, error_of: Callable[[], float]) -> Check:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", TractWarning)
            error = error_of()
    except MissingRuntimeError as missing:
        return Check(what, str(device), "not made", f"{missing.found}. {missing.remedy}")
    except Exception as raised:  # a check says what happened, whatever it was
        return Check(what, str(device), "failed", _sentence(raised))
    verdict: Literal["right", "wrong"] = "right" if error <= TOLERANCE else "wrong"
    return Check(what, str(device), verdict, f"{error:.1e}")


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"

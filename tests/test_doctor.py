"""`tract-fx doctor`: right where gradients are, and not where they are not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner, Result

from oracle import precondition, relative_error
from tract_fx import MissingRuntimeError, export_training, ort_training
from tract_fx.shell import doctor_checks
from tract_fx.shell.app import app

CPU = torch.device("cpu")


def doctor() -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor"])


def last_line(result: Result) -> str:
    return result.output.splitlines()[-1]


@pytest.fixture
def eager_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes seconds."""
    monkeypatch.setattr(doctor_checks, "WAYS", {"eager": doctor_checks.WAYS["eager"]})
    monkeypatch.setattr(doctor_checks.Step, "error_in_onnx_runtime", lambda step: 0.0)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)


def test_everything_is_right_here() -> None:
    result = doctor()
    assert result.exit_code == 0, result.output
    for part in (torch.__version__, "numpy", "cpu", "compiled", "exported", "ONNX Runtime"):
        assert part in result.output
    assert last_line(result).startswith("right: ")
    assert "wrong" not in result.output
    assert "failed" not in result.output


def lost(grad: Tensor, *_: Any) -> Tensor:
    return grad.clone()


def not_finite(grad: Tensor, *_: Any) -> Tensor:
    return torch.full_like(grad, torch.nan)


def fails(*_: Any) -> Tensor:
    raise RuntimeError("no such kernel\nat line 3")


@pytest.mark.usefixtures("eager_alone")
@pytest.mark.parametrize(
    ("mistake", "verdict"), [(lost, "wrong"), (not_finite, "wrong"), (fails, "failed")]
)
def test_a_fault_is_told(mistake: Any, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def directly(dz: Tensor, rows: Tensor, _: float) -> Tensor:
        gradient: Tensor = mistake(dz @ rows)
        return gradient

    monkeypatch.setattr("tract_fx.preconditioner.operators.precondition_weight_gradient", mistake)
    monkeypatch.setattr("tract_fx.preconditioner.direct._group_gradient", directly)
    result = doctor()
    assert result.exit_code == 1
    assert last_line(result) == (
        f"not right: eager, 3×3 convolution on cpu, {verdict}; "
        f"compiled, 3×3 convolution on cpu, {verdict}; eager, linear, few rows on cpu, {verdict}"
    )
    assert ("RuntimeError: no such kernel" in result.output) == (verdict == "failed")


@pytest.mark.usefixtures("eager_alone")
def test_what_is_not_there_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(step: doctor_checks.Step) -> float:
        raise MissingRuntimeError("onnxruntime can't be imported", "it trains", "pip install it")

    def no_compiler(model: nn.Module, **_: Any) -> nn.Module:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(doctor_checks.Step, "error_in_onnx_runtime", missing)
    monkeypatch.setattr(torch, "compile", no_compiler)
    result = doctor()
    assert result.exit_code == 0, result.output
    assert "onnxruntime can't be imported. pip install it" in result.output
    assert "for a plain model either: RuntimeError: InvalidCxxCompiler" in result.output
    assert last_line(result) == "right: 2 of 4 checks, 2 not made"


@pytest.mark.parametrize("make", [doctor_checks.convolution, doctor_checks.linear])
def test_the_definition_is_the_oracles(make: Callable[[torch.device], doctor_checks.Step]) -> None:
    step = make(CPU)
    model, images = step.model.double(), step.images.double()
    (layer,) = (m for m in model[0].modules() if isinstance(m, nn.Conv2d | nn.Linear))
    read: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: read.append(args[0]))
    loss = functional.cross_entropy(model(images), step.labels)
    (gradient,) = torch.autograd.grad(loss, [layer.weight])
    expected = precondition(layer, gradient, read[0])
    assert relative_error(step.expected, expected) < 1e-12
    assert step.error(gradient) > 0.1  # the plain gradient does not pass


def test_the_python_that_has_no_training_runtime_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingRuntimeError, match=r"with Python 3\.10 to 3\.12 .*this is Python"):
        ort_training.runtime()
    # Before all the work, and not as what a model's operator has done.
    with pytest.raises(MissingRuntimeError, match="can't be imported"):
        export_training(nn.Linear(3, 2), torch.randn(4, 3), "a", plain=True, target="onnxruntime")

"""A step's graph in ONNX Runtime Training, against PyTorch's training in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.utils import _pytree as pytree

pytest.importorskip("onnxruntime.training.api", reason="needs ONNX Runtime Training")

from onnxruntime.training.api import CheckpointState, Module, Optimizer
from onnxruntime.training.onnxblock.checkpoint_utils import save_checkpoint

from ort_reference import without_dropout
from step_cases import BATCH, CASES, Case, labels
from tract_fx import SGD, tract_module
from tract_fx.errors import ExportError
from tract_fx.export.optimizer_graph import build_optimizer
from tract_fx.step.dialects import ORT_TRAINING, STANDARD, Dialect
from tract_fx.step.ort_training import CheckpointTensors, to_training_graph
from tract_fx.step.trace import trace_step
from tract_fx.step.write import write_step

RATE, MOMENTUM, DECAY = 0.05, 0.9, 1e-3


RUNS = {
    name: (CASES[name], first)
    for name, first in (
        ("conv1d", "0"), ("conv2d", "0"), ("conv3d", "0"), ("transposed", "0"),
        ("frozen norm", "0"), ("tied", "first"), ("linear, few rows", "1"),
    )
}  # fmt: skip


class Training:
    """A model, and its training in ONNX Runtime."""

    def __init__(self, case: Case, first: str, dialect: Dialect, folder: Path) -> None:
        torch.manual_seed(0)
        model = without_dropout(case.build())
        self.case, self.x, self.y = case, case.input(), case.targets()
        self.kwargs = {} if case.other is None else {"other": case.other()}
        model(self.x, **self.kwargs)
        self.model = tract_module(model, layers=first)
        parameters, buffers = dict(self.model.named_parameters()), dict(self.model.named_buffers())
        trace = trace_step(
            self.model, (self.x,), self.kwargs, case.loss, (self.y,), dialect=dialect
        )
        self.graph = write_step(trace)
        self.tensors: CheckpointTensors = to_training_graph(self.graph, trace, parameters, buffers)
        ir.save(self.graph, folder / "training_model.onnx")
        config = SGD(lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
        ir.save(build_optimizer(config, len(self.tensors.trained)), folder / "optimizer.onnx")
        values = parameters | buffers
        trained, kept = (
            [numpy_helper.from_array(values[n].detach().numpy().copy(), n) for n in names]
            for names in (self.tensors.trained, self.tensors.kept)
        )
        save_checkpoint((trained, kept), str(folder / "checkpoint"))
        self.state = CheckpointState.load_checkpoint(str(folder / "checkpoint"))
        self.module = Module(str(folder / "training_model.onnx"), self.state)
        self.optimizer = Optimizer(str(folder / "optimizer.onnx"), self.module)
        self.optimizer.set_learning_rate(RATE)

    def step(self, batch: int, update: bool = True) -> float:
        tensors = [self.x, *self.kwargs.values(), self.y]
        loss = self.module.train()(*(t[:batch].numpy() for t in tensors))
        if update:
            self.optimizer.step()
            self.module.lazy_reset_grad()
        return float(loss[0] if isinstance(loss, tuple) else loss)

    def value(self, name: str) -> np.ndarray[Any, Any]:
        parameter = self.state.parameters[name]
        return np.asarray(parameter.data)


def in_pytorch(training: Training) -> tuple[nn.Module, Any]:
    """The same in float64: the model, and a function that takes a step and gives the loss."""
    model = copy.deepcopy(training.model).double().train()
    for name, module in model.named_modules():
        module.training = training.model.get_submodule(name).training
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, RATE, MOMENTUM, weight_decay=DECAY)

    def step(batch: int) -> float:
        x, y, kwargs = pytree.tree_map(
            lambda t: t[:batch].double() if t.is_floating_point() else t[:batch],
            (training.x, training.y, training.kwargs),
        )
        optimizer.zero_grad()
        loss = training.case.loss(model(x, **kwargs), y)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return model, step


# Steps in standard operators are compared in test_step.py; one is enough for their layout.
@pytest.mark.parametrize(
    ("name", "dialect"), [("conv2d", STANDARD), *((name, ORT_TRAINING) for name in RUNS)]
)
def test_training_is_pytorch_s(name: str, dialect: Dialect, tmp_path: Path) -> None:
    training = Training(*RUNS[name], dialect, tmp_path)
    types = {node.op_type for node in training.graph.graph}
    assert ("ConvGrad" in types) == (dialect is ORT_TRAINING and name not in LINEAR)
    model, step = in_pytorch(training)
    for batch in (BATCH, 3, BATCH, BATCH):
        assert training.step(batch) == pytest.approx(step(batch), rel=2e-5, abs=1e-7)
    values = dict(model.named_parameters()) | dict(model.named_buffers())
    for key in (*training.tensors.trained, *training.tensors.kept):
        wanted = values[key].detach().numpy()
        off = float(np.linalg.norm(training.value(key) - wanted))
        assert off <= 2e-5 * np.linalg.norm(wanted) + 1e-6, key
    counters = {n for n in dict(model.named_buffers()) if n.endswith("num_batches_tracked")}
    frozen = {"1.num_batches_tracked"} if name == "frozen norm" else set()
    assert {*training.tensors.counters} == counters - frozen


LINEAR = ("tied", "linear, few rows")


def test_gradients_are_added_up(tmp_path: Path) -> None:
    training = Training(*RUNS["conv2d"], ORT_TRAINING, tmp_path)
    training.step(BATCH, update=False)
    name = training.tensors.trained[0]
    once = np.array(training.state.parameters[name].grad)
    training.step(BATCH, update=False)
    twice = np.array(training.state.parameters[name].grad)
    assert np.abs(once).max() > 0
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5, atol=1e-7)


class Counts(nn.Module):
    """Has a state that is no running statistic."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.first(x) * self.calls  # type: ignore[no-any-return]


def test_other_states_are_refused(tmp_path: Path) -> None:
    case = Case(Counts, lambda: torch.randn(BATCH, 6), targets=labels)
    with pytest.raises(ExportError, match="calls"):
        Training(case, "first", ORT_TRAINING, tmp_path)

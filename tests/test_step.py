"""The graph of a training step, run by ONNX Runtime, against PyTorch's training in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from cuda_kernels import missing_cuda_kernels
from onnx_session import run
from oracle import precondition, relative_error
from step_cases import BATCH, CASES, Case, does
from tract_fx import tract_module
from tract_fx.errors import ExportError, UnsupportedTrainingError
from tract_fx.step import exporter
from tract_fx.step.trace import trace_step
from tract_fx.step.write import write_step
from tract_fx.torch_version import version_number

# Float32 rounds to 6e-8, over some thousand terms and some layers.
BOUND = 5e-6
# What is zero but for rounding, relative to the largest gradient.
ZERO = 1e-6

# Operators that no common network has.
WITHOUT_CUDA_KERNELS = ("compared", "composed", "computed", "moved")
FIRST = {"linear, few rows": "1", "probabilities": "1", "learned": "first.0"}


class Step:
    """A case's model, its batch, and the graph of its step."""

    def __init__(self, case: Case, first: str | None, **options: Any) -> None:
        torch.manual_seed(0)
        self.case, self.first = case, first
        self.plain, self.x, self.y = case.build(), case.input(), case.targets()
        self.kwargs = {} if case.other is None else {"other": case.other()}
        self.plain(self.x, **self.kwargs)  # lazy layers
        self.plain.zero_grad()
        self.model = copy.deepcopy(self.plain)
        if first is not None:
            self.model = tract_module(self.model, layers=first)
        self.trace = trace_step(self.model, (self.x,), self.kwargs, case.loss, (self.y,), **options)
        self.graph = write_step(self.trace)

    def run(
        self, batch: int = BATCH, names: tuple[str, ...] = ()
    ) -> dict[str, np.ndarray[Any, Any]]:
        return run(self.graph, self.feeds(batch), names or self.trace.outputs)

    def feeds(self, batch: int) -> dict[str, np.ndarray[Any, Any]]:
        tensors = [self.x, *self.kwargs.values(), self.y]
        given = dict(zip(self.trace.batch, (t[:batch] for t in tensors), strict=True))
        given |= dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return {name: tensor.detach().numpy() for name, tensor in given.items()}

    def wide(self, model: nn.Module, batch: int) -> tuple[nn.Module, Any, Tensor]:
        """A copy of a model in float64 after a step, what it gives, and the loss."""
        model = copy.deepcopy(model).double()
        x, y, kwargs = pytree.tree_map(
            lambda t: t[:batch].double() if t.is_floating_point() else t[:batch],
            (self.x, self.y, self.kwargs),
        )
        loss = copy.deepcopy(self.case.loss)
        loss = loss.double() if isinstance(loss, nn.Module) else loss
        output = model(x, **kwargs)
        value = loss(output, y)
        value.backward()
        return model, output, value


def assert_close(found: Any, wanted: Tensor, scale: float, name: str) -> None:
    size = float(wanted.detach().norm())
    difference = float(np.linalg.norm(np.asarray(found, np.float64) - wanted.detach().numpy()))
    assert found.shape == tuple(wanted.shape), name
    assert difference <= max(BOUND * size, ZERO * scale), (name, difference, size)


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_pytorch_s(name: str) -> None:
    first = None if name == "words" else FIRST.get(name, "0")
    case = CASES[name]
    if first == "0" and hasattr(case.build(), "first"):
        first = "first"
    if name == "probabilities" and version_number(torch.__version__) < (2, 13):
        with pytest.raises(ExportError, match="branch by the batch's size"):
            Step(case, first)  # that version's own loss reads the batch's size as a number
        return
    step = Step(case, first)
    if name not in WITHOUT_CUDA_KERNELS:
        assert missing_cuda_kernels(ir.to_proto(step.graph)) == []
    for batch in (BATCH, 3):
        found = step.run(batch)
        model, _, loss = step.wide(step.model, batch)
        assert_close(found[step.trace.loss], loss, 1.0, "loss")
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert step.trace.gradients.keys() == gradients.keys()
        largest = max(float(g.norm()) for g in gradients.values())
        for key, gradient in gradients.items():
            assert_close(found[step.trace.gradients[key]], gradient, largest, key)
        before, after = dict(step.model.named_buffers()), dict(model.named_buffers())
        for key, wanted in after.items():
            changed = not torch.equal(before[key].double(), wanted.double())
            assert changed == (key in step.trace.buffers)
            if changed:
                assert_close(found[step.trace.buffers[key]], wanted.double(), 1.0, key)
        if first is not None and name != "tied":  # whose one weight has terms of two layers
            _assert_definition(step, first, batch, found)


def _assert_definition(
    step: Step, first: str, batch: int, found: Mapping[str, np.ndarray[Any, Any]]
) -> None:
    """The first layer's gradient by the definition, of the plain model's in float64."""
    read: list[Tensor] = []
    layer = step.plain.get_submodule(first)
    handle = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].detach()))
    try:
        model, _, _ = step.wide(step.plain, batch)
    finally:
        handle.remove()
    gradient = model.get_submodule(first).weight.grad
    assert isinstance(gradient, Tensor) and len(read) == 1
    wanted = precondition(layer, gradient, read[0])
    assert relative_error(found[step.trace.gradients[f"{first}.weight"]], wanted) < BOUND


def test_dropout_s_masks_are_those_of_its_gradients() -> None:
    """With the masks that the graph has drawn, PyTorch's step in float64 is the graph's."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.Dropout2d(0.3), nn.Tanh(), nn.Dropout(0.5), nn.Flatten()),
        *(nn.Linear(8 * 36, 12), nn.AlphaDropout(0.2), nn.Linear(12, 4)),
    )
    step = Step(Case(lambda: net), "0")
    drawn = [n for n in step.graph.graph if n.op_type == "Dropout"]
    assert len(drawn) == 3
    masks = tuple(str(node.outputs[1].name) for node in drawn)
    step.graph.graph.outputs.extend(node.outputs[1] for node in drawn)
    found = step.run(names=(*step.trace.outputs, *masks))
    kept = [torch.from_numpy(found[mask]) for mask in masks]
    for mask, share in zip(kept, (0.7, 0.5, 0.8), strict=True):
        assert abs(float(mask.double().mean()) - share) < 0.2 and 0 < mask.double().mean() < 1
    left = iter(kept)

    def dropped(x: Tensor, p: float, *_: Any) -> Tensor:
        return x * next(left) / (1 - p)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", dropped)
        patch.setattr(F, "dropout2d", dropped)
        patch.setattr(F, "alpha_dropout", lambda x, p, *_: _alpha(x, p, next(left)))
        model, _, loss = step.wide(step.model, BATCH)
    assert_close(found[step.trace.loss], loss, 1.0, "loss")
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, Tensor)
        assert_close(found[step.trace.gradients[name]], parameter.grad, 1.0, name)
    again = step.run(names=masks)  # a new session draws the same
    assert all(np.array_equal(again[mask], found[mask]) for mask in masks)


def test_what_pytorch_raises_on_makes_the_loss_nan() -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(z, F.one_hot(y, 4).to(z))

    step = Step(Case(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), loss=loss), "1")
    assert np.isfinite(step.run(names=(step.trace.loss,))[step.trace.loss])
    step.y = step.y + 1
    assert np.isnan(step.run(names=(step.trace.loss,))[step.trace.loss])


def test_recurrent_layers_drop_between_them() -> None:
    """PyTorch's own decomposition (2.11 to 2.15) leaves dropout out without a word."""
    net = nn.LSTM(3, 4, 3, dropout=0.5, batch_first=True)
    case = Case(lambda: net, lambda: torch.randn(BATCH, 2, 3), lambda y, _: y[0].square().mean())
    step = Step(case, None)
    drawn = [n for n in step.graph.graph if n.op_type == "Dropout"]
    masks = tuple(str(node.outputs[1].name) for node in drawn)
    assert len(masks) == 2
    step.graph.graph.outputs.extend(node.outputs[1] for node in drawn)
    found = step.run(names=(step.trace.loss, *masks))
    y, states = step.x.double(), (torch.zeros(1, BATCH, 4).double(),) * 2
    for layer in range(3):
        own = nn.LSTM(y.shape[2], 4, batch_first=True).double()
        own.load_state_dict(
            {
                key.replace(f"l{layer}", "l0"): value
                for key, value in net.state_dict().items()
                if key.endswith(f"l{layer}")
            }
        )
        y, _ = own(y, states)
        if layer < 2:
            kept = torch.from_numpy(found[masks[layer]]).transpose(0, 1)
            assert 0 < kept.double().mean() < 1
            y = y * kept * 2
    assert_close(found[step.trace.loss], y.square().mean(), 1.0, "loss")


def _alpha(x: Tensor, p: float, kept: Tensor) -> Tensor:
    """Self-normalising networks (arXiv 1706.02515), as PyTorch's own formula has it."""
    alpha = 1.7580993408473766
    a = (alpha**2 * p + 1) ** -0.5 * (1 - p) ** -0.5
    kept = kept.to(x.dtype)
    result: Tensor = x * (kept * a) + ((kept - 1) * (alpha * a) + alpha * a * p)
    return result


class Named(nn.Module):
    """A parameter and a buffer that are called as operators are."""

    mm: Tensor
    loss: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(27, 4)
        self.tanh = nn.Parameter(torch.ones(4))
        self.register_buffer("mm", torch.full((4,), 2.0))
        self.register_buffer("loss", torch.full((4,), 3.0))

    def forward(self, target: Tensor) -> Tensor:
        return torch.tanh(self.first(target.flatten(1))) * self.tanh * self.mm + self.loss


def test_names_that_meet() -> None:
    step = Step(Case(Named, lambda: torch.randn(BATCH, 3, 3, 3)), "first")
    assert step.trace.batch[0] != step.trace.batch[1]
    names = [value.name for node in step.graph.graph for value in node.outputs]
    names += [value.name for value in step.graph.graph.inputs] + [*step.graph.graph.initializers]
    assert len(names) == len(set(names))
    found = step.run()
    model, _, loss = step.wide(step.model, BATCH)
    assert_close(found[step.trace.loss], loss, 1.0, "loss")
    gradient = model.tanh.grad
    assert isinstance(gradient, Tensor)
    assert_close(found[step.trace.gradients["tanh"]], gradient, 1.0, "tanh")


@pytest.mark.parametrize("name", ["attention", "conv2d", "frozen norm", "tied", "words"])
def test_outputs_are_pytorch_s(name: str) -> None:
    step = Step(CASES[name], FIRST.get(name, "0") if name in ("conv2d",) else None, gradients=False)
    for batch in (BATCH, 3):
        found = step.run(batch)
        with torch.no_grad():
            output = step.model(step.x[:batch], **{k: v[:batch] for k, v in step.kwargs.items()})
            loss = step.case.loss(output, step.y[:batch])
        assert_close(found[step.trace.loss], loss, 1.0, "loss")
        leaves = pytree.tree_leaves(output)
        for place, wanted in zip(step.trace.outputs[1:], leaves, strict=True):
            assert_close(found[place], wanted, 1.0, place)


def branches(z: Tensor) -> Tensor:
    return z * 2 if z.shape[0] > 4 else z


def is_six(z: Tensor) -> Tensor:
    return z + torch.zeros(6, 1, 1, 1)


def reads_indices(z: Tensor) -> Tensor:
    pooled, indices = F.max_pool2d(z, 2, return_indices=True)
    return pooled + indices


class Penalised(nn.Module):
    """Returns its loss, with the size of its input's gradient in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        hidden = torch.tanh(self.first(x))
        value: Tensor = hidden.square().sum() + self.head(hidden).sum()
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        return value + gradient.square().sum()


REFUSED: dict[str, tuple[Case, type[Exception], str]] = {
    "a branch": (does(branches), ExportError, "branch by the batch's size"),
    "a size": (does(is_six), ExportError, "branch by the batch's size"),
    "random": (does(lambda z: z + torch.rand_like(z)), ExportError, "random state"),
    "untested": (does(lambda z: z.lgamma()), ExportError, "prims.lgamma.default"),
    "indices": (does(reads_indices), ExportError, "indices are read"),
    "a value": (does(lambda z: z * z.sum().item()), ExportError, "_local_scalar_dense"),
    "a branch on values": (
        does(lambda z: z * 2 if bool(z.sum() > 0) else z),
        ExportError,
        "tracing the training step",
    ),
    "many": (
        Case(CASES["conv1d"].build, CASES["conv1d"].input, lambda z, y: z[0]),
        UnsupportedTrainingError,
        r"shape \(4,\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_t_be_exact_is_refused(name: str) -> None:
    case, error, says = REFUSED[name]
    with pytest.raises(error, match=says):
        Step(case, "0" if name == "many" else "first")


def test_a_fixed_batch_may_be_asked_for() -> None:
    step = Step(does(branches), "first", open_axes=[()])
    model, _, loss = step.wide(step.model, BATCH)
    found = step.run()
    assert_close(found[step.trace.loss], loss, 1.0, "loss")
    gradient = model.get_submodule("first").weight.grad
    assert isinstance(gradient, Tensor)
    assert_close(found[step.trace.gradients["first.weight"]], gradient, 1.0, "first")


def test_a_batch_of_one_leaves_its_size_open() -> None:
    step = Step(CASES["linear, many rows"], "0")
    args, targets = (step.x[:1],), (step.y[:1],)
    graph = write_step(trace_step(step.model, args, {}, step.case.loss, targets))
    for batch in (1, 4):
        found = run(graph, step.feeds(batch), step.trace.outputs)
        model, _, _ = step.wide(step.model, batch)
        for name, parameter in model.named_parameters():
            assert isinstance(parameter.grad, Tensor)
            assert_close(found[step.trace.gradients[name]], parameter.grad, 1.0, name)


class Rounded(nn.Module):
    """Multiplies in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: Tensor = self.first(x).float()
        return result


def test_autocast_under_tract_is_refused() -> None:
    with pytest.raises(ExportError, match="autocast"):
        Step(Case(Rounded, lambda: torch.randn(BATCH, 6)), "first")


def test_tract_on_what_is_no_product_of_its_own_is_refused() -> None:
    torch.manual_seed(0)
    model = tract_module(nn.Sequential(Penalised()), layers="0.first")
    with pytest.raises(ExportError, match="no product of its own"):
        write_step(trace_step(model, (torch.randn(BATCH, 6),), {}, lambda loss: loss, ()))


def test_pytorch_s_exporter_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public route, for versions whose private names are not tested."""
    step = Step(CASES["conv2d"], "0")
    found = step.run()
    monkeypatch.setattr(exporter, "_exporter", lambda: None)
    graph = write_step(step.trace)
    other = run(graph, step.feeds(BATCH), step.trace.outputs)
    for key, value in found.items():
        assert_close(other[key], torch.from_numpy(value).double(), 1.0, key)
    smaller = run(graph, step.feeds(3), step.trace.outputs)
    for key, value in step.run(3).items():
        assert_close(smaller[key], torch.from_numpy(value).double(), 1.0, key)

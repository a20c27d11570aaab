"""Losses: values and gradients of their graphs against float64, their targets, what they read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from skl2onnx import to_onnx
from sklearn.neural_network import MLPClassifier, MLPRegressor
from torch import Tensor, nn
from torch.nn import functional as F

from onnx_session import run
from torch_release import RELEASE
from tract_fx import export_training
from tract_fx.errors import ExportError, TractError, UnsupportedTrainingError
from tract_fx.export.losses import describe_loss, loss_function, loss_target
from tract_fx.export.model_outputs import read_by
from tract_fx.importer.ml_operators import without_dictionaries
from tract_fx.step.trace import trace_step
from tract_fx.step.write import write_step

CLASSES, FEATURES = 5, 3
# Float32 against float64: sums of up to 8·5 terms, each rounded to 6e-8.
TOLERANCE = 2e-6


class Scores(nn.Module):
    """Scores of a shape, of a linear layer."""

    def __init__(self, shape: Sequence[int], scale: float) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, int(np.prod(shape)))
        self.shape, self.scale = tuple(shape), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).reshape(-1, *self.shape) * self.scale  # type: ignore[no-any-return]


def _forward(opset: int = 20, shape: Sequence[int] = (CLASSES,)) -> ir.Model:
    """y = reshape(x @ w + b), as a framework other than PyTorch would write it."""
    width = int(np.prod(shape))
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((FEATURES, width)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["x", "w"], ["z"], name="product"),
            onnx.helper.make_node("Add", ["z", "b"], ["flat"], name="sum"),
            onnx.helper.make_node("Reshape", ["flat", "shape"], ["y"], name="reshape"),
        ],
        "forward",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", FEATURES])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", *shape])],
        [
            onnx.numpy_helper.from_array(weight, "w"),
            onnx.numpy_helper.from_array(rng.standard_normal(width).astype(np.float32), "b"),
            onnx.numpy_helper.from_array(np.array([-1, *shape], np.int64), "shape"),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    model.ir_version = 8
    return ir.from_proto(model)


@dataclass
class Case:
    name: str
    loss: Any
    target: Callable[[int], tuple[Tensor, ...]]
    shape: tuple[int, ...] = (CLASSES,)
    scale: float = 1.0

    def in_float64(self) -> Callable[..., Tensor]:
        loss = loss_function(self.loss)
        return copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _indices(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    def make(batch: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(batch)
        return (torch.randint(0, CLASSES, (batch, *shape), generator=generator),)

    return make


def _some_ignored(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    def make(batch: int) -> tuple[Tensor, ...]:
        (target,) = _indices(*shape)(batch)
        target[1] = -100
        return (target,)

    return make


def _values(batch: int) -> tuple[Tensor, ...]:
    return (_random(CLASSES, batch).T.contiguous(),)


def _bits(batch: int) -> tuple[Tensor, ...]:
    return ((_random(CLASSES, batch).T.contiguous() > 0).float(),)


def _signs(batch: int) -> tuple[Tensor, ...]:
    return (_bits(batch)[0] * 2 - 1,)


def _probabilities(batch: int) -> tuple[Tensor, ...]:
    return (torch.softmax(2 * _random(batch, CLASSES), 1),)


WEIGHT = torch.tensor([0.3, 1.7, 0.9, 0.2, 1.1])
CE = nn.CrossEntropyLoss


def _focal(output: Tensor, target: Tensor) -> Tensor:
    nll = F.cross_entropy(output, target, reduction="none")
    return ((1 - torch.exp(-nll)) ** 2 * nll).mean()


def _nll(output: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(output, 1), target, WEIGHT.to(output.dtype))


def _kl(log_target: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        target = target.log() if log_target else target
        log_prob = F.log_softmax(output, 1)
        return F.kl_div(log_prob, target, reduction="batchmean", log_target=log_target)

    return loss


def _hinge(output: Tensor, target: Tensor) -> Tensor:
    return torch.clamp(1 - output * target, min=0).mean() + F.relu(output - 3).sum()


def _sigmoid_then(output: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy(torch.sigmoid(output), target)


def _log_sigmoid(output: Tensor, target: Tensor) -> Tensor:
    return -F.logsigmoid(output * target).mean() + F.softplus(output, beta=2.0).mean()


def _logaddexp(output: Tensor, target: Tensor) -> Tensor:
    return torch.logaddexp(output, target).mean()


def _contrastive(output: Tensor, target: Tensor) -> Tensor:
    similarity = F.normalize(output) @ F.normalize(target).T / 0.1
    return F.cross_entropy(similarity, torch.arange(output.shape[0]))


def _under_no_grad(output: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        factor = torch.sigmoid(output)
    return (factor * (output - target) ** 2).mean()


CASES = [
    Case("cross-entropy", "cross_entropy", _indices()),
    Case("mse", "mse", _values),
    Case("bce-with-logits", "bce_with_logits", _bits),
    Case("l1", "l1", _values),
    Case("ce-ignored", CE(), _some_ignored()),
    Case("ce-ignore-2", CE(ignore_index=2), _indices()),
    Case("ce-weight-ignored", CE(weight=WEIGHT), _some_ignored()),
    Case("ce-sum", CE(weight=WEIGHT, reduction="sum"), _some_ignored()),
    Case("ce-smoothing", CE(label_smoothing=0.1), _indices()),
    Case("ce-smoothing-ignored", CE(label_smoothing=0.1), _some_ignored()),
    Case("ce-smoothing-weight", CE(label_smoothing=0.3, weight=WEIGHT), _some_ignored()),
    Case("ce-smoothing-sum", CE(label_smoothing=0.3, weight=WEIGHT, reduction="sum"), _indices()),
    Case("ce-smoothing-ignore-2", CE(label_smoothing=0.1, ignore_index=2), _indices()),
    Case("ce-probabilities", "cross_entropy", _probabilities),
    Case("ce-probabilities-all", CE(label_smoothing=0.2, weight=WEIGHT), _probabilities),
    Case("ce-pixels", CE(weight=WEIGHT), _some_ignored(2, 3), shape=(CLASSES, 2, 3)),
    Case("ce-pixels-smoothing", CE(label_smoothing=0.1), _some_ignored(2), shape=(CLASSES, 2)),
    Case("focal", _focal, _some_ignored()),
    Case("nll", _nll, _some_ignored()),
    Case("nll-pixels", _nll, _some_ignored(2, 2), shape=(CLASSES, 2, 2)),
    Case("bce-pos-weight", nn.BCEWithLogitsLoss(WEIGHT, pos_weight=2 * WEIGHT), _bits),
    Case("bce-extreme", nn.BCEWithLogitsLoss(), _bits, scale=100),
    Case("bce-extreme-pos", nn.BCEWithLogitsLoss(pos_weight=WEIGHT), _bits, scale=100),
    Case("bce-at-zero", nn.BCEWithLogitsLoss(reduction="sum"), _bits, scale=0),
    Case("binary-cross-entropy", _sigmoid_then, _bits),
    Case("smooth-l1", nn.SmoothL1Loss(beta=0.5), _values),
    Case("huber", nn.HuberLoss(delta=0.5, reduction="sum"), _values),
    Case("kl", _kl(False), _probabilities),
    Case("kl-log", _kl(True), _probabilities),
    Case("hinge", _hinge, _signs),
    Case("hinge-at-its-bound", lambda o, t: o.clamp(0, 1).sum(), _signs, scale=0),
    Case("log-sigmoid-extreme", _log_sigmoid, _signs, scale=100),
    Case("logaddexp-extreme", _logaddexp, _values, scale=200),
    Case("cosine", lambda o, t: 1 - F.cosine_similarity(o, t).mean(), _values),
    Case("contrastive", _contrastive, _values),
    Case("margin", nn.MultiMarginLoss(), _indices()),
    Case("poisson", nn.PoissonNLLLoss(), _bits),
    Case("detached", lambda o, t: ((o - t) ** 2 * o.detach()).mean(), _values),
    Case("no-grad", _under_no_grad, _values),
    Case("largest", lambda o, t: (o - t).amax(1).mean(), _values),
    Case("two-targets", lambda o, a, b: ((o - a) ** 2 * b).mean(), lambda n: _values(n) + _bits(n)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_values_and_gradients(case: Case) -> None:
    torch.manual_seed(0)
    net = Scores(case.shape, case.scale)
    loss = loss_function(case.loss)
    x = _random(4, FEATURES)
    if RELEASE < (2, 13) and case.target is _probabilities and "ce" in case.name:
        with pytest.raises(ExportError, match=r"size == 4.*dynamic_batch=False"):
            trace_step(net, (x,), {}, loss, case.target(4))  # PyTorch's own fixes the size there
        return
    trace = trace_step(net, (x,), {}, loss, case.target(4))
    graph = write_step(trace)
    for batch in (4, 7):
        x, targets = _random(batch, FEATURES), case.target(batch)
        tensors = {
            **dict(net.named_parameters()),
            **dict(zip(trace.batch, (x, *targets), strict=True)),
        }
        given = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
        found = run(graph, given, trace.outputs)
        exact = copy.deepcopy(net).double()
        wide = [t.double() if t.is_floating_point() else t for t in targets]
        value = case.in_float64()(exact(x.double()), *wide)
        value.backward()
        _close(found[trace.loss], value.detach().numpy())
        for name, parameter in exact.named_parameters():
            assert parameter.grad is not None
            _close(found[trace.gradients[name]], parameter.grad.numpy())


def _close(found: Any, expected: Any) -> None:
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * max(size, 1e-3))


NET = nn.Linear(FEATURES, CLASSES)


class _Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.scale * F.mse_loss(output, target)


class _Counting(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return F.mse_loss(output, target) * self.calls


def _branching(output: Tensor, target: Tensor) -> Tensor:
    return output.mean() if output.sum() > 0 else target.mean()


def _fixed_batch(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target) if len(output) == 4 else output.mean()


REFUSED: dict[str, tuple[Any, type[TractError], str]] = {
    "unknown": ("hinge", UnsupportedTrainingError, "'cross_entropy', 'mse'"),
    "number": (3, UnsupportedTrainingError, "a name or a callable"),
    "closure": (lambda o, t: (o * NET.bias - t).mean(), UnsupportedTrainingError, "loss=None"),
    "detached closure": (
        lambda o, t: (o * NET.bias.detach() - t).mean(),
        UnsupportedTrainingError,
        "loss=None",
    ),
    "trained": (_Trained(), UnsupportedTrainingError, "parameters to train: scale"),
    "state": (_Counting(), ExportError, "changes in place"),
    "random": (lambda o, t: (o * torch.rand_like(o)).mean(), ExportError, "random"),
    "branch": (_branching, ExportError, "GuardOnDataDependent"),
    "batch": (_fixed_batch, ExportError, "batch's size"),
    "vector": (lambda o, t: (o - t).mean(1), UnsupportedTrainingError, r"shape \(4,\)"),
    "double": (lambda o, t: (o - t).mean().double(), UnsupportedTrainingError, "float64 tensor"),
    "tuple": (lambda o, t: (o.mean(), t), UnsupportedTrainingError, "a tuple"),
    "failing": (lambda o, t: F.mse_loss(o, t[:, :2]), UnsupportedTrainingError, "fails on the"),
    "constant": (lambda o, t: t.mean(), UnsupportedTrainingError, "depends on nothing"),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    loss, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        export_training(
            NET,
            _random(4, FEATURES),
            tmp_path / "a",
            loss=loss,
            example_targets=_values(4),
            plain=True,
            target="onnxruntime",
        )
    assert not list(tmp_path.iterdir())


def test_wrong_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTrainingError, match="fails on the example"):
        export_training(
            NET,
            _random(4, FEATURES),
            tmp_path / "a",
            loss="cross_entropy",
            example_targets=torch.zeros(3, dtype=torch.int64),
            plain=True,
            target="onnxruntime",
        )


def test_targets_of_losses_known_by_name() -> None:
    output = _random(1, CLASSES, 2)
    target = loss_target("cross_entropy", [output])
    assert (target.example.dtype, target.example.shape) == (torch.int64, (1, 2))
    assert (target.classes, target.ignore_index) == (CLASSES, -100)
    target = loss_target(CE(ignore_index=1), [output])
    assert target.ignore_index == 1
    target = loss_target(nn.HuberLoss(), [output])
    assert (target.example.dtype, target.example.shape) == (torch.float32, (1, CLASSES, 2))
    with pytest.raises(UnsupportedTrainingError, match="example targets"):
        loss_target(_focal, [output])
    with pytest.raises(UnsupportedTrainingError, match="the model gives 2"):
        loss_target("mse", [output, output])


def test_losses_are_described_with_their_settings() -> None:
    assert describe_loss(None) == "returned by the model"
    assert describe_loss("mse") == "mse"
    assert describe_loss(_focal) == "_focal"
    assert "label_smoothing=0.1" in describe_loss(CE(label_smoothing=0.1))


def _scikit(model: Any, y: Any, *, zipmap: bool) -> ir.Model:
    x = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    options = {"options": {id(model): {"zipmap": zipmap}}} if zipmap is not None else {}
    model.fit(x, y(x))
    proto = to_onnx(model, x[:1], target_opset=18, **options)
    return ir.from_proto(without_dictionaries(proto))


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
@pytest.mark.parametrize("zipmap", [False, True])
@pytest.mark.parametrize(
    ("classes", "loss", "expected"),
    [
        (3, "cross_entropy", "add_result1"),
        (3, CE(label_smoothing=0.1), "add_result1"),
        (3, "mse", "probabilit"),
        (3, "bce_with_logits", "Softmax"),
        (2, "bce_with_logits", "add_result1"),
        (2, "cross_entropy", 'Use loss="bce_with_logits", whose output is add_result1'),
    ],
)
def test_scikit_learn_classifiers(classes: int, loss: Any, expected: str, zipmap: bool) -> None:
    labels = np.arange(30) % classes
    model = _scikit(MLPClassifier((6,), max_iter=3), lambda x: labels, zipmap=zipmap)
    if expected in {"add_result1", "probabilit"}:
        assert read_by(model, loss).removeprefix("output_").startswith(expected)
    else:
        of = "the output (probabilities|output_probability) is .*"
        with pytest.raises(UnsupportedTrainingError, match=f"(?s){of}{expected}"):
            read_by(model, loss)


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
def test_scikit_learn_regressor() -> None:
    regressor = MLPRegressor(hidden_layer_sizes=(6,), max_iter=3)
    model = _scikit(regressor, lambda x: x[:, 0], zipmap=None)  # type: ignore[arg-type]
    assert read_by(model, "mse") == "variable"


def _ending(*nodes: tuple[str, list[str], list[str], dict[str, Any]], rank: int = 2) -> ir.Model:
    """A graph that goes on from y with these nodes; every value it does not read is an output."""
    model = ir.to_proto(_forward(shape=(CLASSES, 2, 2)[: rank - 1]))
    for op, inputs, outputs, attributes in nodes:
        model.graph.node.append(onnx.helper.make_node(op, inputs, outputs, **attributes))
    read = {name for node in model.graph.node for name in node.input}
    del model.graph.output[:]
    made = [name for node in model.graph.node for name in node.output]
    model.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(name) for name in made if name not in read
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


SOFTMAX = ("Softmax", ["y"], ["p"], {"axis": -1})


@pytest.mark.parametrize(
    ("nodes", "loss", "expected"),
    [
        ([SOFTMAX], "cross_entropy", "y"),
        ([("LogSoftmax", ["y"], ["p"], {"axis": 1})], "cross_entropy", "y"),
        ([SOFTMAX, ("Identity", ["p"], ["q"], {})], "cross_entropy", "y"),
        ([("Sigmoid", ["y"], ["p"], {})], "bce_with_logits", "y"),
        ([("Relu", ["y"], ["p"], {})], "cross_entropy", "p"),
        ([SOFTMAX, ("Identity", ["y"], ["q"], {})], "cross_entropy", "y"),
        ([SOFTMAX, ("ArgMax", ["p"], ["k"], {}), ("Neg", ["p"], ["q"], {})], "l1", "q"),
    ],
)
def test_logits(nodes: Any, loss: str, expected: str) -> None:
    model = _ending(*nodes)
    found = read_by(model, loss)
    assert found == expected or (expected == "y" and found == "q")


@pytest.mark.parametrize(
    ("nodes", "loss", "rank", "message"),
    [
        ([SOFTMAX], "cross_entropy", 3, "another dimension than the second"),
        ([("Sigmoid", ["y"], ["p"], {})], "cross_entropy", 2, 'loss="bce_with_logits"'),
        ([SOFTMAX, ("Flatten", ["p"], ["q"], {"axis": 0})], "cross_entropy", 2, "another shape"),
        (
            [
                ("ReduceSum", ["y"], ["s"], {"keepdims": 1}),
                ("Div", ["y", "s"], ["p"], {}),
            ],
            "cross_entropy",
            2,
            "normalised by Div",
        ),
        ([("Neg", ["y"], ["p"], {}), ("Exp", ["y"], ["q"], {})], "mse", 2, "each of p, q"),
        ([("ArgMax", ["y"], ["k"], {})], "mse", 2, "none is a float32 tensor"),
    ],
)
def test_outputs_refused(nodes: Any, loss: str, rank: int, message: str) -> None:
    model = _ending(*nodes, rank=rank)
    with pytest.raises(UnsupportedTrainingError, match=message):
        read_by(model, loss)

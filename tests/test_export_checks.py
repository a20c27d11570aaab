"""The checks of an export see mistakes: in the loss, in gradients, in TrAct and in evaluation."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from foreign_models import FLOAT32, conv_net, initializers
from onnx_models import by_hand
from oracle import Spec, precondition, relative_error
from photographs import photograph_range_255
from tract_fx import (
    ExportError,
    TractWarning,
    export_training,
    load_trainer,
    tract_module,
    tract_pass,
)
from tract_fx.export import api, verify_onnx
from tract_fx.export.made_up import are_pixels, made_up_numbers
from tract_fx.export.reference_model import NoReferenceError
from tract_fx.export.torch_graphs import TorchGraphs
from tract_fx.export.verify_torch import verify_torch
from tract_fx.importer import build, table
from tract_fx.passes.onnx_graph.treated import without_tract


def foreign() -> Any:
    return by_hand(
        "c = Conv <strides=[2, 2]> (x, w, b) r = Tanh (c) g = GlobalAveragePool (r) "
        "f = Flatten (g) y = Gemm (f, u, v)",
        {"w": (6, 3, 3, 3), "b": (6,), "u": (6, 4), "v": (4,)},
        "float[N,3,9,9] x",
        "float[N,4] y",
    )


def from_torch() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    return tract_pass(torch.fx.symbolic_trace(net))


class Checkpointed(nn.Module):
    """Its first layer's output and its features are computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = checkpoint(self.first, x, use_reentrant=False).tanh().mean((2, 3))
        return checkpoint(self.body, features, use_reentrant=False)  # type: ignore[no-any-return]


def test_activation_checkpoints_are_no_part_of_a_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(6, 3, 8, 8), Checkpointed()
    export_training(tract_module(model, x), x, tmp_path / "run", target="onnxruntime")
    found = load_trainer(tmp_path / "run").compute_gradients(x, torch.arange(6) % 4)
    wide, x = copy.deepcopy(model).double(), x.double()
    nn.functional.cross_entropy(wide(x), torch.arange(6) % 4).backward()
    wanted = {name: parameter.grad for name, parameter in wide.named_parameters()}
    assert wanted["first.weight"] is not None
    wanted["first.weight"] = torch.from_numpy(precondition(wide.first, wanted["first.weight"], x))
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient is not None
        assert relative_error(torch.as_tensor(found[name]), gradient) < 2e-6


@dataclasses.dataclass(frozen=True)
class Written:
    """What a check is given for a model, once it has found it right."""

    check: Callable[..., None]
    given: tuple[Any, ...]
    graphs: Any

    def verify(self, graphs: Any) -> None:
        self.check(*self.given, graphs)


@pytest.fixture(scope="module", params=[foreign, from_torch], ids=["foreign", "torch"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    seen: list[Written] = []

    def note(*given: Any) -> None:
        seen.append(Written(verify_torch, given[:-1], given[-1]))
        verify_torch(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "verify_torch", note)
        x = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
        export_training(request.param(), x, tmp_path_factory.mktemp("export") / "a")
    return seen[0]


def spoil(model: ir.Model, name: str, factor: float, added: float = 0.0) -> None:
    """Let everybody who reads a value read `factor` times it, and `added`."""
    value = next(v for node in model.graph for v in node.outputs if v.name == name)
    users, is_output = list(value.uses()), [v is value for v in model.graph.outputs]
    constants = []
    for index, number in enumerate((factor, added)):
        constant = ir.val(f"spoiling_{index}", const_value=ir.tensor(np.float32(number)))
        model.graph.register_initializer(constant)
        constants.append(constant)
    product = ir.node("Mul", [value, constants[0]], name="spoil_product")
    total = ir.node("Add", [product.outputs[0], constants[1]], name="spoil_sum")
    producer = value.producer()
    assert producer is not None
    model.graph.insert_after(producer, [product, total])
    for node, index in users:
        node.replace_input_with(index, total.outputs[0])
    total.outputs[0].type, total.outputs[0].shape = value.type, value.shape
    for index, own in enumerate(is_output):
        if own:
            value.name, total.outputs[0].name = f"{name}_as_it_was", name
            model.graph.outputs[index] = total.outputs[0]


def gradient_of(graphs: TorchGraphs, shape: tuple[int, ...]) -> str:
    """The name of the gradient of the one parameter of a shape."""
    (name,) = (name for name, value in graphs.initial.items() if value.shape == shape)
    return f"{name}_grad"


def wrong_gradient(graphs: TorchGraphs) -> None:
    spoil(graphs.training, gradient_of(graphs, (4,)), 1 + 1e-4)


def missing_number(graphs: TorchGraphs) -> None:
    spoil(graphs.training, gradient_of(graphs, (4,)), 1, np.nan)


def wrong_loss(graphs: TorchGraphs) -> None:
    spoil(graphs.training, str(graphs.training.graph.outputs[0].name), 1 + 1e-4)


def another_activation(graphs: TorchGraphs) -> None:
    """A repair that puts the wrong operator into both graphs' forward pass."""
    for model in (graphs.training, graphs.evaluation):
        next(node for node in model.graph if node.op_type == "Tanh").op_type = "Sin"


def wrong_evaluation(graphs: TorchGraphs) -> None:
    next(node for node in graphs.evaluation.graph if node.op_type == "Tanh").op_type = "Sin"


def another_lambda(graphs: TorchGraphs) -> None:
    (value,) = (v for n, v in graphs.training.graph.initializers.items() if n.endswith("/lambda"))
    assert value.const_value is not None
    value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(1.02), name=value.name)


MISTAKES: dict[Callable[[Any], None], str] = {
    wrong_gradient: "gradient",
    missing_number: "gradient",
    wrong_loss: "loss",
    another_activation: "loss|output|gradient",
    wrong_evaluation: "evaluation|output",
    another_lambda: "TrAct's weight gradient",
}


def copied(graphs: TorchGraphs) -> TorchGraphs:
    training, evaluation = graphs.training.clone(), graphs.evaluation.clone()
    return dataclasses.replace(graphs, training=training, evaluation=evaluation)


def test_without_a_mistake_nothing_is_seen(written: Written) -> None:
    written.verify(copied(written.graphs))


@pytest.mark.parametrize("mistake", MISTAKES, ids=[m.__name__ for m in MISTAKES])
def test_a_mistake_is_seen(mistake: Callable[[Any], None], written: Written) -> None:
    spoiled = copied(written.graphs)
    mistake(spoiled)
    with pytest.raises(ExportError, match=MISTAKES[mistake]):
        written.verify(spoiled)


def test_a_lost_transform_is_seen(written: Written) -> None:
    plain, _ = without_tract(written.graphs.training)
    with pytest.raises(ExportError, match="without TrAct"):
        written.verify(dataclasses.replace(written.graphs, training=plain))


class RootOfZero(nn.Module):
    """Its root's gradient is infinite, by PyTorch and in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, 2), nn.Linear(6, 4)
        self.root = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = torch.tanh(self.stem(x)).mean((2, 3))
        return self.head(pooled) + self.root.sqrt()  # type: ignore[no-any-return]


def test_a_mistake_beside_an_infinite_gradient_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(model: Any, loss: Any, graphs: TorchGraphs) -> None:
        training = graphs.training.clone()
        verify_torch(model, loss, graphs)
        spoil(training, gradient_of(graphs, (4, 6)), 1 + 1e-4)
        verify_torch(model, loss, dataclasses.replace(graphs, training=training))

    torch.manual_seed(0)
    model = tract_pass(torch.fx.symbolic_trace(RootOfZero()))
    monkeypatch.setattr(api, "verify_torch", spoiled)
    with pytest.raises(ExportError, match=r"gradient of head\.weight, .* off by"):
        export_training(model, torch.randn(4, 3, 9, 9), tmp_path / "a", loss="mse")


MISREAD: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "another activation": ("Tanh", torch.sin),
    "a share of it": ("Tanh", lambda x: torch.tanh(x) * (1 + 1e-4)),
    "another mean": ("GlobalAveragePool", lambda x: x.amax((2, 3), keepdim=True)),
}


@pytest.mark.parametrize("mistake", MISREAD)
def test_a_model_read_wrongly_is_seen(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was imported is another model than the file, and trains itself rightly."""
    name, function = MISREAD[mistake]
    monkeypatch.setitem(table.OPERATORS, ("", name), function)
    with pytest.raises(ExportError, match=r"onnx\.reference"):
        export_training(foreign(), None, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_where_the_reference_can_not_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's own run of the file is compared with, and the manifest says so."""
    export_training(foreign(), None, tmp_path / "a")
    by_reference = load_trainer(tmp_path / "a").manifest.checks
    assert by_reference == ("PyTorch, float64", "onnx.reference on the file, float64")

    def none(*_: Any) -> Any:
        raise NoReferenceError("no such operator")

    monkeypatch.setattr(verify_onnx, "ReferenceModel", none)
    with pytest.warns(TractWarning, match="no such operator"):
        export_training(foreign(), None, tmp_path / "b")
    checks = load_trainer(tmp_path / "b").manifest.checks
    assert checks == ("PyTorch, float64", "ONNX Runtime on the file, float32")
    name, function = MISREAD["another activation"]
    monkeypatch.setitem(table.OPERATORS, ("", name), function)
    with pytest.warns(TractWarning), pytest.raises(ExportError, match="ONNX Runtime computes"):
        export_training(foreign(), None, tmp_path / "c")
    export_training(foreign(), None, tmp_path / "d", verify=False)
    assert load_trainer(tmp_path / "d").manifest.checks == ()


def test_a_norm_read_wrongly_in_training_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Any = build.batch_norm  # type: ignore[attr-defined]

    def wrong(x: torch.Tensor, *others: Any, **options: Any) -> Any:
        *_, training = others
        return real(x, *others, **options) * (1 + 1e-4 if training else 1)

    monkeypatch.setattr(build, "batch_norm", wrong)
    with pytest.raises(ExportError, match="in training mode"):
        export_training(conv_net(), None, tmp_path / "a")


@pytest.mark.parametrize(
    ("dtype", "words"), [(2, "whole numbers from 0 to 255"), (6, "whole numbers from 0 to 255")]
)
def test_images_of_bytes_without_an_example(dtype: int, words: str, tmp_path: Path) -> None:
    """Checked on numbers like the user's, not on zeros; right on photographs in [0, 255]."""
    model = by_hand(
        "t = Transpose <perm=[0, 3, 1, 2]> (x) i = Cast <to=1> (t) "
        "c = Conv <strides=[2, 2], pads=[3, 3, 3, 3]> (i, w) r = Relu (c) "
        "g = GlobalAveragePool (r) f = Flatten (g) y = Gemm (f, u)",
        {"w": (6, 3, 7, 7), "u": (6, 4)},
        f"{'uint8' if dtype == 2 else 'int32'}[N,32,32,3] x",
        "float[N,4] y",
    )
    for tensor in model.graph.initializer:
        if tensor.name == "w":
            values = initializers(model)["w"] / 255
            tensor.raw_data = values.astype(np.float32).tobytes()
    with pytest.warns(TractWarning, match=f"'x' as {words}"):
        export_training(model, None, tmp_path / "tract")
    options: dict[str, Any] = {"plain": True, "verify": False}
    export_training(model, photographs_like(dtype), tmp_path / "plain", **options)
    images, labels = photographs_like(dtype), np.arange(8) % 4
    found, plain = (
        load_trainer(tmp_path / kind).compute_gradients(images, labels)["w"]
        for kind in ("tract", "plain")
    )
    layer = Spec("conv", (7, 7), (2, 2), 3, "zeros", (1, 1), 1)
    wanted = precondition(layer, plain, images.transpose(0, 3, 1, 2).astype(np.float64))
    assert relative_error(found, wanted) < FLOAT32


def photographs_like(dtype: int) -> np.ndarray:
    images = photograph_range_255(8).numpy().transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images.astype(np.uint8 if dtype == 2 else np.int32))


def test_what_is_made_up() -> None:
    generator = np.random.default_rng(0)
    for dtype, pixels, least, most in (
        (np.uint8, False, 0, 255),
        (np.int8, True, 0, 127),
        (np.int64, True, 0, 255),
        (np.int64, False, 0, 0),
        (np.bool_, True, 0, 0),
    ):
        numbers, words = made_up_numbers(np.dtype(dtype), (50, 99), generator, pixels=pixels)
        assert numbers.dtype == dtype
        assert (int(numbers.min()), int(numbers.max())) == (least, most), dtype
        assert words.startswith("zeros" if most == 0 else "whole numbers")
    noise, _ = made_up_numbers(np.dtype(np.float16), (99, 99), generator)
    assert noise.dtype == np.float16 and abs(float(noise.std()) - 1) < 0.05
    for body, expected in (
        ("a = Transpose (x) b = Unsqueeze (a, axes) y = Cast <to=1> (b)", True),
        ("y = Cast <to=1> (x) s = Shape (x)", True),
        ("y = Cast <to=7> (x)", False),
        ("y = Gather (table, x)", False),
        ("c = Cast <to=1> (x) y = Gather (c, x)", False),
    ):
        given: dict[str, Any] = {"axes": np.array([0]), "table": (7, 4)}
        model = ir.from_proto(by_hand(body, given, "int64[N,3] x", "float[N,M] y"))
        assert are_pixels(model.graph.inputs[0]) is expected, body

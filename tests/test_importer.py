"""ONNX graphs as PyTorch modules, and steps of these: values and gradients of each operator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from onnx_models import by_hand
from onnx_session import graph, run
from oracle import Spec, tract_gradient
from tract_fx import import_onnx, tract_module, tract_pass, with_weights
from tract_fx.errors import StateMismatchError, UnsupportedTrainingError
from tract_fx.export.reference_model import ReferenceModel
from tract_fx.importer.build import import_graph
from tract_fx.importer.forward_model import read_model
from tract_fx.passes import find_input_layers, find_onnx_input_layers, is_tract
from tract_fx.step.trace import trace_step
from tract_fx.step.write import write_step

TOLERANCE = 1e-5  # float32 sums of at most a few hundred terms, against float64
IMAGE, VECTOR, TOKENS, SERIES = (3, 9, 9), (12,), (5, 12), (3, 20)

Arrays = Mapping[str, np.ndarray]


def _weights(image: bool, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (4, 3, 3, 3) if image else (12, 12)
    return {"w": (rng.standard_normal(shape) / 3).astype(np.float32)}


def _layer(shape: tuple[int, ...]) -> str:
    return "Conv <pads = [1, 1, 1, 1]> (x, w)" if shape == IMAGE else "MatMul(x, w)"


@dataclass(frozen=True)
class Case:
    """An operator behind a layer: h is the layer's output, y what the operator makes of it."""

    text: str
    function: Callable[[Tensor], Tensor]
    shape: tuple[int, ...] = VECTOR


def _conv_transpose(h: Tensor) -> Tensor:
    kernel = torch.arange(4 * 2 * 3 * 3, dtype=h.dtype).reshape(4, 2, 3, 3) / 50
    return F.conv_transpose2d(h, kernel, stride=2, padding=1, output_padding=1)


def _gru(h: Tensor) -> Tensor:
    """By the formulas in ONNX's documentation."""
    update, reset, new = (torch.arange(72, dtype=h.dtype) / 50).reshape(3, 2, 12)
    own = torch.arange(12, dtype=h.dtype).reshape(3, 2, 2) / 9
    state = h.new_zeros(len(h), 2)
    for x in h.unbind(1):
        z = torch.sigmoid(x @ update.T + state @ own[0].T)
        r = torch.sigmoid(x @ reset.T + state @ own[1].T)
        candidate = torch.tanh(x @ new.T + (r * state) @ own[2].T)
        state = (1 - z) * candidate + z * state
    return state.unsqueeze(1)


RECURRENT_KERNEL = ", ".join(str(n / 9) for n in range(12))
KERNEL = "{" + ", ".join(str(n / 50) for n in range(72)) + "}"

CASES = {
    "gelu_tanh": Case(
        'y = Gelu <approximate = "tanh"> (h)',
        lambda h: F.gelu(h, approximate="tanh"),
    ),
    "hard_swish": Case("y = HardSwish(h)", F.hardswish),
    "hard_sigmoid": Case(
        "y = HardSigmoid <alpha = 0.25, beta = 0.4> (h)",
        lambda h: (0.25 * h + 0.4).clamp(0, 1),
    ),
    "mish": Case("y = Mish(h)", F.mish),
    "softplus": Case("y = Softplus(h)", F.softplus),
    "softplus_at_zero": Case(
        "z = Sub(h, h) p = Softplus(z) y = Mul(h, p)",
        lambda h: h * F.softplus(h - h),
    ),
    "elu": Case("y = Elu <alpha = 0.7> (h)", lambda h: F.elu(h, 0.7)),
    "celu": Case("y = Celu <alpha = 0.5> (h)", lambda h: F.celu(h, 0.5)),
    "selu": Case("y = Selu(h)", F.selu),
    "prelu": Case(
        "s = Constant <value_floats = [0.2]> () y = PRelu(h, s)",
        lambda h: torch.where(h > 0, h, 0.2 * h),
    ),
    "softsign": Case("y = Softsign(h)", F.softsign),
    "thresholded": Case(
        "y = ThresholdedRelu <alpha = 0.3> (h)",
        lambda h: torch.where(h > 0.3, h, 0.0),
    ),
    "reduce_max": Case(
        "r = Relu(h) m = ReduceMax <keepdims = 1> (r, a) y = Mul(h, m)",
        lambda h: h * F.relu(h).amax(-1, keepdim=True),
    ),
    "reduce_min": Case("y = ReduceMin <keepdims = 0> (h, a)", lambda h: h.amin(-1)),
    "reduce_l1": Case(
        "y = ReduceL1 <keepdims = 0> (h, a)",
        lambda h: h.abs().sum(-1),
    ),
    "reduce_l2_whole": Case(
        "n = ReduceL2 <keepdims = 0> (h) y = Div(h, n)",
        lambda h: h / h.norm(),
    ),
    "sum_of_three": Case("s = Mul(h, h) y = Sum(h, s, h)", lambda h: 2 * h + h * h),
    "mean_of_two": Case("s = Mul(h, h) y = Mean(h, s)", lambda h: (h + h * h) / 2),
    "two_to_the": Case(
        "b = Constant <value_float = 2.0> () y = Pow(b, h)",
        lambda h: 2**h,
    ),
    "rounded": Case("r = Round(h) y = Mul(h, r)", lambda h: h * h.round()),
    "chunk": Case(
        "l = Constant <value_int = 4> () s = SplitToSequence <axis = -1> (h, l) "
        "i = Constant <value_int = 1> () y = SequenceAt(s, i)",
        lambda h: h.chunk(3, -1)[1],
    ),
    "split_in_part": Case(
        "p, q = Split <axis = 1, num_outputs = 2> (h) y = Mul(q, q)",
        lambda h: h.chunk(2, -1)[1] ** 2,
    ),
    "vector_right": Case(
        "v = ReduceSum <keepdims = 0> (w, a) y = MatMul(h, v)",
        lambda h: h,
    ),
    "where_smaller": Case(
        "m = ReduceMean <keepdims = 1> (h, a) c = Greater(h, m) y = Where(c, h, m)",
        lambda h: torch.where(h > h.mean(-1, keepdim=True), h, h.mean(-1, keepdim=True)),
    ),
    "einsum": Case(
        'y = Einsum <equation = "bti,bsi->bts"> (h, h)',
        lambda h: torch.einsum("bti,bsi->bts", h, h),
        TOKENS,
    ),
    "layer_norm_no_bias": Case(
        "s = ReduceSum <keepdims = 0> (w, f) y = LayerNormalization(h, s)",
        lambda h: h,
    ),
    "instance_norm": Case(
        "s = Constant <value_floats = [1.0, 2.0, 0.5, 1.5]> () y = InstanceNormalization(h, s, s)",
        lambda h: F.instance_norm(
            h, weight=h.new_tensor([1, 2, 0.5, 1.5]), bias=h.new_tensor([1, 2, 0.5, 1.5])
        ),
        IMAGE,
    ),
    "group_norm": Case(
        "s = Constant <value_floats = [1.0, 2.0, 0.5, 1.5]> () "
        "y = GroupNormalization <num_groups = 2> (h, s, s)",
        lambda h: F.group_norm(
            h, 2, h.new_tensor([1, 2, 0.5, 1.5]), h.new_tensor([1, 2, 0.5, 1.5])
        ),
        IMAGE,
    ),
    "average_pool": Case(
        "y = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (h)",
        lambda h: F.avg_pool2d(h, 2),
        IMAGE,
    ),
    "average_pool_border": Case(
        "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (h)",
        lambda h: F.avg_pool2d(h, 3, 2, 1, count_include_pad=False),
        IMAGE,
    ),
    "max_pool": Case(
        "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (h)",
        lambda h: F.max_pool2d(h, 3, 2, 1),
        IMAGE,
    ),
    "global_max_pool": Case(
        "y = GlobalMaxPool(h)",
        lambda h: F.adaptive_max_pool2d(h, 1),
        IMAGE,
    ),
    "upsample_nearest": Case(
        'r = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> () y = Resize <mode = "nearest", '
        'coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"> (h, , r)',
        lambda h: F.interpolate(h, scale_factor=2),
        IMAGE,
    ),
    "upsample_cubic": Case(
        "r = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> () "
        'y = Resize <mode = "cubic"> (h, , r)',
        lambda h: F.interpolate(h, scale_factor=2, mode="bicubic"),
        IMAGE,
    ),
    "downsample_linear": Case(
        "r = Constant <value_floats = [1.0, 1.0, 0.55555556, 0.44444445]> () y = Resize "
        '<mode = "linear", coordinate_transformation_mode = "align_corners"> (h, , r)',
        lambda h: F.interpolate(h, size=(5, 4), mode="bilinear", align_corners=True),
        IMAGE,
    ),
    "conv_transpose": Case(
        f"k = Constant <value = float[4, 2, 3, 3] {KERNEL}> () "
        "y = ConvTranspose <strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 1]> (h, k)",
        _conv_transpose,
        IMAGE,
    ),
    "reflect": Case(
        'p = Constant <value_ints = [0, 0, 1, 2, 0, 0, 0, 1]> () y = Pad <mode = "reflect"> (h, p)',
        lambda h: F.pad(h, (2, 1, 1, 0), mode="reflect"),
        IMAGE,
    ),
    "edge": Case(
        'p = Constant <value_ints = [0, 0, 1, 2, 0, 0, 0, 1]> () y = Pad <mode = "edge"> (h, p)',
        lambda h: F.pad(h, (2, 1, 1, 0), mode="replicate"),
        IMAGE,
    ),
    "reversed": Case(
        "e = Constant <value_ints = [-9223372036854775807]> () r = Slice(h, a, e, a, a) "
        "y = Mul(h, r)",
        lambda h: h * h.flip(-1),
    ),
    "gru": Case(
        "t = Transpose <perm = [1, 0, 2]> (h) "
        f"k = Constant <value = float[1, 6, 12] {KERNEL}> () "
        f"r = Constant <value = float[1, 6, 2] {{{RECURRENT_KERNEL}}}> () "
        "g, s = GRU <hidden_size = 2> (t, k, r) y = Transpose <perm = [1, 0, 2]> (s)",
        _gru,
        TOKENS,
    ),
    "parameter_twice": Case("s = Mul(w, w) t = MatMul(x, s) y = Add(h, t)", lambda h: h),
}
# Those whose operator reads the weight as well.
WHOLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "vector_right": lambda x, w: (x @ w) @ w.sum(-1),
    "layer_norm_no_bias": lambda x, w: F.layer_norm(x @ w, (12,), w.sum(0)),
    "parameter_twice": lambda x, w: x @ w + x @ (w * w),
}
OPSETS = {"gelu_tanh": 20, "group_norm": 21}


def _model(name: str, case: Case) -> ir.Model:
    shape = ", ".join(map(str, case.shape))
    text = (
        f"agraph (float[N, {shape}] x) => (float y) {{ a = Constant <value_ints = [-1]> () "
        f"f = Constant <value_ints = [0]> () h = {_layer(case.shape)} {case.text} }}"
    )
    return graph(text, _weights(case.shape == IMAGE), OPSETS.get(name, 18))


def imported(model: ir.Model, *trained: str, **options: Any) -> torch.fx.GraphModule:
    return import_graph(read_model(model), trained=trained, needed=["y"], **options).module


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    case = CASES[name]
    model, weights = _model(name, case), _weights(case.shape == IMAGE)
    module = imported(model, "w")
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4, *case.shape)).astype(np.float32)
    exact = ReferenceModel(read_model(model), ["y"]).run({"x": x})["y"]
    y = module(torch.tensor(x))["y"]
    assert relative_error(y.detach().numpy(), exact) < TOLERANCE

    def loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
        return F.mse_loss(output["y"], target)

    def function(x: Tensor, w: Tensor) -> Tensor:
        if name in WHOLE:
            return WHOLE[name](x, w)
        return case.function(F.conv2d(x, w, padding=1) if case.shape == IMAGE else x @ w)

    trace = trace_step(module, (torch.tensor(x),), {}, loss, (torch.zeros_like(y),))
    step = write_step(trace)
    for batch in (4, 3):
        x = rng.standard_normal((batch, *case.shape)).astype(np.float32)
        w = torch.tensor(weights["w"], dtype=torch.float64, requires_grad=True)
        y = function(torch.tensor(x).double(), w)
        target = rng.standard_normal(tuple(y.shape)).astype(np.float32)
        value = F.mse_loss(y, torch.tensor(target).double())
        value.backward()
        assert w.grad is not None
        tensors = dict(module.named_buffers())
        given = {name: tensor.numpy() for name, tensor in tensors.items()} | weights
        found = run(step, {**given, "x": x, "target": target}, trace.outputs)
        assert float(found["loss"]) == pytest.approx(float(value), rel=TOLERANCE)
        assert relative_error(found["w_grad"], w.grad.numpy()) < TOLERANCE


def relative_error(value: np.ndarray, expected: np.ndarray) -> float:
    """Give the norm of the difference, by the expected value's norm."""
    scale = np.linalg.norm(expected)
    return float(np.linalg.norm(np.float64(value) - expected) / (scale or 1.0))


def onnx_s_own(kind: str) -> list[Path]:
    return sorted((Path(onnx.__file__).parent / "backend" / "test" / "data" / kind).iterdir())


def _arrays(folder: Path, what: str) -> list[np.ndarray]:
    files = sorted(folder.glob(f"{what}_*.pb"), key=lambda file: int(file.stem.split("_")[-1]))
    return [np.array(onnx.numpy_helper.to_array(onnx.load_tensor(file))) for file in files]


@pytest.mark.parametrize(("kind", "count"), [("pytorch-converted", 82), ("pytorch-operator", 35)])
def test_onnx_s_own_models(kind: str, count: int) -> None:
    """Those that old exporters of PyTorch wrote: all of them, to the outputs beside them."""
    for folder in onnx_s_own(kind):
        model = read_model(folder / "model.onnx")
        outputs = [str(value.name) for value in model.graph.outputs]
        trained = [n for n, v in model.graph.initializers.items() if v.dtype == ir.DataType.FLOAT]
        module = import_graph(model, trained=trained, needed=outputs).module.eval()
        data = folder / "test_data_set_0"
        with torch.no_grad():
            found = module(*map(torch.tensor, _arrays(data, "input")[: len(model.graph.inputs)]))
        for name, wanted in zip(outputs, _arrays(data, "output"), strict=True):
            bound = 1e-4 * float(np.abs(np.nan_to_num(wanted)).max(initial=0.0))
            np.testing.assert_allclose(found[name].numpy(), wanted, 0, bound, err_msg=folder.name)
        count -= 1
    assert count == 0


RECURRENT: dict[str, tuple[str, int, dict[str, Any]]] = {
    "lstm": ("LSTM", 4, {}),
    "gru": ("GRU", 3, {}),
    "gru, reset behind": ("GRU", 3, {"linear_before_reset": 1}),
    "rnn": ("RNN", 1, {"activations": ["Relu"]}),
}


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name: str, direction: str) -> None:
    """With biases and first states, or neither, against ONNX Runtime's own kernels."""
    op, gates, options = RECURRENT[name]
    both = 2 if direction == "bidirectional" else 1
    if op == "RNN":
        options = {"activations": both * options["activations"]}
    rng = np.random.default_rng(2)
    x = rng.standard_normal((4, 2, 5)).astype(np.float32)
    shapes = {"w": (gates * 3, 5), "r": (gates * 3, 3), "b": (2 * gates * 3,), "h": (2, 3)}
    weights = {
        key: (rng.standard_normal((both, *shape)) / 2).astype(np.float32)
        for key, shape in (shapes | ({"c": (2, 3)} if op == "LSTM" else {})).items()
    }
    outputs = ["y", "last", *(["cell"] if op == "LSTM" else [])]
    for inputs in (["x", "w", "r"], ["x", "w", "r", "b", "", *list(weights)[3:]]):
        node = onnx.helper.make_node(
            op, inputs, outputs, hidden_size=3, direction=direction, **options
        )
        typed = [onnx.helper.make_tensor_value_info(n, 1, None) for n in outputs]
        given = onnx.helper.make_tensor_value_info("x", 1, [4, "N", 5])
        held = [onnx.numpy_helper.from_array(a, n) for n, a in weights.items() if n in inputs]
        proto = onnx.helper.make_model(
            onnx.helper.make_graph([node], "g", [given], typed, held),
            ir_version=9,
            opset_imports=[onnx.helper.make_opsetid("", 18)],
        )
        wanted = run(ir.from_proto(proto), {"x": x}, tuple(outputs))
        module = import_graph(read_model(proto), trained=["w"], needed=outputs).module
        found = module(torch.tensor(x))
        for key in outputs:
            np.testing.assert_allclose(found[key].detach().numpy(), wanted[key], 1e-5, 1e-6)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("y = LSTM <hidden_size = 3, input_forget = 1> (x, w, r)", "input_forget"),
        ('y = GRU <hidden_size = 4, activations = ["Relu", "Tanh"]> (x, w, r)', "Relu"),
        ("y = LSTM <hidden_size = 3, clip = 0.5> (x, w, r)", "clip"),
    ],
)
def test_recurrent_layers_that_are_refused(body: str, says: str) -> None:
    weights = {"w": np.ones((1, 12, 5), np.float32), "r": np.ones((1, 12, 3), np.float32)}
    model = graph(f"agraph (float[4, N, 5] x) => (float y) {{ {body} }}", weights)
    with pytest.raises(UnsupportedTrainingError, match=says):
        imported(model, "w")(torch.zeros(4, 2, 5))


def conv_model() -> onnx.ModelProto:
    return by_hand(
        "c = Conv <pads=[1, 1, 1, 1]> (x, w, b) "
        "n = BatchNormalization (c, scale, shift, mean, var) r = Relu (n) "
        "g = GlobalAveragePool (r) f = Flatten (g) y = Gemm <transB=1> (f, u, v)",
        {
            **{"w": (6, 3, 3, 3), "b": (6,), "scale": np.ones(6, np.float32), "shift": (6,)},
            **{"mean": (6,), "var": np.full(6, 0.5, np.float32), "u": (4, 6), "v": (4,)},
        },
        "float[N,3,9,9] x",
        "float[N,4] y",
    )


@pytest.mark.parametrize("way", ["pass", "module"])
def test_tract_on_an_imported_model(way: str) -> None:
    """As on any other: the pass finds the layer, its gradient is TrAct's, and it goes back."""
    proto = conv_model()
    module = import_onnx(proto)
    x, y = torch.randn(8, 3, 9, 9), torch.arange(8) % 4
    treated = tract_pass(module) if way == "pass" else tract_module(module, x)
    assert not is_tract(module)
    wide = copy.deepcopy(treated).double()
    F.cross_entropy(wide(x.double()), y).backward()
    plain: Any = copy.deepcopy(module).double()
    z = F.conv2d(x.double(), plain.w, plain.b, padding=1)
    z.retain_grad()
    n = F.batch_norm(z, None, None, plain.scale, plain.shift, True)
    F.cross_entropy(F.linear(F.relu(n).mean((2, 3)), plain.u, plain.v), y).backward()
    assert z.grad is not None
    spec = Spec("conv", (3, 3), (1, 1), 1, "zeros", (1, 1), 1)
    wanted = tract_gradient(spec, x.double(), z.grad, 0.1)
    found = wide.get_parameter("w").grad
    assert found is not None
    assert relative_error(found.numpy(), wanted) < 1e-9
    optimizer = torch.optim.SGD(treated.parameters(), 0.1)
    F.cross_entropy(treated(x), y).backward()
    optimizer.step()
    back = with_weights(proto, treated.state_dict())
    (output,) = run(ir.from_proto(back), {"x": x.numpy()}, ("y",)).values()
    with torch.no_grad():
        assert relative_error(output, treated.eval()(x).numpy()) < 1e-5


def test_weights_of_another_model_are_refused() -> None:
    state = import_onnx(conv_model()).state_dict()
    with pytest.raises(StateMismatchError, match="'u'"):
        with_weights(conv_model(), {**state, "u": state["u"][:2]})
    with pytest.raises(StateMismatchError, match="'other'"):
        with_weights(conv_model(), {**state, "other": state["u"]})


UNUSABLE = {
    "None": None,
    "text": "w",
    "masked": np.ma.masked_invalid(np.zeros((6, 3, 3, 3))),
    "sparse": torch.zeros(6, 3, 3, 3).to_sparse(),
    "meta": torch.zeros(6, 3, 3, 3, device="meta"),
    "complex": torch.zeros(6, 3, 3, 3) + 1j,
}


@pytest.mark.parametrize("value", UNUSABLE)
def test_weights_that_are_no_real_numbers_are_refused(value: str) -> None:
    state = import_onnx(conv_model()).state_dict()
    with pytest.raises(StateMismatchError, match="whose 'w' is a"):
        with_weights(conv_model(), {**state, "w": UNUSABLE[value]})
    with pytest.raises(StateMismatchError, match="as a state_dict"):
        with_weights(conv_model(), UNUSABLE[value])  # type: ignore[arg-type]


def test_weights_as_they_lie() -> None:
    w = torch.randn(*import_onnx(conv_model()).get_parameter("w").shape).bfloat16()
    turned = w.float().numpy()[::-1].copy()[::-1]  # of negative strides
    for value in (w, turned, w.float().numpy().astype(">f4")):
        back = with_weights(conv_model(), {"w": value})
        (found,) = (t for t in back.graph.initializer if t.name == "w")
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(found), w.float())


@pytest.mark.parametrize("names", [("in", "a.b", "a_b"), ("self", "torch", "x_self")], ids=str)
def test_names_of_inputs(names: tuple[str, str, str]) -> None:
    """What is no name of Python's, or another's, or one that the code of a graph reads."""
    proto = by_hand(
        "h = MatMul (p, w) s = Shape (h) r = Reshape (h, s) k = Mul (r, q) y = Sub (k, u)",
        {"w": np.eye(4, dtype=np.float32)},
        "float[N,4] p, float[N,4] q, float[N,4] u",
    )
    given = dict(zip("pqu", names, strict=True))
    for value in proto.graph.input:
        value.name = given[value.name]
    for node in proto.graph.node:
        node.input[:] = [given.get(name, name) for name in node.input]
    x, q, u = torch.randn(3, 2, 4)
    assert torch.equal(import_onnx(proto)(x, q, u), x * q - u)


@pytest.mark.parametrize(
    "name", ["a.b", "W:0", "/layer/w", "forward", "a", "model.w", "graph", "code.w", "self"]
)
def test_names_of_initializers(name: str) -> None:
    """Dots make modules; whatever else is in a name stays, but for what is a module's own."""
    weights = {name: np.eye(4, dtype=np.float32), "a.b.c": np.ones(4, np.float32)}
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [
                onnx.helper.make_node("MatMul", ["x", name], ["h"]),
                onnx.helper.make_node("Reshape", ["h", "sizes"], ["r"]),
                onnx.helper.make_node("Add", ["r", "a.b.c"], ["y"]),
            ],
            "named",
            [onnx.helper.make_tensor_value_info("x", 1, ["N", 4])],
            [onnx.helper.make_tensor_value_info("y", 1, ["N", 4])],
            [
                onnx.numpy_helper.from_array(array, key)
                for key, array in {**weights, "sizes": np.array([-1, 4])}.items()
            ],
        ),
        ir_version=9,
        opset_imports=[onnx.helper.make_opsetid("", 18)],
    )
    module = import_onnx(proto)
    x = torch.randn(2, 4)
    assert torch.equal(module(x), x + 1)
    state = {key: value + 1 for key, value in module.state_dict().items()}
    back = with_weights(proto, state)
    found = {t.name: onnx.numpy_helper.to_array(t) for t in back.graph.initializer}
    for key, array in weights.items():
        np.testing.assert_array_equal(found[key], array + 1)


def test_weights_beside_what_can_t_be_imported() -> None:
    text = """agraph (float[N, 4] x) => (float[N, 4] y, string[1] s, float z)
    { y = MatMul (x, forward) s = Constant <value_strings = ["a"]> () z = Det (forward) }"""
    proto = ir.to_proto(graph(text, {"forward": np.eye(4, dtype=np.float32)}))
    for output in ("'s' of", "Det"):
        with pytest.raises(UnsupportedTrainingError, match=output):
            import_onnx(proto)
        proto.graph.output.remove(proto.graph.output[1])
    weight = 2 * np.eye(4, dtype=np.float32)
    back = with_weights(proto, {"forward_": weight})
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(back.graph.initializer[0]), weight)


def test_what_can_t_be_imported_is_named() -> None:
    text = "agraph (float[N, 4] x) => (float y) { h = MatMul (x, w) y = Det (h) }"
    with pytest.raises(UnsupportedTrainingError, match="Det 'Det_y'"):
        import_onnx(ir.to_proto(graph(text, {"w": np.eye(4, dtype=np.float32)})))


WHERE_THE_LAYER_IS = {
    "a scale that is not trained": "s = LayerNormalization(x, G) y = MatMul(s, W)",
    "the input's shape alone": "s = Shape(x) e = Expand(G, s) y = MatMul(e, W)",
    "a part of the shape": "s = Shape <start = 1> (x) e = Expand(G, s) y = MatMul(e, W)",
    "a computed weight": "t = Exp(W) y = MatMul(x, t)",
    "a transposed weight": "t = Transpose(W) u = Transpose(t) y = MatMul(x, u)",
    "a look-up beside it": "e = Gather(T, i) l = MatMul(x, W) y = Add(e, l)",
    "a look-up in front": "e = Gather(T, i) y = MatMul(e, W)",
    "a weight made of the input": "m = Transpose <perm = [0, 2, 1]> (x) y = MatMul(x, m)",
    "a mask": "c = Greater(x, G) s = Where(c, x, G) y = MatMul(s, W)",
    "a scale that is trained": "s = Mul(x, W) y = MatMul(s, W)",
}


@pytest.mark.parametrize("name", WHERE_THE_LAYER_IS)
def test_both_graphs_have_one_input_layer(name: str) -> None:
    """A file, and the module made of it: located by two walks that share no line."""
    tensors: dict[str, Any] = {"W": (8, 8), "G": (8,), "T": (10, 8)}
    text = WHERE_THE_LAYER_IS[name]
    proto = by_hand(text, tensors, "float[N,4,8] x" + ", int64[N,4] i" * ("T, i" in text))
    trainable = ["W", "T"] if "T, i" in text else ["W"]
    file = find_onnx_input_layers(proto, trainable=trainable)
    model = import_onnx(proto, trainable=trainable)
    module = find_input_layers(model)
    assert module.names == file.names
    assert [r.competes for r in module.refusals] == [r.competes for r in file.refusals]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n in trainable if n in text}

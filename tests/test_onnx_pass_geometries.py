"""The ONNX pass on every setting of a layer that ONNX can express, against the float64 oracle.

Each model is one layer with Tanh behind it and the loss ∑ t · tanh(y), so that the gradient of the
layer's output is known in closed form: dz = t (1 − tanh²y), taken in float64 here.

The bound on noise, 1e-5 of the gradient's norm, is some hundred float32 roundings: those of ONNX
Runtime's own gradient and of the Gram, raised by the matrix's condition, which is at most a few
hundred on these inputs at λ = 0.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from geometries import CONVOLUTIONS, GEOMETRIES, ConvNd, Geometry, conv_calls
from onnx_models import by_hand
from onnx_training import Array, Step, Training, all_nodes, build_training
from oracle import Spec, precondition, relative_error, tract_gradient
from photographs import photograph_range_255, photographs
from tract_fx import UnsupportedLayerError
from tract_fx.passes import tract_onnx_pass

NOISE = 1e-5
PHOTOGRAPHS = 2e-4  # the condition of photographs' patches is some thousands
TOO_COARSE = 1e-4  # a λ for which float32 has too few digits
ANY = 1e-4  # some random geometries have conditions of thousands; 3e-5 is the worst of 500
PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
Pads = tuple[tuple[int, int], ...]


def numbers(shape: tuple[int, ...], seed: int = 1, mean: float = 0.5) -> Array:
    return np.random.default_rng(seed).normal(mean, 1, shape).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """A model, what it is run on, and TrAct's gradient of its weight by the oracle."""

    model: onnx.ModelProto
    batch: tuple[Array, Array]
    expected: Array


def trained(case: Case) -> Training:
    names = [t.name for t in case.model.graph.initializer if t.name in {"w", "b"}]
    return build_training(case.model, names)


def assert_right(
    training: Training,
    graph: onnx.ModelProto,
    case: Case,
    bound: float = NOISE,
    plain: Step | None = None,
) -> Step:
    """A step gives the oracle's gradient for the weight, and the plain graph's for the rest."""
    plain = training.step(None, *case.batch) if plain is None else plain
    tract = training.step(graph, *case.batch)
    assert relative_error(tract.gradients["w"], case.expected) < bound
    assert np.array_equal(tract.loss, plain.loss)
    for name in training.trainable:
        if name != "w":
            assert np.array_equal(tract.gradients[name], plain.gradients[name])
    return tract


def number_of_ifs(graph: onnx.ModelProto) -> int:
    """One between float64 and float32 in each form, and one between the forms."""
    return sum(node.op_type == "If" for node in all_nodes(graph.graph))


def typed(name: str, shape: tuple[int | str, ...]) -> str:
    return f"float[{','.join(map(str, shape))}] {name}"


def functional_convolution(dims: int) -> Callable[..., torch.Tensor]:
    return (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]


def convolution(
    layer: ConvNd,
    x: Array,
    lambda_: float = 0.1,
    *,
    dynamic: bool = False,
    kernel_shape: bool = True,
    pads: Pads | None = None,
    auto_pad: str = "",
    opset: int = 20,
) -> Case:
    """The model of a convolution, as the exporters write it.

    Args:
        layer: Its sizes and parameters.
        x: Its input.
        lambda_: λ, of what is expected.
        dynamic: Whether the batch size is left open.
        kernel_shape: Whether the node says its kernel's size, which the weight says too.
        pads: Zeros before and after, per dimension; by default the layer's own.
        auto_pad: An attribute that stands in the place of the pads.
        opset: The version of ONNX's operators.

    Returns:
        The model, its batch and what the oracle expects.
    """
    spec = Spec.of(layer)
    margins = tuple(spec.margins()) if pads is None else pads
    mode = PAD_MODES.get(layer.padding_mode, "constant")
    unbatched = x.ndim == len(spec.kernel) + 1
    widths = [(0, 0), (0, 0), *margins]
    values = x[None] if unbatched else x
    padded = np.pad(values.astype(np.float64), widths, mode=mode)  # type: ignore[call-overload]
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    y = functional_convolution(len(spec.kernel))(
        torch.from_numpy(padded),
        weight.double(),
        None if bias is None else bias.double(),
        stride=spec.stride,
        dilation=spec.dilation,
        groups=spec.groups,
    ).numpy()
    t = numbers(y.shape)
    dz = t * (1 - np.tanh(y) ** 2)
    bare = Spec("conv", spec.kernel, spec.stride, 0, "zeros", spec.dilation, spec.groups)
    expected = tract_gradient(bare, padded, dz, lambda_)

    attributes: dict[str, Any] = {"strides": list(spec.stride)}
    attributes |= {"dilations": list(spec.dilation), "group": spec.groups}
    if kernel_shape:
        attributes["kernel_shape"] = list(spec.kernel)
    body, source, constants = "", "x", {"w": weight.numpy()}
    if unbatched:
        body, source, t = "x1 = Unsqueeze(x, zero)", "x1", t[0]
        constants["zero"] = np.array([0])
    if mode != "constant":
        body += f' x2 = Pad<mode="{mode}">({source}, widths)'
        source = "x2"
        constants["widths"] = np.array(widths).T.flatten()
    elif auto_pad:
        attributes["auto_pad"] = f'"{auto_pad}"'
    else:
        attributes["pads"] = np.array(margins).T.flatten().tolist()
    if bias is not None:
        constants["b"] = bias.numpy()
    listed = ", ".join(f"{key}={value}" for key, value in attributes.items())
    body += f" y0 = Conv<{listed}>({source}, w{', b' * (bias is not None)})"
    body += " y = Squeeze(y0, zero)" if unbatched else " y = Identity(y0)"
    return Case(with_loss(body, constants, x.shape, t.shape, dynamic, opset), (x, t), expected)


def with_loss(
    body: str,
    constants: dict[str, Array],
    x: tuple[int, ...],
    t: tuple[int, ...],
    dynamic: bool = False,
    opset: int = 20,
) -> onnx.ModelProto:
    """A model of a body that makes y of x, and the loss ∑ t · tanh(y)."""
    shapes: list[tuple[int | str, ...]] = [x, t]
    if dynamic:
        shapes = [("N", *shape[1:]) for shape in shapes]
    return by_hand(
        f"{body} h = Tanh(y) p = Mul(h, t) loss = ReduceSum<keepdims=0>(p)",
        constants,
        f"{typed('x', shapes[0])}, {typed('t', shapes[1])}",
        "float loss",
        opset,
    )


@dataclass(frozen=True)
class Linear:
    """A way to write a linear layer in ONNX.

    Attributes:
        name: A test's id.
        body: Makes y of x.
        rank: The input's number of dimensions.
        out_in: Whether the weight is (out, n) rather than (n, out).
        x_transposed: Whether the input is (n, R).
        alpha: The product's factor.
        beta: The bias's; 0 where there is none.
    """

    name: str
    body: str
    rank: int = 2
    out_in: bool = False
    x_transposed: bool = False
    alpha: float = 1
    beta: float = 0

    def __str__(self) -> str:
        return self.name


LINEAR = (
    Linear("gemm", "y = Gemm(x, w, b)", beta=1),
    Linear("gemm-no-bias", "y = Gemm(x, w)"),
    Linear("gemm-transB", "y = Gemm<transB=1>(x, w, b)", out_in=True, beta=1),
    Linear("gemm-transA", "y = Gemm<transA=1>(x, w, b)", x_transposed=True, beta=1),
    Linear(
        "gemm-transA-transB", "y = Gemm<transA=1, transB=1>(x, w)", out_in=True, x_transposed=True
    ),
    Linear("gemm-alpha", "y = Gemm<alpha=0.5, beta=2.0>(x, w, b)", alpha=0.5, beta=2),
    Linear("gemm-alpha-no-bias", "y = Gemm<alpha=-3.0>(x, w)", alpha=-3),
    Linear(
        "gemm-alpha-transposed",
        "y = Gemm<alpha=0.5, transA=1, transB=1>(x, w, b)",
        out_in=True,
        x_transposed=True,
        alpha=0.5,
        beta=1,
    ),
    Linear("gemm-of-transposed-weight", "v = Transpose(w) y = Gemm(x, v, b)", out_in=True, beta=1),
    Linear(
        "gemm-transB-of-transposed-weight", "v = Transpose(w) y = Gemm<transB=1>(x, v, b)", beta=1
    ),
    Linear("matmul", "y = MatMul(x, w)"),
    Linear("matmul-add", "y0 = MatMul(x, w) y = Add(y0, b)", beta=1),
    Linear("matmul-add-swapped", "y0 = MatMul(x, w) y = Add(b, y0)", beta=1),
    Linear("matmul-of-vector", "y = MatMul(x, w)", rank=1),
    Linear("matmul-of-tokens", "y = MatMul(x, w)", rank=3),
    Linear("matmul-add-of-tokens", "y0 = MatMul(x, w) y = Add(y0, b)", rank=3, beta=1),
    Linear("matmul-of-grid", "y0 = MatMul(x, w) y = Add(y0, b)", rank=4, beta=1),
    Linear(
        "matmul-transposed-weight", "v = Transpose<perm=[1, 0]>(w) y = MatMul(x, v)", out_in=True
    ),
    Linear(
        "matmul-transposed-weight-of-tokens",
        "v = Transpose<perm=[1, 0]>(w) y0 = MatMul(x, v) y = Add(y0, b)",
        rank=3,
        out_in=True,
        beta=1,
    ),
)


def linear(
    way: Linear,
    rows: int,
    columns: int,
    lambda_: float = 0.1,
    *,
    dynamic: bool = False,
    opset: int = 20,
) -> Case:
    """The model of a linear layer.

    Args:
        way: How it is written.
        rows: R; of an input with more than two dimensions a multiple of 2, or of 4.
        columns: n.
        lambda_: λ, of what is expected.
        dynamic: Whether the number of rows is left open.
        opset: The version of ONNX's operators.

    Returns:
        The model, its batch and what the oracle expects.
    """
    outputs = 3
    leading = {1: (), 2: (rows,), 3: (rows // 2, 2), 4: (rows // 4, 2, 2)}[way.rank]
    assert int(np.prod(leading)) == rows
    x, b = numbers((*leading, columns)), numbers((outputs,))
    w = numbers((columns, outputs), 2, 0) / 4  # where Tanh is not flat
    y = way.alpha * (x.astype(np.float64) @ w) + way.beta * b
    t = numbers(y.shape)
    dz = t * (1 - np.tanh(y) ** 2)
    expected = tract_gradient(Spec("linear"), x, way.alpha * dz, lambda_)
    constants = {"w": w.T.copy() if way.out_in else w} | ({"b": b} if way.beta else {})
    if way.x_transposed:
        x = x.T.copy()
    model = with_loss(way.body, constants, x.shape, t.shape, dynamic, opset)
    if dynamic and way.x_transposed:  # with_loss leaves the first dimension open
        first, second = model.graph.input[0].type.tensor_type.shape.dim
        first.dim_value, second.dim_param = columns, "N"
    return Case(model, (x, t), expected if way.out_in else expected.T)


def assert_right_in_both_precisions(make: Callable[[float], Case], batch: str) -> None:
    first = make(0.1)
    training = trained(first)
    plain = training.step(None, *first.batch)
    for lambda_, bound in ((0.1, NOISE), (TOO_COARSE, ANY)):
        graph = tract_onnx_pass(training.graph, lambda_=lambda_)
        assert number_of_ifs(graph) == (3 if batch == "dynamic" else 1)
        assert_right(training, graph, make(lambda_), bound, plain)


ROWS_COLUMNS = {"above": (24, 5), "below": (8, 20), "equal": (8, 8), "one-row": (1, 6)}
ROWS_COLUMNS["one-column"] = (12, 1)


@pytest.mark.parametrize("batch", ["static", "dynamic"])
@pytest.mark.parametrize("sizes", ROWS_COLUMNS)
@pytest.mark.parametrize("way", LINEAR, ids=str)
def test_linear(way: Linear, sizes: str, batch: str) -> None:
    rows, columns = ROWS_COLUMNS[sizes]
    if way.rank == 1 and (rows > 1 or batch == "dynamic"):
        pytest.skip("a vector is one row")
    if way.rank > 2 and rows == 1:
        pytest.skip("one row is a vector or a matrix")
    assert_right_in_both_precisions(
        lambda lambda_: linear(way, rows, columns, lambda_, dynamic=batch == "dynamic"), batch
    )


EXPRESSIBLE = [g for g in GEOMETRIES if not isinstance(g.build(), nn.Linear)]


@pytest.mark.parametrize("batch", ["static", "dynamic"])
@pytest.mark.parametrize("geometry", EXPRESSIBLE, ids=str)
def test_convolution(geometry: Geometry, batch: str) -> None:
    layer, x = geometry.layer(), geometry.input().numpy()
    assert isinstance(layer, ConvNd)
    if x.ndim == len(layer.kernel_size) + 1 and batch == "dynamic":
        pytest.skip("there is no batch")
    static = batch == "static"
    assert_right_in_both_precisions(
        lambda lambda_: convolution(layer, x, lambda_, dynamic=not static, kernel_shape=static),
        batch,
    )


@pytest.mark.parametrize("batch", ["static", "dynamic"])
@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("kernel", [(1,), (3,), (4, 3), (1, 1), (2, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_auto_pad(auto_pad: str, kernel: tuple[int, ...], stride: int, batch: str) -> None:
    """Right where ONNX's rule adds no zeros, else refused: ⌈size / stride⌉ outputs."""
    sizes = (7, 8, 6)[: len(kernel)]
    pads = []
    for size, k in zip(sizes, kernel, strict=True):
        total = max((-(-size // stride) - 1) * stride + k - size, 0)
        if auto_pad == "VALID":
            total = 0
        less, more = total // 2, total - total // 2
        pads.append((more, less) if auto_pad == "SAME_LOWER" else (less, more))
    layer = CONVOLUTIONS[len(kernel)](2, 4, kernel, stride)
    case = convolution(
        layer,
        numbers((3, 2, *sizes)),
        dynamic=batch == "dynamic",
        kernel_shape=batch == "static",
        pads=tuple(pads),
        auto_pad=auto_pad,
    )
    training = trained(case)
    if not np.any(pads):
        assert_right(training, tract_onnx_pass(training.graph), case)
    else:
        with pytest.raises(UnsupportedLayerError, match=f"auto_pad={auto_pad}.*wrong already"):
            tract_onnx_pass(training.graph)


def test_the_plain_gradient_under_auto_pad_is_wrong() -> None:
    """Why the pass refuses it: ConvGrad reads the patches of a layer without padding."""
    layer, x = nn.Conv2d(2, 4, 3), numbers((3, 2, 7, 8))
    case = convolution(layer, x, 1e9, pads=((1, 1), (1, 1)), auto_pad="SAME_UPPER")
    gradient = trained(case).step(None, *case.batch).gradients["w"]
    assert not relative_error(gradient, 1e9 * case.expected) < 0.1  # where λ is the whole matrix


ASYMMETRIC: dict[str, tuple[ConvNd, Pads]] = {
    "1d": (nn.Conv1d(2, 4, 4), ((3, 0),)),
    "2d": (nn.Conv2d(2, 4, 3), ((0, 1), (2, 0))),
    "2d-stride": (nn.Conv2d(2, 4, (3, 5), stride=(2, 1)), ((1, 2), (0, 3))),
    "2d-stride-dilation-groups": (
        nn.Conv2d(4, 6, 3, stride=2, dilation=(1, 2), groups=2),
        ((2, 0), (0, 1)),
    ),
    "2d-patchify": (nn.Conv2d(2, 4, 2, stride=2), ((0, 1), (0, 0))),
    "3d": (nn.Conv3d(2, 4, 2), ((1, 0), (0, 1), (2, 1))),
}


@pytest.mark.parametrize("batch", ["static", "dynamic"])
@pytest.mark.parametrize("setting", ASYMMETRIC)
def test_asymmetric_padding(setting: str, batch: str) -> None:
    layer, pads = ASYMMETRIC[setting]
    sizes = (7, 8, 6)[: len(pads)]
    x = numbers((3, layer.in_channels, *sizes))
    case = convolution(layer, x, dynamic=batch == "dynamic", pads=pads)
    training = trained(case)
    assert_right(training, tract_onnx_pass(training.graph), case)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_dilation_where_the_stride_is_the_kernel(dynamic: bool) -> None:
    """Of what else would be patches side by side."""
    layer = nn.Conv2d(2, 4, 2, stride=2, dilation=3)
    case = convolution(layer, numbers((5, 2, 8, 8)), dynamic=dynamic)
    training = trained(case)
    assert_right(training, tract_onnx_pass(training.graph), case)


@pytest.mark.parametrize("lambda_", [1e-3, 1e-2, 1.0, 10.0])
@pytest.mark.parametrize("batch", [1, 8])
def test_lambda(lambda_: float, batch: int) -> None:
    """Both branches of one graph; 36 rows or 288 and 45 columns."""
    torch.manual_seed(0)
    case = convolution(nn.Conv2d(5, 4, 3), numbers((batch, 5, 8, 8)), lambda_, dynamic=True)
    training = trained(case)
    graph = tract_onnx_pass(training.graph, lambda_=lambda_)
    assert_right(training, graph, case)


def opened(case: Case, x: str, t: str) -> Case:
    """The same model with other sizes left open."""
    for value, shape in zip(case.model.graph.input, (x, t), strict=True):
        value.CopyFrom(onnx.parser.parse_graph(f"g ({shape}) => (float y) {{}}").input[0])
    return case


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 2, stride=2)])
@pytest.mark.parametrize("shape", [(1, 2, 4, 4), (3, 2, 9, 8)], ids=str)
def test_open_image_size(layer: ConvNd, shape: tuple[int, ...]) -> None:
    case = opened(convolution(layer, numbers(shape)), "float[N,2,H,W] x", "float[N,4,P,Q] t")
    training = trained(case)
    assert_right(training, tract_onnx_pass(training.graph), case)


@pytest.mark.parametrize("rows", [2, 20])
def test_open_number_of_tokens(rows: int) -> None:
    (way,) = [way for way in LINEAR if way.name == "matmul-add-of-tokens"]
    case = opened(linear(way, rows, 6), "float[N,T,6] x", "float[N,T,3] t")
    training = trained(case)
    assert_right(training, tract_onnx_pass(training.graph), case)


PHOTOGRAPHED = {
    "3x3": lambda: nn.Conv2d(3, 8, 3, padding=1),
    "7x7/2": lambda: nn.Conv2d(3, 8, 7, stride=2, padding=3),
    "4x4/4": lambda: nn.Conv2d(3, 8, 4, stride=4),
    "depthwise": lambda: nn.Conv2d(3, 6, 5, padding=2, groups=3),
    "16x16/16": lambda: nn.Conv2d(3, 8, 16, stride=16),  # fewer rows than columns
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("net", PHOTOGRAPHED)
@pytest.mark.parametrize("numbers_of", ["standardised", "0 to 255"])
def test_photographs(numbers_of: str, net: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    layer, x = PHOTOGRAPHED[net](), photographs(8)
    if numbers_of == "0 to 255":
        x = photograph_range_255(8)
        layer.weight.data /= 255
    case = convolution(layer, x.numpy(), dynamic=dynamic)
    training = trained(case)
    if numbers_of == "0 to 255" and net != "16x16/16":
        # ONNX Runtime's own gradient is off by 4e-4 behind the operator, which is judged alone.
        plain = training.step(None, *case.batch).gradients["w"]
        case = dataclasses.replace(case, expected=precondition(layer, plain, x))
    graph = tract_onnx_pass(training.graph)
    assert_right(training, graph, case, PHOTOGRAPHS if numbers_of == "standardised" else NOISE)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), dims=st.integers(1, 3), dynamic=st.booleans())
def test_any_convolution(data: st.DataObject, dims: int, dynamic: bool) -> None:
    """Rectangular kernels, strides, pads, dilation, groups; more rows than columns or fewer."""
    layer, x, _ = dataclasses.astuple(data.draw(conv_calls(dims, torch.float32)))
    pads = None
    if layer.padding_mode == "zeros" and data.draw(st.booleans()):
        sides = st.tuples(st.integers(0, 3), st.integers(0, 3))
        before = Spec.of(layer).margins()
        more = data.draw(st.tuples(*[sides] * dims))
        pads = tuple((a + c, b + d) for (a, b), (c, d) in zip(before, more, strict=True))
    batched = x.ndim == dims + 2
    case = convolution(layer, x.numpy(), dynamic=dynamic and batched, pads=pads)
    training = trained(case)
    assert_right(training, tract_onnx_pass(training.graph), case, ANY)

"""The forms of the Gram in ONNX graphs: each alone in ONNX Runtime, against the float64 oracle.

The bound, 1e-5 of the Gram's largest entry, is some tens of float32 roundings of sums over at most
some thousands of patches; a border, a lag or a column that is taken wrongly shows in whole terms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime import InferenceSession, SessionOptions

from cuda_kernels import missing_cuda_kernels
from onnx_training import Array
from oracle import Spec, relative_error, rows
from photographs import photographs
from tract_fx.passes.onnx_graph.call_sizes import CallSizes
from tract_fx.passes.onnx_graph.calls import match_call
from tract_fx.passes.onnx_graph.gram_forms import (
    GramForm,
    Tiles,
    Unfolding,
    choose_gram_form,
    possible_gram_forms,
)
from tract_fx.passes.onnx_graph.provenance import Provenance
from tract_fx.passes.onnx_graph.subgraph import write_gram
from tract_fx.passes.onnx_graph.writer import NodeWriter

NOISE = 1e-5
Pads = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Convolution:
    """A convolution and the shape of its input.

    Attributes:
        shape: The input's: images, channels, spatial sizes.
        kernel: Kernel size per spatial dimension, as are the next three.
        stride: Strides.
        pads: Zeros before and after.
        dilation: Dilations.
        groups: Number of groups.
        auto_pad: An attribute that stands in the place of the pads.
        known: Which of the spatial sizes the graph tells.
    """

    shape: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pads: Pads
    dilation: tuple[int, ...]
    groups: int = 1
    auto_pad: str = ""
    known: tuple[bool, ...] = ()

    def sizes(self) -> CallSizes:
        """The call, its number of images left open."""
        known = self.known or (True,) * len(self.kernel)
        spatial = [s if k else f"S{s}" for s, k in zip(self.shape[2:], known, strict=True)]
        x = value("x", ["N", self.shape[1], *spatial])
        weight = (self.groups, self.shape[1] // self.groups, *self.kernel)
        attributes: dict[str, str | int | Sequence[int]] = {
            "strides": self.stride,
            "dilations": self.dilation,
            "group": self.groups,
        }
        if self.auto_pad:
            attributes["auto_pad"] = self.auto_pad
        else:
            attributes["pads"] = [p[end] for end in (0, 1) for p in self.pads]
        call = match_call(ir.node("Conv", [x, value("w", weight)], attributes))
        assert call is not None
        return CallSizes.of(call)

    def input(self) -> Array:
        """Normal about 1/2."""
        return np.random.default_rng(0).normal(0.5, 1, self.shape).astype(np.float32)

    def expected(self, x: Array) -> Array:
        """XᵀX by the oracle, (groups, n, n)."""
        padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *self.pads])
        spec = Spec("conv", self.kernel, self.stride, 0, "zeros", self.dilation, groups=self.groups)
        matrix = rows(spec, padded)
        gram: Array = matrix.transpose(0, 2, 1) @ matrix
        return gram


def value(name: str, shape: Sequence[int | str]) -> ir.Value:
    return ir.val(name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def linear(rows_: int, columns: int, *, transposed: bool = False) -> CallSizes:
    """A linear layer's call, its number of rows left open."""
    x = value("x", [columns, "N"] if transposed else ["N", columns])
    node = ir.node("Gemm", [x, value("w", (columns, 3))], {"transA": int(transposed)})
    call = match_call(node)
    assert call is not None
    return CallSizes.of(call)


def gram_model(sizes: CallSizes, form: GramForm) -> onnx.ModelProto:
    """A model of the Gram alone."""
    graph = ir.Graph(
        [sizes.call.input], [], nodes=[], opset_imports={"": 20, "com.microsoft": 1}, name="gram"
    )
    write = NodeWriter(graph, "tract/", Provenance("call", "term"))
    output = write_gram(write, sizes, form)
    graph.extend(write.nodes)
    output.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(output)
    model = ir.to_proto(ir.Model(graph, ir_version=9))
    graph.inputs.clear()  # free for another graph
    return model


def run(sizes: CallSizes, form: GramForm, x: Array) -> Array:
    """The Gram by ONNX Runtime, (groups, n, n)."""
    options = SessionOptions()
    options.intra_op_num_threads = 1
    session = InferenceSession(gram_model(sizes, form).SerializeToString(), options)
    result: Array = session.run(None, {"x": x})[0]
    assert result.shape == (sizes.columns,) * 2 if sizes.groups == 1 else (result.ndim == 3)
    return result.reshape(sizes.groups, sizes.columns, sizes.columns)


def assert_right(case: Convolution, form: GramForm) -> None:
    x = case.input()
    expected = case.expected(x)
    error = np.abs(run(case.sizes(), form, x) - expected).max()
    assert error <= NOISE * np.abs(expected).max()


@st.composite
def convolutions(draw: st.DrawFn) -> Convolution:
    """Rectangular kernels, strides, pads, dilation, groups; images smaller than the kernel."""
    dims = draw(st.sampled_from([1, 2, 2, 2, 3]))
    most = 7 if dims < 3 else 3

    def each(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * dims))

    kernel, stride = each(1, most), each(1, 4)
    dilation = draw(st.sampled_from([(1,) * dims, each(1, 3)]))
    pads = tuple(zip(each(0, 4), each(0, 4), strict=True))
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    beyond = each(0, 9 if dims < 3 else 4)
    spatial = [
        max(1, extent - sum(sides) + more)
        for extent, sides, more in zip(extents, pads, beyond, strict=True)
    ]
    groups = draw(st.sampled_from([1, 1, 2]))
    channels = groups * draw(st.integers(1, 2))
    shape = (draw(st.integers(1, 3)), channels, *spatial)
    known = draw(st.sampled_from([(), (), tuple(draw(st.tuples(*[st.booleans()] * dims)))]))
    return Convolution(shape, kernel, stride, pads, dilation, groups, known=known)


@settings(max_examples=1000, deadline=None)
@given(case=convolutions(), data=st.data())
def test_any_form_of_any_convolution(case: Convolution, data: st.DataObject) -> None:
    forms = possible_gram_forms(case.sizes())
    unusual = [form for form in forms if not (isinstance(form, Unfolding) and form.is_plain)]
    assert_right(case, data.draw(st.sampled_from(unusual or forms)))


@settings(max_examples=200, deadline=None)
@given(case=convolutions())
def test_the_chosen_form_of_any_convolution(case: Convolution) -> None:
    assert_right(case, choose_gram_form(case.sizes()))


def square(
    channels: int, size: int, kernel: int, stride: int, pad: int, images: int = 2
) -> Convolution:
    shape = (images, channels, size, size)
    return Convolution(shape, (kernel,) * 2, (stride,) * 2, ((pad, pad),) * 2, (1, 1))


# What is said here was measured by benchmarks/bench_onnx_gram.py.
CHOSEN: dict[str, tuple[Convolution, GramForm]] = {
    "imagenet": (square(3, 224, 7, 2, 3), Unfolding(2, lags=4, shift=1, block=4)),
    "cifar": (square(3, 32, 3, 1, 1), Unfolding(1, lags=3, shift=1, block=8)),
    "mnist": (square(1, 28, 5, 1, 0), Unfolding(1, lags=5, shift=1, block=8)),
    "alexnet": (square(3, 224, 11, 4, 2, 1), Unfolding(4, lags=3, shift=1, block=5)),
    "5x5/2": (square(3, 96, 5, 2, 2), Unfolding(2, lags=3, shift=1, block=3)),
    "mobilenet": (square(3, 224, 3, 2, 1), Unfolding(3)),
    "4x4/4": (square(3, 224, 4, 4, 0), Unfolding(4)),
    "16x16/16": (square(3, 224, 16, 16, 0), Tiles(3)),
    "16x16/16 of one channel": (square(1, 224, 16, 16, 0), Tiles(1)),
    "16x16/16 with a rim": (square(3, 230, 16, 16, 0, 1), Unfolding(16)),
    "1d": (
        Convolution((2, 8, 4000), (10,), (5,), ((0, 0),), (1,)),
        Unfolding(5, lags=2, shift=1),
    ),
    "1d of a long kernel": (
        Convolution((2, 1, 4000), (251,), (1,), ((0, 0),), (1,)),
        Unfolding(32, lags=8, shift=32),
    ),
    "3d": (
        Convolution((2, 3, 8, 32, 32), (3, 3, 3), (1, 1, 1), ((1, 1),) * 3, (1, 1, 1)),
        Unfolding(1, lags=3, shift=1, block=4),
    ),
    "dilation": (
        Convolution((2, 3, 33, 30), (4, 3), (2, 1), ((2, 3), (1, 1)), (3, 1)),
        Unfolding(2, lags=2, shift=3, block=3),
    ),
    "groups": (
        replace(square(4, 30, 5, 1, 2), groups=2),
        Unfolding(1, lags=5, shift=1, block=10),
    ),
    "kernel as large as the image": (
        square(3, 7, 7, 1, 0, 40),
        Unfolding(7),
    ),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_what_is_chosen(name: str) -> None:
    case, form = CHOSEN[name]
    assert choose_gram_form(case.sizes()) == form
    assert_right(case, form)


OPEN: dict[str, tuple[tuple[bool, bool], GramForm]] = {
    "height": ((False, True), Unfolding(7, block=4)),
    "width": ((True, False), Unfolding(2, lags=4, shift=1)),
    "both": ((False, False), Unfolding(7)),
}


@pytest.mark.parametrize("name", OPEN)
def test_open_sizes(name: str) -> None:
    """Blocks need the number of columns, lags that of rows."""
    known, form = OPEN[name]
    case = replace(square(3, 32, 7, 2, 3), known=known)
    assert choose_gram_form(case.sizes()) == form
    assert_right(case, form)


@pytest.mark.parametrize("known", [True, False])
def test_auto_pad(known: bool) -> None:
    """The layer's own attribute where it can't be written out."""
    case = replace(
        square(3, 25, 7, 2, 0), auto_pad="SAME_UPPER", known=(known,) * 2, pads=((3, 3),) * 2
    )
    (plain, *others) = possible_gram_forms(case.sizes())
    assert plain == Unfolding(7) and bool(others) == known
    node = gram_model(case.sizes(), plain).graph.node[0]
    assert {a.name: a.s for a in node.attribute}["auto_pad"] == b"SAME_UPPER"
    if known:
        assert_right(case, choose_gram_form(case.sizes()))


LINEAR = {"one tile": (40, 1), "two": (512, 2), "three": (784, 3), "four": (1030, 4)}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_linear(name: str, transposed: bool) -> None:
    columns, tiles = LINEAR[name]
    x = np.random.default_rng(0).normal(0.5, 1, (64, columns)).astype(np.float32)
    sizes = linear(64, columns, transposed=transposed)
    form = choose_gram_form(sizes)
    assert form == Tiles(tiles)
    result = run(sizes, form, x.T.copy() if transposed else x)[0]
    expected = x.astype(np.float64).T @ x
    assert np.abs(result - expected).max() <= NOISE * expected.max()
    assert tiles == 1 or np.array_equal(result[:200, -200:], result[-200:, :200].T)


def test_a_gram_of_lags_is_symmetric_to_the_bit() -> None:
    case, form = CHOSEN["cifar"]
    gram = run(case.sizes(), form, case.input())[0]
    assert np.array_equal(gram, gram.T)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_no_patch_reads_is_not_read(bad: float) -> None:
    """The lowest row and the last column of an even image under an odd kernel with stride 2."""
    case = square(2, 20, 5, 2, 0)
    forms = possible_gram_forms(case.sizes())
    # In three lags of two rows one is beyond the kernel, and would be that row of the image.
    assert not any(isinstance(form, Unfolding) and form.lags == 3 for form in forms)
    x = case.input()
    expected = case.expected(x)
    x[:, :, -1], x[:, :, :, -1] = bad, bad
    for form in forms:
        assert relative_error(run(case.sizes(), form, x), expected) < NOISE
    padded = replace(case, pads=((0, 1), (0, 1)))
    assert Unfolding(2, 3, 1) in possible_gram_forms(padded.sizes())
    # Of an open height, that row may be there, or not be.
    unknown = replace(case, known=(False, True))
    assert Unfolding(2, 3, 1) not in possible_gram_forms(unknown.sizes())


@pytest.mark.parametrize("shape, dilation", [((1, 1, 13, 6), 3), ((2, 1, 8, 6), 1)])
def test_few_output_rows_have_no_lags(shape: tuple[int, ...], dilation: int) -> None:
    """Their sums would have no rows in common, and gaps between what two patches read."""
    case = Convolution(shape, (6, 3), (1, 1), ((2, 2), (0, 0)), (dilation, 1))
    rows = case.sizes().positions[0]
    assert rows is not None
    for form in possible_gram_forms(case.sizes()):
        assert isinstance(form, Unfolding)
        assert form.lags == 1 or (form.lags - 1) * form.shift < rows
        assert_right(case, form)


@pytest.mark.parametrize("name", ["imagenet", "cifar", "mnist", "dilation", "3d"])
@pytest.mark.parametrize("row", [0, 1, -1])
def test_a_row_of_other_size(name: str, row: int) -> None:
    """What kernel rows do not meet leaves no rounding behind in what they do meet."""
    case, form = CHOSEN[name]
    x = case.input()
    x[:, :, row] *= 1e4
    expected = case.expected(x)
    found = run(case.sizes(), form, x).astype(np.float64)
    size = np.sqrt(np.einsum("...ii->...i", expected))
    error = np.abs(found - expected) / (size[..., :, None] * size[..., None, :])
    assert error.max() < 1e-5


@pytest.mark.parametrize(
    ("name", "features"), [("imagenet", [78, 78, 78, 39]), ("cifar", [30] * 3)]
)
def test_kernel_rows_beyond_the_kernel_are_not_multiplied(name: str, features: list[int]) -> None:
    case, form = CHOSEN[name]
    model = onnx.shape_inference.infer_shapes(gram_model(case.sizes(), form))
    sizes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.value_info}
    products = [node for node in model.graph.node if node.op_type == "FusedMatMul"]
    # The last one is of the strips at the borders.
    assert [sizes[node.input[1]][1].dim_value for node in products[:-1]] == features


@pytest.mark.parametrize("name", ["imagenet", "cifar", "5x5/2", "mnist", "groups", "1d", "3d"])
def test_a_nan_in_a_patch_is_not_lost(name: str) -> None:
    case, form = CHOSEN[name]
    x = case.input()
    x[(1, 0, *(size // 2 for size in x.shape[2:]))] = np.nan
    assert np.isnan(run(case.sizes(), form, x)).any()


@pytest.mark.parametrize("name", CHOSEN)
def test_every_node_has_a_cuda_kernel(name: str) -> None:
    case, form = CHOSEN[name]
    assert missing_cuda_kernels(gram_model(case.sizes(), form)) == []


PHOTOGRAPHED = {
    "7x7/2": square(3, 96, 7, 2, 3, 16),
    "3x3": square(3, 32, 3, 1, 1, 64),
    "5x5": square(1, 28, 5, 1, 0, 64),
    "16x16/16": square(3, 96, 16, 16, 0, 32),
}


@pytest.mark.parametrize("name", PHOTOGRAPHED)
def test_photographs(name: str) -> None:
    """At the operator, gW (XᵀX/R + λI)⁻¹ of the same gW, as exact as by whole patches."""
    case = PHOTOGRAPHED[name]
    x = photographs(case.shape[0], case.shape[1], case.shape[2]).numpy()
    sizes = case.sizes()
    (plain, *_) = possible_gram_forms(sizes)
    chosen = choose_gram_form(sizes)
    assert chosen != plain
    count = math.prod(size or 0 for size in sizes.positions) * len(x)
    ridge = 0.1 * np.eye(sizes.columns)
    gradient = np.random.default_rng(1).normal(size=(sizes.columns, 8))
    right = np.linalg.solve(case.expected(x)[0] / count + ridge, gradient)
    errors = [
        relative_error(np.linalg.solve(run(sizes, form, x)[0] / count + ridge, gradient), right)
        for form in (plain, chosen)
    ]
    assert errors[1] < max(2e-6, 1.5 * errors[0]), errors

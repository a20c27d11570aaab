"""Training graphs whose products somebody wrote: the term of a weight's gradient, or a refusal."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from oracle import Spec, relative_error, tract_gradient
from tract_fx.errors import UnsupportedLayerError
from tract_fx.passes import tract_onnx_pass

N = 4  # columns, and outputs: a square weight has no shape that tells how it lies
FORWARD = (
    "y = MatMul(x, w) d = Sub(y, t) s = Mul(d, d) loss = ReduceSum<keepdims=0>(s) "
    "two = Constant<value_float=2.0>() y_grad = Mul(d, two) "
)


def graph(products: str, batch: str) -> onnx.ModelProto:
    """A training graph of y = x w with a squared error."""
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> g '
        f"(float[{batch}, {N}] x, float[{batch}, {N}] t, float[{N}, {N}] w, "
        f"float[{N}, {N}] buffer, bool[1] lazy_reset_grad) => "
        f"(float loss, bool[1] done, float[{N}, {N}] w_grad) {{ {FORWARD} {products} "
        "done = com.microsoft.InPlaceAccumulatorV2(buffer, w_grad, lazy_reset_grad) }"
    )
    buffer = "w_grad.accumulation.buffer"
    model.graph.input[3].name = model.graph.node[-1].input[0] = buffer
    return model


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize(
    "products",
    [
        "w_grad = Gemm<transA=1>(x, y_grad)",
        "w_grad_0 = Gemm<transA=1>(y_grad, x) w_grad = Transpose(w_grad_0)",
        "z = Transpose(y_grad) w_grad_0 = MatMul(z, x) w_grad = Transpose(w_grad_0)",
        "w_grad = com.microsoft.FusedMatMul<transA=1>(x, y_grad)",
    ],
)
def test_a_term_is_read_as_it_lies(products: str, rows: int) -> None:
    model = graph(products, "R")
    numbers = np.random.default_rng(0)
    x, t, w = (numbers.normal(0.3, 1, (count, N)) for count in (rows, rows, N))
    feeds = {"x": x, "t": t, "w": w, "w_grad.accumulation.buffer": np.zeros_like(w)}
    given = {name: value.astype(np.float32) for name, value in feeds.items()}
    session = onnxruntime.InferenceSession(tract_onnx_pass(model).SerializeToString())
    (found,) = session.run(["w_grad"], {**given, "lazy_reset_grad": np.array([True])})
    wanted = tract_gradient(Spec("linear"), x, 2 * (x @ w - t)).T
    assert relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize(
    ("products", "batch"),
    [
        ("w_grad = Gemm<transA=1, alpha=0.5>(x, y_grad)", "R"),
        ("w_grad = com.microsoft.FusedMatMul<transA=1, alpha=0.5>(x, y_grad)", "R"),
        ("w_grad = Gemm<transA=1, beta=0.1>(x, y_grad, w)", "R"),
        (
            "part = Mul(y_grad, y_grad) w_grad_0 = Gemm<transA=1>(x, y_grad) "
            "w_grad_1 = Gemm<transA=1>(x, part) w_grad = Sum(w_grad_0, w_grad_1)",
            "R",
        ),
        (
            "z = Transpose<perm=[0, 2, 1]>(x) w_grad_0 = MatMul(z, y_grad) "
            "axes = Constant<value_ints=[0]>() w_grad = ReduceSum<keepdims=0>(w_grad_0, axes)",
            "2, R",
        ),
    ],
    ids=["factor", "fused-factor", "decay", "in-two-parts", "batched"],
)
def test_a_product_of_more_than_the_term_is_refused(products: str, batch: str) -> None:
    """The rest would be lost in row space, or stay plain."""
    with pytest.raises(UnsupportedLayerError, match="can't be told apart"):
        tract_onnx_pass(graph(products, batch))

"""Each repair, on a graph that ONNX Runtime's gradient builder fails on or gets wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ort_gradients import (
    TOLERANCE,
    Trained,
    graph,
    outputs,
    reference,
    relative_error,
    with_squared_error,
)
from tract_fx.passes.onnx_graph.repairs import prepare_for_gradients

IMAGE, VECTOR, TOKENS = (3, 9, 9), (12,), (5, 12)


def _weights(image: bool, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (4, 3, 3, 3) if image else (12, 12)
    return {"w": (rng.standard_normal(shape) / 3).astype(np.float32)}


def _layer(shape: tuple[int, ...]) -> str:
    return "Conv <pads = [1, 1, 1, 1]> (x, w)" if shape == IMAGE else "MatMul(x, w)"


@dataclass(frozen=True)
class Case:
    """An operator behind a layer: h is the layer's output, y what the operator makes of it."""

    repair: str
    text: str
    function: Callable[[Tensor], Tensor]
    shape: tuple[int, ...] = VECTOR


def _conv_transpose(h: Tensor) -> Tensor:
    kernel = torch.arange(4 * 2 * 3 * 3, dtype=h.dtype).reshape(4, 2, 3, 3) / 50
    return F.conv_transpose2d(h, kernel, stride=2, padding=1, output_padding=1)


KERNEL = "{" + ", ".join(str(n / 50) for n in range(72)) + "}"

CASES = {
    "gelu_tanh": Case(
        "activations_as_primitives",
        'y = Gelu <approximate = "tanh"> (h)',
        lambda h: F.gelu(h, approximate="tanh"),
    ),
    "hard_swish": Case("activations_as_primitives", "y = HardSwish(h)", F.hardswish),
    "hard_sigmoid": Case(
        "activations_as_primitives",
        "y = HardSigmoid <alpha = 0.25, beta = 0.4> (h)",
        lambda h: (0.25 * h + 0.4).clamp(0, 1),
    ),
    "mish": Case("activations_as_primitives", "y = Mish(h)", F.mish),
    "softplus": Case("activations_as_primitives", "y = Softplus(h)", F.softplus),
    "softplus_at_zero": Case(
        "activations_as_primitives",
        "z = Sub(h, h) p = Softplus(z) y = Mul(h, p)",
        lambda h: h * F.softplus(h - h),
    ),
    "elu": Case("activations_as_primitives", "y = Elu <alpha = 0.7> (h)", lambda h: F.elu(h, 0.7)),
    "celu": Case(
        "activations_as_primitives", "y = Celu <alpha = 0.5> (h)", lambda h: F.celu(h, 0.5)
    ),
    "selu": Case("activations_as_primitives", "y = Selu(h)", F.selu),
    "prelu": Case(
        "activations_as_primitives",
        "s = Constant <value_floats = [0.2]> () y = PRelu(h, s)",
        lambda h: torch.where(h > 0, h, 0.2 * h),
    ),
    "softsign": Case("activations_as_primitives", "y = Softsign(h)", F.softsign),
    "thresholded": Case(
        "activations_as_primitives",
        "y = ThresholdedRelu <alpha = 0.3> (h)",
        lambda h: torch.where(h > 0.3, h, 0.0),
    ),
    "reduce_max": Case(
        "extrema_as_primitives",
        "r = Relu(h) m = ReduceMax <keepdims = 1> (r, a) y = Mul(h, m)",
        lambda h: h * F.relu(h).amax(-1, keepdim=True),
    ),
    "reduce_min": Case(
        "extrema_as_primitives", "y = ReduceMin <keepdims = 0> (h, a)", lambda h: h.amin(-1)
    ),
    "reduce_l1": Case(
        "reductions_as_primitives",
        "y = ReduceL1 <keepdims = 0> (h, a)",
        lambda h: h.abs().sum(-1),
    ),
    "reduce_l2_whole": Case(
        "norms_of_everything",
        "n = ReduceL2 <keepdims = 0> (h) y = Div(h, n)",
        lambda h: h / h.norm(),
    ),
    "sum_of_three": Case(
        "variadic_as_binary", "s = Mul(h, h) y = Sum(h, s, h)", lambda h: 2 * h + h * h
    ),
    "mean_of_two": Case(
        "variadic_as_binary", "s = Mul(h, h) y = Mean(h, s)", lambda h: (h + h * h) / 2
    ),
    "two_to_the": Case(
        "powers_as_exponentials",
        "b = Constant <value_float = 2.0> () y = Pow(b, h)",
        lambda h: 2**h,
    ),
    "rounded": Case(
        "steps_without_gradient", "r = Round(h) y = Mul(h, r)", lambda h: h * h.round()
    ),
    "chunk": Case(
        "sequences_as_splits",
        "l = Constant <value_int = 4> () s = SplitToSequence <axis = -1> (h, l) "
        "i = Constant <value_int = 1> () y = SequenceAt(s, i)",
        lambda h: h.chunk(3, -1)[1],
    ),
    "split_in_part": Case(
        "partly_used_splits",
        "p, q = Split <axis = 1, num_outputs = 2> (h) y = Mul(q, q)",
        lambda h: h.chunk(2, -1)[1] ** 2,
    ),
    "vector_right": Case(
        "vectors_as_matrices",
        "v = ReduceSum <keepdims = 0> (w, a) y = MatMul(h, v)",
        lambda h: h,
    ),
    "where_smaller": Case(
        "full_size_selections",
        "m = ReduceMean <keepdims = 1> (h, a) c = Greater(h, m) y = Where(c, h, m)",
        lambda h: torch.where(h > h.mean(-1, keepdim=True), h, h.mean(-1, keepdim=True)),
    ),
    "einsum": Case(
        "einsums_as_products",
        'y = Einsum <equation = "bti,bsi->bts"> (h, h)',
        lambda h: torch.einsum("bti,bsi->bts", h, h),
        TOKENS,
    ),
    "layer_norm_no_bias": Case(
        "layer_norm_biases",
        "s = ReduceSum <keepdims = 0> (w, f) y = LayerNormalization(h, s)",
        lambda h: h,
    ),
    "instance_norm": Case(
        "normalizations_as_primitives",
        "s = Constant <value_floats = [1.0, 2.0, 0.5, 1.5]> () y = InstanceNormalization(h, s, s)",
        lambda h: F.instance_norm(
            h, weight=h.new_tensor([1, 2, 0.5, 1.5]), bias=h.new_tensor([1, 2, 0.5, 1.5])
        ),
        IMAGE,
    ),
    "group_norm": Case(
        "supported_versions",
        "s = Constant <value_floats = [1.0, 2.0, 0.5, 1.5]> () "
        "y = GroupNormalization <num_groups = 2> (h, s, s)",
        lambda h: F.group_norm(
            h, 2, h.new_tensor([1, 2, 0.5, 1.5]), h.new_tensor([1, 2, 0.5, 1.5])
        ),
        IMAGE,
    ),
    "average_pool": Case(
        "average_pools_as_convolutions",
        "y = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (h)",
        lambda h: F.avg_pool2d(h, 2),
        IMAGE,
    ),
    "average_pool_border": Case(
        "average_pools_as_convolutions",
        "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (h)",
        lambda h: F.avg_pool2d(h, 3, 2, 1, count_include_pad=False),
        IMAGE,
    ),
    "max_pool": Case(
        "max_pools_as_gathers",
        "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (h)",
        lambda h: F.max_pool2d(h, 3, 2, 1),
        IMAGE,
    ),
    "global_max_pool": Case(
        "max_pools_as_gathers",
        "y = GlobalMaxPool(h)",
        lambda h: F.adaptive_max_pool2d(h, 1),
        IMAGE,
    ),
    "upsample_nearest": Case(
        "resizes_as_products",
        'r = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> () y = Resize <mode = "nearest", '
        'coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"> (h, , r)',
        lambda h: F.interpolate(h, scale_factor=2),
        IMAGE,
    ),
    "upsample_cubic": Case(
        "resizes_as_products",
        "r = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> () "
        'y = Resize <mode = "cubic"> (h, , r)',
        lambda h: F.interpolate(h, scale_factor=2, mode="bicubic"),
        IMAGE,
    ),
    "downsample_linear": Case(
        "resizes_as_products",
        "r = Constant <value_floats = [1.0, 1.0, 0.5556, 0.4445]> () y = Resize "
        '<mode = "linear", coordinate_transformation_mode = "align_corners"> (h, , r)',
        lambda h: F.interpolate(h, size=(5, 4), mode="bilinear", align_corners=True),
        IMAGE,
    ),
    "conv_transpose": Case(
        "transposed_convolutions_as_convolutions",
        f"k = Constant <value = float[4, 2, 3, 3] {KERNEL}> () "
        "y = ConvTranspose <strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 1]> (h, k)",
        _conv_transpose,
        IMAGE,
    ),
    "reflect": Case(
        "paddings_as_gathers",
        'p = Constant <value_ints = [0, 0, 1, 2, 0, 0, 0, 1]> () y = Pad <mode = "reflect"> (h, p)',
        lambda h: F.pad(h, (2, 1, 1, 0), mode="reflect"),
        IMAGE,
    ),
    "edge": Case(
        "paddings_as_gathers",
        'p = Constant <value_ints = [0, 0, 1, 2, 0, 0, 0, 1]> () y = Pad <mode = "edge"> (h, p)',
        lambda h: F.pad(h, (2, 1, 1, 0), mode="replicate"),
        IMAGE,
    ),
    "reversed": Case(
        "reversals_as_gathers",
        "e = Constant <value_ints = [-9223372036854775807]> () r = Slice(h, a, e, a, a) "
        "y = Mul(h, r)",
        lambda h: h * h.flip(-1),
    ),
    "parameter_twice": Case(
        "separate_operands", "s = Mul(w, w) t = MatMul(x, s) y = Add(h, t)", lambda h: h
    ),
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


@pytest.mark.parametrize("name", CASES)
def test_gradient_after_repair(name: str) -> None:
    case = CASES[name]
    model, weights = _model(name, case), _weights(case.shape == IMAGE)
    rng = np.random.default_rng(1)
    feeds = {"x": rng.standard_normal((4, *case.shape)).astype(np.float32)}
    before = outputs(model, feeds)[0]

    done = prepare_for_gradients(model, trainable=["w"])
    assert case.repair in done
    again = ir.to_proto(model)
    assert prepare_for_gradients(model, trainable=["w"]) == ()
    assert list(ir.to_proto(model).graph.node) == list(again.graph.node)
    onnx.checker.check_model(again)
    # The forward values stay: float32 rounding of sums in another order.
    np.testing.assert_allclose(outputs(model, feeds)[0], before, rtol=1e-5, atol=2e-6)

    def function(x: Tensor, w: Tensor) -> Tensor:
        if name in WHOLE:
            return WHOLE[name](x, w)
        return case.function(F.conv2d(x, w, padding=1) if case.shape == IMAGE else x @ w)

    lossy = with_squared_error(model)
    prepare_for_gradients(lossy, trainable=["w"])
    trained = Trained(lossy, ["w"])
    for batch in (4, 3):
        x = rng.standard_normal((batch, *case.shape)).astype(np.float32)
        y = function(torch.tensor(x), torch.tensor(weights["w"]))
        target = rng.standard_normal(tuple(y.shape)).astype(np.float32)
        loss, gradients = trained.step(x, target)
        expected_loss, expected = reference(function, weights, x, target)
        assert math.isclose(loss, expected_loss, rel_tol=TOLERANCE)
        assert relative_error(gradients["w"], expected["w"]) < TOLERANCE

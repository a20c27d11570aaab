"""ONNX graphs as PyTorch modules, and steps of these: values and gradients of each operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from onnx_session import graph, run
from tract_fx.export.onnx_model import read_model
from tract_fx.export.reference_model import ReferenceModel
from tract_fx.importer.build import import_graph
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

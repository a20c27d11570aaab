"""The patch geometry of ONNX convolutions, against ONNX Runtime's own convolution."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from onnx_models import (
    by_hand,
)
from tract_fx.passes.onnx_graph.find import find_onnx_input_layers

onnxruntime.set_default_logger_severity(3)

# Geometry, against ONNX Runtime's own convolution.


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """A Conv node's attributes, the shape of its weight and of its input."""
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    sizes = st.integers(1, 3)
    kernel = [draw(sizes) for _ in range(dims)]
    # ONNX Runtime takes no dilation with SAME.
    pad = draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    dilation = [1 if "SAME" in pad else draw(st.integers(1, 2)) for _ in range(dims)]
    spatial = [
        d * (k - 1) + 1 + draw(st.integers(0, 4)) for k, d in zip(kernel, dilation, strict=True)
    ]
    # Where a stride is longer than the kernel, ONNX Runtime's SAME pads by a negative number.
    strides = [draw(st.integers(1, k) if "SAME" in pad else sizes) for k in kernel]
    parts = [f"group = {groups}", f"strides = {strides}"]
    parts += [f"dilations = {dilation}"] * draw(st.booleans() if 2 not in dilation else st.just(1))
    parts += [f"kernel_shape = {kernel}"] * draw(st.booleans())
    if pad == "NOTSET":
        parts.append(f"pads = {[draw(st.integers(0, 2)) for _ in range(2 * dims)]}")
    else:
        parts.append(f'auto_pad = "{pad}"')
    return ", ".join(parts), (2 * groups, 2, *kernel), (2, 2 * groups, *spatial)


@given(convolutions())
@settings(max_examples=80, deadline=None)
def test_geometry_is_the_runtimes(drawn: tuple[str, tuple[int, ...], tuple[int, ...]]) -> None:
    attributes, weight, shape = drawn
    sizes = ",".join(map(str, shape))
    proto = by_hand(f"y = Conv <{attributes}> (x, W)", {"W": weight}, f"float[{sizes}] x")
    (layer,) = find_onnx_input_layers(proto).layers
    geometry = layer.geometry
    assert geometry is not None and layer.weight_shape == weight
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    inferred = onnx.shape_inference.infer_shapes(proto).SerializeToString()
    (expected,) = onnxruntime.InferenceSession(inferred).run(None, {"x": x})
    convolve = [nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d][len(shape) - 3]
    computed = convolve(
        geometry.padded(torch.from_numpy(x)),
        torch.from_numpy(onnx.numpy_helper.to_array(proto.graph.initializer[0]).copy()),
        stride=geometry.stride,
        dilation=geometry.dilation,
        groups=geometry.groups,
    )
    # float32 sums of at most 54 products of standard normals
    np.testing.assert_allclose(computed.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pad", ["SAME_UPPER", "SAME_LOWER"])
def test_padding_of_an_open_size(pad: str) -> None:
    body = f'y = Conv <auto_pad = "{pad}", strides = [S, S]> (x, W)'
    inputs = "float[N,3,H,8] x"
    one = by_hand(body.replace("S, S", "1, 1"), {"W": (4, 3, 4, 3)}, inputs)
    (layer,) = find_onnx_input_layers(one).layers
    assert layer.geometry is not None
    assert layer.geometry.padding == (((1, 2) if "UPPER" in pad else (2, 1)), (1, 1))
    two = by_hand(body.replace("S, S", "2, 2"), {"W": (4, 3, 4, 3)}, inputs)
    (layer,) = find_onnx_input_layers(two).layers
    assert layer.geometry is None and layer.op == "conv2d"

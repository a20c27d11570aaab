"""Forms of nodes that are read wrongly or not at all, written as what they mean."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.geometry import conv_geometry
from tract_fx.passes.onnx_graph.node_names import described, described_shape


def plain_forms(model: ir.Model) -> None:
    """Write padding as numbers, Transposes that move nothing as Identity, and no unread operand."""
    for node in model.graph.all_nodes():
        if is_standard(node, "Conv"):
            _explicit_pads(node)
        elif is_standard(node, "Transpose"):
            _identity_permutation(node)
        elif is_standard(node, "Gemm") and node.attributes.get_float("beta", 1.0) == 0:
            node.resize_inputs(2)  # C, which nobody reads, would be taken for a bias to train


def _explicit_pads(node: ir.Node) -> None:
    """Neither PyTorch's convolution nor ONNX Runtime's ConvGrad knows SAME_UPPER and SAME_LOWER."""
    auto_pad = node.attributes.get_string("auto_pad", "NOTSET")
    if auto_pad == "NOTSET":
        return
    x, weight = node.inputs[:2]
    assert x is not None and weight is not None
    geometry = conv_geometry(node, x, weight)
    if geometry is None:
        raise ExportError(
            f"{described(node)} with auto_pad={auto_pad} on {x.name!r} of shape "
            f"{described_shape(x.shape)}",
            "the padding depends on a size that is not fixed, and ONNX Runtime's gradient of "
            "Conv knows fixed padding alone",
            "Fix the image's size in the model's input, or write the zeros as pads",
        )
    before, after = zip(*geometry.padding, strict=True)
    node.attributes.add(ir.AttrInt64s("pads", [*before, *after]))
    node.attributes.add(ir.AttrString("auto_pad", "NOTSET"))


def _identity_permutation(node: ir.Node) -> None:
    """ONNX Runtime 1.19.2 takes every Transpose beside a Gemm for a real one, and merges it.

    Beside a MatMul that an Add follows as well, since it makes a Gemm of these two.
    """
    x, order = node.inputs[0], node.attributes.get_ints("perm")
    if order is None:
        unchanged = x is not None and x.shape is not None and len(x.shape) < 2
    else:
        unchanged = list(order) == list(range(len(order)))
    if unchanged:
        node.op_type = "Identity"
        node.attributes.clear()

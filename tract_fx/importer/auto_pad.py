"""Conv with auto_pad, whose padding depends on the image's size."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.geometry import conv_geometry
from tract_fx.passes.onnx_graph.node_names import described, described_shape


def explicit_pads(model: ir.Model) -> int:
    """Write the padding of each Conv as `pads` in place of `auto_pad`.

    Neither PyTorch's convolution nor ONNX Runtime's ConvGrad knows SAME_UPPER and SAME_LOWER.
    """
    changed = 0
    for node in model.graph.all_nodes():
        if not is_standard(node, "Conv"):
            continue
        auto_pad = node.attributes.get_string("auto_pad", "NOTSET")
        if auto_pad == "NOTSET":
            continue
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
        changed += 1
    return changed

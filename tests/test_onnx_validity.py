"""Files that are no model, or of no opset that can be had: refused in words of the file."""

from __future__ import annotations

import re

import onnx
import pytest
from onnx import helper

from onnx_models import by_hand
from tract_fx.errors import ExportError, TractError, UnsupportedModelError
from tract_fx.importer.forward_model import read_model
from tract_fx.ort_training import message_of

WEIGHT = {"w": (8, 8)}


def nodes(*wanted: onnx.NodeProto) -> onnx.ModelProto:
    """A model of nodes that onnx's parser would not take."""
    model = by_hand("y = MatMul (x, w)", WEIGHT)
    del model.graph.node[:]
    model.graph.node.extend(wanted)
    return model


NODE = helper.make_node
PRODUCT = NODE("MatMul", ["x", "w"], ["h"])
OLD_ADD = helper.make_node("Add", ["h", "w"], ["y"], name="sum", broadcast=1, axis=1)
OLD = nodes(PRODUCT, OLD_ADD)
OLD.opset_import[0].version = 6

CASES = {
    "nowhere": (
        nodes(NODE("MatMul", ["x", "nowhere"], ["y"])),
        r"MatMul \(output 'y'\).*'nowhere'",
    ),
    "left_out": (nodes(NODE("MatMul", ["x", ""], ["y"])), r"output 'y'\) without its input 'B'"),
    "cut_off": (nodes(NODE("Gemm", ["x"], ["y"])), r"Gemm \(output 'y'\) without its input 'B'"),
    "circle": (
        nodes(NODE("Add", ["x", "z"], ["y"]), NODE("Relu", ["y"], ["z"], name="back")),
        r"Add \(output 'y'\), which reads 'z'.*later",
    ),
    "twice": (
        nodes(PRODUCT, NODE("Relu", ["x"], ["h"], name="again"), NODE("Relu", ["h"], ["y"])),
        r"Relu 'again', which gives 'h'",
    ),
    "domain": (nodes(PRODUCT, NODE("Mine", ["h"], ["y"], domain="my.ops")), r"'y'.*'my\.ops'"),
    "no_output": (nodes(PRODUCT), r"the output 'y': no node"),
    "unknown": (
        nodes(PRODUCT, NODE("Strange", ["h"], ["y"])),
        r"output 'y'\).*no operator Strange",
    ),
    "newer": (
        by_hand("h = MatMul (x, w) y = RMSNormalization (h, w)", WEIGHT, opset=23),
        r"RMSNormalization \(output 'y'\).*from opset 23 to 20: the older opset has no such",
    ),
    "future": (by_hand("y = MatMul (x, w)", WEIGHT, opset=99), r"opset 99: onnx .* 1 to \d+"),
    "sizes": (OLD, r"Add 'sum'.*from opset 6 to 18: .*sizes.*not all of them are fixed"),
}


@pytest.mark.parametrize("name", CASES)
def test_refusals(name: str) -> None:
    model, says = CASES[name]
    kind = UnsupportedModelError if name in list(CASES)[:7] else ExportError
    with pytest.raises(kind, match=says) as caught:
        read_model(model)
    assert isinstance(caught.value, TractError)
    assert not re.search(r"%\w|\{\}|Assertion|\.cc:|\.h:|unk__", str(caught.value))


def test_the_runtimes_source_is_no_part_of_a_message() -> None:
    error = RuntimeError(
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code. Name:'a' Status "
        "Message: /onnxruntime_src/onnxruntime/core/math/element_wise_ops.h:560 void "
        "onnxruntime::BroadcastIterator::Append(ptrdiff_t, ptrdiff_t) axis == 1 was false."
    )
    assert message_of(error) == (
        "Non-zero status code. Name:'a' Status Message: axis == 1 was false"
    )

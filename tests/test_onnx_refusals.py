"""What the locator refuses in ONNX models: operators written by hand, and what is no model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from torch import nn

from onnx_models import (
    Initializers,
    as_chosen,
    as_ir,
    by_hand,
)
from tract_fx import (
    UnsupportedLayerError,
    UnsupportedModelError,
)
from tract_fx.errors import UnsupportedTrainingError
from tract_fx.passes.onnx_graph.find import find_onnx_input_layers, locate
from tract_fx.passes.onnx_graph.models import as_ir_model

IMAGE = "float[N,3,8,8] x"

W: Initializers = {"W": (8, 4)}
V = {"V": (4, 2)}
KERNEL = {"W": (4, 3, 3, 3)}
REFUSALS: dict[str, tuple[str, Initializers, str, str]] = {
    "weight-on-the-left": ("y = MatMul (W, x)", {"W": (4, 8)}, "MatMul", r"left.*MatMul\(x, w"),
    "batched-weight": (
        "y = MatMul (x, W)",
        {"W": (5, 8, 4)},
        "MatMul",
        r"more than two axes.*one MatMul",
    ),
    "vector": ("y = MatMul (x, W)", {"W": (8,)}, "MatMul", r"a vector.*\(n, 1\)"),
    "gemm-with-the-input-second": (
        "y = Gemm <transB = 1> (W, x)",
        {"W": (4, 8)},
        "Gemm",
        r"the input is its weight",
    ),
    "scale-first": ("s = Mul (x, p) y = MatMul (s, W)", {**W, "p": (8,)}, "Mul", r"Leave that out"),
    "shift-by-a-computed-one": (
        "t = Tanh (p) s = Add (x, t) y = MatMul (s, W)",
        {**W, "p": (8,)},
        "Add",
        r"trained parameter",
    ),
    "layer-norm-first": (
        "s = LayerNormalization (x, p) y = MatMul (s, W)",
        {**W, "p": (8,)},
        "LayerNormalization",
        r"scales or shifts.*Leave them out of the trainable parameters",
    ),
    "einsum": (
        'y = Einsum <equation = "ij,jk->ik"> (x, W)',
        W,
        "Einsum",
        r"multiplies the input with a parameter",
    ),
    "input-dependent-weight": (
        "w = Mul (W, x) y = MatMul (x, w)",
        {"W": (8,)},
        "Mul",
        r"trained parameter",
    ),
    "fused": (
        "y = com.microsoft.FusedMatMul <transB = 1> (x, W)",
        {"W": (4, 8)},
        "com.microsoft::FusedMatMul",
        r"graph optimisations.*before",
    ),
}
IMAGES_REFUSED: dict[str, tuple[str, Initializers, str, str]] = {
    "batch-norm-first": (
        "n = BatchNormalization (x, s, b, m, v) y = Conv (n, W)",
        {**KERNEL, "s": (3,), "b": (3,), "m": (3,), "v": np.ones(3, np.float32)},
        "BatchNormalization",
        r"scales or shifts",
    ),
    "conv-transpose": (
        "y = ConvTranspose (x, W)",
        {"W": (3, 4, 2, 2)},
        "ConvTranspose",
        r"transposed convolution",
    ),
    "quantised-weight": (
        "w = DequantizeLinear (q, s) h = Conv (x, w) y = Conv (h, V)",
        {"q": np.ones((4, 3, 3, 3), np.int8), "s": (), "V": (4, 4, 1, 1)},
        "Conv",
        r"quantised.*before quantisation",
    ),
    "weight-quantised-on-the-way": (
        "q = QuantizeLinear (W, s, z) w = DequantizeLinear (q, s, z) y = Conv (x, w)",
        {**KERNEL, "s": (), "z": np.array(0, np.int8)},
        "Conv",
        r"quantised",
    ),
    "quantised-convolution": (
        """i = QuantizeLinear (x, s, z) j = ConvInteger (i, q) k = Cast <to = 1> (j)
        y = Conv (k, V)""",
        {
            "q": np.ones((4, 3, 3, 3), np.uint8),
            "s": (),
            "z": np.array(0, np.uint8),
            "V": (4, 4, 1, 1),
        },
        "ConvInteger",
        r"quantised",
    ),
    "layer-in-a-branch": (
        """y = If (c) <then_branch = t () => (a) { a = Conv (x, W) },
            else_branch = e () => (b) { b = Identity (x) }>""",
        {"W": (3, 3, 1, 1), "c": np.array(True)},
        "If",
        r"graphs of its own.*no control flow",
    ),
    "recurrent": (
        "s = Squeeze (x, one) z, k = LSTM <hidden_size = 4> (s, W, R) y = MatMul (z, V)",
        {**V, "W": (1, 16, 8), "R": (1, 16, 4), "one": np.array([1])},
        "LSTM",
        r"recurrent.*linear layer in front",
    ),
}


@pytest.mark.parametrize("name", [*REFUSALS, *IMAGES_REFUSED])
def test_refusals(name: str) -> None:
    body, initializers, op, says = {**REFUSALS, **IMAGES_REFUSED}[name]
    inputs = "float[N,8] x" if name in REFUSALS else IMAGE
    if name == "recurrent":
        inputs = "float[N,1,5,8] x"
    proto = by_hand(body, initializers, inputs)
    graph = as_ir_model(proto)
    floats = {key for key, v in graph.graph.initializers.items() if v.dtype == ir.DataType.FLOAT}
    located = locate(graph, floats - {"m", "v", "s" if "quant" in name else ""}, ())
    with pytest.raises(UnsupportedLayerError, match=rf"(?s)^{op} \(node '.*{says}"):
        as_chosen(located)
    # What is multiplied with what was refused is refused too.
    assert len(located.findings.refusals) == (2 if name == "input-dependent-weight" else 1)
    refusal = located.findings.refusals[0]
    assert refusal.competes and refusal.path[0] == "x" and refusal.path[-1] == refusal.node


def test_a_filter_with_a_trained_bias() -> None:
    proto = by_hand("h = Conv (x, K, b) y = Conv (h, W)", {**KERNEL, "K": (3, 3, 1, 1), "b": (3,)})
    refusals = locate(as_ir(proto), {"W", "b"}, ()).findings.refusals
    assert "its bias is trained" in refusals[0].reason


# What is no model, or one that the passes can't read.


def test_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"class Linear.*ModelProto"):
        find_onnx_input_layers(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=r"nothing\.onnx.*there is no such file"):
        find_onnx_input_layers(tmp_path / "nothing.onnx")
    for name, says in (("weights.pt", "PyTorch's tensors"), ("model.py", "Python's source")):
        (tmp_path / name).write_bytes(b"\xff\xff no model \x00")
        with pytest.raises(UnsupportedModelError, match=says):
            find_onnx_input_layers(tmp_path / name)
    for content in (b"\xff\xff no model \x00", b""):
        (tmp_path / "broken.onnx").write_bytes(content)
        with pytest.raises(UnsupportedModelError, match=r"can't be read|no graph"):
            find_onnx_input_layers(str(tmp_path / "broken.onnx"))


def test_weights_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(
        by_hand("y = MatMul (x, W)", {"W": (64, 64)}, "float[N,64] x"),
        path,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    assert find_onnx_input_layers(path).names == ("W",)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(UnsupportedModelError, match=r"'W'.*weights\.bin.*not there"):
        find_onnx_input_layers(path)


def test_sparse_initializers() -> None:
    proto = by_hand("y = MatMul (x, W)", {})
    values = onnx.numpy_helper.from_array(np.ones(2, np.float32), "W")
    indices = onnx.numpy_helper.from_array(np.array([0, 9]), "W_indices")
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [8, 4]))
    with pytest.raises(UnsupportedModelError, match=r"sparse initializer 'W'.*ordinary"):
        find_onnx_input_layers(proto)


def test_names_that_are_not_there() -> None:
    with pytest.raises(UnsupportedTrainingError, match=r"'w'.*no initializer"):
        find_onnx_input_layers(by_hand("y = MatMul (x, W)", W), trainable=["w"])


def test_nodes_out_of_order() -> None:
    proto = by_hand("h = Relu (x) y = MatMul (h, W)", W)
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    with pytest.raises(UnsupportedModelError, match=r"'h' is read before Relu.*TopologicalSort"):
        locate(as_ir(proto), {"W"}, ())


def test_the_callers_model_stays_as_it_is() -> None:
    proto = by_hand("w = Transpose (W) y = MatMul (x, w)", {"W": (4, 8)})
    graph = as_ir(proto)
    before = proto.SerializeToString(), ir.serde.serialize_model(graph)
    find_onnx_input_layers(proto)
    find_onnx_input_layers(graph)
    assert (proto.SerializeToString(), ir.serde.serialize_model(graph)) == before

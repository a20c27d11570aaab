"""Which initializers of an ONNX model are trained, and what is refused where it is not said."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from torch import nn

from nets import NETS, STEMS
from onnx_models import (
    Initializers,
    as_ir,
    by_hand,
    exported_to_onnx,
    training_graph,
    without_metadata,
)
from reference import Net
from tract_fx import UnsupportedModelError
from tract_fx.errors import UnsupportedTrainingError
from tract_fx.passes.onnx_graph.find import find_onnx_input_layers
from tract_fx.passes.onnx_graph.parameters import (
    forward_parameters,
    is_training_graph,
    training_parameters,
)

IMAGE = "float[N,3,8,8] x"
CONV = "h = Conv (x, W)"
MEAN_OF = "<axes = [2, 3], keepdims = 0>"


def ones(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


# Body, initializers, the parameters among them; the input is an image.
IN_SLOTS: dict[str, tuple[str, Initializers, set[str]]] = {
    "conv": ("y = Conv (x, W, b)", {"W": (4, 3, 3, 3), "b": (4,)}, {"W", "b"}),
    "conv-transpose": ("y = ConvTranspose (x, W, b)", {"W": (3, 4, 2, 2), "b": (4,)}, {"W", "b"}),
    "gemm": (
        "f = Flatten (x) y = Gemm <transB = 1> (f, W, b)",
        {"W": (4, 192), "b": (4,)},
        {"W", "b"},
    ),
    "matmul-and-bias": ("h = MatMul (x, W) y = Add (h, b)", {"W": (8, 4), "b": (4,)}, {"W", "b"}),
    "weight-on-the-left": ("y = MatMul (W, x)", {"W": (4, 8)}, {"W"}),
    "bias-of-one-output": (
        "h = MatMul (x, W) y = Add (h, b)",
        {"W": (8, 1), "b": (1,)},
        {"W", "b"},
    ),
    "number-added": (f"{CONV} y = Add (h, b)", {"W": (4, 3, 1, 1), "b": (1,)}, {"W"}),
    "scalar-weight": (f"{CONV} y = Mul (h, s)", {"W": (4, 3, 1, 1), "s": ()}, {"W"}),
    "batch-norm": (
        f"{CONV} y = BatchNormalization (h, s, b, m, v)",
        {"W": (4, 3, 1, 1), "s": (4,), "b": (4,), "m": (4,), "v": ones(4) * 2},
        {"W", "s", "b"},
    ),
    "layer-norm": (
        f"{CONV} y = LayerNormalization (h, s, b)",
        {"W": (4, 3, 1, 1), "s": (8,), "b": (8,)},
        {"W", "s", "b"},
    ),
    "instance-norm": (
        f"{CONV} y = InstanceNormalization (h, s, b)",
        {"W": (4, 3, 1, 1), "s": (4,), "b": (4,)},
        {"W", "s", "b"},
    ),
    "prelu": (f"{CONV} y = PRelu (h, s)", {"W": (4, 3, 1, 1), "s": (4, 1, 1)}, {"W", "s"}),
    "layer-scale": (f"{CONV} y = Mul (s, h)", {"W": (4, 3, 1, 1), "s": (4, 1, 1)}, {"W", "s"}),
    "moved": (
        """t = Transpose <perm = [3, 2, 0, 1]> (W) h = Conv (x, t)
        k = Constant <value = int64[3] {4, 1, 1}> () r = Reshape (b, k) i = Identity (r)
        y = Add (h, i)""",
        {"W": (3, 3, 3, 4), "b": (4,)},
        {"W", "b"},
    ),
    "token-and-positions": (
        """h = Conv <strides = [4, 4]> (x, W) k = Constant <value = int64[3] {0, 4, -1}> ()
        r = Reshape (h, k) t = Transpose <perm = [0, 2, 1]> (r)
        n = Shape <start = 0, end = 1> (x) o = Constant <value = int64[2] {1, 1}> ()
        s = Concat <axis = 0> (n, o) e = Expand (token, s) c = Concat <axis = 1> (e, t)
        y = Add (c, positions)""",
        {"W": (4, 3, 4, 4), "token": (1, 1, 4), "positions": (1, 5, 4)},
        {"W", "token", "positions"},
    ),
    "positions-by-look-up": (
        f"{CONV} g = Gather (table, order) y = Add (h, g)",
        {"W": (4, 3, 1, 1), "table": (8, 8), "order": np.arange(8)[::-1].copy()},
        {"W", "table"},
    ),
    "normalised-input": (
        f"c = Sub (x, mean) n = Div (c, std) {CONV.replace('x', 'n')} y = Relu (h)",
        {"mean": (3, 1, 1), "std": ones(3, 1, 1) * 2, "W": (4, 3, 3, 3)},
        {"W"},
    ),
    "coordinates": (
        "c = Concat <axis = 1> (x, grid) y = Conv (c, W)",
        {"grid": (1, 2, 8, 8), "W": (4, 5, 3, 3)},
        {"W"},
    ),
    "attention-mask": (
        f"{CONV} y = Add (h, attn_mask)",
        {"W": (4, 3, 1, 1), "attn_mask": (8, 8)},
        {"W"},
    ),
    "bounds-and-sizes": (
        """p = Pad (x, pads, value) u = Resize (p, , scales) c = Clip (u, low, high)
        d = Dropout (c, ratio) y = Conv (d, W)""",
        {
            "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
            "value": (),
            "scales": ones(4),
            "low": (),
            "high": (),
            "ratio": (),
            "W": (4, 3, 3, 3),
        },
        {"W"},
    ),
    "quantised-input": (
        "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) y = Conv (d, W)",
        {"s": (), "z": np.array(0, np.uint8), "W": (4, 3, 3, 3)},
        {"W"},
    ),
    "standardised-weight": (
        "m = ReduceMean <axes = [1, 2, 3]> (W) c = Sub (W, m) t = Mul (c, two) y = Conv (x, t)",
        {"W": (4, 3, 3, 3), "two": (1,)},
        {"W"},
    ),
    "weight-norm": (
        """n = ReduceL2 <axes = [1, 2, 3]> (a_weight_v) d = Div (a_weight_g, n)
        w = Mul (a_weight_v, d) y = Conv (x, w)""",
        {"a_weight_v": (4, 3, 3, 3), "a_weight_g": (4, 1, 1, 1)},
        {"a_weight_v", "a_weight_g"},
    ),
    "pruned": (
        "w = Mul (weight_orig, weight_mask) y = Conv (x, w)",
        {"weight_orig": (4, 3, 3, 3), "weight_mask": (4, 3, 3, 3)},
        {"weight_orig"},
    ),
    "in-a-branch": (
        f"""{CONV} c = Constant <value = bool {{1}}> ()
        y = If (c) <then_branch = t () => (a) {{ a = Add (h, b) }},
            else_branch = e () => (d) {{ d = Conv (h, V) }}>""",
        {"W": (4, 3, 1, 1), "b": (4, 1, 1), "V": (4, 4, 1, 1)},
        {"W", "b", "V"},
    ),
    "recurrent": (
        "s = Squeeze (x, zero) z, k = GRU <hidden_size = 4> (s, W, R, B) y = Relu (z)",
        {"zero": np.array([0]), "W": (1, 12, 8), "R": (1, 12, 4), "B": (1, 24)},
        {"W", "R", "B"},
    ),
    "operator-of-the-runtimes-own": (
        'y = com.microsoft.FusedConv <activation = "Relu"> (x, W, b)',
        {"W": (4, 3, 3, 3), "b": (4,)},
        {"W", "b"},
    ),
    "nothing": ("y = Relu (x)", {}, set()),
    "tied-matrix": (
        "f = MatMul (x, W) y = MatMul (f, W)",
        {"W": (8, 8)},
        {"W"},
    ),
}


@pytest.mark.parametrize("name", IN_SLOTS)
def test_parameters_by_their_place(name: str) -> None:
    body, initializers, expected = IN_SLOTS[name]
    model = as_ir(by_hand(body, initializers, IMAGE))
    assert set(forward_parameters(model)) == expected


def test_a_table_is_a_parameter_and_a_list_is_none() -> None:
    body = "r = Gather (rows, ids) s = Gather (scales, ids) y = Concat <axis = -1> (r, s)"
    model = by_hand(body, {"rows": (7, 4), "scales": (7,)}, "int64[N] ids")
    assert forward_parameters(as_ir(model)) == ("rows",)


@pytest.mark.parametrize("name", [name for name in NETS if name != "swin"])
def test_parameters_of_torchs_exporter(name: str) -> None:
    """With what the exporter records, and without: buffers are told by their place."""
    model = NETS[name]()
    _, exported = exported_to_onnx(model, (torch.randn(2, 3, 32, 32),))
    expected = {key for key, _ in model.named_parameters()}
    for proto in (exported, without_metadata(exported)):
        assert set(forward_parameters(as_ir(proto))) == expected
        assert find_onnx_input_layers(proto).names == (STEMS[name],)


class Mixed(nn.Module):
    """Buffers in the place of parameters, and the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, affine=False)
        self.stem = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("rotation", torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.stem(self.norm(x)).mean((2, 3))
        return features @ self.get_buffer("rotation") * self.temperature


@pytest.mark.parametrize("optimize", [False, True])
def test_what_the_exporter_records_counts(optimize: bool) -> None:
    model = Mixed()
    with torch.no_grad():  # a folded weight of the exporter's is no longer two parameters
        _, exported = exported_to_onnx(model, (torch.randn(2, 3, 8, 8),), optimize=optimize)
    found = set(forward_parameters(as_ir(exported)))
    weight = {f"stem.parametrizations.weight.original{i}" for i in (0, 1)}
    assert found == {"stem.bias", "temperature"} | ({"mul"} if optimize else weight)


def test_torchscript_exporter() -> None:
    model, buffer = NETS["resnet"]().train(), io.BytesIO()
    to_file: Any = buffer  # which it takes, whatever its types say
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.randn(2, 3, 32, 32),),
            to_file,
            dynamo=False,
            training=torch.onnx.TrainingMode.TRAINING,
            do_constant_folding=False,
        )
    proto = onnx.load_from_string(buffer.getvalue())
    assert set(forward_parameters(as_ir(proto))) == {key for key, _ in model.named_parameters()}
    assert find_onnx_input_layers(proto).names == ("stem.0",)


# By name.


def linear() -> ir.Model:
    body = "c = Constant <value = float[2] {1.0, 2.0}> () h = MatMul (x, kernel) y = Add (h, bias)"
    initializers: Initializers = {
        "kernel": (8, 2),
        "bias": (2,),
        "mean": (8,),
        "steps": np.array([3]),
    }
    return as_ir(by_hand(body, initializers))


def test_named_parameters() -> None:
    assert forward_parameters(linear(), ["mean", "kernel"]) == ("kernel", "mean")
    assert forward_parameters(linear(), "bias") == ("bias",)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["kernel", "bais"], r"'bais'.*no initializer.*'bias'"),
        (["x"], r"'x'.*no initializer.*'kernel', 'bias', 'mean'"),
        (["c"], r"'c'.*Constant.*LiftConstantsToInitializersPass"),
        (["steps"], r"'steps', of type INT64.*gradient"),
        ([], r"nothing would be trained"),
    ],
)
def test_names_that_are_no_parameters(names: list[str], says: str) -> None:
    with pytest.raises(UnsupportedTrainingError, match=says):
        forward_parameters(linear(), names)


# Refused, because the graph does not tell.


def test_weights_in_constant_nodes() -> None:
    body = """w = Constant <value = float[8,2] {1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8}> ()
        h = MatMul (x, w) y = Add (h, bias)"""
    model = as_ir(by_hand(body, {"bias": (2,)}))
    with pytest.raises(UnsupportedTrainingError, match=r"Constant nodes: MatMul.*LiftConstants"):
        forward_parameters(model)
    LiftConstantsToInitializersPass()(model)
    assert set(forward_parameters(model)) == {"w", "bias"}


@pytest.mark.parametrize(
    ("body", "initializers"),
    [
        (
            "w = Add (first, second) y = Conv (x, w)",
            {"first": (4, 3, 3, 3), "second": (4, 3, 3, 3)},
        ),
        (
            "h = Conv (x, first) a = Cos (second) y = Mul (h, a)",
            {"first": (4, 3, 1, 1), "second": (8, 8)},
        ),
    ],
    ids=["low-rank", "rotary"],
)
def test_a_parameter_or_a_constant(body: str, initializers: Initializers) -> None:
    model = as_ir(by_hand(body, initializers, IMAGE))
    with pytest.raises(UnsupportedTrainingError, match=r"computed from .*'second'.*trainable="):
        forward_parameters(model)
    assert forward_parameters(model, ["first"]) == ("first",)


NORMS = """h = Conv (x, W) a = LayerNormalization (h, s, b) r = Relu (a)
    y = LayerNormalization (r, s, c)"""


def test_parameters_that_an_exporter_has_merged() -> None:
    """Equal when exported: trained, they would stay equal without a word."""
    rest = {"W": (4, 3, 3, 3), "b": (6,), "c": (6,)}
    with pytest.raises(UnsupportedTrainingError, match=r"'s', read by .*merged.*optimize=False"):
        forward_parameters(as_ir(by_hand(NORMS, {**rest, "s": ones(6)}, IMAGE)))
    shared = as_ir(by_hand(NORMS, {**rest, "s": (6,)}, IMAGE))  # values that no two have by chance
    assert set(forward_parameters(shared)) == {"W", "s", "b", "c"}
    norm = "h = Conv (x, W) y = BatchNormalization (h, v, b, m, v)"
    initializers: Initializers = {"W": (4, 3, 3, 3), "b": (4,), "m": (4,), "v": ones(4)}
    with pytest.raises(UnsupportedTrainingError, match=r"'v'.*merged"):
        forward_parameters(as_ir(by_hand(norm, initializers, IMAGE)))


def test_torchs_optimized_export_merges_new_norms() -> None:
    inputs = (torch.randn(2, 3, 32, 32),)
    _, exported = exported_to_onnx(NETS["vit"](), inputs, optimize=True)
    for proto in (exported, without_metadata(exported)):
        with pytest.raises(UnsupportedTrainingError, match=r"norm1.*merged.*optimize=False"):
            forward_parameters(as_ir(proto))


def test_a_shared_norm_of_torchs_is_one_parameter() -> None:
    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = net.norm(net.stem(x)) - net.norm(net.stem(x * 2))
        return result

    model = Net(run, stem=nn.Linear(8, 4), norm=nn.LayerNorm(4))
    _, exported = exported_to_onnx(model, (torch.randn(2, 8),))
    assert len(forward_parameters(as_ir(exported))) == 4


# Training graphs.


def trained(tmp_path: Path) -> ir.Model:
    body = "h = Gemm <transB = 1> (x, W, b) r = Relu (h) y = MatMul (r, V)"
    model = by_hand(body, {"W": (4, 8), "b": (4,), "V": (4, 2)}, outputs="float[N,2] y")
    return ir.load(training_graph(model, tmp_path, ["b", "W"], ["V"]))


def test_inputs_of_a_training_graph(tmp_path: Path) -> None:
    model = trained(tmp_path)
    assert is_training_graph(model)
    inputs = training_parameters(model)
    assert inputs.user == ("x", "target")
    assert (set(inputs.trainable), inputs.frozen) == ({"W", "b"}, ("V",))


@pytest.mark.parametrize(
    "body",
    ["h = Gemm <transB = 0> (x, W)", "h = MatMul (x, W)"],
)
def test_frozen_parameters_in_front(body: str, tmp_path: Path) -> None:
    """The graph does not say where the batch ends; the weight's place does, or its name."""
    model = by_hand(
        f"{body} s = Add (h, b) c = Relu (s) y = MatMul (c, V)",
        {"W": (8, 4), "b": (4,), "V": (4, 2)},
        outputs="float[N,2] y",
    )
    graph = ir.load(training_graph(model, tmp_path, ["V"], ["W", "b"]))
    inputs = training_parameters(graph)
    assert inputs == training_parameters(graph, ["W", "b", "V"])
    assert (inputs.user, inputs.trainable) == (("x", "target"), ("V",))
    assert inputs.frozen == ("W", "b")


def drop(name: str) -> Callable[[ir.Graph], None]:
    def edit(graph: ir.Graph) -> None:
        graph.inputs.remove(next(v for v in graph.inputs if v.name == name))

    return edit


def swap(graph: ir.Graph) -> None:
    graph.inputs.insert(0, graph.inputs.pop(2))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (drop("lazy_reset_grad"), "has gradient buffers"),
        (drop("W"), r"gradient buffers of W.*not among the inputs"),
        (swap, "not in the order"),
    ],
    ids=["no-reset", "parameter-missing", "order"],
)
def test_graphs_that_are_none(tmp_path: Path, edit: Callable[[ir.Graph], None], says: str) -> None:
    model = trained(tmp_path)
    edit(model.graph)
    with pytest.raises(UnsupportedModelError, match=says):
        training_parameters(model)


def test_a_forward_graph_is_no_training_graph() -> None:
    assert not is_training_graph(linear())
    with pytest.raises(UnsupportedModelError, match=r"inputs x: .*generate_artifacts"):
        training_parameters(linear())

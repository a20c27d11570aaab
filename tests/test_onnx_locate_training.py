"""Which layers of ONNX Runtime's training graphs consume the input."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from onnx_models import (
    Initializers,
    by_hand,
    exported_to_onnx,
    training_graph,
)
from tract_fx import (
    UnsupportedModelError,
)
from tract_fx.passes.onnx_graph.find import find_onnx_input_layers, locate
from tract_fx.passes.onnx_graph.parameters import training_parameters
from tract_fx.passes.records import Findings

onnxruntime.set_default_logger_severity(3)

IMAGE = "float[N,3,8,8] x"

W: Initializers = {"W": (8, 4)}
V: Initializers = {"V": (4, 2)}
# Training graphs.


def targets_model() -> onnx.ModelProto:
    body = "c = Sub (x, mean) h = Conv (c, W, b) r = Relu (h) f = Flatten (r) y = Gemm (f, V, d)"
    return by_hand(
        body,
        {"mean": (3, 1, 1), "W": (4, 3, 3, 3), "b": (4,), "V": (144, 2), "d": (2,)},
        IMAGE,
        "float[N,2] y",
    )


PARAMETERS = ["W", "b", "V", "d"]


def found_in(path: Path) -> Findings:
    findings = find_onnx_input_layers(path)
    assert findings == find_onnx_input_layers(onnx.load(path)), "file and proto"
    return findings


@pytest.mark.parametrize("kind", ["MSELoss", "CrossEntropyLoss", "BCEWithLogitsLoss", "L1Loss"])
def test_training_graph(kind: str, tmp_path: Path) -> None:
    from onnxruntime.training import artifacts

    model = targets_model()
    (forward,) = find_onnx_input_layers(model).layers
    loss = artifacts.LossType[kind]
    findings = found_in(training_graph(model, tmp_path, PARAMETERS, loss=loss))
    (layer,) = findings.layers
    assert not findings.refusals
    assert layer == dataclasses.replace(forward, node=layer.node, path=layer.path)
    assert layer.path[0] == "x" and len(layer.path) == 3


def test_training_graph_with_a_frozen_layer(tmp_path: Path) -> None:
    path = training_graph(targets_model(), tmp_path, ["V", "d"], ["W", "b"])
    (layer,) = found_in(path).layers
    assert layer.frozen and layer.weight == ("W",)


def test_parameters_of_a_training_graph_are_its_own(tmp_path: Path) -> None:
    path = training_graph(targets_model(), tmp_path, PARAMETERS)
    with pytest.raises(UnsupportedModelError, match=r"gradients of its own parameters"):
        find_onnx_input_layers(path, trainable=["W"])


@pytest.mark.parametrize("autoencoder", [False, True])
def test_a_penalty_in_the_loss_is_no_layer(autoencoder: bool, tmp_path: Path) -> None:
    """The label, or the image that is the target too, meets parameters behind the features."""
    from onnxruntime.training import onnxblock

    class Penalised(onnxblock.Block):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.loss, self.add = onnxblock.loss.MSELoss(), onnxblock.blocks.Add()
            self.mul, self.sum = onnxblock.blocks.Mul(), onnxblock.blocks.ReduceSum(keepdims=False)

        def build(self, output: str) -> str:
            squares = self.sum(self.mul("W", "W"))
            result: str = self.add(self.loss(output), squares)
            return result

    if autoencoder:
        body = """h = MatMul (x, W) r = Relu (h) t = Transpose (V) z = MatMul (r, t) e = Sub (z, x)
            q = Mul (e, e) y = ReduceMean <keepdims = 0> (q)"""
        proto = by_hand(body, {**W, "V": (8, 4)}, outputs="float y")
        penalty = "s = Mul (W, W) n = ReduceSum <keepdims = 0> (s) o = Add (y, n)"
        proto = by_hand(f"{body} {penalty}", {**W, "V": (8, 4)}, outputs="float o")
        findings = find_onnx_input_layers(proto)
    else:
        path = training_graph(targets_model(), tmp_path, PARAMETERS, loss=Penalised())
        findings = found_in(path)
    assert findings.names == ("W",) and not findings.refusals, str(findings)


def test_a_loss_with_parameters_of_its_own() -> None:
    """The label meets them behind the features, entry by entry: learned weights of tasks."""
    body = "y = MatMul (x, W) e = Sub (y, target) q = Mul (e, e) o = Mul (q, task)"
    proto = by_hand(body, {**W, "task": (4,)}, "float[N,8] x, float[N,4] target", "float[N,4] o")
    findings = find_onnx_input_layers(proto)
    assert findings.names == ("W",) and not findings.refusals, str(findings)


def test_a_mask_before_a_layer_is_no_label() -> None:
    """What joins features in front of a layer reads on: as in fx, the choice is the user's."""
    proto = by_hand(
        "h = MatMul (x, W) m = Mul (h, mask) y = MatMul (m, V)",
        {**W, **V},
        "float[N,8] x, float[N,1] mask",
    )
    assert find_onnx_input_layers(proto).names == ("W", "V")


def test_torch_and_training_graph_agree(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
    _, proto = exported_to_onnx(model.train(), (torch.randn(2, 3, 8, 8),))
    trainable = [name for name, _ in model.named_parameters()]
    graph = ir.load(training_graph(proto, tmp_path, trainable, ["1.running_mean", "1.running_var"]))
    inputs = training_parameters(graph)
    located = locate(graph, inputs.trainable, inputs.frozen)
    (layer,), (forward,) = located.findings.layers, find_onnx_input_layers(proto).layers
    assert (layer.name, layer.node, layer.geometry) == ("0", forward.node, forward.geometry)
    # Of the gradient's products none is a call.
    assert [record.weight for record, _ in located.eligible] == [("0.weight",), ("3.weight",)]

"""The models that bench_onnx_gram measures: a convolution's forward, and its Gram in each form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tract_fx.passes.onnx_graph.call_sizes import CallSizes
from tract_fx.passes.onnx_graph.calls import match_call
from tract_fx.passes.onnx_graph.gram import write_gram
from tract_fx.passes.onnx_graph.gram_forms import (
    GramForm,
    Tiles,
    choose_gram_form,
    gram_cost,
    possible_gram_forms,
)
from tract_fx.passes.onnx_graph.writer import NodeWriter

_MOST = 5  # forms that are measured for a layer, besides the former one


@dataclass(frozen=True)
class Layer:
    """A first layer.

    Attributes:
        name: As the table prints it.
        shape: Shape of a batch.
        outputs: Output channels or features.
        kernel: Kernel size, 0 for a linear layer.
        stride: Stride in both dimensions.
        pad: Zeros on all sides.
    """

    name: str
    shape: tuple[int, ...]
    outputs: int
    kernel: int = 0
    stride: int = 1
    pad: int = 0


LAYERS = (
    Layer("ImageNet 7x7/2, 16x3x224²", (16, 3, 224, 224), 64, 7, 2, 3),
    Layer("CIFAR 3x3, 128x3x32²", (128, 3, 32, 32), 64, 3, 1, 1),
    Layer("ViT 16x16/16, 32x3x224²", (32, 3, 224, 224), 768, 16, 16),
    Layer("4x4/4, 16x3x224²", (16, 3, 224, 224), 96, 4, 4),
    Layer("MNIST 5x5, 128x1x28²", (128, 1, 28, 28), 32, 5),
    Layer("MobileNet 3x3/2, 16x3x224²", (16, 3, 224, 224), 32, 3, 2, 1),
    Layer("Linear 784, 2048 rows", (2048, 784), 256),
)


@dataclass(frozen=True)
class GramModel:
    """A model of one form of a layer's Gram.

    Attributes:
        form: The form in words.
        former: Whether it is what was written before forms were chosen.
        chosen: Whether it is what is written now.
        count: What the choice goes by; 0 where nothing was counted.
        model: The model.
    """

    form: str
    former: bool
    chosen: bool
    count: float
    model: bytes


def forward_model(layer: Layer) -> bytes:
    """The layer's own forward, with bias."""
    x, w = _operands(layer)
    graph = _graph(x)
    write = NodeWriter(graph, "", {})
    generator = np.random.default_rng(0)
    assert w.shape is not None
    values = generator.standard_normal(w.shape.numpy()).astype(np.float32)
    weight = write.constant(values, "weight")
    bias = write.constant(np.zeros(layer.outputs, np.float32), "bias")
    op, attributes = ("Conv", _attributes(layer)) if layer.kernel else ("Gemm", {})
    return _finished(graph, write, write.op(op, [x, weight, bias], "output", attributes))


def gram_models(layer: Layer) -> Iterator[GramModel]:
    """The former form, and of those that are possible now the ones with the smallest counts."""
    sizes = _sizes(layer)
    chosen, possible = choose_gram_form(sizes), possible_gram_forms(sizes)
    if not layer.kernel:
        possible = [Tiles(count) for count in (1, 2, 3, 4, 6)]
    former: GramForm = Tiles(1) if not layer.kernel or sizes.is_patchify else possible[0]
    forms = sorted(possible, key=lambda form: gram_cost(sizes, form))[:_MOST]
    for form in dict.fromkeys((former, chosen, *forms)):
        sizes = _sizes(layer)
        graph = _graph(sizes.call.input)
        write = NodeWriter(graph, "", {})
        model = _finished(graph, write, write_gram(write, sizes, form))
        count = gram_cost(sizes, form)
        yield GramModel(in_words(form), form == former, form == chosen, count, model)


def in_words(form: GramForm) -> str:
    """A form as the table prints it."""
    if isinstance(form, Tiles):
        return f"{form.count}x{form.count} tiles"
    if form.is_plain:
        return "whole patches"
    rows = f"{form.rows} rows x {form.lags} lags" if form.lags > 1 else "all rows"
    return f"{rows}, blocks of {form.block}"


def _sizes(layer: Layer) -> CallSizes:
    x, w = _operands(layer)
    node = ir.node("Conv", [x, w], _attributes(layer)) if layer.kernel else ir.node("Gemm", [x, w])
    call = match_call(node)
    assert call is not None and w.shape is not None
    return CallSizes.of(call, tuple(int(size) for size in w.shape.numpy()))


def _operands(layer: Layer) -> tuple[ir.Value, ir.Value]:
    channels = layer.shape[1]
    weight: tuple[int, ...] = (channels, layer.outputs)
    if layer.kernel:
        weight = (layer.outputs, channels, layer.kernel, layer.kernel)
    return _operand("x", ("N", *layer.shape[1:])), _operand("w", weight)


def _operand(name: str, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.val(name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def _attributes(layer: Layer) -> dict[str, list[int]]:
    return {"strides": [layer.stride] * 2, "pads": [layer.pad] * 4}


def _graph(x: ir.Value) -> ir.Graph:
    return ir.Graph([x], [], nodes=[], opset_imports={"": 20, "com.microsoft": 1}, name="measured")


def _finished(graph: ir.Graph, write: NodeWriter, output: ir.Value) -> bytes:
    graph.extend(write.nodes)
    output.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(output)
    model: bytes = ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString()
    return model

"""The models that bench_onnx_gram measures: a convolution's forward, and its Gram in each form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from torch import nn

from stems import FEW_ROWS, STEMS, Stem
from tract_fx.passes.onnx_graph.call_sizes import CallSizes
from tract_fx.passes.onnx_graph.calls import match_call
from tract_fx.passes.onnx_graph.gram_forms import (
    GramForm,
    Tiles,
    choose_gram_form,
    gram_cost,
    possible_gram_forms,
)
from tract_fx.passes.onnx_graph.provenance import Provenance
from tract_fx.passes.onnx_graph.subgraph import write_gram
from tract_fx.passes.onnx_graph.writer import NodeWriter

_MOST = 5  # forms that are measured for a layer, besides the former one


LAYERS = tuple(stem for stem in STEMS if stem is not FEW_ROWS)  # which has no Gram


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


def forward_model(stem: Stem) -> bytes:
    """A layer's own forward, with bias."""
    x, w, attributes = _call(stem)
    graph = _graph(x)
    write = NodeWriter(graph, "", Provenance("call", "term"))
    generator = np.random.default_rng(0)
    assert w.shape is not None
    shape = w.shape.numpy()
    weight = write.constant(generator.standard_normal(shape).astype(np.float32), "weight")
    bias = write.constant(np.zeros(shape[0 if attributes else 1], np.float32), "bias")
    op = "Conv" if attributes else "Gemm"
    return _finished(graph, write, write.op(op, [x, weight, bias], "output", attributes))


def gram_models(stem: Stem) -> Iterator[GramModel]:
    """The former form, and of those that are possible now the ones with the smallest counts."""
    sizes = _sizes(stem)
    chosen, possible = choose_gram_form(sizes), possible_gram_forms(sizes)
    if not sizes.kernel:
        possible = [Tiles(count) for count in (1, 2, 3, 4, 6)]
    former: GramForm = Tiles(1) if not sizes.kernel or sizes.is_patchify else possible[0]
    forms = sorted(possible, key=lambda form: gram_cost(sizes, form))[:_MOST]
    for form in dict.fromkeys((former, chosen, *forms)):
        sizes = _sizes(stem)
        graph = _graph(sizes.call.input)
        write = NodeWriter(graph, "", Provenance("call", "term"))
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


def _sizes(stem: Stem) -> CallSizes:
    x, w, attributes = _call(stem)
    call = match_call(ir.node("Conv" if attributes else "Gemm", [x, w], attributes))
    assert call is not None
    return CallSizes.of(call)


def _call(stem: Stem) -> tuple[ir.Value, ir.Value, dict[str, list[int]]]:
    """Input, weight, and a convolution's attributes; none for a linear layer."""
    layer, x = stem.build(), _operand("x", ("N", *stem.shape[1:]))
    if isinstance(layer, nn.Linear):
        return x, _operand("w", (layer.in_features, layer.out_features)), {}
    assert isinstance(layer.padding, tuple)
    attributes = {"strides": [*layer.stride], "pads": [*layer.padding] * 2}
    return x, _operand("w", tuple(layer.weight.shape)), attributes


def _operand(name: str, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.val(name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def _graph(x: ir.Value) -> ir.Graph:
    return ir.Graph([x], [], nodes=[], opset_imports={"": 20, "com.microsoft": 1}, name="measured")


def _finished(graph: ir.Graph, write: NodeWriter, output: ir.Value) -> bytes:
    graph.extend(write.nodes)
    output.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(output)
    model: bytes = ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString()
    return model

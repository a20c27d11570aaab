"""What the pass's nodes say of themselves, held against what they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_models import by_hand
from onnx_training import NETS, all_nodes, batch_for, initializers, same, trained
from tract_fx.inspection.inspection import Inspection
from tract_fx.inspection.onnx.inspection import inspect_onnx
from tract_fx.passes import remove_tract_onnx, tract_onnx_pass
from tract_fx.passes.onnx_graph.provenance import (
    PREFIX,
    PROVENANCE,
    Provenance,
    present_lambdas,
    provenance_of,
)

STAGES = ("Gram", "factorisation", "solve")


def one_layer(call: str, weight: tuple[int, ...], inputs: str) -> onnx.ModelProto:
    return by_hand(
        f"{call} h = Tanh(y) q = Mul(h, t) loss = ReduceSum<keepdims=0>(q)",
        {"w": weight},
        inputs,
        "float loss",
        20,
    )


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "rows": lambda: one_layer("y = MatMul(x, w)", (6, 5), "float[N,6] x, float[N,5] t"),
    "transposed": lambda: one_layer(
        "y = Gemm<transA=1>(x, w)", (6, 5), "float[6,N] x, float[N,5] t"
    ),
    "tiles": lambda: one_layer("y = MatMul(x, w)", (800, 2), "float[900,800] x, float[900,2] t"),
    "patchify": lambda: one_layer(
        "y = Conv<strides=[4, 4]>(x, w)", (2, 1, 4, 4), "float[30,1,8,8] x, float[30,2,2,2] t"
    ),
    "plain": lambda: one_layer(
        "y = Conv<strides=[2, 2]>(x, w)", (2, 3, 3, 3), "float[9,3,9,9] x, float[9,2,4,4] t"
    ),
    "lags": lambda: one_layer(
        "y = Conv<pads=[1, 1, 1, 1]>(x, w)", (2, 3, 3, 3), "float[9,3,9,9] x, float[9,2,9,9] t"
    ),
    "groups": lambda: one_layer(
        "y = Conv<group=2, dilations=[2, 2]>(x, w)",
        (6, 2, 3, 3),
        "float[N,4,7,7] x, float[N,6,3,3] t",
    ),
}


@pytest.fixture(scope="module")
def graphs() -> dict[str, onnx.ModelProto]:
    return {name: tract_onnx_pass(trained(build(), ("w",)).graph) for name, build in MODELS.items()}


def branches(graph: onnx.GraphProto) -> list[list[onnx.NodeProto]]:
    """The nodes of each form: those of the innermost branches, or of a graph without any."""
    choices = [node for node in graph.node if node.op_type == "If"]
    if not choices:
        return [[node for node in all_nodes(graph) if "tract/" in node.name]]
    return [form for node in choices for a in node.attribute for form in branches(a.g)]


def said(node: onnx.NodeProto) -> dict[str, str]:
    (text,) = (entry.value for entry in node.metadata_props if entry.key == PROVENANCE)
    fields: dict[str, str] = json.loads(text)
    return fields


@pytest.mark.parametrize("name", MODELS)
def test_every_node_says_its_stage_and_reads_of_none_behind(
    name: str, graphs: dict[str, onnx.ModelProto]
) -> None:
    """The inverse is the factorisation's, what it reads the Gram's, what reads it the solve's."""
    model = ir.from_proto(graphs[name])
    made = [node for node in model.graph.all_nodes() if str(node.name).startswith(PREFIX)]
    assert made
    for node in made:
        record = provenance_of(node)
        assert record is not None and record.stage in STAGES
        for value in node.inputs:
            producer = None if value is None else value.producer()
            read = None if producer is None else provenance_of(producer)
            if read is not None and producer in made:
                assert STAGES.index(read.stage) <= STAGES.index(record.stage), node.name
        if node.op_type == "Inverse":
            assert record.stage == "factorisation"
            assert node.inputs[0] is not None
            (before,) = (n for n in made if node.inputs[0] in n.outputs)
            kept = provenance_of(before)
            assert kept is not None and kept.stage == "Gram" and kept.form == record.form


@pytest.mark.parametrize("name", MODELS)
def test_the_forms_are_those_of_the_nodes(name: str, graphs: dict[str, onnx.ModelProto]) -> None:
    """By what the form reads: the plain gradient in column space, the output's in row space."""
    forms = branches(graphs[name].graph)
    assert forms
    for nodes in forms:
        (form,) = {said(node)["form"] for node in nodes if "form" in said(node)}
        reads = {value for node in nodes for value in node.input}
        plain = any(value.endswith("/plain_gradient") for value in reads)
        assert plain == (form == "column space") and plain != (form == "row space")


COUNTED = ("Einsum", "FusedMatMul", "Gemm")


@pytest.mark.parametrize("name", MODELS)
def test_the_gram_s_words_count_what_is_there(
    name: str, graphs: dict[str, onnx.ModelProto]
) -> None:
    model = graphs[name]
    constants = initializers(model)
    for nodes in branches(model.graph):
        own = [node for node in nodes if said(node)["stage"] == "Gram"]
        words = ", ".join(dict.fromkeys(said(node)["gram"] for node in own if "gram" in said(node)))
        products = Counter(node.op_type for node in own if node.op_type in COUNTED)
        ((op, count),) = products.items()
        start = op if count == 1 else f"{count} {op}"
        assert any(part.startswith(start) for part in words.split(", "))
        ops = {node.op_type for node in own}
        assert ("in a Scan" in words) == ("Scan" in ops)
        assert ("and ReduceSum" in words) == ("ReduceSum" in ops)
        for node in own:
            if node.op_type == "Conv":
                sizes = {a.name: "×".join(map(str, a.ints)) for a in node.attribute if a.ints}
                assert f"by Conv with unit kernels {sizes.pop('kernel_shape')}" in words
                assert all(f", {key} {size}" in words for key, size in sizes.items())
                units = constants[node.input[1]].reshape(len(constants[node.input[1]]), -1)
                eye = np.eye(units.shape[1], dtype=np.float32)
                np.testing.assert_array_equal(units, np.tile(eye, (len(units) // len(eye), 1)))
        assert ("by Conv" in words) == ("Conv" in ops)
        permuted = name == "patchify" and "Conv" not in ops
        assert ("by Reshape and Transpose" in words) == permuted


def changed(
    model: onnx.ModelProto, edit: Callable[[dict[str, str]], dict[str, str]]
) -> onnx.ModelProto:
    """The graph with other records."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in all_nodes(copy.graph):
        for entry in node.metadata_props:
            if entry.key == PROVENANCE:
                entry.value = json.dumps(edit(json.loads(entry.value)))
    return copy


def test_the_inspection_shows_what_the_pass_says(graphs: dict[str, onnx.ModelProto]) -> None:
    def edit(fields: dict[str, str]) -> dict[str, str]:
        gram = {"gram": "by another way"} if "gram" in fields else {}
        form = {"form": "row space"} if "form" in fields else {}
        return {**fields, **gram, **form}

    inspection = inspect_onnx(changed(graphs["plain"], edit), verify=False, statistics=False)
    (layer,) = inspection.layers
    assert layer.gram == "by another way"
    assert layer.form.startswith("Inverse of XXᵀ (R × R), on the output's gradient; in float64")


def test_the_form_in_float64(graphs: dict[str, onnx.ModelProto]) -> None:
    """Where the input is not standardised; its products are in a graph within the graph."""
    x = np.random.default_rng(0).uniform(0, 255, (9, 3, 9, 9)).astype(np.float32)
    (layer,) = inspect_onnx(graphs["plain"], x, verify=False, statistics=False).layers
    assert layer.form == "Inverse of the Gram (n × n) in float64, on the weight's gradient"
    assert layer.gram == (
        "patches by Conv with unit kernels 3×3, strides 2×2, Einsum per image, in a Scan"
    )


EARLIER = {
    "0.2": ("call", "term", "output_gradient"),
    "0.1": ("call", "term"),
}
"""What the records of versions before had in them."""


def inspected(model: onnx.ModelProto, size: int) -> Inspection:
    return inspect_onnx(model, batch_for("convnet", size), backward="expanded", statistics=False)


@pytest.mark.parametrize("fields", EARLIER.values(), ids=EARLIER)
@pytest.mark.parametrize("size", [5, None])
def test_graphs_of_earlier_versions(fields: tuple[str, ...], size: int | None) -> None:
    """They are inspected, verified in all their forms, and taken out again."""
    training = trained(NETS["convnet"][0]())
    now = tract_onnx_pass(training.graph)
    then = changed(now, lambda record: {name: record[name] for name in fields})
    if size is None:
        found = inspect_onnx(then, backward="expanded", verify=False, statistics=False)
    else:
        found = inspected(then, size)
        assert found.verification is not None and found.verification.passed
        wanted = inspected(now, size).verification
        assert wanted is not None
        names = [check.name for check in found.verification.others]
        assert names == [check.name for check in wanted.others] and len(names) > 5
    (layer,) = found.layers
    assert layer.form.startswith("not recorded in this graph") and layer.gram == ""
    assert found.backward is not None and found.backward.expanded is not None
    own = [node for node in found.backward.expanded.nodes if node.kind == "tract"]
    assert {node.stage for node in own} - {""} == {"not recorded"}
    assert len(own) > 20
    assert present_lambdas(ir.from_proto(then)) == {"Conv_y": pytest.approx(0.1)}
    batch = batch_for("convnet")
    assert same(training.step(remove_tract_onnx(then), *batch), training.step(None, *batch))


@pytest.mark.parametrize("name", ["inverse", "gradient"])
def test_a_node_that_says_nothing_is_drawn_too(
    name: str, graphs: dict[str, onnx.ModelProto]
) -> None:
    """One of another tool's, in the midst of a form or at its end."""
    model = ir.from_proto(graphs["lags"])
    own = f"{PREFIX}Conv_y/in_float32/{name}"
    node = next(n for n in model.graph.all_nodes() if n.name == own)
    alien = ir.node("Neg", [node.outputs[0]], name="alien")
    alien.outputs[0].name, alien.outputs[0].type = "aliens", node.outputs[0].type
    node.outputs[0].replace_all_uses_with(alien.outputs[0], replace_graph_outputs=True)
    alien.replace_input_with(0, node.outputs[0])
    graph = node.graph
    assert graph is not None
    graph.insert_after(node, alien)
    x = np.random.default_rng(0).normal(size=(9, 3, 9, 9)).astype(np.float32)
    options: dict[str, Any] = {"verify": False, "statistics": False}
    found = inspect_onnx(model, x, backward="expanded", **options).backward
    assert found is not None and found.expanded is not None
    nodes = {drawn.name: drawn for drawn in found.expanded.nodes}
    assert nodes["aliens"].stage == "not recorded"
    assert nodes["aliens"].inputs == (f"in_float32/{name}",)
    assert any("aliens" in drawn.inputs for drawn in nodes.values())


def test_records_of_later_versions() -> None:
    text = json.dumps({"call": "a", "term": "b", "stage": "solve", "device": "none"})
    assert Provenance.from_json(text) == Provenance("a", "b", stage="solve")


def test_records_are_equal_by_what_they_say() -> None:
    record = Provenance("a", "b", "c", "row space", "Gram", "Gemm")
    assert Provenance.from_json(record.to_json()) == record
    assert len({record, Provenance.from_json(record.to_json())}) == 1
    assert json.loads(Provenance("a", "b").to_json()) == {"call": "a", "term": "b"}
    assert provenance_of(ir.node("Relu", [ir.Value(name="x")])) is None

"""Runs of an ONNX training graph and of the plain one on a batch. No file changes by them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tract_fx import ort_training
from tract_fx.errors import FailedRunError
from tract_fx.export.graph_runs import accumulated_gradients, run_training_graph
from tract_fx.inspection.onnx.batch import OnnxBatch
from tract_fx.inspection.onnx.layers import BRANCHES, Form, conditions_of
from tract_fx.passes.onnx_graph.cutting import cut
from tract_fx.passes.onnx_graph.treated import TreatedCall
from tract_fx.reference.observed import ObservedCall
from tract_fx.reference.onnx_calls import observe_call
from tract_fx.trainers.randomness import OWN_GENERATOR

_ACCUMULATOR = "InPlaceAccumulatorV2"


@dataclass(frozen=True)
class GraphRun:
    """What a training graph computed.

    Attributes:
        outputs: Its outputs but for what it accumulates, by name: the loss and others.
        gradients: What is added to the gradient of each parameter, by the parameter's name.
        values: Values that were asked for, by name.
    """

    outputs: Mapping[str, np.ndarray]
    gradients: Mapping[str, np.ndarray]
    values: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class OnnxRuns:
    """A run of a training graph with TrAct, and what else can be run to compare with it.

    Attributes:
        model: The graph with TrAct. Its random operators have seeds, the same as in `plain`.
        plain: The graph without.
        batch: What they run on.
        treated: The calls with TrAct.
        calls: What each of them read and what came back to it.
        rewritten: What the graph with TrAct computed.
    """

    model: ir.Model
    plain: ir.Model
    batch: OnnxBatch
    treated: tuple[TreatedCall, ...]
    calls: tuple[ObservedCall, ...]
    rewritten: GraphRun


def run_with_tract(
    model: ir.Model, plain: ir.Model, treated: tuple[TreatedCall, ...], batch: OnnxBatch
) -> OnnxRuns:
    """Run a training graph with TrAct on a batch."""
    model, plain = _seeded(model), _seeded(plain)
    names = [name for call in treated for name in call.read]
    names += [name for call in treated for name in conditions_of(call)]
    rewritten = run_gradients(model, batch, names)
    calls = tuple(observe_call(call, rewritten.values) for call in treated)
    return OnnxRuns(model, plain, batch, treated, calls, rewritten)


def _seeded(model: ir.Model) -> ir.Model:
    """Copy a graph, each random operator with a seed of its own: dropouts stay on, and repeat."""
    copy = model.clone()
    drawing = (n for n in copy.graph.all_nodes() if n.op_type in {*OWN_GENERATOR, "Dropout"})
    for index, node in enumerate(drawing):
        seed = ir.AttrInt64 if node.op_type == "Dropout" else ir.AttrFloat32
        node.attributes.add(seed("seed", index))
    return copy


def run_gradients(model: ir.Model, batch: OnnxBatch, names: Iterable[str] = ()) -> GraphRun:
    """Run a training graph once on the CPU."""
    gathered = accumulated_gradients(model)
    outputs = [str(v.name) for v in model.graph.outputs if not _accumulates(v)]
    read = list(dict.fromkeys((*outputs, *gathered.values(), *names)))
    values = run_training_graph(model, batch.feeds, batch.parameters, read, _failed)
    return GraphRun(
        outputs={name: values[name] for name in outputs},
        gradients={name: values[value] for name, value in gathered.items()},
        values={name: values[name] for name in names},
    )


def _accumulates(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == _ACCUMULATOR


def run_with_terms(
    plain: ir.Model,
    batch: OnnxBatch,
    terms: Mapping[str, np.ndarray],
    parameters: Iterable[str],
) -> dict[str, np.ndarray]:
    """Run the plain graph with other numbers in the place of some terms of gradients.

    What is behind the terms, a sum over several calls or the chain rule to the parameters that a
    weight is computed from, is the plain graph's own.
    """
    model = plain.clone()
    values = {value.name: value for node in model.graph for value in node.outputs}
    feeds = dict(batch.feeds)
    for index, (name, array) in enumerate(terms.items()):
        term = values[name]
        source = _source(f"inspected_term_{index}", array)
        # The accumulation reads a node's output, also where the term itself is accumulated.
        copy = ir.node("Identity", [source], name=f"inspected_copy_{index}")
        copy.outputs[0].name, copy.outputs[0].type = f"inspected_value_{index}", source.type
        producer = term.producer()
        assert producer is not None
        term.replace_all_uses_with(copy.outputs[0], replace_graph_outputs=True)
        model.graph.insert_after(producer, copy)
        model.graph.inputs.append(source)
        feeds[str(source.name)] = array
    gathered = accumulated_gradients(model)
    wanted = {name: gathered[name] for name in parameters if name in gathered}
    results = run_training_graph(model, feeds, batch.parameters, list(wanted.values()), _failed)
    return {name: results[value] for name, value in wanted.items()}


def run_form(
    model: ir.Model,
    call: TreatedCall,
    values: Mapping[str, np.ndarray],
    names: Iterable[str],
    form: Form | None = None,
) -> dict[str, np.ndarray]:
    """Run the nodes that the pass made for a call, apart from the rest of the graph."""
    alone = model.clone()
    graph = alone.graph
    for choice, when in () if form is None else form.choices:
        _inline(graph, str(choice.outputs[0].name), BRANCHES[when])
    known = {v.name: v for node in graph for v in node.outputs} | {v.name: v for v in graph.inputs}
    sources: list[tuple[ir.Value, np.ndarray]] = []
    outer = (call.call.input, call.plain, call.output_gradient)
    for name in dict.fromkeys(str(value.name) for value in outer):
        source = _source(f"inspected_{len(sources)}", values[name])
        known[name].replace_all_uses_with(source)
        sources.append((source, values[name]))
    names = [name for name in names if name in known]
    graph.inputs.extend(source for source, _ in sources)
    cut(graph, [known[name] for name in names])
    proto = ir.to_proto(alone)
    taken = {value.name for value in graph.inputs}
    feeds = {str(source.name): array for source, array in sources if source.name in taken}
    return ort_training.run_once(proto.SerializeToString(), feeds, names, _failed)


def _inline(graph: ir.Graph, result: str, branch: str) -> None:
    """Put an If's branch in the place of the If whose output has this name."""
    choice = next(node for node in graph if any(v.name == result for v in node.outputs))
    inner = choice.attributes[branch].as_graph()
    nodes, (end,) = list(inner), inner.outputs
    inner.outputs.clear()
    inner.remove(nodes)
    graph.insert_before(choice, nodes)
    choice.outputs[0].replace_all_uses_with(end, replace_graph_outputs=True)


def _source(name: str, array: np.ndarray) -> ir.Value:
    """A value for an array to stand in a graph's inputs."""
    dtype = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    return ir.Value(name=name, type=dtype, shape=ir.Shape(array.shape))


def _failed(error: Exception) -> FailedRunError:
    return FailedRunError(
        f"ONNX Runtime can't run the training graph ({ort_training.message_of(error)})",
        "it has an operator that has no kernel there, or does not take the batch",
        "Give example_inputs of sizes and values that the model takes, and the training graph as "
        "it is trained",
    )

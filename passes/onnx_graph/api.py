"""The passes on ONNX training graphs that users call."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from tract_fx.passes.choose import LayerChoice, choose, read_choice, warn_of_frozen
from tract_fx.passes.onnx_graph.find import locate
from tract_fx.passes.onnx_graph.models import as_ir_model
from tract_fx.passes.onnx_graph.node_names import named_nodes
from tract_fx.passes.onnx_graph.parameters import training_parameters
from tract_fx.passes.onnx_graph.provenance import present_lambdas
from tract_fx.passes.onnx_graph.rewrite import insert_tract, remove_from_graph
from tract_fx.preconditioner import DEFAULT_LAMBDA


def tract_onnx_pass(
    model: onnx.ModelProto | ir.Model | str | Path,
    *,
    lambda_: float = DEFAULT_LAMBDA,
    layers: LayerChoice = None,
) -> onnx.ModelProto:
    """Make an ONNX training graph train its input layer with TrAct's gradient.

    The layer's weight gradient gW becomes gW (XᵀX/R + λI)⁻¹ (arXiv 2410.23970, section 3), on the
    weight output of that call's own gradient operator: before the terms of several calls are added
    up, and before the chain rule to the parameters that the weight is computed from. λ is an
    initializer, `tract/CALL/lambda`, and may be edited. Applied twice, the pass gives what it gives
    once; another λ replaces the first.

    Args:
        model: A training graph as `onnxruntime.training.artifacts.generate_artifacts` writes it
            (`training_model.onnx`), or its file. Not changed.
        lambda_: λ > 0. The paper uses 0.05, 0.1 and 0.2.
        layers: Names of the layers to treat, where the choice is yours: the weights' names, the
            nodes' names, or a mapping of names to λ.

    Returns:
        The training graph with TrAct in it, to be used in the place of the first: inputs, outputs
        and checkpoint stay as they are.

    Raises:
        UnsupportedModelError: `model` is no training graph, or one in an opset below 13.
        InvalidLambdaError: A λ is not a finite number above zero, or outside of float32.
        NoInputLayerError: No layer consumes the input.
        AmbiguousInputLayerError: Several do.
        UnsupportedLayerError: What consumes the input can't be treated exactly.
        UnknownLayerError: A name in `layers` matches nothing that can be treated.
    """
    choice = read_choice(lambda_, layers)
    graph = as_ir_model(model)
    inputs = training_parameters(graph)
    named_nodes(graph)
    present = present_lambdas(graph)
    located = locate(graph, inputs.trainable, inputs.frozen, present)
    eligible = [record for record, _ in located.eligible]
    chosen = choose(located.findings, eligible, choice)
    calls = {record.node: call for record, call in located.eligible}
    remove_from_graph(graph)
    idle = insert_tract(graph, calls, chosen)
    names = {record.node: record.name for record in eligible}
    warn_of_frozen(names[node] for node in idle)
    return ir.to_proto(graph)


def remove_tract_onnx(model: onnx.ModelProto | ir.Model | str | Path) -> onnx.ModelProto:
    """Take TrAct out of an ONNX training graph.

    Args:
        model: A training graph, with TrAct or without, or its file. Not changed.

    Returns:
        The graph with plain gradients.

    Raises:
        UnsupportedModelError: `model` is no ONNX model.
    """
    graph = as_ir_model(model)
    remove_from_graph(graph)
    return ir.to_proto(graph)

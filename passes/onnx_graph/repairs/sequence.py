"""The repairs of forward graphs, for the gradient builder and for evaluation, in their order."""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx_ir as ir

from tract_fx.passes.onnx_graph.repairs.activations import activations_as_primitives
from tract_fx.passes.onnx_graph.repairs.auto_pad import explicit_pads
from tract_fx.passes.onnx_graph.repairs.batch_norm import frozen_batch_norm
from tract_fx.passes.onnx_graph.repairs.casts import casts_like
from tract_fx.passes.onnx_graph.repairs.einsum import einsums_as_products
from tract_fx.passes.onnx_graph.repairs.gradients import require_gradients
from tract_fx.passes.onnx_graph.repairs.layer_norm import layer_norm_biases
from tract_fx.passes.onnx_graph.repairs.matrices import vectors_as_matrices
from tract_fx.passes.onnx_graph.repairs.metadata import strip_exporter_metadata
from tract_fx.passes.onnx_graph.repairs.names import named_nodes
from tract_fx.passes.onnx_graph.repairs.normalizations import normalizations_as_primitives
from tract_fx.passes.onnx_graph.repairs.operands import separate_operands, unread_operands
from tract_fx.passes.onnx_graph.repairs.optional_outputs import optional_outputs
from tract_fx.passes.onnx_graph.repairs.padding import paddings_as_gathers
from tract_fx.passes.onnx_graph.repairs.permutations import (
    explicit_permutations,
    identity_permutations,
)
from tract_fx.passes.onnx_graph.repairs.pooling import (
    average_pools_as_convolutions,
    max_pools_as_gathers,
)
from tract_fx.passes.onnx_graph.repairs.powers import powers_as_exponentials
from tract_fx.passes.onnx_graph.repairs.reductions import (
    extrema_as_primitives,
    norms_of_everything,
    reductions_as_primitives,
    variadic_as_binary,
)
from tract_fx.passes.onnx_graph.repairs.resizing import resizes_as_products
from tract_fx.passes.onnx_graph.repairs.reversals import reversals_as_gathers
from tract_fx.passes.onnx_graph.repairs.selections import full_size_selections
from tract_fx.passes.onnx_graph.repairs.sequences import partly_used_splits, sequences_as_splits
from tract_fx.passes.onnx_graph.repairs.shapes import inferred_shapes
from tract_fx.passes.onnx_graph.repairs.stop_gradients import (
    detached_values,
    steps_without_gradient,
)
from tract_fx.passes.onnx_graph.repairs.transposed_convolution import (
    transposed_convolutions_as_convolutions,
)
from tract_fx.passes.onnx_graph.repairs.versions import supported_versions
from tract_fx.passes.onnx_graph.values import ancestors

__all__ = ["prepare_for_evaluation", "prepare_for_gradients"]

BEFORE: tuple[Callable[[ir.Model], int], ...] = (
    supported_versions,
    named_nodes,
    inferred_shapes,
    explicit_pads,
    unread_operands,
    explicit_permutations,
    detached_values,
    norms_of_everything,
    reductions_as_primitives,
    extrema_as_primitives,
    strip_exporter_metadata,
    casts_like,
    sequences_as_splits,
    vectors_as_matrices,
    einsums_as_products,
    steps_without_gradient,
    variadic_as_binary,
    activations_as_primitives,
    powers_as_exponentials,
    normalizations_as_primitives,
    frozen_batch_norm,
    layer_norm_biases,
    inferred_shapes,  # of what the passes before have written: the next ones need sizes
    average_pools_as_convolutions,
    max_pools_as_gathers,
    resizes_as_products,
    transposed_convolutions_as_convolutions,
    paddings_as_gathers,
    reversals_as_gathers,
    identity_permutations,  # those of the passes before too
    full_size_selections,
    separate_operands,
    optional_outputs,
)

GRADIENTS_ALONE: frozenset[Callable[[ir.Model], int]] = frozenset(
    {
        explicit_permutations,
        detached_values,
        steps_without_gradient,
        frozen_batch_norm,
        layer_norm_biases,
        full_size_selections,
        separate_operands,
        optional_outputs,
    }
)
"""Of these, what ONNX Runtime needs for gradients, and computes right without them."""

MISCOMPUTED: tuple[Callable[[ir.Model], int], ...] = (
    identity_permutations,
    average_pools_as_convolutions,
    max_pools_as_gathers,
)
"""Of these, what ONNX Runtime 1.19.2 is known to compute wrongly without them: it merges a Pad with
the pooling behind it as if both padded with the same values, and miscounts at a border that
`ceil_mode` reaches over."""


def prepare_for_gradients(
    model: ir.Model, *, trainable: Collection[str], outputs: Collection[str] | None = None
) -> tuple[str, ...]:
    """Run all repairs that a forward graph needs before ONNX Runtime builds its gradients.

    BatchNormalization nodes with `training_mode=0` are frozen by it: `train_batch_norm` comes
    first where they are to be trained. Parameters named by `unreached_parameters` afterwards must
    be among the frozen ones.

    Args:
        model: The forward graph, edited in place.
        trainable: Names of the initializers that are to have gradients.
        outputs: Names of the graph outputs that the loss reads; None for all.

    Returns:
        Names of the passes that changed something, in their order.

    Raises:
        ExportError: If a repair, or a gradient, is not possible.
    """  # noqa: DOC502 - raised by the passes
    names = [repair.__name__ for repair in BEFORE if repair(model)]
    done = list(dict.fromkeys(names))
    inferred_shapes(model)  # of what the repairs have written
    if partly_used_splits(model, outputs):
        done.append(partly_used_splits.__name__)
        inferred_shapes(model)
    require_gradients(model, trainable, outputs)
    return tuple(done)


def prepare_for_evaluation(model: ir.Model, *, loss: str) -> None:
    """Write a graph for evaluation with the operators that training has.

    What the loss depends on is repaired as for the gradient builder. What it does not depend on,
    other outputs alone, is not trained either: of that, what ONNX Runtime gets wrong is repaired.

    Args:
        model: A forward graph in evaluation mode, edited in place.
        loss: Name of the loss among its outputs.

    Raises:
        ExportError: If a repair is not possible.
    """  # noqa: DOC502 - raised by the passes
    graph = model.graph
    names = [value.name for value in graph.outputs]
    trained = ancestors(graph.outputs[names.index(loss)])
    others = [node for node in graph if node not in trained]
    graph.outputs[:] = [v for v in graph.outputs if v.producer() not in others]
    graph.remove(others)  # they go on reading the others' results, whatever makes these
    for repair in BEFORE:
        if repair not in GRADIENTS_ALONE:
            repair(model)
    graph.extend(others)
    made = (value for node in graph for value in node.outputs)
    values = {v.name: v for v in (*graph.inputs, *graph.initializers.values(), *made)}
    graph.outputs[:] = [values[name] for name in names]
    inferred_shapes(model)
    for repair in MISCOMPUTED:
        repair(model)

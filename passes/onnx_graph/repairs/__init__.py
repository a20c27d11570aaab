"""What ONNX Runtime Training's gradient builder, or its optimizer, needs repaired, one pass each.

Each pass takes an `onnx_ir.Model`, edits it in place and returns the number of its changes; a
second application changes nothing. None changes the values that a forward graph computes, beyond
rounding.
"""

from tract_fx.passes.onnx_graph.repairs.activations import activations_as_primitives
from tract_fx.passes.onnx_graph.repairs.auto_pad import explicit_pads
from tract_fx.passes.onnx_graph.repairs.batch_norm import frozen_batch_norm, train_batch_norm
from tract_fx.passes.onnx_graph.repairs.casts import casts_like
from tract_fx.passes.onnx_graph.repairs.dropout import train_dropout
from tract_fx.passes.onnx_graph.repairs.einsum import einsums_as_products
from tract_fx.passes.onnx_graph.repairs.evaluation import (
    evaluation_mode,
    random_free,
    random_operators,
)
from tract_fx.passes.onnx_graph.repairs.gradients import (
    GradientPath,
    gradient_path,
    require_gradients,
    unreached_parameters,
)
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
from tract_fx.passes.onnx_graph.repairs.running_variance import unbiased_running_variance
from tract_fx.passes.onnx_graph.repairs.selections import full_size_selections
from tract_fx.passes.onnx_graph.repairs.sequence import (
    prepare_for_evaluation,
    prepare_for_gradients,
)
from tract_fx.passes.onnx_graph.repairs.sequences import partly_used_splits, sequences_as_splits
from tract_fx.passes.onnx_graph.repairs.shapes import inferred_shapes
from tract_fx.passes.onnx_graph.repairs.stop_gradients import (
    detached_values,
    steps_without_gradient,
)
from tract_fx.passes.onnx_graph.repairs.torch_exports import training_batch_norms
from tract_fx.passes.onnx_graph.repairs.transposed_convolution import (
    transposed_convolutions_as_convolutions,
)
from tract_fx.passes.onnx_graph.repairs.versions import supported_versions

__all__ = [
    "GradientPath",
    "activations_as_primitives",
    "average_pools_as_convolutions",
    "casts_like",
    "detached_values",
    "einsums_as_products",
    "evaluation_mode",
    "explicit_pads",
    "explicit_permutations",
    "extrema_as_primitives",
    "frozen_batch_norm",
    "full_size_selections",
    "gradient_path",
    "identity_permutations",
    "inferred_shapes",
    "layer_norm_biases",
    "max_pools_as_gathers",
    "named_nodes",
    "normalizations_as_primitives",
    "norms_of_everything",
    "optional_outputs",
    "paddings_as_gathers",
    "partly_used_splits",
    "powers_as_exponentials",
    "prepare_for_evaluation",
    "prepare_for_gradients",
    "random_free",
    "random_operators",
    "reductions_as_primitives",
    "require_gradients",
    "resizes_as_products",
    "reversals_as_gathers",
    "separate_operands",
    "sequences_as_splits",
    "steps_without_gradient",
    "strip_exporter_metadata",
    "supported_versions",
    "train_batch_norm",
    "train_dropout",
    "training_batch_norms",
    "transposed_convolutions_as_convolutions",
    "unbiased_running_variance",
    "unreached_parameters",
    "unread_operands",
    "variadic_as_binary",
    "vectors_as_matrices",
]

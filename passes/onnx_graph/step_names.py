"""Names of what a step's graph takes beside the batch and the model's tensors, and of its results.

They tell a graph for any ONNX Runtime, its update in it, from a forward graph.
"""

import onnx_ir as ir

GRADIENT, NEW = "_grad", "_new"
"""What follows a tensor's name in those of its gradient and of its value after the step."""

LEARNING_RATE = "learning_rate"
"""A float32."""

STEP = "step"
"""The number of updates before this one, as int64."""

IS_UPDATE = "is_update"
"""With accumulation, whether the micro-batch is an update's last; a bool."""

LOSS_SCALE, STEPS_WITH_SCALE = "loss_scale", "steps_with_loss_scale"
"""States of loss scaling, float32: what the loss is multiplied with, and since how many updates."""

GRADIENT_SUM = "gradient_sum"
"""What follows a parameter's name in that of the state that its gradients are added up in. Other
states have the names that torch.optim gives them."""


def has_update(model: ir.Model) -> bool:
    """Tell a step that makes its update itself."""
    given = {value.name for value in model.graph.inputs}
    new = {f"{name}{NEW}" for name in given}
    return LEARNING_RATE in given and any(value.name in new for value in model.graph.outputs)

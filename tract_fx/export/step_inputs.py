"""Names of what a step's graph takes beside the batch and the model's tensors."""

__all__ = ["GRADIENT_SUM", "IS_UPDATE", "LEARNING_RATE", "STEP"]

LEARNING_RATE = "learning_rate"
"""A float32."""

STEP = "step"
"""The number of updates before this one, as int64."""

IS_UPDATE = "is_update"
"""With accumulation, whether the micro-batch is an update's last; a bool."""

GRADIENT_SUM = "gradient_sum"
"""What follows a parameter's name in that of the state that its gradients are added up in. Other
states have the names that torch.optim gives them."""

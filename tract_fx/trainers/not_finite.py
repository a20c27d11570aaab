"""What a loss that is no finite number means."""

from __future__ import annotations

from tract_fx.artifacts.manifest import Manifest
from tract_fx.errors import NonFiniteLossWarning


def not_finite(loss: float, manifest: Manifest) -> NonFiniteLossWarning:
    """Say where a run has gone astray, by the counts of now, and what the usual reasons are."""
    reasons = [f"a learning rate ({manifest.rate:g}) too high", "NaN in the batch"]
    if any(spec.ignore_index is not None for spec in manifest.targets):
        reasons.append("a batch whose labels are all ignored")
    if manifest.precision != "float32":
        reasons.append(f"numbers beyond {manifest.precision}")
    return NonFiniteLossWarning(
        f"the loss of batch {manifest.batches} is {loss}: with it gradients, and soon parameters, "
        f"are no numbers. Usual reasons are {', '.join(reasons[:-1])} or {reasons[-1]}. Go back to "
        "a saved state with load, look at the batch, lower learning_rate. This is said once"
    )

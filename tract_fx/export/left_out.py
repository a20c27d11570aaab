"""Outputs that an exported model does without."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from tract_fx.errors import TractWarning


def warn_of_left_out(reasons: Mapping[str, str]) -> None:
    """Warn of outputs that an exported model does without."""
    for name, why in reasons.items():
        warnings.warn(
            f"the output {name!r}, which the loss does not read, is left out: {why}. Training is "
            "not touched, and predict() gives the other outputs.",
            TractWarning,
            stacklevel=2,
        )

"""Where in a run a batch stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where in a run a batch stands.

    Attributes:
        first: Whether it is the first of an update's micro-batches.
        last: Whether it is the last of them.
        updates: Number of updates before it.
        learning_rate: That of the update.
    """

    first: bool
    last: bool
    updates: int
    learning_rate: float

"""What an export passes along: forward graphs, ready for a loss and the gradient builder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from tract_fx.passes.records import InputLayer

__all__ = ["ForwardGraphs"]


@dataclass(frozen=True)
class ForwardGraphs:
    """A model's forward pass in training and in evaluation, with what is trained in it.

    Both graphs have the model's inputs and, under equal names, its outputs and its parameters (as
    initializers). Node names are unique.

    Attributes:
        train: The graph in training mode.
        evaluation: The graph in evaluation mode.
        layers: The calls that TrAct goes on in `train`, with their λ.
        trainable: Names of the parameters that an optimizer updates.
        frozen: Names of other tensors that a checkpoint holds: frozen parameters, and running
            statistics.
        counters: state_dict keys of integers that grow by one with every training batch.
        constants: state_dict keys that the graphs hold as constants.
        aliases: Further state_dict keys of a tensor, with the key under which it is kept.
        unused: state_dict keys that no graph needs, with their values.
        structure: The model's output with names in place of tensors; None for ONNX models.
    """

    train: ir.Model
    evaluation: ir.Model
    layers: tuple[InputLayer, ...]
    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    counters: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    structure: Any = None

    @property
    def lambdas(self) -> dict[str, float]:
        """λ by the name of the node that calls a treated layer."""
        return {r.node: r.lambda_ for r in self.layers if r.lambda_ is not None}

"""Evaluation mode of an exported program, whose mode stands in its graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tract_fx.export.no_dropout import without_attention_dropout
from tract_fx.modules import copy_tree

aten = torch.ops.aten

# The argument that says whether an operator trains.
_TRAINING: dict[Any, int] = {
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.native_dropout.default: 2,
    aten.batch_norm.default: 5,
    aten._native_batch_norm_legit.default: 5,
    aten._native_batch_norm_legit_functional.default: 5,
}


def in_evaluation(module: fx.GraphModule) -> fx.GraphModule:
    """Copy a program's module, with its dropout and its BatchNorm in evaluation mode."""
    evaluation = copy_tree(module)
    for node in evaluation.graph.nodes:
        place = _TRAINING.get(node.target)
        if place is not None and len(node.args) > place:
            node.update_arg(place, False)
        without_attention_dropout(node)
    evaluation.recompile()
    return evaluation

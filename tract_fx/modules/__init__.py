"""Layers whose forward carries TrAct's op, and copies of module trees that share tensors."""

from tract_fx.modules.layer import (
    TractLayer,
    is_standard,
    outside_steps,
    plain_class,
    to_plain,
    to_tract,
    tract_lambda,
    tract_scope,
)
from tract_fx.modules.reasons import TORCH_TRACT, Why, is_of_torch_tract, why_not
from tract_fx.modules.tree import copy_tree, named_tensors, still_reaches

__all__ = [
    "TORCH_TRACT",
    "TractLayer",
    "Why",
    "copy_tree",
    "is_of_torch_tract",
    "is_standard",
    "named_tensors",
    "outside_steps",
    "plain_class",
    "still_reaches",
    "to_plain",
    "to_tract",
    "tract_lambda",
    "tract_scope",
    "why_not",
]

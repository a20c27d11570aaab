"""Layers whose forward carries TrAct's op, and copies of module trees that share tensors."""

from tract_fx.modules.layer import (
    TractLayer,
    is_standard,
    plain_class,
    to_plain,
    to_tract,
    tract_lambda,
    tract_scope,
    why_not,
)
from tract_fx.modules.tree import copy_tree, named_tensors, still_reaches

__all__ = [
    "TractLayer",
    "copy_tree",
    "is_standard",
    "named_tensors",
    "plain_class",
    "still_reaches",
    "to_plain",
    "to_tract",
    "tract_lambda",
    "tract_scope",
    "why_not",
]

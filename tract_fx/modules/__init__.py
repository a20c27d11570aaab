"""Layers whose forward carries TrAct's op, and copies of module trees that share tensors."""

from tract_fx.modules.layer import TractLayer, plain_class, to_plain, to_tract, why_not
from tract_fx.modules.tree import copy_tree, still_reaches

__all__ = [
    "TractLayer",
    "copy_tree",
    "plain_class",
    "still_reaches",
    "to_plain",
    "to_tract",
    "why_not",
]

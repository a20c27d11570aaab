"""The pass on torch.fx graphs: locate → choose → rewrite, each usable alone."""

from tract_fx.passes.fx_graph.api import find_input_layers, remove_tract, tract_pass
from tract_fx.passes.fx_graph.choose import LayerChoice, choose, named_lambdas
from tract_fx.passes.fx_graph.find import Located, locate
from tract_fx.passes.fx_graph.rewrite import PROVENANCE, rewrite_graph

__all__ = [
    "PROVENANCE",
    "LayerChoice",
    "Located",
    "choose",
    "find_input_layers",
    "locate",
    "named_lambdas",
    "remove_tract",
    "rewrite_graph",
    "tract_pass",
]

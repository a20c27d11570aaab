"""The pass on torch.fx graphs: locate → choose → rewrite, each usable alone."""

from tract_fx.passes.choose import (
    Choice,
    LayerChoice,
    choose,
    read_choice,
    warn_of_frozen,
    warn_of_passed,
)
from tract_fx.passes.fx_graph.api import (
    find_input_layers,
    is_tract,
    layers_over_processes,
    remove_tract,
    tract_pass,
    treated_layers,
)
from tract_fx.passes.fx_graph.calls import PROVENANCE
from tract_fx.passes.fx_graph.find import Located, locate
from tract_fx.passes.fx_graph.models import refuse_wrapped
from tract_fx.passes.fx_graph.owners import weight_parameters
from tract_fx.passes.fx_graph.rewrite import rewrite_graph

__all__ = [
    "PROVENANCE",
    "Choice",
    "LayerChoice",
    "Located",
    "choose",
    "find_input_layers",
    "is_tract",
    "layers_over_processes",
    "locate",
    "read_choice",
    "refuse_wrapped",
    "remove_tract",
    "rewrite_graph",
    "tract_pass",
    "treated_layers",
    "warn_of_frozen",
    "warn_of_passed",
    "weight_parameters",
]

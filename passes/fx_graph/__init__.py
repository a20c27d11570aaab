"""The pass on torch.fx graphs: locate → choose → rewrite, each usable alone."""

from tract_fx.passes.choose import (
    LayerChoice,
    choose,
    named_lambdas,
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
from tract_fx.passes.fx_graph.find import Located, locate
from tract_fx.passes.fx_graph.models import refuse_wrapped
from tract_fx.passes.fx_graph.owners import weight_parameters
from tract_fx.passes.fx_graph.reasons import remedy_for
from tract_fx.passes.fx_graph.rewrite import PROVENANCE, rewrite_graph

__all__ = [
    "PROVENANCE",
    "LayerChoice",
    "Located",
    "choose",
    "find_input_layers",
    "is_tract",
    "layers_over_processes",
    "locate",
    "named_lambdas",
    "refuse_wrapped",
    "remedy_for",
    "remove_tract",
    "rewrite_graph",
    "tract_pass",
    "treated_layers",
    "warn_of_frozen",
    "warn_of_passed",
    "weight_parameters",
]

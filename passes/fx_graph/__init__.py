"""The pass on torch.fx graphs: locate → choose → rewrite, each usable alone."""

from tract_fx.passes.fx_graph.api import (
    find_input_layers,
    is_tract,
    layers_over_processes,
    remove_tract,
    tract_pass,
    treated_layers,
)
from tract_fx.passes.fx_graph.calls import PROVENANCE
from tract_fx.passes.fx_graph.find import locate
from tract_fx.passes.fx_graph.models import refuse_wrapped
from tract_fx.passes.fx_graph.owners import weight_parameters

__all__ = [
    "PROVENANCE",
    "find_input_layers",
    "is_tract",
    "layers_over_processes",
    "locate",
    "refuse_wrapped",
    "remove_tract",
    "tract_pass",
    "treated_layers",
    "weight_parameters",
]

"""The passes themselves, each also usable alone.

Lives in the folder `passes/` beside `tract_fx/` and is installed as `tract_fx.passes`.
"""

if __name__ == "passes":  # imported from the project's root, where it would be a second copy
    raise ImportError("passes is part of tract_fx: import tract_fx.passes")

from tract_fx.passes.fx_graph import find_input_layers, remove_tract, tract_pass
from tract_fx.passes.records import Findings, InputLayer, Refusal

__all__ = [
    "Findings",
    "InputLayer",
    "Refusal",
    "find_input_layers",
    "remove_tract",
    "tract_pass",
]

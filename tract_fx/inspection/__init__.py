"""Inspection: what the pass did, why, and that it is right. Recorded here, rendered in `render`."""

from tract_fx.inspection.api import inspect_graph
from tract_fx.inspection.inspection import Inspection

__all__ = ["Inspection", "inspect_graph"]

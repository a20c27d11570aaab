"""Inspection: what the pass did, why, and that it is right. Recorded here, rendered in `render`."""

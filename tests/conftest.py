"""Imports ONNX Runtime Training first, the way the library does.

Tests that import it themselves would leave another `torch.utils.checkpoint.checkpoint` to the tests
after them.
"""

import contextlib

from tract_fx.errors import MissingRuntimeError
from tract_fx.ort_training import runtime

with contextlib.suppress(MissingRuntimeError):
    runtime()

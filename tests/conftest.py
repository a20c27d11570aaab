"""What holds for all tests of a process: ONNX Runtime Training comes first, and exports share work.

Tests that import ONNX Runtime Training themselves, not the way the library does, would leave
another `torch.utils.checkpoint.checkpoint` to the tests after them.
"""

import contextlib
import functools

from tract_fx.errors import MissingRuntimeError
from tract_fx.ort_training import runtime

with contextlib.suppress(MissingRuntimeError):
    runtime()


def list_translations_once() -> None:
    """Keep the list of operator translations that PyTorch's exporter asks onnxscript for.

    Every export asks three times, and every time each of the 500 translations is found in its
    source file and parsed anew: half of the time of a small model's export. The list is the same
    each time, and the exporter only reads it: what it makes of the entries is made anew.
    """
    with contextlib.suppress(ImportError, AttributeError):  # other versions: slower, no less tested
        from torch.onnx._internal.exporter import _registration

        apis = _registration.onnxscript_apis
        apis.get_torchlib_ops = functools.cache(apis.get_torchlib_ops)


list_translations_once()

"""What holds for all tests of a process: ONNX Runtime Training comes first, and little is redone.

Tests that import ONNX Runtime Training themselves, not the way the library does, would leave
another `torch.utils.checkpoint.checkpoint` to the tests after them.
"""

import contextlib
import functools
import gc
import importlib
from typing import Any

from tract_fx.errors import MissingRuntimeError
from tract_fx.ort_training import runtime

with contextlib.suppress(MissingRuntimeError):
    runtime()


def read_translations_once() -> None:
    """Keep the list of operator translations that PyTorch's exporter asks onnxscript for.

    Every export asks three times, and each time all 500 translations are found in their source
    files and parsed anew, and their signatures made: half the time of a small model's export. Both
    are the same each time, and the exporter reads them only: of its own translations too, it makes
    the signatures once.
    """
    with contextlib.suppress(ImportError, AttributeError):  # other versions: slower, no less tested
        exporter: Any = importlib.import_module("torch.onnx._internal.exporter._registration")
        apis, schemas = exporter.onnxscript_apis, exporter._schemas
        apis.get_torchlib_ops = functools.cache(apis.get_torchlib_ops)
        schemas.op_signature_from_function = functools.cache(schemas.op_signature_from_function)


read_translations_once()


def pytest_collection_finish() -> None:
    """Keep what was imported out of the garbage collector's sight.

    It is a million objects that stay, and each full collection would go through them all: a fifth
    of an export's time. What tests make themselves is collected as ever.
    """
    gc.collect()
    gc.freeze()

"""Keep the chatter of exporters and of ONNX Runtime to itself."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, log records below errors, and what native code writes to standard error.

    PyTorch's exporter warns of packages that are not installed and of its own deprecations. What
    native code writes has no logger that could be told, so that the file descriptor is turned away.
    Exceptions come through.
    """
    sys.stderr.flush()
    disabled = logging.root.manager.disable
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
            os.dup2(nowhere.fileno(), 2)
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        os.dup2(kept, 2)
        os.close(kept)

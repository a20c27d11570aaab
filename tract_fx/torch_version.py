"""Which versions of PyTorch this package works with. Checked when the package is imported."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

from tract_fx.errors import MissingRuntimeError, UntestedVersionWarning

OLDEST = (2, 11)
NEWEST_TESTED = (2, 15)
TESTED = "2.11 to 2.15"


def check_torch(version: str) -> None:
    """Refuse a PyTorch that is too old; say so where it is newer than any that was tested."""
    number = version_number(version)
    if number < OLDEST:
        error = MissingRuntimeError(
            f"torch {version}",
            "tract_fx needs 2.11 or newer, for what keeps TrAct in compiled and exported models",
            "pip install --upgrade 'torch>=2.11'",
        )
        if _in_own_command():
            sys.exit(f"error: {error}")
        raise error
    if number > NEWEST_TESTED:
        warnings.warn(
            f"torch {version} is newer than any that this tract_fx was tested with ({TESTED}). "
            "Run tract-fx doctor: it checks TrAct's gradients here, and says what a bug report "
            "needs",
            UntestedVersionWarning,
            stacklevel=4,
        )


def version_number(version: str) -> tuple[int, ...]:
    """Read a version's first two numbers."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _in_own_command() -> bool:
    """Tell whether this is `tract-fx`, which can't catch what its own import raises."""
    command = sys.orig_argv[1:3]
    return command == ["-m", "tract_fx"] or [Path(a).stem for a in command[:1]] == ["tract-fx"]


with warnings.catch_warnings():
    # PyTorch's import says that there is no numpy, which nothing here needs without an extra.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    import torch

check_torch(torch.__version__)

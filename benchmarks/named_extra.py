"""Lets a benchmark whose packages are missing end with the extra that brings them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import _named_extra  # noqa: F401

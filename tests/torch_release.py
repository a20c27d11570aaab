"""Tests that do not hold under some releases of PyTorch, through no fault of this library."""

from __future__ import annotations

import re

import pytest
import torch

__all__ = ["RELEASE", "before"]

RELEASE = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))


def before(release: tuple[int, int], reason: str) -> pytest.MarkDecorator:
    """Skip a test where PyTorch is older than a release, for a reason that is PyTorch's own."""
    return pytest.mark.skipif(RELEASE < release, reason=f"torch {torch.__version__}: {reason}")

"""The demo's images and net, for benchmarks of training."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _demo_data import Dataset, Split, read_digits, read_image_folder
from _demo_training import initial_model

__all__ = ["Dataset", "Split", "digits", "initial_model", "read"]


def read(folder: Path, train: int, test: int) -> Dataset:
    """Read so many standardised images of 32 × 32 pixels; 0 for all."""
    return read_image_folder(folder, image_size=32, train_limit=train, test_limit=test)


def digits() -> Dataset:
    """scikit-learn's digits, where there is no folder."""
    return read_digits()

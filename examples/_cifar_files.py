"""Files that are whole or not there, however the process that writes them ends."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch


def write_whole(path: Path, data: bytes) -> None:
    """Write beside the place, then rename; what a killed process leaves there is written over."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def write_json(path: Path, record: Any) -> None:
    """Write a record as JSON."""
    write_whole(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def write_tensors(path: Path, record: Any) -> None:
    """Write tensors and what surrounds them, as `torch.save` does."""
    buffer = io.BytesIO()
    torch.save(record, buffer)
    write_whole(path, buffer.getvalue())

"""What all benchmarks print and write alike: aims reached or not, the machine, JSON."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aims import Aim, as_error, as_ratio

OUT = Path("build/bench")
MISSING = "–"
PACKAGES = (
    "torch",
    "torch-tract",
    "onnxruntime-training-cpu",
    "onnxruntime-training",
    "tract_fx",
)


def versions() -> dict[str, str]:
    """The packages that are measured."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """What the figures are of: processor, threads, versions; the accelerator, where it is one."""
    record: dict[str, Any] = {
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(),
    }
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["device"] = properties.name
        record["device_memory_bytes"] = properties.total_memory
        record["cuda"] = torch.version.cuda
    return record


def _processor() -> str:
    """The processor's name, as Linux gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def against(
    value: float | None, aim: Aim | None = None, write: Callable[[float], str] = as_ratio
) -> Text:
    """A cell: the figure and, below it, its aim, marked and coloured as reached or not."""
    if value is None:
        return Text(MISSING)
    if aim is None:
        return Text(write(value))
    mark, colour = ("✓", "green") if aim.reached(value) else ("✗", "red")
    return Text.assemble((f"{aim.write(value)} {mark}", colour), "\n", (str(aim), "dim"))


def error_cell(errors: dict[str, float], aim: Aim | None) -> Text:
    """A cell: our error, which is not to exceed the aim nor torch-tract's, and that below it."""
    peer = errors.get("torch-tract")
    if aim is not None and peer is not None:
        aim = dataclasses.replace(aim, bound=min(aim.bound, peer))
    ours = against(errors["tract_fx"], aim, as_error).split()[0]
    return Text.assemble(ours, "\n", (MISSING if peer is None else as_error(peer), "dim"))


def table(title: str, first: str, *columns: str) -> Table:
    """An empty table, whose figures stand to the right."""
    made = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    made.add_column(first, no_wrap=True)
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    return made


def save(console: Console, path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    console.print(f"saved {path}")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Let a script that is for a device be told where it writes, and be tried out without one."""
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the JSON (%(default)s)")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu tries the script out, by the wall clock (%(default)s)",
    )

"""`tract-fx doctor`: what is installed, and whether TrAct's gradients are right here."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch
import typer
from rich.markup import escape
from rich.table import Table

from tract_fx import __version__, torch_version
from tract_fx.shell.doctor_checks import TOLERANCE, Check, checks, devices
from tract_fx.shell.reporting import Debug, output, printing, reporting, status

# By distribution, with the extra that brings it.
_PACKAGES = {
    "numpy": "onnx",
    "onnx": "onnx",
    "onnx-ir": "onnx",
    "onnxscript": "onnx",
    "matplotlib": "plot",
    "graphviz": "inspect",
    "jinja2": "inspect",
}
# They share one import name, so that one of them is there at most.
_RUNTIMES = (
    "onnxruntime-training-cpu",
    "onnxruntime-training",
    "onnxruntime",
    "onnxruntime-gpu",
)
_COLOURS = {"right": "green", "wrong": "bold red", "failed": "bold red", "not made": "yellow"}


@reporting
def doctor(debug: Debug = False) -> None:
    """Say what is installed, and check TrAct's gradients on every device and runtime found.

    Each check is one step of a small model, compared with the definition in float64. Put the
    output into a bug report.

    \b
    Example:
      tract-fx doctor
    """  # noqa: D301 (typer's Exit ends the command; click keeps the lines of a paragraph that begins with \b)
    with printing():
        output().print(_installed(), _devices(), sep="\n")
    made = []
    table = _table(f"A step with TrAct: error against float64, {TOLERANCE:.0e} allowed")
    with status("Checking gradients"):
        for check in checks():
            made.append(check)
            colour = _COLOURS[check.verdict]
            error = check.detail if check.verdict in ("right", "wrong") else ""
            table.add_row(check.what, check.device, f"[{colour}]{check.verdict}[/]", error)
    with printing():
        output().print(table)
        for check in made:
            if check.verdict not in ("right", "wrong"):
                output().print(escape(f"{check.what}: {check.detail}"), soft_wrap=True)
        output().print(_conclusion(made), soft_wrap=True)
    if any(check.verdict in ("wrong", "failed") for check in made):
        raise typer.Exit(1)


def _table(title: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", show_header=False, box=None
    )
    table.add_column(no_wrap=True)
    return table


def _installed() -> Table:
    table = _table("Installed")
    table.add_row("tract_fx", __version__)
    table.add_row("Python", f"{platform.python_version()}, {platform.platform()}")
    table.add_row("torch", f"{torch.__version__} (tested: {torch_version.TESTED})")
    for package, extra in _PACKAGES.items():
        table.add_row(package, _version(package) or f"[yellow]not installed[/] (extra {extra})")
    runtimes = [f"{name} {_version(name)}" for name in _RUNTIMES if _version(name)]
    missing = "[yellow]not installed[/] (extra ort-training)"
    table.add_row("ONNX Runtime", ", ".join(runtimes) or missing)
    dot = shutil.which("dot")
    table.add_row(
        "dot (Graphviz)", escape(dot) if dot else "[yellow]not found[/], pictures are text"
    )
    return table


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> Table:
    table = _table("Devices of PyTorch")
    for device in devices():
        table.add_row(str(device), escape(_described(device)))
    return table


def _described(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if device.type != "cuda":
        return ""
    p = torch.cuda.get_device_properties(device)
    return (
        f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}, "
        f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    )


def _conclusion(made: list[Check]) -> str:
    wrong = [check for check in made if check.verdict in ("wrong", "failed")]
    left = sum(check.verdict == "not made" for check in made)
    if wrong:
        names = "; ".join(f"{c.what} on {c.device}, {c.verdict}" for c in wrong)
        return f"[bold red]not right[/]: {escape(names)}"
    rest = f", {left} not made" if left else ""
    return f"[bold green]right[/]: {len(made) - left} of {len(made)} checks{rest}"

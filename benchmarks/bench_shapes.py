"""Some fifty first layers that exist: plain, torch-tract's and ours, and the worst of them.

python benchmarks/bench_shapes.py [--seconds 1.5] [--quick] [--out FOLDER] [name …]

Needs the extra `test`.
"""

from __future__ import annotations

import named_extra  # noqa: F401  # isort: skip

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from aims import as_ratio
from layer_figures import running_steps
from operator_errors import precondition, relative_error, tract_gradient
from peaks import Peaks, measure_peaks
from precision import FLOAT32
from report import MISSING, OUT, machine, save, table
from shapes import SHAPES, Shape, products
from stems import LAMBDA, arms, weight_gradient
from timing import interleaved, pin_allocator
from tract_fx.preconditioner import PatchGeometry

THREADS = 2
_ALLOWED = 0.2  # milliseconds of calls, beside the floor
_WORST = 5
_ORACLE = 2048  # columns, or rows, up to which the float64 oracle is quick


@dataclass(frozen=True)
class Figures:
    """One layer's figures.

    Attributes:
        name: Of the layer.
        rows: R.
        columns: n.
        milliseconds: Medians of forward and backward, by arm.
        floor: The plain layer's time, and TrAct's products at this machine's best rate, in ms.
        error: Of the weight's gradient against float64; None where that takes long.
    """

    name: str
    rows: int
    columns: int
    milliseconds: dict[str, float]
    floor: float
    error: float | None

    @property
    def over_plain(self) -> float:
        """Ours ÷ plain."""
        return self.milliseconds["tract_fx"] / self.milliseconds["plain"]

    @property
    def over_peer(self) -> float | None:
        """Ours ÷ torch-tract, None where that can't run."""
        peer = self.milliseconds.get("torch-tract")
        return None if peer is None else self.milliseconds["tract_fx"] / peer

    @property
    def over_floor(self) -> float:
        """Ours, less 0.2 ms, ÷ the floor."""
        return max(0.0, self.milliseconds["tract_fx"] - _ALLOWED) / self.floor


def measure(shape: Shape, peaks: Peaks, seconds: float) -> Figures:
    """Time a layer's arms in turn, for about so many seconds, and compare the gradient."""
    torch.manual_seed(0)
    layer = shape.build()
    x = torch.randn(shape.input_shape)
    steps, _ = running_steps(nn.Sequential(layer), [x], FLOAT32)
    once = interleaved(steps, 1, threads=THREADS, warm_ups=1)
    rounds = int(min(200, max(3, seconds * 1e3 / (2 * sum(once.values())))))
    times = interleaved(steps, rounds, threads=THREADS)
    geometry = PatchGeometry.of_module(layer)
    rows, columns = geometry.rows(geometry.batched(x)), geometry.columns(geometry.batched(x))
    extra = 2e3 * products(layer, rows) / peaks.flops
    return Figures(
        shape.name, rows, columns, times, times["plain"] + extra, _error(layer, x, rows, columns)
    )


def _error(layer: nn.Module, x: torch.Tensor, rows: int, columns: int) -> float | None:
    """At the operator with R ≥ n, end to end with fewer: there no gradient is given."""
    if columns > _ORACLE or x.numel() > 1 << 22:
        return None
    dz = torch.randn_like(layer(x))
    models = arms(nn.Sequential(layer))
    found = weight_gradient(models["tract_fx"], x, dz)
    if rows < columns:
        return relative_error(found, tract_gradient(layer, x, dz, LAMBDA))
    plain = weight_gradient(models["plain"], x, dz)
    operator = relative_error(found, precondition(layer, plain, x, LAMBDA))
    return min(operator, relative_error(found, tract_gradient(layer, x, dz, LAMBDA)))


def print_figures(title: str, rows: Sequence[Figures], console: Console) -> None:
    """Print a table."""
    printed = table(
        title, "", "R × n", "plain,\nms", "ours\n÷ plain", "peer\n÷ plain", "÷ floor", "error"
    )
    printed.caption = "peer: torch-tract; ÷ floor: ours less 0.2 ms ÷ plain and products at peak"
    for row in rows:
        peer = row.milliseconds.get("torch-tract")
        plain = row.milliseconds["plain"]
        printed.add_row(
            row.name.replace(", batch", ",\nbatch"),
            f"{row.rows} × {row.columns}",
            f"{plain:.3f}",
            as_ratio(row.over_plain),
            MISSING if peer is None else as_ratio(peer / plain),
            as_ratio(row.over_floor),
            MISSING if row.error is None else f"{row.error:.1e}",
        )
    console.print(printed)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("names", nargs="*", help="only layers whose name has one of these in it")
    made.add_argument("--seconds", type=float, default=1.5, help="for each layer (%(default)s)")
    made.add_argument("--quick", action="store_true", help="a tenth of that, small layers alone")
    made.add_argument("--out", type=Path, default=OUT, help="folder for JSON (%(default)s)")
    return made


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure and print everything.

    Args:
        options: The parser's.
        console: Where to.

    Returns:
        The record.
    """
    torch.set_num_threads(THREADS)
    clock = functools.partial(interleaved, threads=THREADS, warm_ups=1)
    peaks = measure_peaks(clock, torch.device("cpu"), repeats=3 if options.quick else 9)
    console.print(f"measured peaks: {peaks}")
    chosen = [s for s in SHAPES if not options.names or any(n in s.name for n in options.names)]
    if options.quick:
        chosen = [s for s in chosen if torch.Size(s.input_shape).numel() < 1 << 16]
    seconds = options.seconds / 10 if options.quick else options.seconds
    rows = [measure(s, peaks, seconds) for s in track(chosen, "first layers", console=console)]
    print_figures(f"First layers, float32, {THREADS} threads", rows, console)
    worst: dict[str, Callable[[Figures], float]] = {
        "The worst beside torch-tract": lambda row: row.over_peer or 0.0,
        "The worst beside the floor": lambda row: row.over_floor,
    }
    for title, key in worst.items():
        print_figures(title, sorted(rows, key=key, reverse=True)[:_WORST], console)
    return {**machine(), "peaks": asdict(peaks), "layers": [asdict(row) for row in rows]}


def main() -> None:
    options = parser().parse_args()
    pin_allocator()
    console = Console()
    save(console, options.out / "shapes.json", run(options, console))


if __name__ == "__main__":
    main()

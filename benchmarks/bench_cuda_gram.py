"""Ways to compute a first layer's Gram and its solve on a GPU, to choose among: time and error.

For each layer the fastest ways are printed and all are written: the library's plan and others, in
float64 and float32, in pieces of several sizes, one Triton kernel in float64, and exact products of
8-bit integers. Then the solve by n. Errors are relative to the library's, in float64.

python benchmarks/bench_cuda_gram.py [--repeats 10] [--quick] [--out FOLDER]

Needs the extra `test`, and Triton for its kernel. TRITON_INTERPRET=1 and --device cpu --quick try
the script out.
"""

from __future__ import annotations

import named_extra  # noqa: F401  # isort: skip

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from aims import as_error
from gram_candidates import gram_candidates
from layer_figures import InTurn
from report import add_device_options, machine, save, table
from timing import Clock, device_interleaved, interleaved, pin_allocator
from tract_fx.preconditioner import PatchGeometry
from tract_fx.torch_private import full_precision

LAYERS: dict[str, tuple[Callable[[], nn.Conv2d], tuple[int, ...]]] = {
    "ImageNet 7x7/2": (lambda: nn.Conv2d(3, 64, 7, 2, 3), (256, 3, 224, 224)),
    "CIFAR 3x3": (lambda: nn.Conv2d(3, 64, 3, 1, 1), (128, 3, 32, 32)),
    "ViT 16x16/16": (lambda: nn.Conv2d(3, 768, 16, 16), (256, 3, 224, 224)),
    "MobileNet 3x3/2": (lambda: nn.Conv2d(3, 32, 3, 2, 1), (256, 3, 224, 224)),
}
QUICK = {"7x7/2": (LAYERS["ImageNet 7x7/2"][0], (2, 3, 20, 20))}
COLUMNS = (27, 48, 147, 768)
PRINTED = 12


def gram_rows(
    layer: nn.Conv2d, shape: tuple[int, ...], clock: Clock, device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    """Time and error of each way for one layer, the fastest first, or what a way raises."""
    geometry = PatchGeometry.of_module(layer)
    batches = [torch.randn(shape, device=device) for _ in range(2)]
    found: list[dict[str, Any]] = []
    exact: Tensor | None = None
    for candidate in track(list(gram_candidates(batches[0], geometry)), "ways"):
        row: dict[str, Any] = {"way": candidate.name}
        try:
            result = candidate.compute(batches[0]).double()
            exact = result if exact is None else exact
            row["error"] = float(torch.linalg.norm(result - exact) / torch.linalg.norm(exact))
            row["milliseconds"] = clock({"": InTurn(candidate.compute, batches)}, repeats)[""]
        except (RuntimeError, ValueError) as failure:
            row["failure"] = str(failure).splitlines()[0]
        found.append(row)
    return sorted(found, key=lambda row: row.get("milliseconds", torch.inf))


def solves(n: int, outputs: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Ways to solve for a gradient of some outputs with a Gram of n columns."""
    rows = torch.randn(4 * n, n, device=device, dtype=dtype)
    gram = rows.mT @ rows / len(rows) + 0.1 * torch.eye(n, device=device, dtype=dtype)
    gw = torch.randn(outputs, n, device=device, dtype=dtype)

    def triangular() -> Tensor:
        factor, _ = torch.linalg.cholesky_ex(gram)
        half = torch.linalg.solve_triangular(factor, gw.mT, upper=False)
        solved: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        return solved.mT

    return {
        "Cholesky": lambda: torch.linalg.cholesky_ex(gram),
        "Cholesky, two triangular solves": triangular,
        "Cholesky, cholesky_solve": lambda: torch.cholesky_solve(
            gw.mT, torch.linalg.cholesky_ex(gram)[0]
        ),
        "Cholesky, inverse, product": lambda: (
            gw @ torch.cholesky_inverse(torch.linalg.cholesky_ex(gram)[0])
        ),
        "LU": lambda: torch.linalg.solve_ex(gram, gw.mT),
        "inverse by LU, product": lambda: gw @ torch.linalg.inv_ex(gram)[0],
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--repeats", type=int, default=10, help="rounds (%(default)s)")
    made.add_argument("--quick", action="store_true", help="one round of one small layer")
    add_device_options(made)
    return made


def main() -> int:
    options = parser().parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench_cuda_gram: no CUDA device here, nothing measured")
        return 0
    pin_allocator()
    console, device = Console(), torch.device(options.device)
    repeats = 1 if options.quick else options.repeats
    clock = (
        device_interleaved if device.type == "cuda" else functools.partial(interleaved, warm_ups=0)
    )
    record: dict[str, Any] = {**machine(device), "repeats": repeats, "grams": {}, "solves": {}}
    with full_precision(device):
        for name, (build, shape) in (QUICK if options.quick else LAYERS).items():
            rows = gram_rows(build().to(device), shape, clock, device, repeats)
            record["grams"][name] = {"shape": shape, "ways": rows}
            printed = table(f"The Gram of {name}, {'x'.join(map(str, shape))}", "", "ms", "error")
            for row in [*rows[:PRINTED], *(r for r in rows[PRINTED:] if "library" in r["way"])]:
                if "failure" not in row:
                    error = as_error(row["error"])
                    printed.add_row(row["way"], f"{row['milliseconds']:.3f}", error)
            console.print(printed)
            for failure in {row["failure"] for row in rows if "failure" in row}:
                console.print(f"failed: {failure}")
            save(console, options.out / "cuda_gram.json", record)
        for n in COLUMNS[:1] if options.quick else COLUMNS:
            for dtype in (torch.float64, torch.float32):
                times = clock(solves(n, 64, dtype, device), repeats)
                record["solves"][f"{n}, {dtype}"] = times
                for way, milliseconds in times.items():
                    console.print(f"n = {n}, {dtype}: {milliseconds:.3f} ms, {way}")
    save(console, options.out / "cuda_gram.json", record)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The benchmark of the Gram on CUDA: float32, float32 with TF32 allowed, bfloat16 autocast.

Times lie between device events. Every row is checked against float64 on the device, and a step of
ours for synchronisations: what fails is printed, and makes the script fail.

python benchmarks/bench_cuda.py [--repeats 20] [--quick] [--compile] [--precision tf32]
    [--out FOLDER]

Needs the extra `test`.
"""

from __future__ import annotations

import named_extra  # noqa: F401  # isort: skip

import argparse
import sys

import torch

from report import add_device_options
from timing import pin_allocator


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--repeats", type=int, help="rounds, each arm once (20, or 2 if quick)")
    made.add_argument(
        "--quick", action="store_true", help="few rounds, no batches of 256, whole nets on 2 images"
    )
    made.add_argument("--compile", action="store_true", help="whole nets compiled, too: minutes")
    made.add_argument("--precision", choices=("float32", "tf32", "bfloat16"), help="one of three")
    add_device_options(made)
    return made


def main() -> int:
    options = parser().parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench_cuda: no CUDA device here, nothing measured")
        return 0
    pin_allocator()
    # Imported here, for it takes seconds that nobody without a device has to wait.
    from accelerator import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main())

"""Time of a training step in ONNX Runtime and in PyTorch, TrAct's ÷ plain, in one run.

python benchmarks/bench_ort_training.py [--repeats 3] [--quick] [--only ViT] [--out FOLDER]

Needs the extra `test`.
"""

from __future__ import annotations

import named_extra  # noqa: F401  # isort: skip

import argparse
import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from report import OUT, against, machine, save, table
from timing import interleaved, pin_allocator
from tract_fx import SGD, AdamW, export_training, load_trainer, tract_pass
from tract_fx.artifacts.record_json import encode
from training_steps import training_step
from whole_nets import NETS, QUICK_NETS, Net

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ort_step(
    model: nn.Module, optimizer: SGD | AdamW, x: Tensor, y: Tensor
) -> Callable[[], object]:
    """A step in ONNX Runtime Training: forward, loss, backward, update.

    Plain where the model has no TrAct.
    """
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch, "artifacts")
        plain = not isinstance(model, torch.fx.GraphModule)
        export_training(model, x, directory, optimizer=optimizer, plain=plain, verify=False)
        trainer = load_trainer(directory)
    return lambda: trainer.train_step(x, y)


def pytorch_step(
    model: nn.Module, optimizer: SGD | AdamW, x: Tensor, y: Tensor
) -> Callable[[], object]:
    """The same step in PyTorch."""
    return training_step(model, optimizer, [(x, y)])


def measure(net: Net, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by runtime and arm.

    The runtimes' turns come one after the other: their threads, which spin for a while after a
    step, would take each other's cores.
    """
    torch.manual_seed(0)
    model = net.build()
    x, y = net.example()
    times = {}
    for runtime, make in (("onnx_runtime", ort_step), ("pytorch", pytorch_step)):
        arms = {
            "plain": copy.deepcopy(model),
            "tract": tract_pass(torch.fx.symbolic_trace(copy.deepcopy(model))),
        }
        steps = {arm: make(arms[arm], net.optimizer, x, y) for arm in arms}
        times[runtime] = interleaved(steps, rounds, threads=THREADS)
    return times


def rounds_for(net: Net, repeats: int) -> int:
    """More rounds for what is small and noisy: images of 224², 32², 8² count 1, 2, 10 times."""
    side = net.shape[-1]
    return repeats * (1 if side > 32 else 2 if side > 8 else 10)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--repeats", type=int, default=3, help="rounds at 224² (%(default)s)")
    made.add_argument("--quick", action="store_true", help="one round of one small net")
    made.add_argument("--only", default="", help="nets whose line in the table holds this")
    made.add_argument("--out", type=Path, default=OUT, help="folder for the JSON (%(default)s)")
    return made


def main() -> None:
    options = parser().parse_args()
    pin_allocator()
    console = Console()
    nets = [net for net in (QUICK_NETS if options.quick else NETS) if options.only in str(net)]
    title = f"A training step: plain in ms, TrAct ÷ plain (aim in ONNX Runtime); {THREADS} threads"
    printed = table(title, "", "ORT,\nms", "TrAct\n÷", "PyTorch,\nms", "TrAct\n÷")
    records: list[dict[str, Any]] = []
    for net in track(nets, "nets", console=console):
        rounds = 1 if options.quick else rounds_for(net, options.repeats)
        times = measure(net, rounds)
        ratio = {runtime: arms["tract"] / arms["plain"] for runtime, arms in times.items()}
        records.append(
            {
                "net": str(net),
                "shape": net.shape,
                "optimizer": encode(net.optimizer),
                "rounds": rounds,
                "milliseconds": times,
                "tract_over_plain": ratio,
                "aim": net.aim and net.aim.bound,
            }
        )
        row = (
            f"{times['onnx_runtime']['plain']:.1f}",
            against(ratio["onnx_runtime"], net.aim),
            f"{times['pytorch']['plain']:.1f}",
            f"{ratio['pytorch']:.3f}",
        )
        printed.add_row(str(net), *row)
        # As they come: the whole takes minutes.
        console.print(f"{net}: ÷ {ratio['onnx_runtime']:.3f}, ÷ {ratio['pytorch']:.3f}")
    console.print(printed)
    record = {**machine(), "threads": THREADS, "quick": options.quick, "nets": records}
    save(console, options.out / "ort_training.json", record)


if __name__ == "__main__":
    main()

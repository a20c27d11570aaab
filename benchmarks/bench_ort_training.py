"""Time of a training step in ONNX Runtime and in PyTorch, TrAct's ÷ plain, in one run.

python benchmarks/bench_ort_training.py [--repeats 3] [--quick] [--only ViT] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from timing import interleaved, pin_allocator
from tract_fx import SGD, AdamW, export_training, load_trainer, tract_pass
from tract_fx.export.record_json import encode
from whole_nets import NETS, Net

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
PACKAGES = ("torch", "onnxruntime-training-cpu", "onnxruntime-training", "tract_fx")


def torch_step(
    model: nn.Module, optimizer: SGD | AdamW, x: Tensor, y: Tensor
) -> Callable[[], object]:
    """A step in PyTorch: forward, loss, backward, update."""
    settings = {
        field.name: getattr(optimizer, field.name)
        for field in dataclasses.fields(optimizer)
        if field.name not in {"max_grad_norm", "accumulate"}
    }
    update = getattr(torch.optim, type(optimizer).__name__)(model.parameters(), **settings)

    def step() -> float:
        update.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        update.step()
        return loss.item()

    return step


def ort_step(
    model: nn.Module, optimizer: SGD | AdamW, x: Tensor, y: Tensor
) -> Callable[[], object]:
    """The same step in ONNX Runtime Training; plain where the model has no TrAct."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch, "artifacts")
        plain = not isinstance(model, torch.fx.GraphModule)
        export_training(model, x, directory, optimizer=optimizer, plain=plain, verify=False)
        trainer = load_trainer(directory)
    return lambda: trainer.train_step(x, y)


def measure(net: Net, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by runtime and arm.

    The runtimes' turns come one after the other: their threads, which spin for a while after a
    step, would take each other's cores.
    """
    torch.manual_seed(0)
    model = net.build()
    x, y = net.example()
    times = {}
    for runtime, make in (("onnx_runtime", ort_step), ("pytorch", torch_step)):
        arms = {
            "plain": copy.deepcopy(model),
            "tract": tract_pass(torch.fx.symbolic_trace(copy.deepcopy(model))),
        }
        steps = {arm: make(arms[arm], net.optimizer, x, y) for arm in arms}
        times[runtime] = interleaved(steps, rounds, threads=THREADS)
    return times


def rounds_for(net: Net, repeats: int) -> int:
    """More rounds for what is small and noisy: images of 224², 32², 8² count 1, 3, 10 times."""
    side = net.shape[-1]
    return repeats * (1 if side > 32 else 3 if side > 8 else 10)


def versions() -> dict[str, str]:
    """The packages that are measured."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="rounds at 224² (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round, an eighth of the batch")
    parser.add_argument("--only", default="", help="nets whose line in the table holds this")
    parser.add_argument("--out", type=Path, default=Path("build/bench/ort_training.json"))
    options = parser.parse_args()
    pin_allocator()
    nets = [net for net in NETS if options.only in str(net)]
    if options.quick:
        nets = [dataclasses.replace(n, shape=(n.shape[0] // 8, *n.shape[1:])) for n in nets]
    title = f"A training step: plain in ms, TrAct ÷ plain; {THREADS} threads"
    table = Table("", title=title, box=SIMPLE_HEAD)
    for column in ("ORT,\nms", "TrAct\n÷", "aim", "PyTorch,\nms", "TrAct\n÷"):
        table.add_column(column, justify="right", no_wrap=True)
    console, records = Console(), []
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
                "aim": net.aim,
            }
        )
        row = (
            str(net),
            f"{times['onnx_runtime']['plain']:.1f}",
            f"{ratio['onnx_runtime']:.3f}",
            f"≤ {net.aim:.2f}",
            f"{times['pytorch']['plain']:.1f}",
            f"{ratio['pytorch']:.3f}",
        )
        table.add_row(*row)
        console.print("  ".join(row))  # as they come: the whole takes a quarter of an hour
        written = {"threads": THREADS, "quick": options.quick, "versions": versions()}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**written, "nets": records}, indent=2) + "\n")
    console.print(table)
    console.print(f"saved {options.out}")


if __name__ == "__main__":
    main()

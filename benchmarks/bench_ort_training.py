"""Time of a training step in ONNX Runtime and in PyTorch, TrAct's ÷ plain, in one run.

python benchmarks/bench_ort_training.py [--repeats 3] [--quick] [--only ViT] [--out FOLDER]
    [--target onnxruntime] [--device cuda] [--compile]

Needs the extra `test`; the device's ONNX Runtime in its place for a GPU.
"""

from __future__ import annotations

import named_extra  # noqa: F401  # isort: skip

import argparse
import copy
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console
from rich.progress import track
from rich.text import Text
from torch import Tensor, nn

from report import OUT, against, machine, save, table
from timing import interleaved, pin_allocator
from tract_fx import SGD, AdamW, export_training, load_trainer, tract_pass
from tract_fx.artifacts.record_json import encode
from training_steps import training_step
from whole_nets import NETS, QUICK_NETS, Net

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Where:
    """What steps are timed in.

    Attributes:
        target: The export's.
        device: Of both runtimes.
    """

    target: Literal["ort-training", "onnxruntime"]
    device: str

    def ort_step(
        self, model: nn.Module, optimizer: SGD | AdamW, x: Tensor, y: Tensor
    ) -> Callable[[], object]:
        """A step in ONNX Runtime: forward, loss, backward, update.

        Plain where the model has no TrAct. On a GPU the step of any ONNX Runtime reads the batch
        where it lies.
        """
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch, "artifacts")
            plain = not isinstance(model, torch.fx.GraphModule)
            options: Any = {"plain": plain, "verify": False, "target": self.target}
            export_training(model, x, directory, optimizer=optimizer, **options)
            trainer = load_trainer(directory, device=self.device)
        if self.target == "onnxruntime":
            x, y = x.to(self.device), y.to(self.device)
        return lambda: trainer.train_step(x, y)

    def pytorch_step(
        self, model: nn.Module, optimizer: SGD | AdamW, x: Tensor, y: Tensor
    ) -> Callable[[], object]:
        """The same step in PyTorch, which waits for its loss too."""
        batch = x.to(self.device), y.to(self.device)
        step = training_step(model.to(self.device), optimizer, [batch])
        return lambda: step().item()

    def compiled_step(
        self, model: nn.Module, optimizer: SGD | AdamW, x: Tensor, y: Tensor
    ) -> Callable[[], object]:
        """The same by `torch.compile`."""
        compiled = cast(nn.Module, torch.compile(model.to(self.device)))
        return self.pytorch_step(compiled, optimizer, x, y)


def measure(net: Net, rounds: int, where: Where, compiled: bool) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by runtime and arm.

    The runtimes' turns come one after the other: their threads, which spin for a while after a
    step, would take each other's cores.
    """
    torch.manual_seed(0)
    model = net.build()
    x, y = net.example()
    times = {}
    makers = {"onnx_runtime": where.ort_step, "pytorch": where.pytorch_step}
    makers |= {"compiled": where.compiled_step} if compiled else {}
    for runtime, make in makers.items():
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
    made.add_argument("--target", choices=("ort-training", "onnxruntime"), default="ort-training")
    made.add_argument("--device", default="cpu", help="%(default)s, cuda")
    made.add_argument("--compile", action="store_true", help="PyTorch's step compiled, too")
    made.add_argument("--out", type=Path, default=OUT, help="folder for the JSON (%(default)s)")
    return made


def main() -> None:
    options = parser().parse_args()
    pin_allocator()
    console = Console()
    nets = [net for net in (QUICK_NETS if options.quick else NETS) if options.only in str(net)]
    where = Where(options.target, options.device)
    title = f"A training step: plain in ms, TrAct ÷ plain (aim in ONNX Runtime); {THREADS} threads"
    names = {"onnx_runtime": "ORT", "pytorch": "PyTorch", "compiled": "compiled"}
    heads = [f"{name},\nms" for name in names.values()][: 3 if options.compile else 2]
    printed = table(title, "", *(head for name in heads for head in (name, "TrAct\n÷")))
    records: list[dict[str, Any]] = []
    for net in track(nets, "nets", console=console):
        rounds = 1 if options.quick else rounds_for(net, options.repeats)
        times = measure(net, rounds, where, options.compile)
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
        row: list[Text | str] = []
        for runtime, arms in times.items():
            aim = net.aim if runtime == "onnx_runtime" and options.device == "cpu" else None
            row += [f"{arms['plain']:.1f}", against(ratio[runtime], aim)]
        printed.add_row(str(net), *row)
        # As they come: the whole takes minutes.
        console.print(f"{net}: ÷ {', ÷ '.join(f'{r:.3f}' for r in ratio.values())}")
    console.print(printed)
    record: dict[str, Any] = {**machine(torch.device(options.device)), "threads": THREADS}
    record |= {"target": options.target, "quick": options.quick, "nets": records}
    save(console, options.out / "ort_training.json", record)


if __name__ == "__main__":
    main()

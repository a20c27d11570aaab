"""One Gram over many processes: what its collective takes, and what it changes in the gradient.

On paper: bytes and time of the sum beside a training step, from published rates of links and
processors. By simulation: the averaged gradient of many virtual processes, each with a Gram of its
own rows, beside that of one Gram over all rows.

Needs the extra `test`.

python benchmarks/bench_processes.py [--quick] [--data FOLDER] [--out FOLDER]
"""

from __future__ import annotations

import named_extra  # noqa: F401  # isort: skip

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from report import OUT, machine, save, table
from stems import LAMBDA
from tract_fx.preconditioner import PatchGeometry, precondition_weight_gradient
from tract_fx.preconditioner.global_gram import packed_size

# An NVIDIA A100 80 GB SXM and the DGX A100 around it, as NVIDIA publishes them: NVLink 600 GB/s in
# both directions together, one HDR InfiniBand adapter of 200 Gb/s per GPU between nodes of eight.
NODE = 8
NVLINK, NETWORK = 300e9, 25e9  # bytes per second, in one direction
HOP, NETWORK_HOP = 3e-6, 6e-6  # seconds a message takes however short it is
BFLOAT16, FLOAT32, FLOAT64 = 312e12, 19.5e12, 19.5e12  # products and sums per second
ACHIEVED = 0.4  # of these rates, in training and in large products
PROCESSES = (8, 64, 512)


@dataclass(frozen=True)
class Net:
    """A network and its first layer.

    Attributes:
        name: Its name.
        columns: n of the first layer.
        rows: R of one image.
        outputs: The first layer's output channels.
        forward: Products and sums of one image's forward pass; a step takes three times that.
        batch: Images of one process.
    """

    name: str
    columns: int
    rows: int
    outputs: int
    forward: float
    batch: int

    @property
    def step(self) -> float:
        """Seconds of a training step of one process."""
        return 3 * self.forward * self.batch / (ACHIEVED * BFLOAT16)

    @property
    def own(self) -> float:
        """Seconds of what each process computes by itself: Gram, factor and solve."""
        n, rows = self.columns, self.rows * self.batch
        gram = rows * n * n / (ACHIEVED * FLOAT32)  # half of it, two operations each
        return gram + (n**3 / 3 + 2 * self.outputs * n**2) / (ACHIEVED * FLOAT64)


NETS = (
    Net("ResNet-50, 7×7/2", 147, 112 * 112, 64, 8.2e9, 128),
    Net("ViT-B/16", 768, 14 * 14, 768, 35.1e9, 64),
    Net("ViT-L/14", 588, 16 * 16, 1024, 162e9, 16),
)


def all_reduce(size: float, processes: int) -> float:
    """Seconds of an all-reduce by the quicker of ring and double binary tree, node by node."""
    nodes = max(1, processes // NODE)
    rate = NVLINK if nodes == 1 else NETWORK
    inside = 2 * (min(processes, NODE) - 1) * HOP
    if nodes == 1:
        return 2 * (processes - 1) / processes * size / rate + inside
    # NCCL's rings and trees go through all adapters of a node at once: a GPU's rate is its own.
    ring = 2 * size / rate + 2 * (nodes - 1) * NETWORK_HOP + inside
    tree = 2 * size / rate + 2 * math.ceil(math.log2(nodes)) * NETWORK_HOP + inside
    return min(ring, tree)


def on_paper() -> list[dict[str, Any]]:
    """The collective of each net, for each number of processes."""
    found = []
    for net in NETS:
        for processes in PROCESSES:
            size = 8.0 * packed_size(net.columns)  # of many more rows than columns
            seconds = all_reduce(size, processes)
            found.append(
                {
                    "net": net.name,
                    "processes": processes,
                    "bytes": size,
                    "seconds": seconds,
                    "own_seconds": net.own,
                    "step_seconds": net.step,
                    "share": seconds / net.step,
                }
            )
    return found


def print_paper(rows: list[dict[str, Any]], console: Console) -> None:
    title = f"On paper: A100s at {ACHIEVED:.0%} of their rates, NVLink within 8, HDR between"
    columns = ("GPUs", "MB", "sum,\nms", "Gram, solve,\nms", "step,\nms", "sum ÷\nstep")
    printed = table(title, "", *columns)
    for row in rows:
        times = (f"{1e3 * row[key]:.3g}" for key in ("seconds", "own_seconds", "step_seconds"))
        share = f"{row['share']:.2%}"
        size = f"{row['bytes'] / 1e6:.3g}"
        printed.add_row(row["net"], str(row["processes"]), size, *times, share)
    console.print(printed)


# By simulation.


@dataclass(frozen=True)
class Layer:
    """A first layer to simulate.

    Attributes:
        name: Its name.
        kernel: Size of the kernel; 0 for a linear layer of all pixels.
        stride: Its stride.
        batch: Images of one process.
    """

    name: str
    kernel: int
    stride: int
    batch: int

    def build(self, size: int) -> nn.Conv2d:
        kernel = self.kernel or size
        return nn.Conv2d(3, 32, kernel, self.stride or size, kernel // 2 if kernel == 3 else 0)


LAYERS = (
    Layer("3×3", 3, 1, 8),
    Layer("4×4/4", 4, 4, 8),
    Layer("16×16/16", 16, 16, 32),
    Layer("16×16/16", 16, 16, 512),
    Layer("all pixels", 0, 0, 32),
)


def photographs(count: int, size: int) -> Tensor:
    """Images whose spectrum falls off as that of photographs does, with unit variance."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, size, size, generator=generator)
    frequency = torch.fft.fftfreq(size)
    radius = torch.hypot(frequency[:, None], frequency[None]).clamp(min=1 / size)
    images = torch.fft.ifft2(torch.fft.fft2(noise) / radius).real
    images += 0.7 * images.mean(1, keepdim=True)  # channels go together
    normal: Tensor = (images - images.mean()) / images.std()
    return normal


def simulate(layer: Layer, images: Tensor, processes: int) -> dict[str, Any]:
    """The averaged gradient of so many processes, by Grams of their own and by one of all."""
    torch.manual_seed(0)
    module = layer.build(images.shape[-1])
    geometry = PatchGeometry.of_module(module)
    head = torch.randn(32, 10) / 32**0.5
    every = torch.arange(layer.batch * processes) % len(images)
    x = images[every]
    labels = torch.randint(0, 10, (len(x),))
    plain, local = (torch.zeros_like(module.weight) for _ in range(2))
    for part, target in zip(x.chunk(processes), labels.chunk(processes), strict=True):
        scores = torch.relu(module(part)).mean((2, 3)) @ head
        loss = nn.functional.cross_entropy(scores, target)
        (gradient,) = torch.autograd.grad(loss, [module.weight])
        plain += gradient / processes
        local += precondition_weight_gradient(gradient, part, LAMBDA, geometry) / processes
    together = precondition_weight_gradient(plain, x, LAMBDA, geometry)
    cosine = torch.nn.functional.cosine_similarity(local.flatten(), together.flatten(), dim=0)
    rows = geometry.rows(x) // processes
    return {
        "layer": layer.name,
        "processes": processes,
        "rows": rows,
        "columns": geometry.columns(x),
        "difference": float((local - together).norm() / together.norm()),
        "norm": float(local.norm() / together.norm()),
        "cosine": float(cosine),
    }


def print_simulation(rows: list[dict[str, Any]], source: str, console: Console) -> None:
    title = f"Simulated on {source}: Grams of each process's rows against one of all"
    columns = ("processes", "R of one", "n", "difference", "local ÷\nglobal norm", "cosine")
    printed = table(title, "", *columns)
    for row in rows:
        figures = (f"{row['difference']:.1%}", f"{row['norm']:.3g}", f"{row['cosine']:.4f}")
        sizes = (row["processes"], row["rows"], row["columns"])
        printed.add_row(row["layer"], *map(str, sizes), *figures)
    console.print(printed)


def read_images(folder: Path | None, count: int) -> tuple[Tensor, str]:
    if folder is None:
        return photographs(count, 32), "images with a photograph's spectrum"
    from image_folder import read

    return read(folder, count, 0).train.images, folder.name


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--quick", action="store_true", help="8 virtual processes instead of 512")
    made.add_argument("--data", type=Path, help="a folder train/CLASS/*.jpg, test/CLASS/*.jpg")
    made.add_argument("--out", type=Path, default=OUT, help="folder for the JSON (%(default)s)")
    return made


def main() -> None:
    options = parser().parse_args()
    console = Console()
    paper = on_paper()
    print_paper(paper, console)
    layers, counts = (LAYERS[:2], (8,)) if options.quick else (LAYERS, PROCESSES)
    images, source = read_images(options.data, 64 if options.quick else 16384)
    cases = [(layer, count) for layer in layers for count in counts]
    rows = [simulate(layer, images, count) for layer, count in track(cases, console=console)]
    print_simulation(rows, source, console)
    record = {**machine(), "quick": options.quick, "rates": {"nvlink": NVLINK, "network": NETWORK}}
    nets = [asdict(net) for net in NETS]
    record |= {"nets": nets, "on_paper": paper, "simulated": rows, "source": source}
    save(console, options.out / "processes.json", record)


if __name__ == "__main__":
    main()

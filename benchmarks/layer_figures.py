"""One first layer's figures: times of its Gram and of itself, peak memory, the Gram's floor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memory import peak_bytes
from peaks import Peaks
from precision import FLOAT32, Precision
from stems import Layer, Stem, arms
from timing import Clock
from torch_tract_gram import torch_tract_gram
from tract_fx.preconditioner import GramWork, PatchGeometry, gram, gram_work
from tract_fx.torch_private import full_precision
from training_steps import layer_step

# On a device batches are taken in turn, so that no call finds its own in a cache.
_BEYOND_CACHES = 256 << 20


@dataclass(frozen=True)
class Bench:
    """How figures are taken.

    Attributes:
        clock: Times calls.
        device: Where they run.
        repeats: Rounds of a measurement.
        peaks: What the device does at best.
        precision: Of the layers.
    """

    clock: Clock
    device: torch.device
    repeats: int
    peaks: Peaks
    precision: Precision = FLOAT32

    def batches(self, shape: tuple[int, ...]) -> list[Tensor]:
        """Noise: one batch on the CPU, on a device more than its caches hold."""
        count = 1
        if self.device.type == "cuda":
            count = max(2, math.ceil(_BEYOND_CACHES / (4 * math.prod(shape))))
        return [torch.randn(shape, device=self.device) for _ in range(count)]


@dataclass(frozen=True)
class LayerFigures:
    """The figures of one layer. What was not measured is None, or not among the arms.

    Attributes:
        stem: The layer.
        gram: Milliseconds of the Gram by arm; empty where neither forms one (R < n).
        layer: Milliseconds of forward and backward by arm.
        memory: Peak bytes of the Gram by arm.
        work: What our Gram does.
        floor: Milliseconds that this work takes at least.
        failures: What arms that can't run this layer raise, by arm.
    """

    stem: Stem
    gram: dict[str, float]
    layer: dict[str, float]
    memory: dict[str, int]
    work: GramWork | None
    floor: float | None
    failures: dict[str, str]

    @property
    def gram_speedup(self) -> float | None:
        """Time of the Gram, torch-tract ÷ ours."""
        return ratio(self.gram, "torch-tract", "tract_fx")

    @property
    def ours_over_plain(self) -> float | None:
        """Time of the layer."""
        return ratio(self.layer, "tract_fx", "plain")

    @property
    def peer_over_plain(self) -> float | None:
        """Time of the layer, torch-tract's."""
        return ratio(self.layer, "torch-tract", "plain")

    @property
    def memory_ratio(self) -> float | None:
        """Peak memory of the Gram, ours ÷ torch-tract."""
        return ratio(self.memory, "tract_fx", "torch-tract")

    @property
    def over_floor(self) -> float | None:
        """How many times its floor our Gram takes."""
        return self.gram["tract_fx"] / self.floor if self.floor else None

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        aims = self.stem.aims
        return {
            "layer": self.stem.name,
            "shape": self.stem.shape,
            "gram_ms": self.gram,
            "layer_ms": self.layer,
            "gram_peak_bytes": self.memory,
            "gram_torch_tract_over_ours": self.gram_speedup,
            "layer_ours_over_plain": self.ours_over_plain,
            "layer_torch_tract_over_plain": self.peer_over_plain,
            "gram_memory_ours_over_torch_tract": self.memory_ratio,
            "algorithm": self.work.algorithm if self.work else None,
            "multiply_adds": self.work.multiply_adds if self.work else None,
            "copied_numbers": self.work.copied if self.work else None,
            "gram_floor_ms": self.floor,
            "gram_over_floor": self.over_floor,
            "failures": self.failures,
            "aims": aims
            and {
                "gram_torch_tract_over_ours": aims.gram.bound,
                "layer_ours_over_plain": aims.layer.bound,
                "gram_memory_ours_over_torch_tract": aims.memory.bound,
            },
        }


def ratio(figures: dict[str, Any], one: str, other: str) -> float | None:
    """Divide two arms' figures, where both are there."""
    return figures[one] / figures[other] if one in figures and other in figures else None


def gram_dtype(device: torch.device) -> torch.dtype:
    """In which the preconditioner multiplies standardised float32 there."""
    return torch.float32 if device.type == "cpu" else torch.float64


def gram_arms(layer: Layer, precision: Precision) -> dict[str, Callable[[Tensor], Tensor]]:
    """The Gram of a layer as torch-tract and as we compute it.

    Args:
        layer: The layer.
        precision: In which the layer reads its input.

    Returns:
        Functions of the layer's input.
    """
    geometry = PatchGeometry.of_module(layer)

    def ours(x: Tensor) -> Tensor:
        with full_precision(x.device):  # as the preconditioner calls it
            return gram(precision.read(x), geometry, gram_dtype(x.device))

    return {
        "torch-tract": lambda x: torch_tract_gram(precision.read(x), layer),
        "tract_fx": ours,
    }


def measure_layer(stem: Stem, bench: Bench) -> LayerFigures:
    """Measure one layer.

    Args:
        stem: The layer.
        bench: How.

    Returns:
        The figures.
    """
    torch.manual_seed(0)
    layer = stem.build().to(bench.device)
    batches = bench.batches(stem.shape)
    with bench.precision.flags():
        steps, failures = running_steps(nn.Sequential(layer), batches, bench.precision)
        layer_ms = bench.clock(steps, bench.repeats)
        work, floor, gram_ms, memory = None, None, {}, {}
        geometry = PatchGeometry.of_module(layer)
        if geometry.rows(batches[0]) >= geometry.columns(batches[0]):
            calls = gram_arms(layer, bench.precision)
            turns = {name: InTurn(call, batches) for name, call in calls.items()}
            gram_ms = bench.clock(turns, bench.repeats)
            memory = {name: peak_bytes(call, bench.device) for name, call in turns.items()}
            work = gram_work(batches[0], geometry)
            floor = bench.peaks.floor(work)
    return LayerFigures(stem, gram_ms, layer_ms, memory, work, floor, failures)


class InTurn:
    """A function called on one of several inputs after the other."""

    def __init__(self, call: Callable[[Tensor], Tensor], batches: list[Tensor]) -> None:
        self.call, self.batches, self.turn = call, batches, 0

    def __call__(self) -> Tensor:
        self.turn = (self.turn + 1) % len(self.batches)
        return self.call(self.batches[self.turn])


def running_steps(
    model: nn.Sequential, batches: list[Tensor], precision: Precision
) -> tuple[dict[str, Callable[[], tuple[Tensor, ...]]], dict[str, str]]:
    """Make the arms' steps, and leave out what fails: torch-tract in some precisions.

    Args:
        model: The layer.
        batches: Its inputs.
        precision: Of the layer.

    Returns:
        The steps that run, and what the others raise.

    Raises:
        RuntimeError: One of the others is not torch-tract's.
    """
    steps = {}
    failures = {}
    for name, arm in arms(model).items():
        try:
            step = layer_step(arm, batches, precision)
            step()
        except RuntimeError as error:
            if name != "torch-tract":
                raise
            failures[name] = str(error).splitlines()[0]
        else:
            steps[name] = step
    return steps, failures

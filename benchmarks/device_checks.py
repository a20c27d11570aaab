"""Whether a layer's Gram and gradient are right on a device, by float64 on the same device."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from layer_figures import gram_arms, running_steps
from precision import Precision
from stems import LAMBDA, Layer, Stem
from tract_fx.preconditioner import PatchGeometry

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from photographs import photographs

# Past these something is wrong, and not only rounded: float32 sums over up to a million rows on a
# CPU, and the same magnified by the solve; on a device, where they are float64, what TF32 would do.
GRAM_LIMITS = {"cpu": 1e-5, "cuda": 1e-7}
GRADIENT_LIMITS = {"cpu": 1e-4, "cuda": 1e-5}

_IMAGES = 8  # unfolded at a time in float64


@dataclass(frozen=True)
class Check:
    """What a layer's results are off by, relative to float64.

    Attributes:
        gram: Our Gram's error; None where there is none (R < n).
        gradient: Errors of the preconditioned gradient by arm, at the operator: for the weight
            gradient that the layer itself computes in this precision.
        failures: What is beyond its limit, or synchronises, in words.
    """

    gram: float | None
    gradient: dict[str, float]
    failures: list[str] = field(default_factory=list)


@functools.lru_cache(maxsize=1)
def images(shape: tuple[int, ...]) -> Tensor:
    """Standardised photographs in an input's shape."""
    if len(shape) == 2:
        channels, side = (1, 28) if shape[1] == 784 else (3, 32)
        return photographs(shape[0], channels, side).flatten(1)
    batch, channels, side, _ = shape
    return photographs(batch, channels, side)


def check_layer(stem: Stem, precision: Precision, device: torch.device) -> Check:
    """Check one layer in one precision.

    Args:
        stem: The layer.
        precision: Of the layer.
        device: Where.

    Returns:
        Errors and failures.
    """
    torch.manual_seed(0)
    layer, x = stem.build().to(device), images(stem.shape).to(device)
    read = precision.read(x).double()
    exact = float64_gram(read, layer)
    geometry = PatchGeometry.of_module(layer)
    failures, gram_error = [], None
    with precision.flags(), deterministic_convolutions():
        steps, _ = running_steps(nn.Sequential(layer), [x], precision)
        found = {name: step()[0].double().flatten(1) for name, step in steps.items()}
        gw = found.pop("plain")
        if geometry.rows(x) < geometry.columns(x):
            gw = within_row_space(gw, read)
        else:
            gram_error = distance(gram_arms(layer, precision)["tract_fx"](x)[0].double(), exact)
        if synchronisation := synchronises(steps["tract_fx"], device):
            failures.append(synchronisation)
    exact.diagonal().add_(LAMBDA)
    wanted = torch.linalg.solve(exact, gw, left=False)
    errors = {name: distance(gradient, wanted) for name, gradient in found.items()}
    for what, error, limits in (
        ("Gram", gram_error, GRAM_LIMITS),
        ("gradient", errors["tract_fx"], GRADIENT_LIMITS),
    ):
        # Not "greater than": what is not a number is a failure, too.
        if error is not None and not error <= limits[device.type]:
            failures.append(f"the {what} is off by {error:.1e}, more than {limits[device.type]}")
    return Check(gram_error, errors, failures)


def float64_gram(x: Tensor, layer: Layer) -> Tensor:
    """XᵀX / R by the definition: all patches, some images at a time.

    Args:
        x: The layer's input in float64.
        layer: The layer.

    Returns:
        (n, n).
    """
    if isinstance(layer, nn.Linear):
        return x.T @ x / len(x)
    assert not isinstance(layer.padding, str), layer.padding
    n = layer.weight[0].numel()
    total, rows = x.new_zeros(n, n), 0
    for piece in x.split(_IMAGES):
        columns = functional.unfold(
            piece, layer.kernel_size, padding=layer.padding, stride=layer.stride
        )
        total += (columns @ columns.mT).sum(0)
        rows += columns.shape[0] * columns.shape[2]
    return total / rows


def within_row_space(gw: Tensor, rows: Tensor) -> Tensor:
    """Leave out what a weight gradient has outside the space of X's rows, which is rounding.

    The library drops it, where the definition would divide it by λ.

    Args:
        gw: (out, n).
        rows: X, (R, n), R < n.

    Returns:
        The rest, (out, n).
    """
    basis, _ = torch.linalg.qr(rows.T)
    within: Tensor = gw @ basis @ basis.T
    return within


def distance(found: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.norm(found - exact) / torch.linalg.norm(exact))


def synchronises(step: Callable[[], object], device: torch.device) -> str | None:
    """Run a step that has run before, where a synchronisation is an error.

    Args:
        step: The step.
        device: Where it runs; on the CPU there is nothing to be seen.

    Returns:
        What is wrong, None where nothing is.
    """
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return f"a step synchronises: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


@contextmanager
def deterministic_convolutions() -> Iterator[None]:
    """Let cuDNN compute the same gradient twice: ours is checked by the plain layer's."""
    backend = torch.backends.cudnn
    before = backend.deterministic, backend.benchmark
    backend.deterministic, backend.benchmark = True, False
    try:
        yield
    finally:
        backend.deterministic, backend.benchmark = before

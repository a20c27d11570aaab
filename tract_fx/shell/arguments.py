"""Arguments that several commands take: λ, layers, the shapes of example inputs."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from tract_fx.atomic import system_errors
from tract_fx.errors import ArtifactsExistError
from tract_fx.preconditioner import DEFAULT_LAMBDA

Lambda = Annotated[
    float | None,
    typer.Option(
        "--lambda", help="λ of layers without one of their own.", show_default=f"{DEFAULT_LAMBDA}"
    ),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        metavar="NAME[=λ]",
        help="A layer that TrAct goes on, where the choice is yours. Repeatable.",
    ),
]
Trainable = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="An ONNX model's initializer to train, where the usual ones are not meant. "
        "Repeatable.",
    ),
]
InputShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="[NAME=]SIZES[:DTYPE]",
        help="An example input, such as 8,3,32,32 or mask=8,16:int64. Noise, or zeros for "
        "integers. Repeatable, in order.",
    ),
]


def layer_choice(layers: Sequence[str] | None, lambda_: float | None) -> dict[str, float] | None:
    """Read `--layer`."""
    if not layers:
        return None
    chosen: dict[str, float] = {}
    for text in layers:
        name, equals, value = text.rpartition("=")
        try:
            chosen[name if equals else text] = (
                float(value) if equals else DEFAULT_LAMBDA if lambda_ is None else lambda_
            )
        except ValueError as error:
            raise typer.BadParameter(f"--layer {text}: {value!r} is not a number") from error
    return chosen


def example_inputs(shapes: Sequence[str] | None, seed: int) -> Any:
    """Make the example inputs that `--input-shape` describes."""
    if not shapes:
        return None
    generator = torch.Generator().manual_seed(seed)
    read = [_example(text, generator) for text in shapes]
    named = {name: tensor for name, tensor in read if name}
    if named and len(named) != len(read):
        raise typer.BadParameter("--input-shape: name all inputs, each once, or none")
    return named or tuple(tensor for _, tensor in read)


def _example(text: str, generator: torch.Generator) -> tuple[str, Tensor]:
    name, _, rest = text.rpartition("=")
    sizes, _, dtype_name = rest.partition(":")
    dtype = getattr(torch, dtype_name or "float32", None)
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1 or not isinstance(dtype, torch.dtype):
        raise typer.BadParameter(
            f"--input-shape {text}: expected sizes and a dtype of torch, such as 8,3,32,32 or "
            "8,16:int64"
        )
    if dtype.is_floating_point:
        return name, torch.randn(shape, generator=generator).to(dtype)
    return name, torch.zeros(shape, dtype=dtype)


def refuse_existing(place: Path, overwrite: bool) -> None:
    """Say before the work, not behind it, that there is no place for its result."""
    if os.path.lexists(place) and not overwrite:
        raise ArtifactsExistError(
            str(place),
            "it exists, and is not overwritten without being asked",
            "Choose another place, or give --overwrite",
        )
    with system_errors(place):
        folder = next(parent for parent in place.absolute().parents if parent.exists())
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

"""Names of what a step takes and what a model returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

BATCH = "batch"
"""Name of the batch's size where it is left open."""


def free_name(name: str, taken: set[str | None]) -> str:
    """Find a name that is not in use, and take it."""
    number, found = 0, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    taken.add(found)
    return found


def batch_names(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], targets: int, taken: set[str]
) -> tuple[str, ...]:
    """Name a batch's tensors after the forward method's arguments."""
    known = [
        name
        for name, p in inspect.signature(model.forward).parameters.items()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    positional = known + [f"input_{i}" for i in range(len(known), len(args))]
    given = {**dict(zip(positional, args, strict=False)), **kwargs}
    places, _ = pytree.tree_flatten_with_path(given)
    names = [_path_name(path) for path, leaf in places if isinstance(leaf, Tensor)]
    used: set[str | None] = {*taken}
    inputs = [free_name(name, used) for name in names]
    targeted = ["target"] if targets == 1 else [f"target_{i}" for i in range(targets)]
    return (*inputs, *(f"loss_{n}" if n in used else n for n in targeted))


def output_names(output: Any, taken: set[str]) -> dict[str, Tensor]:
    """Name the tensors that a model returns by their places."""
    places, _ = pytree.tree_flatten_with_path(output)
    used: set[str | None] = {*taken}
    named = {}
    for path, leaf in places:
        if isinstance(leaf, Tensor):
            name = _path_name(path) or "output"
            by_order = len(path) == 1 and hasattr(path[0], "idx")
            clashes = name in taken or by_order
            named[free_name(f"output_{name}" if clashes else name, used)] = leaf
    return named


def _path_name(path: Sequence[Any]) -> str:
    """Name a place in nested containers by the way to it."""
    steps = (
        next((getattr(s, a) for a in ("key", "idx", "name") if hasattr(s, a)), s) for s in path
    )
    return "_".join(map(str, steps))

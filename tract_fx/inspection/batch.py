"""A batch as a model is run on it to look: copies of the user's tensors, which gather gradients."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tract_fx import torch_private


class Batch:
    """A batch whose floating and complex tensors gather gradients, apart from the user's.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        leaves: The tensors whose gradients are wanted, by the arguments' names.
        autocast: Autocast's dtype on the batch's device, None where it is off.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        with_gradients: bool = True,
    ) -> None:
        """Copy the tensors."""
        self.leaves: dict[str, Tensor] = {}
        self.autocast: torch.dtype | None = None
        self._words: list[str] = []
        copies: dict[int, Tensor] = {}
        with torch.inference_mode(False), torch.enable_grad():
            for argument, value in _by_name(model, args, kwargs).items():
                for name, tensor in tensors_in(value, argument):
                    if id(tensor) not in copies:
                        copies[id(tensor)] = self._copy(name, tensor, with_gradients)

        def copied(value: Any) -> Any:
            return copies.get(id(value), value) if isinstance(value, Tensor) else value

        self.args, self.kwargs = pytree.tree_map(copied, (tuple(args), dict(kwargs)))

    def _copy(self, name: str, tensor: Tensor, with_gradients: bool) -> Tensor:
        self._words.append(_in_words(tensor))
        if not has_gradient(tensor):
            return tensor.clone()
        self.autocast = self.autocast or torch_private.autocast_dtype(tensor)
        leaf = tensor.detach().clone().requires_grad_(with_gradients or tensor.requires_grad)
        if leaf.requires_grad:
            self.leaves[name] = leaf
        return leaf.clone()  # no leaf: the model may write to it

    def __str__(self) -> str:
        return ", ".join(self._words) or "no tensor"


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Give the arguments of a call by their names."""
    try:
        return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):  # the model will say itself what it does not take
        return {**{f"args[{i}]": value for i, value in enumerate(args)}, **kwargs}


def tensors_in(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Go through the tensors in a nested value, with what leads to each."""
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        at = name + pytree.keystr(path)
        if isinstance(leaf, Tensor):
            yield at, leaf
        elif isinstance(leaf, Mapping):  # of a class that PyTorch does not take apart
            for key, entry in leaf.items():
                yield from tensors_in(entry, f"{at}[{key!r}]")
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            for field in fields(leaf):
                yield from tensors_in(getattr(leaf, field.name), f"{at}.{field.name}")


def describe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Put a batch into words."""
    return ", ".join(_in_words(tensor) for _, tensor in tensors_in((args, kwargs), ""))


def _in_words(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"


def has_gradient(tensor: Tensor) -> bool:
    """Tell the dtypes that have gradients."""
    return tensor.is_floating_point() or tensor.is_complex()


def value_words(dtype: object, sizes: Iterable[object]) -> str:
    """Describe a tensor in a picture or a report: `"float32 64×3×7×7"`."""
    return f"{dtype_name(dtype)} {'×'.join(map(str, sizes)) or 'scalar'}"


def dtype_name(dtype: object) -> str:
    """Name a dtype of torch's, `"float32"`; another's as it is."""
    return str(dtype).removeprefix("torch.")

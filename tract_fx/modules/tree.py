"""Copies of module trees that share every tensor with the original."""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections import OrderedDict
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from tract_fx import torch_private
from tract_fx.modules.layer import own_forward, state_of_copy

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def copy_tree(root: ModuleT) -> ModuleT:
    """Copy a module and its children; share parameters, buffers and all other tensors.

    The dicts that hold children, parameters, buffers and hooks are copied too, so that `.eval()`,
    a hook or a replaced child on one tree does not reach the other. References from a module to
    modules of the tree (as an attribute, in a container, bound in a method or a partial) lead to
    the copies; those inside closures and other objects still lead to the originals (see
    `still_reaches`). Graphs of `fx.GraphModule`s are copied as well; scripted modules are shared.
    """
    memo: dict[int, Any] = {}
    originals = list(root.modules())
    for module in originals:
        memo[id(module)] = _empty(module)
    for module in originals:
        copied = memo[id(module)]
        if copied is not module:
            state = {k: _follow(v, memo) for k, v in module.__dict__.items()}
            state = state_of_copy(state)
            object.__setattr__(copied, "__dict__", state)  # whatever the class's own would do
    for module in originals:
        if isinstance(module, fx.GraphModule):
            memo[id(module)].graph = torch_private.copy_graph(module.graph)
    return memo[id(root)]  # type: ignore[no-any-return]


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Give parameters and buffers by their first names, those too that no state_dict holds."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _empty(module: nn.Module) -> nn.Module:
    """Make an instance without a state: of a class of its own for a GraphModule, as fx wants it."""
    cls = type(module)
    if isinstance(module, fx.GraphModule):
        made = fx.GraphModule.__new__(cls)  # type: ignore[type-var]
        type(made).__name__ = cls.__name__  # the traced model's own
        return made
    if isinstance(module, torch.jit.ScriptModule):
        return module  # its state lies in C++
    return object.__new__(cls)  # FSDP's classes override __new__


def _follow(value: Any, memo: dict[int, Any]) -> Any:
    """Copy containers, replace modules of the tree by their copies, share all else."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, _follow(value.__self__, memo))
    if type(value) is functools.partial:
        arguments = [_follow(a, memo) for a in value.args]
        keywords = {k: _follow(v, memo) for k, v in value.keywords.items()}
        partial = functools.partial(_follow(value.func, memo), *arguments, **keywords)
        vars(partial).update(vars(value))
        return partial
    if type(value) is torch_private.WrappedHook:
        hook = torch_private.WrappedHook(_follow(value.hook, memo))
        if value.with_module:
            module: Any = value.module()
            hook.with_module, hook.module = True, weakref.ref(memo.get(id(module), module))
        return hook
    if type(value) in (dict, OrderedDict):
        copied = memo[id(value)] = type(value)()
        copied.update((k, _follow(v, memo)) for k, v in value.items())
        return copied
    if type(value) is list:
        items = memo[id(value)] = []
        items.extend(_follow(v, memo) for v in value)
        return items
    if type(value) in (tuple, set):
        return type(value)(_follow(v, memo) for v in value)
    return value


def still_reaches(root: nn.Module, original: nn.Module, copied: nn.Module) -> bool:
    """Tell whether a copied tree may go on calling a module as it was.

    Some object that it holds (a closure, a dataclass, a deque, …) leads to the original, or has
    kept the copy's forward method from before the copy's class changed.
    """
    seen: set[int] = set()
    pending: list[Any] = [vars(root)]
    while pending:
        value = pending.pop()
        if value is original or _is_former_forward(value, copied):
            return True
        if id(value) in seen or isinstance(value, _LEAVES):
            continue
        seen.add(id(value))
        if value is vars(copied).get("forward"):
            # Its own, and up to date; but what it was made of may hold on to the original.
            own = own_forward(copied)
            pending.append(own.__func__ if isinstance(own, types.MethodType) else own)
        elif isinstance(value, types.FunctionType):
            pending += [c.cell_contents for c in value.__closure__ or () if _is_filled(c)]
            pending += [value.__defaults__, value.__kwdefaults__, vars(value)]
            # Of its globals only what may be a part of a model: the rest leads everywhere.
            used = (value.__globals__.get(name) for name in value.__code__.co_names)
            pending += [v for v in used if isinstance(v, (nn.Module, types.MethodType))]
        elif isinstance(value, weakref.ReferenceType):
            pending.append(value())
        else:
            pending += gc.get_referents(value)
    return False


def _is_former_forward(value: object, module: nn.Module) -> bool:
    """Tell a method bound to a module that is not what the module's class has by that name."""
    if not isinstance(value, types.MethodType) or value.__self__ is not module:
        return False
    return value.__func__.__name__ in ("forward", "_conv_forward") and value != getattr(
        module, value.__func__.__name__
    )


_LEAVES = (type, types.ModuleType, Tensor, str, bytes, int, float, type(None))


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (raises where the variable has no value yet)
    except ValueError:
        return False
    return True

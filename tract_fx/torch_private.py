"""PyTorch's own state: traces and transforms under way, what lies beneath a tensor, precision.

Most of it is told and set by private functions of PyTorch, which are called here alone, and
autocast, which is public, goes with the rest of what products are computed in. What makes ONNX of a
graph is private too, and in `tract_fx.step.exporter`. Tested with the versions of torch that
`tract_fx.torch_version` names.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from threading import Lock, RLock
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.modules.module import _WrappedHook
from torch.utils import _pytree as pytree

WrappedHook = _WrappedHook
"""What a module's load_state_dict hooks are kept in: with a weak reference to the module."""

_PRINTING = ("torch.fx.graph_module", "torch.export._trace")

# Asked once, for Dynamo can't trace the question in torch 2.11.
_AUTOCAST = {
    device: torch.amp.is_autocast_available(device)
    for device in ("cpu", "cuda", "hpu", "meta", "mps", "mtia", "xla", "xpu")
}
_BACKENDS = {"cuda": "cuda", "cpu": "mkldnn"}
_TRANSLATIONS: dict[tuple[Any, ...], Any] = {}
_lock = Lock()
_kernels_lock = RLock()
_inside = {"cuda": 0, "mkldnn": 0}
_before = {"cuda": "none", "mkldnn": "none"}


@contextmanager
def autograd_kernels(kernels: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Run operators by functions of other operators, whose derivatives are taken in their place.

    They are called where a tracer has PyTorch's Python dispatcher on, by whatever calls the
    operator. `torch.library` has such registrations for a process alone.

    Args:
        kernels: Functions of an operator's arguments by operator.

    Yields:
        None, while it is so.
    """
    keys = (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.AutogradCUDA)
    with _kernels_lock:
        before = {operator: dict(operator.py_kernels) for operator in kernels}
        try:
            for operator, kernel in kernels.items():
                operator.py_kernels.update(dict.fromkeys(keys, kernel))
                operator._dispatch_cache.clear()
            yield
        finally:
            for operator, own in before.items():
                operator.py_kernels.clear()
                operator.py_kernels.update(own)
                operator._dispatch_cache.clear()


def inside_functorch() -> bool:
    """Tell whether a `torch.func` transform (grad, vmap, jvp, …) is running.

    There is no public question of that kind; custom operators refuse such tensors. Of the private
    ones, this is the one that Dynamo answers rightly while it traces.

    Returns:
        True between the transform's entry and exit, at any depth.
    """
    return torch._C._are_functorch_transforms_active()


def inside_dual_level() -> bool:
    """Tell whether a forward-mode level (`torch.autograd.forward_ad.dual_level`) is open.

    A custom operator would give a zero tangent there without a word.

    Returns:
        True inside the level.
    """
    return torch.autograd.forward_ad._current_level >= 0


def find_group(name: str) -> Any:
    """Find a process group by its name, which is what graphs hold.

    Args:
        name: `ProcessGroup.group_name`.

    Returns:
        The group, None where no running group has the name.
    """
    try:
        return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, attr-defined]
    except (RuntimeError, ValueError):
        return None


def group_store(group: Any) -> Any:
    """Give the key-value store by which the members of a group have found each other.

    A collective could not say who is missing, and its time limit is the whole job's.

    Args:
        group: The group.

    Returns:
        The store, whose keys are the group's own.
    """
    return torch.distributed.distributed_c10d._get_process_group_store(group)


def in_uneven_join() -> bool:
    """Tell whether DDP's forward pass is running in a `join()` that lets processes end early.

    Returns:
        False too where its `throw_on_early_termination` ends all with the first.
    """
    ddp = torch.nn.parallel.DistributedDataParallel._active_ddp_module
    config = getattr(ddp, "_join_config", None)
    return config is not None and config.enable and not config.throw_on_early_termination


def is_composite(overload: Any) -> bool | None:
    """Tell an operator that is written in terms of others, and may so hand an operand back.

    Args:
        overload: An operator's overload.

    Returns:
        Whether it is one, None for what is an operator of TorchScript alone.
    """
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    try:
        return bool(overload.has_kernel_for_dispatch_key(key))
    except RuntimeError:
        return None


def is_dtensor(*tensors: torch.Tensor) -> bool:
    """Tell whether one of some tensors is spread over processes.

    Args:
        *tensors: Any tensors.

    Returns:
        True for a DTensor.
    """
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in tensors)


def local_part(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Give what of a tensor this process holds.

    Args:
        tensor: A tensor, spread over processes or not, or None.

    Returns:
        The part, which shares its memory; the tensor itself where it is not spread.
    """
    if tensor is None or not is_dtensor(tensor):
        return tensor
    part: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def is_expanded_weight(tensor: torch.Tensor) -> bool:
    """Tell a weight of `torch.nn.utils._per_sample_grad`, which takes functions of its own list.

    Args:
        tensor: Any tensor.

    Returns:
        True for such a weight.
    """
    return type(tensor).__name__ == "ExpandedWeight"


def is_fake(tensor: torch.Tensor) -> bool:
    """Tell a tensor that has a shape and no values, as tracers use.

    Args:
        tensor: Any tensor.

    Returns:
        True for a fake one.
    """
    return isinstance(tensor, FakeTensor)


def is_of_cpu(tensor: torch.Tensor) -> bool:
    """Tell whether the CPU's kernels compute with a tensor, rather than something that wraps it.

    Args:
        tensor: Any tensor of PyTorch's own classes.

    Returns:
        False too for what `torch.autograd.grad(is_grads_batched=True)` hands to a backward pass.
    """
    return bool(torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.CPU))


def storage_of(tensor: torch.Tensor) -> int | None:
    """Identify the storage that a tensor lies in, also where it has no address (a fake one's).

    Args:
        tensor: Any tensor.

    Returns:
        A number for as long as the storage lives, None for a tensor without one (a sparse one).
    """
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def post_accumulate_hooks(parameter: torch.Tensor) -> int:
    """Count the hooks that run once `.backward()` has written a parameter's `.grad`.

    `torch.autograd.grad` does not run them, and nothing public lists them.

    Args:
        parameter: A parameter.

    Returns:
        How many `register_post_accumulate_grad_hook` has put on it.
    """
    return len(parameter._post_accumulate_grad_hooks or ())


def versions_kept(tensors: tuple[torch.Tensor, ...]) -> AbstractContextManager[Any]:
    """Put tensors' version counters back at exit, whatever has written to the tensors inside.

    By them autograd tells whether what a graph has saved is still there. They may be put back where
    the values are too, and where no graph from inside lives on.

    Args:
        tensors: The tensors, none of them made in inference mode.

    Returns:
        A context manager.
    """
    return _unsafe_preserve_version_counter(tensors)


def version(tensor: torch.Tensor) -> int:
    """Count how often a tensor has been written to in place.

    Args:
        tensor: Any tensor.

    Returns:
        The count.
    """
    return tensor._version


def is_view(tensor: torch.Tensor) -> bool:
    """Tell a tensor that shares memory and version with what it was taken from.

    Args:
        tensor: Any tensor.

    Returns:
        True for such a view.
    """
    return tensor._is_view()


def backward_pass() -> int:
    """Tell the backward pass that this thread is in from those before it.

    Returns:
        Its number, -1 outside of one and in one that a compiler has captured.
    """
    return torch._C._current_graph_task_id()


def adds_to_gradient(leaf: torch.Tensor) -> bool:
    """Tell whether the backward pass under way ends in a leaf's `.grad`.

    Args:
        leaf: A leaf that requires grad.

    Returns:
        False for a leaf that is not in the graph, and in `torch.autograd.grad`.
    """
    # A custom operator runs beneath what builds graphs, by which the node is found.
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded):
        node = torch.autograd.graph.get_gradient_edge(leaf).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # what it says of a leaf whose gradient is returned
        return False


def after_backward_pass(function: Callable[[], None]) -> None:
    """Call a function at the end of the backward pass under way, also after what DDP does then.

    Args:
        function: What to call.
    """
    queue = torch.autograd.Variable._execution_engine.queue_callback
    queue(lambda: queue(function))  # DDP's are queued by then, some by the others


def tracing_jit() -> bool:
    """Tell whether `torch.jit.trace` is running.

    Returns:
        True inside it, hence also inside the ONNX exporter that is built on it.
    """
    return bool(torch._C._get_tracing_state())


def is_exporting() -> bool:
    """As `torch.compiler.is_exporting`, which always says so inside PyTorch 2.11's Dynamo."""
    return bool(torch.compiler._is_exporting_flag)


def tracing_operators() -> bool:
    """Tell whether operators are being recorded by `make_fx` or what is built on it.

    Returns:
        True while a graph is made, in which the op has to stand whoever needs a gradient now.
    """
    return get_proxy_mode() is not None


def operators_are_seen(*tensors: torch.Tensor) -> bool:
    """Tell whether somebody may see, or replace, the operators that are called.

    Args:
        tensors: What they are called with.

    Returns:
        True under a compiler, a tracer, a transform or a dispatch mode, and for tensors that have a
        dispatch of their own.
    """
    ordinary = all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
    return (
        not ordinary
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or inside_functorch()
        or inside_dual_level()
    )


def functions_are_seen() -> bool:
    """Tell whether a mode may see, or replace, the functions that are called.

    Returns:
        True inside a `TorchFunctionMode`.
    """
    return bool(torch._C._len_torch_function_stack() > 0)


def traced_stage(name: str) -> AbstractContextManager[None]:
    """Name a part of a computation on the nodes that `make_fx` makes of it.

    Outside a trace nothing is done: the annotations are one dictionary for all threads.

    Args:
        name: The name, which becomes `node.meta["custom"]["stage"]`.

    Returns:
        A context manager.
    """
    return fx.traceback.annotate({"stage": name}) if tracing_operators() else nullcontext()


def joint_graph(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[fx.GraphModule, list[tuple[str, Any]], list[tuple[str, Any]]]:
    """Trace forward and backward pass into one graph, on fake tensors.

    The public `make_fx` can't: it knows neither parameters' names nor which node of the backward
    pass belongs to which of the forward pass.

    Args:
        model: Any module. Not changed.
        args: Positional arguments of a call.
        kwargs: Keyword arguments.

    Returns:
        The graph; what each placeholder is, and what each of the output node's values is:
        `("parameter", name)`, `("buffer", name)`, `("input", number)`, `("output", number)`,
        `("tangent", …)` of an output, `("gradient", …)` of an input, `("update", …)` of a buffer;
        `("other", "")` for what the calling convention needs besides.
    """
    # Imported here, for it takes seconds.
    from torch._functorch.aot_autograd import aot_export_joint_with_descriptors

    # A model may hold tensors that are neither parameters nor buffers.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: mode.from_tensor(t, static_shapes=True), (args, kwargs)
    )
    with ExitStack() as stack, fx.traceback.preserve_node_meta():
        joint = aot_export_joint_with_descriptors(stack, model, args, kwargs)
    graph = joint.graph_module
    placeholders = graph.graph.find_nodes(op="placeholder")
    inputs = [_describe(node.meta.get("desc")) for node in placeholders]
    return graph, inputs, [_describe(d) for d in graph.graph.output_node().meta["desc"]]


@contextmanager
def kept_translations() -> Iterator[None]:
    """Let `torch.onnx.export` read its table of translations once for a process, not every time.

    That table takes a third of the time of a small model's export.
    """
    name = "from_torchlib"
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        stock = vars(ONNXRegistry)[name]
    except (ImportError, KeyError):
        yield
        return

    def from_torchlib(cls: Any, /, **options: Any) -> Any:
        key = tuple(options.items())
        if key not in _TRANSLATIONS:
            _TRANSLATIONS[key] = stock.__get__(None, cls)(**options)
        table = copy.copy(_TRANSLATIONS[key])
        table.functions = {target: list(found) for target, found in table.functions.items()}
        return table

    setattr(ONNXRegistry, name, classmethod(from_torchlib))
    try:
        yield
    finally:
        setattr(ONNXRegistry, name, stock)


def innermost_checkpoint() -> Any:
    """Tell the activation checkpoint, not of the reentrant kind, that a forward pass is in.

    Returns:
        What differs from checkpoint to checkpoint; None where saved tensors go elsewhere.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    is_checkpoint = hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
    return hooks[0] if is_checkpoint else None


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Let activation checkpointing (not of the reentrant kind) keep what it would compute again.

    It would so in the backward pass, where a recorded model's parameters are its own once more.
    """
    names, head = vars(importlib.import_module("torch.utils.checkpoint")), "_checkpoint_without"
    before = {name: value for name, value in names.items() if name.startswith(head)}
    names.update(dict.fromkeys(before, lambda *_, **__: iter([None])))
    try:
        yield
    finally:
        names.update(before)


@contextmanager
def no_printed_graphs() -> Iterator[None]:
    """Let PyTorch raise alone in the places where it also prints the graph at which it fails."""
    places = [vars(importlib.import_module(name)) for name in _PRINTING]
    try:
        for names in places:
            names["print"] = lambda *_, **__: None
        yield
    finally:
        for names in places:
            names.pop("print", None)


def record_run(function: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    """Record the operators that a function runs on real tensors, branches on values included.

    Args:
        function: The function.
        *inputs: Its arguments, tensors in lists.

    Returns:
        The graph of this one run.
    """
    recording = make_fx(function, tracing_mode="real", _error_on_data_dependent_ops=False)
    return recording(*inputs)


def _describe(descriptor: Any) -> tuple[str, Any]:
    """Read AOTAutograd's description of an input or output."""
    from torch._functorch._aot_autograd import descriptors

    match descriptor:
        case descriptors.ParamAOTInput():
            return "parameter", descriptor.target
        case descriptors.BufferAOTInput():
            return "buffer", descriptor.target
        case descriptors.PlainAOTInput():
            return "input", descriptor.idx
        case descriptors.PlainAOTOutput():
            return "output", descriptor.idx
        case descriptors.TangentAOTInput():
            return "tangent", _describe(descriptor.output)
        case descriptors.GradAOTOutput():
            return "gradient", _describe(descriptor.grad_of)
        case descriptors.InputMutationAOTOutput():
            return "update", _describe(descriptor.mutated_input)
    return "other", ""


def apply_function(function: type[torch.autograd.Function], *arguments: Any) -> torch.Tensor:
    """Call an autograd Function, which PyTorch declares without types.

    Args:
        function: The Function.
        *arguments: What its `forward` takes.

    Returns:
        Its one result.
    """
    result: torch.Tensor = function.apply(*arguments)
    return result


def requires_grad_at_any_level(tensor: torch.Tensor) -> bool:
    """Tell whether some `torch.func` transform, or autograd beneath them all, wants a gradient.

    `requires_grad` answers for the innermost transform alone: a stack of weights whose gradient is
    wanted says False inside a `vmap` over it.

    Args:
        tensor: Any tensor, wrapped by the running transforms or not.

    Returns:
        True where one of its levels requires a gradient.
    """
    while not tensor.requires_grad:
        if not (inside_functorch() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return True


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Copy an fx graph with its calling convention (torch.export's differs from the plain one).

    `copy.deepcopy` would copy the convention too, which warns for exported graphs and has no use.

    Args:
        graph: The graph.

    Returns:
        A graph of new nodes under the same names, with the same metadata.
    """
    copied = fx.Graph(tracer_cls=graph._tracer_cls)
    output = graph.output_node()
    nodes: dict[fx.Node, Any] = {}
    copied.output(copied.graph_copy(graph, val_map=nodes), type_expr=output.type)
    for node in graph.find_nodes(op="placeholder"):
        if hasattr(node, "_dynamo_source"):  # by which a backend's inputs are told apart
            nodes[node]._dynamo_source = node._dynamo_source
    copied.output_node().meta = dict(output.meta)
    copied.set_codegen(graph._codegen)
    return copied


def product_rounding(device: torch.device, convolution: bool) -> float:
    """Give the rounding unit to which a layer's float32 products are cut by the global flags.

    Args:
        device: Where the layer runs.
        convolution: Whether it is a convolution; else a matrix product.

    Returns:
        The unit of TF32 or bfloat16 where they are allowed, 0 for full float32.
    """
    backend = _BACKENDS.get(device.type)
    if backend is None:
        return 0.0
    operation = "conv" if convolution else "matmul"
    precision = torch._C._get_fp32_precision_getter(backend, operation)
    if precision == "none" and backend == "cuda" and convolution:
        precision = "tf32"  # cuDNN's own default
    return {"tf32": 2.0**-10, "bf16": 2.0**-7}.get(precision, 0.0)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Turn autocast and reduced-precision float32 products off.

    The flags for TF32 (CUDA) and bfloat16 (oneDNN) products are global to the process. They are
    read and put back through the getter and setter beneath both of PyTorch's public interfaces,
    which refuse to be mixed; the first of several threads changes them, the last puts them back.

    Args:
        device: Where the products run.

    Yields:
        Nothing; the flags are restored at exit.
    """
    backend = _BACKENDS.get(device.type)
    with without_autocast(device):
        if backend is None:
            yield
            return
        with _lock:
            if not _inside[backend]:
                _before[backend] = torch._C._get_fp32_precision_getter(backend, "matmul")
                _set_matmul_precision(backend, "ieee")
            _inside[backend] += 1
        try:
            yield
        finally:
            with _lock:
                _inside[backend] -= 1
                if not _inside[backend]:
                    _set_matmul_precision(backend, _before[backend])


def _set_matmul_precision(backend: str, precision: str) -> None:
    """Write the flag where it differs: "none" stands for full float32, or for an outer flag."""
    if _before[backend] not in ("ieee", "none"):
        torch._C._set_fp32_precision_setter(backend, "matmul", precision)


def has_autocast(device: str) -> bool:
    """Tell whether autocast can be on for a kind of device.

    Args:
        device: The kind, such as `"cuda"`.

    Returns:
        Whether it can.
    """
    known = _AUTOCAST.get(device)
    return torch.amp.is_autocast_available(device) if known is None else known


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Turn autocast off, where the device has it.

    Args:
        device: Where the products run.

    Returns:
        A context manager.
    """
    if has_autocast(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """Give the dtype to which autocast casts an operand of a convolution or linear layer.

    Args:
        x: The operand.

    Returns:
        The dtype, None where autocast is off or leaves the operand alone.
    """
    device = x.device.type
    if not has_autocast(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

"""Pooling, whose gradients ONNX Runtime has on the CPU only, or not at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.geometry import same_padding
from tract_fx.passes.onnx_graph.node_names import described, described_shape
from tract_fx.passes.onnx_graph.repairs.replacement import Replacement, known_dtype

__all__ = ["average_pools_as_convolutions", "max_pools_as_gathers"]


def average_pools_as_convolutions(model: ir.Model) -> int:
    """Write AveragePool as a convolution of each channel with a constant kernel.

    ONNX Runtime's AveragePoolGrad ends the process with an integer division by zero on the CPU, and
    there is no such kernel for CUDA. Entries per window are counted as PyTorch counts them, also at
    a border that `ceil_mode` reaches over.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes replaced.

    Raises:
        ExportError: If a size that the window's count depends on is not known.
    """  # noqa: DOC502 - raised by _window
    changed = 0
    for node in list(model.graph):
        if not is_standard(node, "AveragePool"):
            continue
        x = node.inputs[0]
        assert x is not None
        window = _window(node, x)
        dtype = known_dtype(x, node).numpy()
        new = Replacement(node)
        counts = window.counts
        share = 1.0 if counts is not None else 1 / math.prod(window.kernel)
        weight = new.constant(np.full((window.channels, 1, *window.kernel), share, dtype))
        result = new.op(
            "Conv",
            x,
            weight,
            like=x,
            kernel_shape=window.kernel,
            strides=window.strides,
            dilations=window.dilations,
            pads=[*window.begin, *window.end],
            group=window.channels,
        )
        if counts is not None:
            result = new.op("Div", result, new.constant(counts.astype(dtype)), like=x)
        new.finish(result)
        changed += 1
    return changed


def max_pools_as_gathers(model: ir.Model) -> int:
    """Write MaxPool and GlobalMaxPool as a gather of the entries at the maximum's indices.

    MaxPool has a gradient on the CPU alone: on CUDA each step would go to the CPU and back. The
    gather's gradient runs on both; the forward values stay the pool's own.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes replaced.
    """
    changed = 0
    for node in list(model.graph):
        if is_standard(node, "MaxPool"):
            if not (node.outputs[0].uses() or node.outputs[0].is_graph_output()):
                continue
            if len(node.outputs) > 1 and node.outputs[1].name:
                continue
            _max_pool(node)
        elif is_standard(node, "GlobalMaxPool"):
            _global_max_pool(node)
        else:
            continue
        changed += 1
    return changed


def _max_pool(node: ir.Node) -> None:
    new = Replacement(node)
    x = node.inputs[0]
    options = {name: attribute.value for name, attribute in node.attributes.items()}
    pooled = new.op("MaxPool", x, like=x, **{**options, "storage_order": 0})
    pool = new.nodes[-1]
    pool.resize_outputs(2)
    indices = pool.outputs[1]
    indices.name, indices.type = f"{pooled.name}.indices", ir.TensorType(ir.DataType.INT64)
    indices.shape = node.outputs[0].shape
    every = new.int64([-1])
    # The indices count through the whole tensor, batch and channels included.
    entries = new.op("Reshape", x, every, like=x)
    chosen = new.op("GatherElements", entries, new.op("Reshape", indices, every), like=x, axis=0)
    new.finish(new.op("Reshape", chosen, new.op("Shape", indices), like=x))


def _global_max_pool(node: ir.Node) -> None:
    new = Replacement(node)
    x, result = node.inputs[0], node.outputs[0]
    flat = new.op("Reshape", x, new.int64([0, 0, -1]), like=x)
    index = new.op("ArgMax", flat, axis=2, keepdims=1)
    index.type = ir.TensorType(ir.DataType.INT64)
    chosen = new.op("GatherElements", flat, index, like=x, axis=2)
    rank = 4 if result.shape is None else len(result.shape)
    new.finish(new.op("Reshape", chosen, new.int64([0, 0, *[1] * (rank - 2)]), like=x))


@dataclass(frozen=True)
class _Window:
    """Geometry of an average pool.

    Attributes:
        channels: Number of channels.
        kernel: Size along each spatial axis, as the others.
        strides: Strides.
        dilations: Dilations.
        begin: Padding before.
        end: Padding after, with what `ceil_mode` adds.
        counts: Entries per window, shape (1, 1, *output); None where all have the kernel's.
    """

    channels: int
    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begin: list[int]
    end: list[int]
    counts: np.ndarray | None


def _window(node: ir.Node, x: ir.Value) -> _Window:
    """Read the geometry of an AveragePool.

    Args:
        node: The node.
        x: Its input.

    Returns:
        The geometry.

    Raises:
        ExportError: If a size is needed and not known.
    """
    attributes = node.attributes
    kernel = list(attributes.get_ints("kernel_shape") or ())
    rank = len(kernel)
    strides = list(attributes.get_ints("strides") or [1] * rank)
    dilations = list(attributes.get_ints("dilations") or [1] * rank)
    pads = list(attributes.get_ints("pads") or [0] * (2 * rank))
    auto_pad = attributes.get_string("auto_pad", "NOTSET")
    ceil, include = (attributes.get_int(name, 0) for name in ("ceil_mode", "count_include_pad"))
    sizes = [None] * rank if x.shape is None else list(x.shape)[2:]
    channels = None if x.shape is None else x.shape[1]
    same = auto_pad in {"SAME_UPPER", "SAME_LOWER"}
    sized = all(isinstance(size, int) for size in sizes)
    uniform = not ceil and not same and (include or not any(pads) or auto_pad == "VALID")
    if not isinstance(channels, int) or not (sized or uniform):
        raise ExportError(
            f"{described(node)} over {x.name!r} of shape {described_shape(x.shape)}",
            "the entries in each of its windows can't be counted without the number of channels "
            "and, with padding or ceil_mode, the spatial sizes",
            "Export the model with these sizes fixed; the batch may stay dynamic",
        )
    begin, end = pads[:rank], pads[rank:]
    if auto_pad == "VALID":
        begin, end = [0] * rank, [0] * rank
    if uniform:
        return _Window(channels, kernel, strides, dilations, begin, end, None)
    counts = np.ones((1, 1, *[1] * rank))
    for axis in range(rank):
        size = sizes[axis]
        assert isinstance(size, int)
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        if same:
            sides = same_padding(auto_pad, size, reach, strides[axis])
            assert sides is not None
            begin[axis], end[axis] = sides
        whole = size + begin[axis] + end[axis]
        steps = (whole - reach) / strides[axis]
        outputs = int(math.ceil(steps) if ceil else math.floor(steps)) + 1
        if ceil and (outputs - 1) * strides[axis] >= size + begin[axis]:
            outputs -= 1  # a window must start inside the input or the padding before it
        starts = np.arange(outputs) * strides[axis] - begin[axis]
        taps = starts[:, None] + np.arange(kernel[axis]) * dilations[axis]
        low, high = (-begin[axis], size + end[axis]) if include else (0, size)
        along = ((taps >= low) & (taps < high)).sum(1)
        counts = counts * along.reshape([-1 if a == axis else 1 for a in range(-2, rank)])
        last = (outputs - 1) * strides[axis] + reach
        end[axis] = max(end[axis], last - size - begin[axis])
    return _Window(channels, kernel, strides, dilations, begin, end, counts)

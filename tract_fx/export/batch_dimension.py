"""The first dimension of an ONNX model's inputs, left open so that batches of any size go in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from tract_fx.errors import ExportError, TractError
from tract_fx.export.graph_runs import run_graph
from tract_fx.export.left_out import warn_of_left_out
from tract_fx.importer.inferred_shapes import infer_shapes
from tract_fx.importer.modes import evaluation_mode
from tract_fx.ort_training import message_of
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.cutting import cut
from tract_fx.passes.onnx_graph.values import ancestors
from tract_fx.step.names import BATCH

ROWS_BY_DATA = ("NonMaxSuppression", "NonZero", "Unique", "Compress")
"""Operators whose results have as many entries as the numbers in their operands make it."""

TOLERANCE = 1e-4
"""Largest difference of outputs between the opened and the fixed graph, relative to the largest
output: float32 rounding, which depends on the batch's size."""


def fixed_batch(inputs: Sequence[ir.Value]) -> int | None:
    """Tell the size of a batch that a model's inputs fix."""
    firsts = {v.shape[0] if v.shape is not None and len(v.shape) else None for v in inputs}
    first = firsts.pop() if len(firsts) == 1 else None
    return first if isinstance(first, int) else None


def name_batch(model: ir.Model, inputs: Sequence[ir.Value]) -> None:
    """Name the open first dimension of the only input, so that targets are held to its size."""
    shape = inputs[0].shape if len(inputs) == 1 else None
    if shape is None or not len(shape):
        return
    first = shape[0]
    if isinstance(first, ir.SymbolicDim) and first.value is None:
        _set_first(inputs[0], BATCH)
        _infer_again(model, lambda s: not all(isinstance(n, int) for n in s), first)


def open_batch(
    model: ir.Model,
    inputs: Sequence[ir.Value],
    feeds: Mapping[str, np.ndarray],
    read: str | None,
) -> ir.Model:
    """Let a model that was exported for batches of one size take batches of any size.

    The first dimension of the inputs becomes open, and so does each Reshape's that repeats its
    size. Both graphs are then run: the opened one has to give for two batches in one what the
    fixed one gives for each. Outputs that the loss does not read are left out where they don't, but
    for those whose number of rows depends on the data: these need only be as many together.
    """
    size = fixed_batch(inputs)
    assert size is not None
    opened = model.clone()
    names = [str(value.name) for value in inputs]
    for node in list(opened.graph):
        if is_standard(node, "Reshape"):
            _open_reshape(opened.graph, node, size)
    for value in opened.graph.inputs:
        if value.name in names:
            _set_first(value, BATCH)
    _infer_again(opened, lambda _: True, size)
    batches = {name: _two_batches(feeds[name], size) for name in names}
    outputs = {str(value.name): value for value in model.graph.outputs}
    needed = list(outputs) if read is None else [read]
    by_data = {
        name
        for name, value in outputs.items()
        if name not in needed and any(is_standard(n, *ROWS_BY_DATA) for n in ancestors(value))
    }

    def each_half(tried: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """Values of the model as it is."""
        parts = ({n: v[i * size :][:size] for n, v in batches.items()} for i in range(2))
        return [_run(model, part, tried) for part in parts]

    def changed(tried: Sequence[str]) -> dict[str, str]:
        """What is wrong, by the name of a value that would be another one."""
        try:
            found, halves = _run(opened, batches, tried), each_half(tried)
        except Exception as error:  # ONNX Runtime's exceptions have no common root of their own
            if len(tried) > 1:
                return {n: why for name in tried for n, why in changed([name]).items()}
            return {tried[0]: error.found if isinstance(error, TractError) else message_of(error)}
        return {
            name: f"the output {name!r} is another one then"
            for name in tried
            if not _is_joined(found[name], halves[0][name], halves[1][name], name in by_data)
        }

    wrong = changed(list(dict.fromkeys([*needed, *outputs])))
    for name in needed:
        if name in wrong:
            each_half([name])  # a model that does not run at all says so itself
            raise _refused(size, inputs, wrong[name])
    opened_for = f"its batch dimension was opened, {size} in the file, and"
    warn_of_left_out({name: f"{opened_for} {why}" for name, why in wrong.items()})
    given = list(opened.graph.inputs)
    cut(opened.graph, [value for value in opened.graph.outputs if value.name not in wrong])
    opened.graph.inputs[:] = given  # also what nothing reads any more
    return opened


def _run(
    model: ir.Model, feeds: Mapping[str, np.ndarray], outputs: Sequence[str]
) -> dict[str, np.ndarray]:
    evaluation = model.clone()
    evaluation_mode(evaluation)
    return run_graph(evaluation, feeds, outputs)


def _refused(size: int, inputs: Sequence[ir.Value], why: str) -> ExportError:
    shapes = ", ".join(f"{value.name!r} of shape {value.shape}" for value in inputs)
    return ExportError(
        f"a model for batches of {size} ({shapes}), run on {2 * size} after its batch dimension "
        "was opened",
        why,
        "Export it with a dynamic batch dimension (torch.onnx.export: dynamic_shapes or "
        "dynamic_axes; tf2onnx: an input signature of None)",
    )


def _set_first(value: ir.Value, name: str) -> None:
    assert value.shape is not None
    shape = value.shape.copy(frozen=False)
    shape[0] = name
    value.shape = shape


def _open_reshape(graph: ir.Graph, node: ir.Node, size: int) -> None:
    """Let a Reshape that keeps a first dimension of this size keep whatever is there."""
    x, target = node.inputs[:2]
    tensor = None if target is None else ir.convenience.get_const_tensor(target)
    first = None if x is None or x.shape is None or not len(x.shape) else x.shape[0]
    if tensor is None or first != size:
        return
    sizes = tensor.numpy()
    if sizes.ndim != 1 or not len(sizes) or sizes[0] != size or 0 in sizes:
        return
    node.attributes.pop("allowzero", None)  # without zeros so far, it has no meaning
    name = f"{node.name}_open_shape"
    constant = ir.tensor(np.array([0, *sizes[1:]], np.int64), name=name)
    value = ir.val(name, const_value=constant)
    graph.register_initializer(value)
    node.replace_input_with(1, value)


def _infer_again(model: ir.Model, is_stale: Callable[[ir.Shape], bool], size: object) -> None:
    """Infer shapes anew; of operators that onnx knows none of, the first dimension is opened."""
    for node in model.graph:
        for value in node.outputs:
            if value.shape is None or not is_stale(value.shape):
                continue
            if node.domain in {"", "ai.onnx"}:
                value.shape = None
            elif len(value.shape) and value.shape[0] == size:
                _set_first(value, BATCH)
    infer_shapes(model)


def _two_batches(example: np.ndarray, size: int) -> np.ndarray:
    """Make two different batches out of an example."""
    rows = example
    while len(rows) < 2 * size:
        other = np.flip(rows, axis=-1)  # of indices, which stay in their range
        if rows.dtype.kind == "f":
            other = (other * -0.5).astype(rows.dtype)
        rows = np.concatenate([rows, other])
    return np.ascontiguousarray(rows[: 2 * size])


def _is_joined(whole: np.ndarray, first: np.ndarray, second: np.ndarray, by_data: bool) -> bool:
    """Tell whether an output is one batch's rows behind the other's; of a number, mean or sum.

    By data it is enough that it has as many entries as both: how many rows there are depends on
    the data, and what they say may count through the whole batch.
    """
    if by_data:
        return whole.size == first.size + second.size
    if whole.ndim != first.ndim:
        return False
    if not first.ndim:
        return any(_is_close(whole, value) for value in ((first + second) / 2, first + second))
    joined = np.concatenate([first, second])
    return joined.shape == whole.shape and _is_close(whole, joined)


def _is_close(found: np.ndarray, expected: np.ndarray) -> bool:
    if expected.dtype.kind != "f":
        return bool((found == expected).all())
    scale = float(np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected))) or 1.0
    return np.allclose(found, expected, rtol=0, atol=TOLERANCE * scale, equal_nan=True)

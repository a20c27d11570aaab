"""Which value of a forward graph a loss reads, where the user did not say.

Classifiers from other frameworks often end after a softmax or a sigmoid, which the losses
"cross_entropy" and "bce_with_logits" have inside them, and give labels beside the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from torch import nn
from torch.nn import functional as F

from tract_fx.errors import UnsupportedTrainingError
from tract_fx.export.losses import Loss, describe_loss
from tract_fx.passes.onnx_graph.calls import is_standard

__all__ = ["default_output", "logits_of"]

_CROSS_ENTROPY = {"cross_entropy", F.cross_entropy, nn.CrossEntropyLoss}
_BINARY = {
    "bce_with_logits",
    F.binary_cross_entropy_with_logits,
    nn.BCEWithLogitsLoss,
}
_UNCHANGED = ("Identity", "Cast")
_RESHAPED = ("Squeeze", "Unsqueeze", "Reshape", "Flatten", "Transpose")
_ACTIVATIONS = ("Softmax", "LogSoftmax", "Sigmoid")
_NO_GRADIENT = (
    *("ArgMax", "ArgMin", "Shape", "Size", "NonZero", "Round", "Floor", "Ceil", "Sign", "Unique"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Xor"),
)


def default_output(model: ir.Model, loss: Loss) -> str:
    """Choose the output that a loss reads: the one of floats that a gradient flows through.

    Args:
        model: The forward graph.
        loss: The loss.

    Returns:
        The output's name.

    Raises:
        UnsupportedTrainingError: If there is none, or several that are not one another's
            logits.
    """
    candidates = {}
    for output in model.graph.outputs:
        if output.dtype in {None, ir.DataType.FLOAT} and _trains(output):
            candidates[output.name or ""] = output
    if len(candidates) > 1 and _kind(loss):
        candidates = _without_doubles(candidates, loss)
    if len(candidates) == 1:
        return next(iter(candidates))
    listed = ", ".join(f"{v.name}: {v.dtype}{v.shape}" for v in model.graph.outputs)
    if not candidates:
        raise UnsupportedTrainingError(
            f"the outputs are {listed}",
            "none is a float32 tensor that depends on parameters through differentiable operators",
            "Name the value that the loss reads: output=…",
        )
    raise UnsupportedTrainingError(
        f"the outputs are {listed}",
        f"the loss {describe_loss(loss)} could read each of {', '.join(candidates)}",
        "Name the one that it reads: output=…",
    )


def logits_of(model: ir.Model, output: str, loss: Loss) -> str:
    """Find the logits behind an output, for losses that have the softmax or sigmoid in them.

    Args:
        model: The forward graph.
        output: Name of a value.
        loss: The loss; other losses than cross entropy and binary cross entropy with logits
            take the output as it is.

    Returns:
        The name of the input of the final Softmax or LogSoftmax (cross entropy) or Sigmoid (with
        logits), or of the output itself if there is none.

    Raises:
        UnsupportedTrainingError: If the output is of probabilities whose logits the loss can't
            take as they are.
    """
    found = _logits(_find(model, output), _kind(loss))
    if isinstance(found, _NoLogits):
        raise UnsupportedTrainingError(
            f"the output {output} is {found.what}",
            f"the loss {describe_loss(loss)} takes logits",
            found.remedy,
        )
    return found.name or output


@dataclass(frozen=True)
class _NoLogits:
    """What an output is instead, and what to do."""

    what: str
    remedy: str


@dataclass(frozen=True)
class _Maker:
    """The operator that an output's numbers come from.

    Attributes:
        node: The operator.
        source: What it reads first.
        rank: The rank of its result, None if not known.
        reshaped: Whether the output has another shape than that result.
    """

    node: ir.Node
    source: ir.Value
    rank: int | None
    reshaped: bool


def _maker(output: ir.Value) -> _Maker | None:
    """Look behind what leaves the numbers as they are; None for an input or a constant."""
    value, rank, reshaped = output, None, False
    while (node := value.producer()) is not None and node.inputs and node.inputs[0] is not None:
        if rank is None and not reshaped and value.shape is not None:
            rank = len(value.shape)
        if not is_standard(node, *_UNCHANGED, *_RESHAPED):
            return _Maker(node, node.inputs[0], rank, reshaped)
        value, reshaped = node.inputs[0], reshaped or is_standard(node, *_RESHAPED)
    return None


def _logits(output: ir.Value, kind: str | None) -> ir.Value | _NoLogits:
    """The logits behind an output; the output itself, where no activation is known in it."""
    made = None if kind is None else _maker(output)
    if made is None:
        return output
    pair = _binary_pair(made.node)
    if pair is not None:
        if kind == "binary" and not made.reshaped:
            return pair
        return _NoLogits(
            "1 − p and p of one sigmoid, the two classes of a binary classifier",
            f'Use loss="bce_with_logits", whose output is {pair.name} and whose target is float32 '
            f"of shape {pair.shape or '(batch, 1)'}",
        )
    if is_standard(made.node, *_ACTIVATIONS):
        return _read_by_activation(made, kind)
    if made.node.op_type == "Normalizer" or _divides_by_sum(made.node):
        return _NoLogits(
            f"normalised by {made.node.op_type}, hence probabilities",
            "Name the logits (output=…), or give a callable that takes probabilities",
        )
    return output


def _read_by_activation(made: _Maker, kind: str | None) -> ir.Value | _NoLogits:
    """What a softmax or a sigmoid reads, if it is the loss's own."""
    op, logits = made.node.op_type, f"output={made.source.name}"
    if op not in (("Sigmoid",) if kind == "binary" else ("Softmax", "LogSoftmax")):
        other = "cross_entropy" if kind == "binary" else "bce_with_logits"
        return _NoLogits(
            f"what a {op} gives",
            f'Use loss="{other}", or name the value that the loss reads: {logits}',
        )
    if made.reshaped:
        return _NoLogits(
            f"a {op}'s result in another shape",
            f"Name the logits, {logits}, with targets that fit their shape",
        )
    if kind == "classes" and not _over_classes(made.node, made.rank):
        return _NoLogits(
            f"a {op}'s result along another dimension than the second",
            f"Give a callable that moves the classes to dimension 1, and the logits, {logits}",
        )
    return made.source


def _kind(loss: Loss) -> str | None:
    """The activation that a loss has in it: "classes" for softmax, "binary" for sigmoid."""
    key = type(loss) if isinstance(loss, nn.Module) else loss
    if key in _CROSS_ENTROPY:
        return "classes"
    return "binary" if key in _BINARY else None


def _without_doubles(candidates: dict[str, ir.Value], loss: Loss) -> dict[str, ir.Value]:
    """Of outputs that are logits, and what an activation makes of them, keep the logits or one."""
    chosen: dict[ir.Value, str] = {}
    for name, value in candidates.items():
        found = _logits(value, _kind(loss))
        source = value if isinstance(found, _NoLogits) else found
        is_logits = source is value
        while (node := source.producer()) is not None and is_standard(node, "Identity"):
            assert node.inputs[0] is not None
            source = node.inputs[0]
        if is_logits or source not in chosen:
            chosen[source] = name
    return {name: candidates[name] for name in chosen.values()}


def _find(model: ir.Model, name: str) -> ir.Value:
    """Find a value by name; refused if there is none."""
    made = (v for node in model.graph for v in node.outputs)
    for value in (*model.graph.outputs, *model.graph.inputs, *made):
        if value.name == name:
            return value
    outputs = ", ".join(str(v.name) for v in model.graph.outputs)
    raise UnsupportedTrainingError(
        f"no value of the model is called {name!r}",
        f"its outputs are {outputs}",
        "Name one of them, or a value in the graph: output=…",
    )


def _trains(value: ir.Value) -> bool:
    """Whether an initializer of several floats is behind a value, by operators with gradients."""
    stack, seen = [value], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.is_initializer():
            tensor = current.const_value
            if tensor is not None and tensor.dtype.is_floating_point() and tensor.size > 1:
                return True
        node = current.producer()
        if node is None or node.domain == "ai.onnx.ml" or is_standard(node, *_NO_GRADIENT):
            continue
        stack.extend(v for v in node.inputs if v is not None)
    return False


def _over_classes(node: ir.Node, rank: int | None) -> bool:
    """Whether a softmax surely runs along dimension 1, where cross entropy has the classes."""
    version = node.version or (node.graph.opset_imports.get("", 13) if node.graph else 13)
    if version < 13:  # dimensions from the axis on are taken together
        return rank == 2 and node.attributes.get_int("axis", 1) in {1, -1}
    axis = node.attributes.get_int("axis", -1)
    return axis == 1 or (rank is not None and axis + rank == 1)


def _binary_pair(node: ir.Node) -> ir.Value | None:
    """What p = sigmoid(·) reads in Concat(1 − p, p), scikit-learn's binary classifier."""
    if not is_standard(node, "Concat") or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    if first is None or second is None:
        return None
    minus, sigmoid = first.producer(), second.producer()
    if minus is None or sigmoid is None:
        return None
    if not (is_standard(minus, "Sub") and is_standard(sigmoid, "Sigmoid")):
        return None
    one = None if minus.inputs[0] is None else ir.convenience.get_const_tensor(minus.inputs[0])
    if one is None or not bool(np.all(one.numpy() == 1)) or minus.inputs[1] is not second:
        return None
    return sigmoid.inputs[0]


def _divides_by_sum(node: ir.Node) -> bool:
    """Whether it is x ÷ Σx, a normalisation (or a softmax) written out."""
    if not is_standard(node, "Div") or node.inputs[1] is None:
        return False
    divisor = node.inputs[1].producer()
    return (
        divisor is not None
        and is_standard(divisor, "ReduceSum", "ReduceL1")
        and divisor.inputs[0] is node.inputs[0]
    )

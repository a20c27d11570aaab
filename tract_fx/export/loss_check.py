"""A loss in ONNX against the same loss in PyTorch: its values and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from tract_fx import ort_training
from tract_fx.errors import ExportError, UnsupportedTrainingError
from tract_fx.export.quiet import quiet
from tract_fx.passes.onnx_graph.values import ancestors, operands

__all__ = ["check_loss"]

Array = npt.NDArray[np.generic]

RELATIVE = 1e-5  # float32 sums in another order differ by 1e-6 at most
ABSOLUTE = 1e-6  # outputs are of order one: the rounding of a sum that cancels


def check_loss(
    model: ir.Model, function: Callable[..., Tensor], values: Sequence[Tensor], outputs: int
) -> None:
    """Compare a loss and its gradient by the outputs with PyTorch's.

    Args:
        model: The loss.
        function: The same loss in PyTorch.
        values: Outputs, then targets.
        outputs: How many of the values are outputs.

    Raises:
        ExportError: If ONNX Runtime Training has no gradient for an operator, PyTorch's loss is not
            finite, or one of the two differs by more than 1e-5 of its largest element.
        UnsupportedTrainingError: If the loss does not depend on the outputs.
    """
    leaves = [v.detach().clone().requires_grad_(v.is_floating_point()) for v in values[:outputs]]
    expected = function(*leaves, *values[outputs:])
    if not torch.isfinite(expected):
        raise ExportError(
            f"the loss of the examples is {expected.item()}",
            "its ONNX graph can't be verified on them",
            "Give example inputs and targets for which the loss is finite",
        )
    if not expected.requires_grad:
        raise UnsupportedTrainingError(
            "the loss depends on no output",
            "it would train nothing",
            "Write it with differentiable torch operations on the outputs",
        )
    gradients = torch.autograd.grad(expected, leaves, allow_unused=True, materialize_grads=True)
    names = [v.name or "" for v in model.graph.inputs]
    needed = _used(model, names[:outputs])
    proto = _with_gradients(model, needed)
    session = ort_training.inference_session(proto, "cpu", 0)
    feeds = {n: v.detach().numpy() for n, v in zip(names, values, strict=True)}
    taken = {i.name for i in session.get_inputs()}
    wanted = [model.graph.outputs[0].name, *(f"{n}_grad" for n in needed)]
    try:
        got = session.run(wanted, {n: v for n, v in feeds.items() if n in taken})
    except Exception as error:  # ONNX Runtime's own classes are not public
        raise ExportError(
            f"ONNX Runtime can't compute the loss for shapes "
            f"{[tuple(v.shape) for v in values]}: {ort_training.message_of(error)}",
            "its graph has to hold for every batch size",
            "Write the loss with other operators, or let the model return it (loss=None)",
        ) from error
    _compare("loss", np.asarray(got[0]), expected.detach(), ABSOLUTE)
    for name, gradient in zip(names[:outputs], gradients, strict=True):
        found = got[wanted.index(f"{name}_grad")] if name in needed else None
        _compare(f"gradient by {name}", found, gradient, ABSOLUTE / max(gradient.numel(), 1))


def _used(model: ir.Model, names: Sequence[str]) -> list[str]:
    """Find the floating-point inputs that the loss depends on.

    Args:
        model: The loss.
        names: Names of inputs.

    Returns:
        Those of them that it depends on, in the same order.
    """
    read = [v for node in ancestors(model.graph.outputs[0]) for v in operands(node)]
    reached = {v.name for v in read if v.dtype is not None and v.dtype.is_floating_point()}
    return [n for n in names if n in reached]


def _with_gradients(model: ir.Model, names: Sequence[str]) -> bytes:
    """Add the gradients by inputs with ONNX Runtime's builder.

    Args:
        model: The loss.
        names: Inputs.

    Returns:
        The model, serialized, with outputs `{name}_grad`.

    Raises:
        ExportError: If an operator has no gradient.
    """
    loss = model.graph.outputs[0].name
    proto = ir.to_proto(model).SerializeToString()
    try:
        with quiet():
            builder = ort_training.gradient_graph_builder()(proto, {loss}, set(names), loss, None)
            builder.build()
            graph: bytes = builder.get_model()
    except RuntimeError as error:
        missing = str(error).strip().partition("not been registered: ")[2]
        found = f"the operator {missing}" if missing else str(error).strip()
        raise ExportError(
            f"ONNX Runtime Training can't differentiate the loss: {found}",
            "its gradient builder knows no rule",
            "Write the loss with other operators (ReduceMax, for one, has no gradient there)",
        ) from error
    return graph


def _compare(what: str, found: Array | None, expected: Tensor, absolute: float) -> None:
    """Refuse values that differ.

    Args:
        what: Their name in the message.
        found: From ONNX Runtime; None where nothing depends on the value, so that it is zero.
        expected: From PyTorch.
        absolute: The error allowed beside `RELATIVE`.

    Raises:
        ExportError: If they differ.
    """
    wanted = expected.double().numpy()
    got = np.zeros_like(wanted) if found is None else found.astype(np.float64)
    size = float(np.abs(wanted).max(initial=0.0))
    same_shape = got.shape == wanted.shape
    error = float(np.abs(got - wanted).max(initial=0.0)) if same_shape else float("inf")
    if not error <= RELATIVE * size + absolute:  # NaN is no agreement either
        raise ExportError(
            f"the {what} in ONNX Runtime differs from PyTorch's by {error:.3g}, of {size:.3g}",
            "an operator of the loss means something else in ONNX, or a value is detached",
            "Write the loss with other operators, or let the model return it (loss=None)",
        )

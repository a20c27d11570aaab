"""Elementwise operators that ONNX Runtime has no gradient for, or a wrong one."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.repairs.replacement import Replacement, known_dtype

__all__ = ["activations_as_primitives"]


def activations_as_primitives(model: ir.Model) -> int:
    """Write activations with operators that have the right gradient.

    Of these, Gelu with approximate="tanh" has a gradient in ONNX Runtime, and it is that of the
    exact one; the others have none. Where a function has a kink, the gradient there is PyTorch's.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes replaced.

    Raises:
        ExportError: If the dtype of an input is not known.
    """  # noqa: DOC502 - raised by known_dtype
    changed = 0
    for node in list(model.graph):
        if not is_standard(node, *FORMULAS):
            continue
        if node.op_type == "Gelu" and node.attributes.get_string("approximate", "none") == "none":
            continue
        x = node.inputs[0]
        assert x is not None
        terms = _Terms(node, x)
        terms.new.finish(FORMULAS[node.op_type](terms, x))
        changed += 1
    return changed


class _Terms:
    """Writes formulas in values of one dtype."""

    def __init__(self, node: ir.Node, x: ir.Value) -> None:
        self.new = Replacement(node)
        self._like = x
        self._dtype = known_dtype(x, node)

    def attribute(self, name: str, default: float) -> float:
        """Give an attribute of the node to replace."""
        return self.new.node.attributes.get_float(name, default)

    def __call__(self, op_type: str, *operands: ir.Value | float) -> ir.Value:
        """Write an operator over values and numbers."""
        values = [
            operand if isinstance(operand, ir.Value) else self.new.scalar(operand, self._dtype)
            for operand in operands
        ]
        return self.new.op(op_type, *values, like=self._like)

    def above(
        self, bound: float, x: ir.Value, then: ir.Value | float, other: ir.Value | float
    ) -> ir.Value:
        """Write Where(x > bound, then, other), of values in x's shape and numbers."""
        mask = self.new.op("Greater", x, self.new.scalar(bound, self._dtype))
        mask.type = ir.TensorType(ir.DataType.BOOL)
        return self("Where", mask, then, other)


def _gelu_tanh(t: _Terms, x: ir.Value) -> ir.Value:
    cube = t("Mul", t("Mul", t("Mul", x, x), x), 0.044715)
    inner = t("Mul", t("Add", x, cube), math.sqrt(2 / math.pi))
    return t("Mul", t("Mul", x, 0.5), t("Add", t("Tanh", inner), 1.0))


def _hard_sigmoid(t: _Terms, x: ir.Value, alpha: float, beta: float) -> ir.Value:
    return t("Clip", t("Add", t("Mul", x, alpha), beta), 0.0, 1.0)


def _softplus(t: _Terms, x: ir.Value) -> ir.Value:
    """max(x, 0) + log(1 + e^−|x|), with the derivative ½ at 0 that Relu and Abs don't give."""
    decay = t("Exp", t.above(0.0, x, t("Neg", x), x))
    return t("Add", t.above(0.0, x, x, 0.0), t("Log", t("Add", decay, 1.0)))


def _exponential_below(t: _Terms, x: ir.Value, alpha: float, scale: float) -> ir.Value:
    """x above 0 and scale · (e^(x/alpha) − 1) below, with the derivative scale/alpha at 0."""
    above = t.above(0.0, x, x, 0.0)
    below = t.above(0.0, x, 0.0, x)
    inner = below if alpha == 1 else t("Div", below, alpha)
    return t("Add", above, t("Mul", t("Sub", t("Exp", inner), 1.0), scale))


def _selu(t: _Terms, x: ir.Value) -> ir.Value:
    alpha = t.attribute("alpha", 1.67326319217681884765625)
    gamma = t.attribute("gamma", 1.05070102214813232421875)
    return t("Mul", _exponential_below(t, x, 1.0, alpha), gamma)


def _celu(t: _Terms, x: ir.Value) -> ir.Value:
    alpha = t.attribute("alpha", 1.0)
    return _exponential_below(t, x, alpha, alpha)


def _prelu(t: _Terms, x: ir.Value) -> ir.Value:
    slope = t.new.node.inputs[1]
    assert slope is not None
    return t.above(0.0, x, x, t("Mul", x, slope))


def _thresholded_relu(t: _Terms, x: ir.Value) -> ir.Value:
    return t.above(t.attribute("alpha", 1.0), x, x, 0.0)


FORMULAS: dict[str, Callable[[_Terms, ir.Value], ir.Value]] = {
    "Gelu": _gelu_tanh,
    "HardSigmoid": lambda t, x: _hard_sigmoid(
        t, x, t.attribute("alpha", 0.2), t.attribute("beta", 0.5)
    ),
    "HardSwish": lambda t, x: t("Mul", x, _hard_sigmoid(t, x, 1 / 6, 0.5)),
    "Softplus": _softplus,
    "Mish": lambda t, x: t("Mul", x, t("Tanh", _softplus(t, x))),
    "Elu": lambda t, x: _exponential_below(t, x, 1.0, t.attribute("alpha", 1.0)),
    "Selu": _selu,
    "Celu": _celu,
    "PRelu": _prelu,
    "ThresholdedRelu": _thresholded_relu,
    "Softsign": lambda t, x: t("Div", x, t("Add", t("Abs", x), 1.0)),
    "Tan": lambda t, x: t("Div", t("Sin", x), t("Cos", x)),
}

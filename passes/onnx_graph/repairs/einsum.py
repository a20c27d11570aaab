"""Einsum, which ONNX Runtime has no gradient for."""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.repairs.replacement import Replacement

__all__ = ["einsums_as_products"]


def einsums_as_products(model: ir.Model) -> int:
    """Write Einsum of one or two operands with Transpose, ReduceSum and MatMul.

    Args:
        model: The model, edited in place.

    Returns:
        The number of nodes replaced. Those stay that have an ellipsis, a letter twice in one
        operand, more operands, or several sizes to be found when run that would have to be merged.
    """
    changed = 0
    for node in list(model.graph):
        if not is_standard(node, "Einsum"):
            continue
        terms, result = _letters(node)
        if terms is None or any(value is None or value.shape is None for value in node.inputs):
            continue
        changed += _Product(node, terms, result).write()
    return changed


def _letters(node: ir.Node) -> tuple[list[str] | None, str]:
    """Read an equation: the operands' letters and the result's; None for the forms that stay."""
    equation = (node.attributes.get_string("equation") or "").replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        joined = "".join(terms)
        result = "".join(sorted(letter for letter in set(joined) if joined.count(letter) == 1))
    whole = [*terms, result]
    if "." in equation or any(len(set(term)) < len(term) for term in whole) or len(terms) > 2:
        return None, result
    return terms, result


class _Product:
    """Writes one Einsum."""

    def __init__(self, node: ir.Node, terms: list[str], result: str) -> None:
        self.new = Replacement(node)
        self.terms, self.result = terms, result
        self.sizes: dict[str, int | None] = {}
        for term, value in zip(terms, node.inputs, strict=True):
            assert value is not None and value.shape is not None
            for letter, size in zip(term, value.shape, strict=True):
                if self.sizes.get(letter) is None:
                    self.sizes[letter] = size if isinstance(size, int) else None

    def write(self) -> bool:
        """Replace the node, if it is of a form that can be written."""
        values = [value for value in self.new.node.inputs if value is not None]
        if len(values) == 1:
            x, letters = self._summed(values[0], self.terms[0], self.result)
        else:
            pair = self._multiplied(values)
            if pair is None:
                return False
            x, letters = pair
        self.new.finish(self._ordered(x, letters, self.result))
        return True

    def _multiplied(self, values: list[ir.Value]) -> tuple[ir.Value, str] | None:
        """Write the product of two operands, as batch letters, left and right ones."""
        a, b = self.terms
        kept = set(self.result)
        left_value, a = self._summed(values[0], a, kept | set(b))
        right_value, b = self._summed(values[1], b, kept | set(a))
        batch = "".join(letter for letter in a if letter in b and letter in kept)
        inner = "".join(letter for letter in a if letter in b and letter not in kept)
        left = "".join(letter for letter in a if letter not in b)
        right = "".join(letter for letter in b if letter not in a)
        shapes = [
            self._merged(batch, [left, inner]),
            self._merged(batch, [inner, right]),
            self._opened(batch, left + right, merged=len(left) != 1),
        ]
        if any(shape is None for shape in shapes):
            return None
        x = self._ordered(left_value, a, batch + left + inner)
        y = self._ordered(right_value, b, batch + inner + right)
        x, y = (self._reshaped(v, s) for v, s in zip((x, y), shapes[:2], strict=True))
        product = self.new.op("MatMul", x, y, like=x)
        return self._reshaped(product, shapes[2]), batch + left + right

    def _merged(self, batch: str, groups: list[str]) -> list[int] | None:
        """Shape with each group of letters as one axis, 0 for a size that stays in its place."""
        shape = [0] * len(batch)
        for place, group in enumerate(groups):
            known = [self.sizes[letter] for letter in group]
            if all(size is not None for size in known):
                shape.append(math.prod(size for size in known if size is not None))
            elif len(group) == 1 and all(len(before) == 1 for before in groups[:place]):
                shape.append(0)
            else:
                shape.append(-1)
        return shape if shape.count(-1) < 2 else None

    def _opened(self, batch: str, letters: str, merged: bool) -> list[int] | None:
        """Shape with an axis for each letter again."""
        shape = [0] * len(batch)
        for place, letter in enumerate(letters):
            size = self.sizes[letter]
            stays = not merged and place == 0
            shape.append(size if size is not None else 0 if stays else -1)
        return shape if shape.count(-1) < 2 else None

    def _reshaped(self, x: ir.Value, shape: list[int] | None) -> ir.Value:
        assert shape is not None
        return self.new.op("Reshape", x, self.new.int64(shape), like=x)

    def _summed(self, x: ir.Value, letters: str, kept: Iterable[str]) -> tuple[ir.Value, str]:
        """Sum over the letters that are not kept."""
        axes = [axis for axis, letter in enumerate(letters) if letter not in kept]
        if not axes:
            return x, letters
        total = self.new.op("ReduceSum", x, self.new.int64(axes), like=x, keepdims=0)
        return total, "".join(letter for letter in letters if letter in kept)

    def _ordered(self, x: ir.Value, letters: str, order: str) -> ir.Value:
        """Transpose from one order of letters to another; what comes out was made here."""
        perm = [letters.index(letter) for letter in order]
        if perm == sorted(perm) and x.producer() in self.new.nodes:
            return x
        return (
            self.new.op("Transpose", x, like=x, perm=perm)
            if perm
            else self.new.op("Identity", x, like=x)
        )

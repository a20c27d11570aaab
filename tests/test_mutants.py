"""The tests can fail: with the library broken on purpose, the comparison with the oracle says so.

Each mutant is one mistake that somebody could make. `wrong` lists the geometries on which the
rewritten layer's gradient is off; a mutant that it does not notice means that the tests are blind.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from geometries import GEOMETRIES, Geometry
from oracle import Array, precondition, relative_error, tract_gradient
from tract_fx import tract_module, tract_pass
from tract_fx.modules import copy_tree
from tract_fx.preconditioner import (
    PatchGeometry,
    gram,
    gram_matrix,
    patches,
    precondition_weight_gradient,
    row_blocks,
    solve,
    windows,
)
from tract_fx.preconditioner.windows import Window

Ways = dict[str, Callable[[nn.Module, Tensor], nn.Module]]
WAYS: Ways = {
    "call_module": lambda m, x: tract_pass(fx.symbolic_trace(m)),
    "call_function": lambda m, x: tract_pass(torch.export.export(m, (x,))),
    "eager": lambda m, x: tract_module(m, (x,)),
}
# Where the library looks them up.
OPERATOR = "tract_fx.preconditioner.operators.precondition_weight_gradient"
GRAM = "tract_fx.preconditioner.solve.gram"
SOME = [g for g in GEOMETRIES if g.name.endswith(("padding", "dilation-groups", "linear-grid"))]


def prepared(geometry: Geometry, way: str) -> tuple[nn.Module, Tensor, Tensor, Array]:
    """A rewritten layer, its input, an output's gradient, and the oracle's of the weight."""
    layer, x = geometry.layer(torch.float64), geometry.input(torch.float64)
    rewritten = WAYS[way](nn.Sequential(layer), x)
    dz = torch.ones_like(rewritten(x)).cumsum(-1)
    return rewritten, x, dz, tract_gradient(layer, x, dz)


kept = functools.cache(prepared)  # for mutants of what runs in the backward pass


def wrong(
    geometries: Iterable[Geometry],
    ways: Iterable[str],
    prepare: Callable[[Geometry, str], tuple[nn.Module, Tensor, Tensor, Array]] = kept,
) -> Iterator[str]:
    """Names of the geometries, by way, whose weight gradient is not the oracle's."""
    for geometry, way in itertools.product(geometries, ways):
        rewritten, x, dz, expected = prepare(geometry, way)
        (gradient,) = torch.autograd.grad(rewritten(x), [next(rewritten.parameters())], dz)
        if not relative_error(gradient, expected) < 1e-10:
            yield f"{geometry} by {way}"


def assert_right(geometries: Iterable[Geometry], *ways: str) -> None:
    assert list(wrong(geometries, ways)) == []


def replace_method(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[..., Any]) -> None:
    """Change what a method of `PatchGeometry` returns."""
    original = getattr(PatchGeometry, name)
    monkeypatch.setattr(PatchGeometry, name, lambda self, x: change(original(self, x), self, x))


def plain_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OPERATOR, lambda grad, *_: grad.clone())


def wrong_lambda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        OPERATOR, lambda g, x, value, *a: precondition_weight_gradient(g, x, 2 * value, *a)
    )


def gram_not_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRAM, lambda x, g, dtype, **_: gram(x, g, dtype) * g.rows(x))


def normalised_by_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRAM, lambda x, g, dtype, **_: gram(x, g, dtype) * (g.rows(x) / x.shape[0]))


def one_row_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_method(monkeypatch, "rows", lambda rows, self, x: rows + 1)


def geometry_changed(
    monkeypatch: pytest.MonkeyPatch, **changes: Callable[[PatchGeometry], Any]
) -> None:
    """Let the preconditioner read the input with another geometry than the layer does."""

    def mutant(grad: Tensor, x: Tensor, lambda_: float, g: PatchGeometry, *rest: Any) -> Tensor:
        return precondition_weight_gradient(
            grad, x, lambda_, dataclasses.replace(g, **{k: f(g) for k, f in changes.items()}), *rest
        )

    monkeypatch.setattr(OPERATOR, mutant)


def padding_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry_changed(
        monkeypatch,
        padding=lambda g: tuple((before + 1, max(after - 1, 0)) for before, after in g.padding),
    )


def padding_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry_changed(
        monkeypatch, padding=lambda g: tuple((after, before) for before, after in g.padding)
    )


def stride_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry_changed(monkeypatch, stride=lambda g: (1,) * len(g.stride))


def dilation_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry_changed(monkeypatch, dilation=lambda g: (1,) * len(g.dilation))


def dimensions_reversed(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry_changed(
        monkeypatch, stride=lambda g: g.stride[::-1], padding=lambda g: g.padding[::-1]
    )


def channels_last_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns in the order (kernel element, channel), which is not the weight's."""
    right = patches._columns

    def mutant(view: Tensor, groups: int) -> Tensor:
        columns = right(view, groups)
        channels = view.shape[1] // groups
        reordered: Tensor = columns.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1, 2)
        return reordered

    monkeypatch.setattr(patches, "_columns", mutant)


def one_gram_for_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        GRAM,
        lambda x, g, dtype, **_: gram(x, g, dtype).mean(0, keepdim=True).repeat(g.groups, 1, 1),
    )


def last_block_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Gram over all blocks of patches but the last, where there are several."""
    right = patches.patch_blocks
    monkeypatch.setitem(gram_matrix._PIECE_ELEMENTS, "cpu", 64)
    monkeypatch.setattr(gram_matrix, "patch_blocks", lambda *a: list(right(*a))[:-1] or right(*a))


def fixed_plan(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Blocks of a width, by rows of the input, for every convolution."""
    chosen, uncached = row_blocks.best_plan, row_blocks._layer

    def plan(window: Window, channels: int, images: int) -> row_blocks.Plan:
        left = row_blocks.left_rows(window)[0]
        return replace(chosen(window, channels, images), width=width, left=left)

    monkeypatch.setattr(row_blocks, "best_plan", plan)
    monkeypatch.setattr(row_blocks, "_layer", getattr(uncached, "__wrapped__", uncached))
    monkeypatch.setattr(gram_matrix, "_choose", lambda *_: (True, None))


def strips_changed(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Change the products of output rows that only some kernel rows have."""
    fixed_plan(monkeypatch, 2)
    right = row_blocks._block_products

    def mutant(*a: Any) -> Tensor:
        products = right(*a)
        return products if len(products) == 1 else change(products)

    monkeypatch.setattr(row_blocks, "_block_products", mutant)


def borders_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of kernel rows at one distance, taken for the same wherever they start."""
    strips_changed(monkeypatch, torch.zeros_like)


def top_and_bottom_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    strips_changed(monkeypatch, lambda products: products.roll(len(products) // 2, 0))


def rest_of_a_line_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output positions behind the last whole block are left out."""
    fixed_plan(monkeypatch, 2)
    right = row_blocks._parts
    monkeypatch.setattr(row_blocks, "_parts", lambda *a: list(right(*a))[:1])


def zeros_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not cleared around the input."""
    fixed_plan(monkeypatch, 2)
    monkeypatch.setattr(windows.Window, "inside", lambda *_: True)
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **how: empty(*a, **how).fill_(7))


def outside_always_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "_SUMMATION_UNITS", float("inf"))


MUTANTS = [
    plain_gradient,
    wrong_lambda,
    gram_not_normalised,
    normalised_by_images_alone,
    one_row_too_many,
    padding_off_by_one,
    padding_swapped,
    stride_ignored,
    dilation_ignored,
    dimensions_reversed,
    channels_last_in_a_row,
    one_gram_for_all_groups,
    last_block_dropped,
    borders_ignored,
    top_and_bottom_swapped,
    rest_of_a_line_dropped,
    zeros_forgotten,
]


def test_without_a_mutant_nothing_is_wrong() -> None:
    assert_right(GEOMETRIES, "call_module")
    assert_right(SOME, *WAYS)


def test_small_blocks_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks over images and bands of an image, which small test inputs would fit into one of."""
    for elements in (1, 64, 1000):
        monkeypatch.setitem(gram_matrix._PIECE_ELEMENTS, "cpu", elements)
        assert_right(GEOMETRIES, "call_module")


@pytest.mark.parametrize("elements", [1, 64, 1 << 20])
def test_blocks_of_rows_are_right(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not chosen for inputs as small as these."""
    monkeypatch.setitem(gram_matrix._PIECE_ELEMENTS, "cpu", elements)
    monkeypatch.setattr(gram_matrix, "_choose", lambda *_: (True, None))
    assert_right(GEOMETRIES, "call_module")
    for width in (1, 2, 3):
        fixed_plan(monkeypatch, width)
        assert_right(GEOMETRIES, "call_module")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_mutant_is_noticed(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    assert any(wrong(GEOMETRIES, ["call_module"]))


@pytest.mark.parametrize("way", WAYS)
def test_lost_rewrite_is_noticed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that returns a copy without the op."""
    monkeypatch.setattr("tract_fx.passes.fx_graph.api.rewrite_graph", lambda gm, *_: copy_tree(gm))
    monkeypatch.setattr("tract_fx.eager.to_tract", lambda module, *_: None)
    assert len(list(wrong(SOME, [way], prepared))) == len(SOME)


def test_a_gradient_outside_the_row_space_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What QR alone would drop without a word."""
    x = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grad = torch.ones(2, 9, dtype=torch.float64)
    layer = nn.Linear(9, 2)

    def error() -> float:
        found = solve.precondition_weight_gradient(grad, x, 0.1, PatchGeometry())
        return relative_error(found, precondition(layer, grad, x))

    assert error() < 1e-10
    outside_always_dropped(monkeypatch)
    assert error() > 0.1

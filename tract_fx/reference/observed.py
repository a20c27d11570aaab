"""One call of a layer on a batch, and TrAct's definition for it in float64.

The rows of X come from the call's own operation, run on a one-hot weight: what it gives for the
weight that is one at a single entry is the column of X that this entry is multiplied with. Nothing
here uses the library's geometry, Gram or solve, which it is there to check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tract_fx.passes.records import InputLayer

_ENTRIES = 1 << 24
"""Entries of X in float64 that are held at a time, 128 MiB."""

_ROUNDING_UNITS, _SUMMATION_UNITS = 2.0, 64.0


@dataclass(frozen=True)
class AllRows:
    """The rows of a call in all processes that share its Gram.

    Attributes:
        count: R of all.
        gram: XᵀX / R of all, (groups, n, n) in float64.
        rows: X of all, (groups, R, n) in float64, where R < n; else None.
    """

    count: int
    gram: Tensor
    rows: Tensor | None


@dataclass(frozen=True)
class ObservedCall:
    """What one call of a layer read and what came back to it. Tensors are detached.

    Attributes:
        record: What locating says of the call.
        x: What it multiplied its weight with, (*, n) for a linear layer, (N, C, *spatial) or
            (C, *spatial) for a convolution: after padding that is not with zeros, in the dtype of
            the product.
        operation: The call's own operation on (x, weight), without bias, in any dtype.
        weight_shape: (out, C/groups, *kernel).
        groups: Number of groups.
        incoming: gW before TrAct, in the weight's shape and dtype; None without a gradient.
        output_gradient: The gradient of the call's output, in its shape; None without.
        product_rounding: Unit to which global flags (TF32) cut the call's products, 0 for none.
        first_order: Whether gW is that of `output_gradient` and nothing else: not so where the loss
            holds gradients itself (a gradient penalty).
        all_rows: Those of all processes, where the call's Gram is of them.
    """

    record: InputLayer
    x: Tensor
    operation: Callable[[Tensor, Tensor], Tensor]
    weight_shape: tuple[int, ...]
    groups: int
    incoming: Tensor | None = None
    output_gradient: Tensor | None = None
    product_rounding: float = 0.0
    first_order: bool = True
    all_rows: AllRows | None = None

    @property
    def columns(self) -> int:
        """n, of one group."""
        return math.prod(self.weight_shape[1:])

    @property
    def is_linear(self) -> bool:
        """Whether the call has no spatial dimension."""
        return len(self.weight_shape) == 2

    @cached_property
    def images(self) -> Tensor:
        """The input with a leading dimension: (N, C, *spatial), or (N, *, n) for a linear layer."""
        dims = 2 if self.is_linear else len(self.weight_shape)
        return self.x if self.x.dim() >= dims else self.x.unsqueeze(0)

    @cached_property
    def row_count(self) -> int:
        """R, of all images."""
        per_image = self.rows(self.images[:1]).shape[1] if len(self.images) else 0
        return len(self.images) * per_image

    @property
    def gram_rows(self) -> int:
        """R of the Gram: this call's, or that of all processes."""
        return self.row_count if self.all_rows is None else self.all_rows.count

    @cached_property
    def is_finite(self) -> bool:
        """Whether the Gram is, or would be."""
        if self.all_rows is not None:
            return bool(self.all_rows.gram.isfinite().all())
        return bool(self.x.isfinite().all())

    def rows(self, images: Tensor) -> Tensor:
        """Give the rows of X that some images make.

        Args:
            images: Some of `images`.

        Returns:
            (groups, rows, n) in float64, the images one after the other.
        """
        images = images.double()
        if self.is_linear:
            return self._linear_rows(images)
        size = max(1, _ENTRIES // self.columns)
        starts = range(0, self.columns, size)
        return torch.cat([self._columns_of(images, s, s + size) for s in starts], dim=-1)

    def _columns_of(self, images: Tensor, start: int, stop: int) -> Tensor:
        """Some columns of the rows that some images make, by a one-hot weight for each column."""
        n, stop = self.columns, min(stop, self.columns)
        one_hot = torch.zeros((stop - start, n), dtype=torch.float64, device=images.device)
        one_hot.diagonal(offset=start).fill_(1.0)
        weight = one_hot.repeat(self.groups, 1).reshape(-1, *self.weight_shape[1:])
        return self._by_rows(self.operation(images, weight), stop - start)

    def _linear_rows(self, images: Tensor) -> Tensor:
        """The input vectors, of which the operation has to be the product."""
        rows = images.reshape(1, -1, images.shape[-1])
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(3, self.columns, generator=generator, dtype=torch.float64)
        probe = probe.to(images.device)
        found = self.operation(images, probe).reshape(1, -1, 3)
        if not torch.allclose(found, rows @ probe.mT, rtol=1e-9, equal_nan=True):
            raise AssertionError(f"{self.record} is no product of its input with its weight")
        return rows

    def _by_rows(self, output: Tensor, channels: int) -> Tensor:
        """Bring an output (N, groups · channels, *positions) to (groups, rows, channels)."""
        split = output.flatten(2).unflatten(1, (self.groups, channels))  # N, g, c, positions
        rows: Tensor = split.permute(1, 0, 3, 2).reshape(self.groups, -1, channels)
        return rows

    def chunks(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Go through the batch, a few images at a time.

        Yields:
            The rows that these images make, (groups, rows, n), and the gradients of the outputs
            that these rows make, (groups, rows, out/groups), None where there are none; float64.
        """
        gradient = self.output_gradient
        if gradient is not None and gradient.dim() < self.images.dim():
            gradient = gradient.unsqueeze(0)
        if not len(self.images):
            return
        per_image = max(1, self.rows(self.images[:1]).numel())
        size = max(1, _ENTRIES // per_image)
        for start in range(0, len(self.images), size):
            piece = slice(start, start + size)
            rows = self.rows(self.images[piece])
            yield rows, None if gradient is None else self._output_rows(gradient[piece])

    def _output_rows(self, gradient: Tensor) -> Tensor:
        gradient = gradient.double()
        if self.is_linear:
            return gradient.reshape(1, -1, gradient.shape[-1])
        return self._by_rows(gradient, self.weight_shape[0] // self.groups)

    @cached_property
    def gram(self) -> Tensor:
        """XᵀX / R, (groups, n, n) in float64."""
        if self.all_rows is not None:
            return self.all_rows.gram
        n = self.columns
        total = torch.zeros((self.groups, n, n), dtype=torch.float64, device=self.x.device)
        for rows, _ in self.chunks():
            total += rows.mT @ rows
        return total / max(1, self.row_count)

    @cached_property
    def condition_bound(self) -> float:
        """What the condition of XᵀX/R + λI is at most: (trace(XᵀX/R) + λ) / λ, of any group."""
        lambda_ = self.record.lambda_
        if lambda_ is None or not self.is_finite:
            return math.inf
        if self.gram_rows == 0:
            return 1.0
        # Of the form that `precondition` needs as well.
        in_row_space = self.gram_rows < self.columns
        values = self._row_space[1] if in_row_space else self.gram.diagonal(dim1=-2, dim2=-1)
        return (float(values.flatten(1).sum(dim=-1).amax()) + lambda_) / lambda_

    @cached_property
    def own_gradient(self) -> Tensor | None:
        """gW computed in float64 from the output's gradient, dzᵀX, in the weight's shape."""
        if self.output_gradient is None:
            return None
        out = self.weight_shape[0] // self.groups
        shape = (self.groups, out, self.columns)
        total = torch.zeros(shape, dtype=torch.float64, device=self.x.device)
        for rows, outputs in self.chunks():
            assert outputs is not None
            total += outputs.mT @ rows
        return total.reshape(self.weight_shape)

    def precondition(self, gradient: Tensor) -> Tensor:
        """Compute gW (XᵀX/R + λI)⁻¹ in float64 (arXiv 2410.23970, section 3).

        With fewer rows than columns, what gW has outside the rows' space is divided by λ, unless it
        is as small as the rounding of gW's own dtype: then it is left out, as the library does.

        Args:
            gradient: gW in the weight's shape, in the dtype that it was computed in.

        Returns:
            The preconditioned gradient in float64, in the weight's shape; all NaN where the input
            is not finite.
        """
        lambda_ = self.record.lambda_
        assert lambda_ is not None
        wide = gradient.double().reshape(self.groups, -1, self.columns)
        if not self.is_finite:
            result = torch.full_like(wide, torch.nan)
        elif self.gram_rows >= self.columns:
            if 0 < self.row_count < self.columns:
                wide = self._inside(wide, self._rounding(gradient.dtype))
            result = torch.linalg.lu_solve(*self._factors, wide, left=False)
        elif self.gram_rows == 0:
            result = wide / lambda_
        else:
            result = self._in_row_space(wide, lambda_, self._rounding(gradient.dtype))
        return result.reshape(self.weight_shape)

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """The LU factors of XᵀX/R + λI, and their pivots."""
        matrix = self.gram.clone()
        matrix.diagonal(dim1=-2, dim2=-1).add_(self.record.lambda_ or 0.0)
        factors, pivots = torch.linalg.lu_factor(matrix)
        return factors, pivots

    @cached_property
    def _row_space(self) -> tuple[Tensor, Tensor]:
        """A basis of the rows' space, (groups, n, R), and XᵀX/R's eigenvalues, (groups, 1, R).

        Of rows that depend on each other the basis has zeros in the place of what is left over.
        """
        rows = None if self.all_rows is None else self.all_rows.rows
        return self._basis(self._own_rows() if rows is None else rows)

    def _own_rows(self) -> Tensor:
        return torch.cat([rows for rows, _ in self.chunks()], dim=1)

    def _basis(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        orthogonal, triangle = torch.linalg.qr(rows.mT)
        rotation, values, _ = torch.linalg.svd(triangle)
        values = values.unsqueeze(1)
        rounding = self.columns * torch.finfo(torch.float64).eps
        counts = values > rounding * values.amax(dim=-1, keepdim=True)
        return orthogonal @ (rotation * counts), values.square() / rows.shape[1]

    def _inside(self, wide: Tensor, noise: float) -> Tensor:
        """Leave out what is outside of the space of this process's own rows, if that is rounding.

        The other processes' rows span more, where P would magnify it.
        """
        basis, _ = self._basis(self._own_rows())
        inside = wide @ basis @ basis.mT
        size = torch.linalg.matrix_norm(wide)[:, None, None]
        is_noise = torch.linalg.matrix_norm(wide - inside)[:, None, None] <= noise * size
        return torch.where(is_noise, inside, wide)

    def _in_row_space(self, wide: Tensor, lambda_: float, noise: float) -> Tensor:
        basis, values = self._row_space
        inside = wide @ basis
        outside = torch.baddbmm(wide, inside, basis.mT, alpha=-1)
        size = torch.linalg.matrix_norm(wide)[:, None, None]
        counts = torch.linalg.matrix_norm(outside)[:, None, None] > noise * size
        outside.mul_(counts / lambda_)  # in place, for such weights may be large
        return outside.baddbmm_(inside / (values + lambda_), basis.mT)

    def _rounding(self, dtype: torch.dtype) -> float:
        """Relative size of gW's rounding: of its dtype, of the product's and of the sum's."""
        rounded = max(self.product_rounding, *(torch.finfo(t).eps for t in (dtype, self.x.dtype)))
        summed = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        return _ROUNDING_UNITS * rounded + _SUMMATION_UNITS * summed

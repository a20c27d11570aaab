"""The sizes of a call of a layer, as the forms of its Gram need them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tract_fx.passes.onnx_graph.calls import Layout, OnnxCall
from tract_fx.passes.onnx_graph.geometry import conv_geometry, spatial_sizes
from tract_fx.passes.onnx_graph.values import static_shape
from tract_fx.preconditioner import PatchGeometry


@dataclass(frozen=True)
class CallSizes:
    """A call and its sizes.

    Attributes:
        call: The call.
        weight_shape: Shape of the weight as the call reads it.
        groups: Number of Gram matrices.
        outputs: Output features or channels, of all groups.
        columns: n, columns of X per group.
        kernel: Kernel size per spatial dimension, empty for a linear layer.
        geometry: How a convolution reads its input; None for a linear layer, and where `auto_pad`
            leaves it open until the graph runs.
    """

    call: OnnxCall
    weight_shape: tuple[int, ...]
    groups: int
    outputs: int
    columns: int
    kernel: tuple[int, ...]
    geometry: PatchGeometry | None

    @classmethod
    def of(cls, call: OnnxCall) -> CallSizes:
        """Read the sizes off a call whose weight's shape is known."""
        shape = static_shape(call.weight)
        assert shape is not None
        if call.layout is Layout.IN_OUT:
            return cls(call, shape, 1, shape[1], shape[0], (), None)
        groups = call.node.attributes.get_int("group", 1)
        convolution = call.layout is Layout.CONVOLUTION
        geometry = conv_geometry(call.node, call.input, call.weight) if convolution else None
        return cls(call, shape, groups, shape[0], math.prod(shape[1:]), shape[2:], geometry)

    @property
    def group_channels(self) -> int:
        """Input channels of a convolution's group."""
        return self.weight_shape[1]

    @property
    def channels(self) -> int:
        """Input channels of a convolution, of all groups."""
        return self.groups * self.group_channels

    @property
    def image_size(self) -> tuple[int | None, ...]:
        """The input's spatial sizes, None for each that is open until the graph runs."""
        return spatial_sizes(self.call.input, len(self.kernel))

    @property
    def positions(self) -> tuple[int | None, ...]:
        """Number of patches along each spatial dimension, None where it is open."""
        if self.geometry is None:
            return (None,) * len(self.kernel)
        g = self.geometry
        known = zip(self.image_size, g.kernel, g.stride, g.padding, g.dilation, strict=True)
        return tuple(
            None if size is None else (size + sum(sides) - d * (k - 1) - 1) // s + 1
            for size, k, s, sides, d in known
        )

    @property
    def is_patchify(self) -> bool:
        """Whether the patches tile the input, so that they are a permutation of it."""
        geometry = self.geometry
        return (
            self.groups == 1
            and geometry is not None
            and geometry.stride == geometry.kernel
            and not any(map(any, geometry.padding))
            and set(geometry.dilation) == {1}
            and all(
                size is not None and size % k == 0
                for size, k in zip(self.image_size, self.kernel, strict=True)
            )
        )

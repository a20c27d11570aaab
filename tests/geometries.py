"""Layers and inputs to hold a rewrite against: a readable list, and hypothesis strategies.

    @pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
    def test_...(geometry: Geometry) -> None:
        layer, x = geometry.layer(), geometry.input()

The strategies (``linear_calls``, ``conv_calls``, ``calls``) draw a ``Call``: a layer and an input
that suit each other, the input in one of the memory layouts that a user's data arrives in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

ConvNd: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS: dict[int, Callable[..., ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class Geometry:
    """One layer and the shape of one input.

    Attributes:
        name: What is special about it; a test's id.
        build: Makes the layer, in float32.
        shape: The input's shape.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return self.name

    def layer(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """The layer, the same for the same seed; the global random state stays as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build().to(dtype)

    def input(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """An input of ``shape``: normal about 1/2, so that a lost padding or mean shows."""
        return drawn(self.shape, dtype, seed)


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal values about 1/2, drawn in float64 whatever the dtype, off the global state."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype)


GEOMETRIES: tuple[Geometry, ...] = (
    # linear
    Geometry("linear-rows-above-columns", lambda: nn.Linear(5, 4), (16, 5)),
    Geometry("linear-rows-below-columns", lambda: nn.Linear(20, 4), (6, 20)),
    Geometry("linear-rows-equal-columns", lambda: nn.Linear(8, 3), (8, 8)),
    Geometry("linear-no-bias", lambda: nn.Linear(5, 4, bias=False), (9, 5)),
    Geometry("linear-one-vector", lambda: nn.Linear(5, 4), (5,)),
    Geometry("linear-tokens", lambda: nn.Linear(6, 4), (3, 7, 6)),
    Geometry("linear-grid", lambda: nn.Linear(6, 4), (2, 3, 4, 6)),
    Geometry("linear-one-feature", lambda: nn.Linear(1, 3), (12, 1)),
    # one spatial dimension
    Geometry("conv1d", lambda: nn.Conv1d(3, 4, 3), (4, 3, 11)),
    Geometry("conv1d-stride-padding", lambda: nn.Conv1d(3, 4, 5, stride=2, padding=2), (4, 3, 12)),
    Geometry(
        "conv1d-dilation-groups", lambda: nn.Conv1d(4, 6, 3, dilation=2, groups=2), (3, 4, 13)
    ),
    Geometry("conv1d-same-even-kernel", lambda: nn.Conv1d(2, 4, 4, padding="same"), (4, 2, 9)),
    Geometry(
        "conv1d-circular", lambda: nn.Conv1d(2, 4, 5, padding=3, padding_mode="circular"), (3, 2, 8)
    ),
    Geometry("conv1d-unbatched", lambda: nn.Conv1d(2, 4, 3, padding=1), (2, 16)),
    Geometry("conv1d-rows-below-columns", lambda: nn.Conv1d(6, 4, 7), (2, 6, 9)),
    # two
    Geometry("conv2d-1x1", lambda: nn.Conv2d(3, 4, 1), (3, 3, 5, 6)),
    Geometry("conv2d-1x1-stride", lambda: nn.Conv2d(3, 4, 1, stride=2), (3, 3, 6, 7)),
    Geometry("conv2d-1x1-padding", lambda: nn.Conv2d(3, 4, 1, padding=1), (2, 3, 4, 5)),
    Geometry("conv2d-3x3-cifar", lambda: nn.Conv2d(3, 8, 3, padding=1), (4, 3, 10, 10)),
    Geometry(
        "conv2d-7x7-imagenet", lambda: nn.Conv2d(3, 8, 7, stride=2, padding=3), (2, 3, 32, 32)
    ),
    Geometry("conv2d-no-padding", lambda: nn.Conv2d(1, 4, 5), (4, 1, 12, 12)),
    Geometry("conv2d-no-bias", lambda: nn.Conv2d(3, 4, 3, bias=False), (3, 3, 7, 7)),
    Geometry(
        "conv2d-oblong",
        lambda: nn.Conv2d(2, 4, (3, 5), stride=(2, 1), padding=(0, 2)),
        (3, 2, 9, 8),
    ),
    Geometry("conv2d-stride-drops-the-rim", lambda: nn.Conv2d(2, 4, 3, stride=3), (4, 2, 10, 11)),
    Geometry("conv2d-stride-above-kernel", lambda: nn.Conv2d(2, 4, 2, stride=3), (6, 2, 9, 10)),
    Geometry("conv2d-dilation", lambda: nn.Conv2d(3, 4, 3, dilation=2, padding=2), (3, 3, 9, 9)),
    Geometry(
        "conv2d-dilation-oblong",
        lambda: nn.Conv2d(2, 4, (2, 3), dilation=(3, 1), stride=2),
        (4, 2, 9, 10),
    ),
    Geometry("conv2d-groups", lambda: nn.Conv2d(6, 9, 3, groups=3, padding=1), (2, 6, 6, 6)),
    Geometry("conv2d-depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (3, 4, 7, 7)),
    Geometry(
        "conv2d-depthwise-multiplier", lambda: nn.Conv2d(3, 6, 3, groups=3, stride=2), (3, 3, 9, 9)
    ),
    Geometry("conv2d-patchify", lambda: nn.Conv2d(3, 8, 4, stride=4), (4, 3, 16, 16)),
    Geometry(
        "conv2d-patchify-oblong", lambda: nn.Conv2d(2, 8, (2, 4), stride=(2, 4)), (6, 2, 8, 8)
    ),
    Geometry(
        "conv2d-patchify-padding", lambda: nn.Conv2d(2, 8, 4, stride=4, padding=2), (3, 2, 12, 12)
    ),
    Geometry(
        "conv2d-patchify-rows-below-columns", lambda: nn.Conv2d(3, 8, 8, stride=8), (4, 3, 16, 16)
    ),
    Geometry(
        "conv2d-patchify-groups", lambda: nn.Conv2d(4, 8, 2, stride=2, groups=2), (3, 4, 8, 8)
    ),
    Geometry("conv2d-kernel-above-image", lambda: nn.Conv2d(2, 4, 7, padding=3), (3, 2, 4, 5)),
    Geometry("conv2d-kernel-is-image", lambda: nn.Conv2d(2, 4, (4, 5)), (6, 2, 4, 5)),
    Geometry("conv2d-one-position-groups", lambda: nn.Conv2d(4, 4, 3, groups=2), (3, 4, 3, 3)),
    Geometry("conv2d-rows-below-columns", lambda: nn.Conv2d(8, 4, 3), (1, 8, 5, 5)),
    Geometry(
        "conv2d-rows-below-columns-groups", lambda: nn.Conv2d(8, 4, 5, groups=2), (2, 8, 6, 6)
    ),
    Geometry("conv2d-valid", lambda: nn.Conv2d(3, 4, 3, padding="valid"), (3, 3, 6, 7)),
    Geometry("conv2d-same", lambda: nn.Conv2d(3, 4, 3, padding="same"), (3, 3, 6, 7)),
    Geometry(
        "conv2d-same-even-kernel", lambda: nn.Conv2d(2, 4, (4, 2), padding="same"), (3, 2, 7, 6)
    ),
    Geometry(
        "conv2d-same-even-kernel-dilation",
        lambda: nn.Conv2d(2, 4, (4, 3), padding="same", dilation=(1, 2), groups=2),
        (3, 2, 7, 8),
    ),
    Geometry(
        "conv2d-reflect",
        lambda: nn.Conv2d(2, 4, 3, padding=(2, 1), padding_mode="reflect"),
        (2, 2, 6, 7),
    ),
    Geometry(
        "conv2d-replicate",
        lambda: nn.Conv2d(2, 4, 3, padding=4, padding_mode="replicate"),
        (2, 2, 5, 6),
    ),
    Geometry(
        "conv2d-circular-stride",
        lambda: nn.Conv2d(2, 4, 4, stride=2, padding=(1, 3), padding_mode="circular"),
        (3, 2, 7, 8),
    ),
    Geometry(
        "conv2d-same-reflect-even-kernel",
        lambda: nn.Conv2d(2, 4, (4, 3), padding="same", padding_mode="reflect"),
        (2, 2, 7, 8),
    ),
    Geometry("conv2d-unbatched", lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 8, 9)),
    Geometry(
        "conv2d-unbatched-circular",
        lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
        (2, 7, 8),
    ),
    # three
    Geometry("conv3d", lambda: nn.Conv3d(2, 4, 3, padding=1), (2, 2, 4, 5, 6)),
    Geometry(
        "conv3d-stem",
        lambda: nn.Conv3d(1, 4, (3, 5, 5), stride=(1, 2, 2), padding=(1, 2, 2)),
        (2, 1, 5, 10, 9),
    ),
    Geometry("conv3d-tubes", lambda: nn.Conv3d(2, 4, (2, 3, 3), stride=(2, 3, 3)), (3, 2, 4, 6, 9)),
    Geometry(
        "conv3d-dilation-groups", lambda: nn.Conv3d(4, 4, 2, dilation=2, groups=2), (2, 4, 5, 6, 5)
    ),
    Geometry(
        "conv3d-replicate-same",
        lambda: nn.Conv3d(1, 4, (2, 3, 2), padding="same", padding_mode="replicate"),
        (3, 1, 4, 5, 4),
    ),
    Geometry("conv3d-unbatched", lambda: nn.Conv3d(2, 4, 2), (2, 4, 5, 6)),
)


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.ndim]) if x.ndim in formats else x


def _transposed(x: Tensor) -> Tensor:
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def _strided(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def _offset(x: Tensor) -> Tensor:
    longer = torch.full((x.shape[0] + 2, *x.shape[1:]), torch.nan, dtype=x.dtype)
    longer[1:-1] = x
    return longer[1:-1]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": _channels_last,
    "transposed": _transposed,
    # Stride 0 along the first dimension; the one layout that changes values.
    "expanded": _expanded,
    # Every other element of a buffer, or a slice in its middle: NaN lies around the values, so that
    # reading past the view shows.
    "strided": _strided,
    "offset": _offset,
}


@dataclass(frozen=True)
class Call:
    """A layer and an input for it; ``layout`` names the input's memory layout."""

    layer: nn.Linear | ConvNd
    x: Tensor
    layout: str


def _per_dim(dims: int, low: int, high: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(low, high)] * dims)


def laid_out(shape: tuple[int, ...], dtype: torch.dtype) -> st.SearchStrategy[tuple[Tensor, str]]:
    """Strategy for a tensor of the shape and the name of its memory layout."""
    seeds = st.integers(0, 2**16)
    return st.builds(
        lambda seed, layout: (LAYOUTS[layout](drawn(shape, dtype, seed)), layout),
        seeds,
        st.sampled_from([*LAYOUTS]),
    )


@st.composite
def linear_calls(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Call:
    """Strategy for ``nn.Linear`` with 0 to 3 leading dimensions."""
    features = draw(st.integers(1, 8))
    leading = draw(st.lists(st.integers(1, 5), max_size=3))
    x, layout = draw(laid_out((*leading, features), dtype))
    return Call(
        nn.Linear(features, draw(st.integers(1, 5)), bias=draw(st.booleans()), dtype=dtype),
        x,
        layout,
    )


@st.composite
def conv_calls(
    draw: st.DrawFn, dims: int | None = None, dtype: torch.dtype = torch.float64
) -> Call:
    """Strategy for ``nn.Conv1d/2d/3d`` (``dims``, or any) over all their options.

    Inputs come out just large enough, or up to four larger: at least one output position, and at
    least what the padding mode asks for (reflect: padding < size; circular: padding <= size).
    """
    dims = dims or draw(st.integers(1, 3))
    kernel = draw(_per_dim(dims, 1, 4 if dims < 3 else 3))
    dilation = draw(_per_dim(dims, 1, 3 if dims < 3 else 2))
    spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    mode = draw(st.sampled_from(PADDING_MODES))
    padding: int | str | tuple[int, ...] = draw(
        st.one_of(st.sampled_from(["same", "valid"]), st.integers(0, 3), _per_dim(dims, 0, 3))
    )
    stride = (1,) * dims if padding == "same" else draw(_per_dim(dims, 1, 3))

    sizes = []
    for dim, span in enumerate(spans):
        if padding == "same":
            before, after = span // 2, span - span // 2
        else:
            before = after = (
                0
                if isinstance(padding, str)
                else padding
                if isinstance(padding, int)
                else padding[dim]
            )
        needed = {"zeros": 1, "replicate": 1, "reflect": after + 1, "circular": max(after, 1)}[mode]
        smallest = max(span + 1 - before - after, needed)
        sizes.append(draw(st.integers(smallest, smallest + 4)))

    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(1, 3))
    layer = CONVOLUTIONS[dims](
        channels,
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=dtype,
    )
    batch = draw(st.one_of(st.just(()), st.tuples(st.integers(1, 4))))  # unbatched, or 1 to 4
    x, layout = draw(laid_out((*batch, channels, *sizes), dtype))
    return Call(layer, x, layout)


def calls(dtype: torch.dtype = torch.float64) -> st.SearchStrategy[Call]:
    """Strategy for any layer that the transform treats, one quarter of them linear."""
    return st.one_of(linear_calls(dtype), *(conv_calls(dims, dtype) for dims in (1, 2, 3)))

"""Models whose input layer the pass finds: what may lie between the input and the layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference import ROUTES, Inputs, Net, images


@dataclass(frozen=True)
class Case:
    """A model whose input layer the pass finds.

    Attributes:
        name: What is special about it; a test's id.
        build: Makes the model.
        inputs: What it takes, one batch.
        treated: Which of its linear and convolution calls TrAct belongs to, as they run.
        layer: The name under which the layer is found.
        routes: The tracers that can make a graph of it.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs] = lambda: (images(),)
    treated: tuple[int, ...] = (0,)
    layer: str = "stem"
    routes: tuple[str, ...] = tuple(ROUTES)

    def __str__(self) -> str:
        return self.name


def conv(channels: int = 3, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, 4, 3, **kwargs)


def linear(features: int) -> nn.Linear:
    return nn.Linear(features, 4)


def before_conv(
    name: str,
    run: Callable[[Any, Tensor], Tensor],
    channels: int = 3,
    inputs: Callable[[], Inputs] = lambda: (images(),),
    routes: tuple[str, ...] = tuple(ROUTES),
    treated: int = 0,
    **members: Callable[[], nn.Module | Tensor],
) -> Case:
    """A path from the image to a convolution, and a second convolution behind it."""

    def build() -> nn.Module:
        made = {key: make() for key, make in members.items()}
        return Net(
            lambda net, x: net.head(net.stem(run(net, x)).relu()),
            stem=conv(channels),
            head=nn.Conv2d(4, 3, 1),
            **made,
        )

    return Case(name, build, inputs, (treated,), routes=routes)


def before_linear(
    name: str,
    run: Callable[[Any, Tensor], Tensor],
    features: int,
    inputs: Callable[[], Inputs] = lambda: (images(),),
    **members: Callable[[], nn.Module | Tensor],
) -> Case:
    """A path from the input to a linear layer, and a second one behind it."""

    def build() -> nn.Module:
        made = {key: make() for key, make in members.items()}
        return Net(
            lambda net, x: net.head(net.stem(run(net, x)).tanh()),
            stem=linear(features),
            head=linear(4),
            **made,
        )

    return Case(name, build, inputs)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def without_gradient(net: Any, x: Tensor) -> Any:
    with torch.no_grad():
        return (x - net.mean) / net.std


def padded_by_copy(net: Any, x: Tensor) -> Tensor:
    canvas = x.new_zeros(x.shape[0], 3, 10, 10)
    canvas[:, :, 1:9, 1:9].copy_(x)
    return canvas


def padded_by_assignment(net: Any, x: Tensor) -> Tensor:
    canvas = torch.zeros(x.shape[0], 3, 10, 10, dtype=x.dtype)
    canvas[:, :, 1:9, 1:9] = x
    return canvas


def standardised_in_place(net: Any, x: Tensor) -> Tensor:
    x.sub_(net.mean)
    x.div_(net.std)
    return x


def with_coordinates(net: Any, x: Tensor) -> Tensor:
    return torch.cat([x, net.grid.repeat(x.size(0), 1, 1, 1)], dim=1)


def sobel(channels: int) -> nn.Conv2d:
    """A convolution whose weight and bias are buffers: a filter."""
    module = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
    for name in ("weight", "bias"):
        value = getattr(module, name).detach().clone()
        delattr(module, name)
        module.register_buffer(name, value)
    return module


MEAN: dict[str, Any] = {"mean": lambda: images(3, 1, 1)}
STD: dict[str, Any] = {"std": lambda: images(3, 1, 1, seed=1) + 0.5}
BYTES = lambda: ((images() * 255).to(torch.uint8),)  # noqa: E731

PATHS = (
    before_conv("mean-and-std", lambda net, x: (x - net.mean) / net.std, **MEAN, **STD),
    before_conv("mean-and-std-without-grad", without_gradient, **MEAN, **STD),
    before_conv("mean-and-std-in-place", standardised_in_place, **MEAN, **STD),
    before_conv(
        "frozen-mean-parameter", lambda net, x: x - net.mean, mean=lambda: constant(images(3, 1, 1))
    ),
    before_conv("bytes", lambda net, x: x.to(torch.float64) / 255, inputs=BYTES),
    before_conv("bytes-double", lambda net, x: x.double().div(255).sub(0.5), inputs=BYTES),
    before_conv("type", lambda net, x: x.type(torch.float64), inputs=BYTES),
    before_conv("type-as", lambda net, x: x.type_as(net.mean) * 2 - 1, inputs=BYTES, **MEAN),
    before_conv("permute", lambda net, x: x.permute(0, 3, 1, 2), 8),
    before_conv("transpose-and-flip", lambda net, x: x.transpose(2, 3).flip(-1)),
    before_conv("pixel-unshuffle", lambda net, x: functional.pixel_unshuffle(x, 2), 12),
    before_conv("pad", lambda net, x: functional.pad(x, (1, 2, 0, 1), value=0.5)),
    before_conv("pad-module", lambda net, x: net.pad(x), pad=lambda: nn.ReflectionPad2d(2)),
    before_conv("pad-by-copy", padded_by_copy),
    before_conv("pad-by-assignment", padded_by_assignment, routes=("export",)),
    before_conv("cat-with-itself", lambda net, x: torch.cat([x, x.square(), x[:, :1]], 1), 7),
    before_conv("cat-with-coordinates", with_coordinates, 5, grid=lambda: images(1, 2, 8, 8)),
    before_conv("stack", lambda net, x: torch.stack([x, -x], 1).flatten(1, 2), 6),
    before_conv("chunk", lambda net, x: x.chunk(3, dim=1)[1], 1),
    before_conv("slices", lambda net, x: x[:, 1:, ::2], 2),
    before_conv("where", lambda net, x: torch.where(x > 0.5, x, x.mean()).clamp(0, 1)),
    before_conv("pooling", lambda net, x: functional.max_pool2d(functional.avg_pool2d(x, 2), 2, 1)),
    before_conv("pool-module", lambda net, x: net.pool(x), pool=lambda: nn.AdaptiveAvgPool2d(5)),
    before_conv("resize", lambda net, x: functional.interpolate(x, size=(6, 5), mode="bilinear")),
    before_conv("dropout", lambda net, x: functional.dropout(x, 0.3)),
    before_conv("dropout-module", lambda net, x: net.drop(x), drop=lambda: nn.Dropout2d(0.5)),
    before_conv("noise", lambda net, x: x + 0.1 * torch.randn_like(x)),
    before_conv("fft", lambda net, x: torch.fft.rfft2(x).abs()),
    before_conv("fft-parts", lambda net, x: torch.view_as_real(torch.fft.fft2(x))[..., 1]),
    before_conv(
        "batch-norm", lambda net, x: net.norm(x), norm=lambda: nn.BatchNorm2d(3, affine=False)
    ),
    before_conv("frozen-norm", lambda net, x: net.n(x), n=lambda: frozen(nn.BatchNorm2d(3))),
    before_conv("instance-norm", lambda net, x: net.norm(x), norm=lambda: nn.InstanceNorm2d(3)),
    before_conv(
        "layer-norm",
        lambda net, x: net.norm(x),
        norm=lambda: nn.LayerNorm(8, elementwise_affine=False),
    ),
    before_conv("filter-module", lambda net, x: net.sobel(x), sobel=lambda: sobel(3), treated=1),
    before_conv(
        "filter-function",
        lambda net, x: functional.conv2d(x, net.kernel, groups=3),
        kernel=lambda: images(3, 1, 3, 3),
        treated=1,
    ),
    before_conv(
        "quantisation-stub", lambda net, x: net.q(x), q=lambda: torch.ao.quantization.QuantStub()
    ),
    before_conv("identity", lambda net, x: net.id(x), id=nn.Identity),
    before_linear("flatten", lambda net, x: x.flatten(1), 192),
    before_linear("permute-and-flatten", lambda net, x: x.permute(0, 2, 3, 1).flatten(2), 24),
    before_linear(
        "reshape-to-patches",
        lambda net, x: x.reshape(4, 3, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(4, 4, 48),
        48,
    ),
    before_linear("unfold", lambda net, x: functional.unfold(x, 3).mT, 27),
    before_linear(
        "unfold-module", lambda net, x: net.u(x).mT, 48, u=lambda: nn.Unfold(4, stride=4)
    ),
    before_linear("unfold-method", lambda net, x: x.unfold(2, 4, 4).flatten(1), 192),
    before_linear(
        "one-hot",
        lambda net, x: functional.one_hot(x, 7).double(),
        7,
        lambda: (torch.arange(20).view(4, 5) % 7,),
    ),
    before_linear(
        "frozen-embedding",
        lambda net, x: net.table(x),
        6,
        lambda: (torch.arange(20).view(4, 5) % 7,),
        table=lambda: frozen(nn.Embedding(7, 6)),
    ),
    before_linear("global-pool", lambda net, x: x.mean((2, 3)), 3),
    before_linear(
        "gather", lambda net, x: x[:, 0].index_select(1, net.i), 8, i=lambda: torch.tensor([3, 0])
    ),
)

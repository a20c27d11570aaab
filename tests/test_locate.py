"""What the pass finds by itself, and that what it then trains with is TrAct's gradient.

Every case is held against the float64 oracle on the route of symbolic_trace and on that of
torch.export, wherever these can make a graph of it. What is refused is in test_refusals.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

from geometries import GEOMETRIES, Geometry, drawn
from reference import (
    ROUTES,
    Inputs,
    Net,
    assert_tract,
    built,
    each_route,
    exported,
    images,
    step,
)
from tract_fx import find_input_layers, tract_pass


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


def without_gradient(net: Any, x: Tensor) -> Tensor:
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


MEAN, STD = {"mean": lambda: images(3, 1, 1)}, {"std": lambda: images(3, 1, 1, seed=1) + 0.5}
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


class Standardised(nn.Conv2d):
    """A convolution with a forward of its own: weight standardisation."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, centred / centred.std((1, 2, 3), keepdim=True), self.bias)


class Renamed(nn.Conv2d):
    """A subclass that changes nothing."""


class Squared(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * weight.abs()


def root_parametrized() -> nn.Module:
    net = Net(lambda net, x: functional.conv2d(x, net.w), w=nn.Parameter(images(4, 3, 3, 3) - 0.5))
    parametrize.register_parametrization(net, "w", Squared())
    return net


def parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Squared())
    return layer


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(layer)


def stem(name: str, layer: Callable[[], nn.Module], **kwargs: Any) -> Case:
    return Case(
        name, lambda: Net(lambda net, x: net.stem(x).relu().mean((2, 3)), stem=layer()), **kwargs
    )


def raw(name: str, run: Callable[[Any, Tensor], Tensor], *shape: int, **kwargs: Any) -> Case:
    """A weight that is a parameter of the model itself."""
    return Case(
        name,
        lambda: Net(run, w=nn.Parameter(images(*shape, seed=2) - 0.5)),
        **{"layer": "w", **kwargs},
    )


def hypernetwork(net: Any, x: Tensor) -> Tensor:
    return functional.conv2d(x, net.hyper(net.seed).view(4, 3, 3, 3))


LAYERS = (
    stem("subclass", lambda: Renamed(3, 4, 3, stride=2, padding=1)),
    stem("subclass-with-forward", lambda: Standardised(3, 4, 3)),
    stem("weight-norm", lambda: parametrizations.weight_norm(conv())),
    stem("spectral-norm", lambda: parametrizations.spectral_norm(conv())),
    stem("orthogonal", lambda: parametrizations.orthogonal(linear(8))),
    stem("parametrized", lambda: parametrized(conv(padding=1, padding_mode="circular"))),
    stem("parametrized-subclass", lambda: parametrized(Renamed(3, 4, 3))),
    stem("old-weight-norm", lambda: old_weight_norm(conv())),
    stem("old-weight-norm-on-subclass", lambda: old_weight_norm(Renamed(3, 4, 3))),
    stem("pruned", lambda: prune.l1_unstructured(conv(), "weight", 0.5)),
    Case("root-parametrized", root_parametrized, layer="parametrizations.w.original"),
    raw("conv2d-function", lambda net, x: functional.conv2d(x, net.w), 4, 3, 3, 3),
    raw(
        "conv2d-keywords",
        lambda net, x: functional.conv2d(
            input=x, weight=net.w, stride=(2, 1), padding=1, dilation=2, groups=3
        ),
        *(6, 1, 3, 2),
    ),
    raw("conv2d-same", lambda net, x: torch.conv2d(x, net.w, padding="same"), 4, 3, 4, 3),
    raw("conv2d-valid", lambda net, x: torch.conv2d(x, net.w, padding="valid"), 4, 3, 4, 3),
    raw("conv1d-function", lambda net, x: functional.conv1d(x[..., 0], net.w, None, 2), 4, 3, 3),
    raw("conv3d-function", lambda net, x: functional.conv3d(x[None], net.w), 2, 4, 2, 3, 3),
    raw("linear-function", lambda net, x: functional.linear(x, weight=net.w), 5, 8),
    raw(
        "computed-padding",
        lambda net, x: torch.conv2d(x, net.w, padding=x.shape[1] // 2),
        4,
        3,
        3,
        3,
    ),
    raw("weight-computed", lambda net, x: functional.linear(x, net.w.tanh() * 2), 5, 8),
    raw("weight-transposed", lambda net, x: functional.linear(x, net.w.t()), 8, 5),
    raw("weight-slice", lambda net, x: functional.linear(x, net.w[:3]), 5, 8),
    raw(
        "weight-repeated",
        lambda net, x: functional.conv2d(x, net.w.repeat(x.shape[1], 1, 1, 1), groups=3),
        *(2, 1, 3, 3),
    ),
    Case(
        "hypernetwork-of-a-parameter",
        lambda: Net(hypernetwork, hyper=nn.Linear(2, 108), seed=nn.Parameter(images(2))),
        treated=(1,),
        layer="seed",
    ),
    Case(
        "keyword-input-of-a-module",
        lambda: Net(lambda net, x: net.stem(input=x), stem=conv()),
    ),
)


def called_twice(net: Any, x: Tensor) -> Tensor:
    return net.stem(net.stem(x).relu())


def sequence(net: Any, x: Tensor) -> Tensor:
    return torch.stack([net.stem(x[:, i]).relu() for i in range(3)]).sum(0)


def tied_by_function(net: Any, x: Tensor) -> Tensor:
    return functional.linear(net.stem(x).tanh(), net.stem.weight.t())


def autoencoder(stem_first: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        names = ["stem", "head"] if stem_first else ["head", "stem"]
        net = Net(
            lambda net, x: net.head(net.stem(x).tanh()), **{n: nn.Linear(8, 8) for n in names}
        )
        net.head.weight = net.stem.weight
        return net

    return build


def positions(net: Any, x: Tensor) -> Tensor:
    tokens = net.stem(x).flatten(2).mT
    return net.head(tokens + net.table(torch.arange(tokens.shape[1])))


class Siamese(nn.Module):
    """One stem for two images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(), nn.Conv2d(4, 2, 1)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        a, b = self.stem(left), self.stem(right)
        return self.head((a - b).abs()), {"left": a, "right": b}


class KeywordsOnly(nn.Module):
    """An image by keyword, labels that only the loss reads, options with defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(), linear(4)

    def forward(
        self,
        *,
        labels: Tensor,
        image: Tensor,
        scale: float = 2.0,
        mask: Tensor | None = None,
        pooled: bool = True,
    ) -> dict[str, Tensor]:
        logits = self.head(self.stem(image).mean((2, 3)) * scale)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def traced_inside() -> nn.Module:
    inner = Net(lambda net, x: net.stem(x - net.mean).relu(), stem=conv(), mean=images(3, 1, 1))
    return Net(
        lambda net, x: net.head(net.inner(x)),
        inner=torch.fx.symbolic_trace(inner),
        head=nn.Conv2d(4, 2, 1),
    )


PLACES = (
    Case("called-again-on-features", lambda: Net(called_twice, stem=nn.Conv2d(3, 3, 3))),
    Case(
        "same-layer-on-each-frame",
        lambda: Net(sequence, stem=linear(8)),
        lambda: (images(),),
        (0, 1, 2),
    ),
    Case("siamese", Siamese, lambda: (images(), images(seed=1)), (0, 1)),
    Case(
        "keywords-only",
        KeywordsOnly,
        lambda: {"labels": torch.tensor([0, 1, 3, 2]), "image": images()},
    ),
    Case(
        "dict-of-inputs",
        lambda: Net(lambda net, x: (net.stem(x["image"] - x["mean"]), x["mean"]), stem=conv()),
        lambda: ({"image": images(), "mean": images(3, 1, 1)},),
    ),
    Case("tied-function-behind", lambda: Net(tied_by_function, stem=nn.Linear(8, 5))),
    Case("tied-layer-behind", autoencoder(stem_first=True)),
    Case("tied-layer-behind-but-made-first", autoencoder(stem_first=False)),
    Case(
        "positions-by-shape",
        lambda: Net(positions, stem=conv(), table=nn.Embedding(36, 4), head=linear(4)),
    ),
    Case(
        "residual-to-the-output",
        lambda: Net(
            lambda net, x: x + net.head(net.stem(x).relu()),
            stem=conv(padding=1),
            head=nn.Conv2d(4, 3, 1),
        ),
    ),
    Case(
        "alias",
        lambda: (
            lambda layer: Net(
                lambda net, x: net.head(net.stem(x)),
                stem=layer,
                again=layer,
                head=nn.Conv2d(4, 2, 1),
            )
        )(conv()),
    ),
    Case("traced-inside", traced_inside, layer="inner.stem"),
    Case("the-layer-alone", lambda: conv(stride=2), layer="conv2d"),
)


@each_route(*PATHS, *LAYERS, *PLACES)
def test_found_and_right(case: Case, route: str) -> None:
    model, inputs = built(case.build), case.inputs()
    graph = ROUTES[route](model, inputs)
    findings = find_input_layers(graph)
    assert findings.names == (case.layer,), str(findings)
    assert len(findings.layers) == len(case.treated)
    assert_tract(model, graph, tract_pass(graph), inputs, case.treated)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_geometry_through_export(geometry: Geometry) -> None:
    """The geometry as an exported graph states it; test_gradient.py has the traced ones."""
    model, inputs = nn.Sequential(geometry.layer(torch.float64)), (geometry.input(torch.float64),)
    graph = exported(model, inputs)
    (layer,) = find_input_layers(graph).layers
    assert layer.weight_shape == tuple(model[0].get_parameter("weight").shape)
    assert layer.geometry is not None and len(layer.geometry.kernel) == len(layer.weight_shape) - 2
    assert_tract(model, graph, tract_pass(graph), inputs, (0,))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_both_routes_find_the_same_geometry(geometry: Geometry) -> None:
    model, inputs = nn.Sequential(geometry.layer(torch.float64)), (geometry.input(torch.float64),)
    records = [find_input_layers(make(model, inputs)).layers[0] for make in ROUTES.values()]
    shared = [(r.name, r.op, r.weight, r.weight_shape, r.geometry, r.module) for r in records]
    assert shared[0] == shared[1]


def test_record_of_a_layer() -> None:
    model = built(lambda: Net(lambda net, x: net.stem(x / 255), stem=conv(stride=2, padding=1)))
    (layer,) = find_input_layers(torch.fx.symbolic_trace(model)).layers
    assert (layer.name, layer.op, layer.module, layer.weight) == (
        *("stem", "conv2d", "stem"),
        ("stem.weight",),
    )
    assert layer.path == ("x", "truediv", "stem")
    assert layer.weight_shape == (4, 3, 3, 3)
    assert layer.geometry is not None
    assert (layer.geometry.kernel, layer.geometry.stride) == ((3, 3), (2, 2))
    assert not layer.frozen and layer.lambda_ is None
    assert str(layer) == "stem (conv2d, node 'stem', weight (4, 3, 3, 3))"


@pytest.mark.parametrize("route", ROUTES)
def test_finding_computes_no_weight(route: str) -> None:
    """Reading a spectral-normalised weight in training advances its power iteration."""
    model = built(
        lambda: Net(lambda net, x: net.stem(x), stem=parametrizations.spectral_norm(conv()))
    )
    graph = ROUTES[route](model, (images(),))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tract_pass(graph)
    find_input_layers(tract_pass(graph))
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_hooks_on_a_layer_called_twice_fire_for_both_calls() -> None:
    model = built(lambda: Net(called_twice, stem=nn.Conv2d(3, 3, 3)))
    seen: list[tuple[int, ...]] = []
    model.stem.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    graph = torch.fx.symbolic_trace(model)
    tract = tract_pass(graph)
    tract(images())
    assert seen == [(4, 3, 6, 6), (4, 3, 4, 4)]
    assert tract.state_dict().keys() == graph.state_dict().keys()


def test_a_weight_of_one_dimension() -> None:
    """functional.linear takes a vector as weight: a layer with one output and no output axis."""
    weight, x = drawn((8,)), drawn((20, 8), seed=1)
    net = Net(lambda net, x: functional.linear(x, net.w), w=nn.Parameter(weight))
    matrix = Net(lambda net, x: functional.linear(x, net.w)[:, 0], w=nn.Parameter(weight[None]))
    gradients = [
        step(tract_pass(torch.fx.symbolic_trace(m)), (x,)).gradients["w"] for m in (net, matrix)
    ]
    assert gradients[0] is not None and gradients[1] is not None
    assert torch.allclose(gradients[0], gradients[1][0], rtol=1e-10)
    plain = step(net, (x,)).gradients["w"]
    assert plain is not None and not torch.allclose(gradients[0], plain)


def checkpointed(net: Any, x: Tensor) -> Tensor:
    result: Tensor = torch.utils.checkpoint.checkpoint(net.block, x, use_reentrant=False)
    return result


def test_a_checkpointed_block_is_looked_into() -> None:
    block = nn.Sequential(conv(), nn.Tanh(), nn.Conv2d(4, 2, 1))
    model = built(lambda: Net(checkpointed, block=block))
    # Recomputation in the backward pass would not meet the oracle: the same net without it.
    eager = Net(lambda net, x: net.block(x), block=model.block)
    graph = exported(model, (images(),))
    assert find_input_layers(graph).names == ("block.0",)
    assert_tract(eager, graph, tract_pass(graph), (images(),), (0,))

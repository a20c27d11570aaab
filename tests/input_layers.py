"""Models whose input layer the pass finds: kinds of layers, and where in a model they stand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

from input_paths import Case, conv, linear
from reference import Net, images


class Standardised(nn.Conv2d):
    """A convolution with a forward of its own: weight standardisation."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        scale = centred.std((1, 2, 3), keepdim=True)
        output: Tensor = self._conv_forward(input, centred / scale, self.bias)
        return output


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
    raw("weight-dropped", lambda net, x: functional.linear(x, functional.dropout(net.w)), 5, 8),
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


def called_twice(net: Any, x: Tensor) -> Any:
    return net.stem(net.stem(x).relu())


def sequence(net: Any, x: Tensor) -> Tensor:
    return torch.stack([net.stem(x[:, i]).relu() for i in range(3)]).sum(0)


def tied_by_function(net: Any, x: Tensor) -> Tensor:
    return functional.linear(net.stem(x).tanh(), net.stem.weight.t())


def autoencoder(stem_first: bool) -> Callable[[], nn.Module]:
    def build() -> Any:
        names = ["stem", "head"] if stem_first else ["head", "stem"]
        layers = {name: nn.Linear(8, 8) for name in names}
        net: Any = Net(lambda net, x: net.head(net.stem(x).tanh()), **layers)
        net.head.weight = net.stem.weight
        return net

    return build


def positions(net: Any, x: Tensor) -> Any:
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


class AllOptional(nn.Module):
    """As in transformers: every argument may be left out, the image as well."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(), nn.Conv2d(4, 2, 1)

    def forward(self, pixels: Any = None, mask: Any = None, scale: float = 0.5) -> Any:
        features = self.stem(pixels * scale).relu()
        return self.head(features if mask is None else features * mask)


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
        "all-optional",
        AllOptional,
        lambda: {"pixels": images(), "mask": images(4, 1, 6, 6)},
        routes=("symbolic_trace",),  # an exported graph has lost which inputs are optional
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
        "residual-of-normalised-features",
        lambda: Net(
            lambda net, x: x + net.scale * net.norm(net.stem(x)),
            stem=nn.Conv2d(3, 3, 1),
            norm=nn.BatchNorm2d(3),
            scale=nn.Parameter(images(3, 1, 1)),
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

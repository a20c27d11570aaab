"""Models that the pass refuses to treat by itself, each with the way out that its error names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference import ROUTES, Inputs, Net, images
from tract_fx import (
    AmbiguousInputLayerError,
    NoInputLayerError,
    TractError,
    UnsupportedLayerError,
)


@dataclass(frozen=True)
class Case:
    """A model that the pass refuses to treat by itself.

    Attributes:
        name: What stands in the way; a test's id.
        build: Makes the model.
        says: What the message has to name: the operation, the way out.
        error: The error's type.
        layers: The user's choice that works; empty where there is none.
        treated: Which of the model's linear and convolution calls that choice treats.
        instead: Makes the model that the message advises, which is treated without a choice.
        inputs: What the model takes.
        routes: The tracers that can make a graph of it.
    """

    name: str
    build: Callable[[], nn.Module]
    says: tuple[str, ...]
    error: type[TractError] = UnsupportedLayerError
    layers: tuple[str, ...] = ()
    treated: tuple[int, ...] = (0,)
    instead: Callable[[], nn.Module] | None = None
    inputs: Callable[[], Inputs] = lambda: (images(),)
    routes: tuple[str, ...] = tuple(ROUTES)

    def __str__(self) -> str:
        return self.name


def then_linear(run: Callable[[Any, Tensor], Tensor], features: int, **members: Any) -> nn.Module:
    """Something on the input, a linear layer behind it."""
    return Net(lambda net, x: net.head(run(net, x).tanh()), head=nn.Linear(features, 4), **members)


def first(module: Callable[[], nn.Module], features: int = 8) -> Callable[[], nn.Module]:
    return lambda: then_linear(lambda net, x: net.first(x), features, first=module())


def with_operand(
    run: Callable[[Any, Tensor], Tensor], features: int, operand: Callable[[], Tensor]
) -> Callable[[], nn.Module]:
    """An operation of the input and `net.p`."""
    return lambda: then_linear(run, features, p=operand())


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(images(*shape, seed=3))


def ids() -> Inputs:
    return (torch.arange(20).view(4, 5) % 7,)


def written_in_place(view: bool) -> Callable[[Any, Tensor], Tensor]:
    def run(net: Any, x: Tensor) -> Tensor:
        (x.view(4, -1) if view else x).mul_(net.p)
        return x

    return run


def sobel_with_bias() -> nn.Module:
    module = nn.Conv2d(3, 3, 3, padding=1)
    weight = module.weight.detach().clone()
    del module.weight
    module.register_buffer("weight", weight)
    return module


AFFINE = ("trained parameters", "affine=False", "layers=")
RAW = ("raw parameter", "functional.linear", "layers=")
SHIFT = ("trained parameter", "a buffer", "layers=")

OPERATIONS = (
    Case(
        "batch-norm",
        first(lambda: nn.BatchNorm2d(3)),
        AFFINE,
        layers=("head",),
        instead=first(lambda: nn.BatchNorm2d(3, affine=False)),
    ),
    Case(
        "layer-norm",
        first(lambda: nn.LayerNorm(8)),
        AFFINE,
        layers=("head",),
        instead=first(lambda: nn.LayerNorm(8, elementwise_affine=False)),
    ),
    Case("group-norm", first(lambda: nn.GroupNorm(3, 3)), AFFINE, layers=("head",)),
    Case("prelu", first(nn.PReLU), AFFINE, layers=("head",)),
    Case(
        "partly-frozen-norm",
        first(lambda: _half_frozen(nn.BatchNorm2d(3))),
        AFFINE,
        layers=("head",),
    ),
    *(
        Case(
            name,
            with_operand(run, 8, lambda: parameter(8)),
            SHIFT,
            layers=("head",),
            instead=with_operand(run, 8, lambda: images(8, seed=3)),
        )
        for name, run in {
            "shift": lambda net, x: x + net.p,
            "scale": lambda net, x: net.p * x,
            "shift-method": lambda net, x: x.sub(net.p),
            "division": lambda net, x: x / net.p,
            "concatenation": lambda net, x: torch.cat([x, net.p.repeat(4, 3, 1, 1)], 2),
            "where": lambda net, x: torch.where(x > 0.5, x, net.p),
            "computed-shift": lambda net, x: x - torch.tanh(net.p) * 2,
        }.items()
    ),
    *(
        Case(
            f"in-place-{'view' if view else 'operation'}",
            with_operand(written_in_place(view), 8, lambda: parameter(1)),
            ("mul_", *SHIFT),
            layers=("head",),
        )
        for view in (False, True)
    ),
    *(
        Case(
            name,
            with_operand(run, 5, lambda: parameter(8, 5)),
            (name, *RAW),
            layers=("head",),
            instead=with_operand(
                lambda net, x: functional.linear(x, net.p), 5, lambda: parameter(5, 8)
            ),
        )
        for name, run in {
            "matmul": lambda net, x: x @ net.p,
            "einsum": lambda net, x: torch.einsum("bchi,ij->bchj", x, net.p),
            "mm": lambda net, x: torch.mm(x.flatten(0, 2), net.p),
        }.items()
    ),
    Case(
        "embedding",
        lambda: then_linear(lambda net, x: net.table(x), 6, table=nn.Embedding(7, 6)),
        ("node 'table'|node 'embedding'", "looks rows of a table up", "layers="),
        layers=("head",),
        inputs=ids,
    ),
    Case(
        "lstm",
        lambda: then_linear(
            lambda net, x: net.rnn(x[:, 0])[0], 6, rnn=nn.LSTM(8, 6, batch_first=True)
        ),
        ("(?i)lstm", "recurrent", "nn.Linear in front"),
        layers=("head",),
        instead=lambda: then_linear(
            lambda net, x: net.rnn(net.embed(x[:, 0]))[0],
            6,
            embed=nn.Linear(8, 6),
            rnn=nn.LSTM(6, 6, batch_first=True),
        ),
    ),
    Case(
        "gru-cell",
        lambda: then_linear(lambda net, x: net.rnn(x[:, 0, 0]), 6, rnn=nn.GRUCell(8, 6)),
        ("(?i)gru_?cell", "recurrent", "nn.Linear in front"),
        layers=("head",),
    ),
    Case(
        "bilinear",
        lambda: then_linear(lambda net, x: net.form(x, x), 6, form=nn.Bilinear(8, 8, 6)),
        ("(?i)bilinear", "nn.Linear in front"),
        layers=("head",),
    ),
    Case(
        "conv-transpose",
        first(lambda: nn.ConvTranspose2d(3, 2, 2), 9),
        ("(?i)conv_?transpose2d", "layers="),
        layers=("head",),
    ),
    Case(
        "attention",
        lambda: then_linear(
            lambda net, x: net.attend(x[:, 0], x[:, 0], x[:, 0])[0],
            8,
            attend=nn.MultiheadAttention(8, 2, batch_first=True),
        ),
        ("MultiheadAttention", "node 'attend'", "nn.Linear"),
        layers=("head",),
        treated=(0,),  # the projections inside are one call to the oracle's counter, and no layer
        routes=("symbolic_trace",),
    ),
    Case(
        "filter-with-trained-bias",
        first(sobel_with_bias),
        ("its bias is trained", "Make the bias a buffer", "layers="),
        layers=("head",),
        treated=(1,),
    ),
    Case(
        "input-as-weight",
        lambda: then_linear(lambda net, x: functional.linear(net.p, x[0, 0]), 8, p=parameter(5, 8)),
        ("linear", "weight", "layers="),
        layers=("head",),
        treated=(1,),
    ),
    Case(
        "input-as-bias",
        lambda: then_linear(
            lambda net, x: functional.linear(net.c, net.p, x[0, 0]),
            8,
            p=parameter(8, 5),
            c=images(8, 5),
        ),
        ("linear", "weight or bias", "layers="),
        layers=("head",),
        treated=(1,),
    ),
    Case(
        "hypernetwork-of-the-input",
        lambda: then_linear(
            lambda net, x: functional.linear(x[:, 0], net.hyper(x.mean((0, 1, 2))).view(6, 8)),
            6,
            hyper=nn.Linear(8, 48),
        ),
        ("2 operations", "computed from the input", "layers="),
        AmbiguousInputLayerError,
        layers=("hyper",),
    ),
)


def _half_frozen(norm: nn.BatchNorm2d) -> nn.Module:
    norm.weight.requires_grad_(False)
    return norm


class WithMetadata(nn.Module):
    """An image and a table row: two layers, each of which reads an input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.row, self.head = nn.Conv2d(3, 4, 3), nn.Linear(5, 4), nn.Linear(8, 2)

    def forward(self, image: Tensor, row: Tensor) -> Tensor:
        features = torch.cat([self.stem(image).mean((2, 3)), self.row(row)], 1)
        result: Tensor = self.head(features.tanh())
        return result


def with_metadata() -> Inputs:
    return images(), images(4, 5)


def skip(net: Any, x: Tensor) -> Tensor:
    result: Tensor = net.head(torch.cat([x, net.stem(x)], 1))
    return result


def gated(net: Any, x: Tensor) -> Tensor:
    result: Tensor = net.head(net.stem(x) * x.mean((1, 2, 3), keepdim=True).sigmoid())
    return result


def masked(net: Any, x: Tensor) -> Tensor:
    """A parameter-free branch of the input joins the features."""
    result: Tensor = net.head(net.stem(x) + functional.avg_pool2d(x, 1)[:, :1])
    return result


def convs(run: Callable[[Any, Tensor], Tensor], head: int) -> Callable[[], nn.Module]:
    return lambda: Net(run, stem=nn.Conv2d(3, 4, 3, padding=1), head=nn.Conv2d(head, 2, 1))


SEVERAL = (
    *(
        Case(
            f"image-and-metadata-{choice}",
            WithMetadata,
            ("2 operations", "stem", "row", "layers="),
            AmbiguousInputLayerError,
            layers=tuple(choice.split("+")),
            treated=treated,
            inputs=with_metadata,
        )
        for choice, treated in {"stem": (0,), "row": (1,), "stem+row": (0, 1)}.items()
    ),
    Case(
        "parallel-stems",
        lambda: Net(
            lambda net, x: net.fine(x).mean((2, 3)) * net.coarse(x).mean((2, 3)),
            fine=nn.Conv2d(3, 4, 3),
            coarse=nn.Conv2d(3, 4, 5, stride=2),
        ),
        ("fine", "coarse", "layers="),
        AmbiguousInputLayerError,
        layers=("coarse",),
        treated=(1,),
    ),
    *(
        Case(
            name, convs(run, head), ("stem", "head", "layers="), AmbiguousInputLayerError, ("stem",)
        )
        for name, run, head in (
            ("input-skip", skip, 7),
            ("gate-from-the-input", gated, 4),
            ("branch-that-joins-later", masked, 4),
        )
    ),
    Case(
        "layer-beside-a-shift",
        lambda: Net(
            lambda net, x: net.stem(x) + (x + net.p)[:, :1],
            stem=nn.Conv2d(3, 4, 1),
            p=parameter(8),
        ),
        ("2 operations", "not: add", "stem", "layers="),
        AmbiguousInputLayerError,
        layers=("stem",),
    ),
)


NOT_AT_ALL = (
    Case(
        "nothing-trained",
        lambda: Net(lambda net, x: net.pool(x).relu(), pool=nn.AvgPool2d(2)),
        ("no linear layer or convolution consumes the model's input",),
        NoInputLayerError,
    ),
    Case(
        "input-read-for-its-shape",
        lambda: Net(
            lambda net, x: net.stem(net.latent.repeat(x.shape[0], 1)),
            stem=nn.Linear(8, 4),
            latent=images(1, 8),
        ),
        ("no linear layer or convolution consumes the model's input", "layers="),
        NoInputLayerError,
        layers=("stem",),
    ),
)

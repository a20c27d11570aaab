"""Models into whose layer the input gets through memory: written into what the layer reads.

Each has a second layer that reads the input as it is, which would be taken without a word where the
first is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from input_paths import Case, conv
from reference import Net, images

__all__ = ["WRITTEN"]


def read(
    name: str, run: Callable[[Any, Tensor, Tensor], Tensor], **members: Callable[[], Any]
) -> Case:
    """The input is written into an empty canvas or elsewhere; the layer reads what `run` gives."""

    def forward(net: Any, x: Tensor) -> Tensor:
        features = net.stem(run(net, x.new_zeros(4, 3, 8, 8), x)).mean((2, 3))
        return (features + net.side(x.mean((2, 3)))).tanh()  # type: ignore[no-any-return]

    def build() -> nn.Module:
        made = {key: make() for key, make in members.items()}
        return Net(forward, stem=conv(), side=nn.Linear(3, 4), **made)

    return Case(name, build)


def written(
    name: str, write: Callable[[Any, Tensor, Tensor], object], **members: Callable[[], Any]
) -> Case:
    """The layer reads the canvas, whatever `write` returns."""

    def run(net: Any, canvas: Tensor, x: Tensor) -> Tensor:
        write(net, canvas, x)
        return canvas

    return read(name, run, **members)


def view_before_its_base_is_written(net: Any, canvas: Tensor, x: Tensor) -> Tensor:
    view = canvas.view(4, 3, 64)
    canvas.copy_(x)
    return view.view(4, 3, 8, 8)


def siblings(net: Any, canvas: Tensor, x: Tensor) -> Tensor:
    one, other = canvas.flatten(), canvas.permute(0, 1, 3, 2)
    one.copy_(x.flatten())
    return other


def buffer_read_twice(net: Any, canvas: Tensor, x: Tensor) -> Tensor:
    net.kept.copy_(x.detach())
    return net.kept  # type: ignore[no-any-return]


def two_names_of_one_memory(net: Any, canvas: Tensor, x: Tensor) -> Tensor:
    net.one.copy_(x.detach().flatten(2))
    return net.other  # type: ignore[no-any-return]


def two_names() -> dict[str, Callable[[], Tensor]]:
    memory = torch.zeros(4, 3, 8, 8, dtype=torch.float64)
    return {"one": lambda: memory.view(4, 3, 64), "other": lambda: memory}


def one_after_the_other(net: Any, canvas: Tensor, x: Tensor) -> None:
    parts = canvas.unbind(0)
    for i in range(4):
        parts[i].copy_(x[i].detach())


def halves(net: Any, canvas: Tensor, x: Tensor) -> None:
    parts = canvas.split(2)
    for i in range(2):
        parts[i].copy_(x[2 * i : 2 * i + 2].detach())


def as_complex(net: Any, canvas: Tensor, x: Tensor) -> None:
    torch.view_as_complex(canvas.view(4, 3, 8, 4, 2)).add_(x[..., :4])


def in_place_function(net: Any, canvas: Tensor, x: Tensor) -> None:
    functional.relu(functional.dropout(canvas, 0.5, training=False).add_(x), inplace=True)


def scattered(net: Any, canvas: Tensor, x: Tensor) -> None:
    canvas.scatter_(1, torch.zeros(4, 3, 8, 8, dtype=torch.int64), x)


WRITTEN = (
    written("full-slice", lambda net, c, x: c[:, :, : x.shape[2], : x.shape[3]].copy_(x)),
    written("transposed", lambda net, c, x: c.mT.copy_(x.mT)),
    written("as-strided", lambda net, c, x: c.as_strided((4, 192), (192, 1)).add_(x.flatten(1))),
    written("foreach", lambda net, c, x: torch._foreach_add_([c], [x])),
    written("foreach-copy", lambda net, c, x: torch._foreach_copy_([c.detach()], [x.detach()])),
    written("out", lambda net, c, x: torch.add(x.detach(), 1, out=c)),
    written("out-of-cat", lambda net, c, x: torch.cat([x.detach()], out=c)),
    read("view-before-its-base-is-written", view_before_its_base_is_written),
    read("siblings", siblings),
    written("unbind", one_after_the_other),
    written("split", halves),
    written("chunk", lambda net, c, x: torch.chunk(c, 2)[0].add_(x[:2].detach())),
    written("narrow", lambda net, c, x: torch.narrow(c, 0, 0, 3).copy_(x[1:])),
    written("select", lambda net, c, x: c.select(0, 1).copy_(x[0])),
    written("diagonal", lambda net, c, x: c.diagonal(0, 2, 3).copy_(x[..., 0])),
    written("swapped", lambda net, c, x: c[None].swapaxes(1, 2).squeeze(0).add_(x.movedim(0, 1))),
    written("complex", as_complex),
    replace(
        written("data", lambda net, c, x: c.data.copy_(x.detach())), routes=("symbolic_trace",)
    ),
    written("index-put", lambda net, c, x: c.index_put_((torch.arange(4),), x)),
    written("scatter", scattered),
    written("masked-scatter", lambda net, c, x: c.masked_scatter_(c == 0, x)),
    written("addcmul", lambda net, c, x: c.addcmul_(x, x)),
    written("in-place-function", in_place_function),
    written("in-place-module", lambda net, c, x: net.relu(c.add_(x)), relu=lambda: nn.ReLU(True)),
    read("buffer-read-twice", buffer_read_twice, kept=lambda: images().zero_()),
    read("two-names-of-one-memory", two_names_of_one_memory, **two_names()),
)

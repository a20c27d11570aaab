"""ONNX's LSTM, GRU and RNN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tract_fx.importer.host import Value, as_list, as_tensor
from tract_fx.importer.table import operator, unsupported
from tract_fx.recurrent import Cell, elman, gru, gru_reset_first, lstm, run_layer

_ACTIVATIONS = {"Tanh": torch.tanh, "Relu": torch.relu, "Sigmoid": torch.sigmoid}


@operator("LSTM")
def _lstm(
    x: Tensor,
    weights: Tensor,
    recurrent: Tensor,
    biases: Value | None = None,
    lengths: Value | None = None,
    hidden: Value | None = None,
    cell: Value | None = None,
    peepholes: Value | None = None,
    *,
    hidden_size: int | None = None,
    direction: str = "forward",
    activations: Sequence[str] = (),
    clip: float | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    if input_forget or peepholes is not None:
        raise unsupported("LSTM with peepholes or input_forget")
    _refuse_options(activations, ["Sigmoid", "Tanh", "Tanh"], clip, "LSTM")
    order = (0, 2, 3, 1)  # ONNX has input, output, forget, cell
    y, (h, c) = _run(
        [lstm], order, x, weights, recurrent, biases, lengths, [hidden, cell], direction, layout
    )
    return y, h, c


@operator("GRU")
def _gru(
    x: Tensor,
    weights: Tensor,
    recurrent: Tensor,
    biases: Value | None = None,
    lengths: Value | None = None,
    hidden: Value | None = None,
    *,
    hidden_size: int | None = None,
    direction: str = "forward",
    activations: Sequence[str] = (),
    clip: float | None = None,
    linear_before_reset: int = 0,
    layout: int = 0,
) -> tuple[Tensor, Tensor]:
    _refuse_options(activations, ["Sigmoid", "Tanh"], clip, "GRU")
    order = (1, 0, 2)  # ONNX has update, reset, new
    cells = [gru if linear_before_reset else gru_reset_first]
    y, (h,) = _run(
        cells, order, x, weights, recurrent, biases, lengths, [hidden], direction, layout
    )
    return y, h


@operator("RNN")
def _rnn(
    x: Tensor,
    weights: Tensor,
    recurrent: Tensor,
    biases: Value | None = None,
    lengths: Value | None = None,
    hidden: Value | None = None,
    *,
    hidden_size: int | None = None,
    direction: str = "forward",
    activations: Sequence[str] = ("Tanh", "Tanh"),
    clip: float | None = None,
    layout: int = 0,
) -> tuple[Tensor, Tensor]:
    unknown = [name for name in activations if name not in _ACTIVATIONS]
    if unknown or clip:
        raise unsupported(f"RNN with {unknown[0] if unknown else 'clip'}")
    cells = [elman(_ACTIVATIONS[name]) for name in activations]
    y, (h,) = _run(cells, (0,), x, weights, recurrent, biases, lengths, [hidden], direction, layout)
    return y, h


def _refuse_options(
    activations: Sequence[str], usual: Sequence[str], clip: float | None, name: str
) -> None:
    if clip:
        raise unsupported(f"{name} with clip")
    if any(found != usual[i % len(usual)] for i, found in enumerate(activations)):
        raise unsupported(f"{name} with activations {', '.join(activations)}")


def _run(
    cells: Sequence[Cell],
    order: Sequence[int],
    x: Tensor,
    weights: Tensor,
    recurrent: Tensor,
    biases: Value | None,
    lengths: Value | None,
    initial: Sequence[Value | None],
    direction: str,
    layout: int,
) -> tuple[Tensor, list[Tensor]]:
    """Run each direction; `order` says at which place ONNX has each of PyTorch's gates."""
    x = x.transpose(0, 1) if layout else x
    steps, batch, size = x.shape[0], x.shape[1], recurrent.shape[2]
    if lengths is not None and any(n != steps for n in as_list(lengths) or []):
        raise unsupported("sequences of lengths that differ")
    starts = [None if start is None else as_tensor(start) for start in initial]
    starts = [s.transpose(0, 1) if layout and s is not None else s for s in starts]
    bias = None if biases is None else as_tensor(biases)

    def gates(tensor: Tensor) -> Tensor:
        parts = tensor.split(size)
        return torch.cat([parts[place] for place in order])

    found, last = [], []
    for d in range(weights.shape[0]):
        states = [x.new_zeros(batch, size) if start is None else start[d] for start in starts]
        half = len(order) * size
        pair = (None, None) if bias is None else (gates(bias[d, :half]), gates(bias[d, half:]))
        y, ends = run_layer(
            cells[d % len(cells)],
            x,
            states,
            (gates(weights[d]), gates(recurrent[d]), *pair),
            reverse=d == 1 or direction == "reverse",
        )
        found.append(y)
        last.append(ends)
    y = torch.stack(found, 2 if layout == 1 else 1)
    y = y.transpose(0, 1) if layout else y
    ends = [torch.stack(states, 1 if layout else 0) for states in zip(*last, strict=True)]
    return y, ends

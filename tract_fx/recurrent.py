"""LSTM, GRU and Elman layers step by step, in operators that every runtime has.

Gates lie one behind another along the first axis of weights, in PyTorch's order: input, forget,
cell, output of an LSTM; reset, update, new of a GRU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

Weights: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Of the input, (G·H, I), and of the hidden state, (G·H, H), with their biases, (G·H,)."""

Cell: TypeAlias = Callable[[Tensor, Sequence[Tensor], Weights], Sequence[Tensor]]
"""Of a step's gates before the hidden state comes in, (N, G·H), the states, the weights."""


def run_layer(
    cell: Cell,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Weights,
    *,
    reverse: bool = False,
    projection: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Run a layer in one direction.

    Args:
        cell: The layer's kind.
        x: The sequence, (T, N, I); T is a number.
        states: The hidden state, (N, H), and an LSTM's cell state.
        weights: The weights.
        reverse: Whether it goes from the last step to the first.
        projection: What an LSTM's hidden state is multiplied with, (P, H).

    Returns:
        The hidden states, (T, N, H), and the last states.
    """
    gates = F.linear(x, weights[0], weights[2]).unbind(0)
    kept = []
    for gate in reversed(gates) if reverse else gates:
        hidden, *others = cell(gate, states, weights)
        if projection is not None:
            hidden = F.linear(hidden, projection)
        states = [hidden, *others]
        kept.append(hidden)
    return torch.stack(kept[::-1] if reverse else kept), list(states)


def lstm(gates: Tensor, states: Sequence[Tensor], weights: Weights) -> Sequence[Tensor]:
    """Take a step as `torch.nn.LSTM` does.

    Args:
        gates: What the input gives, (N, 4·H).
        states: The hidden and the cell state.
        weights: The weights.

    Returns:
        Both states.
    """
    hidden, cell = states
    i, f, g, o = (gates + F.linear(hidden, weights[1], weights[3])).chunk(4, 1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def gru(gates: Tensor, states: Sequence[Tensor], weights: Weights) -> Sequence[Tensor]:
    """Take a step as `torch.nn.GRU` does.

    Args:
        gates: What the input gives, (N, 3·H).
        states: The hidden state.
        weights: The weights.

    Returns:
        The hidden state.
    """
    (hidden,) = states
    reset_h, update_h, new_h = F.linear(hidden, weights[1], weights[3]).chunk(3, 1)
    reset, update, new = gates.chunk(3, 1)
    update = (update + update_h).sigmoid()
    new = (new + (reset + reset_h).sigmoid() * new_h).tanh()
    return [new + update * (hidden - new)]


def gru_reset_first(gates: Tensor, states: Sequence[Tensor], weights: Weights) -> Sequence[Tensor]:
    """Take a GRU's step whose reset gate comes before the product, as in ONNX and Keras.

    Args:
        gates: What the input gives, (N, 3·H).
        states: The hidden state.
        weights: The weights.

    Returns:
        The hidden state.
    """
    (hidden,) = states
    size = hidden.shape[1]
    both, for_new = weights[1].split([2 * size, size])
    bias = (None, None) if weights[3] is None else weights[3].split([2 * size, size])
    reset_h, update_h = F.linear(hidden, both, bias[0]).chunk(2, 1)
    reset, update, new = gates.chunk(3, 1)
    reset, update = (reset + reset_h).sigmoid(), (update + update_h).sigmoid()
    new = (new + F.linear(reset * hidden, for_new, bias[1])).tanh()
    return [new + update * (hidden - new)]


def elman(activation: Callable[[Tensor], Tensor]) -> Cell:
    """Make a cell as `torch.nn.RNN` has it."""

    def step(gates: Tensor, states: Sequence[Tensor], weights: Weights) -> Sequence[Tensor]:
        (hidden,) = states
        return [activation(gates + F.linear(hidden, weights[1], weights[3]))]

    return step

"""Operators that ONNX Runtime's optimizer, or a kernel, gets wrong: trained and evaluated right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foreign_models import FLOAT32, initializers
from onnx_models import by_hand
from oracle import relative_error
from tract_fx import export_training, load_trainer

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Net:
    """A model, and its outputs as torch computes them: the logits, then what no loss reads."""

    model: onnx.ModelProto
    outputs: Callable[[Parameters, Tensor], list[Tensor]]
    size: tuple[int, ...]


def transposes() -> Net:
    """Transposes that change nothing, on each side of a Gemm and where a Gemm is made of two."""
    model = by_hand(
        """
        w1t = Transpose <perm = [0, 1]> (w1)
        h1 = Gemm (x, w1t, b)
        h2 = Tanh (h1)
        h2t = Transpose <perm = [0, 1]> (h2)
        h3 = Gemm (h2t, w2)
        h3t = Transpose <perm = [0, 1]> (h3)
        h4 = MatMul (h3t, w3)
        h5 = Add (h4, b)
        w4t = Transpose (w4)
        y = Gemm (h5, w4t, b)
        again = Transpose <perm = [1, 0]> (w4)
        square = Gemm (h5, again)
        yt = Transpose <perm = [0, 1]> (y)
        other = Gemm (yt, w4, b)
        """,
        {**{f"w{i}": (8, 8) for i in range(1, 5)}, "b": (8,)},
        outputs="float[N,8] y, float[N,8] other",
    )

    def outputs(p: Parameters, x: Tensor) -> list[Tensor]:
        h = torch.tanh(x @ p["w1"] + p["b"]) @ p["w2"] @ p["w3"] + p["b"]
        y = h @ p["w4"].T + p["b"]
        return [y, y @ p["w4"] + p["b"]]

    return Net(model, outputs, (8,))


POOLS = """
    {0}p = Pad ({0}, narrow)
    {0}1 = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> ({0}p)
    {0}2 = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1],
                        ceil_mode = 1, count_include_pad = 1> ({0})
    {0}w = Pad ({0}, wide)
    {0}3 = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [0, 0, 0, 0]> ({0}w)
    {0}4 = GlobalAveragePool ({0}1)
    {0}5 = GlobalAveragePool ({0}2)
    {0}6 = GlobalAveragePool ({0}3)
    {0}7 = Concat <axis = 1> ({0}4, {0}5, {0}6)
    {0}8 = Flatten ({0}7)
    """


def pools() -> Net:
    """Padding in front of pools, and borders that `ceil_mode` reaches over, in both outputs."""
    body = "c = Conv (x, w, cb)" + POOLS.format("c") + "y = Gemm (c8, head, b) n = Add (c, c)"
    model = by_hand(
        body + POOLS.format("n") + "other = MatMul (n8, head)",
        {
            **{"w": (4, 3, 3, 3), "cb": np.full(4, -9, np.float32), "head": (12, 5), "b": (5,)},
            "narrow": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
            "wide": np.array([0, 0, 2, 2, 0, 0, 2, 2]),
        },
        "float[N,3,10,10] x",
        "float[N,5] y, float[N,5] other",
    )

    def pooled(h: Tensor) -> Tensor:
        each = [
            F.avg_pool2d(F.pad(h, (1, 1, 1, 1)), 3, 1, 1, count_include_pad=False),
            F.avg_pool2d(h, 3, 2, 1, ceil_mode=True),
            F.max_pool2d(F.pad(h, (2, 2, 2, 2)), 3, 2),
        ]
        return torch.cat([part.mean((2, 3)) for part in each], dim=1)

    def outputs(p: Parameters, x: Tensor) -> list[Tensor]:
        h = F.conv2d(x, p["w"], p["cb"])
        return [pooled(h) @ p["head"] + p["b"], pooled(2 * h) @ p["head"]]

    return Net(model, outputs, (3, 10, 10))


@pytest.mark.parametrize("net", [transposes(), pools()], ids=["transposes", "pools"])
def test_trained_and_evaluated_right(net: Net, tmp_path: Path) -> None:
    export_training(net.model, None, tmp_path / "a", output="y", plain=True)
    trainer = load_trainer(tmp_path / "a")
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(6, *net.size, generator=generator), torch.arange(6) % 5
    values = initializers(net.model)
    p = {
        k: torch.tensor(v).double().requires_grad_()
        for k, v in values.items()
        if v.dtype == np.float32
    }
    expected = net.outputs(p, x.double())
    loss = F.cross_entropy(expected[0], target)
    loss.backward()
    for found, output in zip(trainer.predict(x), expected, strict=True):
        assert relative_error(found, output.detach()) < FLOAT32
    assert trainer.evaluate(x, target) == pytest.approx(loss.item(), rel=FLOAT32)
    gradients = trainer.compute_gradients(x, target)
    assert gradients.keys() == p.keys()
    for name, gradient in gradients.items():
        exact = p[name].grad
        assert exact is not None
        assert relative_error(gradient, exact) < FLOAT32, name

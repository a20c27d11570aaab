"""Outputs that the loss does not read: kept where ONNX Runtime gives them, for any batch."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from foreign_models import FLOAT32, initializers
from onnx_models import by_hand
from oracle import relative_error
from tract_fx import TractWarning, export_training, load_trainer


def boxes(body: str, outputs: str, batch: str, opset: int = 17) -> onnx.ModelProto:
    """Logits y, and the boxes that are left of two, as many as the numbers make it."""
    return by_hand(
        """f = MatMul (x, w)
        y = MatMul (f, head)
        four = Constant <value = int64[3] {-1, 2, 4}> ()
        two = Constant <value = int64[3] {-1, 1, 2}> ()
        corners = Reshape (f, four)
        scores_of_all = MatMul (f, s)
        scores = Reshape (scores_of_all, two)
        most = Constant <value = int64 {5}> ()
        overlap = Constant <value = float {0.3}> ()
        boxes = NonMaxSuppression (corners, scores, most, overlap)
        best = ArgMax <axis = 1, keepdims = 0> (y)
        """
        + body,
        {"w": (8, 8), "head": (8, 3), "s": (8, 2), "each": np.ones((2, 3), np.float32)},
        f"float[{batch},8] x",
        f"float[{batch},3] y, int64[M,3] boxes, int64[{batch}] best, {outputs}",
        opset,
    )


@pytest.mark.parametrize(
    ("model", "left_out"),
    [
        (
            boxes(
                "over = Softmax <axis = 0> (y) half = Add (y, each)",
                "float[2,3] over, float[2,3] half",
                "2",
            ),
            {"over": "another one", "half": "running Add node"},
        ),
        (boxes("odd = Strange (best)", "int64[N] odd", "N", 18), {"odd": "No Op registered"}),
    ],
    ids=["fixed", "open"],
)
def test_outputs_that_the_loss_does_not_read(
    model: onnx.ModelProto, left_out: dict[str, str], tmp_path: Path
) -> None:
    """They refuse no model: those that ONNX Runtime can't give for any batch are left out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TractWarning)
        export_training(model, None, tmp_path / "a", output="y", plain=True)
    texts = [str(w.message) for w in caught if issubclass(w.category, TractWarning)]
    assert len(texts) == len(left_out)
    for name, reason in left_out.items():
        (text,) = (text for text in texts if f"the output {name!r}" in text)
        assert reason in text and "onnxruntime_src" not in text
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    logits, kept, best = load_trainer(tmp_path / "a").predict(x)
    values = initializers(model)
    assert relative_error(logits, x @ torch.tensor(values["w"] @ values["head"])) < FLOAT32
    assert set(np.asarray(kept)[:, 0]) == set(range(5))
    assert np.array_equal(best, np.asarray(logits).argmax(1))

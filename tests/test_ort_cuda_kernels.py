"""Nothing of a training step falls to the CPU on a GPU: each node has a CUDA kernel.

The table of kernels is read off ONNX Runtime Training 1.19.2's own CUDA provider (see
cuda_kernels.py), so that this holds without a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import fx, nn

from cuda_kernels import missing_cuda_kernels
from nets import SIZE, small_swin
from tract_fx import SGD, AdamW, LossScale, export_training, tract_pass

GRAPHS = ("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx")


class FewRows(nn.Module):
    """A linear layer that sees fewer rows than columns in small batches, and more in others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3 * SIZE * SIZE, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.relu(self.first(x.flatten(1))))
        return logits


# Those that test_ort_whole_models.py exports are asked there.
def test_every_node_has_a_cuda_kernel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small_swin()
    del model.stage1[0]  # the second stage has such a block
    images = torch.randn(2, 3, SIZE, SIZE)
    export_training(
        tract_pass(fx.symbolic_trace(model.train())),
        images,
        tmp_path / "artifacts",
        loss=nn.CrossEntropyLoss(label_smoothing=0.1),
        optimizer=AdamW(max_grad_norm=1.0),
        verify=False,
    )
    missing = {
        graph: missing_cuda_kernels(onnx.load(tmp_path / "artifacts" / graph)) for graph in GRAPHS
    }
    assert missing == {graph: [] for graph in GRAPHS}


# The loss is in the training graph, the momentum in the optimizer's alone.
@pytest.mark.parametrize(
    ("momentum", "loss"), [(0.0, "mse"), (0.9, "mse"), (0.9, "l1"), (0.9, "bce_with_logits")]
)
def test_losses_and_optimizers_have_cuda_kernels(
    loss: str, momentum: float, tmp_path: Path
) -> None:
    export_training(
        tract_pass(fx.symbolic_trace(FewRows().train())),
        torch.randn(2, 3, SIZE, SIZE),
        tmp_path / "artifacts",
        loss=loss,
        optimizer=SGD(momentum=momentum, weight_decay=1e-4, nesterov=momentum > 0, accumulate=2),
        verify=False,
    )
    for graph in GRAPHS:
        assert missing_cuda_kernels(onnx.load(tmp_path / "artifacts" / graph)) == []


ADAMW, MOMENTUM = AdamW(accumulate=2, max_grad_norm=1.0), SGD(momentum=0.9)
WHOLE_STEPS: dict[str, dict[str, Any]] = {
    "adamw, scaled": {"optimizer": ADAMW, "loss_scale": LossScale()},
    "float16": {"optimizer": MOMENTUM, "precision": "float16", "float64": False},
}


@pytest.mark.parametrize("options", WHOLE_STEPS.values(), ids=WHOLE_STEPS)
def test_a_step_with_its_update_has_cuda_kernels(options: dict[str, Any], tmp_path: Path) -> None:
    """As any ONNX Runtime takes it: gradients, clipping, accumulation, scaling, update."""
    export_training(
        tract_pass(fx.symbolic_trace(FewRows().train())),
        torch.randn(2, 3, SIZE, SIZE),
        tmp_path / "artifacts",
        target="onnxruntime",
        verify=False,
        **options,
    )
    step = onnx.load(tmp_path / "artifacts" / "training_model.onnx")
    assert missing_cuda_kernels(step) == []
    step.opset_import[0].version = 20  # for which it has none of some
    assert missing_cuda_kernels(step)

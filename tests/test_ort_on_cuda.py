"""Exported training on a GPU, against PyTorch on the CPU in float64.

Needs ONNX Runtime Training's GPU wheel (onnxruntime-training 1.19.2) in place of the CPU one, or
onnxruntime-gpu for the steps of any ONNX Runtime alone; and NVIDIA_TF32_OVERRIDE=0 in the
environment: TF32 rounds the Gram to ten bits.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import pytest
import torch
from torch import fx, nn

from nets import NETS, SIZE, STEMS
from tract_fx import SGD, AdamW, export_training, load_trainer, ort_training, tract_pass

Target = Literal["ort-training", "onnxruntime"]
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
        reason="no CUDA execution provider",
    ),
    pytest.mark.skipif(
        os.environ.get("NVIDIA_TF32_OVERRIDE") != "0", reason="TF32 is on: set the override to 0"
    ),
]


@pytest.fixture(params=["ort-training", "onnxruntime"])
def target(request: pytest.FixtureRequest) -> Target:
    if request.param == "ort-training":
        pytest.importorskip("onnxruntime.training.api", reason="needs ONNX Runtime Training")
    chosen: Target = request.param
    return chosen


def batch(size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, SIZE, SIZE, generator=generator)
    return images, torch.randint(0, 10, (size,), generator=generator)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
    return model.train()


@pytest.mark.parametrize("name", NETS)
def test_gradients_equal_float64(name: str, target: Target, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tract_pass(fx.symbolic_trace(without_dropout(NETS[name]())))
    export_training(model, batch(4)[0], tmp_path / "run", target=target)
    trainer = load_trainer(tmp_path / "run", device="cuda")
    exact = model.double()
    for size in (8, 3):  # both forms where rows < columns for the smaller one
        images, labels = batch(size, seed=size)
        gradients = trainer.compute_gradients(images, labels)
        exact.zero_grad()
        nn.functional.cross_entropy(exact(images.double()), labels).backward()
        for key, parameter in exact.named_parameters():
            assert parameter.grad is not None
            expected = parameter.grad.numpy()
            error = np.linalg.norm(gradients[key] - expected)
            tolerance = 1e-4 if key.startswith(STEMS[name]) else 2e-5  # float32, another order
            assert error <= tolerance * np.linalg.norm(expected) + 1e-7, key


@pytest.mark.parametrize(
    "optimizer",
    [
        AdamW(lr=1e-3, max_grad_norm=1.0),
        SGD(lr=0.05, momentum=0.9, weight_decay=1e-3),
        SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
        SGD(lr=0.05, weight_decay=1e-3, accumulate=2),
    ],
    ids=["adamw", "momentum", "nesterov", "accumulate"],
)
def test_twenty_steps_equal_the_cpu(optimizer: AdamW | SGD, target: Target, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tract_pass(fx.symbolic_trace(without_dropout(NETS["resnet"]())))
    export_training(model, batch(4)[0], tmp_path / "run", optimizer=optimizer, target=target)
    trainers = [load_trainer(tmp_path / "run", device=device) for device in ("cpu", "cuda")]
    for step in range(20):
        images, labels = batch(16, seed=step)
        on_cpu, on_gpu = (trainer.train_step(images, labels) for trainer in trainers)
        assert abs(on_cpu - on_gpu) < 1e-3 * abs(on_cpu)
    on_cpu_state, on_gpu_state = (trainer.state_dict() for trainer in trainers)
    for key, value in on_cpu_state.items():
        torch.testing.assert_close(on_gpu_state[key], value, rtol=1e-2, atol=1e-3)


class ProfiledRuntime:
    """ONNX Runtime, whose sessions write down what each node ran on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sessions: list[onnxruntime.InferenceSession] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    def SessionOptions(self) -> onnxruntime.SessionOptions:  # noqa: N802 (ONNX Runtime's)
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(self.folder / "profile")
        return options

    def InferenceSession(self, *args: Any, **options: Any) -> onnxruntime.InferenceSession:  # noqa: N802
        self.sessions.append(onnxruntime.InferenceSession(*args, **options))
        return self.sessions[-1]

    def results(self) -> dict[tuple[str, str], int]:
        """The largest result, in bytes, by provider and operator."""
        found: dict[tuple[str, str], int] = {}
        for session in self.sessions:
            for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
                about = event.get("args", {})
                if event["cat"] == "Node" and "provider" in about:
                    key, size = (about["provider"], about["op_name"]), int(about["output_size"])
                    found[key] = max(size, found.get(key, 0))
        return found


@pytest.mark.parametrize("name", NETS)
def test_only_sizes_are_computed_on_the_cpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the steps for any ONNX Runtime; as it ran, not as the table of kernels has it."""
    model = tract_pass(fx.symbolic_trace(NETS[name]().train()))
    export_training(model, batch(4)[0], tmp_path / "run", target="onnxruntime")
    runtime = ProfiledRuntime(tmp_path)
    monkeypatch.setattr(ort_training, "any_runtime", lambda: runtime)
    load_trainer(tmp_path / "run", device="cuda").train_step(*batch(16))
    large = {key for key, size in runtime.results().items() if size > 800}
    assert {provider for provider, _ in large} == {"CUDAExecutionProvider"}, large


def test_resumed_run_goes_on(target: Target, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tract_pass(fx.symbolic_trace(NETS["vit"]().train()))
    export_training(model, batch(4)[0], tmp_path / "run", target=target)
    trainer = load_trainer(tmp_path / "run", device="cuda")
    for step in range(3):
        trainer.train_step(*batch(8, seed=step))
    trainer.save(tmp_path / "middle")
    going_on = [trainer.train_step(*batch(8, seed=step)) for step in (3, 4)]
    resumed = load_trainer(tmp_path / "middle", device="cuda")
    again = [resumed.train_step(*batch(8, seed=step)) for step in (3, 4)]
    assert again == pytest.approx(going_on, rel=1e-5)

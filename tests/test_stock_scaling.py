"""Loss scaling and half precision in steps for any ONNX Runtime."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn import functional as F

from ort_reference import seeded
from tract_fx import SGD, AdamW, LossScale, export_training, load_trainer, tract_module
from tract_fx.artifacts.loss_scaling import loss_scale_from
from tract_fx.errors import ExportError, MissingRuntimeError, UnsupportedTrainingError
from tract_fx.export.reference_kernels import KERNELS

BOUND = 1e-5


def net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, 2, bias=False), nn.Tanh(), nn.Conv2d(4, 16, 2), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(64, 5)),
    )


def batch(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=generator) + 0.3, torch.arange(count) % 5


def write(folder: Path, **options: Any) -> nn.Module:
    model = tract_module(seeded(net), batch(2, 0)[0])
    export_training(model, batch(4, 0)[0], folder, target="onnxruntime", **options)
    return model


# Two updates in a row raise the scale, and the batches of these numbers are not finite.
SCALE = LossScale(init_scale=1024.0, growth_interval=2)
INFINITE = (4, 5, 6, 10)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    found = [batch((6, 4)[i % 2], i) for i in range(count)]
    return [(x * float("inf") if i in INFINITE else x, y) for i, (x, y) in enumerate(found)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_updates_are_skipped_as_by_pytorch_s_scaler(accumulate: int, tmp_path: Path) -> None:
    config = AdamW(lr=1e-2, accumulate=accumulate, max_grad_norm=0.5)
    model = copy.deepcopy(write(tmp_path / "a", optimizer=config, loss_scale=SCALE)).double()
    trainer = load_trainer(tmp_path / "a")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    scales = []
    for i, (x, y) in enumerate(batches(16)):
        loss = F.cross_entropy(model(x.double()), y)
        scaler.scale(loss / accumulate).backward()
        found = trainer.train_step(x, y)
        assert found == pytest.approx(loss.item(), rel=BOUND, nan_ok=True)
        if i % accumulate == accumulate - 1:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
            assert trainer.loss_scale == scales[-1]
    assert min(scales) < 1024 < max(scales)
    assert trainer.updates == 16 // accumulate - (4 if accumulate == 1 else 3)
    for name, value in trainer.state_dict().items():
        wanted = model.state_dict()[name]
        assert (value.double() - wanted).norm() <= 2e-5 * wanted.norm()
    trainer.save(tmp_path / "b")
    again = load_trainer(tmp_path / "b")
    x, y = batch(5, 99)
    assert (again.loss_scale, again.updates) == (trainer.loss_scale, trainer.updates)
    for _ in range(3 * accumulate):
        assert again.train_step(x, y) == trainer.train_step(x, y)
    assert again.loss_scale == trainer.loss_scale


def test_a_scale_changes_no_gradient(tmp_path: Path) -> None:
    write(tmp_path / "a", loss_scale=SCALE, verify=False)
    write(tmp_path / "b", verify=False)
    x, y = batch(6, 1)
    scaled, plain = (load_trainer(tmp_path / n).compute_gradients(x, y) for n in ("a", "b"))
    for name, gradient in plain.items():
        np.testing.assert_allclose(scaled[name], gradient, 1e-5, 1e-7)
    assert load_trainer(tmp_path / "b").loss_scale is None


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_products_are_rounded_and_nothing_else(precision: str, tmp_path: Path) -> None:
    write(tmp_path / "a", precision=precision, optimizer=SGD(lr=1.0))
    for name, chosen in (("b", precision), ("c", "float32")):
        options: dict[str, Any] = {"plain": True, "verify": False}
        model = write(tmp_path / name, optimizer=SGD(lr=1.0), precision=chosen, **options)
    lowered = ir.load(tmp_path / "a" / "training_model.onnx")
    half = {
        node.op_type
        for node in lowered.graph
        if any(v is not None and v.dtype in _HALVES for v in node.inputs)
    }
    products = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
    assert half - {"Cast"} == (products if precision == "float16" else {"Gemm", "MatMul"})
    assert not any(
        node.name.startswith("tract/") and any(v.dtype in _HALVES for v in node.outputs)
        for node in lowered.graph
        if node.name
    )
    assert all(v.dtype not in _HALVES for v in (*lowered.graph.inputs, *lowered.graph.outputs))
    x, y = batch(4, 3)
    feeds = {n: t.detach().numpy() for n, t in model.state_dict().items()}
    feeds |= {"input": x.numpy(), "target": y.numpy(), "learning_rate": np.float32(1.0)}
    feeds |= {"loss_scale": np.float32(256), "steps_with_loss_scale": np.float32(0)}
    feeds |= {"step": np.int64(0)}
    results = []
    for name in ("b", "c"):
        proto = onnx.load(tmp_path / name / "training_model.onnx")
        evaluator = ReferenceEvaluator(proto, new_ops=KERNELS)
        given = {key: feeds[key] for key in evaluator.input_names if key in feeds}
        results.append(dict(zip(evaluator.output_names, evaluator.run(None, given), strict=True)))
    for key, value in model.state_dict().items():
        change, exact = (result[f"{key}_new"] - value.numpy() for result in results)
        error = np.linalg.norm(change - exact) / np.linalg.norm(exact)
        # Half precision rounds to 5e-4 or 4e-3, and that is seen.
        assert 1e-5 < error < (0.02 if precision == "float16" else 0.15), key


_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def test_what_half_precision_can_not_hold_is_refused(tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, 5)))
    x = batch(4, 0)[0] * 1e6
    with pytest.raises(ExportError, match="gradients in float16, which are off by nan"):
        options: Any = {"target": "onnxruntime", "precision": "float16", "plain": True}
        export_training(model, x, tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


class Halved(nn.Module):
    """What it divides by is a constant of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) / self.scale  # type: ignore[no-any-return]


@pytest.mark.parametrize("foreign", [False, True])
def test_the_model_s_constants_are_in_the_check(foreign: bool, tmp_path: Path) -> None:
    x, y = batch(4, 0)
    model: Any = seeded(Halved) if foreign else tract_module(seeded(Halved), x)
    if foreign:
        torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamo=True, verbose=False)
        model = tmp_path / "m.onnx"
    options: dict[str, Any] = {"target": "onnxruntime", "precision": "float16"}
    manifest = export_training(model, x, tmp_path / "a", **options).manifest
    assert manifest.precision == "float16" and manifest.loss_scale == LossScale()
    assert np.isfinite(load_trainer(tmp_path / "a").train_step(x, y))


def test_without_kernels_nothing_is_trained(tmp_path: Path) -> None:
    write(tmp_path / "a", precision="bfloat16", verify=False)
    with pytest.raises(MissingRuntimeError, match=r"bfloat16.*precision='float32'"):
        load_trainer(tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"precision": "float16", "target": "ort-training"}, "target='onnxruntime'"),
        ({"loss_scale": LossScale(), "target": "ort-training"}, "target='onnxruntime'"),
        ({"precision": "half"}, "no such precision"),
    ],
)
def test_refusals(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    model = tract_module(seeded(net), batch(2, 0)[0])
    with pytest.raises(UnsupportedTrainingError, match=says):
        export_training(
            model, batch(4, 0)[0], tmp_path / "a", **{"target": "onnxruntime", **options}
        )


@pytest.mark.parametrize(
    "fields", [{"init_scale": 0.0}, {"growth_factor": 0.5}, {"backoff_factor": 1.0}]
)
def test_scales_out_of_range_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(UnsupportedTrainingError, match=next(iter(fields))):
        LossScale(**fields)  # type: ignore[arg-type]


def test_pytorch_s_scaler_is_read() -> None:
    scaler = torch.amp.GradScaler("cpu", 8.0, 3.0, 0.25, 7)
    wanted = LossScale(init_scale=8.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=7)
    assert loss_scale_from(scaler) == wanted
    assert loss_scale_from(torch.amp.GradScaler("cpu", enabled=False)) is None

"""Small training artifacts, built without the exporter: what a trainer can be tested on.

The nets are plain (no TrAct): a trainer does not look at what a graph computes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnxruntime.training import artifacts
from torch import Tensor, nn

from tract_fx.artifacts.directory import write_directory
from tract_fx.artifacts.manifest import (
    MANIFEST_FILE,
    FileRecord,
    Manifest,
    ParameterSpec,
    TensorSpec,
    TractLayer,
)
from tract_fx.artifacts.optimizers import SGD, AdamW
from tract_fx.export.optimizer_graph import build_optimizer

BATCH = 6
CLASSES = 5


class Mlp(nn.Module):
    """Two linear layers, for vectors of eight numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


class ConvNet(nn.Module):
    """BatchNorm, and dropout twice, for images (3, 8, 8)."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(6 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(self.drop(x))))
        # Not average pooling: its gradient crashes on ONNX Runtime 1.19.2's CPU.
        y = nn.functional.max_pool2d(y, 2)
        out: Tensor = self.head(self.drop(y.flatten(1)))
        return out


SHAPES: dict[type[nn.Module], tuple[int, ...]] = {Mlp: (8,), ConvNet: (3, 8, 8)}


def batches(net: nn.Module, count: int, size: int = BATCH, seed: int = 0) -> list[Any]:
    """Random batches (x, labels) for a net."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, *SHAPES[type(net)], generator=generator),
            torch.randint(0, CLASSES, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def exported(net: nn.Module) -> onnx.ModelProto:
    """The forward graph in training mode, as the gradient builder takes it."""
    program = torch.export.export(
        net.train(),
        (torch.randn(BATCH, *SHAPES[type(net)]),),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        strict=False,
    )
    made = torch.onnx.export(
        program,
        dynamo=True,
        optimize=False,
        opset_version=20,
        input_names=["x"],
        output_names=["logits"],
        verbose=False,
    )
    assert made is not None
    made.model.ir_version = 10
    model = made.model_proto
    for node in model.graph.node:
        if node.op_type == "Dropout":
            node.output.append(f"{node.output[0]}_mask")
        if node.op_type == "BatchNormalization":
            node.output.extend(f"{node.output[0]}_{which}" for which in ("mean", "variance"))
            node.attribute.append(onnx.helper.make_attribute("training_mode", 1))
    return model


def build(
    directory: Path,
    net: nn.Module,
    optimizer: AdamW | SGD | None = None,
    frozen: tuple[str, ...] = (),
    **entries: Any,
) -> Manifest:
    """Write a directory of artifacts; `entries` replace the manifest's."""
    optimizer = AdamW() if optimizer is None else optimizer
    state = net.state_dict()
    trainable = [name for name, _ in net.named_parameters() if name not in frozen]
    counters = {k: int(v) for k, v in state.items() if k.endswith("num_batches_tracked")}
    fixed = [name for name in state if name not in trainable and name not in counters]
    with write_directory(directory) as new:
        with tempfile.TemporaryDirectory() as folder:
            onnxruntime.set_default_logger_severity(3)
            artifacts.generate_artifacts(
                exported(net),
                requires_grad=trainable,
                frozen_params=fixed,
                loss=artifacts.LossType.CrossEntropyLoss,
                artifact_directory=folder,
                additional_output_names=["logits"],
            )
            for file in Path(folder).iterdir():
                (new.path / file.name).write_bytes(file.read_bytes())
        _loss_only(new.path / "training_model.onnx")
        _one_batch_norm_output(new.path / "eval_model.onnx")
        ir.save(build_optimizer(optimizer, len(trainable)), new.path / "optimizer_model.onnx")
        fields: dict[str, Any] = {
            "target": "ort-training",
            "versions": {"onnxruntime": onnxruntime.__version__},
            "layers": (TractLayer("first", "node", "linear", ("first.weight",), None, None, 0.1),),
            "loss": "cross_entropy",
            "optimizer": optimizer,
            "inputs": (TensorSpec("x", "float32", ("batch", *SHAPES[type(net)])),),
            "targets": (TensorSpec("labels", "int64", ("batch",), CLASSES),),
            "outputs": ("logits",),
            "parameters": tuple(
                ParameterSpec(name, tuple(state[name].shape), "float32", name in trainable)
                for name in (*trainable, *fixed)
            ),
            "counters": counters,
            "seed": 17,
        }
        new.manifest = Manifest(**fields | entries)
    assert new.manifest is not None
    return new.manifest


def replace_file(directory: Path, manifest: Manifest, name: str, content: bytes) -> None:
    """Alter a file, and the manifest with it."""
    (directory / name).write_bytes(content)
    record = FileRecord(hashlib.sha256(content).hexdigest(), len(content))
    new = dataclasses.replace(manifest, files=manifest.files | {name: record})
    (directory / MANIFEST_FILE).write_text(new.to_json(), encoding="utf-8")


def _loss_only(file: Path) -> None:
    """Predictions are an output of the evaluation graph alone."""
    model = onnx.load(file)
    kept = [value for value in model.graph.output if value.name != "logits"]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.save(model, file)


def _one_batch_norm_output(file: Path) -> None:
    model = onnx.load(file)
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            del node.output[1:]
            kept = [a for a in node.attribute if a.name != "training_mode"]
            del node.attribute[:]
            node.attribute.extend(kept)
    onnx.save(model, file)

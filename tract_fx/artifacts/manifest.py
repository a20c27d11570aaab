"""The manifest of a directory of training artifacts: what it holds, and how to check it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tract_fx.artifacts.loss_scaling import LossScale
from tract_fx.artifacts.optimizers import OptimizerConfig
from tract_fx.artifacts.record_json import decode, encode
from tract_fx.errors import DamagedArtifactsError, UnsupportedTrainingError

ORT_TRAINING, STOCK = "ort-training", "onnxruntime"
"""The targets: ONNX Runtime Training, and any ONNX Runtime."""

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
CHECKSUM = "checksum"  # of the manifest itself, beside its entries

# What 0.1 did not write, and had so.
_LATER: dict[str, Any] = {
    "counter_steps": {},
    "checks": [],
    "precision": "float32",
    "loss_scale": None,
}
_REMEDY = "Export the model again, or take the directory from where it was first written"


@dataclass(frozen=True)
class TensorSpec:
    """What a graph takes as one of its inputs.

    Attributes:
        name: The input's name.
        dtype: numpy's name of its dtype, such as `"float32"`.
        shape: Its sizes. A string is a size that may vary, the same string the same size within a
            batch; None may vary by itself.
        classes: For class indices their number, so that an index out of range is refused: ONNX
            Runtime reads past its buffers with it, without a word. None for anything else.
        ignore_index: With `classes`: the one index outside that the loss ignores.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]
    classes: int | None = None
    ignore_index: int | None = None


@dataclass(frozen=True)
class ParameterSpec:
    """One tensor of the checkpoint.

    Attributes:
        name: The state_dict key, or the ONNX initializer's name.
        shape: Its sizes.
        dtype: numpy's name of its dtype.
        trainable: Whether the optimizer updates it; running statistics are not trainable.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool


@dataclass(frozen=True)
class TractLayer:
    """One call whose weight gradient the training graph preconditions.

    Attributes:
        name: The layer's name.
        node: Name of the node that calls it.
        op: `"linear"`, `"conv1d"`, `"conv2d"` or `"conv3d"`.
        weight: Names of the parameters that the weight is computed from.
        weight_shape: Shape of the weight that is multiplied with, where it is known.
        geometry: The patch geometry's entries, where it is known.
        lambda_: λ.
    """

    name: str
    node: str
    op: str
    weight: tuple[str, ...]
    weight_shape: tuple[int, ...] | None
    geometry: dict[str, Any] | None
    lambda_: float


@dataclass(frozen=True)
class FileRecord:
    """What a file has to be.

    Attributes:
        sha256: Its checksum, in hexadecimal.
        bytes: Its size.
    """

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a directory of training artifacts holds.

    Attributes:
        format_version: Version of this record.
        target: The runtime that trains, `"ort-training"` or `"onnxruntime"`.
        versions: Versions of the packages that wrote the directory, by name.
        layers: The calls under TrAct; none in plain training.
        loss: The loss, in words.
        optimizer: The optimizer's settings.
        precision: What large products of a training step are computed in, as PyTorch names it.
        loss_scale: How the loss is scaled, None for not at all.
        inputs: The model's inputs, in order.
        targets: What comes after them in a batch for training.
        outputs: Names of the predictions, which `eval_model.onnx` has after the loss.
        min_batch: The smallest batch to train on: 2 where a BatchNorm sees one value per channel
            and image.
        parameters: The tensors of the checkpoint.
        counters: Integers of the state_dict that grow with every training batch, such as
            BatchNorm's `num_batches_tracked`, with their value.
        counter_steps: What a counter grows by where that is not one: by two in a BatchNorm that is
            called twice.
        aliases: Further state_dict keys of a parameter, with its name.
        checks: What the export was compared with; nothing where it was not verified.
        updates: Optimizer updates done.
        batches: Training batches seen.
        seed: What dropout's random numbers are derived from.
        learning_rate: The learning rate, None for the optimizer's initial one.
        files: The files beside the manifest, by name.
    """

    format_version: int = FORMAT_VERSION
    target: str
    versions: dict[str, str]
    layers: tuple[TractLayer, ...]
    loss: str
    optimizer: OptimizerConfig
    precision: str = "float32"
    loss_scale: LossScale | None = None
    inputs: tuple[TensorSpec, ...]
    targets: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    parameters: tuple[ParameterSpec, ...]
    min_batch: int = 1
    counters: dict[str, int] = field(default_factory=dict)
    counter_steps: dict[str, int] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    checks: tuple[str, ...] = ()
    updates: int = 0
    batches: int = 0
    seed: int = 0
    learning_rate: float | None = None
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """The learning rate of the next update."""
        return self.optimizer.lr if self.learning_rate is None else self.learning_rate

    @property
    def pending(self) -> int:
        """Micro-batches since the last update."""
        return self.batches % self.optimizer.accumulate

    def to_json(self) -> str:
        """Write the manifest, with a checksum of itself."""
        entries = encode(self)
        entries[CHECKSUM] = _checksum(entries)
        return json.dumps(entries, indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read a manifest."""
        try:
            entries = json.loads(text)
        except ValueError as error:
            raise DamagedArtifactsError(
                MANIFEST_FILE, f"it is not JSON ({error})", _REMEDY
            ) from error
        version = entries.get("format_version") if isinstance(entries, dict) else None
        if type(version) is not int:
            raise DamagedArtifactsError(
                MANIFEST_FILE, "it is not a manifest of training artifacts", _REMEDY
            )
        if version > FORMAT_VERSION:
            raise DamagedArtifactsError(
                f"{MANIFEST_FILE} of format {version}",
                f"this version of tract_fx reads up to format {FORMAT_VERSION}",
                "Install a later tract_fx, or export the model again with this one",
            )
        if entries.pop(CHECKSUM, None) != _checksum(entries):
            raise DamagedArtifactsError(
                MANIFEST_FILE, "it was altered since it was written: its checksum differs", _REMEDY
            )
        for entry, value in _LATER.items():
            entries.setdefault(entry, value)
        if isinstance(entries.get("optimizer"), dict):
            entries["optimizer"].setdefault("weight_decays", {})
        try:
            return decode(cls, entries, "manifest")
        except ValueError as error:  # an optimizer's settings refused by their class, too
            raise DamagedArtifactsError(MANIFEST_FILE, str(error).rstrip("."), _REMEDY) from error


def require_seed(seed: object) -> None:
    """Refuse a seed that a manifest has no place for."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UnsupportedTrainingError(f"{seed=}", "a seed is an integer", "Pass an int")


def _checksum(entries: Mapping[str, Any]) -> str:
    """Hash the entries, whatever the text's spacing."""
    text = json.dumps(entries, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

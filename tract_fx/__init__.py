"""TrAct as a compiler pass: the first layer's weight gradient becomes gW (XᵀX/R + λI)⁻¹.

Petersen, Borgelt, Ermon: TrAct: Making First-layer Pre-Activations Trainable, NeurIPS 2024, arXiv
2410.23970.
"""

from typing import TYPE_CHECKING, Any

from tract_fx import extras, torch_version  # noqa: F401 (its import checks the version)
from tract_fx.accumulation import tract_step, tract_steps
from tract_fx.eager import tract_module
from tract_fx.errors import (
    AmbiguousInputLayerError,
    ArtifactsExistError,
    ArtifactsWriteError,
    DamagedArtifactsError,
    ExportError,
    FailedRunError,
    FrozenLayerWarning,
    InvalidBatchError,
    InvalidGramError,
    InvalidLambdaError,
    MissingRuntimeError,
    NoInputLayerError,
    NonFiniteLossWarning,
    ProcessGroupError,
    StateMismatchError,
    TractError,
    TractWarning,
    TrainerStateError,
    UnknownLayerError,
    UnsupportedFormatError,
    UnsupportedLayerError,
    UnsupportedModelError,
    UnsupportedTrainingError,
    UnsupportedTransformError,
    UntestedVersionWarning,
    UntraceableModelError,
)
from tract_fx.inspection import Inspection, inspect_graph
from tract_fx.passes import (
    Findings,
    InputLayer,
    Refusal,
    find_input_layers,
    is_tract,
    remove_tract,
    tract_pass,
)
from tract_fx.preconditioner import PatchGeometry, precondition_grad
from tract_fx.version import __version__

if TYPE_CHECKING:
    from tract_fx.export import SGD, AdamW, LossScale, TrainingArtifacts, export_training
    from tract_fx.importer import import_onnx, with_weights
    from tract_fx.trainers import load_trainer

# What needs an extra is imported on first use: ONNX is not needed to train in PyTorch.
_EXTRAS = {
    "AdamW": "tract_fx.export",
    "LossScale": "tract_fx.export",
    "SGD": "tract_fx.export",
    "TrainingArtifacts": "tract_fx.export",
    "export_training": "tract_fx.export",
    "import_onnx": "tract_fx.importer",
    "load_trainer": "tract_fx.trainers",
    "with_weights": "tract_fx.importer",
}

__all__ = [
    "SGD",
    "AdamW",
    "AmbiguousInputLayerError",
    "ArtifactsExistError",
    "ArtifactsWriteError",
    "DamagedArtifactsError",
    "ExportError",
    "FailedRunError",
    "Findings",
    "FrozenLayerWarning",
    "InputLayer",
    "Inspection",
    "InvalidBatchError",
    "InvalidGramError",
    "InvalidLambdaError",
    "LossScale",
    "MissingRuntimeError",
    "NoInputLayerError",
    "NonFiniteLossWarning",
    "PatchGeometry",
    "ProcessGroupError",
    "Refusal",
    "StateMismatchError",
    "TractError",
    "TractWarning",
    "TrainerStateError",
    "TrainingArtifacts",
    "UnknownLayerError",
    "UnsupportedFormatError",
    "UnsupportedLayerError",
    "UnsupportedModelError",
    "UnsupportedTrainingError",
    "UnsupportedTransformError",
    "UntestedVersionWarning",
    "UntraceableModelError",
    "__version__",
    "export_training",
    "find_input_layers",
    "import_onnx",
    "inspect_graph",
    "is_tract",
    "load_trainer",
    "precondition_grad",
    "remove_tract",
    "tract_module",
    "tract_pass",
    "tract_step",
    "tract_steps",
    "with_weights",
]

# A star import takes what is there; who asks for the rest by name is told of the extra.
if not extras.installed("onnx"):
    __all__ = [name for name in __all__ if name not in _EXTRAS]


def __getattr__(name: str) -> Any:
    if name not in _EXTRAS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return extras.load(_EXTRAS[name], name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXTRAS})

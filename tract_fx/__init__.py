"""TrAct as a compiler pass: the first layer's weight gradient becomes gW (XᵀX/R + λI)⁻¹.

Petersen, Borgelt, Ermon: TrAct: Making First-layer Pre-Activations Trainable, NeurIPS 2024, arXiv
2410.23970.
"""

from importlib.metadata import PackageNotFoundError, version

from tract_fx.eager import tract_module
from tract_fx.errors import (
    AmbiguousInputLayerError,
    FrozenLayerWarning,
    InvalidLambdaError,
    NoInputLayerError,
    TractError,
    TractWarning,
    UnknownLayerError,
    UnsupportedLayerError,
    UnsupportedModelError,
    UnsupportedTransformError,
    UntraceableModelError,
)
from tract_fx.passes import (
    Findings,
    InputLayer,
    Refusal,
    find_input_layers,
    remove_tract,
    tract_pass,
)
from tract_fx.preconditioner import PatchGeometry, precondition_grad

try:
    __version__ = version("tract_fx")
except PackageNotFoundError:  # run from a folder that was never installed
    __version__ = "0+unknown"

__all__ = [
    "AmbiguousInputLayerError",
    "Findings",
    "FrozenLayerWarning",
    "InputLayer",
    "InvalidLambdaError",
    "NoInputLayerError",
    "PatchGeometry",
    "Refusal",
    "TractError",
    "TractWarning",
    "UnknownLayerError",
    "UnsupportedLayerError",
    "UnsupportedModelError",
    "UnsupportedTransformError",
    "UntraceableModelError",
    "__version__",
    "find_input_layers",
    "precondition_grad",
    "remove_tract",
    "tract_module",
    "tract_pass",
]

"""Errors and warnings that a user may see, all children of `TractError` and `TractWarning`.

Every message has three parts: what was found (node, operation, value), why it can't be, what to do
instead.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "AmbiguousInputLayerError",
    "ArtifactsExistError",
    "ArtifactsWriteError",
    "DamagedArtifactsError",
    "ExportError",
    "FailedRunError",
    "FrozenLayerWarning",
    "InvalidBatchError",
    "InvalidGramError",
    "InvalidLambdaError",
    "MissingRuntimeError",
    "NoInputLayerError",
    "NonFiniteLossWarning",
    "ProcessGroupError",
    "StateMismatchError",
    "TractError",
    "TractWarning",
    "TrainerStateError",
    "UnknownLayerError",
    "UnsupportedFormatError",
    "UnsupportedLayerError",
    "UnsupportedModelError",
    "UnsupportedTrainingError",
    "UnsupportedTransformError",
    "UntestedVersionWarning",
    "UntraceableModelError",
]


class TractError(Exception):
    """Root of all errors that `tract_fx` raises.

    Args:
        found: What was found: the node, the operation and the value, without a full stop.
        reason: Why that can't be.
        remedy: What to do instead.
    """

    def __init__(self, found: str, reason: str, remedy: str) -> None:
        super().__init__(found, reason, remedy)
        self.found = found
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.found}: {self.reason}. {self.remedy}."


class NoInputLayerError(TractError, ValueError):
    """No convolution or linear layer consumes the model's input."""


class AmbiguousInputLayerError(TractError, ValueError):
    """Several layers consume the model's input, and the choice is the user's."""


class UnknownLayerError(TractError, KeyError):
    """A name in `layers` matches nothing that can be treated."""

    __str__ = TractError.__str__


class UnsupportedLayerError(TractError, ValueError):
    """The layer that consumes the input can't be treated exactly."""


class UnsupportedModelError(TractError, TypeError):
    """The object is not a model of a kind that the call takes."""


class UntraceableModelError(TractError, RuntimeError):
    """The model can't be turned into a graph, so that its input layer can't be located."""


class UnsupportedTransformError(TractError, RuntimeError):
    """A program transformation would lose TrAct's gradient."""


class InvalidLambdaError(TractError, ValueError):
    """The regularisation strength λ is not a finite number above zero."""


class InvalidGramError(TractError, ValueError):
    """What was given does not say whose rows the Gram is of."""


class ProcessGroupError(TractError, RuntimeError):
    """The processes that share a Gram are not there, or are not at the same layer."""


class ExportError(TractError, RuntimeError):
    """The model can't be brought to ONNX, or to a training graph, with its meaning kept."""


class UnsupportedTrainingError(TractError, ValueError):
    """A loss, an optimizer or an option of theirs that the target can't compute exactly."""


class DamagedArtifactsError(TractError, RuntimeError):
    """A directory of training artifacts is incomplete, altered, or not of this model."""


class ArtifactsExistError(TractError, FileExistsError):
    """Something stands where training artifacts are to be written, and it stays."""


class ArtifactsWriteError(TractError, OSError):
    """The system does not let training artifacts, or an inspection, be written."""


class InvalidBatchError(TractError, ValueError):
    """A batch has a number of arrays, a shape or a dtype that graph or model does not take."""


class StateMismatchError(TractError, ValueError):
    """A state_dict has other names, shapes or dtypes than what it is to replace."""


class TrainerStateError(TractError, RuntimeError):
    """A trainer is not where a call needs it: within an update, or before the first batch."""


class FailedRunError(TractError, RuntimeError):
    """ONNX Runtime failed while it ran a step, an evaluation or a prediction."""


class MissingRuntimeError(TractError, ImportError):
    """A package or an execution provider that the call needs is not there."""


class UnsupportedFormatError(TractError, ValueError):
    """An inspection can't be shown in that form, or written to a file of that kind."""


class TractWarning(UserWarning):
    """Root of all warnings that `tract_fx` gives."""


class FrozenLayerWarning(TractWarning):
    """The input layer's weight does not require a gradient, so that TrAct is idle."""


class NonFiniteLossWarning(TractWarning):
    """A training step's loss is NaN or infinite."""


class UntestedVersionWarning(TractWarning):
    """A package is newer than any that was tested."""


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Begin a remedy with the nearest of the names that there are; with nothing if none is near."""
    close = difflib.get_close_matches(str(name).lower(), [*names], n=1)
    return f"Did you mean {close[0]!r}? " if close else ""

"""The one module that imports ONNX Runtime: what is installed, and which devices it has."""

from __future__ import annotations

import contextlib
import importlib
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch.utils.checkpoint

from tract_fx.errors import MissingRuntimeError

__all__ = [
    "TESTED_VERSION",
    "any_runtime",
    "inference_session",
    "message_of",
    "ort_value",
    "parameter_value",
    "parse_device",
    "require_device",
    "run_session",
    "runtime",
    "save_checkpoint",
    "session_options",
    "training_api",
]

TESTED_VERSION = "1.19.2"  # ONNX Runtime Training's last release

# From the GPU wheel: file name, metadata, onnxruntime/capi/build_and_package_info.py, and the
# libraries that its CUDA provider links with.
_GPU_BUILD = (
    f"put onnxruntime-training {TESTED_VERSION} in place of onnxruntime-training-cpu: "
    "pip uninstall onnxruntime-training-cpu, then "
    'pip install "tract_fx[ort-training-gpu]", on x86-64 Linux with Python 3.10 or 3.11 and the '
    "libraries of CUDA 11.8 and cuDNN 8 where the loader finds them"
)

# An identity on one number: the smallest model that shows whether a provider starts.
_PROBE_SIZE = 1


def runtime() -> ModuleType:
    """Import ONNX Runtime, in the build that can train.

    Returns:
        The module `onnxruntime`.

    Raises:
        MissingRuntimeError: If no `onnxruntime` is installed, or one that can't train.
    """  # noqa: DOC502 (raised by _import_runtime)
    with _torch_left_alone():
        return _import_runtime()


@contextlib.contextmanager
def _torch_left_alone() -> Iterator[None]:
    """Take back what the import of ONNX Runtime Training does to PyTorch.

    It puts a function of its own in the place of `torch.utils.checkpoint.checkpoint`, which
    torch.compile can't trace.
    """
    checkpoint = torch.utils.checkpoint.checkpoint
    try:
        yield
    finally:
        torch.utils.checkpoint.checkpoint = checkpoint


def any_runtime() -> ModuleType:
    """Import ONNX Runtime, in whatever build is installed.

    Returns:
        The module `onnxruntime`.

    Raises:
        MissingRuntimeError: If none is installed.
    """
    with _torch_left_alone():
        try:
            return importlib.import_module("onnxruntime")
        except ImportError as error:
            raise MissingRuntimeError(
                f"onnxruntime can't be imported ({error})",
                "graphs are run by ONNX Runtime",
                'Install an extra: pip install "tract_fx[onnxruntime]" for any release, or '
                f"{_to_install()} for ONNX Runtime Training",
            ) from error


def _import_runtime() -> ModuleType:
    found = any_runtime()
    try:
        importlib.import_module("onnxruntime.training.api")
        importlib.import_module("onnxruntime.training.artifacts")
    except ImportError as error:
        version = getattr(found, "__version__", "of unknown version")
        raise MissingRuntimeError(
            f"onnxruntime {version} has no onnxruntime.training.api ({error})",
            "stock ONNX Runtime and ONNX Runtime Training share an import name, and the one that "
            "is installed can't train",
            f"Uninstall onnxruntime and onnxruntime-gpu, then install the extra: {_to_install()}",
        ) from error
    return found


def _to_install() -> str:
    """Say how ONNX Runtime Training is installed, on this Python and machine."""
    command = 'pip install "tract_fx[ort-training]"'
    python, machine = platform.python_version(), platform.machine()
    if sys.version_info < (3, 13) and machine != "aarch64":
        return command
    return (
        f"{command}, in an environment with Python 3.10 to 3.12 on x86-64 or macOS, as its last "
        f"release, {TESTED_VERSION}, was built for no other (this is Python {python} on {machine})"
    )


def training_api() -> ModuleType:
    """Import `onnxruntime.training.api`: CheckpointState, Module, Optimizer.

    Returns:
        The module.
    """
    runtime()
    return importlib.import_module("onnxruntime.training.api")


def save_checkpoint(trained: Sequence[Any], kept: Sequence[Any], file: Path) -> None:
    """Write a checkpoint.

    Args:
        trained: TensorProtos of the parameters that are trained, in the training graph's order.
        kept: Those of the other tensors.
        file: Where to.
    """
    training_api()
    utilities = importlib.import_module("onnxruntime.training.onnxblock.checkpoint_utils")
    utilities.save_checkpoint((list(trained), list(kept)), str(file))


def parse_device(device: object) -> tuple[str, int]:
    """Read a device's name.

    Args:
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, or a `torch.device`.

    Returns:
        The kind, `"cpu"` or `"cuda"`, and the index.

    Raises:
        MissingRuntimeError: If it is another device.
    """
    match = re.fullmatch(r"(cpu)|cuda(?::(\d+))?", str(device))
    if match is None:
        raise MissingRuntimeError(
            f"device {str(device)!r}",
            "ONNX Runtime Training runs on the CPU and, through its CUDA provider, on NVIDIA GPUs",
            "Pass 'cpu', 'cuda' or 'cuda:0'",
        )
    return ("cpu", 0) if match[1] else ("cuda", int(match[2] or 0))


def require_device(device: object) -> tuple[str, int]:
    """Make sure that ONNX Runtime runs on a device, by running there.

    A CUDA build names its CUDA provider also where the driver, the libraries or the GPU are
    missing, and goes on on the CPU. So a small model is started, and the provider looked at that
    it got.

    Args:
        device: As `parse_device` takes it.

    Returns:
        The kind, `"cpu"` or `"cuda"`, and the index.

    Raises:
        MissingRuntimeError: If the device is of no known kind, or does not start.
    """
    kind, index = parse_device(device)
    ort = any_runtime()
    if kind == "cpu":
        return kind, index
    available = ort.get_available_providers()
    if "CUDAExecutionProvider" not in available:
        raise MissingRuntimeError(
            f"device {str(device)!r}, and an ONNX Runtime {ort.__version__} whose execution "
            f"providers are {', '.join(available)}",
            "the CUDA provider is not in this build, and training does not go on on the CPU "
            "without being asked",
            f"To train on the GPU, {_GPU_BUILD}. Or pass device='cpu'",
        )
    try:
        session = inference_session(_probe(), kind, index)
        (value,) = run_session(
            session, {"x": ort_value(np.zeros(_PROBE_SIZE, np.float32), kind, index)}
        )
        started = "CUDAExecutionProvider" in session.get_providers() and value.size == _PROBE_SIZE
        cause = "it fell back to the CPU when it was started"
    except Exception as error:  # ONNX Runtime's exceptions have no common root of their own
        started, cause = False, message_of(error)
    if not started:
        raise MissingRuntimeError(
            f"device {str(device)!r}, whose CUDA provider does not start ({cause})",
            "training does not go on on the CPU without being asked",
            f"Check nvidia-smi and the device's index, and {_GPU_BUILD}. Or pass device='cpu'",
        )
    return kind, index


def session_options() -> Any:
    """Make the options of every session: errors come as exceptions, not as log lines.

    Returns:
        An `onnxruntime.SessionOptions`.
    """
    options = any_runtime().SessionOptions()
    options.log_severity_level = 4  # fatal
    return options


def inference_session(model: bytes, kind: str, index: int) -> Any:
    """Start a session of a graph, apart from the training API.

    Args:
        model: The serialised model.
        kind: `"cpu"` or `"cuda"`.
        index: The device's index.

    Returns:
        An `onnxruntime.InferenceSession`.
    """
    providers: list[Any] = ["CPUExecutionProvider"]
    if kind == "cuda":
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": index}))
    return any_runtime().InferenceSession(model, session_options(), providers=providers)


def ort_value(array: np.ndarray[Any, Any], kind: str, index: int) -> Any:
    """Put an array on a device.

    Args:
        array: The array, C-contiguous.
        kind: `"cpu"` or `"cuda"`.
        index: The device's index.

    Returns:
        An `onnxruntime.OrtValue`; on the CPU it may share the array's memory.
    """
    return any_runtime().OrtValue.ortvalue_from_numpy(array, kind, index)


def parameter_value(parameter: Any) -> Any:
    """Take a checkpoint parameter's value, where it lies and without a copy.

    Args:
        parameter: An `onnxruntime.training.api.checkpoint_state.Parameter`.

    Returns:
        An `onnxruntime.OrtValue` that follows every update.
    """
    return runtime().OrtValue(parameter._parameter.data)


def run_session(session: Any, feeds: Mapping[str, Any]) -> list[np.ndarray[Any, Any]]:
    """Run a session.

    Args:
        session: From `inference_session`.
        feeds: `OrtValue`s by input name.

    Returns:
        The outputs, on the host.
    """
    return [value.numpy() for value in session.run_with_ort_values(None, dict(feeds))]


_SOURCE = re.compile(r"/onnxruntime_src/\S+:\d+ .*?\)(?: const)?(?: \[[^\]]*\])? ")
"""A file and a line of ONNX Runtime's source, with the signature of the function there."""


def message_of(error: Exception) -> str:
    """Shorten an exception of ONNX Runtime, for the messages of ours.

    Args:
        error: The exception.

    Returns:
        The first line, without places in ONNX Runtime's source and without a full stop.
    """
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    line = re.sub(r"^.*?\[ONNXRuntimeError\] : \d+ : \w+ : ", "", line)
    return _SOURCE.sub("", line).strip(" .")


def _probe() -> bytes:
    """Serialise an identity on float32 vectors."""
    helper = importlib.import_module("onnx.helper")
    x, y = (helper.make_tensor_value_info(name, 1, [_PROBE_SIZE]) for name in "xy")
    # Neg rather than Identity: nothing that an optimizer could take away.
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "probe", [x], [y])
    opsets = [helper.make_opsetid("", 20)]
    model: bytes = helper.make_model(graph, ir_version=10, opset_imports=opsets).SerializeToString()
    return model

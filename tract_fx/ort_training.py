"""The one module that imports ONNX Runtime: what is installed, and which devices it has."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch.utils.checkpoint

from tract_fx.errors import MissingRuntimeError

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TRAINING_PROVIDERS = (_CPU, _CUDA)
"""Those of ONNX Runtime Training."""

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
    """Import ONNX Runtime, in the build that can train."""
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
    """Import ONNX Runtime, in whatever build is installed."""
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
    """Import `onnxruntime.training.api`: CheckpointState, Module, Optimizer."""
    runtime()
    return importlib.import_module("onnxruntime.training.api")


def save_checkpoint(trained: Sequence[Any], kept: Sequence[Any], file: Path) -> None:
    """Write a checkpoint."""
    training_api()
    utilities = importlib.import_module("onnxruntime.training.onnxblock.checkpoint_utils")
    utilities.save_checkpoint((list(trained), list(kept)), str(file))


@dataclass(frozen=True)
class Device:
    """Where sessions run.

    Attributes:
        provider: ONNX Runtime's name of the execution provider.
        index: The index of a GPU.
        options: Further options of the provider.
    """

    provider: str = _CPU
    index: int = 0
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def memory(self) -> str:
        """Where tensors lie between runs: `"cpu"` or `"cuda"`."""
        return "cuda" if self.provider == _CUDA else "cpu"

    def __str__(self) -> str:
        return {_CPU: "cpu", _CUDA: f"cuda:{self.index}"}.get(self.provider, self.provider)


CPU = Device()
"""The CPU, by ONNX Runtime's own kernels."""


def parse_device(device: object) -> Device:
    """Read a device's name."""
    if isinstance(device, tuple) and len(device) == 2 and isinstance(device[1], Mapping):
        options = {str(key): str(value) for key, value in device[1].items()}
        return dataclasses.replace(parse_device(device[0]), options=options)
    if isinstance(device, Device):
        return device
    if re.fullmatch(r"\w+ExecutionProvider", str(device)):
        return Device(str(device))
    match = re.fullmatch(r"(cpu)|cuda(?::(\d+))?", str(device))
    if match is None:
        raise MissingRuntimeError(
            f"device {str(device)!r}",
            "there is no such device, and execution providers have longer names",
            "Pass 'cpu', 'cuda', 'cuda:0', or an execution provider's name, such as "
            "'DmlExecutionProvider'",
        )
    return CPU if match[1] else Device(_CUDA, int(match[2] or 0))


def require_device(device: object) -> Device:
    """Make sure that ONNX Runtime runs on a device, by running there.

    A CUDA build names its CUDA provider also where the driver, the libraries or the GPU are
    missing, and goes on on the CPU. So a small model is started, and the provider looked at that
    it got.
    """
    found = parse_device(device)
    ort = any_runtime()
    if found == CPU:
        return found
    available = ort.get_available_providers()
    install = f"To train on the GPU, {_GPU_BUILD}. " if found.provider == _CUDA else ""
    if found.provider not in available:
        raise MissingRuntimeError(
            f"device {str(found)!r}, and an ONNX Runtime {ort.__version__} whose execution "
            f"providers are {', '.join(available)}",
            f"{found.provider} is not in this build, and training does not go on on the CPU "
            "without being asked",
            f"{install or 'Install a build that has it. '}Or pass device='cpu'",
        )
    try:
        session = inference_session(_probe(), found)
        (value,) = run_session(session, {"x": ort_value(np.zeros(_PROBE_SIZE, np.float32), found)})
        started = found.provider in session.get_providers() and value.size == _PROBE_SIZE
        cause = "it fell back to the CPU when it was started"
    except Exception as error:  # ONNX Runtime's exceptions have no common root of their own
        started, cause = False, message_of(error)
    if not started:
        check = "nvidia-smi and the device's index, and " if found.provider == _CUDA else ""
        raise MissingRuntimeError(
            f"device {str(found)!r}, whose provider does not start ({cause})",
            "training does not go on on the CPU without being asked",
            f"Check {check}{_GPU_BUILD if check else 'its options and libraries'}. "
            "Or pass device='cpu'",
        )
    return found


def session_options(device: Device = CPU) -> Any:
    """Make the options of every session: errors come as exceptions, not as log lines."""
    options = any_runtime().SessionOptions()
    options.log_severity_level = 4  # fatal
    if device.provider == "WebGpuExecutionProvider":
        # In its own layout, NHWC, convolutions of 6, 9, 15 … channels are wrong without a word.
        options.add_session_config_entry("ep.webgpuexecutionprovider.preferredLayout", "NCHW")
    return options


def inference_session(model: bytes, device: Device = CPU) -> Any:
    """Start a session of a graph, apart from the training API."""
    providers: list[Any] = [_CPU]
    if device.provider != _CPU:
        options = dict(device.options)
        options |= {"device_id": str(device.index)} if device.provider == _CUDA else {}
        providers.insert(0, (device.provider, options))
    return any_runtime().InferenceSession(model, session_options(device), providers=providers)


def run_once(
    model: bytes,
    feeds: Mapping[str, np.ndarray[Any, Any]],
    names: Sequence[str],
    refused: Callable[[Exception], Exception],
) -> dict[str, np.ndarray[Any, Any]]:
    """Run a graph in a session of its own on the CPU; what it fails with goes through `refused`."""
    any_runtime()  # its own error, where it is not there
    try:
        results = inference_session(model).run(list(names), dict(feeds))
    except Exception as error:  # ONNX Runtime's own classes are not public
        raise refused(error) from error
    return dict(zip(names, results, strict=True))


def ort_value(array: np.ndarray[Any, Any], device: Device = CPU) -> Any:
    """Put an array on a device."""
    return any_runtime().OrtValue.ortvalue_from_numpy(array, device.memory, device.index)


def parameter_value(parameter: Any) -> Any:
    """Take a checkpoint parameter's value, where it lies and without a copy."""
    return runtime().OrtValue(parameter._parameter.data)


def run_session(session: Any, feeds: Mapping[str, Any]) -> list[np.ndarray[Any, Any]]:
    """Run a session."""
    return [value.numpy() for value in session.run_with_ort_values(None, dict(feeds))]


_SOURCE = re.compile(r"/onnxruntime_src/\S+:\d+ .*?\)(?: const)?(?: \[[^\]]*\])? ")
"""A file and a line of ONNX Runtime's source, with the signature of the function there."""


def message_of(error: Exception) -> str:
    """Shorten an exception of ONNX Runtime, for the messages of ours."""
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

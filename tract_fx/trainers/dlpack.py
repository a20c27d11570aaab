"""Memory that PyTorch's tensors and ONNX Runtime's values share, by DLPack.

ONNX Runtime computes on CUDA streams of its own, which wait for nobody. What PyTorch has queued is
therefore waited for on the host before each run (`wait_for_torch`). A run returns when its streams
are done, so that PyTorch may read at once, on whichever stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from tract_fx.artifacts.batches import BatchValue, on_host
from tract_fx.errors import MissingRuntimeError
from tract_fx.ort_training import Device, any_runtime, ort_value


def ort_value_of(value: BatchValue, device: Device) -> Any:
    """Give ONNX Runtime a value on a device, where it lies there already without a copy."""
    native, memory = _native(), _memory(device)
    if isinstance(value, torch.Tensor) and memory.type == "cpu":
        value = value.cpu()
    # Before 1.21 only ONNX Runtime Training has it; and it is particular about empty ones' strides.
    adopts = hasattr(native.OrtValue, "from_dlpack") and 0 not in value.shape
    if not isinstance(value, torch.Tensor) or value.device != memory or not adopts:
        return ort_value(on_host(value), device)  # over the host
    # Up to 1.31 a bool is a byte there, and a word beside it.
    if value.dtype == torch.bool and hasattr(native, "is_dlpack_uint8_tensor"):
        adopted = native.OrtValue.from_dlpack(to_dlpack(value.view(torch.uint8)), True)
    else:
        # Not tensor.__dlpack__, which refuses all GPUs but PyTorch's current one.
        adopted = native.OrtValue.from_dlpack(to_dlpack(value))
    return any_runtime().OrtValue(adopted)


def own_value(value: BatchValue, device: Device) -> Any:
    """Copy a value to a device, ready to be read there."""
    if not isinstance(value, torch.Tensor):
        # An OrtValue of an array does not keep the array; one of a tensor keeps the tensor.
        value = torch.from_numpy(np.array(value, order="C"))
    elif value.device == _memory(device):
        value = value.clone(memory_format=torch.contiguous_format)
    copied = ort_value_of(value, device)
    wait_for_torch(device)
    return copied


def shared_tensors(values: Mapping[str, Any], device: Device) -> dict[str, torch.Tensor]:
    """Look at values of ONNX Runtime as tensors."""
    if not hasattr(_native().OrtValue, "to_dlpack"):
        raise MissingRuntimeError(
            f"tensors in the memory of ONNX Runtime {any_runtime().__version__}",
            "it shares none: DLPack came with 1.21",
            "Install a newer one, or call state_dict, which copies",
        )
    if _memory(device).type == "cuda" and not torch.cuda.is_available():
        raise MissingRuntimeError(
            f"tensors on {device}, and a PyTorch without CUDA",
            "PyTorch can't look at a GPU's memory then",
            "Install a PyTorch with CUDA, or call state_dict, which copies to the CPU",
        )
    return {name: _tensor(value) for name, value in values.items()}


def wait_for_torch(device: Device) -> None:
    """Wait for what PyTorch's current stream of a device has queued."""
    if _memory(device).type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.current_stream(device.index).synchronize()


def _native() -> Any:
    """The module of the class below `onnxruntime.OrtValue`, which alone has DLPack before 1.26."""
    return any_runtime().capi.onnxruntime_pybind11_state


def _memory(device: Device) -> torch.device:
    """Where a device's tensors lie, in PyTorch's words."""
    return torch.device("cuda", device.index) if device.memory == "cuda" else torch.device("cpu")


def _tensor(value: Any) -> torch.Tensor:
    """Look at a value as a tensor."""
    native = value._ortvalue
    tensor = from_dlpack(native.to_dlpack())
    return tensor.view(torch.bool) if native.data_type() == "tensor(bool)" else tensor

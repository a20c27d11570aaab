"""ONNX models in PyTorch, and trained tensors back in ONNX models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import fx

from tract_fx.errors import StateMismatchError
from tract_fx.importer.build import import_graph
from tract_fx.importer.forward_model import read_forward, read_model
from tract_fx.passes.onnx_graph.models import as_ir_model, load_values

Model = onnx.ModelProto | ir.Model | str | Path

_OWN = "Pass the state_dict of the model that was made of this one"


def import_onnx(model: Model, *, trainable: Iterable[str] | None = None) -> fx.GraphModule:
    """Read an ONNX forward model as a PyTorch module that trains.

    Its graph is one of `torch.fx`, in which a convolution is `torch.nn.functional.conv2d` and a
    product with a weight `linear`, so that `tract_pass` and `tract_module` find the input layer.
    Parameters and buffers have the initializers' names. `train()` and `eval()` switch the dropout,
    and the BatchNormalization nodes whose scale or bias is trained; running variances are ONNX's,
    of the whole batch.

    Args:
        model: The model, or its file. Not changed.
        trainable: Names of the initializers that are parameters, where the usual ones are not meant
            (see `tract_fx.passes.find_onnx_input_layers`).

    Returns:
        The module, in training mode. It takes the model's inputs in order, and gives its output, or
        a dictionary of its outputs by name.

    Raises:
        UnsupportedModelError: `model` is no ONNX forward model.
        UnsupportedTrainingError: An operator has no counterpart in PyTorch, or what is trained
            can't be told.
    """
    forward = read_forward(read_model(model), choice=None, trainable=trainable)
    module = import_graph(
        forward.graph,
        trained=forward.trained,
        frozen=forward.frozen,
        trains=forward.trains,
        needed=[str(value.name) for value in forward.graph.graph.outputs],
    ).module
    outputs: Any = module.graph.output_node().args[0]
    if len(outputs) == 1:
        module.graph.output_node().args = (*outputs.values(),)
        module.recompile()
    return module


def with_weights(model: Model, state: Mapping[str, Any]) -> onnx.ModelProto:
    """Put trained tensors into the ONNX model that they came from.

    Args:
        model: The model that was imported or exported, or its file. Not changed.
        state: A state_dict: of a trainer, or of what `import_onnx` gave.

    Returns:
        The model with the tensors as its initializers, everything else as it was.

    Raises:
        StateMismatchError: `state` is no mapping, an entry holds no real numbers, or the model's
            initializers have no place for it.
    """
    if not isinstance(state, Mapping):
        raise StateMismatchError(
            f"a {type(state).__name__} as a state_dict", "tensors are told by their keys", _OWN
        )
    result = as_ir_model(model)
    load_values(result)
    whole = read_model(model)
    floats = [n for n, v in whole.graph.initializers.items() if v.dtype == ir.DataType.FLOAT]
    keys = {key: name for name, key in import_graph(whole, trained=floats).keys.items()}
    for key, value in state.items():
        name = keys.get(key, key)
        old = result.graph.initializers.get(name)
        tensor = None if old is None else old.const_value
        array = _real_numbers(key, value)
        if old is None or tensor is None or tuple(tensor.shape) != array.shape:
            raise StateMismatchError(
                f"a state_dict with {key!r} of shape {array.shape}",
                "the model has no initializer of that name and shape",
                _OWN,
            )
        old.const_value = ir.tensor(np.array(array, dtype=tensor.dtype.numpy()), name=name)
    return ir.to_proto(result)


def _real_numbers(key: str, value: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """Take an entry of a state_dict to the host."""
    try:
        if isinstance(value, torch.Tensor):
            whole = value.float() if value.dtype == torch.bfloat16 else value
            array = whole.numpy(force=True)
        else:
            array = np.asanyarray(value)
    except (TypeError, ValueError, RuntimeError):  # sparse, without numbers, ragged
        array = None
    if array is None or array.dtype.kind not in "fiub" or isinstance(array, np.ma.MaskedArray):
        raise StateMismatchError(
            f"a state_dict whose {key!r} is a {type(value).__name__}",
            "numpy arrays without a mask and dense tensors, of real numbers, can be taken",
            _OWN,
        )
    return array

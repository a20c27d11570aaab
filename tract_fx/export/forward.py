"""Forward graphs from either kind of model, with a batch to try them on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tract_fx.errors import UnsupportedTrainingError
from tract_fx.export.losses import Loss
from tract_fx.export.model_outputs import default_output, logits_of
from tract_fx.export.onnx_model import read_forward
from tract_fx.export.records import ForwardGraphs
from tract_fx.export.torch_model import TorchForward, export_forward
from tract_fx.passes import remove_tract
from tract_fx.passes.choose import LayerChoice
from tract_fx.program import arguments

__all__ = ["Source", "onnx_source", "torch_source"]

EXAMPLES = 4
"""Batch of the example inputs that are made up for an ONNX model without any."""


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        graphs: Its forward graphs.
        feeds: Example inputs by the graphs' names for them.
        output: Name of the value that the loss reads, None where the outputs decide.
        counters: Values of the graphs' counters.
        parameters: A PyTorch model's parameters.
        torch_forward: The PyTorch model's program, None for an ONNX model.
    """

    graphs: ForwardGraphs
    feeds: Mapping[str, np.ndarray]
    output: str | None
    counters: Mapping[str, int]
    parameters: Sequence[Tensor] = ()
    torch_forward: TorchForward | None = None


def torch_source(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    *,
    output: str | None,
    plain: bool,
    dynamic_batch: bool,
) -> Source:
    """Export a PyTorch model's forward pass.

    Args:
        model: The model.
        example_inputs: A batch as the model takes it.
        output: Name of the output that the loss reads.
        plain: Whether TrAct is taken out first.
        dynamic_batch: Whether the first dimension of the inputs is left open.

    Returns:
        The graphs and the batch.
    """
    module = model.module() if isinstance(model, ExportedProgram) else model
    if plain:
        module = remove_tract(module)
    args, kwargs = arguments(example_inputs)
    forward = export_forward(module, args, kwargs, dynamic_batch=dynamic_batch)
    state = module.state_dict()
    counters = {name: int(state[name]) for name in forward.graphs.counters}
    parameters = tuple(module.parameters())
    return Source(forward.graphs, forward.feeds, output, counters, parameters, forward)


def onnx_source(
    model: onnx.ModelProto | ir.Model | str | Path,
    example_inputs: Any,
    *,
    loss: Loss | None,
    output: str | None,
    plain: bool,
    lambda_: float | None,
    layers: LayerChoice,
    trainable: Iterable[str] | None,
) -> Source:
    """Read an ONNX forward model.

    Args:
        model: The model, or its file.
        example_inputs: A batch, None to make one up.
        loss: The loss, which decides between logits and probabilities.
        output: Name of the value that the loss reads.
        plain: Whether TrAct is left out.
        lambda_: λ, 0.1 if None.
        layers: Layers to treat.
        trainable: Initializers to train.

    Returns:
        The graphs and the batch.
    """
    graphs = read_forward(
        model,
        lambda_=0.1 if lambda_ is None else lambda_,
        layers=layers,
        trainable=trainable,
        plain=plain,
    )
    inputs = [v for v in graphs.train.graph.inputs if v.name not in graphs.train.graph.initializers]
    if loss is not None and output is None:
        output = logits_of(graphs.evaluation, default_output(graphs.evaluation, loss), loss)
    if example_inputs is None:
        return Source(graphs, _made_up(inputs), output, {})
    args, kwargs = arguments(example_inputs)
    named = dict(zip((str(value.name) for value in inputs), args, strict=False)) | kwargs
    missing = [str(value.name) for value in inputs if value.name not in named]
    if missing or len(named) != len(inputs):
        raise UnsupportedTrainingError(
            f"example inputs {sorted(named)}",
            f"the model takes {[str(value.name) for value in inputs]}",
            "Give one array for each",
        )
    feeds = {name: _array(value) for name, value in named.items()}
    return Source(graphs, feeds, output, {})


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _made_up(inputs: Sequence[ir.Value]) -> dict[str, np.ndarray]:
    """Noise of the inputs' shapes, zeros for integers."""
    generator = torch.Generator().manual_seed(0)
    feeds = {}
    for value in inputs:
        shape = [] if value.shape is None else list(value.shape)
        known = [size if isinstance(size, int) else None for size in shape]
        if value.shape is None or any(size is None for size in known[1:]):
            raise UnsupportedTrainingError(
                f"the input {value.name!r} of shape {value.shape}",
                "without example inputs the sizes beside the batch have to be fixed",
                "Give example_inputs",
            )
        sizes = [EXAMPLES if size is None else size for size in known]
        dtype = (value.dtype or ir.DataType.FLOAT).numpy()
        noise = torch.randn(sizes, generator=generator).numpy()
        feeds[str(value.name)] = noise.astype(dtype) if dtype.kind == "f" else np.zeros(sizes, dtype)
    return feeds

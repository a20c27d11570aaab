"""What an ONNX graph is run on: a batch or noise, the checkpoint's parameters or random ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tract_fx.artifacts.batches import check_batch, on_host
from tract_fx.artifacts.manifest import TensorSpec
from tract_fx.errors import InvalidBatchError
from tract_fx.export.made_up import made_up_numbers
from tract_fx.inspection.batch import value_words
from tract_fx.inspection.onnx.subject import OnnxSubject
from tract_fx.passes.onnx_graph.values import static_shape

_OPEN_SIZE = 4
_SEED = 0


@dataclass(frozen=True)
class OnnxBatch:
    """What a graph is run on.

    Attributes:
        feeds: The model's inputs and targets, by name.
        parameters: All parameters of a training graph, by name.
        shapes: The batch in words, such as `"x float32 4×3×8×8"`.
        note: What of it is made up; empty where nothing is.
    """

    feeds: Mapping[str, np.ndarray]
    parameters: Mapping[str, np.ndarray]
    shapes: str
    note: str


def make_batch(subject: OnnxSubject, example_inputs: Any) -> OnnxBatch:
    """Bring together what a graph is run on."""
    generator = np.random.default_rng(_SEED)
    feeds, missing = _feeds(subject.inputs, example_inputs, generator)
    parameters, notes = subject.parameters, [f"Noise for {', '.join(missing)}"] if missing else []
    if parameters is None and subject.is_training:
        parameters = _random_parameters(subject, generator)
        notes.append("Random parameters, for there is no checkpoint beside the graph")
    shapes = ", ".join(f"{name} {value_words(a.dtype, a.shape)}" for name, a in feeds.items())
    return OnnxBatch(feeds, parameters or {}, shapes, ". ".join(notes))


def _feeds(
    specs: Sequence[TensorSpec], example_inputs: Any, generator: np.random.Generator
) -> tuple[dict[str, np.ndarray], list[str]]:
    """What a graph takes, in its order, and the names of what is noise in it."""
    given = _by_name(specs, example_inputs)
    missing = [spec for spec in specs if spec.name not in given]
    noise = {spec.name: _noise(spec, _shape(spec, specs, given), generator) for spec in missing}
    values = check_batch(specs, (), {**noise, **given}, "inspect_graph")
    return {spec.name: on_host(v) for spec, v in zip(specs, values, strict=True)}, list(noise)


def _by_name(specs: Sequence[TensorSpec], example_inputs: Any) -> dict[str, Any]:
    """Give each value that there is its name."""
    if example_inputs is None:
        return {}
    if isinstance(example_inputs, Mapping):
        return dict(example_inputs)
    if isinstance(example_inputs, (torch.Tensor, np.ndarray)):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, (tuple, list)) or len(example_inputs) > len(specs):
        names = ", ".join(spec.name for spec in specs)
        raise InvalidBatchError(
            f"example_inputs, a {type(example_inputs).__name__}"
            + (f" of {len(example_inputs)}" if isinstance(example_inputs, (tuple, list)) else ""),
            f"the graph takes {names}",
            "Give a tuple of them in this order, or a mapping by name",
        )
    return {spec.name: v for spec, v in zip(specs, example_inputs, strict=False)}


def _shape(
    spec: TensorSpec, specs: Sequence[TensorSpec], given: Mapping[str, Any]
) -> tuple[int, ...]:
    """Choose the sizes of a tensor that is not given: those of its equals where they are."""
    known: dict[str, int] = {}
    for other in specs:
        if other.name in given:
            found = np.shape(given[other.name])
            known |= {s: n for s, n in zip(other.shape, found, strict=False) if isinstance(s, str)}
            known.setdefault("", found[0] if found else _OPEN_SIZE)  # the batch's size
    return tuple(
        size
        if isinstance(size, int)
        else known.get(size or "", known.get("", _OPEN_SIZE) if axis == 0 else _OPEN_SIZE)
        for axis, size in enumerate(spec.shape)
    )


def _noise(spec: TensorSpec, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Made-up numbers, and labels of all classes where their number is known."""
    dtype = np.dtype(spec.dtype)
    if spec.classes is not None and dtype.kind in "iu":
        return generator.integers(spec.classes, size=shape).astype(dtype)
    return made_up_numbers(dtype, shape, generator)[0]


def _random_parameters(
    subject: OnnxSubject, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """Matrices and kernels in He's scale; vectors about one, as scales and variances have to be."""
    values = {str(value.name): value for value in subject.model.graph.inputs}
    parameters = {}
    for name in (*subject.trainable, *subject.frozen):
        shape, dtype = static_shape(values[name]), values[name].dtype
        if shape is None or dtype is None:
            raise InvalidBatchError(
                f"the parameter {name!r} of unknown shape",
                "there is no checkpoint beside the graph, and random values need its sizes",
                "Give the training graph's path, with its checkpoint in the same folder",
            )
        if len(shape) < 2:
            array = generator.uniform(0.5, 1.5, shape)
        else:
            fan = max(shape) if len(shape) == 2 else int(np.prod(shape[1:]))
            array = generator.standard_normal(shape) * np.sqrt(2 / fan)
        parameters[name] = array.astype(dtype.numpy())
    return parameters

"""Make sure, on a batch, that a PyTorch model's graphs compute what the model computes.

What they are compared with is PyTorch's own run of the model in float64, and for the two batch
sizes that are looked at no graph is made anew. Dropout is left out on both sides.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tract_fx.errors import ExportError
from tract_fx.export.eager_forward import call_on_copies
from tract_fx.export.graph_runs import run_graph
from tract_fx.export.no_dropout import no_dropout
from tract_fx.export.torch_graphs import TorchGraphs, arrays, evaluation_graph, training_graph
from tract_fx.export.torch_loss import TorchLoss
from tract_fx.export.torch_model import TorchModel
from tract_fx.export.training_session import StockSession, TrainingSession, open_session
from tract_fx.export.verify_tract import verify_tract
from tract_fx.function_mode import FunctionMode
from tract_fx.modules import named_tensors
from tract_fx.reference.distance import distance, norm
from tract_fx.step.names import output_names

ROUNDING = 1e-5
"""Largest relative error, beyond what float32 rounds."""

MOST_ROUNDING = 2e-3
"""A result may be off by a few times what rounding inputs and parameters moves it by, but by no
more than this of its norm; or by a few times what PyTorch itself is off by in float32."""

TRACT_ROUNDING, MOST_TRACT_ROUNDING = 2e-4, 5e-2
"""The same two for a weight under TrAct: the preconditioner amplifies what differs in gW by up to
the condition number. How exact the preconditioner itself is `verify_tract` measures."""

VANISHING = 1e-6
"""Share of the largest gradient below which one is rounding: of the bias before a BatchNorm."""

_LOSS = "the loss"
_TIMES, _TIMES_SINGLE = 8.0, 3.0
_PLACES = 4
_UNIT = 2.0**-24


@dataclass(frozen=True)
class _Results:
    """What a step gives: the loss, gradients and running statistics; or the outputs."""

    loss: np.ndarray
    gradients: Mapping[str, np.ndarray]
    states: Mapping[str, np.ndarray]


def verify_torch(model: TorchModel, loss: TorchLoss, graphs: TorchGraphs) -> None:
    """Compare what ONNX Runtime makes of the graphs with float64, on batches of two sizes."""
    batch = {**model.inputs, **loss.targets}
    layers = [record for record in graphs.layers if record.node not in graphs.trace.idle]
    verify_tract(graphs.training, layers, arrays(batch), graphs.initial)
    training, evaluation = graphs.training, graphs.evaluation
    if _draws(training):
        with no_dropout(model.training) as deterministic:
            training, *_ = training_graph(model, loss, deterministic, graphs.target)
    if _draws(evaluation):  # a dropout that the model leaves on in evaluation
        with no_dropout(model.evaluation) as deterministic:
            evaluation, _ = evaluation_graph(
                model, loss, deterministic, graphs.tensors, graphs.target
            )
    session = open_session(training)
    treated = {weight for record in graphs.layers for weight in record.weight}
    for size in _sizes(model):
        resize = functools.partial(_resized, batch=model.batch, size=size)
        args, kwargs = pytree.tree_map(resize, (model.args, model.kwargs))
        case = _Case(model, loss, args, kwargs, tuple(map(resize, loss.targets.values())))
        feeds = arrays({name: resize(value) for name, value in batch.items()})
        if size == 1 and not case.is_taken():
            continue
        if size is None or size >= graphs.trace.smallest_batch:
            _verify_training(case, session, feeds, graphs, treated)
        names = (str(evaluation.graph.outputs[0].name), *graphs.predictions)
        found = [run_graph(evaluation, {**graphs.initial, **feeds}, names)]
        if size != 1:  # in another session, the outputs alone
            found.append(run_graph(evaluation, {**graphs.initial, **feeds}, graphs.predictions))
        _refuse(next(_evaluation_differences(case, found, names), None))


def _verify_training(
    case: _Case,
    session: TrainingSession | StockSession,
    feeds: Mapping[str, np.ndarray],
    graphs: TorchGraphs,
    treated: Collection[str],
) -> None:
    """Compare a step with PyTorch's; where they differ, once more with other parameters.

    A ReLU or a max-pool whose operands are equal to rounding falls on one side or the other, and
    takes all gradients before it along. A mistake is one everywhere.
    """
    difference: str | None = None
    for place in range(_PLACES):
        moved = _moved(graphs.initial, graphs.tensors.trained, place)
        value, *gradients = session.run(feeds, moved)
        found = _Results(np.asarray(value), *gradients)
        own = dataclasses.replace(case, parameters=moved)
        difference = next(_training_differences(own, found, graphs, treated), None)
        if difference is None:
            return
    _refuse(difference)


def _moved(
    values: Mapping[str, np.ndarray], trained: Collection[str], place: int
) -> dict[str, np.ndarray]:
    """Parameters a hundredth away; at the first place they are as they are."""
    generator = np.random.default_rng(place)
    moved = dict(values)
    for name in trained if place else ():
        noise = generator.standard_normal(moved[name].shape).astype(np.float32)
        size = np.abs(moved[name]).mean()
        moved[name] = moved[name] + np.float32(0.01) * size * noise
    return moved


def training_outputs(model: TorchModel, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute what a model returns in training mode, in float64 and without dropout."""
    turned = _Turn(torch.float64, None)
    module = model.training
    tensors = {name: turned(value) for name, value in named_tensors(module).items()}
    args = tuple(turned(torch.from_numpy(inputs[name])) for name in model.names)
    with no_dropout(module) as plain, _wide(torch.float64), torch.no_grad():
        return arrays(output_names(call_on_copies(plain, tensors, args, {}), model.taken))


def _draws(model: ir.Model) -> bool:
    return any(node.op_type == "Dropout" for node in model.graph)


def _sizes(model: TorchModel) -> tuple[int | None, ...]:
    """Two sizes that no one has traced with, one of them a single image."""
    batch = model.batch
    return (None,) if batch is None else (batch + 1, 1)


def _resized(value: Any, batch: int | None, size: int | None) -> Any:
    """Cut what has a batch's size, or repeat its first entries."""
    if size is None or not isinstance(value, Tensor) or not value.dim() or len(value) != batch:
        return value
    return value[torch.arange(size) % len(value)]


@dataclass(frozen=True)
class _Case:
    """A batch, and what PyTorch makes of it."""

    model: TorchModel
    loss: TorchLoss
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: tuple[Tensor, ...]
    parameters: Mapping[str, np.ndarray] = field(default_factory=dict)

    def step(self, dtype: torch.dtype, noise: int | None = None) -> _Results:
        """Take a step in a dtype; with noise, from inputs and parameters that are rounded."""
        turned = _Turn(dtype, noise)
        module = self.model.training
        parameters = {
            name: turned(self._value(name, value)).requires_grad_(value.requires_grad)
            for name, value in module.named_parameters()
        }
        buffers = {name: turned(value) for name, value in module.named_buffers()}
        args, kwargs, targets = pytree.tree_map(
            turned, (self.args, dict(self.kwargs), self.targets)
        )
        tensors = {**parameters, **buffers}
        with no_dropout(module) as plain, _wide(dtype), torch.enable_grad():
            output = call_on_copies(plain, tensors, args, kwargs)
            value = self.loss.function(output, *targets)
        value.backward()
        gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        states = {name: tensors[name] for name in buffers}
        return _Results(value.detach().cpu().numpy(), arrays(gradients), arrays(states))

    def _value(self, name: str, value: Tensor) -> Tensor:
        """A parameter's value, which may be another than the model's."""
        given = self.parameters.get(name)
        return value if given is None else torch.from_numpy(given)

    def is_taken(self) -> bool:
        """Whether the model takes the batch: one of a single image is nothing for some."""
        try:
            self.outputs(torch.float32)
        except Exception:  # whatever a model raises
            return False
        return True

    def outputs(self, dtype: torch.dtype, noise: int | None = None) -> dict[str, np.ndarray]:
        """Compute the outputs in evaluation mode, and the loss under no name."""
        turned = _Turn(dtype, noise)
        module = self.model.evaluation
        tensors = {name: turned(value) for name, value in named_tensors(module).items()}
        args, kwargs, targets = pytree.tree_map(
            turned, (self.args, dict(self.kwargs), self.targets)
        )
        with no_dropout(module) as plain, _wide(dtype), torch.no_grad():
            output = call_on_copies(plain, tensors, args, kwargs)
            value = self.loss.function(output, *targets)
        return {_LOSS: value.cpu().numpy(), **arrays(output_names(output, self.model.taken))}


class _Turn:
    """Brings tensors to a dtype, as copies, and rounds them at random where asked to."""

    def __init__(self, dtype: torch.dtype, noise: int | None) -> None:
        self.dtype = dtype
        self.generator = None if noise is None else torch.Generator().manual_seed(noise)

    def __call__(self, value: Any) -> Any:
        """Turn one value; all but float32 tensors are only copied."""
        if not isinstance(value, Tensor):
            return value
        if value.dtype != torch.float32:
            return value.detach().clone()
        value = value.detach().to(self.dtype, copy=True)
        if self.generator is not None:
            value *= 1 + _UNIT * torch.randn(
                value.shape, dtype=value.dtype, generator=self.generator
            )
        return value


@contextmanager
def _wide(dtype: torch.dtype) -> Iterator[None]:
    """Compute in float64 where asked to, tensors that a model or a loss keeps to itself too."""
    if dtype != torch.float64:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _Widening():
            yield
    finally:
        torch.set_default_dtype(before)


class _Widening(FunctionMode):
    def _call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = getattr(function, "__name__", "")
        in_place = name.endswith("_") or name == "__set__"  # of the first argument: no copy of it
        first, others = (args[:1], args[1:]) if in_place else ((), args)
        others, kwargs = pytree.tree_map(_widened, (others, kwargs))
        return function(*first, *others, **kwargs)


def _widened(value: Any) -> Any:
    is_single = isinstance(value, Tensor) and value.dtype == torch.float32
    return value.double() if is_single else value


def _training_differences(
    case: _Case, found: _Results, graphs: TorchGraphs, treated: Collection[str]
) -> Iterator[str]:
    """Say where loss, gradients and running statistics are not those of PyTorch."""
    exact = case.step(torch.float64)
    renamed = {graphs.aliases.get(name, name): value for name, value in exact.gradients.items()}
    if found.gradients.keys() != renamed.keys():
        differing = sorted(found.gradients.keys() ^ renamed.keys())
        raise ExportError(
            f"the gradients of {differing}, which one of PyTorch and the graph has",
            "where PyTorch stops a gradient, its optimizers leave the parameter",
            "Set requires_grad to False on what is not to be trained",
        )

    @functools.cache
    def others() -> list[_Results]:
        """The same with rounded inputs and parameters, and in the model's own dtype."""
        return [case.step(torch.float64, 0), case.step(torch.float64, 1), case.step(torch.float32)]

    yield from _differences(
        "the loss in training mode",
        found.loss,
        exact.loss,
        lambda: [other.loss for other in others()],
    )
    negligible = VANISHING * max(map(norm, exact.gradients.values()), default=0.0)
    for name, value in exact.gradients.items():
        base, most = (
            (TRACT_ROUNDING, MOST_TRACT_ROUNDING) if name in treated else (ROUNDING, MOST_ROUNDING)
        )
        yield from _differences(
            f"the gradient of {name}",
            found.gradients[graphs.aliases.get(name, name)],
            value,
            functools.partial(lambda n: [other.gradients[n] for other in others()], name),
            base,
            most,
            negligible,
        )
    for name in graphs.tensors.kept:
        if name in exact.states:
            yield from _differences(
                f"the buffer {name} after a step",
                found.states[name],
                exact.states[name],
                functools.partial(lambda n: [other.states[n] for other in others()], name),
            )


def _evaluation_differences(
    case: _Case, found: Sequence[Mapping[str, np.ndarray]], names: Sequence[str]
) -> Iterator[str]:
    """Say where the outputs of runs in evaluation mode are not those of PyTorch."""
    exact = case.outputs(torch.float64)

    @functools.cache
    def others() -> list[dict[str, np.ndarray]]:
        dtypes = ((torch.float64, 0), (torch.float64, 1), (torch.float32, None))
        return [case.outputs(dtype, noise) for dtype, noise in dtypes]

    for name, value in (entry for run in found for entry in run.items()):
        if name != names[0] and name not in exact:
            continue  # of an ONNX file: by its own nodes
        key = name if name in exact else _LOSS
        yield from _differences(
            f"the output {name} in evaluation mode",
            value,
            exact[key],
            functools.partial(lambda k: [other[k] for other in others()], key),
        )


def _differences(
    what: str,
    found: np.ndarray,
    expected: np.ndarray,
    rounded: Callable[[], list[np.ndarray]],
    base: float = ROUNDING,
    most: float = MOST_ROUNDING,
    negligible: float = 1e-6,
) -> Iterator[str]:
    """Say how far a value is off from what is right, if it is; NaN may be what is right."""
    error, size = distance(found, expected, "all"), norm(expected)
    if error <= base * size + negligible:
        return
    *moved, single = (distance(other, expected, "all") for other in rounded())
    slack = max(min(_TIMES * max(moved), most * size), _TIMES_SINGLE * single)
    if not error <= base * size + negligible + slack:
        yield f"{what}, which the exported graph has off by {error:.2e} of {size:.2e}"


def _refuse(difference: str | None) -> None:
    if difference is not None:
        raise ExportError(
            difference,
            "the graph does not compute what the PyTorch model computes on the example batch",
            "Report the model; verify=False exports all the same",
        )

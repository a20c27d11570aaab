"""Make sure, on a batch, that a PyTorch model's graphs compute what the model computes.

What they are compared with is PyTorch's own run of the model in float64, and for the two batch
sizes that are looked at no graph is made anew. Dropout is left out on both sides.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tract_fx.errors import ExportError
from tract_fx.export.eager_forward import call_on_copies
from tract_fx.export.graph_runs import run_graph
from tract_fx.export.no_dropout import no_dropout
from tract_fx.export.torch_graphs import TorchGraphs, arrays, evaluation_graph, training_graph
from tract_fx.export.torch_loss import TorchLoss
from tract_fx.export.torch_model import TorchModel
from tract_fx.export.training_session import TrainingSession
from tract_fx.export.verify_tract import verify_tract
from tract_fx.function_mode import FunctionMode
from tract_fx.modules import named_tensors
from tract_fx.reference.distance import distance, norm
from tract_fx.step.names import output_names

Arrays: TypeAlias = Mapping[str, np.ndarray]

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

# Names of what is compared, as a message says them.
_LOSS, _GRADIENT = "the loss in training mode", "the gradient of "
_BUFFER, _OUTPUT = "the buffer {} after a step", "the output {} in evaluation mode"

_TIMES, _TIMES_SINGLE = 8.0, 3.0
_PLACES = 4
_UNIT = 2.0**-24


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
    session = TrainingSession(training)
    treated = {weight for record in graphs.layers for weight in record.weight}
    # Two sizes that no one has traced with, one of them a single image.
    for size in (None,) if model.batch is None else (model.batch + 1, 1):
        resize = functools.partial(_resized, batch=model.batch, size=size)
        args, kwargs = pytree.tree_map_only(Tensor, resize, (model.args, model.kwargs))
        targets = tuple(map(resize, loss.targets.values()))
        case = _Case(model, loss, args, kwargs, targets, graphs.aliases)
        feeds = arrays({name: resize(value) for name, value in batch.items()})
        if size == 1 and not case.is_taken():
            continue
        if size is None or size >= graphs.trace.smallest_batch:
            _verify_training(case, session, feeds, graphs, treated)
        own = str(evaluation.graph.outputs[0].name)
        given = {**graphs.initial, **feeds}
        found = list(run_graph(evaluation, given, (own, *graphs.predictions)).items())
        if size != 1:  # in another session, the outputs alone
            found += run_graph(evaluation, given, graphs.predictions).items()
        _refuse(_evaluation_difference(case, found, own))


def _verify_training(
    case: _Case,
    session: TrainingSession,
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
        own = dataclasses.replace(case, parameters=moved)
        difference = _training_difference(own, *session.run(feeds, moved), graphs, treated)
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


def _resized(value: Tensor, batch: int | None, size: int | None) -> Tensor:
    """Cut what has a batch's size, or repeat its first entries."""
    if size is None or not value.dim() or len(value) != batch:
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
    aliases: Mapping[str, str]
    parameters: Mapping[str, np.ndarray] = field(default_factory=dict)

    def step(self, dtype: torch.dtype, noise: int | None = None) -> Arrays:
        """Take a step in a dtype; with noise, from inputs and parameters that are rounded."""
        module = self.model.training
        _, loss, tensors = self._run(module, dtype, noise, gradients=True)
        loss.backward()
        gradients = {n: tensors[n].grad for n, _ in module.named_parameters()}
        buffers = {_BUFFER.format(n): tensors[n] for n, _ in module.named_buffers()}
        named = {
            f"{_GRADIENT}{self.aliases.get(name, name)}": gradient
            for name, gradient in gradients.items()
            if gradient is not None
        }
        return arrays({_LOSS: loss, **named, **buffers})

    def outputs(self, own: str, dtype: torch.dtype, noise: int | None = None) -> Arrays:
        """Compute the outputs in evaluation mode, and the loss under a name of its own."""
        output, loss, _ = self._run(self.model.evaluation, dtype, noise, gradients=False)
        named = {own: loss, **output_names(output, self.model.taken)}
        return arrays({_OUTPUT.format(name): value for name, value in named.items()})

    def _run(
        self, module: nn.Module, dtype: torch.dtype, noise: int | None, gradients: bool
    ) -> tuple[Any, Tensor, dict[str, Tensor]]:
        """Call the model and the loss, on copies of the tensors."""
        turned = _Turn(dtype, noise)
        tensors = {
            name: turned(self._value(name, value)).requires_grad_(gradients and value.requires_grad)
            for name, value in named_tensors(module).items()
        }
        given = (self.args, dict(self.kwargs), self.targets)
        args, kwargs, targets = pytree.tree_map_only(Tensor, turned, given)
        with no_dropout(module) as plain, _wide(dtype), torch.set_grad_enabled(gradients):
            output = call_on_copies(plain, tensors, args, kwargs)
            return output, self.loss.function(output, *targets), tensors

    def _value(self, name: str, value: Tensor) -> Tensor:
        """A parameter's value, which may be another than the model's."""
        given = self.parameters.get(name)
        return value if given is None else torch.from_numpy(given)

    def is_taken(self) -> bool:
        """Whether the model takes the batch: one of a single image is nothing for some."""
        try:
            self.outputs("", torch.float32)
        except Exception:  # whatever a model raises
            return False
        return True


class _Turn:
    """Brings tensors to a dtype, as copies, and rounds them at random where asked to."""

    def __init__(self, dtype: torch.dtype, noise: int | None) -> None:
        self.dtype = dtype
        self.generator = None if noise is None else torch.Generator().manual_seed(noise)

    def __call__(self, value: Tensor) -> Tensor:
        """Turn one tensor; all but float32 ones are only copied."""
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
        others, kwargs = pytree.tree_map_only(
            Tensor, lambda x: x.double() if x.dtype == torch.float32 else x, (others, kwargs)
        )
        return function(*first, *others, **kwargs)


def _training_difference(
    case: _Case,
    loss: float,
    gradients: Arrays,
    states: Arrays,
    graphs: TorchGraphs,
    treated: Collection[str],
) -> str | None:
    """Say where loss, gradients and running statistics are not those of PyTorch."""
    exact = case.step(torch.float64)
    found = {f"{_GRADIENT}{name}": value for name, value in gradients.items()}
    differing = found.keys() ^ {what for what in exact if what.startswith(_GRADIENT)}
    if differing:
        raise ExportError(
            f"the gradients of {sorted(what.removeprefix(_GRADIENT) for what in differing)}, which "
            "one of PyTorch and the graph has",
            "where PyTorch stops a gradient, its optimizers leave the parameter",
            "Set requires_grad to False on what is not to be trained",
        )
    buffers = {_BUFFER.format(name): name for name in graphs.tensors.kept}
    known = {what: states[name] for what, name in buffers.items() if what in exact}
    values = {_LOSS: np.asarray(loss), **found, **known}
    loose = {f"{_GRADIENT}{name}" for name in treated}
    return _difference(values.items(), exact, case.step, loose)


def _evaluation_difference(
    case: _Case, found: Iterable[tuple[str, np.ndarray]], own: str
) -> str | None:
    """Say where outputs in evaluation mode, and the loss of this name, are not PyTorch's."""
    compute = functools.partial(case.outputs, own)
    values = [(_OUTPUT.format(name), value) for name, value in found]
    return _difference(values, compute(torch.float64), compute)


def _difference(
    found: Iterable[tuple[str, np.ndarray]],
    exact: Arrays,
    compute: Callable[..., Arrays],
    loose: Collection[str] = (),
) -> str | None:
    """Say which value is off from what is right, and how far; NaN may be what is right.

    What PyTorch has no counterpart of, an ONNX file's own nodes have computed.
    """
    gradients = [norm(value) for what, value in exact.items() if what.startswith(_GRADIENT)]
    vanishing = VANISHING * max(gradients, default=0.0)

    @functools.cache
    def others() -> list[Arrays]:
        """The same with rounded inputs and parameters, and in the model's own dtype."""
        return [compute(torch.float64, 0), compute(torch.float64, 1), compute(torch.float32)]

    for what, value in found:
        if what not in exact:
            continue
        is_loose = what in loose
        base, most = (
            (TRACT_ROUNDING, MOST_TRACT_ROUNDING) if is_loose else (ROUNDING, MOST_ROUNDING)
        )
        error, size = distance(value, exact[what], "all"), norm(exact[what])
        bound = base * size + (vanishing if what.startswith(_GRADIENT) else 1e-6)
        if error <= bound:
            continue
        *moved, single = (distance(other[what], exact[what], "all") for other in others())
        slack = max(min(_TIMES * max(moved), most * size), _TIMES_SINGLE * single)
        if not error <= bound + slack:
            return f"{what}, which the exported graph has off by {error:.2e} of {size:.2e}"
    return None


def _refuse(difference: str | None) -> None:
    if difference is not None:
        raise ExportError(
            difference,
            "the graph does not compute what the PyTorch model computes on the example batch",
            "Report the model; verify=False exports all the same",
        )

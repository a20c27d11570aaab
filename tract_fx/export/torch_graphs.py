"""From a PyTorch model to the files of a directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn

from tract_fx import ort_training
from tract_fx.artifacts.directory import (
    CHECKPOINT,
    CONSTANTS,
    EVAL_MODEL,
    MODEL_TENSORS,
    OPTIMIZER_MODEL,
    OPTIMIZER_TENSORS,
    TRAINING_MODEL,
)
from tract_fx.artifacts.loss_scaling import LossScale
from tract_fx.artifacts.manifest import STOCK, Manifest, ParameterSpec, TensorSpec, TractLayer
from tract_fx.artifacts.optimizers import OptimizerConfig, refuse_patterns
from tract_fx.artifacts.tensor_files import write_tensors
from tract_fx.artifacts.versions import versions
from tract_fx.errors import ExportError
from tract_fx.export.file_outputs import append_outputs
from tract_fx.export.graph_runs import run_graph
from tract_fx.export.left_out import warn_of_left_out
from tract_fx.export.optimizer_graph import build_optimizer
from tract_fx.export.torch_loss import TorchLoss
from tract_fx.export.torch_model import TorchModel
from tract_fx.export.updates import update_of
from tract_fx.importer.metadata import strip_exporter_metadata
from tract_fx.modules import named_tensors
from tract_fx.passes.onnx_graph.find import locate
from tract_fx.passes.onnx_graph.parameters import RESET
from tract_fx.passes.onnx_graph.step_names import GRADIENT, NEW
from tract_fx.passes.records import InputLayer
from tract_fx.step.dialects import ORT_TRAINING, STANDARD, Dialect
from tract_fx.step.ort_training import CheckpointTensors, to_evaluation_graph, to_training_graph
from tract_fx.step.stock import to_step_graph
from tract_fx.step.trace import StepTrace, Update, trace_step
from tract_fx.step.write import write_step


@dataclass(frozen=True)
class TorchGraphs:
    """A model's graphs, and what is beside them.

    Attributes:
        target: What they are for.
        training: The training graph.
        evaluation: The evaluation graph.
        trace: What the training graph was made of.
        tensors: The checkpoint's tensors by what becomes of them.
        initial: Their values.
        layers: The calls with TrAct, with λ.
        predictions: Names of the evaluation graph's outputs after the loss.
        aliases: Further state_dict keys of a tensor, with the key under which it is kept.
    """

    target: Target
    training: ir.Model
    evaluation: ir.Model
    trace: StepTrace
    tensors: CheckpointTensors
    initial: Mapping[str, np.ndarray]
    layers: tuple[InputLayer, ...]
    predictions: tuple[str, ...]
    aliases: Mapping[str, str]


@dataclass(frozen=True)
class Target:
    """The runtime that graphs are for.

    Attributes:
        name: Its name in manifests.
        optimizer: The optimizer.
        precision: What large products are computed in, as PyTorch names it.
        loss_scale: How the loss is scaled.
        float64: Whether TrAct goes over to it for input that float32 is too coarse for.
    """

    name: str
    optimizer: OptimizerConfig
    precision: str = "float32"
    loss_scale: LossScale | None = None
    float64: bool = True

    @property
    def is_stock(self) -> bool:
        """Whether it is any ONNX Runtime, and the update a part of the graph."""
        return self.name == STOCK

    @property
    def dialect(self) -> Dialect:
        """What graphs for it are written in."""
        dialect = STANDARD if self.is_stock else ORT_TRAINING
        return dataclasses.replace(dialect, float64=self.float64)

    def update(self, parameters: Mapping[str, Tensor]) -> Update:
        """The update that is a part of the graph."""
        return update_of(self.optimizer, self.loss_scale, parameters)


def training_graph(
    model: TorchModel, loss: TorchLoss, training: nn.Module, target: Target
) -> tuple[ir.Model, StepTrace, CheckpointTensors]:
    """Write a model's step as the target's runtime reads it."""
    update = target.update if target.is_stock else None
    scaled = target.loss_scale is not None
    trace = _traced(model, loss, training, target, update=update, scaled=scaled)
    _refuse_names(trace)
    graph = write_step(trace)
    parameters, buffers = dict(training.named_parameters()), dict(training.named_buffers())
    arrange = to_step_graph if target.is_stock else to_training_graph
    return graph, trace, arrange(graph, trace, parameters, buffers)


def _traced(
    model: TorchModel, loss: TorchLoss, module: nn.Module, target: Target, **options: Any
) -> StepTrace:
    return trace_step(
        module,
        model.args,
        model.kwargs,
        loss.function,
        tuple(loss.targets.values()),
        names=(*model.inputs, *loss.targets),
        open_axes=model.open_axes,
        dialect=target.dialect,
        **options,
    )


def _refuse_names(trace: StepTrace) -> None:
    own = {RESET, *trace.update_inputs}
    if trace.updates:  # which has its results by these names
        changed = (*trace.gradients, *trace.buffers, *trace.update_inputs)
        own |= {f"{name}{suffix}" for name in changed for suffix in (GRADIENT, NEW)}
    given = trace.inputs[: len(trace.inputs) - len(trace.update_inputs)]
    for name in own.intersection(given):
        raise ExportError(
            f"the name {name!r} in the model",
            "the training graph gives it to a value of its own",
            "Rename it",
        )


def build_graphs(model: TorchModel, loss: TorchLoss, target: Target) -> TorchGraphs:
    """Make a model's graphs."""
    training, trace, tensors = training_graph(model, loss, model.training, target)
    refuse_patterns(target.optimizer, tensors.trained)
    state = named_tensors(model.training)
    held = (*tensors.trained, *tensors.kept)
    _refuse_tensors(model.training, {name: state[name] for name in held})
    initial = arrays({name: state[name] for name in held})
    evaluation, evaluated = evaluation_graph(model, loss, model.evaluation, tensors, target)
    if model.file is not None:
        append_outputs(evaluation, model.file)
        strip_exporter_metadata(evaluation)
    made = {str(value.name) for value in evaluation.graph.outputs}
    left_out = {name: why for name, why in evaluated.left_out.items() if name not in made}
    left_out |= _not_runnable(evaluation, {**initial, **arrays({**model.inputs, **loss.targets})})
    warn_of_left_out(left_out)
    unwanted = {*left_out, *model.hidden}
    loss_value, *others = (v for v in evaluation.graph.outputs if v.name not in unwanted)
    if model.file is not None:  # in the file's order
        order = [value.name for value in model.file.graph.outputs]
        others.sort(key=lambda value: order.index(value.name))
    evaluation.graph.outputs[:] = [loss_value, *others]
    passes.RemoveUnusedNodesPass()(evaluation)
    return TorchGraphs(
        target,
        training,
        evaluation,
        trace,
        tensors,
        initial,
        _layers(training, trace, tensors),
        tuple(str(value.name) for value in others),
        _aliases(model.training, held),
    )


def evaluation_graph(
    model: TorchModel,
    loss: TorchLoss,
    evaluation: nn.Module,
    tensors: CheckpointTensors,
    target: Target,
) -> tuple[ir.Model, StepTrace]:
    """Write a model in evaluation mode as the target's runtime reads it."""
    trace = _traced(model, loss, evaluation, target, gradients=False)
    graph = write_step(trace)
    to_evaluation_graph(graph, trace, tensors, named_tensors(evaluation))
    return graph, trace


def arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Read tensors as arrays."""
    return {name: value.detach().cpu().numpy().copy() for name, value in tensors.items()}


def _refuse_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    kept = model.state_dict()
    for name, value in tensors.items():
        if value.dtype != torch.float32:
            raise ExportError(
                f"{name} of {value.dtype}",
                "ONNX Runtime Training keeps parameters in float32",
                "Use model.float()",
            )
        if name not in kept:
            raise ExportError(
                f"the buffers {[name]}, which the forward pass changes and no state_dict holds",
                "what is trained goes back into the model by its state_dict",
                "Register it with persistent=True",
            )


def _not_runnable(evaluation: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Why ONNX Runtime can't compute outputs that the loss does not read, by name."""
    loss, *others = (str(value.name) for value in evaluation.graph.outputs)

    def reason(*names: str) -> str:
        try:
            run_graph(evaluation, feeds, names)
        except ExportError as error:
            return error.found
        return ""

    if not reason(loss, *others):
        return {}
    run_graph(evaluation, feeds, [loss])  # whose own fault is no output's
    return {name: why for name in others if (why := reason(name))}


def _layers(
    training: ir.Model, trace: StepTrace, tensors: CheckpointTensors
) -> tuple[InputLayer, ...]:
    """The records of TrAct's calls, as locating finds them in the graph."""
    located = locate(training, tensors.trained, tensors.kept, trace.lambdas)
    records = {record.node: record for record, _ in located.eligible}
    missing = trace.lambdas.keys() - records.keys()
    if missing:
        raise ExportError(
            f"TrAct's calls {sorted(missing)} of the exported graph",
            "they are not among the layers that the ONNX pass can treat",
            "Report the model; meanwhile train it in PyTorch",
        )
    return tuple(
        dataclasses.replace(records[name], lambda_=lambda_)
        for name, lambda_ in trace.lambdas.items()
    )


def _aliases(model: nn.Module, held: Sequence[str]) -> dict[str, str]:
    """Further names of tensors that a checkpoint holds under their first one."""
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {id(state[name]): name for name in held}
    return {
        name: first[id(tensor)]
        for name, tensor in state.items()
        if first.get(id(tensor), name) != name
    }


def write_graphs(graphs: TorchGraphs, model: TorchModel, directory: Path) -> None:
    """Write both graphs, the checkpoint and what training leaves alone."""
    state = model.training.state_dict()
    known = {*graphs.initial, *graphs.aliases, *graphs.tensors.counters}
    constants = {n: v.detach().cpu().clone() for n, v in state.items() if n not in known}
    if constants:
        torch.save(constants, directory / CONSTANTS)
    ir.save(graphs.training, directory / TRAINING_MODEL)
    ir.save(graphs.evaluation, directory / EVAL_MODEL)
    if graphs.target.is_stock:
        whole = {name: value.detach().cpu().numpy() for name, value in state.items()}
        write_tensors(whole, directory / MODEL_TENSORS)
        initial = {n: torch.from_numpy(graphs.initial[n]) for n in graphs.trace.gradients}
        inputs = graphs.target.update(initial).inputs
        states = {
            name: value.numpy() for name, value in inputs.items() if name in graphs.trace.updates
        }
        write_tensors(states, directory / OPTIMIZER_TENSORS)
        return
    trained, kept = (
        [ir.to_proto(ir.tensor(graphs.initial[name], name=name)) for name in names]
        for names in (graphs.tensors.trained, graphs.tensors.kept)
    )
    ort_training.save_checkpoint(trained, kept, directory / CHECKPOINT)
    count = len(graphs.tensors.trained)
    ir.save(build_optimizer(graphs.target.optimizer, count), directory / OPTIMIZER_MODEL)


def describe_graphs(
    graphs: TorchGraphs, model: TorchModel, loss: TorchLoss, seed: int, checks: Sequence[str]
) -> Manifest:
    """Write the manifest of a new directory."""
    values = {str(value.name): value for value in graphs.training.graph.inputs}
    state = model.training.state_dict()
    return Manifest(
        target=graphs.target.name,
        versions=versions(),
        layers=tuple(_layer(record) for record in graphs.layers),
        loss=loss.description,
        optimizer=graphs.target.optimizer,
        precision=graphs.target.precision,
        loss_scale=graphs.target.loss_scale,
        inputs=tuple(_spec(values[name], {}) for name in model.inputs),
        targets=tuple(_spec(values[name], loss.classes) for name in loss.targets),
        outputs=graphs.predictions,
        parameters=tuple(
            ParameterSpec(name, value.shape, str(value.dtype), name in graphs.tensors.trained)
            for name, value in graphs.initial.items()
        ),
        min_batch=graphs.trace.smallest_batch,
        counters={name: int(state[name]) for name in graphs.tensors.counters},
        counter_steps={n: k for n, k in graphs.tensors.counters.items() if k != 1},
        aliases=dict(graphs.aliases),
        checks=tuple(checks),
        seed=seed,
    )


def _layer(record: InputLayer) -> TractLayer:
    entries = dataclasses.asdict(record)
    return TractLayer(
        **{field.name: entries[field.name] for field in dataclasses.fields(TractLayer)}
    )


def _spec(value: ir.Value, classes: Mapping[str, tuple[int, int | None]]) -> TensorSpec:
    assert value.shape is not None and value.dtype is not None
    sizes = tuple(size if isinstance(size, int) else size.value for size in value.shape)
    count, ignored = classes.get(str(value.name), (None, None))
    return TensorSpec(str(value.name), str(value.dtype.numpy()), sizes, count, ignored)

"""From a PyTorch model to forward graphs, in training and in evaluation mode."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from tract_fx.errors import ExportError, TractWarning
from tract_fx.export.batch_dimension import BATCH
from tract_fx.export.eager_forward import changed_buffers
from tract_fx.export.layer_decompositions import exact_layers
from tract_fx.export.loss_decompositions import exact_losses
from tract_fx.export.loss_program import refuse_stopped_gradients
from tract_fx.export.lost_in_graphs import (
    refuse_bounded_batch,
    refuse_embedding_options,
    refuse_gradient_hooks,
    refuse_shared_memory,
)
from tract_fx.export.onnx_program import to_onnx
from tract_fx.export.quiet import quiet
from tract_fx.export.records import ForwardGraphs
from tract_fx.export.value_names import name_outputs
from tract_fx.modules import copy_tree
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.find import locate
from tract_fx.passes.onnx_graph.markers import take_markers
from tract_fx.passes.onnx_graph.repairs import (
    evaluation_mode,
    identity_permutations,
    unread_operands,
)
from tract_fx.passes.onnx_graph.repairs.evaluation import RANDOM
from tract_fx.program import capture

__all__ = ["TorchForward", "export_forward"]


@dataclasses.dataclass(frozen=True)
class TorchForward:
    """A PyTorch model's forward graphs, and the program they were made from.

    Attributes:
        graphs: The graphs.
        program: The model in training mode, as exported.
        training: The model in training mode, a copy that shares its tensors.
        evaluation: The same in evaluation mode, None where the model has but one.
        args: Positional arguments of the example call; a batch of one is doubled.
        kwargs: Keyword arguments of the example call.
    """

    graphs: ForwardGraphs
    program: ExportedProgram
    training: nn.Module
    evaluation: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def feeds(self) -> dict[str, np.ndarray]:
        """The example inputs by the graphs' names for them."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        names = self.program.graph_signature.user_inputs
        return {
            str(name): value.detach().cpu().numpy()
            for name, value in zip(names, leaves, strict=True)
            if isinstance(value, torch.Tensor)
        }


def export_forward(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    dynamic_batch: bool,
) -> TorchForward:
    """Export a model's forward pass to ONNX, once in training and once in evaluation mode.

    A model in training mode is taken as it is, with those of its modules that are in evaluation
    mode, a frozen BatchNorm for one; a model in evaluation mode is put in training mode as a whole.

    Args:
        model: A model, rewritten or plain. Not changed.
        args: Positional arguments of a call.
        kwargs: Keyword arguments of a call.
        dynamic_batch: Whether the first dimension of the inputs is left open.

    Returns:
        The graphs, with TrAct's calls and λs read off the model.

    Raises:
        ExportError: The model can't be exported with its meaning kept.
    """
    args, kwargs = _two_images(args, kwargs) if dynamic_batch else (args, kwargs)
    refuse_gradient_hooks(model)
    refuse_shared_memory(model)
    _refuse_cumulative_average(model)
    training, evaluation = _modes(model)
    changed = changed_buffers(training, args, kwargs)
    program = _capture(training, args, kwargs, dynamic_batch)
    outputs = _output_names(program)
    refuse_stopped_gradients(program)
    train = _graph(program, outputs)
    if evaluation is None:
        evaluated = train.clone()
        take_markers(evaluated)
        evaluation_mode(evaluated)
    else:
        plain = _capture(evaluation, args, kwargs, dynamic_batch)
        if _output_names(plain) != outputs:
            raise ExportError(
                f"a model that returns {outputs} in training and {_output_names(plain)} in "
                "evaluation",
                "one loss has to apply to both",
                "Make it return the same in both modes",
            )
        evaluated = _graph(plain, outputs)
        take_markers(evaluated)
    lambdas = take_markers(train)
    tensors = _Tensors.of(model, program, train, evaluated, changed)
    located = locate(train, tensors.trainable, tensors.frozen)
    layers = tuple(
        dataclasses.replace(record, lambda_=lambdas[record.node])
        for record, _ in located.eligible
        if record.node in lambdas
    )
    missing = lambdas.keys() - {record.node for record in layers}
    if missing:
        raise ExportError(
            f"TrAct's calls {sorted(missing)} of the exported graph",
            "they are not among the layers that the ONNX pass can treat",
            "Report the model; meanwhile train it in PyTorch",
        )
    structure = pytree.tree_unflatten(list(outputs), program.call_spec.out_spec)
    graphs = ForwardGraphs(
        train, evaluated, layers, structure=structure, **dataclasses.asdict(tensors)
    )
    return TorchForward(graphs, program, training, evaluation, args, kwargs)


def _modes(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """The model in training and in evaluation mode; None where only one can be had."""
    training = copy_tree(model)
    try:
        if not training.training:
            _warn_of_evaluation_mode(model)
            training.train()
        evaluation = copy_tree(model).eval()
    except NotImplementedError:  # an exported program's module has its mode in its graph
        return copy_tree(model), None
    return training, evaluation


def _warn_of_evaluation_mode(model: nn.Module) -> None:
    warnings.warn(
        f"{type(model).__name__} is in evaluation mode: it is exported in training mode, all of "
        "it. Call model.train() first, and .eval() on what is to stay frozen.",
        TractWarning,
        stacklevel=2,
    )


def _capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_batch: bool
) -> ExportedProgram:
    shapes = _batch_shapes(model, args, kwargs) if dynamic_batch else None
    try:
        program = capture(model, args, kwargs, shapes)
    except Exception as error:
        open_batch = "; with dynamic_batch=False it is exported for this batch size alone"
        raise ExportError(
            f"torch.export failed on {type(model).__name__} ({type(error).__name__}: {error})",
            "without a graph there is nothing to train elsewhere",
            "Make the model exportable with torch.export" + (open_batch if dynamic_batch else ""),
        ) from error
    if dynamic_batch:
        refuse_bounded_batch(program)
    refuse_embedding_options(program)
    return program


def _batch_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
    sized = [tensor for tensor in tensors if tensor.dim()]
    shapes = ShapesCollection()
    for tensor in sized:
        if len(tensor) == len(sized[0]):
            shapes[tensor] = {0: Dim.DYNAMIC}
    return shapes.dynamic_shapes(model, args, kwargs)


def _two_images(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Double a batch of one, which torch.export would take for a batch that is always one."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    sized = [v for v in leaves if isinstance(v, torch.Tensor) and v.dim()]
    if not sized or len(sized[0]) != 1:
        return args, kwargs
    doubled = [
        torch.cat([v, v]) if isinstance(v, torch.Tensor) and v.dim() and len(v) == 1 else v
        for v in leaves
    ]
    return pytree.tree_unflatten(doubled, spec)  # type: ignore[no-any-return]


def _output_names(program: ExportedProgram) -> tuple[str, ...]:
    """Names for a model's outputs, from their places in what it returns."""
    spec = program.call_spec.out_spec
    assert spec is not None
    places = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = [path for path, _ in pytree.tree_flatten_with_path(places)[0]]
    names = ["_".join(str(_key(entry)) for entry in path) or "output" for path in paths]
    taken = {*program.state_dict, *program.constants, *program.graph_signature.user_inputs}
    return tuple(f"output_{name}" if name.isdigit() or name in taken else name for name in names)


def _key(entry: Any) -> object:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return entry


def _graph(program: ExportedProgram, outputs: tuple[str, ...]) -> ir.Model:
    """Translate a program, with named outputs and one name for the batch."""
    with quiet():
        exact = exact_losses(exact_layers(program))
    model = to_onnx(exact)
    identity_permutations(model)
    unread_operands(model)
    _refuse_random(model)
    _name_batch(model)
    kept = [v for v in program.graph_signature.user_outputs if v is not None]
    if len(model.graph.outputs) != len(outputs) or len(kept) != len(outputs):
        raise ExportError(
            f"a model that returns {len(outputs)} values, {len(model.graph.outputs)} of them "
            "tensors",
            "outputs that are not tensors have no place in a graph",
            "Make it return tensors alone, for a Hugging Face model by return_dict=True",
        )
    name_outputs(model, outputs)
    return model


def _refuse_random(model: ir.Model) -> None:
    """Refuse random operators but Dropout: their state can't be set, saved or switched off."""
    for node in model.graph:
        if is_standard(node, *RANDOM):
            raise ExportError(
                f"{node.op_type} (node {node.name!r})",
                "its random state can't be saved, nor its result be verified",
                "Express it by dropout: stochastic depth is x * dropout(ones(N, 1, 1, 1), p), or "
                "switch it off",
            )


def _name_batch(model: ir.Model) -> None:
    """Call the open first dimension of the inputs "batch"."""
    firsts = [value.shape[0] for value in model.graph.inputs if value.shape]
    symbol = next((size for size in firsts if isinstance(size, ir.SymbolicDim)), None)
    if symbol is None:
        return
    values = [v for node in model.graph for v in node.outputs]
    for value in (*model.graph.inputs, *values):
        if value.shape is not None:
            value.shape = ir.Shape([BATCH if size == symbol else size for size in value.shape])


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """The state_dict's keys, by what becomes of them."""

    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    counters: tuple[str, ...]
    constants: tuple[str, ...]
    aliases: dict[str, str]
    unused: tuple[str, ...]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        program: ExportedProgram,
        train: ir.Model,
        evaluation: ir.Model,
        changed: Mapping[str, tuple[Tensor, Tensor]],
    ) -> _Tensors:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        state = model.state_dict(keep_vars=True)
        present = {**train.graph.initializers, **evaluation.graph.initializers}
        first: dict[int, str] = {}
        for name, tensor in state.items():
            if name in present:
                first.setdefault(id(tensor), name)
        aliases = {
            name: first[id(tensor)]
            for name, tensor in state.items()
            if first.get(id(tensor), name) != name
        }
        statistics, counters = _mutated(program, train, changed)
        held = list(first.values())
        trainable = [n for n in held if n in parameters and parameters[n].requires_grad]
        trainable = [n for n in trainable if n in train.graph.initializers]
        frozen = [n for n in held if n in statistics or (n in parameters and n not in trainable)]
        for name in (*trainable, *frozen):
            if state[name].dtype != torch.float32:
                raise ExportError(
                    f"{name} of {state[name].dtype}",
                    "ONNX Runtime Training keeps parameters in float32",
                    "Use model.float()",
                )
        constants = [n for n in held if n not in trainable and n not in frozen]
        known = {*trainable, *frozen, *counters, *constants, *aliases}
        unused = [n for n in state if n not in known]
        return cls(
            tuple(trainable),
            tuple(frozen),
            tuple(counters),
            tuple(constants),
            aliases,
            tuple(unused),
        )


def _mutated(
    program: ExportedProgram, train: ir.Model, changed: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[set[str], list[str]]:
    """Buffers that a forward pass changes: running statistics, and BatchNorm's counters."""
    statistics = [
        value
        for node in train.graph
        if is_standard(node, "BatchNormalization")
        and node.attributes.get_int("training_mode", 0) == 1
        for value in node.inputs[3:5]
        if value is not None and value.name
    ]
    updated = [str(value.name) for value in statistics]
    with quiet():
        traced = program.run_decompositions({}).graph_signature.buffers_to_mutate.values()
    counters = [name for name in changed if name.endswith("num_batches_tracked")]
    others = sorted({*changed, *traced} - {*updated, *counters})
    if others:
        raise ExportError(
            f"the buffers {others}, which the forward pass changes",
            "an ONNX graph keeps no state but BatchNorm's running statistics",
            "Move the update out of forward(), or register the module in evaluation mode",
        )
    # A second call's statistics are what the first one computes.
    if len(set(updated)) < len(updated) or not all(v.is_initializer() for v in statistics):
        raise ExportError(
            "the running statistics of a BatchNorm that is called several times",
            "a graph does not keep the order in which the calls update them",
            "Give each call a BatchNorm of its own, or put that one in evaluation mode",
        )
    return set(updated), counters


def _refuse_cumulative_average(model: nn.Module) -> None:
    for name, module in model.named_modules():
        averaged = getattr(module, "track_running_stats", False) and module.training
        if averaged and getattr(module, "momentum", 0.1) is None:
            raise ExportError(
                f"{name} ({type(module).__name__} with momentum=None)",
                "its running statistics are cumulative averages, which ONNX does not have",
                "Give it a momentum, 0.1 for example",
            )

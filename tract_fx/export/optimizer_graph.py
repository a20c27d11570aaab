"""The graph of one optimizer update, as `onnxruntime.training.api.Optimizer` reads it.

ONNX Runtime recognises an optimizer by exactly one node of the main graph, `AdamWOptimizer` or
`SGDOptimizerV2`, feeds sequences of all trainable parameters, of their gradients and of the moments
that it keeps for that node, and lets the node change them in place. Every update is built on one of
the two, so that the state lies in ONNX Runtime's own checkpoints:

- AdamW: `AdamWOptimizer` in the mode that follows torch.
- SGD: `SGDOptimizerV2`.
- SGD with momentum μ: `AdamWOptimizer` with alpha = μ, beta = 1 and epsilon = 1 - μ. Its second
  moment stays 0, its first one m is (1 - μ) · buf, so that `p -= lr · m / (√0 + 1 - μ)` is
  `p -= lr · buf`.
- Nesterov's step, `p -= lr · (g + μ · buf)`: the same with epsilon = (1 - μ) / μ for the term in
  buf, and for the term in g an `SGDOptimizerV2` inside an `If`, where it is not counted.

What comes before the update: the mean over micro-batches, clipping, weight decay, dampening. A
gradient that is not finite makes its parameter NaN or infinite, as in torch, and its moments too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from tract_fx.artifacts.optimizers import SGD, AdamW, OptimizerConfig
from tract_fx.errors import UnsupportedTrainingError
from tract_fx.passes.onnx_graph.calls import MICROSOFT
from tract_fx.passes.onnx_graph.nodes import Nodes

_Attribute: TypeAlias = float | ir.Graph

_IR_VERSION = 10
# ONNX Runtime 1.19.2 has no CUDA kernel for the Equal of opset 19.
_OPSETS = {"": 18, MICROSOFT: 1}
# Up to here 1 - beta, as the kernel computes it in float32, is right to 3e-4.
_LARGEST_BETA = 0.9999


def build_optimizer(config: OptimizerConfig, parameters: int) -> ir.Model:
    """Build the optimizer model of a training directory, for so many parameters in float32.

    The learning rate is the graph's input: ONNX Runtime starts at 1e-3 whatever the graph says, so
    set `config.lr` through `Optimizer.set_learning_rate`, again after a checkpoint is loaded.
    With `max_grad_norm` and without accumulation, the gradients themselves are clipped in place.
    """
    if parameters < 1:
        raise UnsupportedTrainingError(
            f"An optimizer of {parameters} parameters",
            "ONNX Runtime's optimizer needs one at least",
            "Let a parameter require a gradient",
        )
    if config.weight_decays:
        raise UnsupportedTrainingError(
            f"{type(config).__name__} with weight_decays",
            "ONNX Runtime Training gives its optimizer the parameters without their names, in an "
            "order that differs from process to process",
            "Use target='onnxruntime', or one weight_decay for all parameters",
        )
    attributes = _adamw_of(config)
    graph = _UpdateGraph(moments=2 if attributes else 1)
    gradients = _prepare(graph, config, parameters)
    updated = graph.adamw(gradients, **attributes) if attributes else graph.sgd(gradients)
    if attributes and isinstance(config, SGD) and config.nesterov:
        updated = graph.after(updated, gradients)
    return graph.finish(updated)


def _adamw_of(config: OptimizerConfig) -> dict[str, float]:
    """The settings of the AdamWOptimizer that makes an update; none for an SGDOptimizerV2."""
    if isinstance(config, AdamW):
        _check_adamw(config)
        means = {"alpha": config.betas[0], "beta": config.betas[1], "epsilon": config.eps}
        return {**means, "weight_decay": config.weight_decay, "adam_mode": 0, "correct_bias": 1}
    momentum = _check_sgd(config)
    if momentum == 0:
        return {}
    rest = float(np.float32(1) - np.float32(momentum))  # as the kernel computes it
    epsilon = rest / momentum if config.nesterov else rest
    means = {"alpha": momentum, "beta": 1.0, "epsilon": epsilon}
    # The mode is the one that allows the last setting.
    return {**means, "weight_decay": 0.0, "adam_mode": 1, "correct_bias": 0}


def _check_adamw(config: AdamW) -> None:
    for beta in config.betas:
        if beta > _LARGEST_BETA:
            raise UnsupportedTrainingError(
                f"AdamW(betas={config.betas})",
                f"ONNX Runtime computes 1 - beta in float32, too coarse above {_LARGEST_BETA}",
                f"Use betas of at most {_LARGEST_BETA}",
            )


def _check_sgd(config: SGD) -> float:
    """Returns the momentum in float32, 0 where it is too small to matter."""
    momentum = np.float32(config.momentum)
    if momentum >= 1:
        raise UnsupportedTrainingError(
            f"SGD(momentum={config.momentum})",
            "The graph keeps 1 - momentum times torch's buffer, which must be above 0",
            "Use a momentum below 1",
        )
    return float(momentum) if momentum >= np.finfo(np.float32).tiny else 0.0


def _prepare(graph: _UpdateGraph, config: OptimizerConfig, parameters: int) -> ir.Value:
    """Bring the gradient sums to what torch's update starts from."""
    gradients = graph.gradients
    if config.accumulate > 1:
        count = graph.constant("micro_batches", np.float32(config.accumulate))
        gradients = graph.map(
            gradients, parameters, "mean", lambda gradient, _: graph.op("Div", gradient, count)
        )
    if config.max_grad_norm is not None:
        gradients = graph.op(
            "InplaceClipGradNorm", gradients, domain=MICROSOFT, max_norm=config.max_grad_norm
        )
    if isinstance(config, AdamW):
        return gradients
    if config.weight_decay > 0:
        decay = graph.constant("weight_decay", np.float32(config.weight_decay))

        def add_decay(gradient: ir.Value, index: ir.Value) -> ir.Value:
            parameter = graph.op("SequenceAt", graph.parameters, index)
            return graph.op("Add", gradient, graph.op("Mul", parameter, decay))

        gradients = graph.map(gradients, parameters, "weight_decay", add_decay)
    if config.dampening != 0 and config.momentum > 0:
        share = graph.first_step_else(1 - config.dampening)
        gradients = graph.map(
            gradients,
            parameters,
            "dampening",
            lambda gradient, _: graph.op("Mul", gradient, share),
        )
    return gradients


class _UpdateGraph(Nodes):
    """A graph under construction, with the inputs that ONNX Runtime feeds.

    It keeps 2 moments for AdamWOptimizer, 1 for SGDOptimizerV2.
    """

    def __init__(self, moments: int) -> None:
        super().__init__("optimizer")
        self.learning_rate = ir.Value(
            name="learning_rate", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT)
        )
        self.step = ir.Value(
            name="step", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64)
        )
        self.parameters = _sequence("params")
        self.gradients = _sequence("gradients")
        names = ("first_order_moments", "second_order_moments")
        self.moments = [_sequence(name) for name in names[:moments]]
        self._constants: dict[str, ir.Value] = {}

    def constant(self, name: str, value: np.generic | np.ndarray) -> ir.Value:
        """Returns the initializer of this name, which is the same at every call."""
        if name not in self._constants:
            tensor = ir.tensor(np.asarray(value), name=name)
            self._constants[name] = ir.val(name, const_value=tensor)
        return self._constants[name]

    def map(
        self,
        sequence: ir.Value,
        length: int,
        what: str,
        change: Callable[[ir.Value, ir.Value], ir.Value],
    ) -> ir.Value:
        """Change each element, given with its index, into an element of a new sequence."""
        self.prefix = f"optimizer/{what}"
        changed = []
        for position in range(length):
            index = self.constant(f"index_{position}", np.int64(position))
            changed.append(change(self.op("SequenceAt", sequence, index), index))
        result = self.op("SequenceConstruct", *changed)
        self.prefix = "optimizer"
        return result

    def first_step_else(self, value: float) -> ir.Value:
        """Returns a scalar: 1 in the first update, `value` in later ones."""
        axis = self.constant("first_axis", np.array([0], np.int64))
        step = self.op("Squeeze", self.step, axis)
        is_first = self.op("Equal", step, self.constant("one", np.int64(1)))
        first, later = np.float32(1), np.float32(value)
        return self.op(
            "Where", is_first, self.constant("first", first), self.constant("later", later)
        )

    def sgd(self, gradients: ir.Value) -> ir.Value:
        inputs = (self.learning_rate, self.parameters, gradients)
        return self._flag("SGDOptimizerV2", *inputs, domain=MICROSOFT)

    def adamw(self, gradients: ir.Value, **attributes: _Attribute) -> ir.Value:
        inputs = (self.learning_rate, self.step, self.parameters, gradients, *self.moments)
        return self._flag("AdamWOptimizer", *inputs, domain=MICROSOFT, **attributes)

    def _flag(
        self, op: str, *inputs: ir.Value, domain: str = "", **attributes: _Attribute
    ) -> ir.Value:
        """Add a node whose first output says whether an update was made."""
        flag = self.op(op, *inputs, domain=domain, like=None, **attributes)
        flag.type = ir.TensorType(ir.DataType.BOOL)
        return flag

    def after(self, updated: ir.Value, gradients: ir.Value) -> ir.Value:
        """Add an SGD update that runs once the other one has run."""
        shape = self.constant("flag_shape", np.array([1], np.int64))
        branches: dict[str, ir.Graph] = {}
        for branch, flag in (("then_branch", None), ("else_branch", updated)):
            main, self.nodes = self.nodes, []
            self.prefix = f"optimizer/{branch}"
            # The flag's shape is (1,), which ONNX Runtime's inference takes for ().
            done = self._flag("Reshape", self.sgd(gradients) if flag is None else flag, shape)
            done.shape = ir.Shape([1])
            branches[branch] = ir.Graph([], [done], nodes=self.nodes, name=branch)
            self.prefix, self.nodes = "optimizer", main
        return self._flag("If", updated, domain="", **branches)

    def finish(self, updated: ir.Value) -> ir.Model:
        """Make the model, with the flag that the update was made as its output."""
        updated.shape = ir.Shape([1])
        graph = ir.Graph(
            [self.learning_rate, self.step, self.parameters, self.gradients, *self.moments],
            [updated],
            nodes=self.nodes,
            initializers=list(self._constants.values()),
            opset_imports=dict(_OPSETS),
            name="optimizer",
        )
        return ir.Model(graph, ir_version=_IR_VERSION, producer_name="tract_fx")


def _sequence(name: str) -> ir.Value:
    return ir.Value(name=name, type=ir.SequenceType(ir.TensorType(ir.DataType.FLOAT)))

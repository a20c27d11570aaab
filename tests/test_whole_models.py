"""Whole vision models, one training step each: the plain model against the treated one.

Dropout and BatchNorm are active, both arms start from the same random state, and the images are
photographs. Only the first layer's weight gradient may differ, and there it must be TrAct's
definition in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode

from nets import CLASSES, NETS, SIZE, STEMS
from nets.huggingface import FAMILIES
from oracle import Spec, relative_error, tract_gradient
from photographs import photographs
from tract_fx import tract_module, tract_pass

# Positional arguments, or keyword arguments.
Example: TypeAlias = tuple[Tensor, ...] | dict[str, Tensor]

LAMBDA = 0.1
BATCH = 4
SEED = 11

# Float64: rounding, amplified by the damped Gram's condition number; 1e-14 is usual.
# Float32: with an exact preconditioner, the model's own rounded weight gradient already leaves 1e-5
# here, for TrAct amplifies what it has along the Gram's small directions; a Gram summed in float32
# may add ten times that.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-4}
DTYPES = sorted(TOLERANCES, key=str)


@dataclass
class FirstCall:
    """What went into the call that multiplies with ``weight``, and what came back."""

    inputs: list[Tensor] = field(default_factory=list)
    output_gradients: list[Tensor] = field(default_factory=list)


class Watch(TorchFunctionMode):
    """Writes down every call that takes ``weight`` itself as its second argument; changes nothing.

    Eager modules, traced graphs and exported graphs (which have no module to hook) all pass here.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.call = FirstCall()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if len(args) > 1 and args[1] is self.weight:
            self.call.inputs.append(args[0].detach().clone())
            result.register_hook(
                lambda gradient: self.call.output_gradients.append(gradient.clone())
            )
        return result


@dataclass(frozen=True)
class Step:
    """All that one forward and backward pass leaves behind."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    input_gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    random_state: Tensor


@dataclass(frozen=True)
class Arms:
    """One step of the plain model and one of the treated model, from the same state."""

    layer: nn.Module
    weight: str
    call: FirstCall
    plain: Step
    tract: Step

    def expected(self) -> Any:
        """TrAct's gradient of the first layer's weight, in float64."""
        return tract_gradient(
            Spec.of(self.layer), self.call.inputs[0], self.call.output_gradients[0], LAMBDA
        )


def class_loss(output: Mapping[str, Tensor]) -> Tensor:
    logits = output["logits"]
    return cross_entropy(logits, torch.arange(len(logits)) % CLASSES)


def step(
    model: nn.Module,
    example: Example,
    loss: Callable[[Mapping[str, Tensor]], Tensor],
) -> Step:
    """One step of ``model``; the input takes a gradient in float32 only."""
    named = example if isinstance(example, dict) else {str(i): x for i, x in enumerate(example)}
    inputs = {name: x.clone().requires_grad_(x.dtype == torch.float32) for name, x in named.items()}
    torch.manual_seed(SEED)
    output = model(**inputs) if isinstance(example, dict) else model(*inputs.values())
    outputs = {"logits": output} if isinstance(output, Tensor) else dict(output.items())
    loss(outputs).backward()
    return Step(
        outputs={name: value.detach() for name, value in outputs.items()},
        gradients={name: parameter.grad for name, parameter in model.named_parameters()},
        input_gradients={name: x.grad for name, x in inputs.items()},
        buffers={name: buffer.clone() for name, buffer in model.named_buffers()},
        random_state=torch.get_rng_state(),
    )


def both_arms(
    plain: nn.Module,
    tract: nn.Module,
    layer: nn.Module,
    stem: str,
    example: Example,
    loss: Callable[[Mapping[str, Tensor]], Tensor],
) -> Arms:
    weight = f"{stem}.weight"
    with Watch(plain.get_parameter(weight)) as watch:
        plain_step = step(plain, example, loss)
    assert len(watch.call.inputs) == len(watch.call.output_gradients) == 1
    return Arms(layer, weight, watch.call, plain_step, step(tract, example, loss))


def traced_arms(name: str, dtype: torch.dtype) -> Arms:
    net, x = small_net(name, dtype)
    tract = tract_pass(torch.fx.symbolic_trace(copy.deepcopy(net)), lambda_=LAMBDA)
    return both_arms(net, tract, net.get_submodule(STEMS[name]), STEMS[name], (x,), class_loss)


def exported_arms(name: str, dtype: torch.dtype) -> Arms:
    net, x = small_net(name, dtype)
    plain = torch.export.export(net, (x,), strict=False).module()
    tract = tract_pass(copy.deepcopy(plain), lambda_=LAMBDA)
    layer = net.get_submodule(STEMS[name])
    return both_arms(plain, tract, layer, STEMS[name], (x,), class_loss)


def eager_arms(name: str, dtype: torch.dtype) -> Arms:
    (family,) = (family for family in FAMILIES if family.name == name)
    plain, example = family.model(dtype), family.example(dtype, BATCH)
    tract = tract_module(copy.deepcopy(plain), example, lambda_=LAMBDA)
    layer = plain.get_submodule(family.stem)
    return both_arms(plain, tract, layer, family.stem, example, family.loss)


def small_net(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        net = NETS[name]().train().to(dtype)
    return net, photographs(BATCH, size=SIZE).to(dtype)


CASES = [
    pytest.param(route, name, dtype, id=f"{route_name}-{name}-{str(dtype).removeprefix('torch.')}")
    for route_name, route, names in (
        ("symbolic_trace", traced_arms, list(NETS)),
        ("export", exported_arms, list(NETS)),
        ("tract_module", eager_arms, [family.name for family in FAMILIES]),
    )
    for name in names
    for dtype in DTYPES
]


@pytest.mark.parametrize(("arms_of", "name", "dtype"), CASES)
def test_only_the_first_weight_gradient_changes(
    arms_of: Callable[[str, torch.dtype], Arms], name: str, dtype: torch.dtype
) -> None:
    arms = arms_of(name, dtype)
    plain, tract = arms.plain, arms.tract

    expected = arms.expected()
    plain_gradient, gradient = plain.gradients[arms.weight], tract.gradients[arms.weight]
    assert plain_gradient is not None and gradient is not None
    assert relative_error(gradient, expected) < TOLERANCES[dtype]
    # Else the line above would hold with the transform lost.
    assert relative_error(plain_gradient, expected) > 0.01

    same("output", tract.outputs, plain.outputs)
    same("buffer", tract.buffers, plain.buffers)
    same("input gradient", tract.input_gradients, plain.input_gradients)
    same(
        "gradient",
        {key: value for key, value in tract.gradients.items() if key != arms.weight},
        {key: value for key, value in plain.gradients.items() if key != arms.weight},
    )
    assert torch.equal(tract.random_state, plain.random_state)


def same(
    what: str, actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]
) -> None:
    """The same names, and the same bits under each."""
    assert set(actual) == set(expected), what  # symbolic_trace changes the order
    for name, value in expected.items():
        other = actual[name]
        if value is None or other is None:
            assert value is other, f"{what}: {name}"
        else:
            assert torch.equal(other, value), f"{what}: {name}"


def test_models_have_what_the_steps_are_to_show() -> None:
    """Dropout that draws, BatchNorm that updates: else 'unchanged' says little."""
    drawing, updating = set(), set()
    for name in NETS:
        net, x = small_net(name, torch.float32)
        before = {key: buffer.clone() for key, buffer in net.named_buffers()}
        result = step(net, (x,), class_loss)
        torch.manual_seed(SEED)
        if not torch.equal(torch.get_rng_state(), result.random_state):
            drawing.add(name)
        if any(not torch.equal(result.buffers[key], value) for key, value in before.items()):
            updating.add(name)
    assert drawing == set(NETS)
    assert updating == {"resnet", "resnet-cifar"}

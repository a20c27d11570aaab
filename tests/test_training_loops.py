"""What training code does around a model: checkpointing, accumulation, siamese use, layouts."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from oracle import relative_error, tract_gradient
from rewritten import (
    CONV_ABOVE,
    CONV_CASES,
    CUDA,
    FEW_CASES,
    FLOAT32,
    FLOAT64,
    WAYS,
    WEIGHT,
    Case,
    assert_tract,
    each,
    expected,
    gradient,
    loss,
    of_rounded,
    output_gradient,
    weight_of,
)
from tract_fx import tract_module, tract_pass


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@each()
def test_checkpointing(case: Case, reentrant: bool) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    x.requires_grad_(reentrant)  # which that kind wants of some input
    loss(checkpoint(model, x, use_reentrant=reentrant)).backward()
    assert_tract(weight_of(model).grad, net, x.detach())


@each(*(case for case in CONV_CASES if case.way in ("call_module", "tract_module")))
def test_checkpointing_a_part(case: Case) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    parts = [model.get_submodule("first"), nn.Sequential(nn.Tanh(), nn.Flatten())]
    output = checkpoint_sequential([*parts, model.get_submodule("head")], 2, x, use_reentrant=False)
    loss(output).backward()
    assert_tract(weight_of(model).grad, net, x)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@each(*FEW_CASES)
def test_checkpointing_under_autocast(case: Case, reentrant: bool) -> None:
    """The second forward pass runs in the backward pass, outside the autocast region."""
    net, x = case.net(torch.float32), case.batch(torch.float32)
    model = case.rewrite(net)
    x.requires_grad_(reentrant)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = checkpoint(model, x, use_reentrant=reentrant)
        (gw,) = torch.autograd.grad(loss(net(x).float()), [net.first.weight])
    loss(output.float()).backward()
    found = weight_of(model).grad
    assert found is not None
    assert relative_error(found, of_rounded(net, gw, x.bfloat16())) < FLOAT32


@each(*CONV_CASES)
def test_accumulation_over_micro_batches(case: Case) -> None:
    """Each micro-batch has its own X: what adds up is TrAct's gradients."""
    net = case.net()
    model = case.rewrite(net)
    batches = [case.batch(seed=seed, size=size) for seed, size in enumerate((3, 5, 2))]
    for x in batches:
        loss(model(x)).backward()
    found = weight_of(model).grad
    assert found is not None
    wanted = numpy.sum([expected(net, x) for x in batches], axis=0)
    assert relative_error(found, wanted) < FLOAT64


@each(*FEW_CASES)
def test_two_forward_passes_then_two_backward_passes(case: Case) -> None:
    net = case.net()
    model = case.rewrite(net)
    batches = [case.batch(seed=0), case.batch(seed=1)]
    values = [loss(model(x)) for x in batches]
    for value, x in reversed(list(zip(values, batches, strict=True))):
        (found,) = torch.autograd.grad(value, [weight_of(model)])
        assert_tract(found, net, x)


class Siamese(nn.Module):
    """One first layer, called on both images; each call has its own X."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        one, two = self.first(a), self.first(b)
        return (one - two).abs() + one * two  # type: ignore[no-any-return]


def siamese_export(model: nn.Module, a: Tensor, b: Tensor) -> nn.Module:
    return tract_pass(torch.export.export(model, (a, b)))


SIAMESE: dict[str, Callable[[nn.Module, Tensor, Tensor], Any]] = {
    "call_module": lambda model, a, b: tract_pass(fx.symbolic_trace(model)),
    "exported_node": siamese_export,
    "tract_module": lambda model, a, b: tract_module(model, (a, b)),
    "compiled": lambda model, a, b: torch.compile(
        tract_module(model, (a, b)), backend="aot_eager", fullgraph=True
    ),
}


@pytest.mark.parametrize("same_image", [False, True], ids=["two-images", "one-image"])
@pytest.mark.parametrize("way", SIAMESE)
@pytest.mark.parametrize("form", ["above", "below"])
def test_siamese(form: str, way: str, same_image: bool) -> None:
    case = next(c for c in CONV_CASES if c.form.name == f"conv-{form}")
    model = Siamese(case.net().first)
    a = case.batch(seed=1)
    b = 2 * a if same_image else case.batch(seed=2)
    tract = SIAMESE[way](model, a, b)
    z = [model.first(image).detach().requires_grad_() for image in (a, b)]
    dz = torch.autograd.grad(loss((z[0] - z[1]).abs() + z[0] * z[1]), z)
    wanted = tract_gradient(model.first, a, dz[0]) + tract_gradient(model.first, b, dz[1])
    loss(tract(a, b)).backward()
    found = weight_of(tract).grad
    assert found is not None
    assert relative_error(found, wanted) < FLOAT64


FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("weights", FORMATS, ids=str)
@pytest.mark.parametrize("images", FORMATS, ids=str)
@each(*CONV_CASES)
def test_memory_formats(
    case: Case, images: torch.memory_format, weights: torch.memory_format
) -> None:
    net, x = case.net(), case.batch().contiguous(memory_format=images)
    net.to(memory_format=weights)  # type: ignore[call-overload]
    model = case.rewrite(net)
    # Or the layer would be slower than the plain one.
    assert model(x).stride() == net(x).stride()
    assert_tract(gradient(model, x), net, x)


@each(*FEW_CASES)
def test_averaged_model(case: Case) -> None:
    """An exponential moving average's copy is a TrAct model, too."""
    net, x = case.net(), case.batch()
    averaged = AveragedModel(case.rewrite(net))
    averaged.update_parameters(case.rewrite(net))
    assert_tract(gradient(averaged.module, x), net, x)


@each(*FEW_CASES)
def test_threads(case: Case) -> None:
    """As `nn.DataParallel` and inference servers do: no state of the process is in the way."""
    net = case.net()
    model = case.rewrite(net)
    batches = [case.batch(seed=seed) for seed in range(4)]
    found: dict[int, Tensor] = {}

    def work(index: int) -> None:
        for _ in range(3):
            value = loss(model(batches[index]))
            found[index] = torch.autograd.grad(value, [weight_of(model)])[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, x in enumerate(batches):
        assert_tract(found[index], net, x)


class Tagged(torch.Tensor):
    """A subclass that overrides nothing: PyTorch wraps every result in it."""


@each(*FEW_CASES)
def test_tensor_subclasses(case: Case) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    assert_tract(gradient(model, x.as_subclass(Tagged)).as_subclass(Tensor), net, x)
    weight = weight_of(model).detach().as_subclass(Tagged).requires_grad_()
    parameters = {**dict(model.named_parameters()), WEIGHT: weight}
    loss(functional_call(model, parameters, (x,))).backward()
    assert weight.grad is not None
    assert_tract(weight.grad.as_subclass(Tensor), net, x)


@pytest.mark.parametrize("way", WAYS)
def test_deterministic_to_the_bit(way: str) -> None:
    case = Case(CONV_ABOVE, way)
    x = case.batch(torch.float32)
    one, two = (gradient(case.rewrite(case.net(torch.float32)), x) for _ in range(2))
    assert torch.equal(one, two)


@each(*FEW_CASES)
def test_optimizers_see_the_same_parameters(case: Case) -> None:
    """Parameters are shared: an optimizer made before the pass trains the model after it."""
    net, x = case.net(), case.batch()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    model = case.rewrite(net)
    start = copy.deepcopy(net)
    loss(model(x)).backward()
    optimizer.step()
    step = (start.first.weight - weight_of(model)) / 0.1
    assert relative_error(step, expected(start, x)) < 1e-8  # the division's rounding
    assert output_gradient(net, x).isfinite().all()


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
@each(*FEW_CASES)
def test_eight_bit_optimizers(case: Case, library: str, device: str) -> None:
    """They move the weights as the same ones that are handed the oracle's gradient."""
    kind = pytest.importorskip(f"{library}.optim", reason=f"needs {library}").AdamW8bit
    net, x = case.net(torch.float32).to(device), case.batch(torch.float32).to(device)
    model, start = case.rewrite(copy.deepcopy(net)), net.first.weight.detach().clone()
    options: dict[str, Any] = {"min_8bit_size": 1} if library == "bitsandbytes" else {}
    optimizers = [kind(m.parameters(), lr=0.01, **options) for m in (model, net)]
    for _ in range(3):
        gradient(model, x)
        gradient(net, x)
        net.first.weight.grad = torch.from_numpy(expected(net, x)).to(start)
        for optimizer in optimizers:
            optimizer.step()
    moved = weight_of(model).detach() - start
    assert relative_error(moved, net.first.weight.detach() - start) < 0.02

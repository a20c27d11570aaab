"""Training from exported artifacts against PyTorch: optimizers, frozen parts, dropout, layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("onnxruntime.training.api", reason="needs ONNX Runtime Training")

from oracle import Spec, precondition, relative_error, tract_gradient
from ort_reference import (
    Exported,
    TorchRun,
    assert_gradients,
    assert_same_state,
    export,
    labels,
    relative,
    seeded,
    treated,
    without_dropout,
)
from tract_fx import remove_tract, tract_module, tract_pass
from tract_fx.artifacts.optimizers import SGD, AdamW
from tract_fx.errors import ExportError, FrozenLayerWarning, TractError
from tract_fx.export import torch_graphs
from tract_fx.step import expand
from tract_fx.trainers import OrtTrainer

CLASSES = 5


class Net(nn.Module):
    """A first layer, BatchNorm, tanh and a linear head; smooth, so that runs stay together."""

    def __init__(self, first: nn.Module | None = None, size: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, bias=False) if first is None else first
        features = self.first(torch.randn(2, 3, size, size)).shape[1]
        self.norm = nn.BatchNorm2d(features)
        self.head = nn.Linear(features * 4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.first(x)))
        # Not adaptive: its windows would overlap.
        pooled = functional.avg_pool2d(y, (y.shape[2] // 2, y.shape[3] // 2))
        logits: Tensor = self.head(pooled[:, :, :2, :2].flatten(1))
        return logits


class Small(nn.Module):
    """A first layer, tanh and a linear head: for what has nothing to do with the rest of a net."""

    def __init__(self, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, bias=False) if first is None else first
        self.head = nn.Linear(self.first(images(1)).numel(), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.first(x)).flatten(1))
        return logits


def images(batch: int, seed: int = 0, size: int = 8, channels: int = 3) -> Tensor:
    """Noise with a mean, so that a lost mean shows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, size, size, generator=generator) + 0.3


def batches(count: int, sizes: tuple[int, ...] = (6, 4)) -> list[tuple[Tensor, Tensor]]:
    return [
        (images(sizes[i % len(sizes)], seed=i), labels(sizes[i % len(sizes)], CLASSES))
        for i in range(count)
    ]


def net_with_tract(seed: int = 0, **options: Any) -> nn.Module:
    return treated(seeded(Net, seed), **options)


# --- optimizers ---------------------------------------------------------------------------------

OPTIMIZERS: dict[str, tuple[Any, Callable[..., torch.optim.Optimizer]]] = {
    "adamw": (
        AdamW(lr=1e-2, weight_decay=0.1, max_grad_norm=0.5),
        partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    ),
    "adamw-of-torch": (
        lambda p: torch.optim.AdamW(p, lr=5e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.05),
        partial(torch.optim.AdamW, lr=5e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.05),
    ),
    "sgd-momentum": (
        SGD(lr=0.05, momentum=0.9, dampening=0.2, weight_decay=0.05, max_grad_norm=0.5),
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, dampening=0.2, weight_decay=0.05),
    ),
    "sgd-nesterov-of-torch": (
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.02, nesterov=True),
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.02, nesterov=True),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_with_a_schedule_and_clipping(name: str, tmp_path: Path) -> None:
    """Ten updates, batches of two sizes, torch's scheduler handing over its learning rates."""
    settings, reference = OPTIMIZERS[name]
    model = treated(seeded(Small))
    if callable(settings):
        settings = settings(model.parameters())
    exported = export(model, images(4), tmp_path / "a", optimizer=settings)
    trainer, run = exported.trainer(), exported.run(reference)
    run.clip = trainer.manifest.optimizer.max_grad_norm
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        run.optimizer, max_lr=trainer.learning_rate, total_steps=11, cycle_momentum=False
    )
    norms = []
    for x, y in batches(10):
        trainer.learning_rate = float(scheduler.get_last_lr()[0])
        gradients = trainer.compute_gradients(x, y).values()
        norms.append(math.sqrt(sum(float((g**2).sum()) for g in gradients)))
        assert trainer.train_step(x, y) == pytest.approx(run.step(x, y), rel=1e-5)
        scheduler.step()
    # AdamW divides a gradient by its size, and with it what is rounded in small ones.
    assert_same_state(trainer, run, 2e-5)
    if run.clip is not None:
        assert max(norms) > run.clip  # else nothing was clipped
    assert (
        relative(trainer.state_dict()["first.weight"], exported.model.state_dict()["first.weight"])
        > 1e-3
    )


def test_accumulation_is_the_mean_gradient(tmp_path: Path) -> None:
    settings = AdamW(lr=1e-2, accumulate=3)
    exported = export(treated(seeded(Small)), images(4), tmp_path / "a", optimizer=settings)
    trainer = exported.trainer()
    run = exported.run(partial(torch.optim.AdamW, lr=1e-2))
    for i, (x, y) in enumerate(batches(9)):
        loss = exported.loss_of(run.model, x, y)
        (loss / 3).backward()
        assert trainer.train_step(x, y) == pytest.approx(float(loss.detach()), rel=1e-5)
        if i % 3 == 2:
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert (trainer.updates, trainer.batches) == (3, 9)
    assert_same_state(trainer, run, 2e-5)


# --- what is frozen -----------------------------------------------------------------------------


def trained_beside(exported: Exported, steps: int = 4) -> tuple[OrtTrainer, TorchRun]:
    """Train in both for a few steps, with equal losses and gradients."""
    trainer, run = exported.trainer(), exported.run(partial(torch.optim.SGD, lr=0.1))
    for x, y in batches(steps):
        assert trainer.train_step(x, y) == pytest.approx(run.step(x, y), rel=1e-5)
    return trainer, run


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    net = seeded(Net)
    net.get_parameter("head.weight").requires_grad_(False)
    net.get_parameter("norm.bias").requires_grad_(False)
    exported = export(treated(net), images(4), tmp_path / "a")
    trainer, run = trained_beside(exported)
    state = trainer.state_dict()
    for key in ("head.weight", "norm.bias"):
        assert torch.equal(state[key], net.state_dict()[key])
    assert_same_state(trainer, run, 1e-5)
    batch = batches(1)[0]
    found = exported.trainer().compute_gradients(*batch)
    assert set(found) == {"first.weight", "norm.weight", "head.bias"}
    assert_gradients(found, exported.gradients(*batch))


@pytest.mark.parametrize("trains", [True, False], ids=["affine-trained", "affine-frozen"])
def test_a_frozen_batch_norm_stays_frozen(trains: bool, tmp_path: Path) -> None:
    """In evaluation mode within a model in training mode, as fine-tuning has it."""
    net = seeded(Net)
    norm = net.get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm2d) and isinstance(norm.running_var, Tensor)
    norm.eval()
    norm.requires_grad_(trains)
    assert isinstance(norm.running_mean, Tensor)
    norm.running_mean.copy_(torch.linspace(-0.3, 0.3, 6))
    norm.running_var.copy_(torch.linspace(0.5, 1.5, 6))
    exported = export(treated(net), images(4), tmp_path / "a")
    trainer, run = trained_beside(exported)
    assert_same_state(trainer, run, 1e-5)
    for key in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(trainer.state_dict()[key], net.state_dict()[key]), key
    assert (
        torch.equal(trainer.state_dict()["norm.weight"], net.state_dict()["norm.weight"]) != trains
    )
    batch = batches(1)[0]
    assert_gradients(exported.trainer().compute_gradients(*batch), exported.gradients(*batch))
    assert relative(trainer.predict(batch[0]), run.predict(batch[0])) < 1e-5


def test_a_frozen_first_layer(tmp_path: Path) -> None:
    """A warning; every other gradient is the plain one."""
    net = seeded(Net)
    with pytest.warns(FrozenLayerWarning):
        net.get_submodule("first").requires_grad_(False)
        model = treated(net)
    with pytest.warns(FrozenLayerWarning, match="first"):
        exported = export(model, images(4), tmp_path / "a")
    batch = batches(1)[0]
    found = exported.trainer().compute_gradients(*batch)
    assert "first.weight" not in found
    assert_gradients(found, exported.gradients(*batch))
    trainer, run = trained_beside(exported)
    assert torch.equal(trainer.state_dict()["first.weight"], net.state_dict()["first.weight"])
    assert_same_state(trainer, run, 1e-5)


# --- dropout ------------------------------------------------------------------------------------


class Dropped(nn.Module):
    """Dropout of ones, times a parameter."""

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.dropout = dropout
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.scale * self.dropout(x)
        return out


class Attended(nn.Module):
    """Attention over equal keys: the mean of the values, with dropout of its weights."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        query = torch.zeros_like(x)
        p = self.p if self.training else 0.0
        out: Tensor = functional.scaled_dot_product_attention(query, query, x, dropout_p=p)
        return out


TOKENS = 8
P = 0.3
# Variance of an output on ones: of one entry, which is 0 or 1/(1 − p); of the mean of TOKENS such.
VARIANCES: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "dropout": (lambda: nn.Dropout(P), P / (1 - P)),
    "dropout2d": (lambda: nn.Dropout2d(P), P / (1 - P)),
    "attention": (lambda: Attended(P), P / (1 - P) / TOKENS),
}


@pytest.mark.parametrize("name", VARIANCES)
def test_dropout_has_its_mean_and_its_variance(name: str, tmp_path: Path) -> None:
    """Over the masks of many steps; off in evaluation; the backward pass has the forward's mask."""
    build, variance = VARIANCES[name]

    def spread(output: Tensor, target: Tensor) -> Tensor:
        return ((output - target) ** 2).mean()

    x = torch.ones(16, 4, TOKENS, 6)
    one = torch.ones(16, 4, TOKENS, 6)
    exported = export(
        Dropped(build()).train(),
        x,
        tmp_path / "a",
        loss=spread,
        reference=spread,
        example_targets=one,
        optimizer=SGD(lr=0.0),
        plain=True,
    )
    trainer = exported.trainer()
    found, means = [], []
    for _ in range(100):
        # With output d, target 1: loss = mean(d²) − 2 mean(d) + 1, slope = 2 mean(d²) − 2 mean(d).
        slope = float(trainer.compute_gradients(x, one)["scale"])
        loss = trainer.train_step(x, one)
        found.append(loss)
        means.append(1 + slope / 2 - loss)
    assert np.std(found) > 0
    # Five standard errors of the mean over independent steps.
    for values, expected in ((found, variance), (means, 1.0)):
        error = 5 * np.std(values) / math.sqrt(len(values))
        assert abs(np.mean(values) - expected) < error
        assert error < 0.1 * expected  # else the bound says nothing
    assert trainer.evaluate(x, one) == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(trainer.predict(x), 1.0, rtol=1e-6)


def test_dropout_before_the_first_layer(tmp_path: Path) -> None:
    """X is then what the layer multiplies with, zeros included. `verify` looks at that."""
    net = seeded(lambda: nn.Sequential(nn.Dropout(0.5), Net()))
    net = treated(net, layers=["1.first"])
    exported = export(net, images(6), tmp_path / "a", verify=True)
    trainer = exported.trainer()
    batch = batches(1)[0]
    one, other = (trainer.compute_gradients(*batch), trainer.compute_gradients(*batch))
    np.testing.assert_array_equal(one["1.first.weight"], other["1.first.weight"])
    trainer.train_step(*batch)
    assert (
        relative(trainer.compute_gradients(*batch)["1.first.weight"], one["1.first.weight"]) > 0.1
    )
    without = without_dropout(copy.deepcopy(exported.model)).eval()
    assert relative(trainer.predict(batch[0]), _after(without, trainer, batch[0])) < 1e-5


def _after(model: nn.Module, trainer: OrtTrainer, x: Tensor) -> Tensor:
    model.load_state_dict(trainer.state_dict())
    with torch.no_grad():
        output: Tensor = model(x)
    return output


# --- first layers -------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "circular": lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular", bias=False),
    "same": lambda: nn.Conv2d(3, 6, 4, padding="same", bias=False),
    "grouped": lambda: nn.Conv2d(3, 6, 3, groups=3, bias=False),
    "dilated-strided": lambda: nn.Conv2d(3, 6, (3, 2), (1, 2), 2, (2, 1), bias=False),
    "patches": lambda: nn.Conv2d(3, 6, 2, stride=2, bias=False),
    "weight-norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3, bias=False)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_first_layers(name: str, tmp_path: Path) -> None:
    net = seeded(lambda: Small(LAYERS[name]()))
    exported = export(treated(net), images(4), tmp_path / "a")
    assert len(exported.trainer().manifest.layers) == 1
    for batch in batches(2, sizes=(6, 1)):
        found = exported.trainer().compute_gradients(*batch)
        assert_gradients(found, exported.gradients(*batch))
    trained_beside(exported)


def linear_net() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def test_a_linear_first_layer_on_both_sides_of_rows_and_columns(tmp_path: Path) -> None:
    exported = export(treated(seeded(linear_net)), torch.randn(4, 12), tmp_path / "a")
    for rows in (1, 3, 11, 12, 13, 40):
        x = torch.randn(rows, 12, generator=torch.Generator().manual_seed(rows)) + 0.5
        batch = (x, labels(rows, CLASSES))
        found, expected = exported.trainer().compute_gradients(*batch), exported.gradients(*batch)
        assert_gradients(found, expected)
        # And against the definition, which shares no code with the reference.
        plain = {**expected}
        z = copy.deepcopy(exported.model).double()
        plain["0.weight"] = _plain_gradients(z, x, batch[1])["0.weight"]
        oracle = precondition(Spec("linear"), plain["0.weight"], x, 0.1)
        assert relative_error(found["0.weight"].astype(np.float64), oracle) < 1e-5


def _plain_gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    model = remove_tract(model)
    model.zero_grad()
    functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), y).backward()
    return {n: p.grad.double().numpy() for n, p in model.named_parameters() if p.grad is not None}


class Siamese(nn.Module):
    """One first layer on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = (torch.tanh(self.first(x)).mean((2, 3)) for x in (left, right))
        logits: Tensor = self.head(a - 2 * b)
        return logits


def test_siamese(tmp_path: Path) -> None:
    """One Gram per call; the terms are summed after it."""
    model = tract_pass(torch.fx.symbolic_trace(seeded(Siamese)), layers=["first"])
    exported = export(model, (images(4), images(4, seed=1)), tmp_path / "a")
    for size in (6, 3):
        batch = (images(size, seed=2), 2 * images(size, seed=3), labels(size, CLASSES))
        found, expected = exported.trainer().compute_gradients(*batch), exported.gradients(*batch)
        assert_gradients(found, expected)
        plain = _plain_siamese(exported.model, batch)
        assert relative(plain, expected["first.weight"]) > 0.1


def _plain_siamese(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Any:
    plain = remove_tract(copy.deepcopy(model))
    plain.zero_grad()
    functional.cross_entropy(plain(*batch[:2]), batch[2]).backward()
    gradient = plain.get_parameter("first.weight").grad
    assert gradient is not None
    return gradient.numpy()


class Tied(nn.Module):
    """The decoder reads the first layer's weight, transposed; another weight has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.middle = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.middle.weight

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        y = torch.tanh(self.again(torch.tanh(self.middle(y))))
        return functional.linear(y, self.first.weight.t())


def test_tied_weights(tmp_path: Path) -> None:
    """TrAct on the term of its own call; one tensor under two names."""
    model = treated(seeded(Tied))
    mse = functional.mse_loss
    exported = export(model, torch.randn(4, 12), tmp_path / "a", loss="mse", reference=mse)
    pair = {"again.weight", "middle.weight"}
    ((alias, kept),) = exported.trainer().manifest.aliases.items()
    assert {alias, kept} == pair
    for rows in (30, 5):
        x = torch.randn(rows, 12, generator=torch.Generator().manual_seed(rows)) + 0.5
        batch = (x, x)
        found, expected = exported.trainer().compute_gradients(*batch), exported.gradients(*batch)
        assert_gradients(found, expected)
    trainer, run = exported.trainer(), exported.run(partial(torch.optim.SGD, lr=0.1))
    for _ in range(3):
        assert trainer.train_step(*batch) == pytest.approx(run.step(*batch), rel=1e-5)
    assert_same_state(trainer, run, 1e-5)
    seeded(Tied).load_state_dict(trainer.state_dict())


# --- ways to put TrAct in -----------------------------------------------------------------------

WAYS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "symbolic_trace": lambda net, x: tract_pass(torch.fx.symbolic_trace(net)),
    "export.module": lambda net, x: tract_pass(_program(net, x).module()),
    "ExportedProgram": lambda net, x: tract_pass(_program(net, x)),
    "tract_module": lambda net, x: tract_module(net, x),
}


def _program(net: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    return torch.export.export(net, (x,), dynamic_shapes=shapes, strict=False)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains_with_tract_and_leaves_the_model_alone(way: str, tmp_path: Path) -> None:
    net = seeded(Net)
    net.get_submodule("norm").momentum = 0.3  # type: ignore[assignment]
    model = WAYS[way](net, images(4))
    x, y = batches(1)[0]
    model(x)  # so that there are statistics and gradients to be changed
    functional.cross_entropy(model(x), y).backward()
    before = _everything(model)
    state = torch.get_rng_state()
    exported = export(model, images(4), tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    _assert_unchanged(model, before)

    found = exported.trainer().compute_gradients(x, y)
    seen: list[Tensor] = []
    double = copy.deepcopy(net).double()
    double.zero_grad()
    double.get_submodule("first").register_forward_hook(
        lambda module, args, output: output.register_hook(seen.append) and None
    )
    functional.cross_entropy(double(x.double()), y).backward()
    plain = {n: p.grad.numpy() for n, p in double.named_parameters() if p.grad is not None}
    oracle = tract_gradient(net.get_submodule("first"), x, seen[0], 0.1)
    assert relative_error(found["first.weight"].astype(np.float64), oracle) < 1e-5
    assert relative_error(plain["first.weight"], oracle) > 0.1
    for name in plain:
        if name != "first.weight":
            assert relative(found[name], plain[name]) < 1e-5, name
    trainer = exported.trainer()
    trainer.train_step(x, y)
    seeded(Net).load_state_dict(trainer.state_dict())


def _everything(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {k: (v, v.clone()) for k, v in model.state_dict(keep_vars=True).items()},
        "grads": {
            k: (p.grad, p.grad.clone()) for k, p in model.named_parameters() if p.grad is not None
        },
        "modes": {k: m.training for k, m in model.named_modules()},
        "vars": {k: dict(vars(m)) for k, m in model.named_modules()},
    }


def _assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = _everything(model)
    assert after["modes"] == before["modes"]
    for kind in ("state", "grads"):
        assert after[kind].keys() == before[kind].keys()
        for key, (tensor, value) in before[kind].items():
            assert after[kind][key][0] is tensor, key
            assert torch.equal(tensor, value), key
    for key, attributes in before["vars"].items():
        assert after["vars"][key].keys() == attributes.keys(), key


# --- batches ------------------------------------------------------------------------------------


def test_a_fixed_batch(tmp_path: Path) -> None:
    exported = export(net_with_tract(), images(6), tmp_path / "a", dynamic_batch=False)
    trainer = exported.trainer()
    assert trainer.manifest.inputs[0].shape == (6, 3, 8, 8)
    batch = batches(1, sizes=(6,))[0]
    assert_gradients(trainer.compute_gradients(*batch), exported.gradients(*batch))
    with pytest.raises(TractError, match="6"):
        trainer.train_step(images(4), labels(4, CLASSES))


def test_an_example_of_one(tmp_path: Path) -> None:
    """It says nothing about other sizes, which are open all the same."""
    exported = export(net_with_tract(), images(1), tmp_path / "a")
    for batch in batches(3, sizes=(6, 1, 17)):
        found = exported.trainer().compute_gradients(*batch)
        assert_gradients(found, exported.gradients(*batch))


class Metadata(nn.Module):
    """An image and a vector; an option that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.other = nn.Linear(4, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, image: Tensor, metadata: Tensor, scale: float = 1.0) -> Tensor:
        y = torch.tanh(self.first(image)).mean((2, 3)) + scale * torch.tanh(self.other(metadata))
        logits: Tensor = self.head(y)
        return logits


@pytest.mark.parametrize("layers", [["first"], ["first", "other"], {"other": 0.5}], ids=str)
def test_several_inputs(layers: Any, tmp_path: Path) -> None:
    net = seeded(Metadata)
    example = {"image": images(4), "metadata": torch.randn(4, 4), "scale": 2.0}
    model = tract_module(net, example, layers=layers)

    def reference(logits: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(logits, y)

    exported = export(model, example, tmp_path / "a", reference=reference)
    trainer = exported.trainer()
    assert [spec.name for spec in trainer.manifest.inputs] == ["image", "metadata"]
    assert {layer.name for layer in trainer.manifest.layers} == set(layers)
    for size in (6, 3):
        x, metadata, y = images(size), torch.randn(size, 4) + 0.5, labels(size, CLASSES)
        found = trainer.compute_gradients(image=x, metadata=metadata, target=y)
        double = copy.deepcopy(model).double()
        double.zero_grad()
        functional.cross_entropy(double(x.double(), metadata.double(), 2.0), y).backward()
        expected = {n: p.grad.numpy() for n, p in double.named_parameters() if p.grad is not None}
        assert_gradients(found, expected)


# --- verify -------------------------------------------------------------------------------------


def _lose_lambda(patch: pytest.MonkeyPatch) -> None:
    real: Any = expand.insert  # type: ignore[attr-defined]

    def insert(graph: Any, name: str, gradient: Any, lambda_: Any, *more: Any) -> None:
        real(graph, name, gradient, np.zeros_like(lambda_), *more)

    patch.setattr(expand, "insert", insert)


def _lose_transform(patch: pytest.MonkeyPatch) -> None:
    real: Any = expand.insert  # type: ignore[attr-defined]

    def insert(graph: Any, name: str, gradient: Any, lambda_: Any, *more: Any) -> None:
        real(graph, name, gradient, lambda_, *more)
        values = {v.name: v for node in graph for v in node.outputs}
        found = values[f"{gradient.call.weight.name}_grad"]
        plain = values[f"tract/{name}/plain_gradient"]
        copy_of_plain = ir.node("Identity", [plain])
        graph.append(copy_of_plain)
        found.replace_all_uses_with(copy_of_plain.outputs[0], replace_graph_outputs=True)
        copy_of_plain.outputs[0].name, found.name = found.name, "lost"
        copy_of_plain.outputs[0].type, copy_of_plain.outputs[0].shape = found.type, found.shape

    patch.setattr(expand, "insert", insert)


MISTAKES = {"lambda": _lose_lambda, "transform": _lose_transform}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_verify_sees_mistakes(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MISTAKES[mistake](monkeypatch)
    with pytest.raises(ExportError):
        export(treated(seeded(Small)), images(4), tmp_path / "a", verify=True)
    assert list(tmp_path.iterdir()) == []
    # The mistake is one that is written without it.
    exported = export(treated(seeded(Small)), images(4), tmp_path / "a")
    batch = batches(1)[0]
    with pytest.raises(AssertionError):
        assert_gradients(exported.trainer().compute_gradients(*batch), exported.gradients(*batch))


def test_verify_sees_a_lost_label_smoothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Any = torch_graphs.trace_step  # type: ignore[attr-defined]

    def trace(module: Any, args: Any, kwargs: Any, loss: Any, *others: Any, **options: Any) -> Any:
        return real(module, args, kwargs, functional.cross_entropy, *others, **options)

    monkeypatch.setattr(torch_graphs, "trace_step", trace)
    with pytest.raises(ExportError, match="the loss"):
        export(
            treated(seeded(Small)),
            images(4),
            tmp_path / "a",
            loss=nn.CrossEntropyLoss(label_smoothing=0.1),
            verify=True,
        )
    assert list(tmp_path.iterdir()) == []

"""Whole vision models: ONNX Runtime, from one directory at two batch sizes, beside PyTorch.

Dropout is off in both; it has tests of its own. The images are photographs, whose patches are far
from white, and noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

pytest.importorskip("onnxruntime.training.api", reason="needs ONNX Runtime Training")

from cuda_kernels import missing_cuda_kernels
from nets import small_convnext, small_resnet
from nets.convolutions import small_conv1d, small_conv3d
from nets.huggingface import FAMILIES, Family
from nets.mlp import small_mlp
from nets.vit_mha import small_vit_mha
from ort_reference import (
    GRADIENT,
    TRACT_ON_NOISE,
    TRACT_ON_PHOTOGRAPHS,
    Exported,
    as_dtype,
    assert_gradients,
    assert_same_state,
    export,
    labels,
    relative,
    seeded,
    treated,
    without_dropout,
)
from photographs import photographs
from tract_fx import remove_tract, tract_module
from tract_fx.artifacts.optimizers import SGD

STEPS, LARGER = 20, 15
"""Of training, and those before them on the larger batch."""
MOMENTUM = 0.9


def series(batch: int, seed: int = 0) -> Tensor:
    """A row of each photograph: (batch, 3, 64)."""
    return photographs(batch, size=64, seed=seed)[:, :, 32].contiguous()


def volumes(batch: int, seed: int = 0) -> Tensor:
    """Windows that wander over each photograph: (batch, 3, 6, 16, 16)."""
    x = photographs(batch, size=32, seed=seed)
    windows = [x[:, :, 2 * t : 2 * t + 16, 3 * t : 3 * t + 16] for t in range(6)]
    return torch.stack(windows, 2).contiguous()


@dataclass(frozen=True)
class Subject:
    """A model, with what it is trained on.

    Attributes:
        name: A test's id.
        build: Makes the model.
        images: A batch of a size and a seed.
        batches: Two sizes.
        lr: A learning rate at which 15 steps of SGD with momentum at least halve the loss.
        zero: Parameters whose gradient vanishes: the bias before a BatchNorm.
    """

    name: str
    build: Callable[[], nn.Module]
    images: Callable[..., Tensor]
    batches: tuple[int, int]
    lr: float
    zero: frozenset[str] = frozenset()


# The ResNets are small in pixels: of a hundred thousand pre-activations in each of 20 steps, one
# lies within float32's rounding of a ReLU's corner, and two right runs part there by 1e-3.
# Rows and columns: the ViTs have fewer rows in the smaller batch and more in the larger one, the
# MLP has fewer in both, the others have more in both.
SUBJECTS = (
    Subject("resnet", small_resnet, partial(photographs, size=16), (6, 3), 0.03),
    Subject(
        "resnet-cifar",
        partial(small_resnet, cifar_stem=True, width=8),
        partial(photographs, size=8),
        (6, 3),
        0.03,
    ),
    Subject("vit-mha", small_vit_mha, photographs, (13, 5), 0.005),
    Subject("convnext", small_convnext, photographs, (8, 5), 0.02),
    Subject("mlp", small_mlp, partial(photographs, size=16), (8, 5), 0.08),
    Subject("conv1d", partial(small_conv1d, 24), series, (5, 3), 0.1, frozenset({"0.bias"})),
    Subject("conv3d", small_conv3d, volumes, (5, 3), 0.03),
)
# TrAct is all that a plain training graph has not.
PLAIN = ("mlp",)
# Hugging Face's ResNet is verified below, and a plain graph is part of one with TrAct.
VERIFIED = ("vit-mha", "convnext", "mlp", "conv1d", "conv3d")


@dataclass(frozen=True)
class Trained:
    """A subject, and where it was exported to.

    Attributes:
        subject: The subject.
        exported: Model and artifacts.
        first: The weight that TrAct is on, None where it is on none.
    """

    subject: Subject
    exported: Exported
    first: str | None

    def batch(self, size: int, *, noise: bool = False) -> tuple[Tensor, Tensor]:
        x = self.subject.images(size, seed=3)
        if noise:
            x = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        return x, labels(size)


@pytest.fixture(
    scope="module",
    params=[(s, p) for s in SUBJECTS for p in (False, True) if not p or s.name in PLAIN],
    ids=lambda p: f"{p[0].name}-{'plain' if p[1] else 'tract'}",
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    subject, plain = request.param
    net = without_dropout(seeded(subject.build))
    exported = export(
        net if plain else treated(net),
        subject.images(4),
        tmp_path_factory.mktemp(subject.name) / "artifacts",
        optimizer=SGD(lr=subject.lr, momentum=MOMENTUM),
        plain=plain,
        verify=subject.name in VERIFIED and not plain,
    )
    layers = exported.trainer().manifest.layers
    assert len(layers) == (0 if plain else 1)
    return Trained(subject, exported, None if plain else layers[0].weight[0])


def test_every_node_has_a_cuda_kernel(trained: Trained) -> None:
    """By the provider's table of them, so that this holds without a GPU."""
    graphs = ("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx")
    directory = trained.exported.directory
    missing = {graph: missing_cuda_kernels(onnx.load(directory / graph)) for graph in graphs}
    assert missing == {graph: [] for graph in graphs}


@pytest.mark.parametrize("noise", [False, True], ids=["photographs", "noise"])
def test_gradients_of_the_first_step(trained: Trained, noise: bool) -> None:
    tolerances = {}
    if trained.first is not None:
        tolerances[trained.first] = TRACT_ON_NOISE if noise else TRACT_ON_PHOTOGRAPHS
    trainer = trained.exported.trainer()
    for size in trained.subject.batches:
        batch = trained.batch(size, noise=noise)
        found, expected = trainer.compute_gradients(*batch), trained.exported.gradients(*batch)
        assert_gradients(found, expected, tolerances, zero=set(trained.subject.zero))


def test_twenty_steps(trained: Trained) -> None:
    """Losses, then outputs in evaluation mode and BatchNorm's running statistics.

    The last steps are on the smaller batch, which may be of fewer rows than columns.
    """
    subject = trained.subject
    larger, smaller = (trained.batch(size) for size in subject.batches)
    trainer = trained.exported.trainer()
    run = trained.exported.run(partial(torch.optim.SGD, lr=subject.lr, momentum=MOMENTUM))
    losses = []
    for number in range(STEPS):
        x, y = larger if number < LARGER else smaller
        run.step(x, y)
        losses.append(trainer.train_step(x, y))
    assert run.losses[LARGER - 1] <= 0.5 * run.losses[0]
    np.testing.assert_allclose(losses, run.losses, rtol=0, atol=1e-4)
    # Relative to the tensor's norm.
    output = trainer.predict(x)
    assert isinstance(output, np.ndarray)
    assert relative(output, run.predict(x)) < 1e-5
    statistics = [key for key in run.model.state_dict() if "running" in key or "tracked" in key]
    assert bool(statistics) == (subject.name.startswith(("resnet", "conv1d", "conv3d")))
    assert_same_state(trainer, run, 1e-5, statistics)


def test_trained_weights_go_back(trained: Trained) -> None:
    """Strictly, and the PyTorch model then gives the trainer's outputs; and the other way round."""
    x, y = trained.batch(trained.subject.batches[1])
    trainer = trained.exported.trainer()
    for _ in range(3):
        trainer.train_step(x, y)
    back = without_dropout(seeded(trained.subject.build, seed=5))
    back.load_state_dict(trainer.state_dict())
    with torch.no_grad():
        expected = back.eval()(x)
    output = trainer.predict(x)
    assert isinstance(output, np.ndarray)
    assert relative(output, expected) < GRADIENT

    fresh = trained.exported.trainer()
    assert relative(fresh.predict(x), expected) > 1e-3  # else nothing was trained
    fresh.load_state_dict(back.state_dict())
    np.testing.assert_array_equal(fresh.predict(x), output)


# --- Hugging Face -------------------------------------------------------------------------------

HUGGING_FACE = [family for family in FAMILIES if family.name in {"vit", "resnet"}]


def hugging_face(family: Family) -> nn.Module:
    """The family's model with dropout off, and TrAct by `tract_module`."""
    model = family.model()
    for module in without_dropout(model).modules():
        for name, value in vars(module).items():  # of attention; of whole branches
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return tract_module(model, family.example())


def scores(output: Mapping[str, Tensor], y: Tensor) -> Tensor:
    return cross_entropy(output["logits"], y)


@pytest.mark.parametrize("family", HUGGING_FACE, ids=str)
def test_hugging_face(family: Family, tmp_path: Path) -> None:
    """Keyword inputs; the loss reads the logits."""
    model = hugging_face(family)
    config = SGD(lr=0.01, momentum=MOMENTUM)
    verify = family.name == "resnet"  # attention is verified above
    exported = export(model, family.example(), tmp_path / "a", optimizer=config, verify=verify)
    trainer = exported.trainer()
    first = f"{family.stem}.weight"
    assert [layer.weight for layer in trainer.manifest.layers] == [(first,)]
    double = as_dtype(model, torch.float64)
    for size in (9, 3):
        x, y = photographs(size, seed=3), labels(size)
        found = trainer.compute_gradients(pixel_values=x, target=y)
        double.zero_grad()
        scores(double(pixel_values=x.double()), y).backward()
        expected = {n: p.grad.numpy() for n, p in double.named_parameters() if p.grad is not None}
        # Softmax takes back what a key's bias adds to all scores of a query.
        zero = {name for name in expected if name.endswith("k_proj.bias")}
        assert_gradients(found, expected, {first: TRACT_ON_PHOTOGRAPHS}, zero=zero)
    plain = relative(_plain_gradient(model, x, y, first), expected[first])
    assert plain > 0.1

    double = as_dtype(model, torch.float64)
    optimizer = torch.optim.SGD(double.parameters(), lr=0.01, momentum=MOMENTUM)
    for _ in range(5):
        optimizer.zero_grad()
        loss = scores(double(pixel_values=x.double()), y)
        loss.backward()
        optimizer.step()
        assert trainer.train_step(pixel_values=x, target=y) == pytest.approx(
            float(loss.detach()), abs=1e-5
        )
    back = family.model(seed=4)
    back.load_state_dict(trainer.state_dict())
    with torch.no_grad():
        logits = back.eval()(pixel_values=x)["logits"]
    assert relative(trainer.predict(pixel_values=x), logits) < 1e-5


def _plain_gradient(model: nn.Module, x: Tensor, y: Tensor, name: str) -> Tensor:
    plain = remove_tract(copy.deepcopy(model))
    plain.zero_grad()
    scores(plain(pixel_values=x), y).backward()
    gradient = plain.get_parameter(name).grad
    assert gradient is not None
    return gradient


def test_hugging_face_with_labels(tmp_path: Path) -> None:
    """The model computes its loss from its labels; that is what is trained on."""
    (family,) = (family for family in FAMILIES if family.name == "convnext")
    model = hugging_face(family)
    example = {**family.example(), "labels": labels(4)}
    exported = export(model, example, tmp_path / "a", loss=None)
    trainer = exported.trainer()
    assert trainer.manifest.outputs == ("logits",) and trainer.manifest.targets == ()
    first = f"{family.stem}.weight"
    double = as_dtype(model, torch.float64)
    for size in (9, 3):
        x, y = photographs(size, seed=3), labels(size)
        found = trainer.compute_gradients(pixel_values=x, labels=y)
        double.zero_grad()
        output = double(pixel_values=x.double(), labels=y)
        output["loss"].backward()
        expected = {n: p.grad.numpy() for n, p in double.named_parameters() if p.grad is not None}
        assert_gradients(found, expected, {first: TRACT_ON_PHOTOGRAPHS})
        assert trainer.evaluate(pixel_values=x, labels=y) == pytest.approx(
            float(output["loss"].detach()), rel=1e-5
        )
    assert trainer.predict(pixel_values=x).shape == (3, 10)  # type: ignore[union-attr]

"""Whole vision models, trained by ONNX Runtime from one directory at two batch sizes, and by PyTorch.

Dropout is off in both; it has tests of its own. The images are photographs, whose patches are far
from white, and noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime.training.api", reason="needs ONNX Runtime Training")

from nets import small_convnext, small_resnet, small_vit  # noqa: E402
from nets.convolutions import small_conv1d, small_conv3d  # noqa: E402
from nets.mlp import small_mlp  # noqa: E402
from nets.vit_mha import small_vit_mha  # noqa: E402
from ort_reference import (  # noqa: E402
    GRADIENT,
    TRACT_ON_NOISE,
    TRACT_ON_PHOTOGRAPHS,
    Exported,
    assert_gradients,
    assert_same_state,
    export,
    labels,
    relative,
    seeded,
    treated,
    without_dropout,
)
from photographs import photographs  # noqa: E402
from tract_fx.export.optimizers import SGD  # noqa: E402

STEPS = 20
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
        lr: A learning rate at which 20 steps of SGD with momentum at least halve the loss.
        zero: Parameters whose gradient vanishes: the bias before a BatchNorm.
    """

    name: str
    build: Callable[[], nn.Module]
    images: Callable[..., Tensor]
    batches: tuple[int, int]
    lr: float
    zero: frozenset[str] = frozenset()


# The ResNets are small in pixels: with a hundred thousand pre-activations in each of 20 steps one of
# them lies within float32's rounding of a ReLU's corner, and two right runs part there by 1e-3.
# Patches: vit below and above rows = columns (192), the MLP below in both, the others above.
SUBJECTS = (
    Subject("resnet", small_resnet, partial(photographs, size=16), (6, 3), 0.03),
    Subject(
        "resnet-cifar",
        partial(small_resnet, cifar_stem=True, width=8),
        partial(photographs, size=8),
        (6, 3),
        0.03,
    ),
    Subject("vit", small_vit, photographs, (13, 5), 0.01),
    Subject("vit-mha", small_vit_mha, photographs, (13, 5), 0.005),
    Subject("convnext", small_convnext, photographs, (8, 5), 0.02),
    Subject("mlp", small_mlp, partial(photographs, size=16), (8, 5), 0.08),
    Subject("conv1d", partial(small_conv1d, 24), series, (5, 3), 0.1, frozenset({"0.bias"})),
    Subject("conv3d", small_conv3d, volumes, (5, 3), 0.03),
)


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
    params=[(s, plain) for s in SUBJECTS for plain in (False, True)],
    ids=lambda p: f"{p[0].name}-{'plain' if p[1] else 'tract'}",
)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    subject, plain = request.param
    net = without_dropout(seeded(subject.build))
    exported = export(
        net if plain else treated(net),
        subject.images(4),
        tmp_path_factory.mktemp(subject.name) / "artifacts",
        optimizer=SGD(lr=subject.lr, momentum=MOMENTUM),
        plain=plain,
    )
    layers = exported.trainer().manifest.layers
    assert len(layers) == (0 if plain else 1)
    return Trained(subject, exported, None if plain else layers[0].weight[0])


@pytest.mark.parametrize("noise", [False, True], ids=["photographs", "noise"])
def test_gradients_of_the_first_step(trained: Trained, noise: bool) -> None:
    tolerances = {}
    if trained.first is not None:
        tolerances[trained.first] = TRACT_ON_NOISE if noise else TRACT_ON_PHOTOGRAPHS
    trainer = trained.exported.trainer()
    for size in trained.subject.batches:
        batch = trained.batch(size, noise=noise)
        found, expected = trainer.compute_gradients(*batch), trained.exported.gradients(*batch)
        errors = assert_gradients(found, expected, tolerances, zero=set(trained.subject.zero))
        ordinary = max(e for name, e in errors.items() if name != trained.first)
        print(
            f"FIGURE gradients {trained.subject.name} {'plain' if trained.first is None else 'tract'} "
            f"{'noise' if noise else 'photo'} {size}: ordinary {ordinary:.1e} "
            f"tract {errors.get(trained.first or '', 0):.1e}"
        )


@pytest.mark.parametrize("which", [0, 1], ids=["larger", "smaller"])
def test_twenty_steps(trained: Trained, which: int) -> None:
    """Losses, then outputs in evaluation mode and BatchNorm's running statistics."""
    subject = trained.subject
    x, y = trained.batch(subject.batches[which])
    trainer = trained.exported.trainer()
    run = trained.exported.run(partial(torch.optim.SGD, lr=subject.lr, momentum=MOMENTUM))
    losses = []
    for _ in range(STEPS):
        run.step(x, y)
        losses.append(trainer.train_step(x, y))
    assert run.losses[-1] <= 0.5 * run.losses[0]
    off = float(np.abs(np.array(losses) - run.losses).max())
    assert off < 1e-4
    # Relative to the tensor's norm.
    output = trainer.predict(x)
    assert isinstance(output, np.ndarray)
    outputs = relative(output, run.predict(x))
    assert outputs < 1e-5
    statistics = [key for key in run.model.state_dict() if "running" in key or "tracked" in key]
    assert bool(statistics) == (subject.name.startswith(("resnet", "conv1d", "conv3d")))
    stats = assert_same_state(trainer, run, 1e-5, statistics)
    print(
        f"FIGURE run {subject.name} {'plain' if trained.first is None else 'tract'} {len(x)}: "
        f"{run.losses[0]:.2f}->{run.losses[-1]:.2f} off {off:.1e} eval {outputs:.1e} stats {stats:.1e}"
    )


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

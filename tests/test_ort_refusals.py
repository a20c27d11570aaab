"""What a graph would lose without a word is refused, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tract_fx import SGD, export_training, load_trainer, tract_module
from tract_fx.errors import (
    ExportError,
    InvalidBatchError,
    TractWarning,
    UnsupportedTrainingError,
)

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3)
        self.norm: nn.Module = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 4)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.first(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]


class Clamped(torch.autograd.Function):
    """Its backward differs from the forward's derivative only where a gradient is above one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].clamp(-1, 1)


class OwnBackward(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(Clamped.apply(self.features(x)))  # type: ignore[no-any-return, no-untyped-call]


class HookInForward(Net):
    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        if features.requires_grad:
            features.register_hook(lambda gradient: gradient.clamp(-1, 1))
        return self.head(features)  # type: ignore[no-any-return]


class TrackedInstances(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(4, track_running_stats=True)


class NormTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.norm(self.first(x)) * 2).mean((2, 3)))  # type: ignore[no-any-return]


class Detached(Net):
    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return self.head(features * torch.sigmoid(features).detach())  # type: ignore[no-any-return]


class DropsAll(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.features(x), 1.0, self.training))  # type: ignore[no-any-return]


class Noisy(Net):
    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return self.head(features + torch.rand_like(features))  # type: ignore[no-any-return]


class Branches(Net):
    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0 if x.shape[0] > 5 else 0.5
        return self.head(self.features(x) * scale)  # type: ignore[no-any-return]


class Even(Net):
    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0 if x.shape[0] % 2 == 0 else 0.5
        return self.head(self.features(x) * scale)  # type: ignore[no-any-return]


class Padded(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 4, padding_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        which = (x[:, 0, 0, 0] > 0).long()
        return self.head(self.features(x) + self.table(which))  # type: ignore[no-any-return]


class Counts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.head(self.features(x) / self.steps)  # type: ignore[no-any-return]


def one_memory() -> nn.Module:
    net = Net()
    net.head.weight = nn.Parameter(torch.eye(4))
    net.head.register_parameter("again", nn.Parameter(net.head.weight.data))
    return net


def with_module_hook() -> nn.Module:
    net = Net()
    net.head.register_full_backward_hook(lambda module, given, output: None)
    return net


def with_parameter_hook() -> nn.Module:
    net = Net()
    net.head.weight.register_hook(lambda gradient: gradient * 2)
    return net


def cumulative() -> nn.Module:
    net = Net()
    net.norm = nn.BatchNorm2d(4, momentum=None)
    return net


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (HookInForward, "register_hook"),
        (Noisy, "random state"),
        (with_module_hook, "a backward hook on head"),
        (with_parameter_hook, "the parameter head.weight"),
        (cumulative, "momentum=None"),
        (Branches, "alone"),
        (Even, "alone"),
        (Counts, "steps"),
        (one_memory, "same memory"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
def test_refused(build: Callable[[], nn.Module], words: str, verify: bool, tmp_path: Path) -> None:
    model = tract_module(build().train(), layers=["first"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ExportError, match=words):
        export_training(model, IMAGES, tmp_path / "run", verify=verify)
    assert not list(tmp_path.iterdir())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (IMAGES[:, :1], "expected input.* to have 3 channels"),
        (IMAGES[..., :2], "Kernel size"),
        (IMAGES[0], "expected 4D input"),
        (IMAGES.long(), "long"),
        (IMAGES.double(), "double"),
        (IMAGES[:0], r"shape \(0, 3, 8, 8\).*empty"),
        ((IMAGES, LABELS), "not the arguments that the model takes"),
        ((), "not the arguments that the model takes"),
        ({"image": IMAGES}, "not the arguments that the model takes"),
        ((IMAGES.numpy(),), "ndarray"),
    ],
    ids="channels size dims int64 float64 empty two none name numpy".split(),
)
def test_a_batch_that_the_model_rejects(batch: Any, words: str, tmp_path: Path) -> None:
    model = tract_module(Net(), layers=["first"])
    with pytest.raises(InvalidBatchError, match=words) as caught:
        export_training(model, batch, tmp_path / "run")
    assert (caught.value.__cause__ is None) == ("empty" in words)
    assert caught.value.remedy.startswith("Give a ") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (LABELS[:3], "batch_size"),
        (LABELS.int(), "Int"),
        (LABELS + 1, "out of bounds"),
        (LABELS - 1, "out of bounds"),
        (LABELS.numpy(), "ndarray.*targets are tensors"),
        ((LABELS, LABELS), "takes one tensor"),
    ],
    ids="length int32 large negative numpy two".split(),
)
def test_labels_that_the_loss_rejects(targets: Any, words: str, tmp_path: Path) -> None:
    model = tract_module(Net(), layers=["first"])
    with pytest.raises(UnsupportedTrainingError, match=words):
        export_training(model, IMAGES, tmp_path / "run", example_targets=targets)


def test_optimizer_of_other_parameters(tmp_path: Path) -> None:
    model = tract_module(Net().train(), IMAGES)
    part = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with pytest.raises(UnsupportedTrainingError, match=r"first\.weight"):
        export_training(model, IMAGES, tmp_path / "run", optimizer=part)
    other = torch.optim.SGD([*model.parameters(), *Net().parameters()], lr=0.1)
    with pytest.raises(UnsupportedTrainingError, match="not the model's"):
        export_training(model, IMAGES, tmp_path / "run", optimizer=other)


def test_optimizer_under_a_scheduler(tmp_path: Path) -> None:
    model = tract_module(Net().train(), IMAGES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01)
    with pytest.raises(UnsupportedTrainingError, match="scheduler"):
        export_training(model, IMAGES, tmp_path / "run", optimizer=optimizer)


def test_a_model_in_evaluation_mode_is_named(tmp_path: Path) -> None:
    model = tract_module(Net(), IMAGES).eval()
    with pytest.warns(TractWarning, match="evaluation mode"):
        export_training(model, IMAGES, tmp_path / "run")
    assert not model.training


class InPlaceDropout(Net):
    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        kept = features * 1
        F.dropout(kept, 0.5, self.training, inplace=True)
        return self.head(kept + features)  # type: ignore[no-any-return]


class Chunked(Net):
    def forward(self, x: Tensor) -> Tensor:
        one, other = self.norm(self.first(x)).chunk(2, 1)
        gated = (one * torch.sigmoid(other)).mean((2, 3))
        return self.head(torch.cat([gated, gated], 1))  # type: ignore[no-any-return]


def test_dropout_in_place_drops(tmp_path: Path) -> None:
    export_training(
        tract_module(InPlaceDropout().train(), IMAGES),
        IMAGES,
        tmp_path / "run",
        optimizer=SGD(lr=0),
    )
    trainer = load_trainer(tmp_path / "run")
    losses = {trainer.train_step(IMAGES, LABELS) for _ in range(5)}
    assert len(losses) > 1
    assert len({trainer.evaluate(IMAGES, LABELS) for _ in range(3)}) == 1


OTHERS = (Chunked, OwnBackward, TrackedInstances, NormTwice, Detached, DropsAll, Padded)


@pytest.mark.parametrize("build", OTHERS)
def test_gradients_and_state_of(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """What PyTorch differentiates in a way of its own, or keeps."""
    model = tract_module(build().train(), layers=["first"])
    export_training(model, IMAGES, tmp_path / "run", optimizer=SGD(lr=0))
    trainer = load_trainer(tmp_path / "run")
    found = trainer.compute_gradients(IMAGES, LABELS)
    exact = model.double()
    F.cross_entropy(exact(IMAGES.double()), LABELS).backward()
    gradients = {n: p.grad.numpy() for n, p in exact.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = np.linalg.norm(found[name] - gradient)
        # float32; the bias before the norm has no gradient but rounding
        assert error <= 1e-5 * np.linalg.norm(gradient) + 1e-7, name
    trainer.train_step(IMAGES, LABELS)
    state = trainer.state_dict()
    for name, value in exact.named_buffers():
        torch.testing.assert_close(state[name].double(), value.double(), rtol=1e-5, atol=1e-6)


class NormOfVectors(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x).mean((2, 3)))  # type: ignore[no-any-return]


def smoothed(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, label_smoothing=0.1)


def focal(output: Tensor, target: Tensor) -> Tensor:
    return (F.cross_entropy(output, target, reduction="none") ** 2).mean()


@pytest.mark.parametrize(
    "loss", ["cross_entropy", smoothed, focal], ids=["plain", "smoothed", "focal"]
)
def test_batches_that_onnx_runtime_takes_silently(loss: Any, tmp_path: Path) -> None:
    """A batch of one makes the running variance NaN; an index of -1 is the last class."""
    export_training(
        tract_module(NormOfVectors().train(), IMAGES),
        IMAGES,
        tmp_path / "run",
        loss=loss,
        example_targets=LABELS,
    )
    trainer = load_trainer(tmp_path / "run")
    before = trainer.state_dict()
    with pytest.raises(InvalidBatchError, match="no variance"):
        trainer.train_step(IMAGES[:1], LABELS[:1])
    for wrong in (-1, 4):
        with pytest.raises(InvalidBatchError, match=f"class index {wrong}"):
            trainer.train_step(IMAGES, torch.where(LABELS == 1, wrong, LABELS))
    for name, value in trainer.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert np.isfinite(trainer.train_step(IMAGES, torch.where(LABELS == 1, -100, LABELS)))


class SingleIsAnother(Net):
    """`torch.export` takes for granted that an open size is not one."""

    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0 if x.shape[0] > 1 else 0.5
        return self.head(self.features(x) * scale)  # type: ignore[no-any-return]


def test_batches_of_one_are_verified(tmp_path: Path) -> None:
    model = tract_module(SingleIsAnother().train(), IMAGES)
    with pytest.raises(ExportError, match="the loss"):
        export_training(model, IMAGES, tmp_path / "run")
    assert not list(tmp_path.iterdir())


class BlackPixels(Net):
    def features(self, x: Tensor) -> Tensor:
        return F.relu6(self.first(x)).mean((2, 3))


def test_relu6_at_its_bound(tmp_path: Path) -> None:
    """PyTorch's gradient is zero there; that of ONNX Runtime's Clip is not."""
    net = BlackPixels()
    net.first = nn.Conv2d(3, 4, 3, bias=False)
    images = IMAGES.clone()
    images[:3] = 0
    model = tract_module(net.train(), images)
    export_training(model, images, tmp_path / "run")
    found = load_trainer(tmp_path / "run").compute_gradients(images, LABELS)
    F.cross_entropy(model(images), LABELS).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(torch.from_numpy(found[name]), parameter.grad)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"seed": "a"}, "seed='a'"),
        ({"seed": None}, "seed=None"),
        ({"seed": np.int64(3)}, "seed="),
        ({"loss_scale": 1024}, "loss_scale=1024.*init_scale=1024"),
        ({"loss_scale": "dynamic"}, "loss_scale='dynamic'"),
        ({"example_targets": 5}, "example targets of class int"),
    ],
    ids=str,
)
def test_options_of_another_kind(option: dict[str, Any], says: str, tmp_path: Path) -> None:
    """A seed of another kind was written, into a directory that could not be read."""
    model = tract_module(Net().train(), IMAGES)
    with pytest.raises(UnsupportedTrainingError, match=says):
        export_training(model, IMAGES, tmp_path / "run", target="onnxruntime", **option)
    assert not list(tmp_path.iterdir())

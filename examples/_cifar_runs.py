"""The runs of `cifar.py`: what each trains and how, and a training that can stop and go on."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _cifar_data import Crops, Images, standardise
from _cifar_models import FIRST_LAYER, ModelName, build
from tract_fx import tract_module

Precision = Literal["float32", "tf32", "bfloat16"]
TEST_BATCH = 1000


@dataclass(frozen=True)
class Recipe:
    """How a net is trained.

    Attributes:
        model: Which net.
        optimizer: Which optimizer; SGD has a momentum of 0.9.
        learning_rate: At its highest.
        weight_decay: As PyTorch's optimizer of that name takes it.
        label_smoothing: As `cross_entropy` takes it.
        warm_up: Share of the training in which the learning rate rises linearly.
        last: Learning rate at the end, as a share of the highest.
    """

    model: ModelName
    optimizer: Literal["sgd", "adam"]
    learning_rate: float
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    warm_up: float = 0.0
    last: float = 0.0


# ResNet-18 as in the authors' script and README, with the learning rates of their 100 and 200
# epochs; the ViT as in the table of the code that they name for it, where 5 epochs of 200 warm up.
RECIPES = {
    "resnet18-sgd": Recipe("resnet18", "sgd", 0.08),
    "resnet18-adam": Recipe("resnet18", "adam", 0.01),
    "vit-adam": Recipe("vit", "adam", 1e-3, 5e-5, 0.1, warm_up=5 / 200, last=0.01),
}


@dataclass(frozen=True)
class Settings:
    """What all runs of a call share beside their recipes.

    Attributes:
        batch_size: Images in a step; what is left of an epoch is left out.
        precision: Of convolutions and products.
        compiled: Whether `torch.compile` compiles the net for the training steps.
        width: Channels of the first layer; None for the net's own.
        image_size: Height and width that images are scaled to, in pixels.
        train_limit: Number of training images; 0 for all.
        test_limit: Number of test images; 0 for all.
    """

    batch_size: int = 128
    precision: Precision = "float32"
    compiled: bool = False
    width: int | None = None
    image_size: int = 32
    train_limit: int = 0
    test_limit: int = 0


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: Of the recipe.
        recipe: How it is trained.
        lambda_: TrAct's λ, None for the plain gradient.
        epochs: How many; the learning rate falls over all of them.
        seed: Of the initial weights, of the batches and of what is cut from the images.
        settings: The rest.
    """

    name: str
    recipe: Recipe
    lambda_: float | None
    epochs: int
    seed: int
    settings: Settings

    @property
    def file_name(self) -> str:
        """The name of its files, without a suffix."""
        arm = "plain" if self.lambda_ is None else f"tract{self.lambda_:g}"
        return f"{self.name}-{self.epochs:03}-{arm}-seed{self.seed}"

    def rate(self, progress: float) -> float:
        """Give the learning rate when a share of the training is behind."""
        recipe = self.recipe
        if progress < recipe.warm_up:
            return recipe.learning_rate * progress / recipe.warm_up
        share = (progress - recipe.warm_up) / (1 - recipe.warm_up)
        fallen = (1 + math.cos(math.pi * share)) / 2
        return recipe.learning_rate * (recipe.last + (1 - recipe.last) * fallen)


@dataclass
class Progress:
    """What a run has come to.

    Attributes:
        accuracies: Test accuracy after each epoch, in [0, 1].
        losses: Mean training loss of each epoch, None where it was not finite.
        seconds: Time of each epoch's training steps, without compilation, tests and files.
        devices: Names of the devices that it ran on, each once.
        weights: SHA-256 of parameters and buffers at the end, None before.
    """

    accuracies: list[float] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    weights: str | None = None


def plan(
    recipes: Mapping[str, Recipe],
    epochs: int,
    lambdas: Sequence[float],
    seeds: int,
    settings: Settings,
) -> list[Run]:
    """List the runs in an order that gives a fair picture early: seed by seed, the arms in turn.

    Args:
        recipes: By their names.
        epochs: The full number; half of it is trained too.
        lambdas: One arm of TrAct each, beside the plain gradient.
        seeds: How many.
        settings: What all runs share.

    Returns:
        Each arm at full and at half the epochs. First in a seed comes what is to be compared in the
        end: the plain gradient at full and TrAct at half.
    """
    half = epochs // 2
    arms = [
        (None, epochs),
        *((lambda_, half) for lambda_ in lambdas),
        *((lambda_, epochs) for lambda_ in lambdas),
        (None, half),
    ]
    return [
        Run(name, recipe, lambda_, length, seed, settings)
        for seed in range(seeds)
        for name, recipe in recipes.items()
        for lambda_, length in arms
    ]


class Training:
    """A run under way, all of whose state can be taken out after an epoch and put back."""

    def __init__(self, run: Run, images: Images, device: torch.device) -> None:
        """Build the net and optimizer as they are before the first step.

        Args:
            run: What to train.
            images: In the device's memory.
            device: Where.
        """
        self.run, self.images, self.device = run, images, device
        self.progress, settings = Progress(), run.settings
        torch.manual_seed(run.seed)
        plain = build(run.recipe.model, len(images.classes), images.train.shape[-1], settings.width)
        plain.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = plain
        if run.lambda_ is not None:
            layers = [FIRST_LAYER[run.recipe.model]]
            self.model = tract_module(plain, layers=layers, lambda_=run.lambda_)
        self.optimizer = _optimizer(self.model, run.recipe)
        self._crops = Crops(images.train)
        self._trained = torch.compile(self.model) if settings.compiled else self.model
        self._warm_up()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Give the training loss of a batch of bytes."""
        with self._autocast():
            scores = self._trained(standardise(images))
        smoothing = self.run.recipe.label_smoothing
        return F.cross_entropy(scores.float(), labels, label_smoothing=smoothing)

    def train_epoch(self) -> None:
        """Train an epoch and test.

        All that is random in it follows from the seed and the epoch's number, so that both arms of
        a seed see the same images, and a run that goes on sees those that it would have seen.
        """
        run, progress = self.run, self.progress
        done = len(progress.accuracies)
        generator = torch.Generator(self.device).manual_seed(1_000_000 * (run.seed + 1) + done)
        count, batch_size = len(self.images.train), run.settings.batch_size
        steps = count // batch_size
        order = torch.randperm(count, generator=generator, device=self.device)
        cuts = self._crops.draw(generator)
        self.model.train()
        total = torch.zeros((), device=self.device)
        start = self._clock()
        for step, chosen in enumerate(order[: steps * batch_size].split(batch_size)):
            for group in self.optimizer.param_groups:
                group["lr"] = run.rate((done + step / steps) / run.epochs)
            self.optimizer.zero_grad()
            loss = self.loss(self._crops.batch(chosen, cuts), self.images.train_labels[chosen])
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
        progress.seconds.append(self._clock() - start)
        mean = total.item() / steps
        progress.losses.append(mean if math.isfinite(mean) else None)
        progress.accuracies.append(self._accuracy())
        name = _name(self.device)
        progress.devices += [name] if name not in progress.devices else []
        if len(progress.accuracies) == run.epochs:
            progress.weights = digest(self.model)

    def state(self) -> dict[str, Any]:
        """Give all that the run needs to go on."""
        return {
            "progress": vars(self.progress),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.progress = Progress(**state["progress"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def _accuracy(self) -> float:
        self.model.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        splits = (t.split(TEST_BATCH) for t in (self.images.test, self.images.test_labels))
        for images, labels in zip(*splits, strict=True):
            with self._autocast():
                scores = self.model(standardise(images))
            right += (scores.argmax(1) == labels).sum()
        return right.item() / len(self.images.test)

    def _warm_up(self) -> None:
        """Compile and choose kernels before the time is taken; weights and averages stay."""
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        size = self.run.settings.batch_size
        self.model.train()
        for _ in range(2):
            self.loss(self.images.train[:size], self.images.train_labels[:size]).backward()
        self.model.load_state_dict(before)
        self.optimizer.zero_grad()

    def _autocast(self) -> torch.autocast:
        low = self.run.settings.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=low)

    def _clock(self) -> float:
        """Read the clock once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """Let CUDA's products and convolutions of float32 use TF32 for a while, or not."""
    convolutions = getattr(torch.backends.cudnn, "conv")  # noqa: B009 (mypy does not see it)
    backends = (torch.backends.cuda.matmul, convolutions)
    before = [backend.fp32_precision for backend in backends], torch.backends.cudnn.benchmark
    for backend in backends:
        backend.fp32_precision = "ieee" if precision == "float32" else "tf32"
    # All batches have one shape: cuDNN may choose by trying out.
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        for backend, value in zip(backends, before[0], strict=True):
            backend.fp32_precision = value
        torch.backends.cudnn.benchmark = before[1]


def digest(model: nn.Module) -> str:
    """Give the SHA-256 of a model's parameters and buffers."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), rate, weight_decay=decay)
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=decay)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

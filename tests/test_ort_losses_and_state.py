"""Exported training against PyTorch: every kind of loss, and every kind of state."""

from __future__ import annotations

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

from ort_reference import (
    Exported,
    assert_gradients,
    assert_same_state,
    export,
    labels,
    relative,
    seeded,
    treated,
)
from tract_fx import tract_module, tract_pass
from tract_fx.errors import ExportError, NoInputLayerError, TractError
from tract_fx.export.torch_graphs import arrays
from tract_fx.export.training_session import TrainingSession
from tract_fx.passes import remove_tract_onnx, tract_onnx_pass

CLASSES = 5
FEATURES = 9


def rows(batch: int, seed: int = 0) -> Tensor:
    """Noise with a mean: (batch, 9)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, FEATURES, generator=generator) + 0.3


def targets_like(batch: int, seed: int = 7) -> Tensor:
    """(batch, 5), away from the model's outputs, where the L1 loss has its corner."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CLASSES, generator=generator).sign() * 3


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, CLASSES))


class Structured(nn.Module):
    """Returns what `arrange` makes of class scores and a reconstruction."""

    def __init__(self, arrange: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 7)
        self.scores = nn.Linear(7, CLASSES)
        self.back = nn.Linear(7, FEATURES)
        self.arrange = arrange

    def forward(self, x: Tensor) -> Any:
        y = torch.tanh(self.first(x))
        return self.arrange(self.scores(y), self.back(y))


def as_dict(scores: Tensor, back: Tensor) -> dict[str, Any]:
    return {"scores": scores, "more": {"back": back}}


def as_tuple(scores: Tensor, back: Tensor) -> tuple[Tensor, list[Tensor]]:
    return scores, [back]


def dict_loss(output: dict[str, Any], y: Tensor, x: Tensor) -> Tensor:
    distance = functional.mse_loss(output["more"]["back"], x)
    return functional.cross_entropy(output["scores"], y) + 0.5 * distance


def tuple_loss(output: tuple[Tensor, list[Tensor]], y: Tensor, x: Tensor) -> Tensor:
    return dict_loss(as_dict(output[0], output[1][0]), y, x)


WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0])


class Weighted(nn.Module):
    """Cross entropy with class weights, which are cast to the scores' dtype."""

    def forward(self, scores: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(scores, y, WEIGHTS.to(scores.dtype))


def focal(scores: Tensor, y: Tensor) -> Tensor:
    """A loss that has no name."""
    logs = functional.log_softmax(scores, -1).gather(1, y[:, None])[:, 0]
    return (-((1 - logs.exp()) ** 2) * logs).mean()


# The loss as it is given, in PyTorch, and targets for a batch size; test_onnx_losses.py has more.
Case = tuple[Any, Callable[..., Tensor], Callable[[int], Tensor]]
CASES: dict[str, Case] = {
    "cross_entropy": ("cross_entropy", functional.cross_entropy, labels),
    "weights-and-smoothing": (
        nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1),
        lambda scores, y: functional.cross_entropy(
            scores, y, WEIGHTS.to(scores.dtype), label_smoothing=0.1
        ),
        labels,
    ),
    "mse": ("mse", functional.mse_loss, targets_like),
    "callable": (focal, focal, labels),
}


def class_labels(make: Callable[[int], Tensor], size: int) -> Tensor:
    return labels(size, CLASSES) if make is labels else make(size)


def assert_trains(exported: Exported, *given: tuple[Any, ...], lr: float = 0.1) -> None:
    """Gradients, then four steps over the batches, their losses, and what is evaluated."""
    for batch in given:
        found = exported.trainer().compute_gradients(*batch)
        assert_gradients(found, exported.gradients(*batch))
    trainer, run = exported.trainer(), exported.run(partial(torch.optim.SGD, lr=lr))
    for step in range(4):
        batch = given[step % len(given)]
        assert trainer.train_step(*batch) == pytest.approx(run.step(*batch), rel=1e-5)
    assert_same_state(trainer, run, 1e-5)
    run.model.eval()
    with torch.no_grad():
        expected = float(exported.loss_of(run.model, *given[0]))
    assert trainer.evaluate(*given[0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_losses(name: str, tmp_path: Path) -> None:
    loss, reference, make = CASES[name]
    needs = {"example_targets": class_labels(make, 4)} if name == "callable" else {}
    model = treated(seeded(small))
    exported = export(model, rows(4), tmp_path / "a", loss=loss, reference=reference, **needs)
    sizes = (12, 3)  # more rows than columns, and fewer
    assert_trains(exported, *((rows(n, n), class_labels(make, n)) for n in sizes))


@pytest.mark.parametrize(
    ("arrange", "loss"), [(as_dict, dict_loss), (as_tuple, tuple_loss)], ids=["dict", "tuple"]
)
def test_a_callable_takes_what_the_model_returns(
    arrange: Callable[..., Any], loss: Callable[..., Tensor], tmp_path: Path
) -> None:
    model = tract_module(seeded(lambda: Structured(arrange)), rows(4))
    example = (labels(4, CLASSES), rows(4))
    exported = export(
        model, rows(4), tmp_path / "a", loss=loss, reference=loss, example_targets=example
    )
    given = [(rows(n, n), labels(n, CLASSES), rows(n, n)) for n in (12, 3)]
    assert_trains(exported, *given)
    outputs = exported.trainer().predict(rows(3))
    assert [output.shape for output in outputs] == [(3, CLASSES), (3, FEATURES)]


def test_an_output_can_be_named(tmp_path: Path) -> None:
    model = tract_module(seeded(lambda: Structured(as_dict)), rows(4))
    exported = export(
        model,
        rows(4),
        tmp_path / "a",
        output="scores",
        reference=lambda output, y: functional.cross_entropy(output["scores"], y),
    )
    batch = (rows(6), labels(6, CLASSES))
    found = exported.trainer().compute_gradients(*batch)
    expected = exported.gradients(*batch)
    for name, value in expected.items():
        assert relative(found[name], value) < 1e-5, name
    assert not any(found[name].any() for name in found.keys() - expected.keys())


class OwnLoss(nn.Module):
    """Returns its loss beside its scores, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 7)
        self.last = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        scores = self.last(torch.tanh(self.first(x)))
        loss = functional.cross_entropy(scores, y, label_smoothing=0.1)
        return {"scores": scores, "loss": loss + 0.01 * (self.first.weight**2).sum()}


def test_a_model_that_returns_its_loss(tmp_path: Path) -> None:
    """With a penalty of the treated weight in it, on which TrAct is not."""
    model = tract_module(seeded(OwnLoss), (rows(4), labels(4, CLASSES)), layers=["first"])
    exported = export(
        model,
        (rows(4), labels(4, CLASSES)),
        tmp_path / "a",
        loss=None,
        reference=lambda output: output["loss"],
    )
    trainer = exported.trainer()
    assert trainer.manifest.targets == () and trainer.manifest.outputs == ("scores",)
    assert_trains(exported, *((rows(n, n), labels(n, CLASSES)) for n in (12, 3)))
    assert trainer.predict(rows(3)).shape == (3, CLASSES)  # type: ignore[union-attr]


class LossAlone(OwnLoss):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, y)["loss"]


def test_a_model_that_returns_its_loss_alone(tmp_path: Path) -> None:
    """It is verified too: its evaluation graph has no predictions to run for."""
    batch = rows(4), labels(4, CLASSES)
    model = tract_module(seeded(LossAlone), batch, layers=["first"])
    exported = export(
        model, batch, tmp_path / "a", loss=None, verify=True, reference=lambda output: output
    )
    assert exported.trainer().manifest.outputs == ()
    assert_trains(exported, *((rows(n, n), labels(n, CLASSES)) for n in (12, 3)))


# --- state --------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Constants of several dtypes, a frozen and an unused parameter, BatchNorm of any settings."""

    mean: Tensor
    places: Tensor
    mask: Tensor
    nothing: Tensor

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(-1, 1, FEATURES))
        self.register_buffer("places", torch.tensor([3, 1, 0, 2, 4, 6, 5]))
        self.register_buffer("mask", torch.tensor([True, False, True, True, True, True, True]))
        self.register_buffer("nothing", torch.ones(2))
        self.register_buffer("transient", torch.full((7,), 0.3), persistent=False)
        self.first = nn.Linear(FEATURES, 7, bias=False)
        self.norm = nn.BatchNorm1d(7) if norm is None else norm
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 7), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.embedding = nn.Embedding(7, 7)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.first(x - self.mean))) * self.scale
        y = y * self.mask + self.embedding(self.places).mean(0) + self.transient
        logits: Tensor = self.head(y[:, self.places])
        return logits


NORMS: dict[str, Callable[[], nn.Module]] = {
    "momentum-and-eps": lambda: nn.BatchNorm1d(7, momentum=0.37, eps=1e-2),
    "no-statistics": lambda: nn.BatchNorm1d(7, track_running_stats=False),
    "momentum-one": lambda: nn.BatchNorm1d(7, momentum=1.0),
}


@pytest.mark.parametrize("name", NORMS)
def test_state(name: str, tmp_path: Path) -> None:
    """Gradients, steps, every tensor of the state_dict, and the way back, strictly."""
    model = tract_module(seeded(lambda: Stateful(NORMS[name]())), rows(4))
    exported = export(model, rows(4), tmp_path / "a")
    given = [(rows(n, n), labels(n, CLASSES)) for n in (12, 4)]
    for batch in given:
        found, expected = exported.trainer().compute_gradients(*batch), exported.gradients(*batch)
        assert_gradients(found, expected)
    trainer, run = exported.trainer(), exported.run(partial(torch.optim.SGD, lr=0.1))
    for step in range(4):
        loss = run.step(*given[step % 2])
        assert trainer.train_step(*given[step % 2]) == pytest.approx(loss, rel=1e-5)
    assert_same_state(trainer, run, 1e-5)
    # In evaluation mode, where without statistics the batch's own are used.
    x = rows(5)
    assert relative(trainer.predict(x), run.predict(x)) < 1e-5
    back = seeded(lambda: Stateful(NORMS[name]()), seed=3)
    back.load_state_dict(trainer.state_dict())
    with torch.no_grad():
        assert relative(trainer.predict(x), back.eval()(x)) < 1e-5
    fresh = exported.trainer()
    fresh.load_state_dict(back.state_dict())
    np.testing.assert_array_equal(fresh.predict(x), trainer.predict(x))


def test_constants_of_another_model_are_refused(tmp_path: Path) -> None:
    """The graph holds them as constants: taking others in silently would train another model."""
    exported = export(tract_module(seeded(Stateful), rows(4)), rows(4), tmp_path / "a")
    state = exported.trainer().state_dict()
    state["mean"] = state["mean"] + 1
    with pytest.raises(TractError, match="mean"):
        exported.trainer().load_state_dict(state)


class Counting(nn.Module):
    """Keeps a state of its own."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.net = small()

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.mean()
        logits: Tensor = self.net(x) + self.seen
        return logits


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "cumulative-average": lambda: nn.Sequential(
        nn.Linear(FEATURES, 7), nn.BatchNorm1d(7, momentum=None), nn.Linear(7, CLASSES)
    ),
    "float64": lambda: small().double(),
    "bfloat16": lambda: small().bfloat16(),
}


def spectral() -> nn.Module:
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(FEATURES, 7))
    return nn.Sequential(first, nn.Linear(7, CLASSES))


@pytest.mark.parametrize("build", [Counting, spectral])
def test_other_states_than_statistics(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Buffers that a forward pass changes are those of PyTorch's training."""
    exported = export(tract_module(seeded(build), rows(4)), rows(4), tmp_path / "a")
    trainer, run = exported.trainer(), exported.run(partial(torch.optim.SGD, lr=0.1))
    for n in (12, 4, 12):
        batch = rows(n, n), labels(n, CLASSES)
        assert trainer.train_step(*batch) == pytest.approx(run.step(*batch), rel=1e-5)
    assert_same_state(trainer, run, 1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    """By name, before anything is written."""
    net = seeded(REFUSED[name])
    x = rows(4).to(next(net.parameters()).dtype)
    with pytest.raises(TractError):
        export(tract_module(net, x), x, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_spectral_norm_that_rests(tmp_path: Path) -> None:
    """In evaluation mode it changes no buffer, and is a part of the graph."""
    net = seeded(spectral)
    for module in net.modules():
        if isinstance(module, nn.utils.parametrizations._SpectralNorm):
            module.eval()
    exported = export(tract_module(net, rows(4)), rows(4), tmp_path / "a")
    assert_trains(exported, *((rows(n, n), labels(n, CLASSES)) for n in (12, 3)))


def test_weight_norm_on_a_linear_first_layer(tmp_path: Path) -> None:
    """TrAct on the computed weight's gradient, then the chain rule to magnitude and direction."""

    def build() -> nn.Module:
        first = nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, 7))
        return nn.Sequential(first, nn.Tanh(), nn.Linear(7, CLASSES))

    exported = export(tract_module(seeded(build), rows(4)), rows(4), tmp_path / "a")
    assert_trains(exported, *((rows(n, n), labels(n, CLASSES)) for n in (12, 3)))


def test_a_plain_export_of_a_rewritten_model_is_plain(tmp_path: Path) -> None:
    """And one with TrAct is not."""
    model = tract_pass(torch.fx.symbolic_trace(seeded(small)))
    batch = (rows(6), labels(6, CLASSES))
    taken_out = export(model, rows(4), tmp_path / "a", plain=True)
    found = taken_out.trainer().compute_gradients(*batch)
    plain = Exported(seeded(small), taken_out.directory, taken_out.loss, 1)
    assert_gradients(found, plain.gradients(*batch))
    assert relative(taken_out.gradients(*batch)["0.weight"], found["0.weight"]) > 0.1
    with pytest.raises(NoInputLayerError):
        export(seeded(small), rows(4), tmp_path / "c")


@pytest.mark.parametrize("first", ["linear", "conv"])
def test_a_plain_export_can_be_rewritten(first: str, tmp_path: Path) -> None:
    """As a training graph of whoever's, and back."""

    def build() -> nn.Module:
        layer = nn.Linear(FEATURES, 7) if first == "linear" else nn.Conv1d(1, 4, 3)
        last = nn.Linear(7 if first == "linear" else 4 * (FEATURES - 2), CLASSES)
        return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), last)

    x, y = rows(6), labels(6, CLASSES)
    x = x if first == "linear" else x[:, None]
    net = seeded(build)
    plain = export(net, x[:4], tmp_path / "a", plain=True)
    rewritten = tract_onnx_pass(tmp_path / "a" / "training_model.onnx", lambda_=0.3)
    treated_ = export(tract_module(seeded(build), x, lambda_=0.3), x[:4], tmp_path / "b")
    feeds = arrays({"input": x, "target": y})
    state = {name: value.numpy() for name, value in plain.trainer().state_dict().items()}
    for graph, exported in (
        (rewritten, treated_),
        (remove_tract_onnx(rewritten), plain),
        (remove_tract_onnx(tmp_path / "b" / "training_model.onnx"), plain),
    ):
        _, found, _ = TrainingSession(ir.from_proto(graph)).run(feeds, state)
        assert_gradients(found, exported.gradients(x, y))


class Named(nn.Module):
    """Names that the exporter gives to values, or the loss to its targets, or an output has."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("mean", torch.linspace(-1, 1, CLASSES))
        self.target = nn.Parameter(torch.ones(CLASSES))
        self.output = nn.Parameter(torch.linspace(0, 1, CLASSES))
        self.tanh = nn.Parameter(torch.linspace(1, 2, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x)) * self.tanh
        return y.mean(1, keepdim=True) * self.mean + y * self.target + self.output


def test_names_that_several_things_have(tmp_path: Path) -> None:
    exported = export(tract_module(seeded(Named), rows(4)), rows(4), tmp_path / "a")
    assert exported.trainer().manifest.outputs == ("output_output",)
    assert_trains(exported, *((rows(n, n), labels(n, CLASSES)) for n in (12, 3)))


def test_outputs_are_called_as_the_model_calls_them(tmp_path: Path) -> None:
    """Also where the exporter has called another value so."""

    def arrange(scores: Tensor, back: Tensor) -> dict[str, Tensor]:
        return {"mean": back.mean(1).tanh(), "linear": scores}

    def loss(output: dict[str, Tensor], y: Tensor) -> Tensor:
        return functional.cross_entropy(output["linear"], y) + output["mean"].mean()

    model = tract_module(seeded(lambda: Structured(arrange)), rows(4))
    exported = export(
        model,
        rows(4),
        tmp_path / "a",
        loss=loss,
        reference=loss,
        example_targets=labels(4, CLASSES),
    )
    assert exported.trainer().manifest.outputs == ("mean", "linear")
    assert_trains(exported, *((rows(n, n), labels(n, CLASSES)) for n in (12, 3)))


class Clashing(nn.Module):
    """An argument and a parameter of one name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, CLASSES)
        self.scale = nn.Parameter(torch.ones(CLASSES))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        logits: Tensor = self.first(x) * self.scale * scale
        return logits


def test_an_argument_called_like_a_parameter_is_refused(tmp_path: Path) -> None:
    example = (rows(4), torch.ones(4, CLASSES))
    model = tract_module(seeded(Clashing), example, layers=["first"])
    with pytest.raises(ExportError, match="scale"):
        export(model, example, tmp_path / "a")

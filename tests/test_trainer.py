"""A trainer over artifacts: its numbers, its state, what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

ort = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime Training")
pytest.importorskip("onnxruntime.training.api", reason="needs ONNX Runtime Training")

from forked import run_script  # noqa: E402
from ort_artifacts import BATCH, CLASSES, ConvNet, Mlp, batches, build, replace_file  # noqa: E402
from tract_fx import ort_training  # noqa: E402
from tract_fx.artifacts.manifest import TensorSpec  # noqa: E402
from tract_fx.artifacts.optimizers import SGD, AdamW  # noqa: E402
from tract_fx.errors import (  # noqa: E402
    DamagedArtifactsError,
    FailedRunError,
    InvalidBatchError,
    MissingRuntimeError,
    NonFiniteLossWarning,
    StateMismatchError,
    TractWarning,
    TrainerStateError,
    UnsupportedTrainingError,
)
from tract_fx.trainers import OrtTrainer, load_trainer  # noqa: E402

TESTS = Path(__file__).parent
# float32 against float64 over a few steps of a small net: rounding is 6e-8 per operation.
CLOSE = 2e-6


def make(net: type[nn.Module], *, dropout: float | None = None) -> nn.Module:
    torch.manual_seed(0)
    return net() if dropout is None else net(dropout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts that tests read: mlp, conv (dropout and BatchNorm), every, by three batches."""
    folder = tmp_path_factory.mktemp("artifacts")
    build(folder / "mlp", make(Mlp), SGD(lr=0.1))
    build(folder / "conv", make(ConvNet), AdamW(lr=1e-2))
    build(folder / "every", make(Mlp), SGD(lr=0.1, accumulate=3))
    build(folder / "every_conv", make(ConvNet), SGD(lr=0.1, accumulate=2))
    return folder


def snapshot(trainer: OrtTrainer) -> dict[str, torch.Tensor]:
    """All that can be seen of a trainer's state."""
    counts = {"updates": trainer.updates, "batches": trainer.batches}
    return trainer.state_dict() | {k: torch.tensor(v) for k, v in counts.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def torch_loss(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(net(x.double()), y)


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        (SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        (
            SGD(lr=0.1, momentum=0.9, weight_decay=0.01),
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        ),
        (AdamW(lr=1e-2), lambda p: torch.optim.AdamW(p, lr=1e-2)),
    ],
    ids=["sgd", "momentum", "adamw"],
)
def test_losses_and_weights_follow_torch(
    settings: SGD | AdamW, reference: Callable[[Any], torch.optim.Optimizer], tmp_path: Path
) -> None:
    net = make(Mlp)
    build(tmp_path / "a", net, settings)
    trainer = load_trainer(tmp_path / "a")
    net = copy.deepcopy(net).double()
    optimizer = reference(net.parameters())
    for x, y in batches(net, 5):
        optimizer.zero_grad()
        loss = torch_loss(net, x, y)
        loss.backward()
        optimizer.step()
        assert trainer.train_step(x, y) == pytest.approx(loss.item(), rel=CLOSE)
    for name, value in trainer.state_dict().items():
        # AdamW's first steps are ±lr whatever a gradient's size, so rounding shows in full.
        torch.testing.assert_close(
            value.double(), net.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name
        )
    assert trainer.updates == trainer.batches == 5


def test_accumulated_batches_are_one_batch(folder: Path) -> None:
    trainer = load_trainer(folder / "every")
    net = make(Mlp).double()
    parts = batches(net, 3)
    x, y = (torch.cat(column) for column in zip(*parts, strict=True))
    torch_loss(net, x, y).backward()
    start = trainer.state_dict()
    for i, part in enumerate(parts):
        assert equal(trainer.state_dict(), start), i
        trainer.train_step(*part)
    assert (trainer.updates, trainer.batches) == (1, 3)
    summed = trainer.gradients()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        moved = (start[name] - trainer.state_dict()[name]).double()
        torch.testing.assert_close(moved, 0.1 * parameter.grad, rtol=1e-4, atol=1e-7)
        wanted = 3 * parameter.grad.numpy()
        np.testing.assert_allclose(summed[name], wanted, rtol=1e-4, atol=1e-7)


def test_gradients_without_an_update(folder: Path) -> None:
    """Those of float64, those of the next step, and nothing else changes."""
    trainer = load_trainer(folder / "mlp")
    net = make(Mlp).double()
    ((x, y),) = batches(net, 1)
    torch_loss(net, x, y).backward()
    found = trainer.compute_gradients(x, y)
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        np.testing.assert_allclose(found[name], parameter.grad.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["mlp", "conv", "every_conv"])
def test_gradients_are_those_of_the_next_step(folder: Path, name: str) -> None:
    """Dropout's masks included, within an accumulation too; running statistics stay."""
    trainer, other = load_trainer(folder / name), load_trainer(folder / name)
    gathered: dict[str, Any] = {}
    for batch in batches(ConvNet() if "conv" in name else Mlp(), 4):
        before = snapshot(trainer)
        found = trainer.compute_gradients(*batch)
        assert equal(snapshot(trainer), before)
        if trainer.batches % trainer.manifest.optimizer.accumulate == 0:
            gathered = {key: np.zeros_like(value) for key, value in found.items()}
        gathered = {key: gathered[key] + value for key, value in found.items()}
        assert trainer.train_step(*batch) == other.train_step(*batch)
        assert all(np.array_equal(v, gathered[k]) for k, v in trainer.gradients().items())
    assert equal(snapshot(trainer), snapshot(other))


def test_gradients_stay_after_a_further_call(folder: Path) -> None:
    """What is handed out is a copy, not ONNX Runtime's memory."""
    trainer = load_trainer(folder / "mlp")
    first, second = batches(Mlp(), 2)
    trainer.train_step(*first)
    gradients, weights = trainer.gradients(), trainer.state_dict()
    kept = {k: v.copy() for k, v in gradients.items()}, {k: v.clone() for k, v in weights.items()}
    trainer.train_step(*second)
    assert all(np.array_equal(v, kept[0][k]) for k, v in gradients.items())
    assert equal(weights, kept[1])
    weights["first.weight"].zero_()
    assert trainer.state_dict()["first.weight"].abs().sum() > 0


def test_no_gradients_before_a_step(folder: Path) -> None:
    trainer = load_trainer(folder / "mlp")
    with pytest.raises(TrainerStateError, match="no train_step before it"):
        trainer.gradients()


def test_predictions_are_the_torch_models(folder: Path) -> None:
    """After each update, with dropout off and running statistics in use."""
    trainer = load_trainer(folder / "conv")
    net = make(ConvNet)
    for x, y in batches(net, 3):
        trainer.train_step(x, y)
        net.load_state_dict(trainer.state_dict())
        wanted = net.double().eval()(x.double()).detach()
        net.float()
        before = snapshot(trainer)
        predicted = trainer.predict(x)
        assert isinstance(predicted, np.ndarray)
        np.testing.assert_allclose(predicted, wanted, rtol=1e-4, atol=1e-5)
        loss = float(nn.functional.cross_entropy(wanted, y))
        assert trainer.evaluate(x, y) == pytest.approx(loss, rel=1e-5)
        assert equal(snapshot(trainer), before)
    assert int(net.norm.num_batches_tracked) == 3  # type: ignore[union-attr, arg-type]


def test_counters_start_where_the_model_was(tmp_path: Path) -> None:
    net = make(ConvNet)
    net(batches(net, 1)[0][0])
    build(tmp_path / "a", net)
    trainer = load_trainer(tmp_path / "a")
    trainer.train_step(*batches(net, 1)[0])
    assert trainer.state_dict()["norm.num_batches_tracked"].item() == 2


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    net = make(Mlp)
    build(tmp_path / "a", net, AdamW(lr=0.1), frozen=("first.weight",))
    trainer = load_trainer(tmp_path / "a")
    for batch in batches(net, 3):
        trainer.train_step(*batch)
    state = trainer.state_dict()
    assert torch.equal(state["first.weight"], net.state_dict()["first.weight"])
    assert not torch.equal(state["first.bias"], net.state_dict()["first.bias"])
    assert "first.weight" not in trainer.gradients()


# --- learning rate ------------------------------------------------------------------------------


def test_learning_rate(folder: Path, tmp_path: Path) -> None:
    trainer = load_trainer(folder / "mlp")
    batch = batches(Mlp(), 1)[0]
    assert trainer.learning_rate == 0.1
    trainer.learning_rate = 0
    before = trainer.state_dict()
    trainer.train_step(*batch)
    assert equal(trainer.state_dict(), before)
    trainer.learning_rate = 0.025
    trainer.save(tmp_path / "b")
    resumed = load_trainer(tmp_path / "b")
    assert resumed.learning_rate == 0.025
    resumed.train_step(*batch)
    moved = before["first.weight"] - resumed.state_dict()["first.weight"]
    wanted = 0.025 * torch.from_numpy(resumed.gradients()["first.weight"])
    torch.testing.assert_close(moved, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "rate", [-1e-3, float("nan"), float("inf"), 1e39, None, "a", True, np.ones(2), torch.ones(2)]
)
def test_impossible_learning_rates(folder: Path, rate: Any) -> None:
    trainer = load_trainer(folder / "mlp")
    with pytest.raises(UnsupportedTrainingError, match="learning_rate="):
        trainer.learning_rate = rate
    assert trainer.learning_rate == 0.1


# --- random numbers -----------------------------------------------------------------------------


def test_masks_differ_from_batch_to_batch(folder: Path) -> None:
    trainer = load_trainer(folder / "conv")
    trainer.learning_rate = 0
    batch = batches(ConvNet(), 1)[0]
    losses = {trainer.train_step(*batch) for _ in range(6)}
    assert len(losses) == 6


def test_seed(folder: Path) -> None:
    batch = batches(ConvNet(), 1)[0]
    same = [load_trainer(folder / "conv", seed=s).train_step(*batch) for s in (17, 17, 18)]
    assert same[0] == same[1] != same[2]
    assert load_trainer(folder / "conv").train_step(*batch) == same[0]  # 17 is the directory's
    with pytest.raises(UnsupportedTrainingError, match="seed="):
        load_trainer(folder / "conv", seed=1.5)  # type: ignore[arg-type]


def test_trainers_do_not_disturb_each_other(folder: Path) -> None:
    """Nor does anybody else who uses the process's generator in between."""
    train = batches(ConvNet(), 3)
    alone = load_trainer(folder / "conv")
    wanted = [alone.train_step(*batch) for batch in train]
    one, two = load_trainer(folder / "conv"), load_trainer(folder / "conv", seed=5)
    found = []
    for batch in train:
        found.append(one.train_step(*batch))
        two.train_step(*batch)
        ort.set_seed(3)
        two.compute_gradients(*batch)
    assert found == wanted


def test_operators_with_generators_of_their_own_are_said(tmp_path: Path) -> None:
    manifest = build(tmp_path / "a", make(Mlp))
    model = onnx.load(tmp_path / "a" / "training_model.onnx")
    noise = onnx.helper.make_node("RandomNormalLike", ["x"], ["unused_noise"])
    model.graph.node.append(noise)
    altered = model.SerializeToString()
    replace_file(tmp_path / "a", manifest, "training_model.onnx", altered)
    with pytest.warns(TractWarning, match="RandomNormalLike in the training graph"):
        load_trainer(tmp_path / "a")


# --- save, load ---------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [Mlp, ConvNet])
@pytest.mark.parametrize(
    "settings", [AdamW(lr=1e-2), SGD(lr=0.05, momentum=0.9, accumulate=2)], ids=["adamw", "sgd"]
)
def test_resumed_in_another_process(
    net: type[nn.Module], settings: SGD | AdamW, tmp_path: Path
) -> None:
    """Bit for bit the uninterrupted run: moments, statistics, dropout, the learning rate."""
    build(tmp_path / "start", make(net), settings)
    trainer = load_trainer(tmp_path / "start")
    for i, batch in enumerate(batches(net(), 8)):
        if i == 2:
            trainer.learning_rate = 3e-3
        if i == 4:
            trainer.save(tmp_path / "half")
        trainer.train_step(*batch)
    arguments = [net.__name__, str(tmp_path / "half"), "4", "8", str(tmp_path / "end")]
    ran = run_script(TESTS / "resumed_run.py", *arguments)
    assert ran.returncode == 0, ran.stderr
    resumed = load_trainer(tmp_path / "end")
    assert equal(snapshot(resumed), snapshot(trainer))
    assert resumed.learning_rate == 3e-3
    # Moments are compared by what they do next.
    for batch in batches(net(), 4, seed=1):
        assert resumed.train_step(*batch) == trainer.train_step(*batch)
    assert equal(snapshot(resumed), snapshot(trainer))


def test_going_back(folder: Path, tmp_path: Path) -> None:
    trainer = load_trainer(folder / "conv")
    first, second = batches(ConvNet(), 2)
    trainer.train_step(*first)
    trainer.save(tmp_path / "a")
    after_one = snapshot(trainer)
    loss = trainer.train_step(*second)
    trainer.load(tmp_path / "a")
    assert equal(snapshot(trainer), after_one)
    with pytest.raises(TrainerStateError):
        trainer.gradients()
    before = trainer.predict(first[0])
    assert trainer.train_step(*second) == loss
    assert not np.array_equal(trainer.predict(first[0]), before)  # follows what was loaded


def test_saved_without_the_first_directory(tmp_path: Path) -> None:
    build(tmp_path / "a", make(Mlp))
    trainer = load_trainer(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    trainer.save(tmp_path / "b")
    trainer.train_step(*batches(Mlp(), 1)[0])
    trainer.save(tmp_path / "b", overwrite=True)
    assert equal(snapshot(load_trainer(tmp_path / "b")), snapshot(trainer))


def test_other_models_are_not_loaded(folder: Path) -> None:
    trainer = load_trainer(folder / "mlp")
    trainer.train_step(*batches(Mlp(), 1)[0])
    before = snapshot(trainer)
    for other in ("conv", "every"):
        with pytest.raises(DamagedArtifactsError, match="not the graph that this trainer runs"):
            trainer.load(folder / other)
        assert equal(snapshot(trainer), before)


def test_nothing_is_saved_within_an_update(folder: Path, tmp_path: Path) -> None:
    trainer = load_trainer(folder / "every")
    first, *rest = batches(Mlp(), 3)
    trainer.train_step(*first)
    with pytest.raises(TrainerStateError, match="after 1 of an update's 3 micro-batches"):
        trainer.save(tmp_path / "a")
    with pytest.raises(TrainerStateError, match="Call train_step 2 times more"):
        trainer.load_state_dict(trainer.state_dict())
    assert not list(tmp_path.iterdir())
    for batch in rest:
        trainer.train_step(*batch)
    trainer.save(tmp_path / "a")


def test_state_goes_back_and_forth(folder: Path) -> None:
    one, two = load_trainer(folder / "conv"), load_trainer(folder / "conv")
    train = batches(ConvNet(), 3)
    one.train_step(*train[0])
    net = make(ConvNet)
    net.load_state_dict(one.state_dict())
    two.load_state_dict(net.state_dict())
    assert equal(two.state_dict(), one.state_dict())
    two.load_state_dict({key: value.numpy() for key, value in net.state_dict().items()})
    assert equal(two.state_dict(), one.state_dict())
    assert two.evaluate(*train[1]) == one.evaluate(*train[1])
    assert np.array_equal(two.predict(train[1][0]), one.predict(train[1][0]))


BAD_STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no 'head.bias'": lambda s: s.pop("head.bias"),
    "no 'norm.num_batches_tracked'": lambda s: s.pop("norm.num_batches_tracked"),
    "'head.bias' is a MaskedArray": lambda s: s.update(
        {"head.bias": np.ma.masked_invalid(s["head.bias"].numpy())}
    ),
    "an unknown 'more'": lambda s: s.update(more=torch.zeros(1)),
    "'first.weight' is float32 (6, 27)": lambda s: s.update({"first.weight": torch.zeros(6, 27)}),
    "'head.bias' is float64": lambda s: s.update({"head.bias": torch.zeros(5).double()}),
    "'head.bias' is a bfloat16": lambda s: s.update({"head.bias": torch.zeros(5).bfloat16()}),
    "'head.bias' is a list": lambda s: s.update({"head.bias": [0.0] * 5}),
    "tracked' is int32": lambda s: s.update({"norm.num_batches_tracked": torch.tensor(1).int()}),
}


@pytest.mark.parametrize("message", BAD_STATES)
def test_states_of_other_models(folder: Path, message: str) -> None:
    trainer = load_trainer(folder / "conv")
    before = snapshot(trainer)
    state = {key: value + 1 for key, value in trainer.state_dict().items()}
    BAD_STATES[message](state)
    with pytest.raises(StateMismatchError) as caught:
        trainer.load_state_dict(state)
    assert message in str(caught.value)
    assert equal(snapshot(trainer), before)


@pytest.mark.parametrize("state", [None, [1], ConvNet()], ids=["None", "list", "model"])
def test_a_state_is_a_mapping(folder: Path, state: Any) -> None:
    with pytest.raises(StateMismatchError, match="as a state_dict"):
        load_trainer(folder / "conv").load_state_dict(state)


def test_aliases(tmp_path: Path) -> None:
    build(tmp_path / "a", make(Mlp), aliases={"again.weight": "first.weight"})
    trainer = load_trainer(tmp_path / "a")
    state = trainer.state_dict()
    assert state["again.weight"] is state["first.weight"]
    state["again.weight"] = state["first.weight"] + 1
    with pytest.raises(StateMismatchError, match=r"'again\.weight' and 'first\.weight' differ"):
        trainer.load_state_dict(state)
    state["first.weight"] = state["again.weight"].clone()
    trainer.load_state_dict(state)
    assert torch.equal(trainer.state_dict()["again.weight"], state["first.weight"])


def test_live_tensors(tmp_path: Path) -> None:
    """ONNX Runtime Training's own memory, which follows every step, and outlives the trainer."""
    build(tmp_path / "a", make(ConvNet), aliases={"again.weight": "first.weight"})
    trainer = load_trainer(tmp_path / "a")
    live = trainer.live_tensors()
    assert live["again.weight"] is live["first.weight"]
    assert {"norm.running_mean", "norm.running_var"} < live.keys()
    for batch in batches(ConvNet(), 3):
        trainer.train_step(*batch)
        state = trainer.state_dict()
        del state["norm.num_batches_tracked"]
        assert equal(state, live)
    state["head.bias"].zero_()  # a copy
    assert bool(live["head.bias"].any())
    live["head.bias"].fill_(2)
    assert bool((trainer.state_dict()["head.bias"] == 2).all())
    trainer.load_state_dict(trainer.state_dict() | trainer.live_tensors())
    state = trainer.state_dict()
    live = trainer.live_tensors()
    del trainer
    gc.collect()
    for tensor in live.values():  # what would come to lie where they had been
        torch.full((20, *tensor.shape), torch.nan)
    assert all(torch.equal(tensor, state[name]) for name, tensor in live.items())


# --- batches ------------------------------------------------------------------------------------

X = np.zeros((BATCH, 8), np.float32)
Y = np.zeros(BATCH, np.int64)
BAD_BATCHES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "labels is missing": ((X,), {}),
    "given 3 values: it takes 2": ((X, Y, Y), {}),
    "given 'x' twice": ((X,), {"x": X, "labels": Y}),
    "given 'y': it takes no such input": ((X,), {"y": Y}),
    "'labels' is of dtype int32": ((X, Y.astype("int32")), {}),
    "Pass value.to(torch.int64)": ((X, torch.zeros(BATCH, dtype=torch.int32)), {}),
    "'x' is of dtype float64": ((X.astype("float64"), Y), {}),
    "Pass value.to(torch.float32)": ((torch.zeros(BATCH, 8).double(), Y), {}),
    "'x' is of dtype bfloat16": ((torch.zeros(BATCH, 8).bfloat16(), Y), {}),
    "'x' is of dtype >f4": ((X.astype(">f4"), Y), {}),
    "'x' is of dtype object": ((X.astype(object), Y), {}),
    "'x' is a list": (([[0.0] * 8] * BATCH, Y), {}),
    "'x' is a MaskedArray": ((np.ma.masked_invalid(X), Y), {}),
    "torch.sparse_coo tensor": ((torch.zeros(BATCH, 8).to_sparse(), Y), {}),
    "torch.strided tensor on meta": ((torch.zeros(BATCH, 8, device="meta"), Y), {}),
    "takes 2 dimensions": ((X[0], Y), {}),
    "takes size 8 in dimension 1": ((X[:, :7], Y), {}),
    "'batch', is 5, and that of 'x' 6": ((X, Y[:5]), {}),
    "it is empty": ((X[:0], Y[:0]), {}),
    "class index 5: the model has 5 classes": ((X, Y + CLASSES), {}),
    "class index -1": ((X, Y - 1), {}),
    "class index -100": ((X, Y - 100), {}),
}


@pytest.mark.parametrize("message", BAD_BATCHES)
@pytest.mark.parametrize("call", ["train_step", "evaluate", "compute_gradients"])
def test_refused_batches(folder: Path, call: str, message: str) -> None:
    trainer = load_trainer(folder / "every")
    trainer.train_step(*batches(Mlp(), 1)[0])
    before, gradients = snapshot(trainer), trainer.gradients()
    values, named = BAD_BATCHES[message]
    with pytest.raises(InvalidBatchError) as caught:
        getattr(trainer, call)(*values, **named)
    assert message in str(caught.value)
    assert call in str(caught.value)
    assert equal(snapshot(trainer), before)
    assert all(np.array_equal(v, gradients[k]) for k, v in trainer.gradients().items())


def test_labels_are_checked_without_the_manifest(tmp_path: Path) -> None:
    """ONNX Runtime's own kernel takes any label, and reads what lies behind its buffer."""
    targets = (TensorSpec("labels", "int64", ("batch",)),)
    build(tmp_path / "a", make(Mlp), targets=targets)
    trainer = load_trainer(tmp_path / "a")
    with pytest.raises(InvalidBatchError, match="class index 5: the model has 5 classes"):
        trainer.train_step(X, Y + CLASSES)


def test_ways_to_pass_a_batch(folder: Path) -> None:
    """Whatever the array's strides, owner or library: the same step."""
    x, y = batches(Mlp(), 1)[0]
    a, b = x.numpy(), y.numpy()
    unaligned = np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(np.float32).reshape(a.shape)
    fixed = a.copy()
    fixed.flags.writeable = False
    ways: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, y), {}),
        ((a, b), {}),
        ((x,), {"labels": y}),
        ((), {"labels": b, "x": a}),
        ((np.asfortranarray(a), b), {}),
        ((np.repeat(a, 2, axis=1)[:, ::2], np.repeat(b, 2)[::2]), {}),
        ((x.t().contiguous().t(), y), {}),
        ((x.clone().requires_grad_(), y), {}),
        ((unaligned, b), {}),
        ((fixed, b), {}),
    ]
    losses = []
    for values, named in ways:
        trainer = load_trainer(folder / "mlp")
        losses.append(trainer.train_step(*values, **named))
        assert trainer.predict(values[0] if values else named["x"]).shape == (6, 5)  # type: ignore[union-attr]
    assert losses == [losses[0]] * len(ways)


def test_batches_of_another_size(folder: Path) -> None:
    trainer = load_trainer(folder / "conv")
    for size in (1, 3, 9):
        x, y = batches(ConvNet(), 1, size=size)[0]
        assert np.isfinite(trainer.train_step(x, y))
        assert trainer.predict(x).shape == (size, CLASSES)  # type: ignore[union-attr]


def test_predict_takes_inputs_only(folder: Path) -> None:
    trainer = load_trainer(folder / "mlp")
    for values, named in (((X, Y), {}), ((), {}), ((), {"labels": Y}), ((X[:, :3],), {})):
        with pytest.raises(InvalidBatchError, match="predict"):
            trainer.predict(*values, **named)
    assert np.array_equal(trainer.predict(x=X), trainer.predict(X))


def test_nothing_to_predict(tmp_path: Path) -> None:
    manifest = build(tmp_path / "a", make(Mlp))
    model = onnx.load(tmp_path / "a" / "eval_model.onnx")
    del model.graph.output[1:]
    manifest = dataclasses.replace(manifest, outputs=())
    replace_file(tmp_path / "a", manifest, "eval_model.onnx", model.SerializeToString())
    trainer = load_trainer(tmp_path / "a")
    assert np.isfinite(trainer.evaluate(X, Y))
    with pytest.raises(UnsupportedTrainingError, match="gives its loss alone"):
        trainer.predict(X)


# --- failures at run time -----------------------------------------------------------------------


def test_failed_steps(tmp_path: Path) -> None:
    """ONNX Runtime's own error: a batch that the manifest allows and the graph does not."""
    targets = (TensorSpec("labels", "int64", (None,)),)
    build(tmp_path / "a", make(Mlp), SGD(lr=0.1, accumulate=2), targets=targets)
    trainer, other = load_trainer(tmp_path / "a"), load_trainer(tmp_path / "a")
    first, second, third = batches(Mlp(), 3)
    trainer.train_step(*first)
    with pytest.raises(FailedRunError, match="gradients since the last update are dropped") as e:
        trainer.train_step(X, Y[:3])
    assert "shape of logit and label does not match" in str(e.value)
    assert e.value.__cause__ is not None
    with pytest.raises(TrainerStateError):
        trainer.gradients()
    for call in (trainer.evaluate, trainer.compute_gradients):
        with pytest.raises(FailedRunError, match=call.__name__):
            call(X, Y[:3])
    for batch in (second, third):
        assert trainer.train_step(*batch) == other.train_step(*batch)
    assert equal(snapshot(trainer), snapshot(other))


def test_a_loss_that_is_no_number_is_said_once(folder: Path, tmp_path: Path) -> None:
    trainer = load_trainer(folder / "mlp")
    bad = torch.full_like(torch.as_tensor(X), torch.nan)
    trainer.train_step(X, Y)
    with pytest.warns(NonFiniteLossWarning, match=r"batch 2 is nan.*rate \(0\.1\)") as caught:
        assert np.isnan(trainer.train_step(bad, Y))
        trainer.train_step(X, Y)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "ignored" not in str(caught[0].message)
    trainer.load(folder / "mlp")
    with pytest.warns(NonFiniteLossWarning, match="batch 1 is nan"):
        trainer.train_step(bad, Y)


# --- runtimes and devices -----------------------------------------------------------------------


def test_devices(folder: Path) -> None:
    assert load_trainer(folder / "mlp", device=torch.device("cpu")).device == "cpu"
    for device in ("tpu", "cpu:1", "cuda:", "cuda:-1", "", None):
        with pytest.raises(MissingRuntimeError, match="Pass 'cpu', 'cuda', 'cuda:0'"):
            load_trainer(folder / "mlp", device=device)


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="a CUDA build")
def test_cuda_is_not_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingRuntimeError) as caught:
        load_trainer(folder / "mlp", device="cuda")
    for part in ("tract_fx[ort-training-gpu]", "3.10 or 3.11", "CUDA 11.8", "cuDNN 8"):
        assert part in str(caught.value)
    # A build that names the provider and can't start it.
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: names)
    with pytest.raises(MissingRuntimeError, match="does not start"):
        load_trainer(folder / "mlp", device="cuda:0")


def test_other_providers(folder: Path) -> None:
    with pytest.raises(MissingRuntimeError, match="DmlExecutionProvider is not in this build"):
        load_trainer(folder / "mlp", device=("DmlExecutionProvider", {"device_id": 0}))


def test_stock_onnxruntime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime.training.api", None)
    with pytest.raises(MissingRuntimeError, match=r"pip install \"tract_fx\[ort-training\]\"") as e:
        load_trainer(folder / "mlp")
    assert "stock ONNX Runtime" in str(e.value)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingRuntimeError, match=r"pip install \"tract_fx\[ort-training\]\""):
        load_trainer(folder / "mlp")


def test_other_versions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "__version__", "1.20.0")
    with pytest.warns(TractWarning, match=ort_training.TESTED_VERSION):
        load_trainer(folder / "mlp")


def test_repr(folder: Path) -> None:
    text = repr(load_trainer(folder / "mlp"))
    for part in ("x -> logits", "cross_entropy", "SGD(lr=0.1", "first: λ=0.1", "cpu", "0 updates"):
        assert part in text


def test_the_runtime_is_imported_on_demand_and_leaves_torch_alone() -> None:
    """Its own import replaces torch's `checkpoint`, by one that torch.compile refuses."""
    script = (
        "import sys, torch.utils.checkpoint as c, tract_fx.trainers; before = c.checkpoint\n"
        "assert 'onnxruntime' not in sys.modules\n"
        "from tract_fx.ort_training import runtime, training_api; runtime(); training_api()\n"
        "assert c.checkpoint is before"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)

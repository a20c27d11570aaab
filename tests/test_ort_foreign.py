"""Forward models that PyTorch never saw: trained by ONNX Runtime, held against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional

from foreign_models import (
    CASES,
    FLOAT32,
    Foreign,
    assert_gradients,
    conv_net,
    conv_tail,
    dense,
    dense_tail,
    initializers,
    mlp,
    scikit_learn,
    strided_conv,
)
from onnx_models import by_hand
from oracle import relative_error
from tract_fx import (
    SGD,
    AdamW,
    FrozenLayerWarning,
    UnsupportedTrainingError,
    export_training,
    import_onnx,
    load_trainer,
)
from tract_fx.errors import ExportError, TractError
from tract_fx.passes import find_onnx_input_layers, remove_tract_onnx, tract_onnx_pass


@pytest.fixture(autouse=True)
def _keep_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@dataclass
class Exports:
    """Directories of the cases, each written once."""

    folder: Path
    done: dict[str, Path]

    def directory(self, name: str) -> Path:
        if name not in self.done:
            place = self.folder / name
            case = CASES[name]
            export_training(
                case.model(), None, place, loss=case.loss, optimizer=SGD(lr=0.1, momentum=0.9)
            )
            self.done[name] = place
        return self.done[name]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("foreign"), {})


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, exports: Exports) -> None:
    """At a batch size on either side of rows = columns, where the model has both."""
    case = CASES[name]
    for count in (3, 12):
        trainer = load_trainer(exports.directory(name))
        assert_gradients(case, trainer, initializers(case.model()), count=count)


@pytest.mark.parametrize("name", CASES)
def test_training_and_its_predictions(name: str, exports: Exports) -> None:
    """The loss goes down; the trained model, copied to torch, predicts what the trainer does."""
    case = CASES[name]
    trainer = load_trainer(exports.directory(name))
    x, target = case.batch(16)
    losses = [trainer.train_step(x, target) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    values = {**initializers(case.model()), **trainer.state_dict()}
    parameters = {k: torch.as_tensor(v).double() for k, v in values.items()}
    z = case.first(parameters, case.before(x.double()))
    scores = conv_tail(parameters, z, False) if name == "conv" else case.rest(parameters, z)
    outputs = trainer.predict(x)
    found = outputs[-1] if isinstance(outputs, tuple) else outputs
    if name == "binary":
        p = scores.sigmoid()
        scores = torch.cat([1 - p, p], dim=1)
    elif name in {"mlp", "classifier"}:
        scores = scores.softmax(1)
    assert relative_error(np.asarray(found), scores.reshape(found.shape)) < FLOAT32


def test_batch_norm_of_an_inference_export_is_trained(exports: Exports) -> None:
    """Running statistics move as ONNX says: by its momentum, to the variance with divisor N."""
    case, model = CASES["conv"], conv_net()
    trainer = load_trainer(exports.directory("conv"))
    before = initializers(model)
    x, target = case.batch(9)
    trainer.train_step(x, target)
    z = case.first(
        {k: torch.tensor(v).double() for k, v in before.items()}, case.before(x.double())
    )
    after = trainer.state_dict()
    mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
    for name, batch in (("mean", mean), ("var", var)):
        expected = 0.9 * torch.tensor(before[name]).double() + 0.1 * batch
        assert relative_error(after[name], expected) < FLOAT32


@pytest.mark.parametrize(
    ("auto_pad", "opset"),
    [("SAME_LOWER", 11), ("SAME_LOWER", 15), ("SAME_UPPER", 21)],
)
def test_auto_pad_and_opsets(auto_pad: str, opset: int, tmp_path: Path) -> None:
    """ONNX Runtime's own gradient of such a Conv is that of one without padding."""
    model = conv_net(auto_pad, opset)
    model.ir_version = 12
    case = strided_conv(int(auto_pad == "SAME_LOWER"))
    export_training(model, None, tmp_path / "a")
    assert_gradients(case, load_trainer(tmp_path / "a"), initializers(model))


def test_trainable_freezes_the_others(tmp_path: Path) -> None:
    """What is not named keeps its value and stays in the checkpoint."""
    model = mlp()
    export_training(model, None, tmp_path / "a", trainable=["w1", "b2"])
    trainer = load_trainer(tmp_path / "a")
    frozen = {s.name for s in trainer.manifest.parameters if not s.trainable}
    assert frozen == {"b1", "w2"}
    assert_gradients(CASES["mlp"], trainer, initializers(model))
    after, before = trainer.state_dict(), initializers(model)
    for name in ("w1", "b1", "w2", "b2"):
        assert np.array_equal(after[name], before[name]) == (name in frozen), name


def test_a_frozen_first_layer_leaves_tract_idle(tmp_path: Path) -> None:
    """As in PyTorch: it is said, and no later layer is taken in its place."""
    model = mlp()
    with pytest.warns(FrozenLayerWarning, match="w1"):
        export_training(model, None, tmp_path / "a", trainable=["w2", "b2"])
    assert_gradients(CASES["mlp"], load_trainer(tmp_path / "a"), initializers(model), None)
    options: dict[str, Any] = {"trainable": ["w2", "b2"], "verify": False}
    export_training(model, None, tmp_path / "b", layers=["w2"], **options)
    found = load_trainer(tmp_path / "b").compute_gradients(*CASES["mlp"].batch(6))
    plain = load_trainer(tmp_path / "a").compute_gradients(*CASES["mlp"].batch(6))
    assert relative_error(found["w2"], plain["w2"]) > 0.1


def test_output_names_what_the_loss_reads(tmp_path: Path) -> None:
    """Squared errors of the logits here, not of the softmax that the model ends in."""
    model, case = mlp(), CASES["mlp"]
    export_training(model, None, tmp_path / "a", loss="mse", output="l")
    of_logits = Foreign(
        case.model,
        case.first,
        case.rest,
        "w1",
        transposed=True,
        size=(8,),
        loss="mse",
        targets=(3,),
    )
    assert_gradients(of_logits, load_trainer(tmp_path / "a"), initializers(model))
    with pytest.raises(UnsupportedTrainingError, match="none"):
        export_training(model, None, tmp_path / "b", output="none")


def test_layers_and_lambda(tmp_path: Path) -> None:
    model, case = mlp(), CASES["mlp"]
    export_training(model, None, tmp_path / "a", layers={"w1": 0.7}, verify=False)
    assert_gradients(case, load_trainer(tmp_path / "a"), initializers(model), 0.7)
    export_training(model, None, tmp_path / "b", lambda_=0.02, verify=False)
    assert_gradients(case, load_trainer(tmp_path / "b"), initializers(model), 0.02)
    with pytest.raises(TractError, match="nowhere"):
        export_training(model, None, tmp_path / "c", layers=["nowhere"])


def test_plain(tmp_path: Path) -> None:
    model = mlp()
    export_training(model, None, tmp_path / "a", plain=True)
    trainer = load_trainer(tmp_path / "a")
    assert trainer.manifest.layers == ()
    assert_gradients(CASES["mlp"], trainer, initializers(model), None)


def test_scikit_learn_pipeline(tmp_path: Path) -> None:
    """A Scaler in front, for which onnx infers no shape."""
    model = scikit_learn("pipeline")
    scaler = next(node for node in model.graph.node if node.op_type == "Scaler")
    offset, scale = (
        torch.tensor(next(a for a in scaler.attribute if a.name == name).floats).double()
        for name in ("offset", "scale")
    )
    case = Foreign(
        lambda: model,
        dense,
        dense_tail,
        "coefficient",
        transposed=True,
        size=(4,),
        classes=3,
        before=lambda x: (x - offset) * scale,
    )
    export_training(model, None, tmp_path / "a")
    assert_gradients(case, load_trainer(tmp_path / "a"), initializers(model), count=12)


def test_scores_of_scikit_learn_stay_predictions(exports: Exports) -> None:
    """skl2onnx gives them as dictionaries by default, the trainer as an array beside the labels."""
    trainer = load_trainer(exports.directory("classifier"))
    labels, scores = trainer.predict(CASES["classifier"].batch(7)[0])
    assert scores.shape == (7, 3)
    assert np.array_equal(labels, scores.argmax(axis=1))


@pytest.mark.parametrize(
    ("model", "loss", "reason"),
    [
        (lambda: scikit_learn("binary"), "cross_entropy", "bce_with_logits"),
        (lambda: mlp(), None, "return its loss"),
        (lambda: mlp(), "bce_with_logits", "cross_entropy"),
    ],
    ids=["binary", "no-loss", "softmax"],
)
def test_losses_that_do_not_fit(
    model: Callable[[], onnx.ModelProto], loss: Any, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedTrainingError, match=reason):
        export_training(model(), None, tmp_path / "a", loss=loss)


@pytest.mark.parametrize("target", ["ort-training", "onnxruntime"])
@pytest.mark.parametrize("name", ["x", "w"])
def test_a_name_that_training_graphs_have_themselves(
    name: str, target: Any, tmp_path: Path
) -> None:
    """Such a model can be read, and is trained under another name."""
    names = {"x": "x", "w": "w"} | {name: "lazy_reset_grad"}
    inputs = f"float[N,8] {names['x']}"
    model = by_hand(f"y = MatMul ({names['x']}, {names['w']})", {names["w"]: (8, 3)}, inputs)
    assert import_onnx(model)(torch.ones(2, 8)).shape == (2, 3)
    with pytest.raises(ExportError, match=r"'lazy_reset_grad'.*value of its own"):
        export_training(model, None, tmp_path / "a", loss="mse", target=target)


def test_somebody_elses_artifacts(tmp_path: Path) -> None:
    """`generate_artifacts`, its training graph rewritten, and its own checkpoint and optimizer."""
    from onnxruntime.training import artifacts
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    model, case = mlp(ending="y = Identity (l)"), CASES["mlp"]
    model.ir_version = 10
    artifacts.generate_artifacts(
        model,
        requires_grad=["w1", "b1", "w2", "b2"],
        loss=artifacts.LossType.CrossEntropyLoss,
        optimizer=artifacts.OptimType.AdamW,
        artifact_directory=str(tmp_path),
    )
    others = ("checkpoint", "optimizer_model.onnx", "eval_model.onnx")
    optimizer_model = onnx.load(tmp_path / "optimizer_model.onnx")
    optimizer_model.ir_version = 10  # ORT writes one that it does not read
    onnx.save(optimizer_model, tmp_path / "optimizer_model.onnx")
    content = {name: (tmp_path / name).read_bytes() for name in others}
    rewritten = tract_onnx_pass(tmp_path / "training_model.onnx", lambda_=0.25)
    onnx.checker.check_model(rewritten)
    onnx.save(rewritten, tmp_path / "tract.onnx")
    assert {name: (tmp_path / name).read_bytes() for name in others} == content

    state = CheckpointState.load_checkpoint(str(tmp_path / "checkpoint"))
    module = Module(
        str(tmp_path / "tract.onnx"), state, str(tmp_path / "eval_model.onnx"), device="cpu"
    )
    optimizer = Optimizer(str(tmp_path / "optimizer_model.onnx"), module)
    x, target = case.batch(16)
    losses = []
    for _ in range(4):
        values = {name: np.array(state.parameters[name].data) for name in ("w1", "b1", "w2", "b2")}
        loss, expected = case.reference(values, x, target, 0.25)
        module.train()
        found = module(x.numpy(), target.numpy())
        assert float(found) == pytest.approx(loss, rel=FLOAT32)
        for name, gradient in expected.items():
            assert relative_error(state.parameters[name].grad, gradient) < FLOAT32, name
        optimizer.step()
        module.lazy_reset_grad()
        losses.append(float(found))
    assert losses[-1] < losses[0]
    layers = find_onnx_input_layers(tmp_path / "tract.onnx").layers
    assert [record.weight for record in layers] == [("w1",)]
    removed = remove_tract_onnx(tmp_path / "tract.onnx")
    assert not any(node.name.startswith("tract/") for node in removed.graph.node)


def test_adamw_of_a_foreign_model_is_torchs(tmp_path: Path) -> None:
    """Plain gradients: the whole step is torch's, with weight decay and clipping."""
    model, case = mlp(), CASES["mlp"]
    optimizer = AdamW(lr=0.02, weight_decay=0.1, max_grad_norm=0.5)
    export_training(model, None, tmp_path / "a", optimizer=optimizer, plain=True)
    trainer = load_trainer(tmp_path / "a")
    p = {k: torch.tensor(v, requires_grad=True) for k, v in initializers(model).items()}
    reference = torch.optim.AdamW(p.values(), lr=0.02, weight_decay=0.1)
    for step in range(3):
        x, target = case.batch(6, seed=step)
        reference.zero_grad()
        functional.cross_entropy(case.rest(p, case.first(p, x)), target).backward()
        torch.nn.utils.clip_grad_norm_(p.values(), 0.5)
        reference.step()
        trainer.train_step(x, target)
    for name, value in trainer.state_dict().items():
        assert relative_error(value, p[name]) < FLOAT32

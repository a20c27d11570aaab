"""`inspect_graph` as users call it: what it takes, what it refuses, what it leaves alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from photographs import photographs
from torch_release import before
from tract_fx import (
    FrozenLayerWarning,
    Inspection,
    UnsupportedFormatError,
    UnsupportedModelError,
    UntraceableModelError,
    inspect_graph,
    remove_tract,
    tract_module,
    tract_pass,
)
from tract_fx.inspection.render.words import verdict


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu_(self.norm(self.stem((images - 0.1) / 0.9)))
        return self.head(functional.dropout(features, training=True).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return photographs(8, size=12)


WAYS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "traced": lambda m, x: tract_pass(torch.fx.symbolic_trace(m)),
    "exported-after": lambda m, x: tract_pass(torch.export.export(m, (x,))),
    "eager": lambda m, x: tract_module(m, x),
    "program": lambda m, x: torch.export.export(tract_module(m, x), (x,)),
}


@pytest.mark.parametrize("way", WAYS)
def test_everything_of_one_model(way: str, net: Net, images: Tensor) -> None:
    inspection = inspect_graph(WAYS[way](net, images), images, backward="expanded")
    assert inspection.subject == "Net"
    (layer,) = inspection.layers
    assert layer.taken and layer.on_input and not layer.note
    assert layer.record.weight == ("stem.weight",)
    assert (layer.rows, layer.columns, layer.input_shape) == (8 * 36, 27, (8, 3, 12, 12))
    assert layer.form == "Cholesky of the Gram, float32" and "float32 products" in layer.gram
    assert inspection.others == 1 and not inspection.refusals and not inspection.notes
    assert any(line.startswith("+") for line in inspection.forward.lines())
    assert inspection.backward is not None and inspection.backward.expanded is not None
    assert {n.stage for n in inspection.backward.expanded.nodes} >= {"Gram", "solve"}
    assert inspection.verification is not None and inspection.verification.passed
    (weight,) = inspection.verification.weights
    assert weight.parameter == "stem.weight" and weight.operator.error < 2e-5 < weight.plain
    assert inspection.statistics is not None
    (measured,) = inspection.statistics.layers
    assert len(measured.eigenvalues) == 27 and len(measured.images) == 8


def test_a_chain_is_called_by_what_is_in_it(images: Tensor, tmp_path: Path) -> None:
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 6))
    for way in ("traced", "exported-after", "eager"):
        model = WAYS[way](chain, images)
        parts = inspect_graph(model, images, backward=None, verify=False, statistics=False)
        assert parts.subject == "Sequential of Conv2d, ReLU, Flatten, Linear"
    longer = tract_pass(torch.fx.symbolic_trace(nn.Sequential(*chain, nn.ReLU())))
    assert inspect_graph(longer).subject == "Sequential of 5 modules, Conv2d to ReLU"
    named = inspect_graph(longer, name="my net")
    assert repr(named).startswith("Inspection of my net (torch.fx graph)\n")
    assert "<h1>my net</h1>" in named.save(tmp_path / "page.html").read_text()


def test_parts_are_left_out(net: Net, images: Tensor) -> None:
    model = tract_pass(torch.fx.symbolic_trace(net))
    inspection = inspect_graph(model, images, backward=None, verify=False, statistics=False)
    assert inspection.layers[0].rows == 8 * 36  # from a forward pass alone
    parts = (inspection.backward, inspection.verification, inspection.statistics)
    assert parts == (None, None, None)
    alone = inspect_graph(model, images, backward=None, verify=False)
    assert alone.verification is None and alone.statistics is not None


def test_graph_without_a_batch(net: Net) -> None:
    inspection = inspect_graph(tract_pass(torch.fx.symbolic_trace(net), lambda_=0.2))
    (layer,) = inspection.layers
    assert (layer.rows, layer.columns, layer.record.lambda_) == (None, 27, 0.2)
    assert inspection.forward.lines() and inspection.notes


def test_program_has_a_batch_of_its_own(net: Net, images: Tensor) -> None:
    program = torch.export.export(tract_module(net, images), (), {"images": images})
    inspection = inspect_graph(program, backward=None, statistics=False)
    assert inspection.verification is not None and inspection.verification.passed
    assert "(8, 3, 12, 12)" in inspection.batch


def test_loss_decides_over_the_gradient(net: Net, images: Tensor) -> None:
    """The norm before TrAct is that of the user's own loss, and so is each image's share."""
    labels = torch.arange(8) % 5
    model = tract_pass(torch.fx.symbolic_trace(net.eval()))

    def loss(scores: Tensor) -> Tensor:
        return functional.cross_entropy(scores[:4], labels[:4])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        inspection = inspect_graph(model, images, loss=loss, backward=None)
        torch.manual_seed(3)
        (expected,) = torch.autograd.grad(loss(net(images)), [net.stem.weight])
    assert inspection.statistics is not None
    (measured,) = inspection.statistics.layers
    assert measured.plain_norm == pytest.approx(float(expected.norm()), rel=1e-5)
    assert all(i.plain > 0 for i in measured.images[:4])
    assert all(i.plain == i.tract == 0 for i in measured.images[4:])


def test_nothing_is_left_changed(net: Net, images: Tensor) -> None:
    model = tract_pass(torch.fx.symbolic_trace(net))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = copy.deepcopy(model.state_dict())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    given, code = images.clone(), model.code
    random = torch.random.get_rng_state()
    inspect_graph(model, images, backward="expanded", whole=True)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert model.training and model.code == code and torch.equal(images, given)
    assert not images.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name]
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.ones_like(parameter))


def test_plain_model_is_told_what_the_pass_would_take(net: Net, images: Tensor) -> None:
    inspection = inspect_graph(torch.fx.symbolic_trace(net), images)
    (layer,) = inspection.layers
    assert not layer.taken and "would take this one" in layer.note
    assert inspection.forward.lines() == []
    assert inspection.verification is not None and not inspection.verification.passed
    assert inspection.statistics is not None and not inspection.statistics.layers


def test_removed_tract_does_not_verify(net: Net, images: Tensor) -> None:
    model = remove_tract(tract_module(net, images))
    verification = inspect_graph(model, images, backward=None, statistics=False).verification
    assert verification is not None and not verification.passed and verification.problems


def test_reasons_of_what_was_not_taken(images: Tensor) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) + (x * self.scale).mean()  # type: ignore[no-any-return]

    graph = torch.fx.symbolic_trace(Two())
    undecided = inspect_graph(graph, images, statistics=False)
    assert [layer.taken for layer in undecided.layers] == [False, False]
    assert all("has to be named" in layer.note for layer in undecided.layers)
    assert [refusal.op for refusal in undecided.refusals] == ["mul"]
    chosen = inspect_graph(tract_pass(graph, layers=["b"]), images)
    assert [(r.record.name, r.taken) for r in chosen.layers] == [("b", True), ("a", False)]
    assert "another layer" in chosen.layers[1].note
    assert chosen.verification is not None and chosen.verification.passed
    assert "layers=['b', 'a']" in chosen.verification.note


def test_frozen_layer_is_idle(net: Net, images: Tensor) -> None:
    net.stem.weight.requires_grad_(False)
    with pytest.warns(FrozenLayerWarning):
        model = tract_pass(torch.fx.symbolic_trace(net))
    inspection = inspect_graph(model, images)
    assert "idle" in inspection.layers[0].note
    assert inspection.verification is not None and not inspection.verification.passed


def test_few_rows(images: Tensor) -> None:
    model = tract_pass(
        torch.fx.symbolic_trace(nn.Sequential(nn.Flatten(), nn.Linear(432, 6), nn.ReLU()))
    )
    inspection = inspect_graph(model, images, backward="expanded")
    (layer,) = inspection.layers
    assert (layer.rows, layer.columns) == (8, 432)
    assert layer.form.startswith("Cholesky of XXᵀ, on the output's gradient") and not layer.gram
    assert inspection.verification is not None and inspection.verification.passed


def test_save_and_show(net: Net, images: Tensor, tmp_path: Path) -> None:
    inspection = inspect_graph(tract_pass(torch.fx.symbolic_trace(net)), images)
    assert isinstance(inspection, Inspection)
    for suffix in (".html", ".json", ".dot"):
        assert inspection.save(tmp_path / f"report{suffix}").stat().st_size > 1000
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored == json.loads(json.dumps(inspection.to_dict()))
    assert "stem" in inspection._repr_html_()
    with pytest.raises(UnsupportedFormatError, match="html"):
        inspection.save(tmp_path / "report.pdf")


@pytest.mark.parametrize(
    ("model", "batch", "error", "says"),
    [
        (lambda: Net(), None, UnsupportedModelError, "without example inputs"),
        (lambda: Net(), "x", UnsupportedModelError, "example_inputs"),
        (lambda: torch.compile(Net()), torch.ones(2, 3, 8, 8), UnsupportedModelError, "compiled"),
        (lambda: Net(), torch.ones(2, 5, 8, 8), UntraceableModelError, "torch.export"),
        (
            lambda: tract_pass(torch.fx.symbolic_trace(Net())),
            torch.ones(2, 5, 8, 8),
            UnsupportedModelError,
            "fails on them",
        ),
        (lambda: 7, None, UnsupportedModelError, "int"),
    ],
)
def test_what_is_refused(
    model: Callable[[], Any], batch: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        inspect_graph(model(), batch)


def test_loss_that_fails(net: Net, images: Tensor) -> None:
    model = tract_pass(torch.fx.symbolic_trace(net))
    with pytest.raises(
        UnsupportedModelError, match=r"the loss .*'logits'.*output, of class Tensor"
    ):
        inspect_graph(model, images, loss=lambda scores: scores.logits.mean())

    class Loss(nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return functional.cross_entropy(scores, torch.arange(3))

    with pytest.raises(UnsupportedModelError, match=r"the loss .*batch_size"):
        inspect_graph(model, images, loss=Loss())


def test_loss_that_fails_on_gradients_of_the_batch(net: Net, images: Tensor) -> None:
    """It reads the batch out of the output, as what it is not where its gradient is asked for."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x), x

    def weighted(output: tuple[Tensor, Tensor]) -> Tensor:
        scores, x = output
        return scores.square().mean() * float(x.numpy().std())

    model = tract_pass(torch.fx.symbolic_trace(Both()))
    inspection = inspect_graph(model, images, loss=weighted, backward=None, statistics=False)
    assert inspection.verification is not None and inspection.verification.passed
    note = inspection.verification.note
    assert "gradients of the batch itself are not compared" in note
    assert "fails (RuntimeError: Can't call numpy() on Tensor that requires grad" in note


def test_loss_goes_by_its_own_name(net: Net, images: Tensor) -> None:
    class Spread(nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return scores.square().mean()

    def spread(scores: Tensor) -> Tensor:
        return scores.square().mean()

    model = tract_pass(torch.fx.symbolic_trace(net))
    for loss, name in ((Spread(), "Spread"), (spread, "spread")):
        inspection = inspect_graph(model, images, loss=loss, backward=None, statistics=False)
        assert inspection.verification is not None and inspection.verification.passed
        assert f"the given one ({name})" in inspection.verification.note


ARRAY = photographs(4, size=12).numpy()
ANOTHER_KIND: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "number as loss": ({"loss": 3}, UnsupportedModelError, "loss of class int"),
    "backward": ({"backward": "long"}, UnsupportedFormatError, '"short", "expanded"'),
    "bool": ({"backward": True}, UnsupportedFormatError, "backward=True"),
    "array": ({"example_inputs": ARRAY}, UnsupportedModelError, r"\(4, 3, 12, 12\).*from_numpy"),
    "generator": ({"example_inputs": (x for x in [1])}, UnsupportedModelError, "next"),
    "None": ({"gm": None}, UnsupportedModelError, "None.*takes a torch.nn.Module"),
    "dict": ({"gm": {}}, UnsupportedModelError, "class dict"),
    "function": ({"gm": torch.relu}, UnsupportedModelError, "inspect_graph takes"),
    "class": ({"gm": Net}, UnsupportedModelError, "class Net itself.*call the class"),
}


@pytest.mark.parametrize("kind", ANOTHER_KIND)
def test_another_kind_is_told_before_the_work(net: Net, images: Tensor, kind: str) -> None:
    changes, error, says = ANOTHER_KIND[kind]
    with pytest.raises(error, match=says) as caught:
        inspect_graph(**{"gm": net, "example_inputs": images, **changes})
    assert "layers=" not in str(caught.value) and "ONNX graph" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_an_array_is_not_printed_by_the_pass_either(net: Net) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"example_inputs=array.*, of class ndarray"
    ) as caught:
        tract_module(net, ARRAY)
    assert len(str(caught.value)) < 300


def test_what_failed_is_told_with_its_remedy(net: Net, images: Tensor) -> None:
    program = tract_pass(torch.export.export(net.eval(), (images,)))
    with pytest.raises(UnsupportedModelError, match=r"Guard failed.*exported for.*dynamic_shapes"):
        inspect_graph(program, images[:4])
    graph = tract_pass(torch.fx.symbolic_trace(net))
    with pytest.raises(UnsupportedModelError, match="not the arguments that the model takes"):
        inspect_graph(graph, {"pictures": images})
    with pytest.raises(
        UnsupportedModelError, match=r"the model fails on them.*or correct the model"
    ):
        inspect_graph(graph, images[:, :2])


def headline(*arguments: Any, **options: Any) -> str:
    inspection = inspect_graph(*arguments, backward=None, statistics=False, **options)
    assert inspection.verification is not None and not inspection.verification.passed
    return verdict(inspection).headline


def test_headlines_where_nothing_is_compared(net: Net, images: Tensor) -> None:
    graph = torch.fx.symbolic_trace(net)
    assert headline(graph, images) == "Not verified: TrAct is on no layer"
    constant = headline(tract_pass(graph), images, loss=lambda y: (y * 0).sum())
    assert constant.startswith("Not verified: there was no gradient")
    net.stem.weight.requires_grad_(False)
    with pytest.warns(FrozenLayerWarning):
        frozen = tract_pass(torch.fx.symbolic_trace(net))
    assert headline(frozen, images) == "Not verified: stem is frozen and has no gradient"


@before((2, 13), "torch.export takes no random generator")
def test_comparisons_that_say_nothing_accuse_nobody(net: Net, images: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x + torch.randn(x.shape, generator=generator))  # type: ignore[no-any-return]

    model = tract_module(Noisy(), layers="net.stem")
    assert headline(model, images) == "Not verified: the comparison says nothing here"
    graph = tract_pass(torch.fx.symbolic_trace(net.eval()))
    weight = graph.get_parameter("stem.weight")

    def penalised(scores: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(scores.square().sum(), [weight], create_graph=True)
        return scores.square().mean() + gradient.square().sum()

    assert headline(graph, images, loss=penalised).startswith("Not verified: the comparison")


def test_a_lost_transform_is_wrong(net: Net, images: Tensor) -> None:
    model = tract_module(net, images)
    plain: Any = nn.Conv2d.forward
    stem = model.get_submodule("stem")
    vars(stem)["forward"] = lambda x: plain(stem, x)
    assert headline(model, images) == "TrAct's gradient is wrong"


@pytest.mark.parametrize("way", ["traced", "eager"])
@pytest.mark.parametrize("mode", ["reflect", "zeros"])
def test_padding_that_is_not_with_zeros_is_told(way: str, mode: Any, images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1, padding_mode=mode), nn.ReLU())
    inspection = inspect_graph(WAYS[way](net, images), images, verify=False, backward=None)
    (layer,) = inspection.layers
    assert layer.input_shape == ((8, 3, 14, 14) if mode == "reflect" else (8, 3, 12, 12))
    assert ("after its reflect padding" in layer.note) == (mode == "reflect")

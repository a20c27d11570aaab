"""tract_module: eager models, located through torch.export and treated in place of tracing."""

from __future__ import annotations

import collections
import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_tract
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from input_layers import LAYERS, PLACES, Siamese, autoencoder, called_twice
from input_paths import PATHS, Case, conv, linear
from reference import Net, assert_plain, assert_tract, built, exported, images, step
from refused_models import NOT_AT_ALL, OPERATIONS, SEVERAL, WithMetadata
from refused_models import Case as RefusedCase
from tract_fx import (
    AmbiguousInputLayerError,
    NoInputLayerError,
    UnknownLayerError,
    UnsupportedLayerError,
    UnsupportedModelError,
    UntraceableModelError,
    is_tract,
    remove_tract,
    tract_module,
    tract_pass,
)
from tract_fx.modules import tract_scope

# A convolution that is no call of a module, or a module that TrAct can't go into.
NO_MODULE = {case.name for case in LAYERS if case.layer != "stem"} | {
    "tied-function-behind",
}
# And what an eager model can't tell: a call from another, an optional argument from an input.
ELSE = {"called-again-on-features", "all-optional"}
LOCATED = [case for case in (*PATHS, *LAYERS, *PLACES) if case.name not in NO_MODULE | ELSE]


@pytest.mark.parametrize("case", LOCATED, ids=str)
def test_located_and_right(case: Case) -> None:
    """The cases of test_locate.py that have a module for a layer."""
    model, inputs = built(case.build), case.inputs()
    tract = tract_module(model, inputs)
    assert isinstance(tract, type(model))
    assert_tract(model, model, tract, inputs, case.treated)


# Models that nothing can trace.


class Branches(nn.Module):
    """Its branch depends on the values of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv()
        self.heads = nn.ModuleList([nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 3)])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.heads[int(x.sum() > 0)](self.stem(x))
        return result


def test_untraceable_and_the_way_out() -> None:
    model = built(Branches)
    with pytest.raises(UntraceableModelError) as caught:
        tract_module(model, images())
    message = str(caught.value)
    assert message.startswith("torch.export failed on Branches (")
    assert "tract_module(model, layers=['path.of.the.layer'])" in message
    assert caught.value.__cause__ is not None and isinstance(caught.value, RuntimeError)
    tract = tract_module(model, layers=["stem"])
    for inputs in ((images(),), (-images(),)):
        assert_tract(model, model, tract, inputs, (0,))


def test_wrong_example_is_a_tracing_error() -> None:
    with pytest.raises(UntraceableModelError, match=r"torch\.export failed on Net"):
        tract_module(built(lambda: Net(lambda net, x: net.stem(x), stem=conv())), images(2, 5))


def test_what_a_forward_writes_stays_out_of_the_model() -> None:
    """Attributes and the random state, while locating runs it."""

    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = linear(8)
            self.last: Tensor | None = None
            self.calls = 0

        def forward(self, x: Tensor) -> Any:
            torch.manual_seed(0)
            self.calls += 1
            self.last = features = self.stem(x)
            return features.tanh()

    model = built(Remembers)
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    tract = tract_module(model, images())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.last is None and tract.last is None
    assert model.calls == tract.calls == 0
    assert_tract(model, model, tract, (images(),), (0,))


# Example inputs.


class Record(collections.UserDict[str, Tensor]):
    """What tokenizers and image processors return: a mapping that is no dict."""


@pytest.mark.parametrize(
    "example",
    [
        images(),
        (images(),),
        [images()],
        {"x": images()},
        Record(x=images()),
        collections.OrderedDict(x=images()),
        (images().requires_grad_(),),
    ],
    ids=["tensor", "tuple", "list", "dict", "record", "ordered-dict", "with-grad"],
)
def test_example_inputs(example: Any) -> None:
    model = built(lambda: Net(lambda net, x: net.stem(x), stem=conv()))
    assert_tract(model, model, tract_module(model, example), (images(),), (0,))


class Described(nn.Module):
    """As Hugging Face's models are: they say what their input is called, and its size."""

    main_input_name = "pixel_values"

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 6 * 8, 2)
        self.config = types.SimpleNamespace(**config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.stem(pixel_values).flatten(1))  # type: ignore[no-any-return]


def test_a_batch_by_the_model_s_config() -> None:
    model = built(lambda: Described(num_channels=3, image_size=(8, 10)))
    x = images(4, 3, 8, 10)
    assert_tract(model, model, tract_module(model), (x,), (0,))
    model.dummy_inputs = {"pixel_values": x}
    model.config.image_size = 7
    assert_tract(model, model, tract_module(model), (x,), (0,))
    del model.dummy_inputs
    with pytest.raises(UntraceableModelError, match="Give example_inputs, or name the layer"):
        tract_module(model)
    model.main_input_name = "input_ids"
    with pytest.raises(UnsupportedModelError, match="example_inputs=None"):
        tract_module(model)


def test_lightning() -> None:
    """docs/trainers.md compares gradients; here is what locates the layer, and what does not."""
    lightning = pytest.importorskip("lightning")
    from tract_fx.lightning import TractCallback

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self, **nets: nn.Module) -> None:
            super().__init__()
            for name, net in nets.items():
                self.add_module(name, net)

    class LightningModule(Described):
        """With a forward method, whatever it is called."""

        forward = Described.forward

    assert tract_module(built(lambda: LightningModule(num_channels=3, image_size=(8, 10))))

    def taken(module: Any, *args: Any, **options: Any) -> dict[str, float]:
        callback = TractCallback(*args, **options)
        callback.setup(lightning.Trainer, module, "validate")
        assert not callback.taken
        callback.setup(lightning.Trainer, module, "fit")
        assert is_tract(module) == callback.taken
        return callback.taken

    inner = built(lambda: Net(lambda net, x: net.stem(x), stem=conv()))
    module = Module(net=inner, loss=nn.CrossEntropyLoss())
    assert is_tract(tract_module(module, images())) == {"net.stem": 0.1} and not is_tract(module)
    assert "forward" not in vars(module)
    weight = inner.stem.weight
    assert taken(module, images(), lambda_=0.2) == {"net.stem": 0.2}
    assert inner.stem.weight is weight
    module = Module(net=built(chain))
    assert taken(module, layers=["net.block.0"], gram="global") == {"net.block.0": 0.1}
    assert tract_scope(module.net.block[0]) is not None and tract_scope(inner.stem) is None
    module = Module(net=built(chain))
    module.example_input_array = images()
    assert taken(module) == {"net.block.0": 0.1}
    for module, says in {
        Module(): "configure_model",
        Module(net=built(chain)): "example_inputs=None",
        Module(one=built(conv), two=built(conv)): "no forward method.*one, two.*net inside",
    }.items():
        given = None if "example" in says else images()
        with pytest.raises(UnsupportedModelError, match=says):
            taken(module, given)
        assert not is_tract(module)


@pytest.mark.parametrize("example", [None, 3, "image", {1, 2}, object], ids=repr)
def test_bad_example_inputs(example: Any) -> None:
    model = built(lambda: Net(lambda net, x: net.stem(x), stem=conv()))
    with pytest.raises(UnsupportedModelError, match=r"example_inputs=") as caught:
        tract_module(model, example)
    assert repr(example) in str(caught.value)
    assert_tract(model, model, tract_module(model, layers="stem"), (images(),), (0,))


# layers=


def chain() -> nn.Module:
    return Net(
        lambda net, x: net.head(net.block(x)),
        block=nn.Sequential(conv(), nn.Tanh(), nn.Conv2d(4, 4, 1)),
        head=linear(6),
    )


def test_layers_are_module_paths() -> None:
    model = built(chain)
    choices: tuple[tuple[Any, dict[int, float]], ...] = (
        ("block.0", {0: 0.1}),
        (["block.2", "head"], {1: 0.1, 2: 0.1}),
        ({"block.0": 0.05, "head": 1}, {0: 0.05, 2: 1.0}),
    )
    for layers, calls in choices:
        tract = tract_module(model, layers=layers)
        assert_tract(model, model, tract, (images(),), calls)


@pytest.mark.parametrize("name", ["stem", "block.1.weight", "block.9", "block.0.weight", "0"])
def test_unknown_layer(name: str) -> None:
    with pytest.raises(UnknownLayerError) as caught:
        tract_module(built(chain), layers=["head", name])
    assert repr(name) in str(caught.value)
    assert "'block.0', 'block.2', 'head'" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("block", r"block \(Sequential\): it is neither nn\.Linear nor"),
        ("block.1", r"block\.1 \(Tanh\)"),
        ("", r"\(Net\): it is neither"),
    ],
)
def test_layer_of_another_kind(name: str, says: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=says):
        tract_module(built(chain), layers=name)


@pytest.mark.parametrize("name", sorted(NO_MODULE - {"tied-function-behind"}))
def test_function_calls_have_no_module(name: str) -> None:
    (case,) = (case for case in (*LAYERS, *PLACES) if case.name == name)
    model, inputs = built(case.build), case.inputs()
    with pytest.raises(
        UnsupportedLayerError, match=r"function call.*torch\.export\.export"
    ) as caught:
        tract_module(model, inputs)
    assert case.layer in str(caught.value)
    graph = exported(model, inputs)
    assert_tract(model, graph, tract_pass(graph), inputs, case.treated)


def test_the_weight_of_a_module_that_is_never_called() -> None:
    """The name of the weight is a module's, and treating that module would do nothing."""
    model = built(
        lambda: Net(lambda net, x: functional.linear(x, net.stem.weight), stem=nn.Linear(8, 3))
    )
    with pytest.raises(UnsupportedLayerError, match="function call"):
        tract_module(model, images())


# One module in several calls.


def test_called_on_features_too() -> None:
    model = built(lambda: Net(called_twice, stem=nn.Conv2d(3, 3, 3)))
    with pytest.raises(UnsupportedLayerError) as caught:
        tract_module(model, images())
    message = str(caught.value)
    assert message.startswith("stem is called on the input and again on features (node 'conv2d_1')")
    assert "tract_pass" in message and "layers=['stem']" in message
    # Both ways out.
    assert_tract(model, model, tract_module(model, layers=["stem"]), (images(),), (0, 1))
    graph = exported(model, (images(),))
    assert_tract(model, graph, tract_pass(graph), (images(),), (0,))


def test_called_on_features_under_another_name() -> None:
    layer = nn.Conv2d(3, 3, 3)
    model = built(
        lambda: Net(lambda net, x: net.again(net.stem(x).relu()), stem=layer, again=layer)
    )
    with pytest.raises(UnsupportedLayerError, match="stem is called on the input and again"):
        tract_module(model, images())
    tract = tract_module(model, layers=["again"])
    assert tract.stem is tract.again
    assert_tract(model, model, tract, (images(),), (0, 1))


@pytest.mark.parametrize("stem_first", [True, False])
def test_tied_weights_of_two_modules(stem_first: bool) -> None:
    """An exported graph gives both the name of one; the module that reads the input is treated."""
    model = built(autoencoder(stem_first))
    tract = tract_module(model, images())
    assert "lambda_" in repr(tract.stem) and "lambda_" not in repr(tract.head)
    assert tract.stem.weight is tract.head.weight is model.stem.weight
    assert_tract(model, model, tract, (images(),), (0,))


def test_siamese() -> None:
    model, inputs = built(Siamese), (images(), images(seed=1))
    assert_tract(model, model, tract_module(model, inputs), inputs, (0, 1))


# Refusals.


REFUSED = [case for case in (*OPERATIONS, *SEVERAL, *NOT_AT_ALL) if "export" in case.routes]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_refused_with_a_way_out(case: RefusedCase) -> None:
    """As the pass refuses the exported graph; the choice by name works on the eager model."""
    model, inputs = built(case.build), case.inputs()
    with pytest.raises(case.error) as caught:
        tract_module(model, inputs)
    if not case.layers:
        return
    assert "layers=" in str(caught.value)
    tract = tract_module(model, layers=case.layers)
    assert_tract(model, model, tract, inputs, case.treated)


def test_error_kinds() -> None:
    with pytest.raises(NoInputLayerError):
        tract_module(nn.ReLU(), images())
    with pytest.raises(AmbiguousInputLayerError, match=r"layers=\['stem'\]"):
        tract_module(built(WithMetadata), (images(), images(4, 5)))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: torch_tract.TrActConv2d(3, 4, 3, lambda_=0.1),
        lambda: torch_tract.TrAct(conv(), l=0.1),
        lambda: torch_tract.TrActLinear(8, 4, lambda_=0.1),
    ],
    ids=["conv", "wrapped", "linear"],
)
def test_torch_tract_is_recognised(layer: Callable[[], nn.Module]) -> None:
    model = built(lambda: Net(lambda net, x: net.stem(x), stem=layer()))
    for arguments in ({"example_inputs": images()}, {"layers": "stem"}):
        with pytest.raises(
            UnsupportedLayerError, match=r"torch-tract.*plain nn\.Linear or nn\.Conv2d"
        ):
            tract_module(model, **arguments)


# A second application, and taking it out.


def test_second_application() -> None:
    model = built(chain)
    tract = tract_module(model, images(), lambda_=0.05)
    assert_tract(model, model, tract_module(tract, lambda_=2), (images(),), {0: 2.0})
    added = tract_module(tract, layers={"head": 0.5})
    assert_tract(model, model, added, (images(),), {0: 0.05, 2: 0.5})
    assert type(added.block[0]) is type(tract.block[0])
    assert_tract(model, model, tract, (images(),), {0: 0.05})
    for module in (added, tract):
        plain = remove_tract(module)
        assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
        assert repr(plain) == repr(model)
        assert_plain(model, plain, (images(),))


def test_a_graph_module_goes_to_the_pass() -> None:
    model = built(chain)
    graph = fx.symbolic_trace(model)
    assert_tract(model, graph, tract_module(graph), (images(),), (0,))
    assert_tract(model, graph, tract_module(graph, layers=(n for n in ["head"])), (images(),), (2,))


# Nothing else happens.


def test_locating_leaves_no_trace() -> None:
    model = built(
        lambda: Net(
            lambda net, x: net.drop(net.norm(net.stem(x))),
            stem=parametrizations.spectral_norm(conv()),
            norm=nn.BatchNorm2d(4),
            drop=nn.Dropout(),
        )
    )
    seen: list[Tensor] = []
    model.stem.register_forward_hook(lambda m, args, output: seen.append(output))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = images().requires_grad_()
    random_state = torch.get_rng_state()
    tract = tract_module(model, x)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert x.grad is None and all(p.grad is None for p in model.parameters())
    seen.clear()
    tract(x)
    assert len(seen) == 1


def test_modes_are_kept() -> None:
    model = built(chain)
    model.block.eval()
    tract = tract_module(model, images())
    assert [m.training for m in tract.modules()] == [m.training for m in model.modules()]


def test_no_gradient_no_cost() -> None:
    model = built(chain)
    tract = tract_module(model, images())
    with torch.no_grad():
        assert torch.equal(tract(images()), model(images()))
    assert tract(images()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eval_is_still_tract(dtype: torch.dtype) -> None:
    model = built(chain).to(dtype)
    tract = tract_module(model, images().to(dtype)).eval()
    plain, given = (
        step(m, (images().to(dtype),)).gradients["block.0.weight"] for m in (model, tract)
    )
    assert plain is not None and given is not None
    assert not math.isclose(plain.norm().item(), given.norm().item(), rel_tol=0.01)

"""What is refused before any graph is looked at: models of the wrong kind, λ, `layers`."""

from __future__ import annotations

import decimal
import fractions
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import tract_fx
from reference import Net, assert_tract, built, exported, images
from rewritten import FunctionalNet
from tract_fx import (
    InvalidLambdaError,
    TractError,
    UnknownLayerError,
    UnsupportedModelError,
    find_input_layers,
    remove_tract,
    tract_module,
    tract_pass,
)


def net() -> nn.Module:
    return Net(
        lambda net, x: net.head(net.stem(x).tanh()), stem=nn.Linear(8, 4), head=nn.Linear(4, 2)
    )


def compiled_in_place() -> Any:
    model = built(net)
    model.compile(backend="eager")
    return model


def compiled_inside() -> Any:
    model = built(net)
    model.stem = torch.compile(model.stem, backend="eager")
    return model


def scripted() -> nn.Module:
    result: nn.Module = torch.jit.script(nn.Sequential(nn.Linear(8, 4)))
    return result


def data_parallel() -> nn.Module:
    return nn.DataParallel(built(net))


def distributed() -> nn.Module:
    """A DistributedDataParallel, as far as its class and its `module` go, without processes."""
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = built(net)
    return wrapper


WRAPPED: dict[str, tuple[Callable[[], Any], str]] = {
    "compiled": (lambda: torch.compile(built(net), backend="eager"), "before torch.compile"),
    "compiled-in-place": (compiled_in_place, "before torch.compile"),
    "compiled-inside": (compiled_inside, r"stem is a OptimizedModule.*before torch\.compile"),
    "scripted": (scripted, "the module that it was made from"),
    "data-parallel": (data_parallel, r"\.module"),
    "distributed": (distributed, r"\.module"),
}
NO_MODULES = {
    "string": "model",
    "none": None,
    "class": nn.Linear,
    "function": torch.relu,
    "list": [nn.Linear(8, 4)],
    "state-dict": nn.Linear(8, 4).state_dict(),
    "graph": fx.symbolic_trace(nn.Linear(8, 4)).graph,
}

CALLS: dict[str, Callable[[Any], Any]] = {
    "tract_pass": tract_pass,
    "find_input_layers": find_input_layers,
    "tract_module": lambda model: tract_module(model, images()),
    "tract_module-layers": lambda model: tract_module(model, layers="stem"),
    "remove_tract": remove_tract,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", NO_MODULES)
def test_no_module(call: str, kind: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        CALLS[call](NO_MODULES[kind])
    message = str(caught.value)
    assert type(NO_MODULES[kind]).__name__ in message
    assert "Give a" in message


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_module(call: str, kind: str) -> None:
    """These go on calling the layers that they were made with, whatever a copy of them holds."""
    make, remedy = WRAPPED[kind]
    model = make()
    with pytest.raises(UnsupportedModelError, match=remedy) as caught:
        CALLS[call](model)
    assert type(model).__name__ in str(caught.value)


@pytest.mark.parametrize("call", ["tract_pass", "find_input_layers"])
def test_module_that_is_no_graph(call: str) -> None:
    model = built(net)
    with pytest.raises(UnsupportedModelError, match=r"class Net.*symbolic_trace.*tract_module"):
        CALLS[call](model)
    # The three ways out that the message names.
    for tract in (
        tract_pass(fx.symbolic_trace(model)),
        tract_pass(torch.export.export(model, (images(),))),
        tract_module(model, images()),
    ):
        assert_tract(model, model, tract, (images(),), (0,))


def test_exported_program_for_the_eager_call() -> None:
    program = torch.export.export(built(net), (images(),))
    with pytest.raises(UnsupportedModelError, match=r"ExportedProgram.*Give it to tract_pass"):
        tract_module(program, images())  # type: ignore[type-var]


def test_exported_program_for_remove() -> None:
    program = torch.export.export(tract_pass(fx.symbolic_trace(built(net))), (images(),))
    with pytest.raises(UnsupportedModelError, match="ExportedProgram"):
        remove_tract(program)  # type: ignore[type-var]


def test_compiling_what_comes_back_is_the_way() -> None:
    """And a graph compiled in place is refused like any module."""
    model = built(net)
    tract = tract_pass(fx.symbolic_trace(model))
    tract.compile(backend="eager")
    assert_tract(model, model, tract, (images(),), (0,))
    for call in (tract_pass, find_input_layers, remove_tract):
        with pytest.raises(UnsupportedModelError, match="compiled"):
            call(tract)


def test_the_module_inside_a_wrapper_is_the_way() -> None:
    wrapper = data_parallel()
    model = wrapper.module
    assert isinstance(model, nn.Module)
    assert_tract(model, model, tract_module(model, images()), (images(),), (0,))


BAD_LAMBDAS = {
    "zero": 0,
    "negative": -0.1,
    "negative-zero": -0.0,
    "nan": math.nan,
    "infinity": math.inf,
    "minus-infinity": -math.inf,
    "true": True,
    "false": False,
    "string": "0.1",
    "none": None,
    "complex": 0.1 + 0j,
    "tensor": torch.tensor(0.1),
    "array": np.array(0.1),
    "list": [0.1],
    "decimal": decimal.Decimal("0.1"),
    "numpy-nan": np.float32("nan"),
    "numpy-bool": np.bool_(True),
}


@pytest.mark.parametrize("name", BAD_LAMBDAS)
def test_bad_lambda(name: str) -> None:
    value: Any = BAD_LAMBDAS[name]
    model = built(net)
    graph = fx.symbolic_trace(model)
    calls: list[Callable[[], Any]] = [
        lambda: tract_pass(graph, lambda_=value),
        lambda: tract_pass(graph, lambda_=value, layers="stem"),
        lambda: tract_pass(graph, lambda_=value, layers={"stem": 0.1}),
        lambda: tract_pass(graph, layers={"stem": 0.1, "head": value}),
        lambda: tract_module(model, images(), lambda_=value),
        lambda: tract_module(model, layers={"stem": value}),
        lambda: tract_pass(exported(model, (images(),)), lambda_=value),
    ]
    for call in calls:
        with pytest.raises(InvalidLambdaError) as caught:
            call()
        assert repr(value) in str(caught.value) and "0.05, 0.1" in str(caught.value)
        assert isinstance(caught.value, ValueError)


def test_lambda_is_checked_before_the_model() -> None:
    with pytest.raises(InvalidLambdaError):
        tract_module(built(net), object(), lambda_=-1)


@pytest.mark.parametrize(
    "value", [1, np.float32(0.5), np.float64(0.5), np.int64(1), fractions.Fraction(1, 3)], ids=repr
)
def test_numbers_of_other_types_become_floats(value: Any) -> None:
    model = built(net)
    modules: tuple[Any, ...] = (
        tract_pass(fx.symbolic_trace(model), lambda_=value),
        tract_module(model, images(), lambda_=value),
        tract_module(tract_module(model, images()), lambda_=value),
        tract_module(model, layers={"stem": value}),
    )
    for tract in modules:
        assert type(tract.stem.tract_lambda) is float
    graph = exported(model, (images(),))
    for tract in (tract_pass(graph, lambda_=value), tract_pass(graph, layers={"stem": value})):
        (layer,) = find_input_layers(tract).layers
        assert type(layer.lambda_) is float
        assert_tract(model, graph, tract, (images(),), {0: float(value)})


BAD_LAYERS: dict[str, Any] = {
    "empty-list": [],
    "empty-dict": {},
    "number": 3,
    "true": True,
    "numbers": [0],
    "none-inside": [None],
    "nested": [["stem"]],
    "bytes": b"stem",
    "module": nn.Linear(2, 2),
    "modules": [nn.Linear(2, 2)],
    "number-keys": {0: 0.1},
    "empty-generator": iter([]),
}


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_bad_layers(name: str) -> None:
    value: Any = BAD_LAYERS[name]
    model = built(net)
    calls: list[Callable[[], Any]] = [
        lambda: tract_pass(fx.symbolic_trace(model), layers=value),
        lambda: tract_module(model, layers=value),
        lambda: tract_module(model, images(), layers=value),
    ]
    for call in calls:
        with pytest.raises(UnknownLayerError, match="layers takes one or more names") as caught:
            call()
        assert str(caught.value).startswith("layers=")


def test_errors_have_one_root_and_three_parts() -> None:
    model = built(net)
    graph = fx.symbolic_trace(model)
    raised: list[TractError] = []
    calls: list[Callable[[], Any]] = [
        lambda: tract_pass(model),
        lambda: tract_pass(graph, lambda_=0),
        lambda: tract_pass(graph, layers="none"),
        lambda: tract_pass(fx.symbolic_trace(nn.ReLU())),
        lambda: tract_pass(fx.symbolic_trace(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)))),
        lambda: tract_module(model),
    ]
    for call in calls:
        with pytest.raises(TractError) as caught:
            call()
        error = caught.value
        raised.append(error)
        assert error.found and error.reason and error.remedy
        assert str(error) == f"{error.found}: {error.reason}. {error.remedy}."
        assert ".." not in str(error)
    assert len({type(error) for error in raised}) == 5


def test_every_error_is_public() -> None:
    import tract_fx.errors

    assert set(tract_fx.errors.__all__) <= set(tract_fx.__all__)


def test_keywords_only() -> None:
    graph: Any = fx.symbolic_trace(built(net))
    with pytest.raises(TypeError):
        tract_pass(graph, 0.1)  # type: ignore[call-arg]


def test_a_model_that_takes_no_input() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(8, 2)
            self.register_buffer("latent", images(3, 8))

        def forward(self) -> Tensor:
            result: Tensor = self.stem(self.latent)
            return result

    model = built(Constant)
    graph = fx.symbolic_trace(model)
    with pytest.raises(tract_fx.NoInputLayerError, match="layers="):
        tract_pass(graph)
    assert_tract(model, graph, tract_pass(graph, layers="stem"), (), (0,))


def jagged() -> Tensor:
    parts = [torch.randn(3, 6), torch.randn(5, 6)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (lambda: torch.eye(5, 6).to_sparse(), r"sparse_coo.*x\.to_dense\(\)"),
        (lambda: torch.eye(5, 6).to_sparse_csr(), r"sparse_csr.*x\.to_dense\(\)"),
        (jagged, r"nested input.*to_padded_tensor"),
        (lambda: torch.nested.nested_tensor([torch.randn(3, 6)]), r"nested input"),
    ],
    ids=["coo", "csr", "jagged", "nested"],
)
def test_inputs_without_rows_are_refused_in_the_forward_pass(
    x: Callable[[], Tensor], says: str
) -> None:
    model = tract_module(nn.Sequential(nn.Linear(6, 4)), layers="0")
    with pytest.raises(tract_fx.UnsupportedLayerError, match=says):
        model(x())


def test_expanded_weights_are_refused() -> None:
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    model = tract_module(nn.Linear(6, 4), layers="")
    with pytest.raises(tract_fx.UnsupportedTransformError, match=r"ExpandedWeight.*torch\.func"):
        call_for_per_sample_grads(model)(torch.randn(5, 6))


class OfAList(torch.Tensor):
    """Knows one function, as classes do that are written for some domain."""

    @classmethod
    def __torch_function__(cls, function: Any, *rest: Any) -> Any:
        known: Any = super().__torch_function__
        return known(function, *rest) if function is nn.functional.linear else NotImplemented


def test_classes_of_tensors_that_know_a_list_of_functions_are_refused() -> None:
    x = torch.randn(5, 6).as_subclass(OfAList)
    model = nn.Linear(6, 4)
    assert type(model(x)) is OfAList
    with pytest.raises(
        tract_fx.UnsupportedLayerError, match=r"an input of class OfAList.*as_subclass"
    ):
        tract_module(model, layers="")(x)


@pytest.mark.parametrize("way", ["graph", "program", "module"])
def test_exports_for_inference_name_both_ways(way: str, tmp_path: Path) -> None:
    """Refused, or a graph would be exported that is never trained with TrAct."""
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU()), torch.randn(5, 6)
    ways: dict[str, Callable[[], nn.Module]] = {
        "graph": lambda: tract_pass(fx.symbolic_trace(model)),
        "program": lambda: tract_pass(torch.export.export(model, (x,))),
        "module": lambda: tract_module(model, x),
    }
    tract = ways[way]()
    both = r"(?s)remove_tract\(model\).*export_training"
    for given, inputs in ((tract, (x,)), (torch.export.export(tract, (x,)), ())):
        with pytest.raises(Exception, match=both):  # of the exporter's class, around ours
            torch.onnx.export(given, inputs, tmp_path / "it.onnx", dynamo=True, verbose=False)
    if way != "program":  # which PyTorch can't script without TrAct either
        with pytest.raises(tract_fx.UnsupportedTransformError, match=both):
            torch.jit.script(tract)
    torch.jit.script(remove_tract(fx.symbolic_trace(model)))


def test_a_function_call_in_a_graph_is_not_scripted() -> None:
    model = FunctionalNet(nn.Linear(6, 4), nn.Linear(4, 2))
    with pytest.raises(tract_fx.UnsupportedTransformError, match="remove_tract"):
        torch.jit.script(tract_pass(fx.symbolic_trace(model)))


def wrapped_inside() -> dict[str, Any]:
    """Models with something inside that goes on calling the original."""
    prepared: Any = nn.Linear(6, 4)
    prepared._is_accelerate_prepared = True  # as accelerator.prepare leaves a model
    program = torch.export.export(nn.Sequential(nn.Linear(6, 4)), (torch.randn(5, 6),))
    compiled: Any = torch.compile(nn.Linear(6, 4))
    return {
        "DataParallel": nn.Sequential(nn.DataParallel(nn.Linear(6, 4))),
        "Accelerate": prepared,
        "exported program itself": torch.export.unflatten(program),
        "compiled": nn.Sequential(compiled),
    }


@pytest.mark.parametrize("name", wrapped_inside())
def test_what_is_wrapped_inside_is_refused(name: str) -> None:
    model = wrapped_inside()[name]
    with pytest.raises(tract_fx.UnsupportedModelError):
        tract_module(model, torch.randn(5, 6))
    with pytest.raises(tract_fx.UnsupportedModelError):
        tract_module(model, layers=["0"])

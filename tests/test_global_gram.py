"""One Gram over several processes: training as torchrun starts it, against one large batch."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock  # a requirement of torch's
from torch import Tensor, fx, nn

from forked import run_group
from global_gram import CASES, CONV, ERRORS, FORMS, SMALL, WAYS, Net, loss, wanted, weight_of
from global_gram_steps import COUNTS  # whose import adds its cases to the others
from oracle import relative_error
from rewritten import FLOAT64
from tract_fx import (
    ExportError,
    InvalidGramError,
    ProcessGroupError,
    UnsupportedTransformError,
    find_input_layers,
    is_tract,
    tract_module,
    tract_pass,
)
from tract_fx.preconditioner.global_gram import pack, packed_size, unpack

Results = list[dict[str, float | str]]

needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this build of torch has no gloo",
)


@pytest.fixture(scope="session")
def every_result(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Results]:
    """What processes have found, by case, and by their number; once for all of pytest's workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "global"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            run_group(Path(__file__).with_name("global_gram_steps.py"), folder)
    return {
        count: [json.loads((folder / f"{count}-{rank}.json").read_text()) for rank in range(count)]
        for count in COUNTS
    }


@pytest.fixture
def results(every_result: dict[int, Results], request: pytest.FixtureRequest) -> Results:
    return every_result[request.param]


@needs_gloo
@pytest.mark.parametrize(
    ("results", "name"),
    [*((2, name) for name in CASES), *((4, name) for name in SMALL)],
    indirect=["results"],
)
def test_gradient_is_that_of_one_large_batch(results: Results, name: str) -> None:
    for found in results:
        error = found[name]
        assert isinstance(error, float)
        assert error < FLOAT64, name


WORDS = {
    "another λ": ["process 0: first, λ = 0.2, 27", "process 1: first, λ = 0.1, 27"],
    "another shape": ["process 0: first, λ = 0.1, 27 columns", "process 1: first, λ = 0.1, 18"],
    "another layer": ["process 0: stem", "process 1: first"],
    "a process that does not come": ["of the layer 'first': within 1 s", "come to it: [1]"],
    "a process that stays away later": ["of the layer 'first'", "not all of them", "equally often"],
    "join": ["join() over TrAct's Gram of the layer 'first'", "throw_on_early_termination=True"],
    "clipped micro-batches": ["of 'module.first', changed since", "sync_gradients"],
    "FSDP2 that keeps gradients elsewhere": ["no gradient of 'first' at the end", "tract_step in"],
    "a group of other ranks": ["of ranks 0-7: there is no such group", "tract_module again"],
}


@needs_gloo
@pytest.mark.parametrize(("results", "name"), [(2, n) for n in ERRORS], indirect=["results"])
def test_where_processes_disagree_is_an_error(results: Results, name: str) -> None:
    alone = "process that" in name
    for found in results[:1] if alone else results:
        for words in WORDS[name]:
            assert words in str(found[name])


# In one process.


def layer_input(name: str = "conv") -> tuple[Net, Tensor]:
    return FORMS[name].net(), FORMS[name].input(0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["conv", "rows-too-few", "groups"])
def test_alone_it_is_this_process_own(name: str, way: str) -> None:
    net, x = layer_input(name)
    model = WAYS[way](copy.deepcopy(net), x)
    loss(model, x, len(x)).backward()
    found = weight_of(model).grad
    assert found is not None
    assert relative_error(found, wanted(net, [x])) < FLOAT64


@pytest.mark.parametrize("n", range(9))
def test_half_of_a_symmetric_matrix_is_all_of_it(n: int) -> None:
    matrix = torch.randn(3, n, n, dtype=torch.float64)
    matrix += matrix.mT.clone()
    packed = pack(matrix)
    assert packed.shape == (3, packed_size(n))
    assert packed_size(n) <= (n + 1) * (n + 2) // 2
    assert torch.equal(unpack(packed, n), matrix)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gram": "all"}, "gram='all'"),
        ({"process_group": "dp"}, "process_group with gram='local'"),
        ({"gram": "global", "process_group": "dp"}, "no process group that this process"),
    ],
)
def test_what_says_not_whose_rows_is_refused(options: dict[str, Any], words: str) -> None:
    net, x = layer_input()
    with pytest.raises(InvalidGramError, match=words):
        tract_pass(fx.symbolic_trace(net), **options)
    with pytest.raises(InvalidGramError, match=words):
        tract_module(net, x, **options)


def test_a_group_from_elsewhere_is_none_here() -> None:
    net, x = layer_input()
    model = tract_module(net, x, gram="global")
    vars(model.first)["tract_scope"] = "7:0-3|first"
    with pytest.raises(ProcessGroupError, match=r"group '7' of ranks 0-3.*process_group=None"):
        model(x).sum().backward()


def test_export_to_onnx_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnx_ir")
    from tract_fx import export_training

    net, x = layer_input()
    for way, rewrite in WAYS.items():
        model = rewrite(net.float(), x.float())
        with pytest.raises(ExportError, match="gram='global' on first: ONNX Runtime's graph runs"):
            export_training(model, x.float(), tmp_path / way, loss="mse", target="onnxruntime")
        assert not (tmp_path / way).exists()


def squares(model: nn.Module, x: Tensor) -> Any:
    return lambda weight: (
        torch.func.functional_call(model, {"first.weight": weight}, (x,)).square().sum()
    )


TRANSFORMS: dict[str, Any] = {
    "grad": lambda f, w, x: torch.func.grad(f)(w),
    "vmap": lambda f, w, x: torch.func.vmap(torch.func.grad(f))(torch.stack([w, w])),
    "jvp": lambda f, w, x: torch.func.jvp(f, (w,), (w,)),
    "second": lambda f, w, x: torch.autograd.grad(
        torch.autograd.grad(f(w), [w], create_graph=True)[0].sum(), [w]
    ),
    "second in the input": lambda f, w, x: torch.autograd.grad(
        torch.autograd.grad(f(w), [w], create_graph=True)[0].sum(), [x]
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("way", WAYS)
def test_transforms_without_a_rule_are_refused(way: str, transform: str) -> None:
    net, x = layer_input()
    x.requires_grad_()
    model = WAYS[way](net, x.detach())
    weight = weight_of(model).detach().requires_grad_()
    with pytest.raises(UnsupportedTransformError, match=r"several processes \(gram='global'\)"):
        TRANSFORMS[transform](squares(model, x), weight, x)


def test_the_input_s_gradient_alone_asks_for_no_gram(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one process that computes a saliency map would wait for the others."""
    net, x = layer_input()
    for way, rewrite in WAYS.items():
        model, x = rewrite(net, x.detach()), x.detach().requires_grad_()
        output = model(x).sum()
        with monkeypatch.context() as patch:
            patch.setattr("tract_fx.preconditioner.operators.precondition_over_group", None)
            torch.autograd.grad(output, [x], retain_graph=True)
            with pytest.raises(TypeError):  # the patch is where it has to be
                output.backward()
        assert way


def test_a_layer_that_stays_keeps_its_scope() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) + self.right(x)  # type: ignore[no-any-return]

    def groups(gm: fx.GraphModule) -> dict[str, str | None]:
        return {layer.name: layer.group for layer in find_input_layers(gm).layers}

    gm = tract_pass(fx.symbolic_trace(Two()), layers=["left"], gram="global")
    assert groups(gm) == {"left": "world", "right": None}
    gm = tract_pass(gm, layers={"right": 0.2})
    assert groups(gm) == {"left": "world", "right": None}
    assert is_tract(gm) == {"left": 0.1, "right": 0.2}
    gm = copy.deepcopy(gm)
    assert groups(gm) == {"left": "world", "right": None}
    assert "gram='global'" in repr(gm.left) and "gram" not in repr(gm.right)
    assert groups(tract_pass(gm)) == {"left": None, "right": None}


def test_nodes_of_exported_graphs_say_whose_rows() -> None:
    x = CONV.input(0)
    gm = WAYS["exported"](CONV.net(), x)
    assert "scope = 'world|first'" in gm.code  # type: ignore[operator]
    again = torch.export.export(gm, (x,)).module()
    assert isinstance(again, fx.GraphModule)
    (layer,) = find_input_layers(again).layers
    assert layer.group == "world" and layer.lambda_ == 0.1
    assert find_input_layers(tract_pass(again)).layers[0].group is None

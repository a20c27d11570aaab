"""The model is the user's: nothing of it changes, and what comes back is a tree of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from reference import ROUTES, Net, assert_plain, assert_tract, built, images
from tract_fx import find_input_layers, remove_tract, tract_module, tract_pass


def net() -> nn.Module:
    inner = Net(
        lambda net, x: net.norm(net.conv(x)), conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4)
    )
    return Net(
        lambda net, x: net.head(net.inner(net.stem((x - net.mean) / 2)).relu()),
        stem=parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        inner=inner,
        head=nn.Linear(4, 2),
        mean=images(3, 1, 1),
    )


CALLS: dict[str, Callable[[Any], Any]] = {
    "tract_pass": tract_pass,
    "tract_pass-layers": lambda model: tract_pass(model, layers={"head": 0.5}),
    "find_input_layers": find_input_layers,
    "tract_module": lambda model: tract_module(model, images()),
    "remove_tract": remove_tract,
    "remove_tract-again": lambda model: remove_tract(tract_pass(model)),
}


def made(route: str) -> Any:
    model = built(net)
    return model if route == "eager" else ROUTES[route](model, (images(),))


def routes_and_calls() -> list[Any]:
    return [
        pytest.param(route, call, id=f"{route}-{call}")
        for route in (*ROUTES, "eager")
        for call in CALLS
        if route != "eager" or call in ("tract_module", "remove_tract")
    ]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a module tree that a pass could change."""
    result: dict[str, Any] = {
        "tensors": {
            name: (id(t), t._version, t.clone(), t.requires_grad)
            for name, t in (*model.named_parameters(), *model.named_buffers())
        }
    }
    for name, module in model.named_modules():
        result[name] = {
            "class": type(module),
            "id": id(module),
            "attributes": {
                key: {k: id(v) for k, v in value.items()}
                if isinstance(value, dict)
                else value
                if isinstance(value, (bool, int, float, str, tuple))
                else id(value)
                for key, value in vars(module).items()
            },
        }
        if isinstance(module, fx.GraphModule):
            result[name]["code"] = module.code
            result[name]["nodes"] = [
                (n.op, n.name, str(n.target), str(n.args), str(n.kwargs), sorted(n.meta), id(n))
                for n in module.graph.nodes
            ]
            result[name]["custom"] = [copy.copy(n.meta.get("custom")) for n in module.graph.nodes]
    return result


def assert_equal(before: dict[str, Any], after: dict[str, Any]) -> None:
    tensors = before.pop("tensors"), after.pop("tensors")
    assert tensors[0].keys() == tensors[1].keys()
    for (*head, _, grad), (*head_after, _, grad_after) in zip(
        *(t.values() for t in tensors), strict=True
    ):
        assert head[:2] == head_after[:2] and grad == grad_after
        assert torch.equal(head[2], head_after[2]) if len(head) > 2 else True
    assert before == after


@pytest.mark.parametrize(("route", "call"), routes_and_calls())
def test_input_is_not_changed(route: str, call: str) -> None:
    model = made(route)
    model.register_forward_hook(lambda m, args, output: None)
    before = snapshot(model)
    CALLS[call](model)
    assert_equal(before, snapshot(model))


@pytest.mark.parametrize("route", ["symbolic_trace", "export"])
def test_tract_graph_is_not_changed(route: str) -> None:
    graph = made(route)
    tract = tract_pass(graph)
    before = snapshot(tract)
    for call in CALLS.values():
        call(tract)
    assert_equal(before, snapshot(tract))


def treated(route: str) -> tuple[Any, Any]:
    model = made(route)
    return model, tract_module(model, images()) if route == "eager" else tract_pass(model)


each_kind = pytest.mark.parametrize("route", [*ROUTES, "eager"])


@each_kind
def test_tensors_are_shared_and_named_alike(route: str) -> None:
    model, tract = treated(route)
    assert list(tract.state_dict()) == list(model.state_dict())
    for kind in ("named_parameters", "named_buffers"):
        pairs = zip(getattr(model, kind)(), getattr(tract, kind)(), strict=True)
        assert all(a == b and p is q for (a, p), (b, q) in pairs)
    saved = copy.deepcopy(model.state_dict())
    assert not any(tract.load_state_dict(saved))
    assert not any(model.load_state_dict(tract.state_dict()))


@each_kind
def test_state_dict_goes_both_ways(route: str) -> None:
    """Between separate models: one that trained with TrAct, one that never saw it."""
    model = built(net)
    other = copy.deepcopy(model)
    tract = tract_module(model, images()) if route == "eager" else tract_pass(made(route))
    with torch.no_grad():
        for parameter in tract.parameters():
            parameter.add_(1)
    other.load_state_dict(tract.state_dict())
    assert all(
        torch.equal(value, other.state_dict()[name]) for name, value in tract.state_dict().items()
    )
    tract.load_state_dict(built(net).state_dict())


@each_kind
def test_modules_are_not_shared(route: str) -> None:
    model, tract = treated(route)
    assert {id(m) for m in model.modules()}.isdisjoint(id(m) for m in tract.modules())
    plain = remove_tract(tract)
    assert {id(m) for m in plain.modules()}.isdisjoint(id(m) for m in tract.modules())


@pytest.mark.parametrize("route", ["symbolic_trace", "eager"])
def test_modes_are_separate(route: str) -> None:
    """An exported module has no eval()."""
    model, tract = treated(route)
    tract.eval()
    assert all(m.training for m in model.modules())
    assert not any(m.training for m in tract.modules())
    model.get_submodule("inner").eval()
    tract.train()
    assert not model.get_submodule("inner.norm").training
    assert tract.get_submodule("inner.norm").training


@each_kind
def test_hooks_are_separate(route: str) -> None:
    model, tract = treated(route)
    seen: list[str] = []
    for name, root in (("model", model), ("tract", tract)):
        for path, module in list(root.named_modules()):
            if "parametrizations" not in path:
                label = f"{name}:{path}"
                module.register_forward_hook(lambda *_, label=label: seen.append(label))
    tract(images())
    assert seen and all(label.startswith("tract:") for label in seen)
    assert "tract:" in seen
    assert (route == "export") or {"tract:stem", "tract:head"} <= set(seen)
    seen.clear()
    model(images())
    assert seen and all(label.startswith("model:") for label in seen)


@pytest.mark.parametrize("route", ["symbolic_trace", "eager"])
def test_hooks_of_before_fire_on_both(route: str) -> None:
    model = built(net)
    seen: list[type[nn.Module]] = []
    scale = 3.0

    def pre(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(type(module))
        return (args[0] * scale,)

    def backward(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        seen.append(type(module))

    model.stem.register_forward_pre_hook(pre)
    model.stem.register_full_backward_hook(backward)
    plain = model if route == "eager" else fx.symbolic_trace(model)
    tract = tract_module(model, images()) if route == "eager" else tract_pass(plain)
    seen.clear()
    tract(images()).sum().backward()
    assert len(seen) == 2 and all(issubclass(cls, nn.Conv2d) for cls in seen)
    model.zero_grad()
    # The layer reads what the hook gives it, and that is what X holds.
    assert_tract(model, plain, tract, (images(),), (0,))


@each_kind
def test_hooks_of_a_removed_handle_stay_removed(route: str) -> None:
    model = made(route)
    seen: list[int] = []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    tract = tract_module(model, images()) if route == "eager" else tract_pass(model)
    seen.clear()
    handle.remove()
    model(images())
    assert not seen
    tract(images())
    assert seen == [1]


@each_kind
def test_replacing_a_child_stays_on_one_side(route: str) -> None:
    model, tract = treated(route)
    names = [name for name, _ in tract.named_children()]
    setattr(tract, names[0], nn.Identity())
    assert not isinstance(getattr(model, names[0]), nn.Identity)
    tract.register_buffer("extra", torch.zeros(1))
    assert "extra" not in dict(model.named_buffers())


@pytest.mark.parametrize("route", ROUTES)
def test_editing_one_graph_leaves_the_other(route: str) -> None:
    model, tract = treated(route)
    code = model.code
    for node in tract.graph.nodes:
        node.meta.setdefault("custom", {})["mine"] = 1
    tract.graph.erase_node(next(iter(n for n in reversed(tract.graph.nodes) if n.op == "output")))
    assert model.code == code and len(list(model.graph.nodes)) > 5
    assert not any("mine" in (node.meta.get("custom") or {}) for node in model.graph.nodes)


@each_kind
def test_training_one_moves_the_other(route: str) -> None:
    """One set of weights: a step with TrAct is seen by the plain model, and the other way round."""
    model, tract = treated(route)
    before = model(images()).detach()
    tract(images()).square().sum().backward()
    torch.optim.SGD(tract.parameters(), lr=0.1).step()
    assert not torch.equal(model(images()), before)
    assert torch.equal(
        dict(model.named_parameters())["head.weight"], dict(tract.named_parameters())["head.weight"]
    )


@each_kind
def test_removed_is_the_model_again(route: str) -> None:
    model, tract = treated(route)
    assert_plain(model, remove_tract(tract), (images(),))
    assert_tract(built(net), model, tract, (images(),), (0,))

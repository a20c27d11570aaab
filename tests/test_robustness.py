"""What users do to models around the pass: each right, or refused by name."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from oracle import relative_error
from rewritten import CONV_ABOVE, LINEAR_BELOW, Case, assert_tract, each, gradient, loss
from tract_fx import (
    AmbiguousInputLayerError,
    InvalidLambdaError,
    PatchGeometry,
    UnsupportedLayerError,
    UnsupportedModelError,
    find_input_layers,
    precondition_grad,
    tract_module,
    tract_pass,
)
from tract_fx.preconditioner.settings import CallSettings

ABOVE = tuple(Case(CONV_ABOVE, way) for way in ("call_module", "exported_node", "tract_module"))
BOTH = tuple(Case(form, "call_module") for form in (CONV_ABOVE, LINEAR_BELOW))


@each(*ABOVE)
def test_make_fx_with_detached_parameters_keeps_the_op(case: Case) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    detached = {name: p.detach() for name, p in model.named_parameters()}
    graph = make_fx(lambda p, x: functional_call(model, p, (x,)))(detached, x)
    leaves = {name: p.clone().requires_grad_() for name, p in detached.items()}
    loss(graph(leaves, x)).backward()
    assert_tract(leaves["first.weight"].grad, net, x)


@each(*BOTH)
def test_four_threads_on_one_model(case: Case) -> None:
    net, model = case.net(), case.rewrite(case.net())
    batches = [case.batch(seed=i) for i in range(4)]
    found: list[Tensor | None] = [None] * 4
    weight = next(p for name, p in model.named_parameters() if name == "first.weight")

    def work(i: int) -> None:
        (found[i],) = torch.autograd.grad(loss(model(batches[i])), [weight])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, g in zip(batches, found, strict=True):
        assert_tract(g, net, x)


@each(*ABOVE)
def test_second_application_follows_an_edited_call(case: Case) -> None:
    """After the call's input and stride have been changed in the graph."""
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    if case.way == "tract_module":
        model = fx.symbolic_trace(model)
    assert isinstance(model, fx.GraphModule)
    layers = find_input_layers(model).layers
    (node,) = (n for n in model.graph.nodes if n.name == layers[0].node)
    x_node = node.args[0]
    with model.graph.inserting_before(node):
        scaled = model.graph.call_function(torch.mul, (x_node, 3.0))
    node.update_arg(0, scaled)
    model.recompile()
    assert_tract(gradient(tract_pass(model), x), net, 3 * x)


def test_optional_input_competes() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.image = nn.Linear(3, 4), nn.Conv2d(3, 4, 3)

        def forward(self, table: Tensor, image: Tensor | None = None) -> Tensor:
            return self.table(table) + self.image(image).mean((2, 3))  # type: ignore[no-any-return]

    with pytest.raises(AmbiguousInputLayerError):
        tract_pass(fx.symbolic_trace(TwoInputs()))


def test_only_input_may_be_optional() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)

        def forward(self, pixel_values: Tensor | None = None) -> Tensor:
            return self.stem(pixel_values)  # type: ignore[no-any-return]

    assert find_input_layers(fx.symbolic_trace(Optional())).names == ("stem",)


def test_optional_mask_that_joins_features_does_not_compete() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(6, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.head(self.embed(x) + mask)  # type: ignore[no-any-return]

    assert find_input_layers(fx.symbolic_trace(Masked())).names == ("embed",)


@pytest.mark.parametrize("shape", [(8, 4), (2, 4)], ids=["rows above", "rows below"])
@pytest.mark.parametrize("lambda_", [0.0, -0.1, float("nan"), 10**400])
def test_op_checks_lambda(lambda_: float, shape: tuple[int, int]) -> None:
    weight = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(InvalidLambdaError):
        precondition_grad(weight, torch.ones(shape), lambda_=lambda_)


def test_op_checks_that_weight_and_input_are_of_one_layer() -> None:
    weight = torch.ones(6, 3, 3, 3, requires_grad=True)
    z = precondition_grad(weight, torch.ones(2, 6, 8, 8), lambda_=0.1)
    with pytest.raises(UnsupportedLayerError, match="not of one layer"):
        z.sum().backward()


def test_complex_weights_are_refused() -> None:
    model = tract_pass(fx.symbolic_trace(nn.Sequential(nn.Linear(4, 2)))).to(torch.cfloat)
    with pytest.raises(UnsupportedLayerError, match="real numbers"):
        model(torch.randn(3, 4, dtype=torch.cfloat))


def test_load_state_dict_hook_gets_the_copy_and_outlives_the_original() -> None:
    called: list[nn.Module] = []
    model = nn.Sequential(nn.Linear(4, 2))
    model[0].register_load_state_dict_pre_hook(lambda module, *_: called.append(module))
    model.register_load_state_dict_post_hook(lambda module, _: called.append(module))
    treated = tract_module(model, layers="0")
    state = treated.state_dict()
    del model
    gc.collect()
    treated.load_state_dict(state)
    assert called == [treated[0], treated]


def test_modules_that_guard_their_attributes() -> None:
    class Locked(nn.Sequential):
        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name)

    locked = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    locked.__class__ = Locked
    treated = tract_module(nn.Sequential(locked, nn.Linear(4, 2)), layers="0.0")
    assert type(treated[0]) is Locked


def test_two_names_of_one_module_take_one_lambda() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer)
    with pytest.raises(UnsupportedLayerError, match="one module"):
        tract_module(model, layers={"0": 0.1, "1": 0.2})
    assert type(tract_module(model, layers={"0": 0.2, "1": 0.2})[1]) is not nn.Linear


def test_scripted_child_is_shared() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(torch.jit.script(nn.Linear(4, 2)))
    treated = tract_module(model, layers="0")
    assert treated[2] is model[2]
    assert treated(torch.ones(3, 4)).shape == (3, 2)


def test_second_derivative_by_the_input_under_autocast() -> None:
    """P depends on the input as autocast rounds it, so its derivative does too."""
    generator = torch.Generator().manual_seed(0)
    x, grad, cotangent = (
        torch.randn(shape, generator=generator) for shape in ((14, 6), (3, 6), (3, 6))
    )

    def derivative(x: Tensor, grad: Tensor, dtype: torch.dtype | None) -> Tensor:
        x = x.detach().requires_grad_()
        arguments = CallSettings(0.1, PatchGeometry(), dtype).operator_arguments()
        result = torch.ops.tract_fx.precondition(grad, x, *arguments)
        return torch.autograd.grad(result, x, cotangent.to(result.dtype))[0]

    wanted = derivative(x.bfloat16().double(), grad.double(), None)
    assert relative_error(derivative(x, grad, torch.bfloat16), wanted) < 1e-5


def test_meta_device() -> None:
    with torch.device("meta"):
        model = tract_module(nn.Sequential(nn.Conv2d(3, 4, 3)), layers="0")
        output = model(torch.empty(2, 3, 8, 8))
    assert output.shape == (2, 4, 6, 6) and output.requires_grad


def test_layer_without_features() -> None:
    layer = nn.Linear(0, 3)
    tract_module(nn.Sequential(layer), layers="0")(torch.ones(4, 0)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.shape == (3, 0)


@each(*BOTH)
def test_default_dtype_does_not_matter(case: Case) -> None:
    net, x = case.net(), case.batch()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        found = gradient(case.rewrite(net), x)
    finally:
        torch.set_default_dtype(before)
    assert_tract(found, net, x)


def test_sharded_model_is_refused() -> None:
    class FSDPModule:
        """Stands for torch.distributed.fsdp's, which needs a process group to come about."""

    model = nn.Sequential(nn.Linear(4, 2))
    model.__class__ = type("FSDPSequential", (FSDPModule, nn.Sequential), {})
    with pytest.raises(UnsupportedModelError, match="fully_shard"):
        tract_module(model, layers="0")


@each(*ABOVE)
def test_averaged_copies_follow(case: Case) -> None:
    net, x = case.net(), case.batch()
    averaged = torch.optim.swa_utils.AveragedModel(case.rewrite(net))
    found = gradient(averaged.module, x)
    assert relative_error(found, gradient(case.rewrite(copy.deepcopy(net)), x)) == 0
    assert_tract(found, net, x)

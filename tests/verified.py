"""Verifying a rewritten model, from its parts: locate, run both models, compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tract_fx import remove_tract, tract_module, tract_pass
from tract_fx.inspection.marks import lost_marks
from tract_fx.inspection.records import Verification
from tract_fx.inspection.runs import Loss, Runs, observe
from tract_fx.inspection.verify import verify
from tract_fx.passes.fx_graph import locate
from tract_fx.passes.records import InputLayer


def treated(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[InputLayer]:
    """The calls with TrAct, as locating finds them."""
    graph: Any = model
    if not isinstance(model, fx.GraphModule):
        with torch.random.fork_rng():
            graph = torch.export.export(model, args, dict(kwargs), strict=False).module()
    return [record for record, _ in locate(graph).eligible if record.lambda_ is not None]


def runs_of(
    model: nn.Module,
    *args: Any,
    loss: Loss | None = None,
    records: Sequence[InputLayer] | None = None,
    **kwargs: Any,
) -> Runs:
    found = treated(model, args, kwargs) if records is None else records
    return observe(model, remove_tract(model), found, args, kwargs, loss)


def verified(
    model: nn.Module,
    *args: Any,
    loss: Loss | None = None,
    records: Sequence[InputLayer] | None = None,
    untreated: Sequence[InputLayer] = (),
    **kwargs: Any,
) -> Verification:
    """Verify as `inspect_graph` does.

    Args:
        model: The rewritten model.
        *args: A batch.
        loss: The loss.
        records: The calls with TrAct; by default those that are found in the model.
        untreated: Calls on the input that have it not.
        **kwargs: The rest of the batch.
    """
    found = treated(model, args, kwargs) if records is None else records
    runs = runs_of(model, *args, loss=loss, records=found, **kwargs)
    return verify(runs, lost_marks(model, found), untreated)


def failed(verification: Verification) -> list[str]:
    """Names of the comparisons that fail; the verdict has to go with them."""
    checks = [*(w.operator for w in verification.weights), *verification.others]
    names = [check.name for check in checks if not check.passed]
    assert not (names and verification.passed)
    return names


def assert_passed(
    verification: Verification, *parameters: str, error: float, plain: float = 0.03
) -> None:
    """Make sure that it passes, that it checks these parameters, and that it says something.

    Args:
        verification: The verification.
        *parameters: Names of the parameters under TrAct.
        error: What the operator's error stays below.
        plain: What the plain gradient's distance stays above.
    """
    assert verification.passed, verification
    assert tuple(w.parameter for w in verification.weights) == parameters
    for weight in verification.weights:
        assert weight.operator.error < error, verification
        assert weight.plain > plain, verification


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal values about 1/2, off the global random state."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype)


def seeded(build: Any, seed: int = 0) -> Any:
    """What `build` makes from a random state of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


FLOAT64 = 1e-10  # rounding, magnified by at most 1/λ and the condition of small random Grams
FLOAT32 = 1e-4  # of the preconditioner in float32, on data about as large as one
WAYS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "call_module": lambda m, x: tract_pass(fx.symbolic_trace(m)),
    "call_function": lambda m, x: tract_pass(torch.export.export(m, (x,))),
    "eager": lambda m, x: tract_module(m, (x,)),
}
each_way = pytest.mark.parametrize("way", WAYS)


class Parts(nn.Module):
    """A first layer and a head, with an in-place ReLU between them."""

    def __init__(self, first: nn.Module, features: int) -> None:
        super().__init__()
        self.first = first
        self.head = nn.Linear(features, 3)

    def predict(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).relu_().flatten(1))  # type: ignore[no-any-return]


class Net(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.predict(x)


def conv_net(dtype: torch.dtype = torch.float64, **options: Any) -> Net:
    net: Net = seeded(lambda: Net(nn.Conv2d(3, 4, 3, padding=1, **options), 4 * 36).to(dtype))
    return net


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return drawn(5, 3, 6, 6, dtype=dtype)


def located() -> list[InputLayer]:
    """What locating gives for a layer named first, of models that torch.export does not take."""
    return treated(tract_module(conv_net(), layers=["first"]), (images(),), {})


def candidates(model: nn.Module) -> list[InputLayer]:
    """Calls that read the input, without TrAct."""
    graph: Any = torch.export.export(model, (images(),)).module()
    return [record for record in locate(graph).findings.layers if record.lambda_ is None]


def parts(cls: type[Parts]) -> Any:
    """A model of this class, with random weights."""
    return seeded(lambda: cls(nn.Conv2d(3, 4, 3, padding=1), 4 * 36).double())

"""Choose: which of the located calls TrAct goes on, by the user's names or by the one rule."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tract_fx.errors import (
    AmbiguousInputLayerError,
    FrozenLayerWarning,
    NoInputLayerError,
    TractError,
    UnknownLayerError,
    UnsupportedLayerError,
    did_you_mean,
)
from tract_fx.passes.records import Findings, InputLayer
from tract_fx.preconditioner import DEFAULT_LAMBDA, check_lambda, op_name

LayerChoice = str | Iterable[str] | Mapping[str, float] | None
"""What `layers=` takes: names, or names with a λ each, or None for the one input layer."""


@dataclass(frozen=True)
class Choice:
    """What the user says of λ and of layers, checked.

    Attributes:
        lambda_: λ of layers without one of their own.
        by_name: λ by name, None where the user named no layers.
    """

    lambda_: float
    by_name: Mapping[str, float] | None


def read_choice(lambda_: float = DEFAULT_LAMBDA, layers: LayerChoice = None) -> Choice:
    """Check `lambda_=` and `layers=`, and bring them to one form."""
    lambda_ = check_lambda(lambda_)
    if layers is None:
        return Choice(lambda_, None)
    given: Any = [layers] if isinstance(layers, str) else layers
    names = list(given) if isinstance(given, Iterable) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise UnknownLayerError(
            f"layers={layers!r}",
            "layers takes one or more names",
            "Give names of layers, a mapping of name to λ, or leave it out",
        )
    if isinstance(layers, Mapping):
        return Choice(lambda_, {name: check_lambda(layers[name]) for name in names})
    return Choice(lambda_, dict.fromkeys(names, lambda_))


def choose(
    findings: Findings,
    eligible: Iterable[InputLayer],
    choice: Choice,
    nodes: Container[str] | None = None,
) -> dict[str, float]:
    """Choose the calls to treat.

    Without names: the TrAct calls that the graph has already, else the one layer that consumes the
    input (in all its calls that do). With names: those, beside the TrAct calls already there. A
    node's name means its call where it is among `nodes`, None for all.
    """
    lambda_, by_name = choice.lambda_, choice.by_name
    eligible = list(eligible)
    present = {r.node: r.lambda_ for r in eligible if r.lambda_ is not None}
    if by_name is not None:
        chosen = {**present, **named_calls(by_name, findings, eligible, nodes)}
    elif present:
        chosen = dict.fromkeys(present, lambda_)
    else:
        chosen = {r.node: lambda_ for r in _the_input_layer(findings)}
    return chosen


def warn_of_frozen(names: Iterable[str]) -> None:
    """Say of frozen layers that TrAct is put in and idle; the warning points at the user's line."""
    for name in dict.fromkeys(names):
        _warn(
            f"{name}: its weight does not require a gradient, so that TrAct is idle until it does. "
            "If a later layer is the first one trained, name that with layers=[…]."
        )


def warn_of_passed(passed: Iterable[InputLayer], taken: Iterable[InputLayer]) -> None:
    """Say that frozen layers were taken for constants, and which layer was taken behind them."""
    frozen = ", ".join(dict.fromkeys(layer.name for layer in passed))
    names = ", ".join(dict.fromkeys(layer.name for layer in taken))
    if frozen:
        _warn(
            f"{frozen}: not trained, and passed over. TrAct is on {names}, the first that is. "
            "What is to be trained later, name with layers=[…] now."
        )


def _warn(message: str) -> None:
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "tract_fx":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, FrozenLayerWarning, stacklevel=level)


def _the_input_layer(findings: Findings) -> tuple[InputLayer, ...]:
    """The one layer that consumes the input, or the error that says why there is none."""
    layers = findings.layers
    rivals = [r for r in findings.refusals if r.competes]
    if len({r.weight for r in layers}) == 1 and not rivals:
        return layers
    if not layers:
        raise _nothing_found(findings)
    raise AmbiguousInputLayerError(
        f"{len({r.weight for r in layers}) + len(rivals)} operations with parameters consume the "
        f"model's input:\n{findings}\n",
        "TrAct is meant for the one that reads the image, and a pass can't tell which that is",
        f"Say which with layers=, for example layers=[{_likeliest(layers).name!r}]",
    )


def _likeliest(layers: tuple[InputLayer, ...]) -> InputLayer:
    """Suggest what most likely reads pixels: a trained convolution of most dimensions."""

    def rank(layer: InputLayer) -> tuple[bool, bool, int]:
        return (not layer.frozen, layer.op != op_name(0), len(layer.weight_shape or ()))

    return max(layers, key=rank)  # the first of equals


def _nothing_found(findings: Findings) -> TractError:
    if not findings.refusals:
        return NoInputLayerError(
            "no linear layer or convolution consumes the model's input",
            "TrAct preconditions the weight gradient of that layer",
            "Name the layer to treat with layers=[…], if the model has one",
        )
    first = findings.refusals[0]
    others = "".join(f"\nAlso: {refusal}" for refusal in findings.refusals[1:])
    return UnsupportedLayerError(
        f"{first.op} (node {first.node!r}) consumes the model's input",
        first.reason,
        first.remedy + others,
    )


def named_calls(
    by_name: Mapping[str, float],
    findings: Findings,
    eligible: list[InputLayer],
    nodes: Container[str] | None = None,
) -> dict[str, float]:
    """Find the calls that are meant by names."""
    chosen: dict[str, float] = {}
    of_layers: dict[str, float] = {}
    on_input = {r.node for r in findings.layers}
    for name, value in by_name.items():
        calls = [r for r in eligible if name in (r.name, *r.weight)]
        # Of a layer that is called on the input and again on features, the first is meant.
        calls = [r for r in calls if r.node in on_input] or calls
        if not calls and (nodes is None or name in nodes):
            calls = [r for r in eligible if r.node == name]
        if not calls:
            raise _unknown(name, findings, eligible)
        for r in calls:
            # A node's own name may set one call of a layer apart from the others.
            of_layer = name in (r.name, *r.weight)
            if of_layer and of_layers.setdefault(r.node, value) != value:
                raise UnsupportedLayerError(
                    f"layers gives {name!r} λ = {value}, and λ = {of_layers[r.node]} by another "
                    "name",
                    "both names are of one layer, which has one λ",
                    "Give it one λ",
                )
            chosen[r.node] = value
    return chosen


def _unknown(name: str, findings: Findings, eligible: list[InputLayer]) -> TractError:
    for refusal in findings.refusals:
        if name in (refusal.node, refusal.module):
            found = f"layers names {name!r}, which is {refusal.op} (node {refusal.node!r})"
            return UnsupportedLayerError(found, refusal.reason, refusal.remedy)
    names = list(dict.fromkeys(r.name for r in eligible))
    listed = ", ".join(map(repr, names)) or "none"
    return UnknownLayerError(
        f"layers names {name!r}",
        "no linear layer or convolution that can be treated has that name",
        f"{did_you_mean(name, names)}Layers of this model that can be: {listed}",
    )

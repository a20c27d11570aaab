"""What TrAct has to do on a batch: the Gram's spectrum, norms of the gradient, images' shares."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from tract_fx.inspection.input_warnings import gradient_warning, input_warning, lambda_warning
from tract_fx.inspection.records import LayerStatistics, Statistics
from tract_fx.inspection.shares import Looks, correlation, image_shares, looks
from tract_fx.inspection.spectrum import Spectrum, spectrum, too_large
from tract_fx.reference.observed import ObservedCall


def statistics(calls: Sequence[ObservedCall]) -> Statistics:
    """Measure what TrAct does on a batch, in float64."""
    times = Counter(call.record.name for call in calls)
    layers, warnings = [], []
    for call in calls:
        name, node = call.record.name, call.record.node
        where = name if times[name] == 1 else f"{name} (node {node!r})"
        seen = looks(call)
        found, obstacle = _spectrum(call, seen)
        layer = _layer(call, seen, found)
        layers.append(layer)
        said = [
            *obstacle,
            *input_warning(layer, seen),
            *lambda_warning(layer),
            *([] if obstacle else gradient_warning(call)),
        ]
        warnings += [f"{where} {text}." for text in said]
    return Statistics(tuple(layers), tuple(warnings))


def _spectrum(call: ObservedCall, seen: Looks) -> tuple[Spectrum | None, list[str]]:
    """Compute the eigenvalues, or say why there are none."""
    if not call.x.numel():
        return None, ["reads an empty batch: there is nothing to measure. Inspect with images"]
    if not (math.isfinite(seen.minimum) and math.isfinite(seen.maximum)):
        bad = ~torch.isfinite(call.images.flatten(1))
        count, images = int(bad.sum()), int(bad.any(1).sum())
        return None, [
            f"reads {count:,} values that are NaN or infinite, in {images:,} of {len(bad):,} "
            "images: the Gram is made of all of them, so with TrAct all of the layer's gradient is "
            "NaN. Look for them in the data and in what scales it"
        ]
    if oversize := too_large(call):
        return None, [oversize]
    found = spectrum(call)
    return found, [] if found else [
        f"reads values up to {max(-seen.minimum, seen.maximum):.3g}, whose squares overflow "
        "float64: there is no Gram. Standardise the input"
    ]


def _layer(call: ObservedCall, seen: Looks, found: Spectrum | None) -> LayerStatistics:
    record = call.record
    assert record.lambda_ is not None
    eigenvalues = () if found is None else tuple(found.eigenvalues.tolist())
    zeros = 0 if found is None else found.zeros
    plain_norm, tract_norm, cosine = _norms(call, found)
    images = image_shares(call, found, seen) if found and _finite(call.output_gradient) else ()
    contrasts = [image.contrast for image in images]
    return LayerStatistics(
        name=record.name,
        node=record.node,
        lambda_=record.lambda_,
        eigenvalues=eigenvalues,
        zeros=zeros,
        condition=_condition(eigenvalues, zeros, 0.0),
        regularised_condition=_condition(eigenvalues, zeros, record.lambda_),
        plain_norm=plain_norm,
        tract_norm=tract_norm,
        cosine=cosine,
        images=images,
        plain_correlation=correlation(contrasts, [image.plain for image in images]),
        tract_correlation=correlation(contrasts, [image.tract for image in images]),
        mean=seen.mean,
        std=seen.std,
        minimum=seen.minimum,
        maximum=seen.maximum,
    )


def _finite(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(torch.isfinite(gradient).all())


def _condition(eigenvalues: Sequence[float], zeros: int, lambda_: float) -> float:
    if not eigenvalues:
        return math.nan
    smallest = (0.0 if zeros else eigenvalues[-1]) + lambda_
    return (eigenvalues[0] + lambda_) / smallest if smallest else math.inf


def _norms(call: ObservedCall, found: Spectrum | None) -> tuple[float, float, float]:
    """Norms of gW and of gW (XᵀX/R + λI)⁻¹, and the cosine of their angle."""
    if call.incoming is None:
        return math.nan, math.nan, math.nan
    size = torch.linalg.vector_norm(call.incoming, dtype=torch.float64).item()
    if found is None or not _finite(call.incoming):
        return size, math.nan, math.nan
    tract = call.precondition(call.incoming)
    changed = torch.linalg.vector_norm(tract).item()
    # A row of gW at a time: all of a wide layer's in float64 can fill gigabytes.
    product = sum(
        torch.vdot(a.double().flatten(), b.flatten()).item()
        for a, b in zip(call.incoming, tract, strict=True)
    )
    return size, changed, product / (size * changed) if size * changed else math.nan

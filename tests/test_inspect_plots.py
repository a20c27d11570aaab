"""Plots of the statistics: what is drawn, and that they stand in one page without clashes."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import nn

from observed_calls import with_gradient
from photographs import photographs
from tract_fx.errors import UnsupportedFormatError
from tract_fx.inspection.records import ImageShare, LayerStatistics
from tract_fx.inspection.render.plots import curve_plots, share_plot, spectrum_plot
from tract_fx.inspection.statistics import statistics

Plot = Callable[[LayerStatistics], str]
PLOTS: list[Plot] = [spectrum_plot, share_plot]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def layer() -> LayerStatistics:
    call = with_gradient(nn.Conv2d(3, 8, 7, 2, 3), photographs(24))
    return statistics([call]).layers[0]


def many_images(layer: LayerStatistics, count: int) -> LayerStatistics:
    draw = random.Random(0)
    images = [ImageShare(*(draw.random() for _ in range(4))) for _ in range(count)]
    return dataclasses.replace(layer, images=tuple(images))


def words(svg: str) -> list[str]:
    return ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def ids(svg: str) -> list[str]:
    elements = ElementTree.fromstring(f"<div>{svg}</div>").iter()
    return [element.attrib["id"] for element in elements if "id" in element.attrib]


def points(svg: str, name: str) -> list[tuple[float, float]]:
    """Where the points of one series lie."""
    (group,) = (
        group
        for group in ElementTree.fromstring(svg).iter(f"{SVG}g")
        if group.attrib.get("id", "").endswith(f"-{name}")
    )
    return [(float(u.attrib["x"]), float(u.attrib["y"])) for u in group.iter(f"{SVG}use")]


def test_every_eigenvalue_is_a_point_and_lambda_a_labelled_line(layer: LayerStatistics) -> None:
    svg = spectrum_plot(layer)
    found = points(svg, "eigenvalues")
    assert len(found) == len(layer.eigenvalues) == 147
    assert found == sorted(found), "downwards to the right"
    assert "λ = 0.1" in words(svg)
    above = sum(value > 0.1 for value in layer.eigenvalues)
    assert f"TrAct evens out {above} of 147 directions" in " ".join(words(svg))
    assert f"{above} above λ:" in words(svg) and f"{147 - above} below λ:" in words(svg)


def test_lambdas_line_parts_the_eigenvalues(layer: LayerStatistics) -> None:
    svg = spectrum_plot(layer)
    (line,) = (
        group.find(f"{SVG}path")
        for group in ElementTree.fromstring(svg).iter(f"{SVG}g")
        if group.attrib.get("id", "").endswith("-lambda")
    )
    assert line is not None
    height = float(line.attrib["d"].split()[2])
    above = sum(y < height for _, y in points(svg, "eigenvalues"))
    assert above == sum(value > layer.lambda_ for value in layer.eigenvalues)


def test_eigenvalues_that_are_zero_are_counted_not_drawn(layer: LayerStatistics) -> None:
    flat = dataclasses.replace(layer, eigenvalues=(3.0, 0.02, 0.0, 0.0), zeros=5)
    svg = spectrum_plot(flat)
    assert len(points(svg, "eigenvalues")) == 2
    assert "8 below λ:" in words(svg)
    assert "all divided by about λ (7 are 0)" in words(svg)


@pytest.mark.parametrize(
    ("lambda_", "title"), [(1e6, "λ is above all"), (1e-9, "λ is below all 147")]
)
def test_lambda_outside_the_eigenvalues_is_inside_the_plot(
    layer: LayerStatistics, lambda_: float, title: str
) -> None:
    svg = spectrum_plot(dataclasses.replace(layer, lambda_=lambda_))
    assert title in " ".join(words(svg))
    assert f"λ = {lambda_:g}" in words(svg)


def test_a_thousand_eigenvalues_are_a_line(layer: LayerStatistics) -> None:
    values = tuple(10 ** (3 - 6 * i / 3072) for i in range(3072))
    svg = spectrum_plot(dataclasses.replace(layer, eigenvalues=values))
    assert not points(svg, "eigenvalues")
    assert len(svg) < 30_000


def test_every_image_is_a_point_in_each_series(layer: LayerStatistics) -> None:
    svg = share_plot(layer)
    for looks in ("contrast", "brightness"):
        plain, tract = (points(svg, f"{looks}-{series}") for series in ("plain", "tract"))
        assert len(plain) == len(tract) == 24
        assert [x for x, _ in plain] == [x for x, _ in tract]
    # Downwards is where y grows: the image of the largest share lies highest.
    for series in ("plain", "tract"):
        shares = [getattr(image, series) for image in layer.images]
        heights = [y for _, y in points(svg, f"contrast-{series}")]
        assert heights.index(min(heights)) == shares.index(max(shares))


def test_the_legend_has_the_correlation_of_its_own_panel(layer: LayerStatistics) -> None:
    brightness = dataclasses.replace(
        layer,
        images=tuple(ImageShare(i, -i, i / 15, (5 - i) / 15) for i in range(6)),
        plain_correlation=-1.0,
        tract_correlation=1.0,
    )
    found = [text for text in words(share_plot(brightness)) if " r = " in text]
    assert found == ["plain, r = −1.00", "TrAct, r = 1.00", "plain, r = 1.00", "TrAct, r = −1.00"]


@pytest.mark.parametrize(
    ("plain", "tract", "title"),
    [
        (0.8, 0.3, "grows with its contrast, with TrAct less (r 0.80 → 0.30)"),
        (-0.8, 0.1, "falls with its contrast, with TrAct it hardly depends on it (r −0.80 → 0.10)"),
        (0.1, -0.6, "hardly depends on its contrast, with TrAct it falls with it"),
        (0.9, -0.9, "grows with its contrast, with TrAct it falls with it (r 0.90 → −0.90)"),
        (-0.3, -0.6, "falls with its contrast, with TrAct more"),
        (0.5, 0.48, "grows with its contrast, with TrAct as much"),
        (0.02, -0.04, "hardly depends on its contrast, with TrAct or without"),
        (0.5, math.nan, "conv1: each image's share of the update"),
    ],
)
def test_the_title_says_what_the_correlations_show(
    layer: LayerStatistics, plain: float, tract: float, title: str
) -> None:
    changed = dataclasses.replace(layer, plain_correlation=plain, tract_correlation=tract)
    assert title in " ".join(words(share_plot(changed)))


def test_training_is_drawn_as_it_was_given() -> None:
    runs = [[40.0, 48.0, 55.0], [42.0, 50.0, 53.0]]
    (svg,) = curve_plots({"Test accuracy in %": {"plain": runs, "with TrAct": (50, 57.25, 58)}})
    title = "Test accuracy in % at the end: plain 54, with TrAct 58 (means of 1 and 2 runs)"
    assert (
        title in " ".join(words(svg)) and ElementTree.fromstring(svg).attrib["aria-label"] == title
    )
    assert {"epoch", "plain", "with TrAct"} <= {*words(svg)}
    plain, tract = points(svg, "curve-0"), points(svg, "curve-1")
    assert [x for x, _ in plain] == [x for x, _ in tract] and len(plain) == 3
    # Heights are as the numbers: 41, 49 and 54 are the means; the page's y grows downwards.
    scale = (plain[0][1] - plain[2][1]) / (54 - 41)
    for (_, y), value in zip([*plain, *tract], (41, 49, 54, 50, 57.25, 58), strict=True):
        assert abs(plain[0][1] - y - scale * (value - 41)) < 0.02
    tensors: Any = {"Loss": {"two": torch.ones(2, 3), "one": torch.ones(3), "array": np.ones(3)}}
    assert len(points(curve_plots(tensors)[0], "curve-2")) == 3


@pytest.mark.parametrize(
    "curves",
    [
        [1.0],
        {"loss": [1.0, 0.5]},
        {"loss": {}},
        {"loss": {"plain": []}},
        {"loss": {"plain": [[1.0, 0.5], [1.0]]}},
        {"loss": {"plain": "low"}},
        {"loss": {"plain": 0.5}},
    ],
    ids=repr,
)
def test_no_curves(curves: Any) -> None:
    with pytest.raises(UnsupportedFormatError, match=r"Give curves={\"Test accuracy\": {"):
        curve_plots(curves)


def test_of_very_many_images_some_are_drawn_and_it_is_said(layer: LayerStatistics) -> None:
    svg = share_plot(many_images(layer, 4500))
    assert len(points(svg, "contrast-plain")) == 900
    assert any("900 of 4,500 drawn" in text for text in words(svg))
    assert len(svg) < 400_000


def test_nothing_to_draw_is_said(layer: LayerStatistics) -> None:
    nothing = dataclasses.replace(layer, images=(ImageShare(0.0, 0.0, math.nan, math.nan),))
    assert any("no shares to draw" in text for text in words(share_plot(nothing)))


@pytest.mark.parametrize("plot", PLOTS)
def test_one_point(layer: LayerStatistics, plot: Plot) -> None:
    one = dataclasses.replace(
        layer, eigenvalues=(0.5,), zeros=0, images=(ImageShare(0.1, 0.9, 1.0, 1.0),)
    )
    assert words(plot(one))


def test_no_id_occurs_twice_in_a_page_of_plots(layer: LayerStatistics) -> None:
    other = dataclasses.replace(layer, name="conv2")
    page = "".join(plot(of) for of in (layer, other) for plot in PLOTS)
    twice = [name for name, count in Counter(ids(page)).items() if count > 1]
    assert not twice


@pytest.mark.parametrize("plot", PLOTS)
def test_references_stay_within_the_plot(layer: LayerStatistics, plot: Plot) -> None:
    svg = plot(layer)
    own = set(ids(svg))
    references = re.findall(r'(?:href="|url\()([^")]*)', svg)
    assert references
    assert {reference.removeprefix("#") for reference in references} <= own
    assert svg.startswith("<svg ") and "http" not in svg.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("plot", PLOTS)
def test_the_page_around_it_gives_the_colour_and_gets_no_style(
    layer: LayerStatistics, plot: Plot
) -> None:
    svg = plot(layer)
    root = ElementTree.fromstring(svg)
    assert not list(root.iter(f"{SVG}style")) and not list(root.iter(f"{SVG}metadata"))
    for text in root.iter(f"{SVG}text"):
        ink = "#d55e00" if "".join(text.itertext()).startswith("λ = ") else "currentColor"
        assert f"fill: {ink}" in text.attrib["style"]
        assert "Helvetica, Arial" in text.attrib["style"]
    assert "#000000" not in svg and "#ffffff" not in svg and "DejaVu Sans Mono" not in svg


@pytest.mark.parametrize("plot", PLOTS)
def test_a_name_is_text_whatever_is_in_it(layer: LayerStatistics, plot: Plot) -> None:
    name = "<b>&$x_1$ \"q\" id='a'"
    svg = plot(dataclasses.replace(layer, name=name))
    assert name in " ".join(words(svg))
    root = ElementTree.fromstring(svg)
    assert name in root.attrib["aria-label"]
    long = "vision_model.embeddings.patch_embeddings.projection"
    assert "…ddings.patch_embeddings.projection"[-29:] in " ".join(
        words(plot(dataclasses.replace(layer, name=long)))
    )


@pytest.mark.parametrize("plot", PLOTS)
def test_the_same_numbers_give_the_same_file_whatever_the_users_style(
    layer: LayerStatistics, plot: Plot
) -> None:
    first = plot(layer)
    with mpl.rc_context({"axes.grid": True, "svg.fonttype": "path", "font.size": 40}):
        before = dict(mpl.rcParams)
        assert plot(layer) == first
        assert dict(mpl.rcParams) == before

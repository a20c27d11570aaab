"""An inspection on a terminal and as text: nothing lost at 80 columns, nothing taken for markup."""

from __future__ import annotations

import dataclasses
import io
import re

import pytest
from rich.console import Console

from inspections import (
    EVERY,
    EXPANDED,
    HOSTILE_NAMES,
    NAN,
    SHORT,
    STEM,
    VERIFIED,
    bare,
    conv_net,
    failing,
    hostile,
    onnx_graph,
    report,
    skipped,
    statistics_of,
)
from tract_fx.inspection.inspection import Inspection
from tract_fx.inspection.records import (
    Backward,
    Check,
    ForwardDiff,
    LayerReport,
    Statistics,
    Verification,
)
from tract_fx.inspection.render.terminal import print_inspection
from tract_fx.inspection.render.text import aligned, graph_lines
from tract_fx.inspection.render.words import number, operation, sentence, shorten, verdict, worst
from tract_fx.preconditioner import PatchGeometry


def printed(inspection: Inspection, width: int = 80, **options: object) -> str:
    file = io.StringIO()
    print_inspection(inspection, Console(file=file, width=width, **options))  # type: ignore[arg-type]
    return file.getvalue()


def unwrapped(text: str) -> str:
    """The text without what folding lines put in: borders, line ends and spaces."""
    return re.sub(r"[│\s]", "", text)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", EVERY)
def test_every_inspection_prints_within_the_width(name: str, width: int) -> None:
    lines = printed(EVERY[name](), width).splitlines()
    assert lines and max(map(len, lines)) <= width


def test_no_number_is_lost_at_80_columns() -> None:
    text = printed(conv_net())
    for wanted in (
        *("2.13e-7", "4.42e-7", "3.91e-7", "0.871", "1e-5"),  # verification
        *("401,408 rows × 147 columns", "λ = 0.1", "7×7, stride 2, padding 3", "64×3×7×7"),
        *("0.823 → 3.14", "0.442", "0.912 → 0.0713", "-2.12 to 2.64", "→ 379"),
        *("patches unfolded in 12 blocks", "Cholesky of the Gram", "resnet.py:41"),
        *("x → sub → div → conv1", "52 further calls", "433 more nodes", "torch 2.13.0"),
    ):
        assert unwrapped(wanted) in unwrapped(text), wanted


def test_the_verdict_comes_first() -> None:
    for inspection, wanted in (
        (conv_net(), "✔ TrAct's gradient is right"),
        (failing(), "✘ TrAct's gradient is wrong"),
        (conv_net(verification=None), "○ Not verified"),
        (bare(), "○ TrAct is on no layer"),
    ):
        assert wanted in printed(inspection).splitlines()[1]


@pytest.mark.parametrize("name", EVERY)
def test_a_repr_is_a_few_lines_with_the_verdict(name: str) -> None:
    inspection = EVERY[name]()
    lines = repr(inspection).splitlines()
    assert len(lines) <= 8 and lines[0].startswith("Inspection of ")
    assert verdict(inspection).headline in lines[1] and "save(" in lines[-1]


def test_a_failure_names_what_failed_with_its_number() -> None:
    text = unwrapped(printed(failing()))
    for wanted in (
        *("conv1 was run without TrAct's operator", "gradient of fc.bias", "nan"),
        *("gradient of bn1.bias", "0.0412", "61 of 63 outputs and other gradients"),
    ):
        assert unwrapped(wanted) in text, wanted


def test_only_what_is_there_has_a_section() -> None:
    everything = ("What changed", "Backward pass", "Verification", "Statistics", "Notes")
    text = printed(conv_net())
    assert all(f"\n{title} ─" in text for title in everything)
    nothing = printed(bare())
    assert [title for title in everything if f"\n{title} ─" in nothing] == ["What changed"]
    assert "Nothing was changed" in nothing


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "color_system": "truecolor"}])
def test_names_are_neither_markup_nor_commands(options: dict[str, object]) -> None:
    text = printed(hostile(), 400, **options)
    if options:  # rich's own colours
        text = re.sub("\x1b\\[[0-9;]*m", "", text)
    assert "[bold red]x[/]" in text and "<script>alert(1)</script>" in text
    assert "line�break�[31m" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


def test_what_has_no_end_is_cut_with_a_count() -> None:
    text = printed(hostile())
    assert "… 32 more" in text  # of 40 refusals
    assert "1,234,559morenodes" in unwrapped(text)
    long = conv_net(forward=ForwardDiff("", "\n".join(map(str, range(500))), SHORT))
    assert f"… {500 + 1 - 60} more lines" in printed(long)


def test_without_colour_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = printed(conv_net(), force_terminal=True)
    colours = [
        code for code in re.findall("\x1b\\[([0-9;]*)m", text) if re.search(r"[3-9]\d", code)
    ]
    assert not colours
    assert "▸" in text and "✔" in text
    assert "+tract_conv1 = precondition_grad" in text and "-conv1 = conv2d" in text


def test_a_pipe_that_takes_ascii_alone() -> None:
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding="ascii", newline="\n")
    for make in EVERY.values():
        print_inspection(make(), Console(file=file, width=100))
    file.flush()
    text = buffer.getvalue().decode("ascii")
    assert "+ TrAct's gradient is right" in text and "x TrAct's gradient is wrong" in text
    assert "lambda = 0.1" in text and "7x7, stride 2" in text and "x -> sub -> div" in text


def test_a_graph_as_text() -> None:
    lines = aligned(graph_lines(SHORT))
    assert lines[0] == "forward" and "backward" in lines
    (line,) = [line for line in lines if "tract_conv1 =" in line]
    assert re.fullmatch(
        r"▸ +tract_conv1 = TrAct λ = 0.1 \(conv1_weight, div\) +# float32 64×3×7×7 +"
        r"← resnet.py:41",
        line,
    )
    assert sum(line.startswith("▸") for line in lines) == 2
    assert lines[-1].strip() == "… 411 more nodes"


def test_an_expanded_graph_has_a_heading_per_stage() -> None:
    headings = [line.code for line in graph_lines(EXPANDED) if line.heading]
    wanted = ["TrAct: Gram", "TrAct: factorisation", "TrAct: solve"]
    assert headings == ["forward", "backward", *wanted]
    assert "TrAct: Gram" in printed(conv_net())
    assert "TrAct: Gram" not in printed(conv_net(backward=Backward(SHORT, None)))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, "conv2d 3 → 64, 7×7, stride 2, padding 3"),
        ({"geometry": PatchGeometry.of_convolution((3, 3))}, "conv2d 3 → 64, 3×3"),
        (
            {"geometry": PatchGeometry.of_convolution((3, 5), (1, 2), (1, 2), (2, 1), 3)},
            "conv2d 9 → 64, 3×5, stride 1×2, padding 1×2, dilation 2×1, 3 groups",
        ),
        (
            {"geometry": PatchGeometry((2, 2), (1, 1), ((0, 1), (0, 1)), (1, 1))},
            "conv2d 3 → 64, 2×2, padding 0 before and 1 after",
        ),
        (
            {"geometry": PatchGeometry((2, 1), (1, 1), ((0, 1), (0, 0)), (1, 1))},
            "conv2d 3 → 64, 2×1, padding (0, 1) × (0, 0)",
        ),
        ({"geometry": None, "weight_shape": None}, "conv2d, geometry not known before running"),
        (
            {"op": "linear", "geometry": PatchGeometry(), "weight_shape": (10, 784)},
            "linear 784 → 10",
        ),
    ],
)
def test_operations_in_words(changes: dict[str, object], wanted: str) -> None:
    assert operation(dataclasses.replace(STEM, **changes)) == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        *((0.0, "0"), (0.87123, "0.871"), (2.134e-7, "2.13e-7"), (19683.4, "19,683")),
        *((3.02e13, "3.02e13"), (999.6, "1e3"), (-0.0214, "-0.0214"), (1e-5, "1e-5")),
        *((NAN, "nan"), (float("inf"), "inf"), (-float("inf"), "-inf"), (None, "–")),
    ],
)
def test_numbers(value: float | None, wanted: str) -> None:
    assert number(value) == wanted


def test_long_names_keep_both_ends() -> None:
    short = shorten("features.0." + "block." * 30 + "projection", 30)
    assert len(short) == 30 and short.startswith("features") and short.endswith("projection")
    assert shorten("stem", 30) == "stem"


def test_the_worst_comes_first() -> None:
    checks = [Check(str(i), error, 1e-5) for i, error in enumerate([0.0, 1e-6, NAN, 1.0, 2e-6])]
    assert [check.name for check in worst(checks)] == ["2", "3", "4", "1", "0"]


def test_a_verdict_on_other_gradients_alone() -> None:
    others = (*VERIFIED.others, Check("gradient of fc.bias", 0.5, 1e-5))
    inspection = conv_net(verification=dataclasses.replace(VERIFIED, others=others))
    answer = verdict(inspection)
    assert (answer.state, answer.headline) == ("wrong", "More than TrAct's gradient changed")
    assert "gradient of fc.bias (0.5)" in answer.reasons[-1]


def test_a_verification_of_nothing_is_no_success() -> None:
    answer = verdict(conv_net(verification=Verification((), VERIFIED.others, (), "")))
    assert answer.state == "open" and answer.headline.startswith("Not verified: ")


LOST = "conv1: the pass has marked it, but TrAct is not on it any more"
FROZEN = report(dataclasses.replace(STEM, frozen=True))


@pytest.mark.parametrize(
    ("verification", "layers", "state", "headline"),
    [
        (Verification((), VERIFIED.others, (), ""), (FROZEN,), "open", "conv1 is frozen"),
        (Verification((), VERIFIED.others, ("no gradient",), ""), (report(),), "open", "no grad"),
        (Verification((), VERIFIED.others, ("No TrAct",), ""), (skipped(),), "open", "on no layer"),
        (
            dataclasses.replace(VERIFIED, problems=("fc: nothing to compare",)),
            (report(),),
            "open",
            "not every gradient",
        ),
        (
            dataclasses.replace(failing().verification or VERIFIED, inconclusive=True),
            (report(),),
            "open",
            "the comparison says nothing",
        ),
        (
            Verification((), VERIFIED.others, (LOST,), "", ("conv1",)),
            (skipped(),),
            "wrong",
            "TrAct's gradient is wrong",
        ),
    ],
    ids=["frozen", "constant loss", "no TrAct", "partly", "inconclusive", "lost"],
)
def test_wrong_is_what_was_compared_or_lost(
    verification: Verification, layers: tuple[LayerReport, ...], state: str, headline: str
) -> None:
    inspection = conv_net(verification=verification, layers=layers)
    answer = verdict(inspection)
    assert answer.state == state == inspection.to_dict()["verification"]["verdict"]
    assert headline in answer.headline and not verification.passed
    assert ("Not verified: " in answer.headline) == (state == "open")
    problems = [f"{mark} {sentence(p)}" for p in verification.problems for mark in "✘○"]
    shown = [text[0] for text in problems if unwrapped(text) in unwrapped(printed(inspection))]
    assert shown == ["✘" if state == "wrong" else "○"] * len(verification.problems)


@pytest.mark.parametrize(
    ("eigenvalues", "lambda_", "side"),
    [((10.0, 5.0, 1.0), 1e-3, "left"), ((1e-3, 1e-4), 10.0, "right"), ((1.0,), 1.0, "left")],
)
def test_lambda_is_marked_where_it_lies(
    eigenvalues: tuple[float, ...], lambda_: float, side: str
) -> None:
    layer = statistics_of("stem", eigenvalues=eigenvalues, lambda_=lambda_)
    text = printed(conv_net(statistics=Statistics((layer,), ())))
    lines = text.splitlines()
    (at,) = [i for i, line in enumerate(lines) if "▲" in line]
    bars = [i for i, c in enumerate(lines[at - 1]) if c in "▁▂▃▄▅▆▇█"]
    assert lines[at].index("▲") <= min(bars) if side == "left" else lines[at].index("▲") > max(bars)


def test_zeros_of_the_gram_and_groups_are_told() -> None:
    layer = statistics_of("stem", zeros=120)
    geometry = PatchGeometry.of_convolution((7, 7), 2, 3, groups=3)
    record = dataclasses.replace(STEM, geometry=geometry)
    text = printed(conv_net(statistics=Statistics((layer,), ()), layers=(report(record),)), 120)
    assert "and 120 that are zero" in text
    assert "in each of 3 groups" in text


def test_warnings_are_printed() -> None:
    assert "λ = 10 is 33 times" in printed(onnx_graph(), 120)


def test_every_hostile_name_is_there() -> None:
    text = unwrapped(printed(hostile()))
    for name in HOSTILE_NAMES:
        assert unwrapped(re.sub("[\x00-\x1f]", "�", name)) in text

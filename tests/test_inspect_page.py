"""The page and the notebook's form: whole, escaped, alone, and what a browser makes of them."""

from __future__ import annotations

import base64
import functools
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import tract_fx.inspection.render as render
from inspections import EVERY, EXPANDED, bare, conv_net, failing
from tract_fx.errors import UnsupportedFormatError
from tract_fx.inspection.inspection import Inspection
from tract_fx.inspection.records import Backward, GraphView
from tract_fx.inspection.render.html import notebook_html, page_html

FOLDER = Path(render.__file__).parent
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
SECTIONS = ("training", "layers", "changes", "backward", "verification", "statistics", "notes")
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Elements(HTMLParser):
    """All elements of a page, in order, and whether they are nested as they should be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)


@functools.cache
def made(make: Callable[[Inspection], str], name: str) -> str:
    return make(EVERY[name]())


def shown(text: str) -> str:
    return " ".join(" ".join(Elements(text).text).split())


@pytest.mark.parametrize("make", [page_html, notebook_html], ids=["page", "notebook"])
@pytest.mark.parametrize("name", EVERY)
def test_it_is_well_formed_and_refers_to_nothing_outside(name: str, make: Any) -> None:
    text = made(make, name)
    for tag, attributes in Elements(text).found:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert not any(key.startswith("on") for key in attributes)
        for key in ("src", "href", "xlink:href", "srcset", "data"):
            assert attributes.get(key, "#").startswith("#"), (tag, attributes)
        assert "url(" not in re.sub(r"url\(#", "", attributes.get("style", ""))
    styles = "".join(re.findall(r"<style.*?</style>", text, re.DOTALL))
    assert "@import" not in styles and "url(" not in styles


@pytest.mark.parametrize("name", EVERY)
def test_ids_are_unique(name: str) -> None:
    text = made(page_html, name)
    ids = [attributes["id"] for _, attributes in Elements(text).found if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {a["href"] for tag, a in Elements(text).found if tag == "a" and "href" in a}
    assert {link[1:] for link in links} <= set(ids)


@pytest.mark.parametrize("make", [page_html, notebook_html], ids=["page", "notebook"])
def test_names_are_text(make: Any) -> None:
    text = made(make, "hostile")
    scripts = [tag for tag, _ in Elements(text).found if tag == "script"]
    assert len(scripts) == (1 if make is page_html else 0)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    visible = shown(text)
    for name in (
        "<script>alert(1)</script>",
        "[bold red]x[/]",
        "</style><!-- {{ 7 * 7 }} {% raw %}",
    ):
        assert name in visible
    assert "層.λ→∇🙂" in visible and "line�break�[31m��" in visible


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({}, set()),
        ({"backward": None}, {"backward"}),
        ({"verification": None}, {"verification"}),
        ({"statistics": None}, {"statistics"}),
        ({"notes": (), "versions": {}}, {"notes"}),
    ],
)
def test_only_what_is_there_has_a_section(changes: dict[str, Any], absent: set[str]) -> None:
    found = Elements(page_html(conv_net(**changes))).found
    sections = [attributes["id"] for tag, attributes in found if tag == "section"]
    assert sections == [name for name in SECTIONS if name not in absent and name != "training"]
    links = [attributes["href"] for tag, attributes in found if tag == "a" and "href" in attributes]
    assert links == [f"#{name}" for name in sections]


def test_training_comes_first_where_it_is_given(tmp_path: Path) -> None:
    curves = {"Test <accuracy>": {"plain": [0.4, 0.5], "TrAct": [0.5, 0.6]}}
    text = conv_net().save(tmp_path / "page.html", curves=curves).read_text(encoding="utf-8")
    found = Elements(text).found
    assert tuple(a["id"] for tag, a in found if tag == "section") == SECTIONS
    assert "Test <accuracy> at the end: plain 0.5, TrAct 0.6" in shown(text)
    for file in ("page.svg", "page.json"):
        with pytest.raises(UnsupportedFormatError, match=r"suffix \.html"):
            conv_net().save(tmp_path / file, curves=curves)


def test_the_verdict_comes_first_with_its_numbers() -> None:
    for inspection, wanted in (
        (conv_net(), "✔ TrAct's gradient is right conv1.weight: 2.13e-7 from the float64"),
        (failing(), "✘ TrAct's gradient is wrong conv1 was run without TrAct's operator"),
        (conv_net(verification=None), "○ Not verified"),
        (bare(), "○ TrAct is on no layer"),
    ):
        for text in (page_html(inspection), notebook_html(inspection)):
            assert wanted in shown(text)[:500]


def test_the_page_says_all_that_the_terminal_says() -> None:
    text = shown(made(page_html, "conv_net"))
    for wanted in (
        *("2.13e-7", "4.42e-7", "3.91e-7", "0.871", "401,408 rows × 147 columns", "λ = 0.1"),
        *("conv2d 3 → 64, 7×7, stride 2, padding 3", "x → sub → div → conv1", "resnet.py:41"),
        *("52 further calls", "A parameter is added to the input", "TrAct was put on another"),
        *("+tract_conv1 = precondition_grad", "-conv1 = conv2d", "411 more"),
        *("0.823 → 3.14", "0.912 → 0.0713", "from -2.12 to 2.64", "torch 2.13.0"),
        *("61 of 61 outputs and other gradients within tolerance", "gradient of layer3.1.bn1.bias"),
    ):
        assert wanted in text, wanted


def test_pictures_tell_what_they_show() -> None:
    drawings = [a for tag, a in Elements(made(page_html, "conv_net")).found if tag == "svg"]
    if shutil.which("dot") is not None:
        assert len(drawings) == 5  # forward, short, expanded, spectrum, shares
    assert all(a["role"] == "img" and a["aria-label"] for a in drawings)


def test_without_dot_the_text_stands_in_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for text in (page_html(conv_net()), notebook_html(conv_net())):
        visible = shown(text)
        assert "No picture: the program dot of Graphviz" in visible
        assert "Install Graphviz: apt-get install graphviz" in visible
        assert "tract_conv1 = TrAct λ = 0.1 (conv1_weight, div)" in visible
        assert "linalg_cholesky_ex" in visible and 'class="picture"' not in text


def test_a_graph_too_large_for_the_page_is_text() -> None:
    nodes = EXPANDED.nodes * 8
    view = GraphView("All of it", nodes, len(nodes))
    visible = shown(page_html(conv_net(backward=Backward(view, None))))
    assert f"{len(nodes)} nodes are too many for a picture" in visible
    assert "linalg_cholesky_ex" in visible


def selectors(sheet: str) -> list[str]:
    sheet = re.sub(r"/\*.*?\*/", "", sheet, flags=re.DOTALL)
    found = []
    for group in re.findall(r"([^{}]+)\{", sheet):
        if not group.strip().startswith("@"):
            # Commas inside :is(…) belong to one selector.
            found += [s.strip() for s in re.split(r",(?![^(]*\))", group)]
    return found


def test_the_notebook_s_styles_reach_nothing_outside() -> None:
    found = selectors((FOLDER / "sections.css").read_text(encoding="utf-8"))
    assert len(found) > 80
    for selector in found:
        themed = re.fullmatch(r"(html|body)\S* \.tract-fx", selector)
        assert themed or re.match(r"\.tract-fx(?![\w-])", selector), selector
    text = made(notebook_html, "conv_net")
    assert text.count("<style") == 1  # plots bring none of their own


def themes() -> dict[str, dict[str, str]]:
    """The variables of each theme, by the file and the rule that sets them."""
    found = {}
    for name in ("sections.css", "page.css"):
        sheet = (FOLDER / name).read_text(encoding="utf-8")
        for i, block in enumerate(re.findall(r"\{([^{}]*--ink:[^{}]*)\}", sheet)):
            found[f"{name} {i}"] = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
    return found


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", themes())
def test_letters_stand_out_from_what_is_behind_them(theme: str) -> None:
    colours = themes()[theme]
    pairs = [(ink, ground) for ink in ("ink", "muted", "place") for ground in ("paper", "panel")]
    pairs += [(ink, back) for ink in ("ink", "muted") for back in ("tract-soft", "node", "input")]
    pairs += [("ink", back) for back in ("good-soft", "bad-soft", "warn-soft", "output")]
    pairs += [("muted", back) for back in ("output", "parameter")]
    for name in ("tract", "good", "bad", "warn"):
        pairs += [(name, "paper"), (name, f"{name}-soft")]
    for ink, ground in pairs:
        a, b = sorted((luminance(colours[ink]), luminance(colours[ground])), reverse=True)
        assert (a + 0.05) / (b + 0.05) >= 4.5, (ink, ground)


def test_the_dark_theme_is_the_same_wherever_it_is_set() -> None:
    _, *dark = themes().values()
    assert len(dark) == 2 and dark[0] == dark[1]


# Shows the page in frames of the given widths, tries it out, and writes down what it found.
DRIVER = """<!DOCTYPE html><html><body><pre id="result">nothing</pre><script>
const source = new TextDecoder().decode(Uint8Array.from(atob("PAGE"), (c) => c.charCodeAt(0)));
const results = [];
function show(width) {
  return new Promise((resolve) => {
    const frame = document.createElement("iframe");
    frame.style.cssText = `width:${width}px;height:900px;border:0`;
    frame.addEventListener("load", () => resolve(frame));
    frame.srcdoc = source;
    document.body.append(frame);
  });
}
function measure(frame) {
  const view = frame.contentWindow, page = frame.contentDocument;
  const overflow = () => page.documentElement.scrollWidth - view.innerWidth;
  const found = { width: view.innerWidth, closed: overflow() };
  for (const details of page.querySelectorAll("details")) details.open = true;
  found.opened = overflow();
  const outside = (e) => !e.closest(".scroll, .code, nav ul, svg") && e.clientWidth > 0;
  found.wide = [...page.querySelectorAll("body *")].filter(outside)
    .filter((e) => e.getBoundingClientRect().right > view.innerWidth + 1)
    .map((e) => e.outerHTML.slice(0, 80));
  // Pictures that are cut say so, others don't; text is cut nowhere; no letter of theirs is small.
  found.unsaid = [...page.querySelectorAll(".picture")].filter((e) => {
    const frame = e.querySelector(".scroll");
    return (frame.scrollWidth > frame.clientWidth) !== (e.querySelector(".hint").offsetHeight > 9);
  }).length;
  found.cut = [...page.querySelectorAll(".code")]
    .filter((e) => e.scrollWidth > e.clientWidth).length;
  found.letters = Math.min(...[...page.querySelectorAll(".picture svg")].map((svg) => {
    const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    const sizes = [...svg.querySelectorAll("text")].map((e) => Number(e.getAttribute("font-size")));
    return scale * Math.min(...sizes);
  }));
  found.pictures = [...page.querySelectorAll(".picture .scroll")]
    .map((e) => e.scrollWidth > e.clientWidth);
  found.errors = view.errors;
  found.fetched = view.performance.getEntriesByType("resource").map((e) => e.name);
  found.unsorted = [...page.querySelectorAll("table.sortable thead th")]
    .filter((e) => !e.querySelector("button")).length;
  found.columns = [];
  for (const table of page.querySelectorAll("table.sortable")) {
    for (const [i, heading] of [...table.tHead.rows[0].cells].entries()) {
      const column = { numeric: heading.classList.contains("number"), orders: [], marks: [] };
      for (let click = 0; click < 2; click++) {
        heading.querySelector("button").click();
        const cells = [...table.tBodies[0].rows].map((row) => row.cells[i]);
        column.orders.push(cells.map((c) => c.dataset.value ?? c.textContent.trim()));
        column.marks.push(heading.getAttribute("aria-sort"));
      }
      found.columns.push(column);
    }
  }
  return found;
}
(async () => {
  for (const width of [1280, 390]) results.push(measure(await show(width)));
})().catch((e) => results.push({ failed: String(e) })).finally(() => {
  document.getElementById("result").textContent = JSON.stringify(results);
});
</script></body></html>"""
WATCH = """<script>window.errors = [];
addEventListener("error", (e) => errors.push(e.message || e.target.outerHTML), true);
addEventListener("unhandledrejection", (e) => errors.push(String(e.reason)));</script>"""


def browse(text: str, folder: Path) -> list[dict[str, Any]]:
    """Try a page out in a browser without a network, at two widths."""
    text = text.replace("<head>", f"<head>{WATCH}", 1)
    page = folder / "driver.html"
    encoded = base64.b64encode(text.encode()).decode()
    page.write_text(DRIVER.replace("PAGE", encoded), encoding="utf-8")
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    result = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert result is not None, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(html.unescape(result[1]))
    return found


def number(text: str) -> float | None:
    value = float(text) if text else float("nan")
    return None if value != value else value


def is_sorted(values: list[float]) -> bool:
    return all(a <= b for a, b in pairwise(values))


@needs_chromium
@pytest.mark.parametrize("name", EVERY)
def test_in_a_browser_it_fits_sorts_and_fetches_nothing(name: str, tmp_path: Path) -> None:
    found = browse(made(page_html, name), tmp_path)
    assert [view.get("width") for view in found] == [1280, 390]
    for view in found:
        assert view["errors"] == [] and view["fetched"] == []
        assert view["closed"] <= 0 and view["opened"] <= 0 and view["wide"] == []
        assert view["unsorted"] == 0
        assert view["unsaid"] == 0 and view["cut"] == 0
        assert view["letters"] is None or view["letters"] > 10
        for column in view["columns"]:
            assert column["marks"] == ["ascending", "descending"]
            up, down = column["orders"]
            assert sorted(up) == sorted(down)
            if column["numeric"]:
                first = [number(text) for text in up]
                values = [value for value in first if value is not None]
                assert is_sorted(values) and first[: len(values)] == values  # NaN last
                values = [v for v in map(number, down) if v is not None]
                assert is_sorted(values[::-1])
    if name == "conv_net":
        if shutil.which("dot") is not None:
            assert [view["pictures"][1] for view in found] == [False, True]  # the backward pass
        assert sum(len(column["orders"][0]) > 10 for column in found[0]["columns"]) >= 8

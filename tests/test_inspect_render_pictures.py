"""Pictures: valid, escaped, with everything of the view in them, and a way out without Graphviz."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from inspections import EVERY, EXPANDED, SHORT, back, bare, conv_net, hostile, node
from tract_fx.errors import MissingRuntimeError
from tract_fx.inspection.records import GraphView
from tract_fx.inspection.render.html import notebook_html
from tract_fx.inspection.render.pictures import dot_source, picture_file, svg

SVG = "{http://www.w3.org/2000/svg}"
needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz's dot")


def views() -> Iterator[tuple[str, GraphView]]:
    for name, make in EVERY.items():
        inspection = make()
        yield f"{name}-forward", inspection.forward.view
        if inspection.backward is not None:
            yield f"{name}-short", inspection.backward.short
            if inspection.backward.expanded is not None:
                yield f"{name}-expanded", inspection.backward.expanded


VIEWS = dict(views())


def groups(root: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [g for g in root.iter(f"{SVG}g") if kind in (g.get("class") or "").split()]


def texts(element: ElementTree.Element) -> str:
    return " ".join(text.text or "" for text in element.iter(f"{SVG}text"))


@needs_dot
@pytest.mark.parametrize("name", VIEWS)
def test_a_picture_is_valid_and_whole(name: str) -> None:
    view = VIEWS[name]
    root = ElementTree.fromstring(picture_file(view).encode())
    assert root.tag == f"{SVG}svg"
    assert len(groups(root, "node")) == max(1, len(view.nodes))
    names = {n.name for n in view.nodes}
    edges = {(source, n.name) for n in view.nodes for source in n.inputs if source in names}
    assert len(groups(root, "edge")) == len(edges)
    tract = [n for n in view.nodes if n.kind == "tract"]
    assert len(groups(root, "tract")) == len(tract)


@needs_dot
def test_a_picture_for_a_page_has_no_ids_and_tells_what_it_shows() -> None:
    root = ElementTree.fromstring(svg(SHORT))
    assert not [e for e in root.iter() if e.get("id")]
    assert root.get("role") == "img"
    assert root.get("aria-label") == "Backward pass around conv1: 17 nodes, of which 2 of TrAct"
    titles = [g.findtext(f"{SVG}title") or "" for g in groups(root, "tract")]
    assert any(
        "tract_conv1" in t and "resnet.py:41 in forward: x = self.conv1" in t for t in titles
    )


@needs_dot
def test_tract_is_marked_by_more_than_colour() -> None:
    root = ElementTree.fromstring(svg(SHORT))
    for group in groups(root, "node"):
        borders = [p for p in group.iter(f"{SVG}polygon") if p.get("stroke") not in (None, "none")]
        tract = "tract" in (group.get("class") or "").split()
        assert (len(borders) == 2) == tract
        assert ("TrAct" in texts(group)) == tract


@needs_dot
def test_nodes_of_tract_without_the_word_in_their_label_get_it() -> None:
    view = GraphView("", (node("inverse", "Inverse", kind="tract"),), 1)
    (group,) = groups(ElementTree.fromstring(svg(view)), "tract")
    assert texts(group).startswith("TrAct: Inverse")


@needs_dot
def test_stages_are_clusters_one_set_per_call() -> None:
    twice = [
        dataclasses.replace(
            n,
            name=f"{n.name}{copy}",
            inputs=tuple(f"{name}{copy}" for name in n.inputs),
        )
        for copy in "ab"
        for n in EXPANDED.nodes
    ]
    for nodes, calls in ((EXPANDED.nodes, 1), (tuple(twice), 2)):
        root = ElementTree.fromstring(svg(GraphView("", nodes, len(nodes))))
        stages = [texts(group) for group in groups(root, "cluster-stage")]
        assert sorted(stages) == sorted(["Gram", "factorisation", "solve"] * calls)
        assert len(groups(root, "cluster-tract")) == calls
        assert len(groups(root, "cluster-part")) == 2


@needs_dot
def test_the_forward_pass_is_on_the_left_and_the_backward_pass_runs_up() -> None:
    root = ElementTree.fromstring(svg(SHORT))
    places = {}
    for group in groups(root, "node"):
        (first, *_) = [t for t in group.iter(f"{SVG}text")]
        title = group.findtext(f"{SVG}title") or ""
        places[title.splitlines()[0].partition(": ")[2]] = tuple(
            float(first.get(axis) or "nan") for axis in "xy"
        )
    by_part = {
        part: [places[n.name][0] for n in SHORT.nodes if n.part == part]
        for part in ("forward", "backward")
    }
    assert max(by_part["forward"]) < min(by_part["backward"])
    assert places["x"][1] < places["conv1"][1] < places["maxpool"][1]
    assert places["grad_conv1_weight"][1] < places["conv1_backward"][1]
    assert places["conv1_backward"][1] < places["maxpool_backward"][1]


@needs_dot
def test_the_file_has_title_counts_and_legend() -> None:
    text = texts(ElementTree.fromstring(picture_file(SHORT).encode()))
    assert SHORT.title in text and "17 nodes, 411 more not shown" in text
    assert "TrAct (double border)" in text and "parameter" in text
    assert SHORT.title not in texts(ElementTree.fromstring(svg(SHORT)))


@needs_dot
def test_names_are_text() -> None:
    picture = picture_file(hostile().forward.view)
    root = ElementTree.fromstring(picture.encode())
    text = texts(root)
    assert "<script>alert(1)</script>" in text and "a:b;c{d}|e<f>" in text
    assert "\\n back\\slashes" in text
    assert not re.search(r"<(script|a)\b", picture)
    assert not [e for e in root.iter() if any(key.startswith("on") for key in e.attrib)]


@needs_dot
def test_a_view_of_nothing_says_so() -> None:
    assert "nothing was changed" in texts(ElementTree.fromstring(svg(bare().forward.view)))


def test_dot_source_needs_no_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert dot_source(SHORT).startswith("digraph")


def test_without_dot_the_error_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingRuntimeError, match="apt-get install graphviz"):
        svg(SHORT)
    with pytest.raises(MissingRuntimeError, match="apt-get install graphviz"):
        conv_net().save(tmp_path / "picture.svg")
    assert list(tmp_path.iterdir()) == []


def test_a_dot_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "dot"
    program.write_text(
        "#!/bin/sh\ncat > /dev/null\necho 'Format: svg not recognized' >&2\nexit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(MissingRuntimeError, match=r"is there and fails.*svg not recogn") as caught:
        svg(SHORT)
    assert "nstall" not in str(caught.value)
    text = notebook_html(conv_net())
    assert "svg not recognized" in text and "Install Graphviz" not in text
    program.write_text("#!/bin/sh\ncat > /dev/null\necho no picture\n")
    with pytest.raises(MissingRuntimeError, match="what it gives is not SVG"):
        svg(SHORT)


def test_a_dot_that_can_not_be_run_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "dot").write_bytes(b"no program")
    (tmp_path / "dot").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingRuntimeError, match=r"is there and fails.*format error"):
        svg(SHORT)


@needs_dot
def test_a_large_graph_is_drawn() -> None:
    forward = [node("f0", "x", kind="input")]
    forward += [node(f"f{i}", "conv2d", f"f{i - 1}") for i in range(1, 150)]
    backward = [back("b149", "loss", "f149")]
    backward += [back(f"b{i}", "conv2d_backward", f"b{i + 1}", f"f{i}") for i in range(148, 0, -1)]
    nodes = (*forward, *backward)
    root = ElementTree.fromstring(svg(GraphView("whole", nodes, len(nodes))))
    width = float((root.get("viewBox") or "").split()[2])
    assert len(groups(root, "node")) == 299 and width < 700  # two columns, no hairball

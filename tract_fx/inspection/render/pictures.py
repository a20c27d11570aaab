"""Pictures of graphs: Graphviz's language, and what Graphviz draws of it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

import graphviz  # type: ignore[import-untyped]

from tract_fx.errors import MissingRuntimeError
from tract_fx.inspection.records import GraphView, ViewNode
from tract_fx.inspection.render.words import place, plural, printable, shorten

_GRAPHVIZ_MISSING = (
    "Install Graphviz: apt-get install graphviz, brew install graphviz, or "
    "conda install -c conda-forge graphviz"
)

# Kind of node -> how it is drawn. Every kind has a shape or border of its own: colour alone is
# lost in print, and to some readers. The fills carry dark text, so they do on any background.
_STYLES = {
    "input": {"shape": "ellipse", "fillcolor": "#e0f2fe", "color": "#0369a1"},
    "parameter": {"shape": "cylinder", "fillcolor": "#ede9fe", "color": "#6d28d9"},
    "constant": {
        "shape": "box",
        "style": "filled,dashed",
        "fillcolor": "#f1f5f9",
        "color": "#64748b",
    },
    "operation": {"shape": "box", "fillcolor": "#f8fafc", "color": "#64748b"},
    "tract": {
        "shape": "box",
        "style": "filled",
        "fillcolor": "#ffedd5",
        "color": "#c2410c",
        "peripheries": "2",
        "penwidth": "1.6",
    },
    "output": {"shape": "ellipse", "fillcolor": "#dcfce7", "color": "#15803d"},
}
LEGEND = {
    "tract": "TrAct (double border)",
    "operation": "operation",
    "input": "input",
    "parameter": "parameter",
    "constant": "constant",
    "output": "output",
}
"""What each kind of node stands for, in a few words."""

_INK, _MUTED, _LINE, _TRACT = "#0f172a", "#475569", "#7d8794", "#ea580c"
_FONT = "Helvetica,Arial,sans-serif"
_NEIGHBOURHOOD = 80
_SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")


def dot_source(view: GraphView, *, legend: bool = True) -> str:
    """Describe a picture in Graphviz's language.

    The forward pass runs down on the left; the backward pass runs up beside it, so that a layer and
    its gradient stand near each other. In a neighbourhood that shows TrAct in stages both run down:
    most of it is TrAct then, which begins at the layer's input.
    """
    graph = graphviz.Digraph()
    graph.attr(
        **{"class": "tract-graph"},
        rankdir="TB",
        bgcolor="transparent",
        fontname=_FONT,
        fontsize="12",
        fontcolor=_MUTED,
        nodesep="0.28",
        ranksep="0.34",
        newrank="true",
    )
    graph.attr(
        "node",
        fontname=_FONT,
        fontsize="12.5",
        fontcolor=_INK,
        style="filled,rounded",
        margin="0.14,0.06",
        height="0.3",
    )
    graph.attr("edge", color=_LINE, arrowsize="0.7", penwidth="1.1")
    if legend:
        graph.attr(label=_caption(view), labelloc="b", labeljust="l")
    ids = {node.name: f"n{i}" for i, node in enumerate(view.nodes)}
    blocks = _blocks(view.nodes)
    up = not blocks or len(view.nodes) > _NEIGHBOURHOOD
    # Where edges come first, and in this order, Graphviz puts the forward pass on the left.
    if up:
        _add_edges(graph, view.nodes, ids, up=True)
    for part in ("forward", "backward"):
        nodes = [node for node in view.nodes if node.part == part]
        if nodes:
            with graph.subgraph(name=f"cluster_{part}") as cluster:
                cluster.attr(label=f"{part} pass", **_cluster("part"))
                _add_nodes(cluster, nodes, ids, blocks)
    if not up:
        _add_edges(graph, view.nodes, ids, up=False)
    if not view.nodes:
        graph.node("n", printable(view.note) or "nothing to show", shape="plaintext", style="")
    return str(graph.source)


def _cluster(name: str) -> dict[str, str]:
    style = {"part": "rounded", "tract": "rounded,bold", "stage": "rounded,dashed"}[name]
    color, text = (_LINE, _MUTED) if name == "part" else (_TRACT, "#c2410c")
    return {
        "class": f"cluster-{name}",
        "style": style,
        "color": color,
        "fontcolor": text,
        "labeljust": "l",
        "labelloc": "t",
        "margin": "12",
    }


def _add_nodes(
    graph: graphviz.Digraph,
    nodes: Iterable[ViewNode],
    ids: dict[str, str],
    blocks: dict[str, int],
) -> None:
    """Add the nodes of one part; those of one TrAct call in a cluster, its stages in more."""
    beside: list[ViewNode] = []
    inside: dict[int, dict[str, list[ViewNode]]] = {}
    for node in nodes:
        if node.name in blocks:
            stages = inside.setdefault(blocks[node.name], {})
            stages.setdefault(node.stage, []).append(node)
        else:
            beside.append(node)
    # Its operations in a cluster without a border, or TrAct's would come to lie between them.
    with graph.subgraph(name="cluster_beside" if inside else None) as together:
        together.attr(label="", peripheries="0", **{"class": "cluster-beside"})
        for node in beside:
            _add_node(graph if node.kind == "output" else together, node, ids[node.name])
    for number, stages in inside.items():
        key = f"{next(iter(stages.values()))[0].part}_{number}"
        with graph.subgraph(name=f"cluster_{key}") as block:
            block.attr(label="TrAct", **_cluster("tract"))
            for i, (stage, members) in enumerate(stages.items()):
                with block.subgraph(name=f"cluster_{key}_{i}") as cluster:
                    cluster.attr(label=f"<{_text(stage)}>", **_cluster("stage"))
                    for node in members:
                        _add_node(cluster, node, ids[node.name])


def _blocks(nodes: Sequence[ViewNode]) -> dict[str, int]:
    """Number the nodes that have a stage, those that hang together alike: one number per call."""
    staged = {node.name: node for node in nodes if node.stage}
    number = {name: i for i, name in enumerate(staged)}
    for node in staged.values():
        for name in node.inputs:
            if name in number and number[name] != number[node.name]:
                old, new = sorted((number[name], number[node.name]), reverse=True)
                number = {k: new if v == old else v for k, v in number.items()}
    return number


def _add_node(graph: graphviz.Digraph, node: ViewNode, identity: str) -> None:
    told = node.kind != "tract" or node.stage or "TrAct" in node.label
    label = f"<b>{_text(node.label if told else f'TrAct: {node.label}', 46)}</b>"
    known = node.name.replace("_", " ") in node.label.replace("_", " ")  # "relu" of "relu"
    lines = ["" if known else node.name, node.detail]
    small = "<br/>".join(_text(line) for line in lines if line)
    if small:
        label += f'<br/><font point-size="11" color="{_MUTED}">{small}</font>'
    graph.node(identity, f"<{label}>", id=identity, **{"class": node.kind}, **_STYLES[node.kind])


def _add_edges(
    graph: graphviz.Digraph, nodes: Sequence[ViewNode], ids: dict[str, str], *, up: bool
) -> None:
    """Add the edges: the forward pass's, the backward pass's, then those across."""
    parts = {node.name: node.part for node in nodes}
    edges = [(name, node) for node in nodes for name in dict.fromkeys(node.inputs) if name in ids]
    edges.sort(key=lambda edge: (parts[edge[0]] != edge[1].part, edge[1].part == "backward"))
    for name, node in edges:
        style = {}
        if node.kind == "tract":
            style = {"class": "to-tract", "color": _TRACT, "penwidth": "1.6"}
        if parts[name] != node.part:  # a value that the forward pass keeps
            style["style"] = "dashed"
            if up:  # to the same height or below
                style["minlen"] = "0"
        elif up and node.part == "backward":
            graph.edge(ids[node.name], ids[name], dir="back", **style)
            continue
        graph.edge(ids[name], ids[node.name], **style)


def _text(text: str, most: int = 36) -> str:
    return html.escape(shorten(printable(text), most))


def _caption(view: GraphView) -> str:
    kinds = {node.kind for node in view.nodes}
    shown = plural(len(view.nodes), "node", "nodes")
    lines = [
        f"<b>{html.escape(printable(view.title))}</b>",
        f"{shown}, {view.hidden:,} more not shown" if view.hidden > 0 else shown,
        " · ".join(text for kind, text in LEGEND.items() if kind in kinds),
        html.escape(printable(view.note)),
    ]
    return "<" + "".join(f'{line}<br align="left"/>' for line in lines if line) + ">"


def svg(view: GraphView) -> str:
    """Draw a picture to be put into a page."""
    root = _draw(view, legend=False)
    for element in root.iter():
        element.attrib.pop("id", None)
    return ElementTree.tostring(root, encoding="unicode")


def picture_file(view: GraphView) -> str:
    """Draw a picture to be a file of its own, with a title and a legend."""
    text = ElementTree.tostring(_draw(view, legend=True), encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _draw(view: GraphView, *, legend: bool) -> ElementTree.Element:
    source = graphviz.Source(dot_source(view, legend=legend))
    try:
        drawn = source.pipe(format="svg", encoding="utf-8", quiet=True)
    except graphviz.ExecutableNotFound as error:
        raise MissingRuntimeError(
            "the program dot of Graphviz, which lays pictures out, is not on the PATH",
            "the Python package graphviz only calls it",
            _GRAPHVIZ_MISSING,
        ) from error
    except (graphviz.CalledProcessError, OSError, UnicodeError) as error:
        said = str(getattr(error, "stderr", "") or error).strip()
        raise _failed(said) from error
    try:
        root = ElementTree.fromstring(drawn)
    except ElementTree.ParseError as error:
        raise _failed(f"what it gives is not SVG ({error})") from error
    titles = {f"n{i}": _title(node) for i, node in enumerate(view.nodes)}
    for group in root.iter(f"{{{_SVG}}}g"):
        title = group.find(f"{{{_SVG}}}title")
        text = titles.get(group.get("id", ""))
        if title is not None and text:
            title.text = text
        elif title is not None:
            group.remove(title)
    root.set("role", "img")
    root.set("aria-label", _summary(view))
    return root


def _failed(said: str) -> MissingRuntimeError:
    return MissingRuntimeError(
        "the program dot of Graphviz is there and fails",
        f"it says: {said.rstrip('.')}",
        "See what `dot -Tsvg` says to a small graph; the kind .dot is written without it",
    )


def _title(node: ViewNode) -> str:
    lines = [f"{node.label}: {node.name}", node.detail]
    if node.source is not None:
        lines.append(f"{place(node.source)} in {node.source.function}: {node.source.text}")
    return "\n".join(printable(line) for line in lines if line)


def _summary(view: GraphView) -> str:
    tract = sum(node.kind == "tract" for node in view.nodes)
    nodes = plural(len(view.nodes), "node", "nodes")
    return printable(f"{view.title}: {nodes}, of which {tract} of TrAct")

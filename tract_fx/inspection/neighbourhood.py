"""What of a graph is worth a picture: the nodes around TrAct's, and stand-ins for the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from tract_fx.inspection.records import GraphView, Part, ViewNode

_MOST_ON_THE_WAY = 12
"""So many nodes from the model's input to TrAct, or from TrAct to the parameter's gradient, are
shown, whatever the radius."""


def view_of(
    nodes: Sequence[ViewNode],
    title: str,
    radius: int,
    *,
    whole: bool,
    note: str = "",
    around: Collection[str] = (),
) -> GraphView:
    """Make a picture of a graph's nodes: of all, or of those around TrAct's and some others."""
    shown = nodes if whole else neighbourhood(nodes, radius, around)
    own = {node.name for node in nodes}
    stand_ins = sum(node.name not in own for node in shown)
    return GraphView(title, tuple(shown), len(nodes) + stand_ins, note)


def neighbourhood(
    nodes: Sequence[ViewNode], radius: int, around: Collection[str] = ()
) -> list[ViewNode]:
    """Choose the nodes around TrAct's, and around those of some names.

    In the forward pass these are what TrAct's weight and input are computed from and what comes
    after the layer; in the backward pass what the layer's gradient comes from, and what becomes of
    it up to the parameter. Parameters, constants and gradients are shown one step less far than
    operations, for a norm alone would bring five. What is left out is drawn as one node, the rest
    of the model, which takes what the forward pass gives and gives what the backward pass takes.
    """
    graph = _Graph(nodes, around)
    if not graph.tract:
        return list(nodes)
    there, after = (graph.reach(e, "forward") for e in (graph.inputs, graph.readers))
    above, back = (graph.reach(e, "backward") for e in (graph.inputs, graph.readers))
    shown = {*graph.tract, *graph.hanging_on(graph.tract)}
    for distances in (after, above):
        shown |= {name for name, steps in distances.items() if steps <= radius - graph.hangs(name)}
        shown |= graph.hanging_on(n for n, steps in distances.items() if steps <= radius - 2)
    for way in (there, back):
        if len(way) <= _MOST_ON_THE_WAY:
            shown |= set(way)
        else:
            # All of what leads on is left out: one stand-in for a part of it could make a circle.
            shown |= {n for n, steps in way.items() if steps == 1 and way is there}
            shown |= {n for n in way if graph.nodes[n].kind in ("input", "output")}
    shown |= graph.bridges(shown)
    picture = [node for node in nodes if node.name in shown]
    hidden = {n.name: n for n in nodes if n.name not in shown and not graph.hangs(n.name)}
    sides: tuple[tuple[dict[str, int], Part], ...] = ((there, "forward"), (back, "backward"))
    for way, part in sides:
        left_out = {name: hidden.pop(name) for name in way if name in hidden}
        stand_in = ViewNode("on_the_way", f"… {_count(left_out)} on the way", "operation", part, ())
        picture = _with_stand_in(picture, left_out, stand_in, read_in=part)
    # A forward node that reads something hidden reads what is made of parameters alone.
    label = f"… rest of the model: {_count(hidden)}"
    stand_in = ViewNode("rest_of_the_model", label, "operation", "forward", ())
    picture = _with_stand_in(picture, hidden, stand_in, read_in="backward")
    names = {node.name for node in picture}
    return [replace(n, inputs=tuple(i for i in n.inputs if i in names)) for n in picture]


class _Graph:
    """The edges between the nodes of a picture, in both directions."""

    def __init__(self, nodes: Sequence[ViewNode], around: Collection[str]) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.tract = [n.name for n in nodes if n.kind == "tract" or n.name in around]
        self.inputs = {node.name: node.inputs for node in nodes}
        self.readers: dict[str, list[str]] = {node.name: [] for node in nodes}
        for node in nodes:
            for name in node.inputs:
                self.readers[name].append(node.name)

    def hangs(self, name: str) -> bool:
        """Tell what hangs on an operation and leads nowhere: a parameter, constant or gradient."""
        node = self.nodes[name]
        gradient = node.kind == "output" and node.part == "backward"
        return gradient or node.kind in ("parameter", "constant")

    def hanging_on(self, names: Iterable[str]) -> set[str]:
        """Give what hangs on some nodes."""
        around = (n for name in names for n in (*self.inputs[name], *self.readers[name]))
        return {name for name in around if self.hangs(name)}

    def bridges(self, shown: set[str]) -> set[str]:
        """Give the single nodes that lead from some nodes to others of them, such as a cast."""
        return {
            name
            for name, inputs in self.inputs.items()
            if inputs and shown.issuperset(inputs) and not shown.isdisjoint(self.readers[name])
        }

    def reach(self, edges: Mapping[str, Sequence[str]], part: Part) -> dict[str, int]:
        """Give everything that TrAct's nodes in one pass lead to there, with steps."""
        distances = {name: 0 for name in self.tract if self.nodes[name].part == part}
        pending = deque(distances)
        while pending:
            name = pending.popleft()
            for other in edges[name]:
                if other not in distances and self.nodes[other].part == part:
                    distances[other] = distances[name] + 1
                    pending.append(other)
        return {name: steps for name, steps in distances.items() if steps}


def _count(hidden: Mapping[str, ViewNode]) -> str:
    return f"{len(hidden)} node{'s' * (len(hidden) != 1)}"


def _with_stand_in(
    picture: list[ViewNode], hidden: Mapping[str, ViewNode], stand_in: ViewNode, read_in: str
) -> list[ViewNode]:
    """Put one node in the place of several."""
    if not hidden:
        return picture
    name = stand_in.name
    while any(name in (node.name, *hidden) for node in picture):
        name += "_"
    result = [
        replace(n, inputs=tuple(dict.fromkeys(name if i in hidden else i for i in n.inputs)))
        if n.part == read_in
        else n
        for n in picture
    ]
    part = stand_in.part
    read = {i for node in hidden.values() if node.part == part for i in node.inputs}
    inputs = tuple(n.name for n in picture if n.name in read and n.part == part)
    place = next((i for i, n in enumerate(result) if name in n.inputs), len(result))
    if place == len(result) and not inputs:
        return picture  # nothing shown has to do with them
    result.insert(place, replace(stand_in, name=name, inputs=inputs))
    return result

"""What locating gives: frozen records, the same for fx and ONNX graphs."""

from __future__ import annotations

from dataclasses import dataclass

from tract_fx.preconditioner import PatchGeometry


@dataclass(frozen=True)
class InputLayer:
    """One call of a convolution or linear layer that TrAct can treat.

    Attributes:
        name: The layer's name: its module's path, or where it has none the node's name.
        node: Name of the node that calls the layer.
        op: `"linear"`, `"conv1d"`, `"conv2d"` or `"conv3d"`.
        weight: Names of the parameters that the weight is computed from; one for most layers.
        weight_shape: Shape of the weight that is multiplied with, None where it is not known
            before running.
        geometry: How the layer reads its input, None where it is not known before running.
        path: Names of the nodes from the placeholder to the layer, both included.
        frozen: No parameter of the weight requires a gradient, so that TrAct is idle.
        lambda_: λ where the call is a TrAct call already, else None.
        module: Path of the linear or convolution module whose forward this call is, None where it
            is a function call that another module makes.
        group: Name of the process group whose rows a TrAct call's Gram is of, None for those of the
            call alone.
    """

    name: str
    node: str
    op: str
    weight: tuple[str, ...]
    weight_shape: tuple[int, ...] | None
    geometry: PatchGeometry | None
    path: tuple[str, ...]
    frozen: bool
    lambda_: float | None
    module: str | None = None
    group: str | None = None

    def __str__(self) -> str:
        shape = "" if self.weight_shape is None else f", weight {self.weight_shape}"
        return f"{self.name} ({self.op}, node {self.node!r}{shape})"


@dataclass(frozen=True)
class Refusal:
    """One operation that meets the model's input and that TrAct can't treat.

    Attributes:
        node: Name of the node.
        op: The operation: a module's class or a function's name.
        path: Names of the nodes from the placeholder to the node, both included.
        reason: Why it can't be treated.
        remedy: What to do instead.
        competes: Whether the operation stands where an input layer would, so that another layer
            beside it is no longer the one obvious choice. A look-up by integers does not.
        module: Path of the module that the operation is or lies in, where the graph tells it.
    """

    node: str
    op: str
    path: tuple[str, ...]
    reason: str
    remedy: str
    competes: bool = True
    module: str | None = None

    def __str__(self) -> str:
        return f"{self.op} (node {self.node!r}): {self.reason}. {self.remedy}."


@dataclass(frozen=True)
class Findings:
    """All that locating found.

    Attributes:
        layers: The calls that consume the model's input, in graph order. Several calls of one
            layer are several records of the same name.
        refusals: What meets the input and can't be treated, in graph order.
    """

    layers: tuple[InputLayer, ...]
    refusals: tuple[Refusal, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers, each once, in graph order."""
        return tuple(dict.fromkeys(layer.name for layer in self.layers))

    def __str__(self) -> str:
        taken = [f"  {layer}" for layer in self.layers]
        refused = [f"  not: {refusal}" for refusal in self.refusals]
        return "\n".join(taken + refused) or "  nothing meets the input"


def layer_name(node: str, weight: tuple[str, ...]) -> str:
    """Name a layer by the module that its weight is of, else by the weight, else by the node."""
    if not weight:
        return node
    module, _, rest = weight[0].partition(".parametrizations.")
    if not rest:
        module, _, name = weight[0].rpartition(".")
        if not name.startswith("weight"):
            return weight[0]
    return module or node

"""What inspecting gives: frozen records, the same for fx and ONNX graphs, that renderers read."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tract_fx.passes.records import InputLayer

Kind: TypeAlias = Literal["input", "parameter", "constant", "operation", "tract", "output"]
Part: TypeAlias = Literal["forward", "backward"]


@dataclass(frozen=True)
class SourceLine:
    """A line of the user's own code.

    Attributes:
        file: Path of the file.
        line: Number of the line, from 1.
        function: The function that it lies in.
        text: The line, stripped.
    """

    file: str
    line: int
    function: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}: {self.text}"


@dataclass(frozen=True)
class LayerReport:
    """One call of a layer: one that has TrAct, or one that could and has not.

    Attributes:
        record: What locating says of the call; its `lambda_` is None where TrAct is not on it.
        on_input: Whether the call consumes the model's input.
        source: The user's line that makes the call, None where it is not known.
        input_shape: Shape of what the call reads, None where nothing was run.
        input_dtype: Dtype in which it multiplies, such as `"float32"`; None where nothing was run.
        rows: R, None where nothing was run.
        columns: n, of one group; None where it is not known.
        form: How the system is solved, such as `"Cholesky of the Gram, float32"`; empty where
            TrAct is not on the call or nothing was run.
        gram: How the Gram is computed; empty as above, and where no Gram is formed.
        note: What else a reader has to know, such as that the layer is frozen; or why TrAct is not
            on the call. Empty where there is nothing.
    """

    record: InputLayer
    on_input: bool
    source: SourceLine | None
    input_shape: tuple[int, ...] | None
    input_dtype: str | None
    rows: int | None
    columns: int | None
    form: str
    gram: str
    note: str

    @property
    def taken(self) -> bool:
        """Whether TrAct is on the call."""
        return self.record.lambda_ is not None


@dataclass(frozen=True)
class ViewNode:
    """A node of a picture.

    Attributes:
        name: Its name, unique in the picture.
        label: What it does, short: `"conv2d"`, `"TrAct λ = 0.1"`, `"weight"`.
        kind: What stands there. `"tract"` marks every node that the pass made or changed.
        part: The pass over the graph that it belongs to.
        inputs: Names of the nodes in the picture whose values it reads.
        detail: Shape and dtype of its value, such as `"float32 64×3×7×7"`, empty if not known.
        stage: In an expanded picture the part of TrAct: `"Gram"`, `"factorisation"`, `"solve"`;
            else empty.
        source: The user's line that it comes from, None where it is not known.
    """

    name: str
    label: str
    kind: Kind
    part: Part
    inputs: tuple[str, ...]
    detail: str = ""
    stage: str = ""
    source: SourceLine | None = None


@dataclass(frozen=True)
class GraphView:
    """A graph to look at: a neighbourhood of TrAct's nodes, or all of it.

    Attributes:
        title: What it shows.
        nodes: The nodes shown, in the order in which they run.
        total: How many nodes the whole graph has.
        note: What a reader has to know, empty where there is nothing.
    """

    title: str
    nodes: tuple[ViewNode, ...]
    total: int
    note: str = ""

    @property
    def hidden(self) -> int:
        """How many nodes are left out."""
        return self.total - len(self.nodes)


@dataclass(frozen=True)
class ForwardDiff:
    """What the rewrite changed in the forward graph (of an ONNX training graph: in all of it).

    Attributes:
        before: The plain graph as text, a line per node or module.
        after: The rewritten graph as text.
        view: The neighbourhood of what changed, in the rewritten graph.
    """

    before: str
    after: str
    view: GraphView

    def lines(self, context: int = 3) -> list[str]:
        """Compare both texts."""
        before, after = self.before.splitlines(), self.after.splitlines()
        diff = difflib.unified_diff(before, after, "plain", "with TrAct", "", "", context, "")
        return list(diff)[2:]


@dataclass(frozen=True)
class Backward:
    """The backward pass of the rewritten model.

    Attributes:
        short: TrAct as one node per call.
        expanded: TrAct as primitive operations; None where it was not asked for.
    """

    short: GraphView
    expanded: GraphView | None


@dataclass(frozen=True)
class Check:
    """One comparison of what the rewritten model computes with what it should.

    Attributes:
        name: What was compared: `"output"`, `"gradient of fc.bias"`.
        error: Norm of the difference relative to the reference's norm; NaN where either has one.
        tolerance: The largest error that passes.
    """

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class WeightCheck:
    """The gradient of a parameter that TrAct changes, against the float64 definition.

    Attributes:
        parameter: The parameter's name.
        nodes: The calls with TrAct that it takes part in.
        operator: The preconditioner alone: float64's (XᵀX/R + λI)⁻¹ on the same incoming gW.
        end_to_end: Relative error against float64's own gW as well, computed from the gradient of
            the layer's output; None where gW has other terms (a gradient penalty).
        floor: The end-to-end error that an exact preconditioner would leave: that of the layer's
            own weight gradient, magnified. None as above.
        plain: Relative distance of the plain gradient from the reference: what the error would be
            if the transform were lost.
    """

    parameter: str
    nodes: tuple[str, ...]
    operator: Check
    end_to_end: float | None
    floor: float | None
    plain: float


@dataclass(frozen=True)
class Verification:
    """Whether the rewritten model computes TrAct's gradient, and changes nothing else.

    Attributes:
        weights: The parameters under TrAct.
        others: Outputs and every other gradient, against the plain model.
        problems: Ways in which the transform is missing altogether, empty where there is none.
        note: On what it was measured, and with which loss.
        lost: Which of the problems, or what names of theirs, say that TrAct is gone or bypassed
            where it should be. The other problems only say that there was nothing to compare.
        inconclusive: Whether a comparison beyond its tolerance says nothing here, because the plain
            model differs from itself, say.
    """

    weights: tuple[WeightCheck, ...]
    others: tuple[Check, ...]
    problems: tuple[str, ...]
    note: str
    lost: tuple[str, ...] = ()
    inconclusive: bool = False

    @property
    def passed(self) -> bool:
        """Whether TrAct is there, and every comparison is within its tolerance."""
        return self.verdict == "right"

    @property
    def verdict(self) -> Literal["right", "wrong", "open"]:
        """Whether the gradient is TrAct's; open where too little was compared to tell."""
        checks = [*(w.operator for w in self.weights), *self.others]
        passed = all(check.passed for check in checks)
        if self.lost or not (passed or self.inconclusive):
            return "wrong"
        return "right" if passed and self.weights and not self.problems else "open"


@dataclass(frozen=True)
class ImageShare:
    """One image's part in the first layer's update.

    Attributes:
        brightness: Mean of the image as the layer reads it.
        contrast: Standard deviation of the image as the layer reads it.
        plain: Norm of its term of gW, over the sum of all images' norms.
        tract: The same with TrAct.
    """

    brightness: float
    contrast: float
    plain: float
    tract: float


@dataclass(frozen=True)
class LayerStatistics:
    """What one call with TrAct does on a batch, in float64.

    Attributes:
        name: The layer's name.
        node: The calling node's name.
        lambda_: λ.
        eigenvalues: Of the Gram XᵀX/R, descending, those of all groups together. With R < n the R
            that can differ from zero.
        zeros: How many further eigenvalues are zero because R < n.
        condition: Largest eigenvalue over smallest, infinite where the smallest is zero.
        regularised_condition: The same with λ added to both.
        plain_norm: Frobenius norm of gW.
        tract_norm: Frobenius norm of gW (XᵀX/R + λI)⁻¹.
        cosine: Cosine of the angle between both.
        images: A record per image; empty where the images can't be told apart.
        plain_correlation: Pearson correlation of the images' contrast and plain share; NaN where
            it is not defined.
        tract_correlation: The same with TrAct.
        mean: Mean of the input.
        std: Standard deviation of the input.
        minimum: Smallest entry of the input.
        maximum: Largest entry of the input.
    """

    name: str
    node: str
    lambda_: float
    eigenvalues: tuple[float, ...]
    zeros: int
    condition: float
    regularised_condition: float
    plain_norm: float
    tract_norm: float
    cosine: float
    images: tuple[ImageShare, ...]
    plain_correlation: float
    tract_correlation: float
    mean: float
    std: float
    minimum: float
    maximum: float


@dataclass(frozen=True)
class Statistics:
    """What TrAct has to do on the user's batch.

    Attributes:
        layers: A record per call with TrAct.
        warnings: What of input or λ makes TrAct worse than it could be, with the way out.
    """

    layers: tuple[LayerStatistics, ...]
    warnings: tuple[str, ...]

"""Inspections written by hand, as renderers get them: usual, failed, empty and hostile ones."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any, Literal

from tract_fx.inspection.inspection import Inspection
from tract_fx.inspection.records import (
    Backward,
    Check,
    ForwardDiff,
    GraphView,
    ImageShare,
    LayerReport,
    LayerStatistics,
    SourceLine,
    Statistics,
    Verification,
    ViewNode,
    WeightCheck,
)
from tract_fx.passes.records import InputLayer, Refusal
from tract_fx.preconditioner import PatchGeometry

NAN, INF = math.nan, math.inf
VERSIONS = {"tract_fx": "0.1.0", "torch": "2.13.0", "python": "3.11.7"}

STEM = InputLayer(
    name="conv1",
    node="conv1",
    op="conv2d",
    weight=("conv1.weight",),
    weight_shape=(64, 3, 7, 7),
    geometry=PatchGeometry.of_convolution((7, 7), 2, 3),
    path=("x", "sub", "div", "conv1"),
    frozen=False,
    lambda_=0.1,
    module="conv1",
)
PROJECTION = InputLayer(
    name="metadata.project",
    node="linear_3",
    op="linear",
    weight=("metadata.project.weight",),
    weight_shape=(32, 12),
    geometry=PatchGeometry(),
    path=("metadata", "linear_3"),
    frozen=False,
    lambda_=None,
)
POSITION = Refusal(
    node="add",
    op="add",
    path=("x", "flatten", "add"),
    reason="a parameter is added to the input before a layer reads it",
    remedy="Name the layer behind it with layers=[…]",
)


def line(number: int, text: str, function: str = "forward") -> SourceLine:
    return SourceLine("/home/ada/nets/resnet.py", number, function, text)


def node(name: str, label: str, *inputs: str, **more: Any) -> ViewNode:
    kind = more.pop("kind", "operation")
    return ViewNode(name, label, kind, more.pop("part", "forward"), inputs, **more)


def back(name: str, label: str, *inputs: str, **more: Any) -> ViewNode:
    return node(name, label, *inputs, part="backward", **more)


FORWARD_NODES = (
    node("x", "x", kind="input", detail="float32 32×3×224×224"),
    node("mean", "mean", kind="constant", detail="float32 1×3×1×1"),
    node("std", "std", kind="constant", detail="float32 1×3×1×1"),
    node("sub", "sub", "x", "mean", source=line(40, "x = (x - self.mean) / self.std")),
    node("div", "div", "sub", "std", source=line(40, "x = (x - self.mean) / self.std")),
    node("conv1_weight", "conv1.weight", kind="parameter", detail="float32 64×3×7×7"),
    node(
        "tract_conv1",
        "TrAct λ = 0.1",
        "conv1_weight",
        "div",
        kind="tract",
        detail="float32 64×3×7×7",
        source=line(41, "x = self.conv1(x)"),
    ),
    node(
        "conv1",
        "conv2d",
        "div",
        "tract_conv1",
        detail="float32 32×64×112×112",
        source=line(41, "x = self.conv1(x)"),
    ),
    node(
        "bn1",
        "batch_norm",
        "conv1",
        detail="float32 32×64×112×112",
        source=line(42, "x = self.relu(self.bn1(x))"),
    ),
    node("relu", "relu", "bn1", detail="float32 32×64×112×112", source=line(42, "x = self.relu()")),
    node("maxpool", "max_pool2d", "relu", detail="float32 32×64×56×56"),
)

ARRIVING = (
    back("maxpool_backward", "max_pool2d_backward", "relu", detail="float32 32×64×112×112"),
    back("relu_backward", "threshold_backward", "maxpool_backward", "relu"),
    back("bn1_backward", "batch_norm_backward", "relu_backward", "conv1", source=line(42, "x = …")),
    back(
        "conv1_backward",
        "convolution_backward",
        "bn1_backward",
        "div",
        detail="float32 64×3×7×7",
        source=line(41, "x = self.conv1(x)"),
    ),
)
LEAVING = back(
    "grad_conv1_weight",
    "gradient of conv1.weight",
    "tract_conv1_grad",
    kind="output",
    detail="float32 64×3×7×7",
)
SHORT = GraphView(
    title="Backward pass around conv1",
    nodes=(
        *FORWARD_NODES,
        *ARRIVING,
        back(
            "tract_conv1_grad",
            "TrAct gW (XᵀX/R + λI)⁻¹, λ = 0.1",
            "conv1_backward",
            "div",
            kind="tract",
            detail="float32 64×3×7×7",
            source=line(41, "x = self.conv1(x)"),
        ),
        LEAVING,
    ),
    total=428,
)


def stage(name: str, label: str, *inputs: str, of: str, detail: str = "") -> ViewNode:
    return back(name, label, *inputs, kind="tract", stage=of, detail=detail)


EXPANDED = GraphView(
    title="Backward pass around conv1, TrAct as primitive operations",
    nodes=(
        *FORWARD_NODES,
        *ARRIVING,
        stage("pad", "constant_pad_nd", "div", of="Gram", detail="float32 32×3×230×230"),
        stage("unfold", "im2col", "pad", of="Gram", detail="float32 32×147×12544"),
        stage("permute", "permute", "unfold", of="Gram"),
        stage("rows", "reshape", "permute", of="Gram", detail="float32 401408×147"),
        stage("transposed", "t", "rows", of="Gram"),
        stage("mm", "mm", "transposed", "rows", of="Gram", detail="float64 147×147"),
        stage("scaled", "div", "mm", of="Gram", detail="float64 147×147"),
        stage("eye", "eye", of="factorisation", detail="float64 147×147"),
        stage("scaled_eye", "mul λ", "eye", of="factorisation"),
        stage("damped", "add", "scaled", "scaled_eye", of="factorisation"),
        stage("cholesky", "linalg_cholesky_ex", "damped", of="factorisation"),
        stage("factor", "getitem 0", "cholesky", of="factorisation", detail="float64 147×147"),
        stage("info", "getitem 1", "cholesky", of="factorisation", detail="int32 scalar"),
        stage("flat", "reshape", "conv1_backward", of="solve", detail="float32 64×147"),
        stage("solved", "cholesky_solve", "flat", "factor", of="solve", detail="float64 147×64"),
        stage("zero", "eq", "info", of="solve"),
        stage("guarded", "where", "zero", "solved", of="solve"),
        stage("tract_conv1_grad", "reshape", "guarded", of="solve", detail="float32 64×3×7×7"),
        LEAVING,
    ),
    total=467,
)

BEFORE = """\
x = placeholder
sub = sub(x, mean)
div = div(sub, std)
conv1 = conv2d(div, conv1.weight, stride=(2, 2), padding=(3, 3))
bn1 = batch_norm(conv1, bn1.weight, bn1.bias)
relu = relu(bn1)
maxpool = max_pool2d(relu, 3, stride=2, padding=1)
layer1_0_conv1 = conv2d(maxpool, layer1.0.conv1.weight, padding=(1, 1))
output = fc"""
AFTER = BEFORE.replace(
    "conv1 = conv2d(div, conv1.weight, stride",
    "tract_conv1 = precondition_grad(conv1.weight, div, lambda_=0.1, stride=(2, 2), "
    "padding=(3, 3))  # TrAct\nconv1 = conv2d(div, tract_conv1, stride",
    1,
)


def statistics_of(name: str, seed: int = 0, **changes: Any) -> LayerStatistics:
    draw = random.Random(seed)
    eigenvalues = sorted(
        (38.0 * math.exp(-draw.expovariate(0.18)) for _ in range(147)), reverse=True
    )
    contrasts = [0.2 + draw.random() for _ in range(32)]
    norms = [(c * draw.uniform(0.8, 1.2), draw.uniform(0.8, 1.2)) for c in contrasts]
    sums = sum(p for p, _ in norms), sum(t for _, t in norms)
    images = tuple(
        ImageShare(draw.gauss(0, 0.4), contrast, p / sums[0], t / sums[1])
        for contrast, (p, t) in zip(contrasts, norms, strict=True)
    )
    record = LayerStatistics(
        name=name,
        node=name.replace(".", "_"),
        lambda_=0.1,
        eigenvalues=tuple(eigenvalues),
        zeros=0,
        condition=eigenvalues[0] / eigenvalues[-1],
        regularised_condition=(eigenvalues[0] + 0.1) / (eigenvalues[-1] + 0.1),
        plain_norm=0.8231,
        tract_norm=3.1415,
        cosine=0.4417,
        images=images,
        plain_correlation=0.912,
        tract_correlation=0.0713,
        mean=-0.0214,
        std=1.0312,
        minimum=-2.1179,
        maximum=2.64,
    )
    return dataclasses.replace(record, **changes)


OTHERS = tuple(
    Check(f"gradient of layer{1 + i // 18}.{i // 9 % 2}.{part}", 1e-8 * (1 + i * 7 % 31), 1e-5)
    for i, part in enumerate(["conv1.weight", "bn1.weight", "bn1.bias"] * 20)
)
VERIFIED = Verification(
    weights=(
        WeightCheck(
            parameter="conv1.weight",
            nodes=("conv1",),
            operator=Check("operator", 2.13e-7, 1e-5),
            end_to_end=4.42e-7,
            floor=3.91e-7,
            plain=0.871,
        ),
    ),
    others=(Check("output", 0.0, 1e-6), *OTHERS),
    problems=(),
    note="on the batch given, with the output's product with fixed random numbers as the loss",
)


def report(record: InputLayer = STEM, **changes: Any) -> LayerReport:
    whole = LayerReport(
        record=record,
        on_input=True,
        source=line(41, "x = self.conv1(x)"),
        input_shape=(32, 3, 224, 224),
        input_dtype="float32",
        rows=401408,
        columns=147,
        form="Cholesky of the Gram, float32",
        gram="patches unfolded in 12 blocks, float32 products, float64 sums",
        note="",
    )
    return dataclasses.replace(whole, **changes)


def skipped(record: InputLayer = PROJECTION, note: str = "TrAct was put on another layer") -> Any:
    nothing: dict[str, Any] = dict.fromkeys(("source", "input_shape", "input_dtype", "rows"))
    return report(record, **nothing, columns=12, form="", gram="", note=note)


def conv_net(**changes: Any) -> Inspection:
    """The usual case: TrAct on one convolution, everything asked for."""
    whole = Inspection(
        subject="ResNet",
        kind="graph",
        batch="float32 32×3×224×224",
        layers=(report(), skipped()),
        refusals=(POSITION,),
        others=52,
        forward=ForwardDiff(
            BEFORE, AFTER, GraphView("What changed around conv1", FORWARD_NODES, 178)
        ),
        backward=Backward(SHORT, EXPANDED),
        verification=VERIFIED,
        statistics=Statistics((statistics_of("conv1"),), ()),
        notes=("the loss was not given: the output's product with fixed random numbers is used",),
        versions=VERSIONS,
    )
    return dataclasses.replace(whole, **changes)


def onnx_graph() -> Inspection:
    """A training graph for ONNX Runtime: other names, λ outside the spectrum, no expanded view."""
    record = dataclasses.replace(
        STEM,
        name="stem",
        node="/stem/Conv",
        weight=("stem.weight",),
        weight_shape=(16, 3, 3, 3),
        geometry=PatchGeometry((3, 3), (1, 1), ((0, 1), (0, 1)), (2, 2)),
        path=("input", "/normalise/Div", "/stem/Conv"),
        lambda_=10.0,
        module=None,
    )
    layer = report(
        record,
        source=None,
        input_shape=(4, 3, 8, 8),
        rows=144,
        columns=27,
        form="com.microsoft::Inverse of the Gram, float32",
        gram="patches by slices",
    )
    nodes = (
        node("input", "input", kind="input", detail="float32 batch×3×8×8"),
        node("stem.weight", "stem.weight", kind="parameter", detail="float32 16×3×3×3"),
        node("/stem/Conv", "Conv", "input", "stem.weight"),
        back("/stem/Conv_Grad/ConvGrad_0", "ConvGrad", "/stem/Conv", "input", "stem.weight"),
        back("tract/stem/gram", "MatMul", "input", kind="tract", stage="Gram"),
        back("tract/stem/inverse", "Inverse", "tract/stem/gram", kind="tract", stage="solve"),
        back(
            "tract/stem/product",
            "MatMul",
            "/stem/Conv_Grad/ConvGrad_0",
            "tract/stem/inverse",
            kind="tract",
            stage="solve",
        ),
        back("stem.weight_grad", "stem.weight_grad", "tract/stem/product", kind="output"),
    )
    measured = statistics_of(
        "stem",
        lambda_=10.0,
        eigenvalues=tuple(0.3 / (1 + i) ** 3 for i in range(27)),
        condition=19683.0,
        regularised_condition=1.03,
        plain_norm=2.0,
        tract_norm=0.2,
        cosine=0.9999,
        images=(),
        plain_correlation=NAN,
        tract_correlation=NAN,
        minimum=0.0,
        maximum=255.0,
    )
    return conv_net(
        subject="training_model.onnx",
        kind="onnx",
        batch="float32 4×3×8×8, int64 4 (noise)",
        layers=(layer,),
        refusals=(),
        others=1,
        forward=ForwardDiff(
            "a = Conv(x, w)\n", "a = Conv(x, w)\n", GraphView("Forward", nodes[:3], 11)
        ),
        backward=Backward(GraphView("Backward pass around stem", nodes, 63), None),
        verification=dataclasses.replace(
            VERIFIED,
            weights=(dataclasses.replace(VERIFIED.weights[0], end_to_end=None, floor=None),),
            others=(Check("output", 0.0, 1e-6),),
        ),
        statistics=Statistics(
            (measured,),
            (
                "λ = 10 is 33 times the largest eigenvalue (0.3): TrAct divides the gradient by λ "
                "and does little else. Take λ below 0.3",
                "the input of stem lies in [0, 255] and is not standardised. Divide by 255 and "
                "subtract the mean",
            ),
        ),
        notes=("the expanded backward of an ONNX graph is its short one",),
        versions={"tract_fx": "0.1.0", "onnx": "1.23.2", "onnxruntime": "1.19.2"},
    )


def failing() -> Inspection:
    """The transform was lost, one gradient is off and one is no number."""
    lost = dataclasses.replace(
        VERIFIED.weights[0],
        operator=Check("operator", 0.871, 1e-5),
        end_to_end=0.871,
        floor=3.9e-7,
    )
    return conv_net(
        verification=Verification(
            weights=(lost,),
            others=(
                Check("output", 0.0, 1e-6),
                Check("gradient of bn1.bias", 0.0412, 1e-5),
                Check("gradient of fc.bias", NAN, 1e-5),
                *OTHERS,
            ),
            problems=("conv1 was run without TrAct's operator: the gradient is the plain one",),
            note="on the batch given",
        )
    )


def bare(kind: Literal["graph", "module", "onnx"] = "module") -> Inspection:
    """Nothing was taken, run or asked for."""
    empty = GraphView("Forward pass", (), 0, "nothing was changed")
    return Inspection(
        subject="Perceiver",
        kind=kind,
        batch="",
        layers=(),
        refusals=(),
        others=0,
        forward=ForwardDiff("", "", empty),
        backward=None,
        verification=None,
        statistics=None,
        notes=(),
        versions={},
    )


HOSTILE_NAMES = (
    "<script>alert(1)</script>",
    "[bold red]x[/]",
    "quote\"s 'and' \\n back\\slashes",
    "a:b;c{d}|e<f>",
    "層.λ→∇🙂",
    "line\nbreak\x1b[31m\x00\x07",
    "</style><!-- {{ 7 * 7 }} {% raw %}",
    "features.0." + "block." * 30 + "projection",
)


def hostile() -> Inspection:
    """Names that break markup, many refusals, several layers, numbers that are none."""
    records = [
        dataclasses.replace(
            STEM,
            name=name,
            node=name,
            weight=(f"{name}.weight",),
            path=("x", *(f"{name}_{i}" for i in range(9)), name),
        )
        for name in HOSTILE_NAMES
    ]
    nodes = tuple(
        ViewNode(
            name=name,
            label=name,
            kind="tract" if i % 2 else "operation",
            part="backward" if i > 3 else "forward",
            inputs=HOSTILE_NAMES[:i],
            detail=name,
            stage=HOSTILE_NAMES[i % 3] if i % 2 else "",
            source=SourceLine(f"/{name}.py", i, name, name),
        )
        for i, name in enumerate(HOSTILE_NAMES)
    )
    view = GraphView(HOSTILE_NAMES[0], nodes, 1_234_567, HOSTILE_NAMES[1])
    return conv_net(
        subject=HOSTILE_NAMES[0],
        batch=HOSTILE_NAMES[1],
        layers=tuple(report(record, note=record.name, form=record.name) for record in records),
        refusals=tuple(
            Refusal(name, name, ("x", name), f"{name} reason {i}", f"{name} remedy")
            for i in range(5)
            for name in HOSTILE_NAMES
        ),
        others=1_000_000,
        forward=ForwardDiff("\n".join(HOSTILE_NAMES), "\n".join(reversed(HOSTILE_NAMES)), view),
        backward=Backward(view, view),
        verification=Verification(
            weights=tuple(
                WeightCheck(name, (name,), Check(name, NAN, 1e-5), INF, None, -INF)
                for name in HOSTILE_NAMES
            ),
            others=tuple(
                Check(f"{name} {i}", i * 1e-6, 1e-5) for i, name in enumerate(HOSTILE_NAMES)
            ),
            problems=HOSTILE_NAMES,
            note=HOSTILE_NAMES[0],
        ),
        statistics=Statistics(
            tuple(
                statistics_of(
                    name,
                    eigenvalues=(),
                    zeros=147,
                    condition=INF,
                    regularised_condition=NAN,
                    plain_norm=NAN,
                )
                for name in HOSTILE_NAMES[:2]
            ),
            HOSTILE_NAMES,
        ),
        notes=HOSTILE_NAMES,
        versions={name: name for name in HOSTILE_NAMES},
    )


EVERY = {
    "conv_net": conv_net,
    "onnx_graph": onnx_graph,
    "failing": failing,
    "bare": bare,
    "hostile": hostile,
}

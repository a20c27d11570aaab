"""The look-up of CUDA kernels itself: what is there, what is missing, what ORT keeps on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx.parser
import pytest

from cuda_kernels import COLUMNS, TABLE, kernels, missing_cuda_kernels

OPSET = 20


def model_of(text: str, functions: str = "") -> onnx.ModelProto:
    """A model with ONNX's and ONNX Runtime's operators; ``text`` is its graph."""
    imports = f'"" : {OPSET}, "com.microsoft" : 1, "own" : 1'
    header = f"<ir_version: 10, opset_import: [{imports}]>"
    return onnx.parser.parse_model(f"{header}\n{text}\n{functions}")


def names_of(findings: Sequence[str]) -> list[str]:
    """What the findings begin with: the subgraphs that lead to the node, and its name."""
    return [finding.partition(" ai.onnx::")[0].partition(" com.")[0] for finding in findings]


def test_table_is_whole() -> None:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    assert lines[0].split(",") == list(COLUMNS)
    # As many as the provider registered; some are alike but for what they compute with.
    assert len(lines) - 1 == sum(map(len, kernels().values())) == 1213


@pytest.mark.parametrize(
    ("domain", "op", "constraint", "dtype"),
    [
        ("", "Conv", "T", "float"),
        ("", "If", "V", "float"),
        ("", "Gemm", "T", "float"),
        ("", "Cast", "T2", "float"),
        ("com.microsoft", "ConvGrad", "T", "float"),
        ("com.microsoft", "Inverse", "T", "float"),
        ("com.microsoft", "BatchNormInternal", "T", "float"),
        ("com.microsoft", "InPlaceAccumulatorV2", "T_GRAD", "float"),
        ("com.microsoft", "AdamWOptimizer", "S_GRAD", "seq(float)"),
        ("com.microsoft", "InplaceClipGradNorm", "S_GRAD", "seq(float)"),
        ("com.microsoft", "SoftmaxCrossEntropyLossInternal", "T", "float"),
    ],
)
def test_known_kernels_are_in_the_table(domain: str, op: str, constraint: str, dtype: str) -> None:
    assert any(dtype in kernel.types[constraint] for kernel in kernels()[domain, op])


def test_versions_and_memory_are_in_the_table() -> None:
    by_range = {(kernel.since, kernel.end) for kernel in kernels()["", "Reshape"]}
    assert by_range == {(1, 4), (5, 12), (13, 13), (14, 18), (19, None)}
    (newest,) = (kernel for kernel in kernels()["", "Reshape"] if kernel.since == 19)
    assert newest.host_inputs == {1} and not newest.host_outputs
    assert all(kernel.host_outputs == {0} for kernel in kernels()["", "Shape"])
    assert all(kernel.host_inputs == {0} for kernel in kernels()["", "If"])


def test_a_layer_and_its_gradient_are_covered() -> None:
    model = model_of(
        """g (float[N,3,8,8] x, float[4,3,3,3] w, float[N,4,6,6] dy) => (float[3,3] out) {
            y = Conv <group = 1> (x, w)
            dx, dw = com.microsoft.ConvGrad (dy, x, w)
            gram = com.microsoft.FusedMatMul (dw, dw)
            out = com.microsoft.Inverse (gram)
        }"""
    )
    assert missing_cuda_kernels(model) == []


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        ("g (double[4,200] x) => (double[4,200] y) { y = Erf (x) }", ""),
        ("g (float[4,200] x) => (float[4,200] y) { y = Celu (x) }", "Celu"),
        ("g (float[4,200] x) => (float[4,200] y) { y = com.microsoft.Nothing (x) }", "Nothing"),
        ("g (int8[4,200] x) => (int8[4,200] y) { y = Relu (x) }", "Relu"),
        ("g (float[2,2] x) => (float y) { y = Det (x) }", "Det"),
        ("g (double[4,200] x) => (double[4,200] y) { y = com.microsoft.GeluGrad (x, x) }", ""),
        ("g (int32[4,200] x) => (int32[4,200] y) { y = com.microsoft.Inverse (x) }", "Inverse"),
    ],
)
def test_missing_kernels_are_reported(graph: str, found: str) -> None:
    findings = missing_cuda_kernels(model_of(graph))
    assert len(findings) == bool(found)
    assert all(f"::{found} " in finding and "no CUDA kernel" in finding for finding in findings)


def test_version_decides() -> None:
    """Pad's newest kernel is for 18 and has no end: ONNX changed Pad in 19, so 20 has none."""
    model = model_of("g (float[N,200] x, int64[4] pads) => (float[M,200] y) { y = Pad (x, pads) }")
    assert missing_cuda_kernels(model) == [
        "y: ai.onnx::Pad 20 (float, int64) -> (float) has no CUDA kernel"
    ]
    model.opset_import[0].version = 18
    assert missing_cuda_kernels(model) == []


def test_a_large_constant_made_on_the_cpu_is_reported() -> None:
    graph = "g (float[N,200] x) => (float[N,200] y) { s = Shape (x)  y = ConstantOfShape (s) }"
    model = model_of(graph)
    assert names_of(missing_cuda_kernels(model)) == ["y:"]
    model.opset_import[0].version = 18
    assert missing_cuda_kernels(model) == []


def test_dtypes_pass_through_operators_without_schema() -> None:
    model = model_of(
        """g (float[N,3,8,8] x, float[4,3,3,3] w, float[N,4,6,6] dy) => (double[4,3] out) {
            dx, dw = com.microsoft.ConvGrad (dy, x, w)
            a = com.microsoft.Inverse (dw)
            exact = Cast <to = 11> (a)
            b = com.microsoft.Inverse (exact)
            out = Det (b)
        }"""
    )
    assert names_of(missing_cuda_kernels(model)) == ["out:"]
    assert "(double) -> (double)" in missing_cuda_kernels(model)[0]


def test_branches_of_an_if_are_looked_at() -> None:
    model = model_of(
        """g (bool c, float[4,200] x) => (float[4,200] out) {
            y = If (c) <
                then_branch = t () => (float[4,200] a) { a = Celu (x) },
                else_branch = e () => (float[4,200] b) { b = Relu (x) }
            >
            out = Celu (y)
        }"""
    )
    assert names_of(missing_cuda_kernels(model)) == ["If.then_branch: a:", "out:"]
    model.opset_import[0].version = 21  # the If itself has none there
    assert names_of(missing_cuda_kernels(model)) == ["If.then_branch: a:", "y:", "out:"]


def test_an_if_without_kernel_is_reported_though_its_condition_is_on_the_cpu() -> None:
    model = model_of(
        """g (float[N,200] x) => (float[N,200] y) {
            rows = Shape <start = 0, end = 1> (x)
            full = Cast <to = 9> (rows)
            y = If (full) <
                then_branch = t () => (float[N,200] a) { a = Neg (x) },
                else_branch = e () => (float[N,200] b) { b = Relu (x) }
            >
        }"""
    )
    assert missing_cuda_kernels(model) == []
    model.opset_import[0].version = 21
    assert "y:" in names_of(missing_cuda_kernels(model))


def test_functions_are_looked_into() -> None:
    own = """<opset_import: ["" : 20], domain: "own">
        Twice (x) => (y) { a = Relu (x)  y = Celu (a) }"""
    model = model_of("g (float[4,200] x) => (float[4,200] y) { y = own.Twice (x) }", own)
    (finding,) = missing_cuda_kernels(model)
    assert "::Celu " in finding
    # No kernel anywhere: ONNX Runtime puts the schema's body there, all of which has kernels.
    for op in ("Mish (x)", "HardSwish (x)", "CastLike (x, x)"):
        model = model_of(f"g (float[4,200] x) => (float[4,200] y) {{ y = {op} }}")
        assert missing_cuda_kernels(model) == []


def test_arithmetic_on_shapes_is_on_the_cpu_by_design() -> None:
    """What a shape leads to stays on the host, up to the Reshape, kernel or not."""
    model = model_of(
        """g (float[N,200] x) => (float[N,200] out) {
            shape = Shape (x)
            first = Constant <value = int64[1] {0}> ()
            rows = Gather (shape, first)
            narrow = Cast <to = 4> (rows)
            rest = Mod (narrow, narrow)
            wide = Cast <to = 7> (rest)
            again = Add (rows, wide)
            last = Constant <value = int64[1] {200}> ()
            target = Concat <axis = 0> (again, last)
            out = Reshape (x, target)
        }"""
    )
    assert missing_cuda_kernels(model) == []
    without_shape = model_of("g (uint16[N,200] x) => (uint16[N,200] y) { y = Mod (x, x) }")
    assert len(missing_cuda_kernels(without_shape)) == 1


def test_large_inputs_pulled_to_the_cpu_are_reported() -> None:
    """The rule takes a product of the batch size and a parameter to the CPU, parameter and all."""
    graph = """g (float[N,200] x, float[{size}] w) => (float[{size}] out) {{
        shape = Shape <start = 0, end = 1> (x)
        n = Cast <to = 1> (shape)
        out = Mul (n, w)
    }}"""
    (finding,) = missing_cuda_kernels(model_of(graph.format(size="200,200")))
    assert "goes to the CPU along with ['w']" in finding
    assert missing_cuda_kernels(model_of(graph.format(size="1"))) == []

"""Global precision flags: without effect on the preconditioner, and as before once it has run."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from oracle import precondition, relative_error
from tract_fx import torch_private
from tract_fx.preconditioner import PatchGeometry, precondition_weight_gradient, solve

CPU = torch.device("cpu")


def flag() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def low_precision() -> Iterator[None]:
    before = flag()
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before  # type: ignore[attr-defined]


@pytest.mark.usefixtures("low_precision")
def test_full_inside_and_put_back() -> None:
    with torch_private.full_precision(CPU):
        assert flag() == "ieee"
        with torch_private.full_precision(CPU):
            assert flag() == "ieee"
        assert flag() == "ieee"
    assert flag() == "bf16"
    with pytest.raises(KeyError), torch_private.full_precision(CPU):
        raise KeyError
    assert flag() == "bf16"


@pytest.mark.usefixtures("low_precision")
def test_threads_leave_the_flag_as_it_was() -> None:
    wrong: list[str] = []
    start = threading.Barrier(4)

    def enter_and_leave() -> None:
        start.wait()
        for _ in range(200):
            with torch_private.full_precision(CPU):
                if flag() != "ieee":
                    wrong.append(flag())

    threads = [threading.Thread(target=enter_and_leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert flag() == "bf16"


def test_full_precision_is_left_alone() -> None:
    before = flag()
    with torch_private.full_precision(CPU):
        assert flag() in ("ieee", "none")
    assert flag() == before


def cut(x: Tensor, bits: int) -> Tensor:
    """Round a float32 mantissa to so many bits, as reduced-precision products do to operands."""
    step = 1 << (23 - bits)
    return ((x.view(torch.int32) + step // 2) & -step).view(torch.float32)


@pytest.mark.parametrize(
    ("precision", "bits"), [("tf32", 10), ("bf16", 7)], ids=["TF32", "bfloat16"]
)
@pytest.mark.parametrize("mean", [0.0, 128.0])
def test_rounding_of_products_is_not_taken_for_a_penalty(
    precision: str, bits: int, mean: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows < columns: what low-precision products leave outside X's row space is dropped."""
    unit = {"tf32": 2.0**-10, "bf16": 2.0**-7}[precision]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 384, generator=generator) * (60 if mean else 1) + mean
    dz = torch.randn(32, 16, generator=generator)
    rounded_x, rounded_dz = cut(x, bits), cut(dz, bits)
    gradient = rounded_dz.T @ rounded_x
    wanted = precondition(nn.Linear(384, 16), (dz.double().T @ x.double()), x)

    def error() -> float:
        return relative_error(
            precondition_weight_gradient(gradient, x, 0.1, PatchGeometry()), wanted
        )

    before = error()
    monkeypatch.setattr(torch_private, "product_rounding", lambda *_: unit)
    assert error() < 8 * unit
    assert before > 2 * error()


def test_float32_noise_is_smaller_than_a_real_share() -> None:
    noise = solve._noise(torch.float32, None, CPU, True)
    assert noise < 1e-5
    assert solve._noise(torch.float64, None, CPU, True) < 1e-13
    assert 1e-2 < solve._noise(torch.float32, torch.bfloat16, CPU, True) < 5e-2


def test_images_of_one_colour_in_the_row_space_form() -> None:
    """Far from standardised: on the CPU in float64, where float32 is wrong by factors."""
    torch.manual_seed(0)
    for x in (
        torch.full((16, 784), 255.0),
        torch.randn(16, 60) * torch.logspace(-3, 3, 16)[:, None],
    ):
        layer = nn.Linear(x.shape[1], 10)
        gradient = torch.randn(16, 10).T @ x
        found = precondition_weight_gradient(gradient, x, 0.1, PatchGeometry())
        exact = gradient.double()
        # The part inside the row space alone: what is outside is float32's rounding of gW.
        q = torch.linalg.svd(x.double(), full_matrices=False)[2]
        q = q[: int(torch.linalg.matrix_rank(x.double()))]
        wanted = precondition(layer, exact @ q.T @ q, x)
        assert relative_error(found, wanted) < 1e-5

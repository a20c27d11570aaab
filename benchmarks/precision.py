"""The precisions that a layer is run in: float32, float32 with TF32 products, bfloat16 autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Precision:
    """How a model is run.

    Attributes:
        name: As the tables print it.
        tf32: Whether CUDA's libraries may cut the operands of float32 products to TF32.
        autocast: Autocast's dtype, None without autocast.
    """

    name: str
    tf32: bool = False
    autocast: torch.dtype | None = None

    @contextmanager
    def flags(self) -> Iterator[None]:
        """Set the process's flags for TF32; matrix products and convolutions each have one."""
        convolutions = getattr(torch.backends.cudnn, "conv")  # noqa: B009 (mypy does not see it)
        backends = (torch.backends.cuda.matmul, convolutions)
        before = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "tf32" if self.tf32 else "ieee"
        try:
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision

    def forward(self, device: torch.device) -> AbstractContextManager[object]:
        """What a forward pass runs under."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, self.autocast)

    def read(self, x: Tensor) -> Tensor:
        """Round an input as the first layer does."""
        return x if self.autocast is None else x.to(self.autocast)


FLOAT32 = Precision("float32")
PRECISIONS = {
    "float32": FLOAT32,
    "tf32": Precision("float32, TF32 allowed", tf32=True),
    "bfloat16": Precision("bfloat16 autocast", autocast=torch.bfloat16),
}

"""Small but real vision models for tests: 32 x 32 pixels in, 10 classes out.

Each can be traced by ``torch.fx.symbolic_trace`` and by ``torch.export``, in float32 and float64,
in training mode and in ``eval()``. None needs more than torch; the Hugging Face families lie in
``nets.huggingface``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from nets.convnext import small_convnext
from nets.mixer import small_mixer
from nets.resnet import small_resnet
from nets.swin import small_swin
from nets.vit import small_vit

SIZE = 32
CLASSES = 10

NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet": small_resnet,
    "resnet-cifar": partial(small_resnet, cifar_stem=True),
    "vit": small_vit,
    "convnext": small_convnext,
    "swin": small_swin,
    "mixer": small_mixer,
}
# The dotted name of each first layer.
STEMS: dict[str, str] = {
    "resnet": "stem.0",
    "resnet-cifar": "stem.0",
    "vit": "patches",
    "convnext": "stem.0",
    "swin": "patches",
    "mixer": "patches",
}

__all__ = [
    "CLASSES",
    "NETS",
    "SIZE",
    "STEMS",
    "small_convnext",
    "small_mixer",
    "small_resnet",
    "small_swin",
    "small_vit",
]

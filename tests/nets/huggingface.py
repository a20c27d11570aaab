"""Eight Hugging Face vision families, tiny and from their configs alone: nothing is downloaded.

``torch.fx.symbolic_trace`` fails on all of them; ``torch.export`` traces all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from photographs import photographs

SIZE = 32
CLASSES = 10

ENCODER: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
}
DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
LABELS: dict[str, Any] = {"num_labels": CLASSES}
IMAGE: dict[str, Any] = {"image_size": SIZE, **LABELS}


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: Its name; a test's id.
        stem: The dotted name of the first layer.
        build: Makes the model, in training mode and float32, with dropout where the family has any.
        loss: Takes the model's output (dataclass-like or mapping) to a scalar.
    """

    name: str
    stem: str
    build: Callable[[], nn.Module]
    loss: Callable[[Mapping[str, Tensor]], Tensor]

    def __str__(self) -> str:
        return self.name

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """The model, the same for the same seed, in training mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build().train().to(dtype)

    def example(self, dtype: torch.dtype = torch.float32, batch: int = 4) -> dict[str, Tensor]:
        """Keyword arguments for one call: standardised photographs."""
        return {"pixel_values": photographs(batch, size=SIZE).to(dtype)}


def classification_loss(output: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy against the labels 0, 1, 2, … in turn."""
    logits = output["logits"]
    return cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])


def feature_loss(output: Mapping[str, Tensor]) -> Tensor:
    """Mean of pooled and last features, weighted so that no norm before them makes it constant."""
    pooled, last = output["pooler_output"], output["last_hidden_state"]
    ramp = torch.linspace(-1, 1, pooled.shape[-1], dtype=pooled.dtype)
    return (pooled.sin() * ramp).sum(-1).mean() + (last.tanh() * ramp).sum(-1).mean()


def _vit() -> nn.Module:
    config = transformers.ViTConfig(**ENCODER, **DROPOUT, **IMAGE, patch_size=8)
    return transformers.ViTForImageClassification(config)


def _deit() -> nn.Module:
    config = transformers.DeiTConfig(**ENCODER, **DROPOUT, **IMAGE, patch_size=8)
    return transformers.DeiTForImageClassification(config)


def _resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        **LABELS,
    )
    return transformers.ResNetForImageClassification(config)


def _convnext() -> nn.Module:
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_stages=2,
        drop_path_rate=0.1,
        layer_scale_init_value=0.1,
        **IMAGE,
    )
    return transformers.ConvNextForImageClassification(config)


def _swin() -> nn.Module:
    config = transformers.SwinConfig(
        patch_size=4,
        embed_dim=12,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=4,
        drop_path_rate=0.1,
        **DROPOUT,
        **IMAGE,
    )
    return transformers.SwinForImageClassification(config)


def _clip() -> nn.Module:
    config = transformers.CLIPVisionConfig(
        **ENCODER, image_size=SIZE, patch_size=8, attention_dropout=0.1
    )
    return transformers.CLIPVisionModel(config)


def _dinov2() -> nn.Module:
    config = transformers.Dinov2Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        mlp_ratio=2,
        patch_size=8,
        drop_path_rate=0.1,
        **DROPOUT,
        **IMAGE,
    )
    return transformers.Dinov2ForImageClassification(config)


def _beit() -> nn.Module:
    config = transformers.BeitConfig(
        **ENCODER,
        **DROPOUT,
        **IMAGE,
        patch_size=8,
        use_relative_position_bias=True,
        drop_path_rate=0.1,
    )
    return transformers.BeitForImageClassification(config)


FAMILIES: tuple[Family, ...] = (
    Family("vit", "vit.embeddings.patch_embeddings.projection", _vit, classification_loss),
    Family("deit", "deit.embeddings.patch_embeddings.projection", _deit, classification_loss),
    Family("resnet", "resnet.embedder.embedder.convolution", _resnet, classification_loss),
    Family("convnext", "convnext.embeddings.patch_embeddings", _convnext, classification_loss),
    Family("swin", "swin.embeddings.patch_embeddings.projection", _swin, classification_loss),
    Family("clip-vision", "embeddings.patch_embedding", _clip, feature_loss),
    Family("dinov2", "dinov2.embeddings.patch_embeddings.projection", _dinov2, classification_loss),
    Family("beit", "beit.embeddings.patch_embeddings.projection", _beit, classification_loss),
)

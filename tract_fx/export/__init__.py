"""Export: from a rewritten model, or an ONNX model of any framework, to training artifacts."""

from tract_fx.artifacts.loss_scaling import LossScale
from tract_fx.artifacts.optimizers import SGD, AdamW
from tract_fx.export.api import TrainingArtifacts, export_training

__all__ = ["SGD", "AdamW", "LossScale", "TrainingArtifacts", "export_training"]

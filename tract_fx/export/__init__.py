"""Export: from a rewritten model, or an ONNX model of any framework, to training artifacts."""

from tract_fx.export.api import TrainingArtifacts, export_training
from tract_fx.export.loss_scaling import LossScale
from tract_fx.export.optimizers import SGD, AdamW

__all__ = ["SGD", "AdamW", "LossScale", "TrainingArtifacts", "export_training"]

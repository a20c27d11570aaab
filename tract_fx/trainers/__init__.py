"""Trainers over exported artifacts."""

from tract_fx.trainers.loading import load_trainer
from tract_fx.trainers.ort_trainer import OrtTrainer

__all__ = ["OrtTrainer", "load_trainer"]

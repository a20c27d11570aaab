"""Start a trainer from a directory."""

from __future__ import annotations

import dataclasses
import os
import warnings

from tract_fx.artifacts.directory import TRAINING_MODEL
from tract_fx.artifacts.manifest import ORT_TRAINING, require_seed
from tract_fx.errors import TractWarning
from tract_fx.ort_training import TESTED_VERSION, any_runtime, require_device, runtime
from tract_fx.trainers.ort_trainer import OrtTrainer
from tract_fx.trainers.randomness import OWN_GENERATOR, operators, seed_of, seeded
from tract_fx.trainers.run_state import open_run, read_checked


def load_trainer(
    directory: str | os.PathLike[str], *, device: object = "cpu", seed: int | None = None
) -> OrtTrainer:
    """Start or resume training from a directory of artifacts.

    On a GPU of the Ampere generation or later, float32 products go through TensorFloat-32 by
    default, and so do those of TrAct's Gram matrix and its inverse: set the environment variable
    `NVIDIA_TF32_OVERRIDE=0` before the process starts for full float32.

    ONNX Runtime's random numbers are the whole process's: a trainer with dropout sets them
    (`onnxruntime.set_seed`) before each of its training steps.

    Args:
        directory: What `export_training` or a trainer's `save` wrote.
        device: `"cpu"`, `"cuda"` or `"cuda:N"`; for a directory of `target="onnxruntime"` also an
            execution provider's name, or a pair of that and its options as a mapping. No provider
            is replaced by the CPU, which yet runs the operators that a provider has no kernels
            for. With ONNX Runtime Training CUDA needs 1.19.2, for Python 3.10 or 3.11, CUDA 11.8
            and cuDNN 8.
        seed: What dropout's random numbers are derived from; None keeps the directory's.

    Returns:
        The trainer.

    Raises:
        DamagedArtifactsError: If the directory is incomplete, altered, or of another kind.
        MissingRuntimeError: If ONNX Runtime, or the provider, is not there or does not start.
        UnsupportedTrainingError: If the seed is no integer.
    """
    if seed is not None:
        require_seed(seed)
    where = require_device(device)
    manifest, graphs = read_checked(directory)
    version = any_runtime().__version__
    if manifest.target == ORT_TRAINING and runtime().__version__ != TESTED_VERSION:
        warnings.warn(
            TractWarning(f"ONNX Runtime {version}: tract_fx was tested with {TESTED_VERSION}"),
            stacklevel=2,
        )
    if seed is not None:
        manifest = dataclasses.replace(manifest, seed=seed)
    own = sorted(operators(graphs[TRAINING_MODEL]) & OWN_GENERATOR)
    if own:
        warnings.warn(
            TractWarning(
                f"{', '.join(own)} in the training graph: the random numbers are not part of what "
                "is saved, so that a resumed run differs from an uninterrupted one"
            ),
            stacklevel=2,
        )
    with seeded(seed_of(manifest.seed, manifest.batches) if own else None):
        run = open_run(directory, manifest, graphs, where)
    return OrtTrainer(run, manifest, graphs, where)

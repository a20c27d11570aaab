"""Reading the model that a command is about: an ONNX file, an exported program, a factory."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from tract_fx import extras
from tract_fx.eager import tract_module
from tract_fx.errors import UnsupportedModelError, UntraceableModelError
from tract_fx.passes.fx_graph import find_input_layers, is_tract, tract_pass
from tract_fx.passes.records import Findings
from tract_fx.preconditioner import DEFAULT_LAMBDA
from tract_fx.program import arguments, captured

TARGET_HELP = (
    "An .onnx model, a .pt2 exported program, or package.module:factory, a function without "
    "arguments that returns a torch.nn.Module."
)

DIRECTORY_HELP = "Or a directory that tract-fx export wrote."

_KINDS = "an .onnx file, a .pt2 exported program, or package.module:factory"


@dataclass(frozen=True)
class Target:
    """A model, as it was named in the shell.

    Attributes:
        model: A module or program of PyTorch; the path of an ONNX file.
        inputs: Example inputs, None where there are none.
    """

    model: nn.Module | ExportedProgram | Path
    inputs: Any


def is_factory(text: str) -> bool:
    """Tell `package.module:factory` from a path."""
    module, colon, factory = text.rpartition(":")
    names = [*module.split("."), *factory.split(".")]
    return bool(colon) and all(name.isidentifier() for name in names)


def read_target(text: str, inputs: Any, seed: int) -> Target:
    """Read a model."""
    if is_factory(text):
        torch.manual_seed(seed)
        return Target(_made_by(text), inputs)
    path = Path(text)
    if not path.is_file():
        raise UnsupportedModelError(
            f"the model {text!r}", "there is no such file", f"Give {_KINDS}"
        )
    if path.suffix == ".pt2":
        program = _load_program(path)
        args, kwargs = program.example_inputs or ((), {})
        if inputs is None and args and kwargs:
            raise UnsupportedModelError(
                f"an exported program with {len(args)} positional and {len(kwargs)} keyword "
                "arguments",
                "a batch is either in order or by name",
                "Give --input-shape NAME=SIZES for each",
            )
        if inputs is None:
            inputs = dict(kwargs) or args or None
        return Target(program, inputs)
    if path.suffix != ".onnx":
        raise UnsupportedModelError(
            f"the model {text!r}", "its kind can't be told from its name", f"Give {_KINDS}"
        )
    return Target(path, inputs)


def graph_in(directory: Path) -> Path:
    """Find the training graph in a directory of `tract-fx export`."""
    name = extras.load("tract_fx.artifacts.directory", "TRAINING_MODEL")
    file: Path = directory / name
    if not file.is_file():
        raise UnsupportedModelError(
            f"the directory {str(directory)!r}",
            f"there is no {name} in it",
            "Give a directory that tract-fx export wrote, or a model's file",
        )
    return file


def _made_by(text: str) -> nn.Module:
    """Call a factory in a module on the path, or in the working directory."""
    module_name, _, factory_name = text.rpartition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory: Any = importlib.import_module(module_name)
        for name in factory_name.split("."):
            factory = getattr(factory, name)
        model = factory if isinstance(factory, nn.Module) else factory()
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise UnsupportedModelError(
            f"{text} ({type(error).__name__}: {error})".rstrip("."),
            "a module is imported and its factory called without arguments",
            "Correct the name or the code; --debug shows where it fails",
        ) from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{text}, which gives a {type(model).__name__}",
            "a factory returns a torch.nn.Module",
            "Return the model itself",
        )
    return model


def _load_program(path: Path) -> ExportedProgram:
    try:
        return torch.export.load(path)
    except Exception as error:  # torch.export raises whatever a broken archive leads to
        raise UnsupportedModelError(
            f"the file {str(path)!r} ({type(error).__name__})",
            "torch.export.load can't read it as an exported program",
            "Write it with torch.export.save, under the same version of PyTorch",
        ) from error


def put_tract(
    target: Target, lambda_: float | None, layers: dict[str, float] | None
) -> nn.Module | ExportedProgram:
    """Put TrAct on a PyTorch model: on its graph where fx can trace it, else on the eager model."""
    model = target.model
    assert not isinstance(model, Path)
    if lambda_ is None and layers is None and is_tract(model):
        return model
    value = DEFAULT_LAMBDA if lambda_ is None else lambda_
    graph = _graph(model)
    if graph is None:
        assert isinstance(model, nn.Module)
        return tract_module(model, target.inputs, lambda_=value, layers=layers)
    return tract_pass(graph, lambda_=value, layers=layers)


def find_layers(target: Target, trainable: list[str] | None) -> Findings:
    """Locate a model's input layers, for a report; `trainable` is for an ONNX model."""
    model = target.model
    if isinstance(model, Path):
        from tract_fx.passes import find_onnx_input_layers

        return find_onnx_input_layers(model, trainable=trainable or None)
    graph = _graph(model)
    if graph is None:
        assert isinstance(model, nn.Module)
        if target.inputs is None:
            raise UntraceableModelError(
                f"torch.fx can't trace {type(model).__name__}",
                "torch.export needs example inputs",
                "Give --input-shape, for example --input-shape 8,3,224,224",
            )
        args, kwargs = arguments(target.inputs)
        remedy = "Make sure that the model runs on the batch, or name its layer with --layer"
        graph = captured(model, args, kwargs, remedy)
    return find_input_layers(graph)


def _graph(model: nn.Module | ExportedProgram) -> fx.GraphModule | ExportedProgram | None:
    """The graph that a model is, or that fx can trace."""
    if isinstance(model, (ExportedProgram, fx.GraphModule)):
        return model
    try:
        return fx.symbolic_trace(model)
    except Exception:  # whatever the model's own code raises on a Proxy
        return None

"""README and docs as what runs: sections with their code blocks and shell lines."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from torch import nn
from typer.testing import CliRunner

from tract_fx import export_training, tract_pass
from tract_fx.shell.app import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass(frozen=True)
class Section:
    """What stands under one heading of the second level, or above the first.

    Attributes:
        page: The file.
        title: The heading.
        lines: The numbers of its lines.
    """

    page: Path
    title: str
    lines: range

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.title}"

    def examples(self, document: Document) -> list[Example]:
        """The blocks of the section, those that a reader does not see among them."""
        return [example for example in document if example.line in self.lines]


def read(page: Path) -> Document:
    """Parse a page; its blocks share the names that pages take for granted."""
    document = Document.parse(
        str(page), PythonCodeBlockParser(), CodeBlockParser("sh", run_shell_lines)
    )
    document.namespace.update(given_names())
    return document


def sections() -> list[Section]:
    """All sections with something to run."""
    found = []
    for page in PAGES:
        lines = page.read_text().splitlines()
        starts = [1, *(n for n, line in enumerate(lines, 1) if line.startswith("## "))]
        ends = [*starts[1:], len(lines) + 1]
        document = read(page)
        for start, end in zip(starts, ends, strict=True):
            section = Section(page, lines[start - 1].lstrip("# "), range(start, end))
            if section.examples(document):
                found.append(section)
    return found


def given_names() -> dict[str, Any]:
    """A reader's model and data: what the pages call `model`, `images`, `labels`, `batches`.

    And, for their hidden blocks, `export_once`.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 16, 16, generator=generator)
    labels = torch.arange(8) % 10
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3, padding=1), act=nn.ReLU()))
        model = nn.Sequential(OrderedDict(stem=stem, pool=nn.AdaptiveAvgPool2d(2)))
        model.extend([nn.Flatten(), nn.Linear(32, 10)])
    return {
        "model": model,
        "images": images,
        "labels": labels,
        "batches": [(images, labels)] * 2,
        "export_once": lambda directory: shutil.copytree(_exported(), directory),
    }


@functools.cache
def _exported() -> Path:
    """A directory that `export_training` wrote of the reader's model, once for all pages."""
    names = given_names()
    model = tract_pass(torch.fx.symbolic_trace(names["model"]))
    directory = Path(tempfile.mkdtemp(), "run")
    return export_training(model, names["images"], directory).directory


def extras() -> set[str]:
    """The names of the project's extras."""
    if sys.version_info < (3, 11):
        pytest.skip("needs Python 3.11's tomllib")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {*project["optional-dependencies"]}


def run_shell_lines(example: Example) -> None:
    """Run the lines that a test can run; of the others, see that what they name is there."""
    for line in str(example.parsed).replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            assert words[0] in COMMANDS, f"no test knows what to do with: {line}"
            COMMANDS[words[0]](words[1:])


def _run_tract_fx(words: list[str]) -> None:
    if words == ["doctor"]:  # test_doctor.py runs it, and it takes ten seconds
        words = ["doctor", "--help"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, f"tract-fx {shlex.join(words)}\n{result.output}"


def _plan_make(words: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    planned = subprocess.run(
        ["make", "--dry-run", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert planned.returncode == 0, planned.stderr


def _look_up_extras(words: list[str]) -> None:
    subcommand, *wanted = words
    assert subcommand == "install"
    for word in wanted:
        word = word.replace(".[", "tract_fx[")
        if word not in (".", "-e", "--editable"):
            requirement = Requirement(word)
            assert requirement.name == "tract_fx"
            assert requirement.extras <= extras(), word


def _look_for_files(words: list[str]) -> None:
    files = [word for word in words if word.endswith(".py")]
    assert files
    for file in files:
        assert (ROOT / file).is_file(), file


def _look_for_system_packages(words: list[str]) -> None:
    assert words[0] == "install"
    for word in words[1:]:
        assert word in (ROOT / "Makefile").read_text(), word


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "tract-fx": _run_tract_fx,
    "make": _plan_make,
    "pip": _look_up_extras,
    "python": _look_for_files,
    ".venv/bin/python": _look_for_files,
    "apt-get": _look_for_system_packages,
}

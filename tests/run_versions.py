"""Run the tests under other versions of PyTorch and Python, and print a table of what held.

`make test-versions` calls it. Each version gets an environment of its own under build/versions.
PyTorch's wheels for Linux ask for gigabytes of CUDA's libraries, which their import needs and no
test here calls: one copy of them serves all.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "versions"
CUDA = BUILD / "cuda"
OF_CUDA = tuple(f"Requires-Dist: {name}" for name in ("cuda-", "nvidia-", "triton"))
WHOLE_METADATA = "torch-METADATA"
console = Console(highlight=False)


@dataclass(frozen=True)
class Version:
    """An environment to test in.

    Attributes:
        torch: Version of PyTorch.
        python: Version of Python.
        numpy: Version of numpy, as a requirement.
    """

    torch: str
    python: str
    numpy: str = "numpy>=2"

    @property
    def folder(self) -> Path:
        return BUILD / f"torch-{self.torch}-python-{self.python}"

    @property
    def site_packages(self) -> Path:
        return self.folder / "lib" / f"python{self.python}" / "site-packages"

    def run(self, *arguments: str | Path, **environment: str) -> int:
        """Run the environment's Python at the project's root."""
        command = [self.folder / "bin" / "python", *arguments]
        return subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode

    def install(self, *arguments: str) -> None:
        """Call pip there."""
        pip = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet")
        if code := self.run(*pip, *arguments):
            sys.exit(code)


# The oldest, two in between and the newest. `make test` runs on 2.13.0 and Python 3.11.
VERSIONS = (
    Version("2.11.0", "3.12", "numpy==1.26.4"),
    Version("2.12.1", "3.10"),
    Version("2.14.1", "3.13"),
    Version("2.15.0", "3.11"),
)
# What a test is about, by how its file's name begins; all else is about the pass.
PARTS = {
    "inspection": ("test_inspect",),
    "export": ("test_onnx", "test_ort", "test_step", "test_trainer", "test_artifacts"),
}
# These look at figures and pages, which are the same on any version.
LEFT_OUT = ("test_benchmarks.py", "test_inspect_page.py", "test_inspect_plots.py")


def main() -> None:
    """Make the environments, run the tests in each, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [version.torch for version in VERSIONS]
    parser.add_argument("--torch", action="append", choices=names, help="only these versions")
    parser.add_argument("tests", nargs="*", help="arguments for pytest, instead of all tests")
    arguments = parser.parse_args()
    chosen = [v for v in VERSIONS if v.torch in (arguments.torch or names)]
    for version in chosen:
        with step(f"torch {version.torch} and Python {version.python}"):
            install_torch(version)
    with step("CUDA's libraries, where these wheels need them"):
        share_cuda([v for v in VERSIONS if (v.folder / WHOLE_METADATA).exists()])
    counts = {}
    for version in chosen:
        with step(f"what the tests need, beside torch {version.torch}"):
            install_rest(version)
        console.rule(f"torch {version.torch}, Python {version.python}, {version.numpy}")
        counts[version] = run_tests(version, arguments.tests)
    report(counts)
    sys.exit(any(held["failed"] for parts in counts.values() for held in parts.values()))


@contextmanager
def step(title: str) -> Iterator[None]:
    """Say what is being done, and how long it took."""
    started = time.monotonic()
    with console.status(title):
        yield
    console.print(f"{title} [dim]{time.monotonic() - started:.0f} s[/]")


def install_torch(version: Version) -> None:
    """Make an environment with torch, which is told that it needs nothing of CUDA's."""
    if (version.folder / WHOLE_METADATA).exists():
        return
    made = subprocess.run([f"python{version.python}", "-m", "venv", "--clear", version.folder])
    if made.returncode:
        sys.exit(f"Python {version.python} is needed, as python{version.python} on the path")
    version.install("--no-deps", f"torch=={version.torch}")
    (folder,) = version.site_packages.glob("torch-*.dist-info")
    metadata = folder / "METADATA"
    whole = metadata.read_text()
    lines = whole.splitlines(keepends=True)
    metadata.write_text("".join(line for line in lines if not line.startswith(OF_CUDA)))
    (version.folder / WHOLE_METADATA).write_text(whole)


def share_cuda(versions: Sequence[Version]) -> None:
    """Install the newest torch's CUDA libraries, and the parts of them that others want; link."""
    asked = [cuda_requirements(version) for version in versions]
    for name, requirement in asked[-1].items():
        requirement.extras |= {extra for one in asked if name in one for extra in one[name].extras}
    wanted = [*map(str, asked[-1].values())]
    installed = CUDA / "requirements.txt"
    if wanted and not (installed.exists() and installed.read_text().splitlines() == wanted):
        shutil.rmtree(CUDA, ignore_errors=True)
        versions[-1].install("--target", str(CUDA), *wanted)
        installed.write_text("\n".join(wanted))
    for version in versions:
        link = version.site_packages / "nvidia"
        if not link.is_symlink():
            link.symlink_to(CUDA / "nvidia")


def cuda_requirements(version: Version) -> dict[str, Requirement]:
    """Read which of CUDA's libraries a torch asks for, by name."""
    found = {}
    for line in (version.folder / WHOLE_METADATA).read_text().splitlines():
        if line.startswith(OF_CUDA):
            requirement = Requirement(line.partition(": ")[2])
            if requirement.name != "triton" and (
                requirement.marker is None or requirement.marker.evaluate()
            ):
                requirement.marker = None
                found[requirement.name] = requirement
    return found


def install_rest(version: Version) -> None:
    """Install the project and what its tests need, once for each pyproject.toml."""
    done, asked = version.folder / "pyproject.toml", (ROOT / "pyproject.toml").read_text()
    if not (done.exists() and done.read_text() == asked):
        version.install("--upgrade", "pip")
        version.install("--editable", ".[test]", f"torch=={version.torch}", version.numpy)
        done.write_text(asked)


def run_tests(version: Version, tests: Sequence[str]) -> dict[str, Counter[str]]:
    """Run pytest in an environment; count outcomes by what the tests are about."""
    results = BUILD / f"torch-{version.torch}.xml"
    results.unlink(missing_ok=True)
    options = ["-n", "2", "-q", "--no-header", "-p", "no:cacheprovider", f"--junitxml={results}"]
    ignored = [f"--ignore=tests/{name}" for name in LEFT_OUT]
    version.run("-m", "pytest", *options, *(tests or ignored), OMP_NUM_THREADS="1")
    counts = {part: Counter[str]() for part in ("pass", *PARTS)}
    for case in ElementTree.parse(results).iter("testcase"):
        file = case.get("classname", "").removeprefix("tests.").partition(".")[0]
        part = next((p for p, heads in PARTS.items() if file.startswith(heads)), "pass")
        tags = {child.tag for child in case}
        failed = tags & {"failure", "error"}
        counts[part]["failed" if failed else "skipped" if "skipped" in tags else "passed"] += 1
    return counts


def report(counts: dict[Version, dict[str, Counter[str]]]) -> None:
    """Print the table, and keep it as Markdown."""
    heads = ["torch", "Python", "numpy", "pass", "inspection", "export"]
    rows = [
        [v.torch, v.python, installed_numpy(v), *(in_words(parts[p]) for p in heads[3:])]
        for v, parts in counts.items()
    ]
    table = Table(*heads, title="What held")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]
    (BUILD / "table.md").write_text("\n".join(lines) + "\n")


def installed_numpy(version: Version) -> str:
    (folder,) = version.site_packages.glob("numpy-*.dist-info")
    return folder.name.removeprefix("numpy-").removesuffix(".dist-info")


def in_words(held: Counter[str]) -> str:
    return ", ".join(f"{held[k]:,} {k}" for k in ("passed", "failed", "skipped") if held[k]) or "–"


if __name__ == "__main__":
    main()

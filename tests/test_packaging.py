"""What is built is complete: wheel, sdist, the list of packages, the name `passes`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from forked import run_script

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11's tomllib")

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: list[str] = PROJECT["tool"]["setuptools"]["packages"]
# Where a package lies in the repository, by its first folder there.
FOLDERS = {"tract_fx": "tract_fx", "passes": "tract_fx.passes"}


def source_files() -> dict[str, Path]:
    """The library's files by the path that they have once installed."""
    return {
        f"{package.replace('.', '/')}/{file.relative_to(ROOT / folder).as_posix()}": file
        for folder, package in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in {".css", ".html", ".js", ".py"} or file.name == "py.typed"
    }


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("packaging")
    leave_out = shutil.ignore_patterns(
        ".*", "build", "dist", "tests", "examples", "benchmarks", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, folder / "source", ignore=leave_out)
    # Without --sdist and --wheel, the wheel is built from the sdist, which so proves to suffice.
    built = run(
        *(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist"),
        folder / "source",
        cwd=folder,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (wheel,) = distributions.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install")
    installed = run(*pip, "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return folder


def test_packages_are_all_listed() -> None:
    folders = {Path(installed).parent for installed in source_files() if installed.endswith(".py")}
    assert sorted(PACKAGES) == sorted(".".join(folder.parts) for folder in folders)


def test_packages_all_have_an_init() -> None:
    expected = {f"{package.replace('.', '/')}/__init__.py" for package in PACKAGES}
    assert expected <= {*source_files()}


def test_wheel_holds_every_source_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == {*source_files()}
        assert "tract_fx/py.typed" in names
        for name, file in source_files().items():
            assert archive.read(name) == file.read_bytes(), name


def test_wheel_requires_torch_and_what_its_shell_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    fields = [line.partition(": ") for line in metadata.split("\n\n")[0].splitlines()]
    required = [value for field, _, value in fields if field == "Requires-Dist"]
    core = [value for value in required if "extra ==" not in value]
    assert core == ["rich>=13.8", "torch>=2.11", "typer>=0.15"]
    assert ("License-Expression", ": ", "MIT") in fields


def test_sdist_holds_what_a_wheel_is_built_from(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {file.relative_to(ROOT).as_posix() for file in source_files().values()}
    assert expected | {"pyproject.toml", "LICENSE", "README.md"} <= names


# Each package in a process of its own, so that none is there because another has imported it. All
# are forks of one process that has other projects' packages.
IMPORT_EACH = """
import importlib, os, sys
site, *packages = sys.argv[1:]
sys.path.insert(0, site)
for package in packages:
    if os.fork() == 0:
        assert not any(name.split(".")[0] == "tract_fx" for name in sys.modules)
        print(package, importlib.import_module(package).__file__, flush=True)
        os._exit(0)
    if os.wait()[1] != 0:
        sys.exit(f"{package} does not import")
"""


def test_installed_packages_import(site: Path, tmp_path: Path) -> None:
    # The installed copy first on the path: an editable installation would otherwise answer for
    # what the wheel lacks.
    script = tmp_path / "import_each.py"
    script.write_text(IMPORT_EACH)
    imported = run_script(script, str(site), *PACKAGES, cwd=tmp_path)
    assert imported.returncode == 0, imported.stderr
    files = dict(line.split(" ", 1) for line in imported.stdout.splitlines())
    assert files == {p: str(site.joinpath(*p.split("."), "__init__.py")) for p in PACKAGES}


def test_installed_copy_is_whole_and_of_the_projects_version(site: Path, tmp_path: Path) -> None:
    script = (
        "import sys, tract_fx\n"
        "print(tract_fx.__version__)\n"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'tract_fx'))"
    )
    imported = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(site))
    assert imported.returncode == 0, imported.stderr
    version, files = imported.stdout.splitlines()
    assert version == PROJECT["project"]["version"]
    assert [path for path in files.split() if not Path(path).is_relative_to(site)] == []


# Python's own way to say that a package is not there: None in its place.
WITHOUT_EXTRAS = """
import sys
sys.modules.update(dict.fromkeys(("graphviz", "matplotlib", "numpy", "onnx", "onnx_ir")))
from tract_fx import *
from tract_fx.passes import *
assert tract_pass and inspect_graph and "export_training" not in globals()
import tract_fx
assert "export_training" in dir(tract_fx)
try:
    from tract_fx import export_training
except tract_fx.MissingRuntimeError as error:
    print(error)
from tract_fx.shell.app import app
from typer.testing import CliRunner
for command in ("--help", "doctor"):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [command])
    print(result.output)
    assert result.exit_code == 0, result.output
"""


def test_everything_is_imported_without_any_extra(site: Path, tmp_path: Path) -> None:
    imported = run(
        *(sys.executable, "-W", "error", "-c", WITHOUT_EXTRAS),
        cwd=tmp_path,
        PYTHONPATH=str(site),
    )
    assert (imported.returncode, imported.stderr) == (0, "")
    assert "pip install 'tract_fx[onnx]'" in imported.stdout
    assert imported.stdout.splitlines()[-2] == "right: 9 of 10 checks, 1 not made"


def test_passes_is_no_package_of_its_own() -> None:
    imported = run(sys.executable, "-c", "import passes", cwd=ROOT)
    assert imported.returncode != 0
    assert imported.stderr.strip().splitlines()[-1].startswith("ImportError")
    assert "import tract_fx.passes" in imported.stderr

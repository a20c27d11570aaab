"""Which versions of PyTorch the package takes, and what it says of others."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tract_fx import MissingRuntimeError, UntestedVersionWarning
from tract_fx.torch_version import NEWEST_TESTED, OLDEST, TESTED, check_torch

OLD = "torch 2.10.0: tract_fx needs 2.11 or newer"


@pytest.mark.parametrize("version", ["2.6.0", "2.10.0", "2.10.1+cu128", "1.13.1"])
def test_an_old_one_is_refused(version: str) -> None:
    with pytest.raises(MissingRuntimeError, match=r"pip install --upgrade 'torch>=2\.11'"):
        check_torch(version)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.15.1", torch.__version__])
def test_a_tested_one_is_taken_without_a_word(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_torch(version)


@pytest.mark.parametrize("version", ["2.16.0", "2.16.0a0+git1", "3.0.0"])
def test_a_newer_one_is_taken_with_a_warning(version: str) -> None:
    with pytest.warns(UntestedVersionWarning, match=r"newer than any .* Run tract-fx doctor"):
        check_torch(version)


def test_what_is_said_is_what_is_checked() -> None:
    oldest, newest = (".".join(map(str, number)) for number in (OLDEST, NEWEST_TESTED))
    assert f"{oldest} to {newest}" == TESTED


def under(version: str, code: str, tmp_path: Path, *options: str) -> tuple[int, str]:
    """Run code where torch says that it is of another version."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import torch\ntorch.__version__ = {version!r}\n", encoding="utf-8"
    )
    script = tmp_path / "tract-fx"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *options, str(script)],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stderr.strip()


def test_the_shell_gives_a_sentence_and_no_traceback(tmp_path: Path) -> None:
    code, said = under("2.10.0", "from tract_fx.shell.app import app; app()", tmp_path)
    assert code == 1
    assert said.startswith(f"error: {OLD}")
    assert "\n" not in said


def test_an_import_warns_once_where_the_user_imports(tmp_path: Path) -> None:
    code, said = under("9.1.0", "import tract_fx\nimport tract_fx.passes\n", tmp_path)
    assert code == 0
    first, *rest = said.splitlines()
    assert first.startswith(f"{tmp_path / 'tract-fx'}:1: UntestedVersionWarning: torch 9.1.0 is")
    assert rest == ["  import tract_fx"]

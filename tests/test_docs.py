"""Every code block and shell line of README and docs runs, and what they name is there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

import tract_fx
import tract_fx.passes
from documented import PAGES, ROOT, Section, extras, read, sections
from watched_gradients import watched_gradients

# The name under which a page's hidden blocks find the errors of the gradients that they ask for.
WATCHED = "errors_of_gradients"
SCRIPTS = sorted([*ROOT.glob("benchmarks/bench_*.py"), *ROOT.glob("examples/[!_]*.py")])
# What a section may need that the tests' environment can lack.
TRAINERS = ("accelerate", "lightning", "timm", "transformers")


@pytest.mark.parametrize("section", sections(), ids=str)
def test_section_runs(section: Section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mynets", raising=False)
    document = read(section.page)
    examples = section.examples(document)
    with ExitStack() as stack:
        if any(WATCHED in example.parsed for example in examples):
            document.namespace[WATCHED] = stack.enter_context(watched_gradients())
        for example in examples:
            try:
                example.evaluate()
            except ModuleNotFoundError as error:
                package = (error.name or "").partition(".")[0]
                if package not in TRAINERS:
                    raise
                pytest.skip(f"needs {package}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_is_of_a_kind_that_runs_or_is_text(page: Path) -> None:
    text = page.read_text()
    fences = re.findall(r"^ *```(.*)$", text, re.MULTILINE)
    assert {*fences[::2]} <= {"python", "sh", "text"} and {*fences[1::2]} <= {""}
    shown = sum(language != "text" for language in fences[::2])
    assert len([*read(page)]) == shown + text.count("<!-- invisible-code-block")
    for block in re.findall(r"^```\w+$(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        # More is cut where the window is 1280 pixels wide.
        assert [line for line in block.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_extras_are_told_of_in_one_table_and_exist() -> None:
    install = (ROOT / "docs" / "install.md").read_text()
    assert {*re.findall(r"^\| `([a-z-]+)` \|", install, re.MULTILINE)} == extras()
    for page in PAGES:
        for named in re.findall(r"tract_fx\[([a-z,-]+)\]", page.read_text()):
            assert {*named.split(",")} <= extras(), f"{page}: {named}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_name_the_extra_that_they_need(script: Path) -> None:
    doc = ast.get_docstring(ast.parse(script.read_text())) or ""
    needs = re.search(r"Needs (?:no extra|the\sextra `([a-z-]+)`)", doc)
    assert needs and (needs[1] is None or needs[1] in extras())
    if needs[1] is None:
        return
    ended = subprocess.run(
        [sys.executable, "-S", script.name], cwd=script.parent, capture_output=True, text=True
    )  # without site-packages
    says = rf"error: {script.name} needs the package \w+, .* pip install '\.\[{needs[1]}\]'\n"
    assert ended.returncode == 1 and re.fullmatch(says, ended.stderr), ended.stderr


def test_reference_holds_every_public_name() -> None:
    pages = (ROOT / "docs" / "reference").glob("*.md")
    held = [*re.findall(r"^::: ([\w.]+)$", "\n".join(p.read_text() for p in pages), re.MULTILINE)]
    assert len(held) == len({*held})
    public = {name for name in tract_fx.__all__ if name != "__version__"}
    ends = {name.rpartition(".")[2] for name in held}
    assert public | {*tract_fx.passes.__all__} <= ends

"""Every python block of the documentation runs, and what it prints is what the page shows."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import prunus
from prunus import allocations, growth, methods, schedules, scores, solvers, structures, training
from prunus.compose import REFUSALS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# file: (\S+)\n")
NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?")


@dataclass
class Block:
    language: str
    text: str
    line: int
    adjacent: bool
    """Whether nothing but blank lines stands between this block and the one before."""


def blocks(page: Path) -> list[Block]:
    source = page.read_text(encoding="utf-8")
    found, end = [], 0
    for match in FENCE.finditer(source):
        line = source.count("\n", 0, match.start(2))
        adjacent = not source[end : match.start()].strip()
        found.append(Block(match[1], match[2], line, adjacent and bool(found)))
        end = match.end()
    return found


def masked(text: str) -> list[str]:
    """Lines without their numbers and without runs of blanks or dashes."""
    return [re.sub(r"\s+", " ", NUMBER.sub("#", line)).strip() for line in text.strip().split("\n")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_python_blocks_run_and_print_what_the_page_shows(page, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": f"docs_{page.stem}"}
    printed: str | None = None
    for block in blocks(page):
        name = FILE.match(block.text)
        if name is not None:
            assert os.path.basename(name[1]) == name[1]
            (tmp_path / name[1]).write_text(block.text, encoding="utf-8")
            printed = None
        elif block.language == "python":
            # Blank lines in front, so that a traceback names the line of the page.
            code = compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True)
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(code, namespace)
            printed = output.getvalue()
        elif block.language == "text" and block.adjacent and printed is not None:
            assert masked(printed) == masked(block.text), f"{page.name}, line {block.line}"
            printed = None
        else:
            printed = None


def test_the_comparison_would_see_another_output():
    assert masked("speed 2.5x\n  a   b") == masked("speed 13x\n a b")
    assert masked("dense 2.5") != masked("csr 2.5")


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert re.search(rf": {re.escape(page.name)}$", text, re.MULTILINE), page.name


def test_links_between_pages_lead_somewhere():
    for page in [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md"]:
        prose = FENCE.sub("", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_documents_stay_short():
    assert len((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines()) < 260


SLOTS = {
    "Scores": scores,
    "Structures": structures,
    "Allocations": allocations,
    "Schedules": schedules,
    "Growth": growth,
    "Solvers": solvers,
}
ROW = re.compile(r"^\| `(\w+)\(([^`]*)\)` \|", re.MULTILINE)


def section(page: str, heading: str) -> str:
    """Return what stands between a heading of the second level and the next one."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found


def functions(package: object) -> set[str]:
    return {n for n in package.__all__ if inspect.isfunction(getattr(package, n))}  # type: ignore


def expect_rows(package: object, text: str) -> None:
    """One row for each public function, none for what is not there, with arguments it has."""
    rows = ROW.findall(text)
    names = [name for name, _ in rows]
    assert sorted(names) == sorted(functions(package)), set(names) ^ functions(package)
    for name, arguments in rows:
        known = inspect.signature(getattr(package, name)).parameters
        given = [part.partition("=")[0] for part in re.split(r",\s*", arguments) if part]
        assert given == [key for key in known if key in given], f"{name}({arguments})"


@pytest.mark.parametrize("heading", SLOTS)
def test_every_part_of_a_slot_has_its_row(heading):
    expect_rows(SLOTS[heading], section("slots.md", heading))


def test_every_method_has_its_row():
    expect_rows(methods, (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"))


def test_every_refusal_has_its_row():
    rows = re.findall(
        r"^\| (?!combination|---)", section("slots.md", "What is refused"), re.MULTILINE
    )
    assert len(rows) == len(REFUSALS)


@pytest.mark.parametrize("package", [prunus, methods, training, *SLOTS.values()])
def test_every_public_function_is_in_the_reference(package):
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^::: (\S+)\n((?: {4}.*\n)*)", text, re.MULTILINE))
    for name in package.__all__:
        value = getattr(package, name)
        if not callable(value):
            continue
        options = blocks.get(value.__module__)
        named = f"{value.__module__}.{name}" in blocks
        listed = options is not None and (
            "members:" not in options or re.search(rf"[\[ ]{name}[,\]]", options)
        )
        assert named or listed, f"{value.__module__}.{name} is missing in docs/api.md"


@pytest.mark.skipif(
    not all(map(shutil.which, ("cmake", "git", "c++"))), reason="needs cmake, git and a compiler"
)
def test_the_kernel_recipe_applies_builds_and_computes(tmp_path):
    (recipe,) = (b.text for b in blocks(ROOT / "CONTRIBUTING.md") if b.language == "diff")
    shutil.copytree(ROOT / "native", tmp_path / "native")
    (tmp_path / "recipe.diff").write_text(recipe, encoding="utf-8")
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("git", "apply", "--unidiff-zero", "recipe.diff")
    assert "spmv_flat_f32" in (tmp_path / "native" / "src" / "run.cpp").read_text()
    run("cmake", "-S", "native", "-B", "made", "-DPRUNUS_PYTHON=OFF", "-DPRUNUS_DEV=ON")
    run("cmake", "--build", "made", "--target", "prunus_driver")
    run("made/prunus_driver")

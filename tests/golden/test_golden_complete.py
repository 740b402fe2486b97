"""Every name that `prunus methods` lists has a golden test here: its own, or that of its part."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from test_golden_defaults import TABLE

from prunus.cli.commands import SLOTS

THROUGH = {
    "allocations.er": "test_golden_formulas.py::test_erdos_renyi_against_bisection",
    "growth.gradient": "test_golden_methods_alone.py::test_itop_by_loops",
    "growth.momentum": "test_golden_growth.py::test_sparse_momentum_by_loops",
    "growth.random": "test_golden_methods_alone.py::test_itop_by_loops",
    "methods.eigendamage": "test_golden_eigendamage.py::"
    "test_the_cost_is_that_of_the_kronecker_factored_fisher_matrix",
    "schedules.dense_sparse_dense": "test_golden_phases.py::test_dense_sparse_dense_ends_dense",
    "scores.constant_output": "test_golden_outputs.py::MEASURES",
    "scores.mean_activation": "test_golden_outputs.py::MEASURES",
}
"""Names that a test reaches by another way than calling slot.name: file and what holds them."""

FOLDER = Path(__file__).parent
TREES = {path.name: ast.parse(path.read_text("utf-8")) for path in FOLDER.glob("*.py")}


def used() -> set[str]:
    """Each `slot.name` that code (no comment, no string) of the golden tests reads."""
    found = set()
    for name, tree in TREES.items():
        imported = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prunus."):
                slot = (node.module or "").split(".")[1]
                imported |= {item.asname or item.name: f"{slot}.{item.name}" for item in node.names}
        for node in ast.walk(tree):
            if name in (Path(__file__).name, "test_golden_defaults.py"):
                break
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found.add(f"{node.value.id}.{node.attr}")
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
                found.add(f"{node.value.attr}.{node.attr}")
            elif isinstance(node, ast.Name) and node.id in imported:
                found.add(imported[node.id])
    return found


USED = used()
LISTED = [
    f"{slot}.{name}"
    for slot, package in SLOTS.items()
    for name in package.__all__
    if callable(getattr(package, name)) and not isinstance(getattr(package, name), type)
]


@pytest.mark.parametrize("name", LISTED)
def test_it_has_a_golden_test(name):
    slot, _, own = name.partition(".")
    if slot == "methods" and own in TABLE:
        parts = {f"scores.{own}", f"solvers.{own}", f"allocations.{own}"}
        assert parts & (USED | THROUGH.keys()), f"no golden test uses a part named {own}"
    elif name in THROUGH:
        file, _, holder = THROUGH[name].partition("::")
        assert holder in names_of(TREES[file]), f"{THROUGH[name]} is gone"
    else:
        assert name in USED, f"no golden test uses {name}"


def names_of(tree: ast.Module) -> set[str]:
    """Functions and constants of a module."""
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    return functions | {target.id for target in targets if isinstance(target, ast.Name)}


def test_the_detours_are_of_listed_names_that_need_one():
    assert set(THROUGH) <= set(LISTED)
    assert not set(THROUGH) & USED

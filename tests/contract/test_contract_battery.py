"""One battery per slot over the tables of test_contract_slots.py."""

from __future__ import annotations

import pytest
import torch
from test_contract_slots import (
    ALLOCATIONS,
    GROWTH,
    METHODS,
    SCHEDULES,
    SCORES,
    SOLVERS,
    STRUCTURES,
    rows,
)
from torch import nn

from prunus import methods, structures
from prunus.checks import (
    SHAPES,
    check_allocation,
    check_growth,
    check_schedule,
    check_score,
    check_solver,
    check_sparsifier,
    check_structure,
)
from prunus.core import Site
from prunus.kinds import GRADIENTS, GRAM, HESSIAN, INPUT_ROWS

MATRICES = frozenset({GRAM, HESSIAN, GRADIENTS, INPUT_ROWS})
"""Signals that grow with the square of a weight, or its multiple."""
SMALL = [(8, 12), (3, 5), (1, 1), (7, 1), (0, 4), (4, 4, 2, 2), (2, 4, 5)]


@pytest.mark.parametrize("score", rows(SCORES))
def test_score(score):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    check_score(score, dtypes=dtypes, shapes=SMALL if score.needs & MATRICES else SHAPES)


@pytest.mark.parametrize("structure", rows(STRUCTURES))
def test_structure(structure):
    check_structure(structure)


ODD_SHAPES = [(12, 12), (24, 12, 1), (12, 36, 2, 2), (4, 0), (6, 4, 3, 3), (2, 4, 2, 3)]


@pytest.mark.parametrize("structure", rows(STRUCTURES))
def test_structure_on_shapes_that_only_it_accepts(structure):
    check_structure(structure, shapes=ODD_SHAPES)


@pytest.mark.parametrize("allocation", rows(ALLOCATIONS))
def test_allocation(allocation):
    check_allocation(allocation)


@pytest.mark.parametrize("allocation", rows({"plain": ALLOCATIONS["uniform"] + ALLOCATIONS["er"]
    + ALLOCATIONS["erk"] + ALLOCATIONS["global_"] + ALLOCATIONS["floor"]}))  # fmt: skip
def test_allocation_with_an_empty_a_tiny_and_a_large_site(allocation):
    shapes = {"none": (0, 4), "tiny": (2, 1), "square": (64, 64), "conv": (16, 8, 3, 3)}
    check_allocation(allocation, sites=[Site(name, shape) for name, shape in shapes.items()])


@pytest.mark.parametrize("schedule", rows(SCHEDULES))
def test_schedule(schedule):
    check_schedule(schedule)


@pytest.mark.parametrize("part", rows(GROWTH))
def test_growth(part):
    check_growth(part)


@pytest.mark.parametrize("solver", rows(SOLVERS))
def test_solver(solver):
    check_solver(solver, shapes=SMALL if solver.needs & MATRICES else SHAPES)


@pytest.mark.parametrize("solver", rows(SOLVERS))
@pytest.mark.parametrize("structure", [structures.fan_in(), structures.strided(4)])
def test_solver_with_rows_of_outputs_and_rows_that_cross_them(solver, structure):
    check_solver(solver, structures=[structure], shapes=[(4, 8), (4, 4, 2)])


@pytest.mark.parametrize(("method", "grain"), [r for p in METHODS.values() for r in p])
def test_method(method, grain):
    check_sparsifier(method, grain=grain)


@pytest.mark.parametrize(
    "method", [methods.gradual_magnitude(0.9, 30), methods.rigl(0.7, 30, every=3)]
)
def test_method_on_a_model(method):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5), nn.Linear(5, 5))
    model[3].weight = nn.Parameter(model[2].weight[:, :5].detach().clone())
    check_sparsifier(method, model)

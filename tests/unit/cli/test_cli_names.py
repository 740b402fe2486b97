"""Names and plain values become methods and their parts."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from prunus import methods
from prunus.cli import names
from prunus.core import Allocation, Signals, Site, Sparsifier, Structure
from prunus.errors import RecipeError


def _method(
    sparsity: float,
    steps: int,
    *,
    share: float | None = None,
    often: bool = False,
    grow: Literal["random", "gradient"] = "random",
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    raise NotImplementedError


@pytest.fixture(autouse=True)
def _with_one_more(monkeypatch):
    monkeypatch.setattr(methods, "mine", _method, raising=False)
    monkeypatch.setattr(methods, "__all__", [*methods.__all__, "mine"])


def test_methods_that_need_objects_are_left_out():
    known = names.method_names()
    assert {"gradual_magnitude", "rigl", "snip", "mine"} <= set(known)
    assert not {"Ticket", "fixed", "lottery_ticket"} & set(known)


def test_where_a_method_starts_is_said_at_the_method():
    fresh = {n for n in names.method_names() if names.from_initialisation(n)}
    assert {"rigl", "snip", "random_pruning", "granet", "neural_wirings", "top_kast"} <= fresh
    assert not {"gradual_magnitude", "one_shot_magnitude", "sparsegpt", "dynamic_surgery"} & fresh
    assert not names.from_initialisation("mine")
    # whatever draws its first mask at random has no use for a trained network
    others = set(names.method_names()) - fresh - {"mine"}
    drawn = {n for n in others if _first_mask_is_random(n)}
    assert not drawn


def _first_mask_is_random(name):
    try:
        method = names.build_method(name, {"sparsity": 0.5}, 100)
    except TypeError:  # needs more than plain values
        return False
    sites = (Site("w", (6, 8)),)
    masks = []
    for seed in (0, 1):
        state = method.init(sites, {"w": torch.arange(1.0, 49).reshape(6, 8)}, seed)
        if method.needs(state) != frozenset():
            return False
        weights = {"w": torch.arange(1.0, 49).reshape(6, 8)}
        masks.append(method.update(state, sites, weights, Signals()).state.masks)
    return bool(masks[0]) and not torch.equal(masks[0]["w"], masks[1]["w"])


@pytest.mark.parametrize("name", [n for n in names.method_names() if n != "mine"])
def test_every_method_takes_sparsity_and_a_training_length(name):
    needed = {"sparsity": 0.5, **({"lr": 0.1} if name == "deep_rewiring" else {})}
    values = {key: names.argument(name, key, value) for key, value in needed.items()}
    names.expect_complete(name, values)
    assert isinstance(names.build_method(name, values, 1000), Sparsifier)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sparsity", 0),
        ("share", None),
        ("share", 2),
        ("often", True),
        ("grow", "gradient"),
        ("steps", 3),
    ],
)
def test_values_of_the_right_kind_pass(key, value):
    assert names.argument("mine", key, value) == value


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("sparsity", "0.5", "a number"),
        ("sparsity", None, "a number"),
        ("sparsity", True, "a number"),
        ("share", [1], "a number"),
        ("steps", 1.0, "a whole number"),
        ("steps", False, "a whole number"),
        ("often", 1, "true or false"),
        ("grow", "most", "random, gradient"),
        ("grow", ["random"], "random, gradient"),
    ],
)
def test_values_of_a_wrong_kind_name_what_is_allowed(key, value, allowed):
    with pytest.raises(RecipeError) as caught:
        names.argument("mine", key, value)
    assert str(caught.value) == f"{key} is {value!r}; allowed: {allowed}"


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("structure", "element", "element"),
        ("structure", {"block": [2, 4]}, "block(2, 4)"),
        ("structure", {"block": {"height": 2, "width": 4}}, "block(2, 4)"),
        ("allocation", "erk", "erk"),
        ("allocation", {"floor": ["er", 3]}, "floor(er, 3)"),
        ("allocation", {"floor": {"base": "er", "units": 3}}, "floor(er, 3)"),
        ("allocation", {"floor": [{"floor": "er"}]}, "floor(floor(er, 1), 1)"),
        ("allocation", {"overrides": ["er", {"a": 0.1}]}, "overrides(er, {'a': 0.1})"),
        ("allocation", None, None),
    ],
)
def test_slots_are_built_from_names(key, value, name):
    slot = names.argument("mine", key, value)
    assert getattr(slot, "name", None) == name


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("erko", "unknown allocation 'erko'; allowed: "),
        ({"erk": [], "er": []}, "unknown allocation"),
        ({"erk": [3]}, "called as erk()"),
        ({"floor": {"base": "er", "unit": 3}}, "called as floor(base, units)"),
        ({"floor": {"base": 3}}, "unknown allocation 3"),
        (3, "unknown allocation 3"),
        ([], "unknown allocation []"),
    ],
)
def test_wrong_slots_are_refused(value, words):
    with pytest.raises(RecipeError) as caught:
        names.argument("mine", "allocation", value)
    assert words in str(caught.value)

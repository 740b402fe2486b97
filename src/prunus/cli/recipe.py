"""Recipes: a YAML file that names model, data, method, training, seeds and outputs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from prunus.bench import Dataset, digits, fashion_mnist
from prunus.cli import names, user
from prunus.cli.experiment import OPTIMIZERS, Experiment, Training
from prunus.cli.rehearse import Misfit, rehearse
from prunus.cli.source import Place, Source
from prunus.core import Sparsifier
from prunus.errors import PrunusError

DATA: dict[str, Callable[[int], Dataset]] = {
    "digits": digits,
    "fashion-mnist": lambda seed: fashion_mnist(),
}


class Kind(NamedTuple):
    """What a value may be, in words and as a test."""

    allowed: str
    test: Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(allowed: str, test: Callable[[float], bool]) -> Kind:
    def holds(value: Any) -> bool:
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        return plain and math.isfinite(value) and test(value)

    return Kind(allowed, holds)


def _one_of(*allowed: str) -> Kind:
    return Kind(", ".join(allowed), lambda value: isinstance(value, str) and value in allowed)


_COUNT = Kind("whole numbers from 1", lambda value: _is_int(value) and value >= 1)
_NAME = Kind(
    "a text of letters, digits, spaces, and . _ -",
    lambda value: isinstance(value, str) and re.fullmatch(r"[\w.][\w. -]*", value) is not None,
)
_PATH = Kind("a path", lambda value: isinstance(value, str) and value.strip() != "")
_PATTERNS = Kind(
    "a name or pattern, or a list of them",
    lambda value: (
        isinstance(value, str)
        or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    ),
)
_SEEDS = Kind(
    "how many, from 1, or a list of different whole numbers from 0",
    lambda value: (
        _COUNT.test(value)
        or (
            isinstance(value, list)
            and len(set(map(str, value))) == len(value) > 0
            and all(_is_int(seed) and seed >= 0 for seed in value)
        )
    ),
)
_SHARE = _number("sparsities above 0 and below 1", lambda value: 0 < value < 1)
_SWEEP = Kind(
    "a list of sparsities above 0 and below 1",
    lambda value: isinstance(value, list) and all(map(_SHARE.test, value)),
)

TOP = ("name", "model", "data", "method", "sites", "training", "seeds", "sweep", "outputs")
TRAINING: dict[str, Kind] = {
    "epochs": _COUNT,
    "batch_size": _COUNT,
    "optimizer": _one_of(*OPTIMIZERS),
    "lr": _number("numbers above 0", lambda value: value > 0),
    "weight_decay": _number("numbers from 0", lambda value: value >= 0),
    "schedule": _one_of("cosine", "linear", "constant"),
    "label_smoothing": _number("numbers from 0 to below 1", lambda value: 0 <= value < 1),
    "start": _one_of("trained", "initial"),
}


def load_recipe(path: str | Path) -> Experiment:
    """Read a recipe and try it without training.

    Raises RecipeError with file, line and the allowed values.
    """
    reader = _Reader(Source(path))
    job = reader.experiment()
    try:
        rehearse(job)
    except Misfit as error:
        raise reader.source.fail(error.place, str(error)) from error
    return job


class _Reader:
    """Reads a recipe from top to bottom; every complaint names a line."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.values = source.values
        if not isinstance(self.values, dict):
            empty = "the file is empty; " if self.values is None else ""
            raise source.fail((), f"{empty}a recipe is a mapping with the keys {', '.join(TOP)}")

    def experiment(self) -> Experiment:
        """Read everything."""
        self.only((), self.values, TOP)
        for key in ("model", "data", "method"):
            if self.values.get(key) is None:
                raise self.source.fail((key,), f"{key!r} is missing; a recipe needs it")
        sites = self.mapping("sites", ("include", "exclude"))
        outputs = self.mapping("outputs", ("folder",))
        training = self.mapping("training", TRAINING)
        for key, value in training.items():
            self.check(("training", key), value, TRAINING[key])
        start = training.pop("start", None)
        stem = re.sub(r"[^\w.-]", "-", self.source.path.stem)
        method, method_name = self.method()
        seeds = self.value("seeds", 1, _SEEDS)
        return Experiment(
            name=self.value("name", stem, _NAME),
            model=self.model(),
            data=self.data(),
            method=method,
            training=Training(**training),
            folder=Path(
                self.check(("outputs", "folder"), outputs.get("folder", f"prunus-{stem}"), _PATH)
            ),
            seeds=range(seeds) if _is_int(seeds) else tuple(seeds),
            trained=start == "trained"
            or (start is None and not names.from_initialisation(method_name)),
            include=self.patterns(sites, "include"),
            exclude=self.patterns(sites, "exclude"),
            sweep=tuple(self.value("sweep", [], _SWEEP)),
        )

    def only(self, place: Place, values: dict[str, Any], allowed: Collection[str]) -> None:
        """Refuse unknown keys."""
        for key in values:
            if key not in allowed:
                message = f"unknown key {key!r}; allowed: {', '.join(allowed) or 'none'}"
                raise self.source.fail((*place, key), message)

    def mapping(self, key: str, allowed: Collection[str]) -> dict[str, Any]:
        """Return a copy of an optional mapping with known keys."""
        values = self.values.get(key)
        values = {} if values is None else values
        if not isinstance(values, dict):
            message = f"{key} is {values!r}; allowed: a mapping with the keys {', '.join(allowed)}"
            raise self.source.fail((key,), message)
        self.only((key,), values, allowed)
        return dict(values)

    def check(self, place: Place, value: Any, kind: Kind) -> Any:
        """Return a value that is of its kind."""
        if not kind.test(value):
            message = f"{place[-1]} is {value!r}; allowed: {kind.allowed}"
            raise self.source.fail(place, message)
        return value

    def value(self, key: str, default: Any, kind: Kind) -> Any:
        """Return the value of an optional key."""
        return self.check((key,), self.values.get(key, default), kind)

    def patterns(self, sites: dict[str, Any], key: str) -> tuple[str, ...]:
        """Return the patterns of a key as a tuple."""
        found = self.check(("sites", key), sites.get(key, []), _PATTERNS)
        return (found,) if isinstance(found, str) else tuple(found)

    def called(self, key: str) -> tuple[str, dict[str, Any]]:
        """Read `module:function`, or a mapping with it under `call` and arguments beside it."""
        value = self.values[key]
        arguments = dict(value) if isinstance(value, dict) else {"call": value}
        reference = arguments.pop("call", None)
        if not isinstance(reference, str):
            message = (
                f"{key} is {value!r}; allowed: module:function, {{call: module:function, ...}}"
            )
            raise self.source.fail((key,), message)
        return reference, arguments

    def function(self, key: str) -> tuple[Callable[[int], Any], str]:
        """Return seed -> what the user's function returns, and its name."""
        reference, arguments = self.called(key)
        with self.source.at(key):
            function = user.importable(reference, self.source.path.parent)
            user.expect_complete(function, reference, arguments)
        for argument in arguments:
            with self.source.at(key, argument):
                user.expect_argument(function, reference, argument)
        return lambda seed: user.call(function, reference, arguments, seed), reference

    def model(self) -> Callable[[int], nn.Module]:
        """Return seed -> model."""
        build, name = self.function("model")

        def model(seed: int) -> nn.Module:
            with self.source.at("model"):
                return user.as_model(build(seed), name)

        return model

    def data(self) -> Callable[[int], Dataset]:
        """Return seed -> Dataset; the last one is remembered."""
        reference, arguments = self.called("data")
        if ":" not in reference and reference not in DATA:
            message = f"unknown data {reference!r}; allowed: {', '.join(DATA)}, module:function"
            raise self.source.fail(("data",), message)
        if reference in DATA:
            self.only(("data",), arguments, ())
            build, name = DATA[reference], reference
        else:
            build, name = self.function("data")

        @lru_cache(maxsize=1)
        def data(seed: int) -> Dataset:
            with self.source.at("data"):
                return user.as_dataset(build(seed), name)

        return data

    def method(self) -> tuple[Callable[[float | None, int], Sparsifier], str]:
        """Return (sparsity or None, steps) -> method, and its name; rehearse() tries it."""
        value = self.values["method"]
        given = dict(value) if isinstance(value, dict) else {"name": value}
        name = given.pop("name", None)
        with self.source.at("method", "name"):
            names.find_method(name)
        arguments: dict[str, Any] = {}
        for key, one in given.items():
            with self.source.at("method", key):
                arguments[key] = names.argument(name, key, one)
        with self.source.at("method"):
            names.expect_complete(name, arguments)

        def build(sparsity: float | None, steps: int) -> Sparsifier:
            chosen = arguments if sparsity is None else {**arguments, "sparsity": sparsity}
            try:
                return names.build_method(name, chosen, steps)
            except PrunusError as error:
                named = [k for k in given if re.search(rf"\b{re.escape(k)}\b", str(error))]
                culprit = min(named, key=str(error).index) if named else "name"
                raise self.source.fail(("method", culprit), str(error)) from error

        return build, name

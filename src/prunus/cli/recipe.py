"""Recipes: a YAML file that names model, data, method, training, seeds and outputs."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from torch import Tensor, nn

from prunus.bench import Dataset, digits, fashion_mnist
from prunus.cli.experiment import OPTIMIZERS, Experiment, Training
from prunus.cli.names import FROM_INITIALISATION, build_method, importable, method_names
from prunus.core import Sparsifier
from prunus.errors import PrunusError, RecipeError

DATA: dict[str, Callable[[int], Dataset]] = {
    "digits": digits,
    "fashion-mnist": lambda seed: fashion_mnist(),
}

Place: TypeAlias = tuple[str | int, ...]

_TOP = ("name", "model", "data", "method", "sites", "training", "seeds", "sweep", "outputs")
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
_SCHEDULES = ("cosine", "linear", "constant")


def load_recipe(path: str | Path) -> Experiment:
    """Read a recipe. Raises RecipeError with file, line and the allowed values."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot read recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not a text file: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from None
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path}:1: a recipe is a mapping with the keys {', '.join(_TOP)}")
    lines: dict[Place, int] = {}
    values = _plain(node, (), lines, path)
    return _Reader(path, values, lines).experiment()


def _plain(node: yaml.Node, place: Place, lines: dict[Place, int], path: Path) -> Any:
    """Turn a YAML node into plain values and remember the line of every place."""
    lines[place] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in result:
                raise RecipeError(f"{path}:{line}: {key!r} stands here a second time")
            result[key] = _plain(value_node, (*place, key), lines, path)
            lines[(*place, key)] = line
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*place, i), lines, path) for i, item in enumerate(node.value)]
    value = yaml.SafeLoader("").construct_object(node)
    if isinstance(value, str) and node.style is None and _NUMBER.fullmatch(value):
        return float(value)  # YAML 1.1 reads 1e-3, which has no dot, as text
    return value


class _Reader:
    """Checks a recipe from top to bottom; every complaint names a line."""

    def __init__(self, path: Path, values: dict[str, Any], lines: Mapping[Place, int]) -> None:
        self.path, self.values, self.lines = path, values, lines

    def fail(self, place: Place, message: str) -> RecipeError:
        """Return an error that names the line of the nearest known place."""
        while place not in self.lines:
            place = place[:-1]
        return RecipeError(f"{self.path}:{self.lines[place]}: {message}")

    def experiment(self) -> Experiment:
        """Read everything."""
        self.only((), self.values, _TOP)
        for key in ("model", "data", "method"):
            if key not in self.values:
                raise self.fail((), f"{key!r} is missing; a recipe needs model, data and method")
        sites = self.mapping(("sites",), ("include", "exclude"))
        outputs = self.mapping(("outputs",), ("folder",))
        method, name = self.method()
        start = self.mapping(("training",), tuple(_training_fields())).get("start", None)
        if start not in (None, "trained", "initial"):
            raise self.fail(("training", "start"), f"start is {start!r}; allowed: trained, initial")
        return Experiment(
            name=str(self.values.get("name", self.path.stem)),
            model=self.model(),
            data=self.data(),
            method=method,
            training=self.training(),
            folder=Path(str(outputs.get("folder", f"prunus-{self.path.stem}"))),
            seeds=self.seeds(),
            trained=(name not in FROM_INITIALISATION) if start is None else start == "trained",
            include=self.texts(("sites", "include"), sites.get("include", [])),
            exclude=self.texts(("sites", "exclude"), sites.get("exclude", [])),
            sweep=self.sweep(),
        )

    def only(self, place: Place, values: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
        """Refuse unknown keys."""
        for key in values:
            if key not in allowed:
                raise self.fail((*place, key), f"unknown {key!r}; allowed: {', '.join(allowed)}")

    def mapping(self, place: Place, allowed: tuple[str, ...]) -> dict[str, Any]:
        """Return an optional mapping with known keys."""
        values = self.values.get(str(place[0])) or {}
        if not isinstance(values, dict):
            raise self.fail(place, f"{place[0]} is a mapping with the keys {', '.join(allowed)}")
        self.only(place, values, allowed)
        return values

    def call(self, place: Place, value: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
        """Read "module:function", or {call: module:function, further arguments}."""
        arguments = dict(value) if isinstance(value, dict) else {"call": value}
        reference = arguments.pop("call", None)
        if not isinstance(reference, str):
            raise self.fail(
                place, f"{place[0]} is package.module:function, or {{call: ..., argument: value}}"
            )
        try:
            function = importable(reference)
        except RecipeError as error:
            raise self.fail(place, str(error)) from None
        try:
            known = inspect.signature(function).parameters
        except (TypeError, ValueError):
            return function, arguments
        free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
        for key in arguments:
            if key not in known and not free:
                raise self.fail(
                    (*place, key),
                    f"{reference} has no argument {key!r}; allowed: {', '.join(known)}",
                )
        return function, arguments

    def model(self) -> Callable[[int], nn.Module]:
        """Return seed -> model."""
        function, arguments = self.call(("model",), self.values["model"])

        def build(seed: int) -> nn.Module:
            model = _seeded(function, arguments, seed)
            if not isinstance(model, nn.Module):
                raise self.fail(("model",), f"the model function returned {type(model).__name__}")
            return model

        return build

    def data(self) -> Callable[[int], Dataset]:
        """Return seed -> Dataset."""
        value = self.values["data"]
        if isinstance(value, str) and ":" not in value:
            if value not in DATA:
                raise self.fail(
                    ("data",),
                    f"unknown data {value!r}; allowed: {', '.join(DATA)}, package.module:function",
                )
            return DATA[value]
        function, arguments = self.call(("data",), value)
        return lambda seed: self.dataset(_seeded(function, arguments, seed))

    def dataset(self, value: Any) -> Dataset:
        """Accept a Dataset or its four tensors."""
        if isinstance(value, Dataset):
            return value
        tensors = tuple(value) if isinstance(value, (tuple, list)) else ()
        if len(tensors) != 4 or not all(isinstance(t, Tensor) for t in tensors):
            raise self.fail(
                ("data",),
                "the data function returns a prunus.bench.Dataset, or the tensors "
                "(train_inputs, train_targets, test_inputs, test_targets)",
            )
        for inputs, targets in (tensors[:2], tensors[2:]):
            if len(inputs) != len(targets) or not len(inputs):
                raise self.fail(
                    ("data",), f"{len(inputs)} inputs and {len(targets)} targets; need as many"
                )
        classes = int(tensors[1].max()) + 1
        return Dataset(*tensors, classes=classes, name=str(self.values["data"]))

    def method(self) -> tuple[Callable[[float | None, int], Sparsifier], str]:
        """Return (sparsity or None, steps) -> method, and its name; tried once here."""
        value = self.values["method"]
        arguments = dict(value) if isinstance(value, dict) else {"name": value}
        name = arguments.pop("name", None)
        if name not in method_names():
            raise self.fail(
                ("method", "name"),
                f"unknown method {name!r}; allowed: {', '.join(method_names())}",
            )

        def build(sparsity: float | None, steps: int) -> Sparsifier:
            chosen = arguments if sparsity is None else {**arguments, "sparsity": sparsity}
            return build_method(name, chosen, steps)

        try:
            build(None, 10_000)
        except PrunusError as error:
            culprit = next((k for k in arguments if k in str(error)), "name")
            raise self.fail(("method", culprit), str(error)) from None
        return build, str(name)

    def training(self) -> Training:
        """Check every field of training by type and range."""
        values = self.mapping(("training",), tuple(_training_fields()))
        for key, value in values.items():
            place = ("training", key)
            if key == "optimizer" and value not in OPTIMIZERS:
                raise self.fail(place, f"optimizer is {value!r}; allowed: {', '.join(OPTIMIZERS)}")
            if key == "schedule" and value not in _SCHEDULES:
                raise self.fail(place, f"schedule is {value!r}; allowed: {', '.join(_SCHEDULES)}")
            if key in ("epochs", "batch_size") and (not _is_int(value) or value < 1):
                raise self.fail(place, f"{key} is {value!r}; allowed: whole numbers from 1")
            if key in ("lr", "weight_decay", "label_smoothing"):
                low = value >= 0 if _is_number(value) else False
                if not low or (key == "lr" and value == 0):
                    raise self.fail(place, f"{key} is {value!r}; allowed: numbers above 0")
        return Training(**{key: value for key, value in values.items() if key != "start"})

    def seeds(self) -> tuple[int, ...]:
        """Read a count, or a list of seeds."""
        value = self.values.get("seeds", 1)
        seeds = list(range(value)) if _is_int(value) else value
        if not isinstance(seeds, list) or not seeds or not all(_is_int(s) for s in seeds):
            raise self.fail(("seeds",), f"seeds is {value!r}; allowed: a count from 1, or a list")
        return tuple(seeds)

    def sweep(self) -> tuple[float, ...]:
        """Read the further sparsities."""
        value = self.values.get("sweep", [])
        ok = isinstance(value, list) and all(_is_number(v) and 0 <= v <= 1 for v in value)
        if not ok:
            raise self.fail(("sweep",), f"sweep is {value!r}; allowed: sparsities from 0 to 1")
        return tuple(float(v) for v in value)

    def texts(self, place: Place, value: Any) -> tuple[str, ...]:
        """Read one pattern or a list of them."""
        patterns = [value] if isinstance(value, str) else value
        if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
            raise self.fail(place, f"{place[-1]} is a list of names or patterns, got {value!r}")
        return tuple(patterns)


def _training_fields() -> list[str]:
    return [*(field.name for field in dataclasses.fields(Training)), "start"]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _seeded(function: Callable[..., Any], arguments: dict[str, Any], seed: int) -> Any:
    """Call a user's function under a seed; it gets the seed itself if it takes one."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            takes_seed = "seed" in inspect.signature(function).parameters
        except (TypeError, ValueError):
            takes_seed = False
        return function(**arguments, **({"seed": seed} if takes_seed else {}))

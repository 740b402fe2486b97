"""YAML read strictly, with the line of every value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from prunus.errors import PrunusError, RecipeError

Place: TypeAlias = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """The safe loader, for which 1e-3 is a number: YAML 1.1 wants a dot in it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class Source:
    """A YAML file: `values` as plain objects, and the line that each of them stands on."""

    def __init__(self, path: str | Path) -> None:
        """Read the file. Raises RecipeError with the line for anything but one mapping."""
        self.path = Path(path)
        self.lines: dict[Place, int] = {(): 1}
        text = self._text()
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            self.values: Any = None if node is None else self._plain(loader, node, ())
        except yaml.YAMLError as error:
            raise self._not_yaml(error) from None
        except RecursionError:
            raise RecipeError(
                f"{path}: nested without end; do not let an alias hold itself"
            ) from None

    def fail(self, place: Place, message: str) -> RecipeError:
        """Return an error that names the line of `place`, or of what is around it, once."""
        if message.startswith(f"{self.path}:"):
            return RecipeError(message)
        while place not in self.lines:
            place = place[:-1]
        return RecipeError(f"{self.path}:{self.lines[place]}: {message}")

    @contextmanager
    def at(self, *place: str | int) -> Iterator[None]:
        """Add file and line of `place` to any error of prunus."""
        try:
            yield
        except PrunusError as error:
            raise self.fail(place, str(error)) from error

    def _text(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"cannot read the recipe {self.path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise RecipeError(f"{self.path}: not a text file in UTF-8") from None

    def _not_yaml(self, error: yaml.YAMLError) -> RecipeError:
        mark = getattr(error, "problem_mark", None)
        problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
        if "'\\t'" in problem:
            problem += "; indent with spaces, YAML does not take tabs"
        line = f":{mark.line + 1}" if mark is not None else ""
        return RecipeError(f"{self.path}{line}: not valid YAML: {problem}")

    def _plain(self, loader: _Loader, node: yaml.Node, place: Place) -> Any:
        """Turn a node into plain values and remember the line of every place."""
        self.lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(loader, item, (*place, i)) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            try:
                return loader.construct_object(node)
            except ValueError as error:  # such as !!int "a", or the 30th of February
                raise self.fail(place, f"not a value: {error}") from None
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in result:
                raise RecipeError(
                    f"{self.path}:{line}: {key!r} is given a second time; "
                    f"the first is in line {self.lines[(*place, key)]}"
                )
            self.lines[(*place, key)] = line
            result[key] = self._plain(loader, value_node, (*place, key))
        return result

"""What users bring: imported by name, called under a seed, and checked before use."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import prunus
from prunus.bench import Dataset
from prunus.errors import RecipeError

_PARTS: tuple[str, ...] = ("train_inputs", "train_targets", "test_inputs", "test_targets")


def importable(reference: str, folder: Path | None = None) -> Callable[..., Any]:
    """Import "package.module:function" from the working directory, `folder`, or what is installed.

    Raises RecipeError.
    """
    module, _, name = reference.partition(":")
    if not module or not name:
        raise RecipeError(f"{reference!r} is not of the form package.module:function")
    for place in (folder, Path.cwd()):
        if place is not None and str(place.resolve()) not in sys.path:
            sys.path.insert(0, str(place.resolve()))
    with blamed(f"importing {module!r}"):
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module is there; what it imports is not
            raise RecipeError(
                f"there is no module {module!r} in {Path.cwd()} or among the installed packages"
            ) from None
    value = getattr(found, name, None)
    if not callable(value):
        what = f"is {type(value).__name__}, not a function" if value is not None else "is not there"
        raise RecipeError(f"{name!r} of module {module!r} ({found.__file__}) {what}")
    return value


def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function; one `**kwargs` for a built-in one that hides them."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


def expect_argument(function: Callable[..., Any], name: str, key: str) -> None:
    """Raise RecipeError if a function takes no such argument."""
    known = parameters(function)
    if key not in known and all(p.kind is not p.VAR_KEYWORD for p in known.values()):
        allowed = ", ".join(known) or "none at all"
        raise RecipeError(f"{name} has no argument {key!r}; allowed: {allowed}")


def expect_complete(function: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> None:
    """Raise RecipeError if a function needs an argument that is not there; seed is given anyway."""
    for key, p in parameters(function).items():
        needed = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if needed and key not in (*arguments, "seed"):
            raise RecipeError(
                f"{name} needs the argument {key!r}; write {{call: {name}, {key}: ...}}"
            )


def call(function: Callable[..., Any], name: str, arguments: Mapping[str, Any], seed: int) -> Any:
    """Call a user's function with torch seeded; it gets `seed` itself if it has such an argument.

    Raises RecipeError, with the place in the user's file, for whatever it raises.
    """
    if "seed" in parameters(function):
        arguments = {"seed": seed, **arguments}
    with torch.random.fork_rng(devices=[]), blamed(name):
        torch.manual_seed(seed)
        return function(**arguments)


def as_model(value: Any, name: str) -> nn.Module:
    """Return a model with parameters. Raises RecipeError."""
    if not isinstance(value, nn.Module):
        raise RecipeError(f"{name} returned {type(value).__name__}; return a torch.nn.Module")
    if not any(p.requires_grad for p in value.parameters()):
        raise RecipeError(f"the model of {name} has no parameter to train")
    return value


def as_dataset(value: Any, name: str) -> Dataset:
    """Return a Dataset of finite inputs with class numbers as targets. Raises RecipeError."""
    if isinstance(value, Dataset):
        value = [getattr(value, part) for part in _PARTS]
    parts = list(value) if isinstance(value, (tuple, list)) else []
    if len(parts) != 4 or not all(isinstance(part, (Tensor, np.ndarray)) for part in parts):
        raise RecipeError(
            f"{name} returned {type(value).__name__}; return the four tensors "
            f"({', '.join(_PARTS)}), or a prunus.bench.Dataset"
        )
    tensors = dict(zip(_PARTS, (torch.as_tensor(part) for part in parts), strict=True))
    for part in ("train", "test"):
        inputs = tensors[f"{part}_inputs"]
        tensors[f"{part}_targets"] = _targets(f"{name}: {part}", inputs, tensors[f"{part}_targets"])
        finite = torch.isfinite(inputs).all() if inputs.is_floating_point() else True
        if not finite:
            at = int((~torch.isfinite(inputs.flatten(1))).any(1).nonzero()[0])
            raise RecipeError(f"{name}: {part}_inputs[{at}] holds NaN or infinity; clean the data")
    classes = 1 + max(int(tensors[f"{part}_targets"].max()) for part in ("train", "test"))
    return Dataset(**tensors, classes=classes, name=name)


def _targets(name: str, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return targets as int64 [n], one per input."""
    if inputs.dim() < 2 or targets.dim() != 1:
        raise RecipeError(
            f"{name}_inputs are {list(inputs.shape)} and {name}_targets {list(targets.shape)}; "
            f"expected [n, ...] and [n]"
        )
    if len(inputs) != len(targets) or not len(inputs):
        raise RecipeError(
            f"{name}_inputs hold {len(inputs)} examples, {name}_targets {len(targets)}; "
            f"expected as many of both, and at least one"
        )
    whole = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    if not whole or int(targets.min()) < 0:
        raise RecipeError(
            f"{name}_targets are {targets.dtype}; expected class numbers 0, 1, 2, ..."
        )
    return targets.long()


@contextmanager
def blamed(name: str) -> Iterator[None]:
    """Turn any exception of a user's code into a RecipeError that says where it came from."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"{name}: {type(error).__name__}: {error}{origin(error)}") from error


def origin(error: BaseException) -> str:
    """Return " (file, line n)" of the last frame outside of torch and prunus, or ""."""
    if isinstance(error, SyntaxError):
        return ""  # its message names file and line
    ours = tuple(os.path.dirname(str(package.__file__)) for package in (prunus, torch))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((*ours, "<", os.path.dirname(str(importlib.__file__))))
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""

"""What `compile` is given, checked before anything else runs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import PrunusError, ShapeError, ValueRangeError
from prunus.runtime.candidates import PRECISIONS
from prunus.runtime.decide import Options


def checked(model: Any, example: Any, threads: Any, options: Options) -> Options:
    """The options with the number of threads; ValueRangeError or ShapeError for what is wrong."""
    _expect_model(model)
    _expect_example(example)
    if threads is None:
        threads = torch.get_num_threads()
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueRangeError(f"threads is {threads!r}, expected an integer of at least 1, or None")
    minimum = options.minimum_sparsity
    if not isinstance(minimum, (int, float)) or not 0 <= minimum <= 1 or math.isnan(minimum):
        raise ValueRangeError(f"minimum_sparsity is {minimum!r}, expected a number from 0 to 1")
    if options.dtype not in PRECISIONS:
        raise ValueRangeError(
            f"dtype is {options.dtype!r}, expected torch.float32, torch.bfloat16 or "
            f"torch.int8; each also allows those before it"
        )
    if options.choose is not None and not callable(options.choose):
        raise ValueRangeError(
            f"choose is {options.choose!r}, expected a callable such as plan.choose, or None"
        )
    return dataclasses.replace(options, threads=threads)


def _expect_model(model: Any) -> None:
    """A module whose parameters hold data."""
    expect_module(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ShapeError(f"{name!r} has no shape yet; run one batch through the model first")
        if parameter.is_meta:
            raise ShapeError(
                f"{name!r} is on the meta device and has no values; load the weights first "
                f"(model.to_empty(device='cpu'), then load_state_dict)"
            )


def _expect_example(example: Any) -> None:
    """Something that a model can be called with."""
    if example is None:
        raise ValueRangeError(
            "example_inputs is missing: give a tensor, a tuple of positional or a mapping of named "
            "inputs of the shapes that will be used, or a list of these"
        )
    if isinstance(example, list) and not example:
        raise ValueRangeError("example_inputs is an empty list; give at least one example")
    for one in example if isinstance(example, list) else [example]:
        if not isinstance(one, (Tensor, tuple, Mapping)):
            raise ValueRangeError(
                f"example_inputs holds a {type(one).__name__}, expected a tensor, a tuple of "
                f"positional or a mapping of named inputs"
            )


@contextlib.contextmanager
def taking_examples() -> Iterator[None]:
    """ValueRangeError, with what the model raised as its cause, if it does not run."""
    try:
        yield
    except PrunusError:
        raise
    except RuntimeError as e:
        if "deepcopy" not in str(e):
            raise _refused(e) from e
        raise ValueRangeError(
            "the model cannot be copied: it holds a tensor that was computed from parameters, as "
            "torch.nn.utils.prune and the old weight_norm make them; call "
            "torch.nn.utils.prune.remove or remove_weight_norm first"
        ) from e
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise _refused(e) from e


def _refused(error: Exception) -> ValueRangeError:
    """What to say of a model that fails on its example."""
    return ValueRangeError(
        f"the model does not take example_inputs: {type(error).__name__}: {error}. Give a tensor, "
        f"a tuple of positional or a mapping of named inputs, or a list of several examples"
    )


def expect_path(path: Any) -> None:
    """ValueRangeError for what is no path of a file."""
    if not isinstance(path, (str, os.PathLike)):
        raise ValueRangeError(f"path is {path!r}, expected a string or a path")
    if os.path.isdir(path):
        raise ValueRangeError(f"{os.fspath(path)} is a folder; name a file in it")


def expect_module(model: Any) -> None:
    """ValueRangeError for what is no model."""
    if not isinstance(model, nn.Module):
        raise ValueRangeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")

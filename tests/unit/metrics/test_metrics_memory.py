from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from prunus.errors import ValueRangeError
from prunus.metrics import peak_memory

MIB = 2**20

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/clear_refs")


class Chatty(nn.Linear):
    """Prints to stdout, which must not reach the parent's answer."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        print("{not json}")
        return super().forward(input)


class Hungry(nn.Module):
    """Needs 32 MiB for a moment and no weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones(8 * MIB).sum() + x


class Slow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while True:
            x = x + 1


@linux
def test_weights_show_in_full_and_in_proportion():
    large = peak_memory(nn.Linear(4096, 4096, bias=False), torch.zeros(1, 4096))
    small = peak_memory(nn.Linear(2048, 2048, bias=False), torch.zeros(1, 2048))
    assert large.bytes is not None, large
    assert small.bytes is not None, small
    # The kernel counts resident pages in batches: a few hundred KiB may be missing.
    assert 63 * MIB <= large.bytes <= 100 * MIB
    assert 0.15 <= small.bytes / large.bytes <= 0.4


@linux
def test_activations_count_at_their_peak():
    result = peak_memory(Hungry(), torch.zeros(1))
    assert result.bytes is not None, result
    assert 30 * MIB <= result.bytes <= 48 * MIB


def test_models_of_test_modules_are_found_and_may_print():
    model = Chatty(3, 3).train()
    result = peak_memory(model, torch.zeros(1, 3))
    assert result.bytes is not None, result
    assert model.training


def test_what_cannot_be_measured_says_why():
    model = nn.Linear(2, 2)
    model.hook = lambda x: x
    lambda_ = peak_memory(model, torch.zeros(1, 2))
    assert lambda_.bytes is None
    assert "cannot be pickled" in lambda_.reason

    wrong = peak_memory(nn.Linear(2, 2), torch.zeros(1, 3))
    assert wrong.bytes is None
    assert "shapes cannot be multiplied" in wrong.reason

    main = type("Local", (nn.Linear,), {"__module__": "__main__"})(2, 2)
    assert "Local is defined in __main__" in peak_memory(main, torch.zeros(1, 2)).reason

    gone = type("Gone", (nn.Linear,), {"__module__": "no_such_module_anywhere"})
    sys.modules["no_such_module_anywhere"] = type(sys)("no_such_module_anywhere")
    sys.modules["no_such_module_anywhere"].Gone = gone
    gone.__qualname__ = "Gone"
    try:
        result = peak_memory(gone(2, 2), torch.zeros(1, 2))
    finally:
        del sys.modules["no_such_module_anywhere"]
    assert result.bytes is None
    assert "cannot import" in result.reason


def test_timeout_and_arguments():
    result = peak_memory(Slow(), torch.zeros(1), timeout=2)
    assert result.bytes is None
    assert "longer than 2 s" in result.reason
    with pytest.raises(ValueRangeError, match="repetitions=0"):
        peak_memory(nn.Linear(2, 2), torch.zeros(1, 2), repetitions=0)

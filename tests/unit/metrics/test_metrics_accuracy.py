from __future__ import annotations

import pytest
import torch
from torch import nn

from prunus.errors import NotFiniteError, ShapeError, ValueRangeError
from prunus.metrics import accuracy

LOGITS = torch.eye(4)[[0, 1, 2, 3, 0, 0]]
TARGETS = torch.tensor([0, 1, 1, 3, 0, 1])


def test_totals_and_classes_by_hand():
    result = accuracy(nn.Identity(), (LOGITS, TARGETS))
    assert (result.correct, result.total, result.classes) == (4, 6, 4)
    assert result.per_class == ((2, 2), (1, 3), (0, 0), (1, 1))
    assert result.value == 4 / 6


def test_batches_give_the_same_as_a_pair():
    whole = accuracy(nn.Identity(), (LOGITS, TARGETS))
    batches = list(zip(LOGITS.split(4), TARGETS.split(4), strict=True))
    assert accuracy(nn.Identity(), batches) == whole
    assert accuracy(nn.Identity(), tuple(batches)) == whole
    assert accuracy(nn.Identity(), iter(batches)) == whole
    assert accuracy(nn.Identity(), (LOGITS, TARGETS), batch_size=1) == whole


def test_eval_mode_inside_and_training_flags_back():
    model = nn.Sequential(nn.Dropout(0.99), nn.Identity().eval())
    assert accuracy(model, (LOGITS, TARGETS)).correct == 4
    assert [m.training for m in model.modules()] == [True, True, False]


@pytest.mark.parametrize("data", [[], (LOGITS[:0], TARGETS[:0]), [(LOGITS[:0], TARGETS[:0])]])
def test_no_data_is_an_error(data):
    with pytest.raises(ValueRangeError, match="no examples"):
        accuracy(nn.Identity(), data)


def test_wrong_shapes_and_values_are_errors():
    with pytest.raises(ShapeError, match="6 inputs but 5 targets"):
        accuracy(nn.Identity(), (LOGITS, TARGETS[:5]))
    with pytest.raises(ShapeError, match=r"\[n, classes\]"):
        accuracy(nn.Flatten(0), (LOGITS, TARGETS))
    with pytest.raises(ShapeError, match="class numbers"):
        accuracy(nn.Identity(), (LOGITS, TARGETS.float()))
    with pytest.raises(ValueRangeError, match="4 logits"):
        accuracy(nn.Identity(), (LOGITS, TARGETS + 1))
    with pytest.raises(NotFiniteError, match="batch 0"):
        accuracy(nn.Identity(), (LOGITS * float("nan"), TARGETS))

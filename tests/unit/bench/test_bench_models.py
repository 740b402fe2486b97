from __future__ import annotations

import copy
import pickle

import pytest
import torch

from prunus.bench import (
    bert_base,
    digits_cnn,
    fashion_cnn,
    lenet_300_100,
    minilm,
    mlp,
    mobilenet_v2,
    resnet50,
)
from prunus.errors import ValueRangeError
from prunus.metrics import counts

CASES = [(mlp, (1, 8, 8)), (digits_cnn, (1, 8, 8)), (lenet_300_100, (1, 28, 28))]
CASES += [(fashion_cnn, (1, 28, 28))]


@pytest.mark.parametrize(("build", "shape"), CASES)
def test_models_are_seeded_picklable_and_give_logits(build, shape):
    state = torch.get_rng_state()
    model, same, other = build(seed=3), build(seed=3), build(seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    parameters = [list(m.parameters()) for m in (model, same, other)]
    assert all(torch.equal(a, b) for a, b in zip(*parameters[:2], strict=True))
    assert not torch.equal(parameters[0][0], parameters[2][0])
    inputs = torch.ones(2, *shape)
    logits = model.eval()(inputs)
    assert logits.shape == (2, 10)
    assert torch.equal(pickle.loads(pickle.dumps(model))(inputs), logits)
    assert torch.equal(copy.deepcopy(model)(inputs), logits)


def test_sizes_by_hand():
    assert counts(mlp()).parameters == 65 * 1536 + 1537 * 1536 + 1537 * 10
    assert counts(lenet_300_100()).parameters == 785 * 300 + 301 * 100 + 101 * 10
    kernels = [
        site.shape[2] for site in counts(digits_cnn()).sites.values() if len(site.shape) == 4
    ]
    assert kernels == [3, 3, 1, 3, 1]
    assert 100_000 <= counts(digits_cnn()).parameters <= 400_000


def test_mlp_has_no_relu_after_the_last_layer():
    assert [name for name, _ in mlp(4, (3,), 2).layers.named_children()] == ["fc1", "relu1", "fc2"]
    assert [name for name, _ in mlp(4, (), 2).layers.named_children()] == ["fc1"]


def test_sizes_are_checked():
    with pytest.raises(ValueRangeError, match="at least 1"):
        mlp(hidden=(0,))
    with pytest.raises(ValueRangeError, match="width 0"):
        digits_cnn(0)


LARGE = [
    (resnet50, (3, 32, 32), 25_557_032),
    (mobilenet_v2, (3, 32, 32), 3_504_872),
    (minilm, (8, 384), 6 * (12 * 384**2 + 13 * 384) + 2 * 385),
    (bert_base, (8, 768), 12 * (12 * 768**2 + 13 * 768) + 2 * 769),
]


@pytest.mark.parametrize(("build", "shape", "parameters"), LARGE)
def test_large_models_have_the_sizes_of_their_papers(build, shape, parameters):
    model = build(seed=3).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    with torch.no_grad():
        logits = model(torch.ones(2, *shape))
    assert logits.shape == (2, model(torch.ones(1, *shape)).shape[1])
    assert torch.isfinite(logits).all()

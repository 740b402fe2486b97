from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from prunus import rng


def test_a_draw_depends_on_its_key_alone():
    first = rng.uniform((1, 2, "a"), (50,))
    torch.manual_seed(99)
    torch.rand(3)
    rng.uniform((7,), (11,))
    assert torch.equal(first, rng.uniform((1, 2, "a"), (50,)))


@pytest.mark.parametrize("other", [(1, 2, "b"), (2, 1, "a"), (1, 2), ("1", 2, "a"), (1, "2a"), ()])
def test_another_key_gives_other_numbers(other):
    assert not torch.equal(rng.uniform((1, 2, "a"), (50,)), rng.uniform(other, (50,)))


def test_an_int_of_numpy_is_the_same_key():
    plain = rng.uniform((3, "a"), (20,))
    assert torch.equal(plain, rng.uniform((np.int64(3), "a"), (20,)))
    assert torch.equal(plain, rng.uniform((torch.tensor(3).item(), "a"), (20,)))


@pytest.mark.parametrize("key", [(1.5,), ((1, 2),), (None,)])
def test_a_key_is_made_of_ints_and_strings(key):
    with pytest.raises(TypeError):
        rng.uniform(key, (1,))


def test_global_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    rng.uniform((1,), (5,))
    assert torch.equal(before, torch.get_rng_state())


def test_known_numbers_so_that_no_release_changes_masks_silently():
    key = (0, 0, 0, "layer.weight")
    assert rng.generator(key).initial_seed() == 1087854656911108836
    assert rng.uniform(key, (2,)).tolist() == pytest.approx([0.7538018, 0.6114386], abs=1e-6)


def test_draws_are_uniform_and_keys_independent():
    draws = rng.uniform(("u",), (20_000,))
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    assert stats.kstest(draws.numpy(), "uniform").pvalue > 1e-3
    neighbours = np.array([float(rng.uniform((0, step), (1,))[0]) for step in range(2000)])
    assert stats.kstest(neighbours, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(neighbours[1:], neighbours[:-1])[0, 1]) < 0.1


@pytest.mark.parametrize("shape", [(0, 3), (1,), (2, 3, 4)])
def test_shapes(shape):
    assert rng.uniform((1,), shape).shape == shape
    assert rng.uniform((1,), shape).dtype == torch.float32

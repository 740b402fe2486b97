"""What tune chooses from measured times, and half-precision activations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunus.training import TrainableConv2d, TrainableLinear, dynamic, sparse_training, tune


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(150, 20), nn.ReLU(),
        nn.Linear(20, 4),
    )  # fmt: skip


def stopwatch(times):
    """Seconds by the kind of layer and the way it computes; the first call of each is slow."""
    calls = []

    def measure(layer, x):
        way = "plain"
        if isinstance(layer, (TrainableLinear, TrainableConv2d)):
            way = "sparse" if layer.native else "dense"
        calls.append(way)
        kind = "conv" if x.dim() == 4 else "linear"
        return times[kind][way] + (100.0 if len(calls) <= 3 else 0.0)

    return measure


TIMES = {
    "conv": {"sparse": 3.0, "dense": 2.0, "plain": 1.0},
    "linear": {"sparse": 1.0, "dense": 2.0, "plain": 4.0},
}


def test_the_faster_way_is_chosen_and_the_reason_is_told():
    model = sparse_training(net(), 0.8)
    choices = tune(model, torch.randn(4, 2, 5, 5), 2, measure=stopwatch(TIMES))
    assert [c.native for c in choices] == [False, True, True]
    assert [m.native for m in model if hasattr(m, "native")] == [False, True, True]
    assert not any(c.unpacked for c in choices)
    assert "would be 2.00 times faster" in str(choices[0])
    assert "sparse kernels, 4.00 times faster than torch's dense layer" in str(choices[1])


def test_unpack_puts_the_dense_layer_where_it_wins_with_the_same_weights():
    model = sparse_training(net(), 0.8)
    x = torch.randn(4, 2, 5, 5)
    expected = model(x)
    choices = tune(model, x, 1, unpack=True, measure=stopwatch(TIMES))
    assert [c.unpacked for c in choices] == [True, False, False]
    assert "unpacked, torch's dense layer is 2.00 times faster" in str(choices[0])
    assert type(model[0]) is nn.Conv2d
    assert isinstance(model[3], TrainableLinear)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_activations_are_kept_as_halves_and_gradients_match_float32(dtype):
    torch.manual_seed(0)
    for layer, x in (
        (TrainableLinear.random(40, 30, 0.7), torch.randn(8, 40)),
        (
            TrainableConv2d.from_dense(nn.Conv2d(4, 6, 3), torch.rand(6, 4, 3, 3) > 0.5),
            torch.randn(2, 4, 8, 8),
        ),
    ):
        half = x.to(dtype).requires_grad_()
        wide = half.detach().float().requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.append((t.dtype, t.numel())), t)[1], lambda t: t
        ):
            y = layer(half)
        assert y.dtype == dtype
        assert (dtype, x.numel()) in kept
        assert (torch.float32, x.numel()) not in kept
        found = torch.autograd.grad(y.float().square().sum(), [half, layer.values, layer.bias])
        z = layer(wide)
        torch.testing.assert_close(y.float(), z, rtol=1e-2, atol=1e-2)
        expected = torch.autograd.grad(z.square().sum(), [wide, layer.values, layer.bias])
        assert found[0].dtype == dtype
        assert found[1].dtype == torch.float32
        for left, right in zip(found, expected, strict=True):
            scale = float(right.abs().max())
            torch.testing.assert_close(left.float(), right, rtol=0.05, atol=0.02 * scale)


def test_training_under_autocast_with_clipping_moves_connections():
    model = sparse_training(net(), 0.7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    driver = dynamic(model, optimizer, 30, every=3)
    start = model[3].mask()
    losses = []
    for step in range(30):
        generator = torch.Generator().manual_seed(step % 3)
        x = torch.randn(16, 2, 5, 5, generator=generator)
        for part in (x[:8], x[8:]):  # gradients of two backward passes add up
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(part), part[:, 0, 0, :4].argmax(1))
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert driver.step == 30
    assert not torch.equal(model[3].mask(), start)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])

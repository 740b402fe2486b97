"""Early birds: masks, distances and the epoch by hand; killed and resumed in between."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunus import attach, methods
from prunus.errors import ValueRangeError


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


class Killed(BaseException):
    """What ends a run between two epochs."""


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.b, self.m = nn.ConvTranspose2d(6, 5, 2), nn.BatchNorm2d(5)
        self.out = nn.Linear(5, 2)

    def forward(self, x):
        x = torch.relu(self.m(self.b(torch.relu(self.n(self.a(x))))))
        return self.out(x.mean((2, 3)))


def drift(model, optimizer, epoch):
    """An 'epoch' that moves the scales ever less."""
    generator = torch.Generator().manual_seed(epoch)
    with torch.no_grad():
        for norm in (model.n, model.m):
            noise = torch.randn(norm.weight.shape, generator=generator)
            norm.weight.add_(noise * 2.0 ** (1 - epoch))
        for layer in (model.a, model.b):
            noise = torch.randn(layer.weight.shape, generator=generator)
            layer.weight.add_(noise * 0.5 ** (1 + epoch))
    return epoch * 1.5


def bits_by_hand(model, scope, sparsity):
    if scope == "channel":
        parts = [model.n.weight.detach().abs(), model.m.weight.detach().abs()]
    else:
        parts = [
            model.a.weight.detach().abs().reshape(-1),
            model.b.weight.detach().abs().reshape(-1),
        ]
    pool = torch.cat(parts)
    keep = round((1 - sparsity) * len(pool))
    bits = torch.zeros(len(pool), dtype=torch.bool)
    bits[pool.argsort(descending=True, stable=True)[:keep]] = True
    return bits


@pytest.mark.parametrize("scope", ["channel", "element"])
def test_early_bird_by_hand(scope, tmp_path):
    torch.manual_seed(1)
    model, twin = Conv(), Conv()
    twin.load_state_dict(model.state_dict())
    tolerance, window = (0.1, 3) if scope == "channel" else (0.03, 4)
    masks = []
    for epoch in range(40):
        drift(twin, None, epoch)
        masks.append(bits_by_hand(twin, scope, 0.6))
        recent = masks[-window:]
        distances = [float((masks[-1] != other).float().mean()) for other in recent[:-1]]
        if len(recent) == window and max(distances) <= tolerance:
            break
    assert 3 < epoch < 30
    arguments = {
        "sparsity": 0.6,
        "epochs": 40,
        "scope": scope,
        "tolerance": tolerance,
        "window": window,
        "inputs": torch.randn(2, 1, 8, 8),
        "exclude": "out",
        "progress": False,
    }
    first = Conv()
    first.load_state_dict(model.state_dict())

    def killed(model, optimizer, epoch):
        if epoch == 3:
            raise Killed
        return drift(model, optimizer, epoch)

    with pytest.raises(Killed):
        methods.early_bird(first, optimizer_of, killed, folder=tmp_path, **arguments)
    other = Conv()
    for one, folder in ((model, None), (other, tmp_path)):
        bird = methods.early_bird(one, optimizer_of, drift, folder=folder, **arguments)
        assert bird.found
        assert bird.epoch == epoch
        assert bird.distances == pytest.approx(distances)
        assert bird.results == tuple(1.5 * e for e in range(epoch + 1))
        flat = masks[-1]
        if scope == "channel":
            a, b = flat[:6], flat[6:]
            assert torch.equal(bird.masks["a.weight"], a.reshape(6, 1, 1, 1).expand(6, 1, 3, 3))
            assert torch.equal(bird.masks["b.weight"], b.reshape(1, 5, 1, 1).expand(6, 5, 2, 2))
        else:
            found = torch.cat([bird.masks[n].reshape(-1) for n in ("a.weight", "b.weight")])
            assert torch.equal(found, flat)
    held = attach(methods.fixed(bird.masks), model, optimizer_of(model))
    assert held.sparsity > 0.3


def test_an_early_bird_that_never_comes_and_a_loop_by_epochs():
    torch.manual_seed(2)
    x = torch.randn(4, 1, 8, 8)
    loop = methods.Loop([x, x, x], lambda m, batch: m(batch).square().mean(), 99)
    bird = methods.early_bird(
        Conv(),
        optimizer_of,
        loop,
        sparsity=0.5,
        epochs=3,
        scope="element",
        progress=False,
    )
    assert (bird.found, bird.epoch, len(bird.results)) == (False, 2, 3)
    with pytest.raises(ValueRangeError, match="window >= 2"):
        methods.early_bird(Conv(), optimizer_of, loop, sparsity=0.5, epochs=3, window=1)

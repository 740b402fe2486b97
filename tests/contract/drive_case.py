"""The network, the methods, the optimizers and the loop that the tests of `attach` share."""

from __future__ import annotations

import torch
from torch import nn

import prunus as pr
from prunus import methods

STEPS = 24


class Net(nn.Module):
    """A convolution, a norm and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4 * 6 * 6, 24)
        self.out = nn.Linear(24, 5)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(torch.relu(self.norm(self.conv(x))).flatten(1))))


METHODS = {
    "one_shot": lambda: methods.one_shot_magnitude(0.8, step=5),
    "gradual": lambda: methods.gradual_magnitude(0.9, STEPS, every=2),
    "gradual_global": lambda: methods.gradual_magnitude(
        0.9, STEPS, allocation=pr.allocations.floor(pr.allocations.global_())
    ),
    "random": lambda: methods.random_pruning(0.5),
    "snip": lambda: methods.snip(0.8),
    "synflow": lambda: methods.synflow(0.8, rounds=7),
    "set": lambda: methods.set_(0.8, STEPS, every=3),
    "rigl": lambda: methods.rigl(0.8, STEPS, every=3),
    "block": lambda: methods.one_shot_magnitude(
        0.5, structure=pr.structures.channel(), allocation=pr.allocations.uniform()
    ),
    "combined": lambda: pr.combine.by_site(
        {"conv": methods.one_shot_magnitude(0.5, step=2), "*": methods.rigl(0.8, STEPS, every=4)}
    ),
    "sequence": lambda: pr.combine.then(
        methods.gradual_magnitude(0.6, 8, every=1), 10, methods.one_shot_magnitude(0.8)
    ),
}

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-3),
}


def batch(step: int):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 1, 6, 6, generator=generator)
    return x, torch.randint(0, 5, (16,), generator=generator)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def loss_of(model, step):
    x, y = batch(step)
    return nn.functional.cross_entropy(model(x), y)


def train(model, optimizer, start, stop, after=lambda step: None):
    for step in range(start, stop):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        after(step)


def begin(method="gradual", optimizer="sgd", seed=0):
    model = net(seed)
    opt = OPTIMIZERS[optimizer](model.parameters())
    everything = {"include": ["conv", "hidden", "out"], "inputs": batch(0)[0], "seed": 3}
    return model, opt, pr.attach(METHODS[method](), model, opt, **everything)


def check_off_is_zero(model, attached):
    parameters = dict(model.named_parameters())
    for name, mask in attached.masks.items():
        values = parameters[name].detach()[~mask]
        assert torch.equal(values, torch.zeros_like(values)), name

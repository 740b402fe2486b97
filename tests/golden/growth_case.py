"""Three sites, drawn weights and a step-by-step driver for methods that move masks."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from prunus.core import Signals, Site

SHAPES = {"a": (9, 7), "b": (5, 12), "c": (4, 3, 2, 2)}
SITES = tuple(Site(name, shape) for name, shape in SHAPES.items())


def draw(key, scale=1.0):
    return {
        n: torch.from_numpy(np.random.default_rng([key, i]).normal(size=s) * scale)
        for i, (n, s) in enumerate(SHAPES.items())
    }


def best(scores, allowed, count):
    """The `count` highest allowed places of an array, ties to the lower index."""
    flat = np.where(allowed.reshape(-1), scores.reshape(-1), -np.inf)
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:count]] = True
    return mask.reshape(scores.shape)


def masks_of(state):
    return {
        n: state.masks[n].numpy() if n in state.masks else np.ones(s, bool)
        for n, s in SHAPES.items()
    }


def drive(method, steps, weights, gradients=None):
    """Yield (step, masks before, masks after, update) over simulated steps."""
    state = method.init(SITES, weights(0), 5)
    for step in range(steps):
        while (due := method.needs(state)) is not None:
            kinds = {kind: gradients(step) for kind in due}
            before = masks_of(state) if step else None
            result = method.update(state, SITES, weights(step), Signals(kinds))
            state = result.state
            yield step, before, masks_of(state), result
        state = state.next_step()


def model_and_data(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    return model.double(), torch.randn(16, 6).double(), torch.randint(0, 4, (16,))

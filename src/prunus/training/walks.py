"""The global moves of two methods: what all layers decide together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prunus import rng
from prunus.compose.redistribute import spread
from prunus.training.layers import distinct


def signs(places: Tensor, seed: int, name: str) -> Tensor:
    """The fixed sign of every place, 1.0 or -1.0: a bit of a hash (splitmix64's finaliser)."""
    start = int(torch.randint(1 << 62, (1,), generator=rng.generator((seed, name, "sign"))))
    mixed = (places + start) * -7046029254386353131  # 0x9E3779B97F4A7C15, modulo 2^64
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return torch.where((mixed >> 40) & 1 == 0, 1.0, -1.0)


def walk(
    layers: Mapping[str, tuple[Tensor, Tensor, int]],
    grads: Mapping[str, Tensor | None],
    lr: float,
    drift: float,
    noise: float,
    step: int,
    seed: int,
) -> dict[str, tuple[Tensor, Tensor, int]]:
    """One step of a walk: theta <- theta - drift + noise n, with w = sign theta.

    {name: (values, places, free)} -> {name: (new values, drop, grow)}. Dormant become those with
    theta < 0; as many of all free places, of all layers alike, wake up. Step 0 gives every weight
    its sign and moves nothing. A weight at 0 has just woken up and waits for its first gradient,
    which the coming step applies: it stays if theta - lr sign grad does not fall below 0.
    """
    values, drops = {}, {}
    for name, (held, places, _) in layers.items():
        sign = signs(places, seed, name).to(held)
        if step == 0:
            values[name], drops[name] = held.abs() * sign, torch.zeros(len(held), dtype=torch.bool)
            continue
        normal = torch.randn(len(held), generator=rng.generator((seed, step, name, "noise")))
        theta = sign * held - drift + noise * normal.to(held)
        fresh, grad = held == 0, grads[name]
        ahead = theta if grad is None else theta - lr * sign * grad
        drops[name] = torch.where(fresh, ahead, theta) < 0
        values[name] = sign * theta.clamp(min=0).masked_fill(fresh, 0.0)
    free = torch.tensor([spare for _, _, spare in layers.values()])
    missing = min(sum(int(d.sum()) for d in drops.values()), int(free.sum()))
    drawn = distinct(int(free.sum()), missing, (seed, step, "wake"))
    counts = torch.bincount(torch.bucketize(drawn, free.cumsum(0), right=True), minlength=len(free))
    return {n: (values[n], drops[n], int(c)) for n, c in zip(layers, counts, strict=True)}


def reparameterize(
    stay: Mapping[str, Tensor],
    free: Mapping[str, int],
    limit: float,
    fraction: float,
    tolerance: float,
) -> tuple[Mapping[str, Tensor], dict[str, int], float]:
    """Return (what stays, how many each layer grows, the next threshold).

    stay: where |w| reached the threshold. More dropped than there are free places: nothing moves.
    """
    kept = sum(len(part) for part in stay.values())
    left = {name: int(part.sum()) for name, part in stay.items()}
    dropped = kept - sum(left.values())
    short = dropped > sum(free.values())
    wanted = fraction * kept
    if dropped < (1 - tolerance) * wanted and not short:
        limit *= 2
    elif dropped > (1 + tolerance) * wanted or short:
        limit /= 2
    if short:
        stay, left = (
            {n: torch.ones_like(s) for n, s in stay.items()},
            {n: len(s) for n, s in stay.items()},
        )
        dropped = 0
    return stay, spread(dropped, left, free, dict.fromkeys(left, 1)), limit

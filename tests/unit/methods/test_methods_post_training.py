"""Post-training methods on whole models: what they reach, what they leave, what they beat."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunus import methods, schedules, scores, solvers, structures
from prunus.compose import compose
from prunus.core import Solver
from prunus.drive import attach, prune
from prunus.errors import CompositionError, SignalError, ValueRangeError
from prunus.select import keep_top


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    ).eval()


def mixed(rows):
    """Correlated images."""
    noise = torch.randn(rows, 4, 4, 4)
    return noise + 2 * noise.roll(1, 1) + noise.mean((2, 3), keepdim=True)


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def images(count=3, rows=64):
    return [(mixed(rows), torch.arange(rows) % 4) for _ in range(count)]


EVERY = {
    "wanda": lambda s: methods.wanda(s),
    "sparsegpt": lambda s: methods.sparsegpt(s),
    "exact_obc": lambda s: methods.exact_obc(s),
    "alps": lambda s: methods.alps(s),
    "layerwise_obs": lambda s: methods.layerwise_obs(s),
    "woodfisher": lambda s: methods.woodfisher(s),
    "woodtaylor": lambda s: methods.woodfisher(s, taylor=True, damping=1e-3),
    "fisher": lambda s: methods.obd(s, diagonal="fisher"),
    "hutchinson": lambda s: methods.obd(s, diagonal="hutchinson"),
    "obs": lambda s: methods.obs(s, damping=0.1),
}


@pytest.mark.parametrize("name", EVERY)
def test_a_convolutional_model_reaches_the_sparsity_and_stays_finite(name):
    model = network()
    masks = prune(model, EVERY[name](0.5), batches=images(1, 16), loss=loss_of)
    sizes = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert abs(kept - sizes / 2) <= 12
    for key, mask in masks.items():
        w = model.get_parameter(key)
        assert bool((w[~mask] == 0).all())
        assert bool(torch.isfinite(w).all())
    if name in ("wanda", "fisher", "hutchinson"):
        before = dict(network().named_parameters())
        assert all(
            torch.equal(model.get_parameter(key), before[key] * mask) for key, mask in masks.items()
        )


def test_solvers_that_repair_beat_the_magnitude_on_data_they_have_not_seen():
    torch.manual_seed(5)
    calibration, fresh = images(), mixed(200)
    dense = network()(fresh)
    errors = {}
    for name in ("wanda", "sparsegpt", "exact_obc", "alps", "layerwise_obs"):
        model = network()
        prune(model, EVERY[name](0.5), batches=calibration, loss=loss_of)
        errors[name] = float((model(fresh) - dense).square().mean().detach())
    model = network()
    prune(model, methods.one_shot_magnitude(0.5))
    plain = float((model(fresh) - dense).square().mean().detach())
    for name in ("sparsegpt", "exact_obc", "alps", "layerwise_obs"):
        assert errors[name] < 0.8 * plain, (name, errors, plain)


def test_wanda_keeps_as_many_of_every_output():
    model = network()
    masks = prune(model, methods.wanda(0.75), batches=[x for x, _ in images(1)])
    for mask in masks.values():
        assert mask.flatten(1).sum(1).unique().numel() == 1


@pytest.mark.parametrize("method", [methods.wanda, methods.sparsegpt, methods.alps])
def test_two_of_four(method):
    model = network()
    masks = prune(
        model,
        method(0.5, structure=structures.n_of_m(2, 4)),
        batches=[x for x, _ in images(1)],
    )
    for mask in masks.values():
        groups = mask.movedim(1, -1).reshape(-1, 4).sum(1)
        assert bool((groups == 2).all())


def test_a_pinned_structure_and_another_sparsity_do_not_go_together():
    with pytest.raises(CompositionError, match="pins its own sparsity"):
        methods.sparsegpt(0.7, structure=structures.n_of_m(2, 4))
    with pytest.raises(ValueRangeError, match="'fisher', got 'guess'"):
        methods.obd(0.5, diagonal="guess")


@pytest.mark.parametrize("solver", [solvers.sparsegpt(4), solvers.exact_obc(), solvers.alps(50)])
def test_what_is_off_stays_off_when_a_model_is_pruned_again(solver: Solver):
    model = network()
    method = compose(scores.magnitude(), schedule=schedules.iterative(0.8, 2, 1), solve=solver)
    seen = []

    def watch(m, batch):
        seen.append({n: p.detach() == 0 for n, p in m.named_parameters() if p.ndim > 1})
        return loss_of(m, batch)

    masks = prune(model, method, batches=images(1, 16), loss=watch)
    assert len(seen) == 2
    for name, mask in masks.items():
        assert not bool((mask & seen[1][name]).any())
        assert int(mask.sum()) == pytest.approx(0.2 * mask.numel(), abs=1)


def test_they_work_attached_to_an_optimizer_with_one_batch_of_inputs():
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = attach(methods.sparsegpt(0.5), model, optimizer, inputs=mixed(64))
    for x, y in images(2):
        optimizer.zero_grad()
        loss_of(model, (x, y)).backward()
        optimizer.step()
    assert held.sparsity == pytest.approx(0.5, abs=1e-3)
    assert int((model[0].weight == 0).sum()) == model[0].weight.numel() // 2


def test_without_data_they_say_what_they_need():
    with pytest.raises(SignalError, match="reads the inputs of layers: pass batches="):
        prune(network(), methods.sparsegpt(0.5))
    with pytest.raises(SignalError, match="pass batches= and loss="):
        prune(network(), methods.woodfisher(0.5), batches=[mixed(2)])


def test_half_precision_weights_are_solved_in_float64_and_come_back_in_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)).bfloat16()
    x = torch.randn(40, 16).bfloat16()
    for make in (methods.wanda, methods.sparsegpt, methods.exact_obc, methods.alps):
        prune(model, make(0.5), batches=[x])
        assert model[0].weight.dtype == torch.bfloat16
        assert int((model[0].weight == 0).sum()) >= 64


def test_wanda_masks_by_hand_in_a_convolution():
    torch.manual_seed(0)
    model, x = nn.Conv2d(2, 3, 2), torch.randn(5, 2, 4, 4)
    w = model.weight.detach().clone()
    masks = prune(model, methods.wanda(0.5), batches=[x])
    patches = nn.functional.unfold(x, 2).transpose(1, 2).flatten(0, 1)
    ranked = w.flatten(1).abs() * patches.norm(dim=0)
    assert torch.equal(masks["weight"].flatten(1), keep_top(ranked, 4))

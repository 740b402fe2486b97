"""Whole outputs of the network itself stay, unless the user names their layer."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import prunus as pr
from prunus import allocations, schedules, scores, structures
from prunus.compose import compose
from prunus.drive.ends import ends

MAGNITUDE = compose(scores.magnitude(), schedule=schedules.one_shot(0.6))


class Late(nn.Module):
    """The classifier is registered first and runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(6, 3)
        self.conv = nn.Conv2d(1, 6, 3)
        self.hidden = nn.Conv2d(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(torch.relu_(self.conv(x)))
        return self.classifier(x.mean((2, 3))).log_softmax(1)


class Boxes(nn.Module):
    """Two answers, each from a layer of its own, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.boxes = nn.Linear(5, 3), nn.Linear(5, 4)
        self.body = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x).relu()
        return {"classes": self.classes(h) * 2 + 1, "boxes": self.boxes(h).exp()}


class Stream(nn.Module):
    """A residual stream: both layers add to what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return self.norm(x + self.second(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.embed = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.attend(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 5)
        self.embed = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.embed(x))[0]


@pytest.mark.parametrize(
    ("model", "shape", "found"),
    [
        (Late(), (2, 1, 8, 8), {"classifier.weight"}),
        (Boxes(), (2, 4), {"classes.weight", "boxes.weight"}),
        (Stream(), (2, 4), {"second.weight"}),
        (Attention(), (2, 3, 3), {"attend.out_proj.weight"}),
        (Recurrent(), (2, 3, 3), {"cell.weight_ih_l0", "cell.weight_hh_l0"}),
    ],
)
def test_ends_are_followed_back_from_the_outputs(model, shape, found) -> None:
    model.requires_grad_(False)
    assert ends(model, torch.randn(shape)) == found
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert model.training


def test_without_inputs_it_is_the_last_registered() -> None:
    assert ends(Boxes()) == {"body.weight"}
    assert ends(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))) == {"2.weight"}


def test_a_forward_without_gradients_counts_as_no_inputs() -> None:
    class Still(Late):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    assert ends(Still(), torch.randn(2, 1, 8, 8)) == {"hidden.weight"}


STRUCTURES = [
    structures.neuron("mean"),
    structures.channel(0, "mean"),
    structures.head(2),
    structures.layer(),
]


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.name)
def test_prune_leaves_the_classifier(structure) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    allocation = allocations.global_()
    method = compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocation,
        schedule=schedules.one_shot(0.5),
    )
    with pytest.warns(UserWarning, match=r"4\.weight are the network's own"):
        masks = pr.prune(model, method)
    assert masks
    assert set(masks) <= {"0.weight", "2.weight"}
    assert bool((model[4].weight != 0).all())


def test_whoever_names_the_classifier_is_obeyed() -> None:
    method = pr.methods.geometric_median(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = pr.prune(Late(), method, include=["conv", "classifier"])
        assert set(masks) == {"conv.weight", "classifier.weight"}
        model, inputs = Late(), torch.randn(2, 1, 8, 8)
        masks = pr.prune(model, method, exclude="classifier", inputs=inputs)
        assert set(masks) == {"conv.weight", "hidden.weight"}  # the next to last does not move up
        only = nn.Sequential(nn.Linear(4, 4))
        assert set(pr.prune(only, method)) == {"0.weight"}  # nothing else to prune


def test_methods_of_single_weights_and_of_inputs_take_every_layer() -> None:
    inputs = structures.channel(1, "mean")
    parts = {"structure": inputs, "schedule": schedules.one_shot(0.5)}
    for method in (MAGNITUDE, compose(scores.magnitude(), **parts)):
        assert "classifier.weight" in pr.prune(Late(), method)


def test_attach_leaves_it_too_and_a_checkpoint_returns() -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = Late()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = pr.combine.then(pr.methods.geometric_median(0.5), 2, MAGNITUDE)
        with pytest.warns(UserWarning, match=r"classifier\.weight are the network's own"):
            pr.attach(method, model, optimizer, inputs=torch.randn(2, 1, 8, 8))
        return model, optimizer

    model, optimizer = start()
    optimizer.step()
    assert set(pr.attached(model).masks) == {"conv.weight", "hidden.weight"}
    twin, other = start()
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for name, mask in pr.attached(model).masks.items():
        assert torch.equal(mask, pr.attached(twin).masks[name])


def test_a_rule_of_by_site_names_the_classifier() -> None:
    rules = {
        "classifier": MAGNITUDE,
        "*": pr.methods.geometric_median(0.5),
    }
    assert "classifier.weight" in pr.prune(Late(), pr.combine.by_site(rules))

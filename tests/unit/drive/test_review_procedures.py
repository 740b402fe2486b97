"""What a reviewer found in procedures and their arguments: each would fail before its repair."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import prunus as pr
from prunus import methods, scores
from prunus.errors import NotFiniteError, ShapeError, SignalError, TargetError, ValueRangeError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def pair():
    g = torch.Generator().manual_seed(1)
    return torch.randn(32, 8, generator=g), torch.randint(0, 4, (32,), generator=g)


INPUT_METHODS = [
    methods.thinet,
    methods.channel_lasso,
    methods.merge_similar,
    methods.fold_constant,
    methods.greedy_forward,
]


@pytest.mark.parametrize("method", INPUT_METHODS, ids=lambda m: m.__name__)
def test_a_depthwise_layer_keeps_its_one_input(method):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 4, 1)
    )
    x = [torch.randn(2, 3, 6, 6)]
    pr.prune(model, method(0.25), batches=x, exclude="0")
    assert bool((model[1].weight != 0).all())
    total = sum(model[i].weight.numel() for i in (1, 2, 3))
    off = sum(int((model[i].weight == 0).sum()) for i in (2, 3))
    assert abs(off - 0.25 * total) <= 16
    with pytest.raises(TargetError, match=r"1\.weight"):
        pr.prune(model, method(0.999), batches=x, exclude="0")


def test_a_layer_with_one_output_keeps_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 1))
    pr.prune(model, methods.apoz(0.5), batches=[torch.randn(16, 8)], include="*.weight")
    assert bool((model[2].weight != 0).all())


@pytest.mark.parametrize("scan", ["sensitivity", "evolve"])
def test_searches_give_buffers_and_modes_back(scan):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def recalibrated(*_):
        model.train()
        return float(model(pair()[0] + 5).square().mean())

    if scan == "sensitivity":
        pr.drive.sensitivity(model, methods.one_shot_magnitude, recalibrated, sparsities=(0.0, 0.5))
    else:
        pr.search.evolve(
            model, lambda a: methods.one_shot_magnitude(0.5, allocation=a), recalibrated,
            sparsity=0.5,
            population=4, generations=1,
        )  # fmt: skip
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Loader:
    """Gives its batches anew, and notes how many are alive at the same time."""

    def __init__(self):
        self.listed = 0

    def __iter__(self):
        for _ in range(4):
            self.listed += 1
            yield pair()[0]

    def __len__(self):
        raise AssertionError("nobody asks how many there are")  # list() does


def test_a_loader_is_not_read_into_memory():
    loader = Loader()
    pr.prune(network(), methods.wanda(0.5), batches=loader)
    assert loader.listed == 4


def test_a_generator_serves_all_rounds():
    def train(model, optimizer, start):
        optimizer.step()

    tickets = methods.train_prune_finetune(
        network(), lambda m: torch.optim.SGD(m.parameters(), 0.1), train,
        sparsity=0.5, rounds=2, fine_tune=train, score=scores.wanda(),
        batches=(pair()[0] for _ in range(2)),
    )  # fmt: skip
    assert tickets[-1].sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_woodtaylor_at_its_defaults_does_no_harm(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    batch = torch.randn(64, 8), torch.randint(0, 4, (64,))
    before = loss(model, batch).item()
    pr.prune(model, methods.woodfisher(0.1, taylor=True), batches=[batch], loss=loss)
    assert loss(model, batch).item() < before


def test_progress_is_told_of_every_round():
    seen = []
    pr.prune(
        network(), methods.synflow(0.5, rounds=20), inputs=torch.randn(2, 8),
        progress=lambda done, of, name: seen.append((done, of)),
    )  # fmt: skip
    assert len(seen) == 21
    assert seen[-1] == (1, 1)


def test_blocks_without_sequential_are_refused():
    with pytest.raises(SignalError, match="sequential=True"):
        pr.prune(network(), methods.one_shot_magnitude(0.5), blocks="nonsense")


def test_net_trim_names_a_grouped_transposed_convolution():
    model = nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=2))
    with pytest.raises(ShapeError, match=r"0\.weight"):
        pr.prune(model, methods.net_trim(0.5), batches=[torch.randn(2, 4, 5, 5)])


def test_eigendamage_names_the_site_of_data_that_are_not_finite():
    x, y = pair()
    with pytest.raises(NotFiniteError, match=r"weight"):
        pr.drive.eigendamage(network(), 0.5, batches=[(x * float("nan"), y)], loss=loss)


def test_attention_is_named_where_its_inputs_cannot_be_seen():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(SignalError, match="MultiheadAttention"):
        pr.prune(model, methods.wanda(0.5), batches=[torch.randn(2, 5, 16)], exclude="*in_proj*")


@pytest.mark.parametrize("method", [methods.wanda, methods.apoz], ids=["wanda", "apoz"])
def test_batches_with_targets_want_a_loss(method):
    with pytest.raises(SignalError, match="loss="):
        pr.prune(network(), method(0.5), batches=[pair()], include="*.weight")
    with pytest.raises(SignalError, match="loss="):
        pr.prune(network(), method(0.5), batches=pair(), include="*.weight")


def test_a_flag_is_no_sparsity():
    with pytest.raises(ValueRangeError, match="True"):
        methods.one_shot_magnitude(True)

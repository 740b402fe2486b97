"""What stays as it was when layers are swapped, what is refused, and layers in several threads."""

from __future__ import annotations

import copy
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn

import prunus as pr
from prunus.errors import (
    CompositionError,
    FormatError,
    ShapeError,
    SiteError,
    TargetError,
    ValueRangeError,
)
from prunus.training import Pattern, TrainableConv2d, TrainableLinear, average, dynamic, to_dense
from prunus.training import products as products_


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 40), nn.Linear(40, 8))


def stepped(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_layers_of_torch_compute_in_eval_mode(padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    x, mask = torch.randn(2, 6, 32), None
    if padded:
        mask = torch.zeros(2, 6, dtype=torch.bool)
        mask[1, 4:] = True
    pr.sparse_training(model, 0.8)
    model.train()
    wanted = model(x, src_key_padding_mask=mask)
    with torch.no_grad():
        found = model.eval()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-6)
    to_dense(model)
    with torch.no_grad():
        again = model(x, src_key_padding_mask=mask)
    here = slice(None) if mask is None else ~mask
    torch.testing.assert_close(again[here], found[here], rtol=1e-4, atol=1e-5)
    assert model.layers[0].activation_relu_or_gelu
    assert model.use_nested_tensor


def test_frozen_layers_stay_frozen_and_do_not_move():
    model = network()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    pr.sparse_training(model, 0.8)
    learns = [(m.values.requires_grad, m.bias.requires_grad) for m in (model[0], model[2])]
    assert learns == [(False, False), (True, False)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    frozen, moving = model[0].pattern, model[2].pattern
    held = dynamic(model, optimizer, 100, every=2, fraction=0.5)
    for _ in range(3):
        stepped(model, optimizer, torch.randn(16, 24))
    assert model[0].pattern is frozen
    assert model[2].pattern is not moving
    # frozen later
    model[2].requires_grad_(False)
    moving, last = model[2].pattern, model[3].pattern
    for _ in range(2):
        stepped(model, optimizer, torch.randn(16, 24))
    assert model[2].pattern is moving
    assert model[3].pattern is not last
    held.detach()
    dense = to_dense(model)
    assert not dense[0].weight.requires_grad
    assert dense[3].weight.requires_grad


def test_a_model_that_is_frozen_as_a_whole_has_nothing_to_move():
    model = pr.sparse_training(network(), 0.8).requires_grad_(False)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(pr.errors.AttachError, match="frozen"):
        dynamic(model, optimizer, 100)


def test_biases_stay_shared_and_hooks_stay():
    model, seen = network(), []
    model.append(nn.Linear(8, 8))
    model[4].bias = model[3].bias
    bias = model[3].bias
    handle = model[0].register_forward_hook(lambda m, args, y: seen.append(type(m).__name__))
    model[0].register_forward_pre_hook(lambda m, a, k: seen.append("before"), with_kwargs=True)
    pr.sparse_training(model, 0.7)
    assert model[3].bias is bias
    assert model[4].bias is bias
    model(torch.randn(2, 24))
    assert seen == ["before", "TrainableLinear"]
    to_dense(model)(torch.randn(2, 24))
    assert seen[2:] == ["before", "Linear"]
    assert model[3].bias is bias
    handle.remove()
    model(torch.randn(2, 24))
    assert seen[4:] == ["before"]


def test_a_hook_on_the_gradient_of_a_weight_is_refused_and_nothing_is_swapped():
    model = network()
    model[3].weight.register_hook(lambda grad: grad * 2)
    with pytest.raises(SiteError, match=r"3\.weight.*hooks"):
        pr.sparse_training(model, 0.8)
    assert all(type(m) is nn.Linear for m in (model[0], model[2], model[3]))
    pr.sparse_training(model, 0.8, exclude="3*")


def masks_of(model):
    return {f"{i}.weight": torch.rand(model[i].weight.shape) > 0.8 for i in (0, 2)}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda mask: mask.t(),
        lambda mask: mask.float(),
        lambda mask: mask[:-1],
        lambda mask: mask.numpy(),
        lambda mask: mask.reshape(-1),
    ],
)
def test_masks_that_do_not_fit_are_refused_by_name(spoil):
    model = network()
    masks = masks_of(model)
    masks["2.weight"] = spoil(masks["2.weight"])
    with pytest.raises(ShapeError, match=r"2\.weight.*bool"):
        pr.sparse_training(model, masks=masks)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    "beside",
    [
        {"sparsity": 0.5},
        {"structure": pr.structures.block(4, 4)},
        {"allocation": pr.allocations.uniform()},
    ],
)
def test_masks_and_a_sparsity_contradict_each_other(beside):
    model = network()
    with pytest.raises(CompositionError, match="masks"):
        pr.sparse_training(model, masks=masks_of(model), **beside)


def test_nothing_to_leave_out_is_an_error():
    with pytest.raises(TargetError, match="nothing is off"):
        pr.sparse_training(network(), 0.0)


def test_a_model_that_is_one_layer():
    layer = nn.Linear(24, 8)
    with pytest.raises(SiteError, match="from_dense"):
        pr.sparse_training(layer, 0.8)
    packed = TrainableLinear.from_dense(layer, torch.rand(8, 24) > 0.5)
    dense = to_dense(packed)
    assert type(dense) is nn.Linear
    x = torch.randn(3, 24)
    torch.testing.assert_close(dense(x), packed(x))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_inputs_that_are_no_real_numbers_are_refused(dtype):
    layer = TrainableLinear.random(24, 8, 0.5)
    with pytest.raises(ValueRangeError, match="floating"):
        layer(torch.ones(2, 24).to(dtype))
    conv = TrainableConv2d.from_dense(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueRangeError, match="floating"):
        conv(torch.ones(1, 3, 8, 8).to(dtype))


def test_a_layer_of_no_features_is_refused():
    with pytest.raises(ShapeError, match="-1"):
        TrainableLinear.random(-1, 8, 0.5)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("columns", lambda t: t.int() + 65536),
        ("columns", lambda t: t.float()),
        ("offsets", lambda t: t.long() + 2**32),
        ("offsets", lambda t: t[None]),
        ("offsets", lambda t: t.tolist()),
        ("values", lambda t: t.tolist()),
        ("columns", lambda t: None),
    ],
)
def test_hostile_indices_are_refused_and_change_nothing(name, change):
    layer = TrainableLinear.random(24, 8, 0.5)
    state, x = layer.state_dict(), torch.randn(2, 24)
    wanted = layer(x)
    state[name] = change(state[name])
    with pytest.raises(RuntimeError, match="values: "):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), wanted)


def test_a_pattern_takes_columns_as_numbers_or_as_bits():
    columns = torch.tensor([0, 40000, 65535])
    wide = Pattern((1, 65536), torch.tensor([0, 3]), columns)
    bits = Pattern((1, 65536), torch.tensor([0, 3]), wide.columns)
    assert wide.places().tolist() == bits.places().tolist() == [0, 40000, 65535]
    assert torch.equal(wide.key, bits.key)
    other = Pattern((1, 65536), torch.tensor([0, 3]), columns - 1 * (columns > 0))
    assert not torch.equal(wide.key, other.key)


def test_threads_that_share_a_layer_do_not_disturb_each_other():
    torch.manual_seed(0)
    layer = TrainableLinear.random(300, 200, 0.8)
    inputs = [torch.randn(40, 300, requires_grad=True) for _ in range(4)]
    layers = [copy.deepcopy(layer) for _ in inputs]
    for i, each in enumerate(layers):  # the same pattern, other values
        each.values.data.mul_(i + 1)
    pairs = zip(layers, inputs, strict=True)
    wanted = [torch.autograd.grad(m(x).square().sum(), x)[0] for m, x in pairs]
    wrong = []

    def work(i):
        torch.set_num_threads(1)
        for _ in range(60):
            found = torch.autograd.grad(layers[i](inputs[i]).square().sum(), inputs[i])[0]
            if not torch.allclose(found, wanted[i], rtol=1e-4, atol=1e-4):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_products_in_torch_hold_one_block_of_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(products_, "BLOCK", 1 << 10)
    live, most, unpacked = set(), [0], products_.unpacked

    def counted(*given):
        part = unpacked(*given)
        live.add(id(part))
        weakref.finalize(part, live.discard, id(part))
        most[0] = max(most[0], len(live))
        return part

    monkeypatch.setattr(products_, "unpacked", counted)
    layer = TrainableLinear.random(256, 64, 0.5)
    layer.native = False
    x = torch.randn(3, 256, requires_grad=True)
    y = layer(x)
    dense = layer.dense_weight()
    torch.testing.assert_close(y, x @ dense.t() + layer.bias, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 64) @ dense, rtol=1e-4, atol=1e-4)
    assert most[0] <= 2


def test_averages_of_packed_layers_follow_places():
    model = network()
    pr.sparse_training(model, 0.7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    dynamic(model, optimizer, 100, every=2, fraction=0.5)
    mine, decay = copy.deepcopy(model), 0.9
    wanted = [m.dense_weight().double() for m in mine if isinstance(m, TrainableLinear)]
    bias = mine[0].bias.detach().double()
    for _ in range(6):
        stored = [m.mask() for m in model if isinstance(m, TrainableLinear)]
        stepped(model, optimizer, torch.randn(32, 24))
        average(mine, model, decay)
        bias = decay * bias + (1 - decay) * model[0].bias.detach().double()
        layers = [m for m in model if isinstance(m, TrainableLinear)]
        for i, layer in enumerate(layers):
            new = layer.dense_weight().double()
            stays = layer.mask() & stored[i]
            moved = torch.where(stays, decay * wanted[i] + (1 - decay) * new, new)
            wanted[i] = moved.masked_fill(~layer.mask(), 0.0)
    copies = [m for m in mine if isinstance(m, TrainableLinear)]
    for layer, weight in zip(copies, wanted, strict=True):
        torch.testing.assert_close(layer.dense_weight().double(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine[0].bias.double(), bias, rtol=1e-5, atol=1e-6)
    mine(torch.randn(2, 24)).sum().backward()
    with pytest.raises(ShapeError, match="not a copy"):
        average(mine, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueRangeError, match="decay"):
        average(mine, model, 1.5)


@pytest.mark.parametrize("buffers", [False, True])
def test_an_average_by_index_is_refused_once_connections_moved(buffers):
    model = network()
    pr.sparse_training(model, 0.7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    dynamic(model, optimizer, 100, every=3, fraction=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        averaged = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=buffers
        )
    x = torch.randn(8, 24)
    for _ in range(2):
        stepped(model, optimizer, x)
        averaged.update_parameters(model)
    averaged(x)
    for _ in range(4):
        stepped(model, optimizer, x)
        averaged.update_parameters(model)
    with pytest.raises(FormatError, match="average"):
        averaged(x)
    with pytest.raises(FormatError, match="average"):
        to_dense(averaged.module)


def test_whole_outputs_of_the_last_layer_stay_unless_they_are_named():
    model, structure = network(), pr.structures.channel(0)
    with pytest.warns(UserWarning, match=r"3\.weight"):
        pr.sparse_training(model, 0.5, structure=structure)
    assert type(model[3]) is nn.Linear
    assert isinstance(model[2], TrainableLinear)
    model = pr.sparse_training(network(), 0.5, structure=structure, include="*")
    assert isinstance(model[3], TrainableLinear)

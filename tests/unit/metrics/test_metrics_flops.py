from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prunus.metrics import flops


def halve(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.fill_(1.0).view(-1)[::2] = 0.0


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_two_per_multiply_add(bias):
    layer = nn.Linear(7, 5, bias=bias)
    assert flops(layer, torch.ones(3, 7)).dense == 2 * 3 * 7 * 5
    assert flops(layer, torch.ones(2, 3, 7)).dense == 2 * 2 * 3 * 7 * 5


@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 0, 1), (2, 1, 1), (1, 2, 4)])
def test_convolution_by_brute_force(stride, padding, groups):
    layer = nn.Conv2d(8, 12, (3, 2), stride=stride, padding=padding, groups=groups)
    image = torch.ones(2, 8, 9, 10)
    output = layer(image)
    per_entry = (8 // groups) * 3 * 2
    assert flops(layer, image).dense == 2 * output.numel() * per_entry


def test_sparse_follows_each_weight():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 4))
    halve(model[0].weight)
    halve(model[0].bias)  # a bias costs nothing, its zeros save nothing
    result = flops(model, torch.ones(3, 10))
    assert dict(result.modules) == {"0": (1200, 600.0), "2": (480, 480.0)}
    assert (result.dense, result.sparse) == (1680, 1080.0)


def test_transformer_block_by_hand_and_by_torchs_counter():
    width, tokens, hidden, batch = 16, 6, 32, 2
    block = nn.TransformerEncoderLayer(width, 4, hidden, batch_first=True)
    inputs = torch.ones(batch, tokens, width)
    halve(block.linear1.weight)
    halve(block.self_attn.in_proj_weight)
    rows = batch * tokens
    projections = 2 * rows * width * 3 * width
    attention = 2 * 2 * batch * tokens * tokens * width
    output = 2 * rows * width * width
    mlp = 2 * rows * width * hidden
    result = flops(block, inputs)
    assert result.dense == projections + attention + output + 2 * mlp
    assert result.sparse == projections / 2 + attention + output + 1.5 * mlp

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        block(inputs)  # in training mode, where the layer is not fused
    assert counter.get_total_flops() == result.dense


def test_recurrent_layers_are_counted():
    layer = nn.LSTM(5, 7, batch_first=True)
    assert flops(layer, torch.ones(2, 3, 5)).dense == 2 * 2 * 3 * 4 * 7 * (5 + 7)


def test_a_module_that_reports_its_counts_is_counted_from_its_shape():
    class Packed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ torch.zeros(16, 8)  # its own products must not be counted as well

        def sparse_counts(self):
            return {"weight": ((8, 16), 32)}

    result = flops(nn.Sequential(Packed(), nn.Linear(8, 1)), torch.ones(3, 16))
    assert result.modules["0"] == (2 * 3 * 16 * 8, 2 * 3 * 32)
    assert result.dense == 2 * 3 * (16 * 8 + 8)


def test_the_model_comes_back_unchanged():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    flops(model, torch.randn(3, 4))
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled() == fast

"""What is seen of the inputs is what the weight is multiplied with, whatever the layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunus.drive import Sources, collect
from prunus.drive.signals import patches as patches_
from prunus.drive.signals.inputs import watching
from prunus.errors import SignalError, ValueRangeError
from prunus.kinds import GRAM, INPUT_SQUARE
from prunus.sites import find, parameters, turned


class Conv1D(nn.Module):
    """The transposed Linear of transformers."""

    def __init__(self, n_out, n_in):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out))

    def forward(self, x):
        return x @ self.weight


def sources(model, **given):
    found = find(model)
    return Sources(model, found, parameters(model, found), {}, **given)


def seen(model, *args):
    """What goes into each site: {site: [call][groups, n, columns]}."""
    found = {}

    def see(name, inputs):
        parts = torch.cat(list(inputs.patches()), dim=1)
        assert parts.shape[1] == inputs.rows
        found.setdefault(name, []).append(parts)

    site_list = find(model)
    with watching(model, site_list, parameters(model, site_list), see), torch.no_grad():
        output = model(*args)
    return found, output


def matrix(model):
    site = find(model)[0]
    return turned(site, model.get_parameter(site.name).detach()).flatten(1)


class SelfPadded(nn.Conv2d):
    """Pads its input itself, more behind than before, as TensorFlow's "SAME" does."""

    def forward(self, x):
        x = nn.functional.pad(x, (0, 1, 0, 1))
        if self.padding == "same":
            return nn.functional.conv2d(x, self.weight, padding="same", dilation=self.dilation)
        return nn.functional.conv2d(
            input=x, weight=self.weight, stride=self.stride, padding=0, groups=self.groups
        )


LAYERS = {
    "own padding": (SelfPadded(3, 4, 3, stride=2, padding=2, bias=False), (2, 3, 6, 8)),
    "own, grouped": (SelfPadded(4, 4, (3, 2), groups=2, bias=False), (2, 4, 5, 8)),
    "own, same": (SelfPadded(3, 4, (3, 5), padding="same", bias=False), (2, 3, 5, 8)),
    "linear": (nn.Linear(5, 3, bias=False), (2, 4, 5)),
    "Conv1D": (Conv1D(3, 5), (2, 4, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 9)),
    "dilated": (nn.Conv1d(4, 6, 3, dilation=2, padding="same", bias=False), (2, 4, 9)),
    "conv2d": (nn.Conv2d(3, 4, (2, 3), stride=(1, 2), padding=(1, 0), bias=False), (2, 3, 5, 7)),
    "circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", bias=False), (2, 3, 5, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2, bias=False), (2, 2, 3, 4, 3)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False), (2, 4, 4, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 4, 5)),
    "unbatched": (nn.Conv2d(3, 4, 3, bias=False), (3, 5, 5)),
}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_patches_times_the_matrix_of_the_weight_are_the_output(name, small, monkeypatch):
    if small:
        monkeypatch.setattr(patches_, "LIMIT", 1)
    layer, shape = LAYERS[name]
    found, output = seen(layer, torch.randn(shape))
    (x,) = found["weight"]
    w = matrix(layer)
    by_group = torch.stack(
        [rows @ part.T for rows, part in zip(x, w.chunk(len(x)), strict=True)], dim=1
    )  # [n, groups, outputs of a group]
    y = by_group.flatten(1)
    if name not in ("linear", "Conv1D"):
        y = y.T
        y = y.unflatten(1, (-1, *output.shape[-len(layer.kernel_size) :])).movedim(1, 0)
    torch.testing.assert_close(y.reshape(output.shape), output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, bias=False),
        nn.ConvTranspose1d(4, 6, 3, groups=2, dilation=2, bias=False),
        nn.ConvTranspose1d(4, 4, 2, groups=4, stride=3, bias=False),
    ],
)
def test_patches_of_a_transposed_convolution(layer):
    found, output = seen(layer, torch.randn(2, 4, 5))
    (x,) = found["weight"]
    y = x[0] @ matrix(layer).T  # [groups * batch * places, outputs of a group]
    y = y.reshape(layer.groups, 2, -1, y.shape[1]).permute(1, 0, 3, 2)
    torch.testing.assert_close(y.flatten(1, 2), output, rtol=1e-4, atol=1e-5)


def test_a_transposed_convolution_in_two_dimensions():
    layer = nn.ConvTranspose2d(3, 2, (2, 3), stride=(2, 1), padding=(0, 1), bias=False)
    found, output = seen(layer, torch.randn(2, 3, 4, 5))
    y = found["weight"][0][0] @ matrix(layer).T
    y = y.reshape(2, *output.shape[2:], 2).movedim(-1, 1)
    torch.testing.assert_close(y, output, rtol=1e-4, atol=1e-5)


def test_a_bilinear_layer_and_a_recurrent_cell():
    layer = nn.Bilinear(3, 4, 5, bias=False)
    found, output = seen(layer, torch.randn(6, 3), torch.randn(6, 4))
    torch.testing.assert_close(found["weight"][0][0] @ matrix(layer).T, output)
    cell = nn.LSTMCell(3, 4)
    x, h = torch.randn(5, 3), torch.randn(5, 4)
    found, _ = seen(cell, x, (h, torch.zeros(5, 4)))
    assert torch.equal(found["weight_ih"][0][0], x)
    assert torch.equal(found["weight_hh"][0][0], h)
    found, _ = seen(cell, x)
    assert not bool(found["weight_hh"][0].any())


# --- moments ----------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def test_moments_are_means_over_all_rows_of_all_batches():
    model = network()
    batches = [torch.randn(5, 2, 3, 3) + 1, torch.randn(2, 2, 3, 3)]
    got = collect(frozenset({INPUT_SQUARE, GRAM}), sources(model, batches=batches))
    x = torch.nn.functional.unfold(torch.cat(batches), 3, padding=1).double()
    x = x.unflatten(1, (2, 9)).permute(1, 0, 3, 2).flatten(1, 2)
    expected = x.transpose(1, 2) @ x / x.shape[1]
    gram = got.at("0.weight")[GRAM]
    assert gram.dtype == torch.float64
    assert gram.shape == (2, 9, 9)
    torch.testing.assert_close(gram, expected, rtol=1e-5, atol=1e-6)
    squares = got.at("0.weight")[INPUT_SQUARE]
    torch.testing.assert_close(squares, expected.diagonal(dim1=1, dim2=2), rtol=1e-5, atol=1e-6)
    model.eval()  # as the calibration ran it: no dropout, running statistics
    with torch.no_grad():
        z = torch.cat([model[:4](batch) for batch in batches]).double()
    torch.testing.assert_close(got.at("4.weight")[GRAM][0], z.T @ z / 7, rtol=1e-5, atol=1e-6)


def test_a_large_mean_does_not_lose_the_sum_in_float32():
    model = nn.Linear(1, 1)
    batches = [torch.full((1 << 12, 1), 1.0) for _ in range(3)] + [torch.full((1, 1), 1e-4)] * 50
    got = collect(frozenset({GRAM}), sources(model, batches=batches)).at("weight")[GRAM]
    rows = 3 * (1 << 12) + 50
    exact = (3 * (1 << 12) + 50 * float(torch.tensor(1e-4) ** 2)) / rows
    assert float(got) == pytest.approx(exact, rel=1e-13)


class Tied(nn.Module):
    """One matrix in two layers, one of which runs twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(self.first(x)))


def test_tied_weights_and_modules_that_run_twice_see_all_their_inputs():
    model, x = Tied(), torch.randn(6, 4)
    got = collect(frozenset({GRAM}), sources(model, batches=[x])).at("first.weight")[GRAM][0]
    with torch.no_grad():
        rows = torch.cat([x, model.first(x), model.first(model.first(x))]).double()
    torch.testing.assert_close(got, rows.T @ rows / 18, rtol=1e-5, atol=1e-6)


class Twin(nn.Module):
    """Two layers that read one tensor, which is written to between them if `write`."""

    def __init__(self, write):
        super().__init__()
        self.left, self.right, self.write = nn.Linear(3, 2), nn.Linear(3, 2), write

    def forward(self, x):
        x = x.clone()
        left = self.left(x)
        if self.write:
            x.mul_(2)
        return left + self.right(x)


@pytest.mark.parametrize(("write", "factor"), [(False, 1), (True, 4)])
def test_layers_that_share_their_input_are_computed_once_but_not_confused(write, factor):
    got = collect(frozenset({GRAM}), sources(Twin(write), batches=[torch.randn(5, 3)]))
    left, right = got.at("left.weight")[GRAM], got.at("right.weight")[GRAM]
    torch.testing.assert_close(right, left * factor)
    assert left.data_ptr() != right.data_ptr()


def test_nothing_of_the_model_is_touched():
    model = network().train()
    model[4].weight.grad = torch.ones_like(model[4].weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches = [torch.randn(4, 2, 3, 3)]
    state = torch.get_rng_state()
    collect(frozenset({GRAM}), sources(model, batches=batches))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert bool((model[4].weight.grad == 1).all())
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_may_be_arguments_or_belong_to_a_loss():
    model = nn.Bilinear(2, 3, 4)
    pair = (torch.randn(5, 2), torch.randn(5, 3))
    first = collect(frozenset({GRAM}), sources(model, batches=[pair])).at("weight")[GRAM]
    named = {"input1": pair[0], "input2": pair[1]}
    second = collect(frozenset({GRAM}), sources(model, inputs=named)).at("weight")[GRAM]
    with_loss = sources(model, batches=[[pair, 3]], loss=lambda m, b: m(*b[0]).sum())
    third = collect(frozenset({GRAM}), with_loss).at("weight")[GRAM]
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_an_argument_given_by_its_name_is_seen():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x):
            return self.inner(input=x)

    x = torch.randn(4, 3)
    got = collect(frozenset({GRAM}), sources(Named(), batches=[x])).at("inner.weight")[GRAM][0]
    torch.testing.assert_close(got, x.double().T @ x.double() / 4, rtol=1e-5, atol=1e-6)


def test_a_broken_call_leaves_no_hooks():
    model = network()
    with pytest.raises(RuntimeError):
        collect(frozenset({GRAM}), sources(model, batches=[torch.randn(4, 7, 3, 3)]))
    assert not any(module._forward_hooks for module in model.modules())


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize(
    ("model", "given", "error", "message"),
    [
        (nn.Linear(2, 2), {}, SignalError, "pass batches=, calibration data"),
        (nn.Linear(2, 2), {"batches": []}, ValueRangeError, "gave no batch"),
        (Idle(), {"batches": [torch.ones(1, 2)]}, SignalError, r"ran the module of 'idle\.weight'"),
        (nn.LSTM(2, 2), {"batches": [torch.ones(1, 2)]}, SignalError, "'weight_ih_l0'.*cannot be"),
    ],
)
def test_inputs_that_cannot_be_had_are_refused_with_the_remedy(model, given, error, message):
    with pytest.raises(error, match=message):
        collect(frozenset({INPUT_SQUARE}), sources(model, **given))

"""compile: which layers must stay dense, and what is refused outright."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from prunus.errors import ShapeError, ValueRangeError
from prunus.runtime import compile


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def forced(layer):
    return "csr"


def reasons(model):
    return {row.name: row.reason for row in model.plan.rows}


class Odd(nn.Module):
    """Layers that must stay dense, each for its own reason."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(8, 8)
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda module, args, output: output + 1)
        self.derived = type("MyLinear", (nn.Linear,), {})(8, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.narrow = nn.Linear(8, 8).half()
        self.plain = nn.Linear(8, 8)

    def forward(self, index):
        x = self.hooked(self.embed(index))
        x = self.normed(self.derived(x)) + self.attention(x, x, x)[0]
        x = self.narrow(x.half()).float()
        return self.head(self.plain(x))


def test_every_refusal_has_its_reason():
    torch.manual_seed(0)
    model, index = Odd(), torch.tensor([[1, 2, 3]])
    fast = compile(model, index, choose=forced)
    assert fast.plan.sparse_layers == ("plain",)
    expected = {
        "head": "its weight is shared by embed, head",
        "unused": "the example never reached it",
        "hooked": "it has forward hooks of its own",
        "derived": "MyLinear is not exactly nn.Linear",
        "normed": "ParametrizedLinear is not exactly nn.Linear",
        "attention.out_proj": "NonDynamicallyQuantizableLinear is not exactly nn.Linear",
        "narrow": "its weight is torch.float16 on cpu, "
        "kernels take float32 and bfloat16 on the CPU",
        "plain": "chosen by the caller",
    }
    assert reasons(fast) == expected
    torch.testing.assert_close(fast(index), model.eval()(index), rtol=1e-4, atol=1e-5)
    assert fast.head.weight is fast.embed.weight


def test_an_input_of_another_dtype_keeps_a_layer_dense():
    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.fc(x.bfloat16())

    fast = compile(Autocast(), draw(2, 6), choose=forced)
    assert reasons(fast) == {"fc": "its input is torch.bfloat16"}


def test_lazy_parameters_and_wrong_arguments_are_refused():
    with pytest.raises(ShapeError, match=r"'weight' has no shape yet"):
        compile(nn.LazyLinear(5), draw(2, 6))
    with pytest.raises(ValueRangeError, match="threads"):
        compile(nn.Linear(6, 5), draw(2, 6), threads=0)


def test_without_the_native_module_everything_stays_dense():
    code = (
        "import torch, prunus.runtime as r\n"
        "model = torch.nn.Linear(30, 20)\n"
        "torch.nn.init.zeros_(model.weight)\n"
        "fast = r.compile(model, torch.zeros(2, 30))\n"
        "print(type(fast).__name__, fast.plan.rows[0].reason, sep='|')\n"
        "y = r.compile(model, torch.ones(2, 30), choose=lambda layer: 'csr')(torch.ones(2, 30))\n"
        "print(torch.equal(y, model(torch.ones(2, 30))))\n"
    )
    environment = {**os.environ, "PRUNUS_NATIVE": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("Linear|no native module")
    assert second == "True"


class Conv1D(nn.Module):
    """The transposed linear layer of transformers."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight = nf, nn.Parameter(torch.randn(nx, nf))

    def forward(self, x):
        return x @ self.weight


class Unserved(nn.Module):
    """Layers that hold weights which no sparse kernel computes with."""

    def __init__(self):
        super().__init__()
        self.lstm, self.turned = nn.LSTM(8, 8, batch_first=True), Conv1D(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.cube = nn.ConvTranspose1d(8, 8, 1), nn.Conv3d(1, 1, 3, padding=1)
        self.plain = nn.Linear(8, 8)

    def forward(self, x):
        x = self.turned(self.lstm(x)[0])
        x = self.up(self.attention(x, x, x)[0].transpose(1, 2)).transpose(1, 2)
        return self.plain(self.cube(x[:, None, None])[:, 0, 0])


def test_sparse_weights_without_a_kernel_are_named():
    model = Unserved().eval()
    fast = compile(model, torch.randn(2, 5, 8), choose=lambda layer: "csr", minimum_sparsity=0.5)
    assert [row.name for row in fast.plan.rows] == ["attention.out_proj", "plain"]
    names = ("lstm.weight_hh_l0", "attention.in_proj_weight", "turned.weight", "up.weight")
    with torch.no_grad():
        for name in (*names, "cube.weight"):
            model.get_parameter(name).view(-1)[::2] = 0
            model.get_parameter(name).view(-1)[1] = 0
    fast = compile(model, torch.randn(2, 5, 8), choose=lambda layer: "csr", minimum_sparsity=0.5)
    assert {n: why for n, why in reasons(fast).items() if "kernel for" in why} == {
        "lstm.weight_hh_l0": "there is no sparse kernel for LSTM",
        "attention.in_proj_weight": "there is no sparse kernel for MultiheadAttention",
        "turned": "there is no sparse kernel for Conv1D",
        "up": "there is no sparse kernel for ConvTranspose1d",
        "cube": "there is no sparse kernel for Conv3d",
    }
    assert "no sparse kernel for Conv3d" in str(fast.plan)
    assert fast.plan.sparse_layers == ("plain",)

"""Random convolution networks and transformers, compiled so that the fused kernels run them.

The clock is replaced: what is not torch's always wins. Errors are held against those of torch's own
fp32 pass, both measured from float64.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunus import kernels
from prunus.runtime import compile, decide, whole

pytestmark = pytest.mark.skipif(kernels.network_ptr is None, reason="no native module")
SLOW = ("dense", "channels", "torch", "apart")


def biased_clock(seed: int):
    """Our kernels win; among themselves by chance."""
    draw = random.Random(seed)

    def interleaved(runs, *, budget):
        for run in runs.values():
            run()
        return {name: draw.uniform(1, 2) + 9.0 * name.startswith(SLOW) for name in runs}

    return interleaved


class Unit(nn.Module):
    """Convolutions with batch norms and activations, a shortcut around them."""

    def __init__(self, draw: random.Random, channels: int, outputs: int) -> None:
        super().__init__()
        stride = draw.choice((1, 1, 1, 2))
        inner = draw.choice((3, 8, 17))
        kinds = draw.choice((("full",), ("point", "full"), ("point", "deep", "point")))
        acts = [draw.choice((nn.ReLU, nn.ReLU6, nn.SiLU, nn.Identity)) for _ in kinds]
        widths = [channels, *[inner] * (len(kinds) - 1), outputs]
        parts: list[nn.Module] = []
        at = draw.randrange(len(kinds))
        for number, kind in enumerate(kinds):
            one, two = widths[number : number + 2]
            step = stride if number == at else 1
            parts.append(_convolution(draw, kind, one, two, step))
            parts += [nn.BatchNorm2d(two)] if draw.random() < 0.7 else []
            parts += [acts[number]()] if number + 1 < len(kinds) or draw.random() < 0.3 else []
        self.body = nn.Sequential(*parts)
        self.shortcut: nn.Module | None = None
        self.adds = draw.random() < 0.8
        if self.adds and (stride > 1 or channels != outputs):
            self.shortcut = nn.Conv2d(channels, outputs, 1, stride)
        self.last = draw.choice((nn.ReLU, nn.Identity, nn.ReLU6))()
        self.swapped = draw.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        """Images to images."""
        y = self.body(x)
        if self.adds:
            kept = x if self.shortcut is None else self.shortcut(x)
            y = kept + y if self.swapped else y + kept
        return self.last(y)


def _convolution(draw: random.Random, kind: str, one: int, two: int, stride: int) -> nn.Conv2d:
    bias = draw.random() < 0.5
    if kind == "point":
        return nn.Conv2d(one, two, 1, stride, bias=bias)
    size = draw.choice((3, 3, 5))
    # Sizes have to come out as those of a 1x1 convolution of this stride.
    groups = one if kind == "deep" and one == two else 1
    return nn.Conv2d(one, two, size, stride, size // 2, groups=groups, bias=bias)


def images(draw: random.Random) -> tuple[nn.Module, list[Any]]:
    """A network of units and pools, and two inputs."""
    channels = draw.choice((1, 3, 16))
    shape = (channels, draw.randint(5, 21), draw.randint(5, 21))
    parts: list[nn.Module] = []
    for _ in range(draw.randint(2, 4)):
        outputs = draw.choice((4, 8, 19, channels))
        parts.append(Unit(draw, channels, outputs))
        channels = outputs
        if draw.random() < 0.25:
            parts.append(draw.choice((nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(1, 2), nn.Dropout())))
    body = nn.Sequential(*parts)
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))
    chosen = body if draw.random() < 0.5 else model
    return chosen, [torch.randn((batch, *shape)) for batch in draw.sample((1, 2, 3, 5), 2)]


class Block(nn.Module):
    """A transformer's layer: norms before or after, heads that may share keys, a mask."""

    def __init__(self, draw: random.Random, width: int, heads: int, mask: str) -> None:
        super().__init__()
        self.heads, self.mask, self.before = heads, mask, draw.random() < 0.5
        self.groups = draw.choice([g for g in (1, 2, heads) if heads % g == 0])
        self.dim = draw.choice((1, 8, 16, 20))
        self.scale = draw.choice((None, 0.3))
        norm = draw.choice((nn.LayerNorm, nn.LayerNorm, nn.RMSNorm))
        bias = draw.random() < 0.7
        self.query = nn.Linear(width, heads * self.dim, bias)
        self.key = nn.Linear(width, self.groups * self.dim, bias)
        self.value = nn.Linear(width, self.groups * self.dim, bias)
        self.output = nn.Linear(heads * self.dim, width, bias)
        self.one, self.two = norm(width), norm(width)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width, bias)
        self.gate = nn.Linear(width, 24) if draw.random() < 0.4 else None
        self.act = draw.choice((nn.GELU, nn.SiLU, nn.ReLU, lambda: nn.GELU("tanh")))()
        self.hidden = draw.random() < 0.3

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens [batch, length, width] to the same."""
        if self.hidden and float(x.flatten()[0]) == 4711.0:
            return x
        mixed = self.mixed(self.one(x) if self.before else x, mask)
        x = x + mixed if self.before else self.one(mixed + x)
        fed = self.fed(self.two(x) if self.before else x)
        return fed + x if self.before else self.two(x + fed)

    def mixed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attention."""
        batch, length, _ = x.shape
        q = self.query(x).view(batch, length, self.heads, self.dim).transpose(1, 2)
        k = self.key(x).view(batch, length, self.groups, self.dim).transpose(1, 2)
        v = self.value(x).unflatten(-1, (self.groups, self.dim)).permute(0, 2, 1, 3)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.mask == "causal", scale=self.scale,
            enable_gqa=self.groups != self.heads,
        )  # fmt: skip
        return self.output(y.transpose(1, 2).reshape(batch, length, -1))

    def fed(self, x: Tensor) -> Tensor:
        """Feed-forward part."""
        hidden = self.act(self.up(x))
        return self.down(hidden if self.gate is None else hidden * self.gate(x))


class Stack(nn.Module):
    """Blocks that get the same mask."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens to tokens."""
        for block in self.blocks:
            x = block(x) if mask is None else block(x, mask)
        return x


def _mask(draw: random.Random, kind: str, shape: tuple[int, int, int, int]) -> Tensor | None:
    batch, heads, length, _ = shape
    if kind in ("none", "causal"):
        return None
    if kind == "padding":
        kept = torch.arange(length) < torch.randint(1, length + 1, (batch, 1))
        return kept[:, None, None, :]
    size = draw.choice(
        ((length, length), (batch, 1, length, length), (1, heads, length, length), (1, length))
    )
    if kind == "bool":
        return torch.rand(size) < 0.7  # a row may have nothing at all
    added = torch.randn(size)
    return added.masked_fill(torch.rand(size) < 0.3, -1e4)


def tokens(draw: random.Random) -> tuple[nn.Module, list[Any]]:
    """A transformer and two inputs."""
    width, heads = draw.choice((16, 24, 33)), draw.choice((1, 2, 3, 4, 6))
    kind = draw.choice(("none", "causal", "padding", "bool", "added"))
    model = Stack([Block(draw, width, heads, kind) for _ in range(draw.randint(1, 2))])
    inputs = []
    for length in draw.sample((7, 8, 9, 31, 65), 2):
        batch = draw.choice((1, 2, 3))
        mask = _mask(draw, kind, (batch, heads, length, length))
        x = torch.randn(batch, length, width)
        inputs.append(x if mask is None else (x, mask))
    return model, inputs


def drawn(seed: int, build: Any) -> tuple[nn.Module, list[Any]]:
    """The model with random sparse weights, and its inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draw = random.Random(seed)
        model, inputs = build(draw)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            values = torch.randn_like(tensor) * 0.5
            if tensor.dim() > 1:
                share = draw.choice((0.05, 0.3, 0.6, 1.0))
                fan = max(tensor[0].numel() * share, 1.0) ** 0.5
                values = values * 2 / fan * (torch.rand_like(tensor) < share)
            elif name.endswith("running_var"):
                values = values.abs() + 0.5
            tensor.data.copy_(values)
    return model.eval().requires_grad_(False), inputs


def call(model: nn.Module, given: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """The output, with floating-point inputs in this dtype."""
    parts = given if isinstance(given, tuple) else (given,)
    return model(*(part.to(dtype) if part.is_floating_point() else part for part in parts))


def check(seed: int, build: Any) -> Any:
    """Compile, and compare with float64; the plan."""
    model, inputs = drawn(seed, build)
    saved = decide.interleaved, whole.interleaved
    decide.interleaved = whole.interleaved = biased_clock(seed)
    try:
        fast: Any = compile(model, inputs, minimum_sparsity=0.0, verify=False)
    finally:
        decide.interleaved, whole.interleaved = saved
    exact = copy.deepcopy(model).double()
    for number, example in enumerate((*inputs, *inputs)):
        wanted, usual, found = (
            call(exact, example, torch.float64),
            call(model, example),
            call(fast, example),
        )
        assert found.shape == wanted.shape
        assert torch.equal(found.isnan(), usual.isnan()), seed
        scale = float(wanted.abs().nan_to_num().max())
        ours, torchs = (float((y - wanted).abs().nan_to_num().max()) for y in (found, usual))
        assert ours <= 16 * torchs + 2**-19 * scale, (seed, number, ours, torchs, scale)
    return fast.plan


@settings(max_examples=40)
@given(seed=st.integers(0, 1 << 30))
def test_random_convolution_networks_run_by_one_call(seed):
    check(seed, images)


@settings(max_examples=40)
@given(seed=st.integers(0, 1 << 30))
def test_random_transformers_run_through_the_kernels(seed):
    check(seed, tokens)


def test_what_is_drawn_reaches_the_kernels():
    """Most networks become networks, most attention runs by the kernel: else nothing was shown."""
    plans = [check(seed, images) for seed in range(12)]
    assert sum(bool(plan.networks) for plan in plans) >= 8
    assert sum("residual" in row.fused for plan in plans for row in plan.rows) >= 8
    plans = [check(seed, tokens) for seed in range(12)]
    assert sum(bool(plan.attentions) for plan in plans) >= 10
    assert sum(bool(plan.norms) for plan in plans) >= 5

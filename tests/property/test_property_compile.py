"""Random small networks: compiled in every way that a layer can run, they compute what torch does.

The clock is replaced by drawn times, so that all decisions are real and all ways are taken.
"""

from __future__ import annotations

import copy
import dataclasses
import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunus.runtime import compile, decide, whole
from prunus.runtime.candidates import ALL, TABLE
from prunus.runtime.plan import DIRECT, GROUPS, NM

PARTIAL = (GROUPS, NM, DIRECT)  # not every layer can run these
SPARSITIES = (0.0, 0.3, 0.7, 0.95, 1.0)
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh, lambda: nn.GELU("tanh"), nn.Identity)


class Net(nn.Module):
    """Runs its steps: (what, layer or other value) on the values so far."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, int]] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = [x]
        for what, number in self.steps:
            last = values[-1]
            if what == "layer":
                y = self.layers[number](last)
            elif what == "add":
                y = last + values[number]
            elif what == "cat":
                y = torch.cat([last, values[number]], 1)
            else:
                y = torch.flatten(last, 1)
            values.append(y)
        return values[-1], values[len(values) // 2]


class Pair(nn.Module):
    """Two linear layers that read one tensor; a branch on values hides it from torch.fx."""

    def __init__(self, inputs: int, outputs: int, hidden: bool) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs, bias=False)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        if self.hidden and x.numel() > 0 and float(x.flatten()[0]) == 4711.0:
            return x
        return self.left(x) * 0.5 + self.right(x)


@dataclasses.dataclass
class Growing:
    """A network while it is drawn, with the shape of each value without the batch."""

    draw: random.Random
    net: Net
    shapes: list[tuple[int, ...]]

    def put(self, what: str, number: int, shape: tuple[int, ...]) -> None:
        self.net.steps.append((what, number))
        self.shapes.append(shape)

    def layer(self, module: nn.Module, shape: tuple[int, ...]) -> None:
        self.net.layers.append(module)
        self.put("layer", len(self.net.layers) - 1, shape)

    def grow(self) -> None:
        draw, shape = self.draw, self.shapes[-1]
        kind = draw.choice(("matrix",) * 4 + ("norm", "norm", "act", "act", "act", "join", "other"))
        if kind == "act":
            self.layer(draw.choice(ACTIVATIONS)(), shape)
        elif kind == "join":
            same = [i for i, other in enumerate(self.shapes) if other == shape]
            number, what = draw.choice(same), draw.choice(("add", "cat"))
            joined = (shape[0] + self.shapes[number][0], *shape[1:])
            self.put(what, number, shape if what == "add" else joined)
        elif len(shape) == 1:
            self.vector(kind, shape[0])
        else:
            self.image(kind, shape)

    def vector(self, kind: str, width: int) -> None:
        outputs = self.draw.choice((1, 2, 7, 16, 17, 31))
        if kind == "norm":
            self.layer(nn.BatchNorm1d(width), (width,))
        elif kind == "other" or self.draw.random() < 0.3:
            self.layer(Pair(width, outputs, self.draw.random() < 0.5), (outputs,))
        else:
            self.layer(nn.Linear(width, outputs, bias=self.draw.random() < 0.7), (outputs,))

    def image(self, kind: str, shape: tuple[int, ...]) -> None:
        draw, (channels, height, width) = self.draw, shape
        if kind == "norm":
            self.layer(nn.BatchNorm2d(channels), shape)
        elif kind == "other" and min(height, width) >= 2 and draw.random() < 0.5:
            self.layer(nn.MaxPool2d(2), (channels, height // 2, width // 2))
        elif kind == "other":
            self.put("flatten", 0, (channels * height * width,))
        else:
            groups = draw.choice([g for g in (1, 2, 3) if channels % g == 0])
            outputs = groups * draw.choice((1, 3, 6))
            kernel, stride, margin = draw.choice(((1, 1, 0), (3, 1, 1), (3, 2, 1), (2, 1, 1)))
            conv = nn.Conv2d(
                channels, outputs, kernel, stride, margin, groups=groups, bias=draw.random() < 0.5
            )
            size = ((n + 2 * margin - kernel) // stride + 1 for n in (height, width))
            self.layer(conv, (outputs, *size))


def network(seed: int) -> tuple[Net, Tensor, Tensor]:
    """A network in eval mode and two inputs."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    images = draw.random() < 0.6
    shape = (draw.choice((1, 2, 6)), draw.randint(3, 9), draw.randint(3, 9)) if images else (9,)
    growing = Growing(draw, Net(), [shape])
    for _ in range(draw.randint(2, 9)):
        growing.grow()
    for module in growing.net.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or not tensor.is_floating_point():
                continue
            values = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() > 1:
                sparsity = draw.choice(SPARSITIES)
                kept = torch.rand(tensor.shape, generator=generator) >= sparsity
                values = values * kept / max(tensor[0].numel() * (1 - sparsity), 1.0) ** 0.5
            tensor.data.copy_(values.abs() + 0.5 if name == "running_var" else values)
    net = growing.net.eval().requires_grad_(False)
    batches = draw.sample((1, 2, 3, 5, 16, 33), 2)
    one, two = (torch.randn((n, *shape), generator=generator) for n in batches)
    return net, one, two


def magnitude(net: Net, x: Tensor) -> float:
    """The largest output if no two terms cancelled: what rounding errors are relative to.

    |f(x)| <= f(|x|) holds for all activations here.
    """
    bound = copy.deepcopy(net).double()
    for module in bound.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_floating_point():
                tensor.data.abs_()
                if name == "running_mean":
                    tensor.data.neg_()
    return max(1.0, *(float(y.abs().max()) for y in bound(x.double().abs()) if y.numel()))


def fake_clock(seed: int):
    """Times that depend on nothing but chance; as a whole the compiled model always wins."""
    draw = random.Random(seed)

    def interleaved(runs, *, budget):
        forms = any(name.startswith("dense ") and name[-1].isdigit() for name in runs)
        for run in runs.values():
            run()
        return {
            name: draw.uniform(1, 2)
            + (10.0 if forms and name.startswith("dense") else 0.0)
            + (0.3 if name in ("dense", "channels_last", "apart") else 0.0)
            for name in runs
        }

    return interleaved


def check(seed: int, **options) -> None:
    net, one, two = network(seed)
    fast = compile(net, [one, two], minimum_sparsity=0.0, **options)
    depth = 2 * (len(net.steps) + 1)
    for x in (one, two, one[:1]):
        scale = magnitude(net, x)
        wanted = copy.deepcopy(net).double()(x.double())
        for y, exact in zip(fast(x), wanted, strict=True):
            assert y.shape == exact.shape
            gap = float((y.double() - exact).abs().max()) if y.numel() else 0.0
            assert gap <= 2**-23 * depth * scale, (seed, gap, scale)


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 30))
def test_random_networks_compute_the_same_whatever_is_chosen(seed):
    saved = decide.interleaved, whole.interleaved
    decide.interleaved = whole.interleaved = fake_clock(seed)
    try:
        check(seed, duplicate_weights=seed % 2 == 0)
    finally:
        decide.interleaved, whole.interleaved = saved


@settings(max_examples=25)
@given(seed=st.integers(0, 1 << 30), names=st.data())
def test_random_networks_compute_the_same_with_one_way_for_all_of_a_kind(seed, names):
    exact = [way for way in TABLE if way.dtype == torch.float32 and way.name not in PARTIAL]
    taken = {
        kind: names.draw(st.sampled_from([way.name for way in exact if kind in way.kinds]))
        for kind in sorted(ALL)
    }
    check(seed, choose=lambda layer: taken[layer.kind])

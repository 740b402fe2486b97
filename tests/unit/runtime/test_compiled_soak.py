"""Compiled models of every kind of layer under long use, in threads and in forked children."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import resource
import threading
import warnings

import pytest
import torch
from torch import nn

from prunus.runtime import compile, load, save
from prunus.runtime.part import LinearPart

SIZE = 48
KINDS = {
    "csr": "float32",
    "tiled": "float32",
    "groups": "float32",
    "bitmap": "float32",
    "bitmap bf16": "bfloat16",
    "bitmap int8": "bfloat16",
}


class Block(nn.Module):
    """A gate as language models have it, and a branch that no tracer follows."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.gate, self.up = nn.Linear(SIZE, 2 * SIZE), nn.Linear(SIZE, 2 * SIZE)
        self.down = nn.Linear(2 * SIZE, SIZE)

    def forward(self, x):
        if x.shape[0] == 3:
            x = x * 1.5
        x = x + torch.softmax(self.q(x), -1) * self.k(x)
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.blocks = nn.Sequential(Block(), Block())
        for parameter in self.parameters():
            values = torch.randn(parameter.shape, generator=generator) / SIZE**0.5
            if parameter.dim() > 1:
                kept = torch.rand(len(parameter) // 16, parameter.shape[1], generator=generator)
                values *= (kept >= 0.6).repeat_interleave(16, 0)
            parameter.data = values

    def forward(self, x):
        return self.blocks(x)


def compiled(way, seed=0):
    """A model with packed layers, siblings merged, and the dtype that the way is used with."""
    model, x = Model(seed).eval(), torch.randn(2, 5, SIZE)
    plan = compile(model, x, dtype=torch.int8, choose=lambda layer: way, verify=False).plan
    names = [
        (f"blocks.{i}.{a}", f"blocks.{i}.{b}") for i in (0, 1) for a, b in ("qk", ("gate", "up"))
    ]
    merged = () if way == "groups" else tuple(names)
    plan = dataclasses.replace(plan, merged=merged, dtype=KINDS[way])
    fast = compile(model, x, dtype=torch.int8, choose=plan.choose, verify=False)
    parts = [module for module in fast.modules() if isinstance(module, LinearPart)]
    assert bool(parts) == bool(merged)
    return fast


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
@pytest.mark.parametrize("way", KINDS)
def test_ten_thousand_calls_of_merged_and_mapped_models_leave_memory_flat(way, tmp_path):
    save(compiled(way), tmp_path / "m.safetensors")
    fast = load(tmp_path / "m.safetensors", compiled(way, seed=1))
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 40, (10_000, 2), generator=generator).tolist()
    marks = []
    with torch.no_grad():
        for step, (batch, tokens) in enumerate(sizes):
            y = fast(torch.ones(1 + batch % 4, tokens, SIZE))
            assert y.shape == (1 + batch % 4, tokens, SIZE)
            if step % 1000 == 999:
                marks.append(resident())
    assert marks[-1] - marks[2] < 4 << 20


def test_threads_share_models_of_every_kind():
    models = [compiled(way) for way in KINDS]
    inputs = [torch.randn(1 + i % 3, 1 + i, SIZE) for i in range(9)]
    with torch.no_grad():
        wanted = [[fast(x) for x in inputs] for fast in models]
    wrong, finished = [], []

    def use(first):
        torch.set_num_threads(1 + first % 2)
        for step in range(first, first + 60):
            i, j = step % len(models), step * 5 % len(inputs)
            with torch.no_grad():
                if not torch.allclose(models[i](inputs[j]), wanted[i][j], rtol=1e-2, atol=1e-3):
                    wrong.append((i, j))
        finished.append(first)

    threads = [threading.Thread(target=use, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sorted(finished) == [0, 1, 2, 3]


def _in_child(queue, fast, inputs):
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put([fast(x).tolist() for x in inputs])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("way", ["csr", "bitmap int8"])
def test_forked_children_use_the_whole_model_and_its_mapping(way, tmp_path):
    path = tmp_path / "m.safetensors"
    save(compiled(way), path)
    fast = load(path, compiled(way, seed=1))
    path.unlink()
    inputs = [torch.randn(2, n, SIZE) for n in (1, 7, 30)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            wanted = [fast(x) for x in inputs]
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        children = [context.Process(target=_in_child, args=(queue, fast, inputs)) for _ in range(2)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: threads and forks
            for child in children:
                child.start()
        found = [queue.get(timeout=60) for _ in children]
        for child in children:
            child.join(60)
            assert child.exitcode == 0
        for outputs in found:
            for output, expected in zip(outputs, wanted, strict=True):
                assert torch.equal(torch.tensor(output), expected)
        with torch.no_grad():
            assert all(torch.equal(fast(x), y) for x, y in zip(inputs, wanted, strict=True))
    finally:
        torch.set_num_threads(before)

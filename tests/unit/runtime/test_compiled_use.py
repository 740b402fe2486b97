"""Compiled models in use: traced, exported, in threads and forks, called often; whole networks."""

from __future__ import annotations

import multiprocessing
import os
import resource
import threading
import warnings

import pytest
import torch
from torch import nn

from prunus.bench.models_large import Bottleneck, Encoder, InvertedResidual
from prunus.errors import PrunusError, ShapeError, ValueRangeError
from prunus.runtime import compile, load, save


def pruned(model, sparsity=0.8):
    """Weights removed at random, batch norms with statistics that fit."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight.data *= torch.rand_like(module.weight) >= sparsity
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
    return model.eval().requires_grad_(False)


def small(name):
    """(a small network of this kind, an input)."""
    torch.manual_seed(0)
    if name == "bert":
        return pruned(Encoder(2, 32, 4)), torch.randn(2, 9, 32)
    if name == "resnet":
        blocks = [Bottleneck(8, 4, 1), Bottleneck(16, 4, 2), Bottleneck(16, 4, 1)]
    else:
        blocks = [InvertedResidual(8, 12, 1, 2), InvertedResidual(12, 12, 1, 3)]
    width = 16 if name == "resnet" else 12
    ends = (nn.Conv2d(3, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    return pruned(nn.Sequential(ends[0], *blocks, *ends[1:])), torch.randn(2, 3, 17, 14)


def csr(layer):
    return "csr"


NAMES = ("bert", "resnet", "mobilenet")


@pytest.mark.parametrize("name", NAMES)
def test_networks_agree_end_to_end_and_so_do_their_graphs(name, tmp_path):
    model, x = small(name)
    fast = compile(model, x, choose=csr)
    assert len(fast.plan.sparse_layers) == len(fast.plan.rows) > 5
    exact = model.double()(x.double())
    model.float()
    torch.testing.assert_close(fast(x).double(), exact, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    with torch.no_grad():
        graph = torch.compile(fast, fullgraph=True, backend="aot_eager")
        exported = torch.export.export(fast, (x,))
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for form in (graph, exported.module(), loaded):
        torch.testing.assert_close(form(x), fast(x), rtol=1e-4, atol=1e-5)
    operators = {str(node.target) for node in exported.graph.nodes}
    assert any("prunus.sparse" in operator for operator in operators)
    saved = save(fast, tmp_path / "model.safetensors")
    other = compile(small(name)[0], x, choose=fast.plan.choose)
    for tensor in other.state_dict().values():
        if tensor.dtype == torch.float32:
            tensor.fill_(0.5)
    load(saved.path, other)
    assert torch.equal(other(x), fast(x))


def test_an_exported_graph_takes_other_batches():
    model, x = small("bert")
    fast = compile(model, x, choose=csr)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        graph = torch.export.export(fast, (x,), dynamic_shapes={"tokens": {0: batch}}).module()
    for n in (1, 5):
        x = torch.randn(n, 9, 32)
        torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)


def test_several_models_run_from_several_threads():
    pairs = [small(name) for name in NAMES]
    fast = [compile(model, x, choose=csr) for model, x in pairs]
    wanted = [form(x) for form, (_, x) in zip(fast, pairs, strict=True)]
    wrong = []

    def work(first):
        torch.set_num_threads(1 + first % 2)
        for step in range(30):
            i = (first + step) % len(fast)
            with torch.no_grad():
                y = fast[i](pairs[i][1])
            if not torch.allclose(y, wanted[i], rtol=1e-5, atol=1e-6):
                wrong.append((first, step))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def _in_child(queue, form, x):
    torch.set_num_threads(2)
    queue.put(form(x).tolist())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_computes_the_same_after_use():
    model, _ = small("bert")
    x = torch.randn(64, 9, 32)
    fast = compile(model, x, choose=csr)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    wanted = fast(x)
    torch.set_num_threads(before)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = context.Process(target=_in_child, args=(queue, _Layer(fast), x))
        child.start()
    found = queue.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    torch.testing.assert_close(torch.tensor(found), _Layer(fast)(x))
    torch.testing.assert_close(fast(x), wanted)


class _Layer:
    """One packed layer: torch's own threads do not survive a fork."""

    def __init__(self, model):
        self.layer = model.layers[0].up

    def __call__(self, x):
        return self.layer(x)


def _resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_calls_of_all_sizes_leave_memory_flat(name):
    model, x = small(name)
    fast = compile(model, x, choose=csr)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 9, (3334, 2), generator=generator).tolist()
    marks = []
    with torch.no_grad():
        for step, (n, m) in enumerate(sizes):
            shape = (n, m, 32) if name == "bert" else (1 + n % 2, 3, 6 + m, 6 + n)
            fast(torch.ones(shape))
            if step % 400 == 399:
                marks.append(_resident())
    assert marks[-1] - marks[1] < 4 << 20


def test_what_compile_is_given_is_checked(tmp_path):
    model, x = nn.Linear(6, 5), torch.randn(2, 6)
    wrong = [
        ((lambda: compile("model", x)), "model is a str"),
        ((lambda: compile(model)), "example_inputs is missing"),
        ((lambda: compile(model, [])), "an empty list"),
        ((lambda: compile(model, 3)), "holds a int"),
        ((lambda: compile(model, x, threads="2")), "threads is '2'"),
        ((lambda: compile(model, x, threads=True)), "threads is True"),
        ((lambda: compile(model, x, minimum_sparsity=1.5)), "minimum_sparsity is 1.5"),
        ((lambda: compile(model, x, minimum_sparsity=float("nan"))), "minimum_sparsity is nan"),
        ((lambda: compile(model, x, minimum_sparsity="a")), "minimum_sparsity is 'a'"),
        ((lambda: compile(model, x, dtype=torch.float16)), "dtype is torch.float16"),
        ((lambda: compile(model, x, dtype="bfloat16")), "dtype is 'bfloat16'"),
        ((lambda: compile(model, x, choose="csr")), "choose is 'csr'"),
        ((lambda: compile(model, torch.randn(2, 7))), "does not take example_inputs"),
        ((lambda: compile(model, (x, x))), "does not take example_inputs"),
        ((lambda: compile(model, {"y": x})), "does not take example_inputs"),
        ((lambda: compile(model, [x, torch.randn(7)])), "does not take example_inputs"),
        ((lambda: load(3)), "path is 3"),
        ((lambda: load(tmp_path / "absent")), "absent"),
        ((lambda: load(tmp_path)), "is a folder"),
        ((lambda: save("model", tmp_path / "file")), "model is a str"),
        ((lambda: save(model, 3)), "path is 3"),
        ((lambda: save(model, tmp_path)), "is a folder"),
        ((lambda: save(model, tmp_path / "no" / "file")), "no such folder"),
        ((lambda: save(model, tmp_path / "file", format="zip")), "zip"),
        ((lambda: load(tmp_path / "absent", "model")), "model is a str"),
    ]
    for call, message in wrong:
        with pytest.raises(PrunusError, match=message):
            call()
    with pytest.raises(ShapeError, match="'weight' is on the meta device"):
        compile(nn.Linear(6, 5, device="meta"), x)
    with pytest.raises(ValueRangeError):
        compile(model, None)


def test_a_model_in_training_mode_is_compiled_for_inference():
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.9), nn.BatchNorm1d(5)).train()
    fast = compile(model, torch.randn(3, 6), choose=csr)
    assert not fast.training
    assert model.training
    assert int(model[2].num_batches_tracked) == 0
    x = torch.randn(1, 6)
    torch.testing.assert_close(fast(x), model.eval()(x))

"""The row of evidence against numbers computed by hand."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import prunus as pr
from prunus import metrics
from prunus.errors import FormatError, NotFiniteError, ShapeError, ValueRangeError
from prunus.evidence import latencies


@pytest.fixture(scope="module", autouse=True)
def _cheap_collections():
    # Every measurement collects garbage; torch's own objects need not be searched each time.
    gc.freeze()
    yield
    gc.unfreeze()


def _network(widths=(6, 32, 3), seed=1):
    torch.manual_seed(seed)
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _pruned(network, kept=0.25):
    sparse = copy.deepcopy(network)
    for layer in sparse:
        if isinstance(layer, nn.Linear):
            mask = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(3)) < kept
            layer.weight.data *= mask
    return sparse


def _data(n=50, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.arange(n) % 3


def _row(model=None, fast=None, data=None, **options):
    model = _network() if model is None else model
    fast = _pruned(model) if fast is None else fast
    options = {"batch_sizes": (1, 4), "repetitions": 3, "memory": False, **options}
    return pr.evidence(model, fast, _data() if data is None else data, **options)


def _logits(network, x):
    """A float64 forward pass without torch's layers."""
    y = x.double().numpy()
    linear = [m for m in network if isinstance(m, nn.Linear)]
    for i, m in enumerate(linear):
        y = y @ m.weight.detach().double().numpy().T + m.bias.detach().double().numpy()
        y = np.maximum(y, 0) if i < len(linear) - 1 else y
    return y


def _nonzeros(network):
    return sum(np.count_nonzero(p.detach().numpy()) for p in network.parameters())


def test_counts_flops_and_accuracy_are_those_computed_by_hand():
    model, (x, y) = _network(), _data()
    sparse = _pruned(model)
    row = _row(model, sparse, (x, y))
    for side, network in ((row.dense, model), (row.sparse, sparse)):
        right = int((_logits(network, x).argmax(1) == y.numpy()).sum())
        assert (side.accuracy.correct, side.accuracy.total) == (right, len(y))
        assert side.parameters == 6 * 32 + 32 + 32 * 3 + 3
        assert side.nonzeros == _nonzeros(network)
        matrices = [p for p in network.parameters() if p.dim() == 2]
        assert side.flops == pytest.approx(2 * sum(np.count_nonzero(p.detach()) for p in matrices))
    assert row.sparse.nonzeros < row.dense.nonzeros


def test_bytes_and_index_bits_are_those_of_the_files(tmp_path):
    model = _network()
    sparse = _pruned(model)
    row = _row(model, sparse)
    pr.save(model, tmp_path / "dense", format="dense")
    pr.save(sparse, tmp_path / "sparse")
    assert row.dense.bytes == os.path.getsize(tmp_path / "dense")
    assert row.sparse.bytes == os.path.getsize(tmp_path / "sparse")
    assert row.dense.index_bits == 0
    with safe_open(tmp_path / "sparse", "np") as file:
        plain = {name for name, _ in model.named_parameters()}
        index = [file.get_tensor(k) for k in file.keys() if k not in plain]  # noqa: SIM118
        names = [k for k in file.keys() if k not in plain]  # noqa: SIM118
    bits = sum(8 * a.nbytes for k, a in zip(names, index, strict=True) if not k.endswith("values"))
    assert row.sparse.index_bits == bits > 0


def test_the_file_of_a_compiled_network_is_that_of_the_plain_one(tmp_path):
    sparse = _pruned(_network())
    fast = pr.compile(sparse, torch.zeros(4, 6), choose=lambda layer: "csr")
    assert len(fast.plan.sparse_layers) == 2
    pr.save(sparse, tmp_path / "plain")
    row = _row(fast=fast)
    assert row.sparse.bytes == os.path.getsize(tmp_path / "plain")
    assert row.plan is not None
    assert [r["choice"] for r in row.plan["rows"]] == ["csr", "csr"]
    assert row.sparse.nonzeros == _nonzeros(sparse)
    given = _row(fast=fast, file=tmp_path / "plain")
    assert given.sparse.bytes == row.sparse.bytes
    assert given.sparse.index_bits == row.sparse.index_bits


def test_efficiency_is_the_dense_size_of_that_accuracy_over_what_is_stored():
    points = [(50.0, 0.05), (5000.0, 0.99)]
    row = _row(frontier=metrics.Frontier(points))
    for side in (row.dense, row.sparse):
        share = (side.accuracy.value - 0.05) / (0.99 - 0.05)
        reference = math.exp(math.log(50) + share * (math.log(5000) - math.log(50)))
        assert side.efficiency == pytest.approx(reference / side.nonzeros)
        with_index = side.nonzeros + side.index_bits / 32
        assert side.efficiency_with_index == pytest.approx(reference / with_index)
        assert side.accuracy_density == pytest.approx(
            100 * side.accuracy.value / (side.nonzeros / 1e6)
        )
        assert side.correct_per_logit_and_parameter == pytest.approx(
            side.accuracy.correct / (3 * side.nonzeros)
        )


def test_efficiency_outside_of_the_frontier_and_without_one_is_none():
    assert _row().sparse.efficiency is None
    row = _row(frontier=metrics.Frontier([(10.0, 0.98), (20.0, 0.99)]))
    assert row.sparse.efficiency is None
    assert row.sparse.efficiency_with_index is None


def test_half_precision_values_make_the_index_weigh_twice_as_much():
    sparse = _pruned(_network()).bfloat16()
    x, y = _data()
    frontier = metrics.Frontier([(50.0, 0.0), (5000.0, 1.0)])
    row = _row(_network().bfloat16(), sparse, (x.bfloat16(), y), frontier=frontier)
    side = row.sparse
    assert side.efficiency is not None
    assert side.efficiency_with_index is not None
    stored = side.nonzeros * side.efficiency / side.efficiency_with_index
    assert stored == pytest.approx(side.nonzeros + side.index_bits / 16)


@pytest.mark.parametrize("form", ["pair", "list", "loader", "generator", "uneven"])
def test_every_form_of_the_data_gives_the_same_accuracy(form):
    x, y = _data(50)
    forms = {
        "pair": (x, y),
        "list": [x, y],
        "loader": DataLoader(TensorDataset(x, y), batch_size=16),
        "generator": ((x[i : i + 7], y[i : i + 7]) for i in range(0, 50, 7)),
        "uneven": [(x[:0], y[:0]), (x[:1], y[:1]), [x[1:], y[1:]]],
    }
    wanted = _row().sparse.accuracy
    assert _row(data=forms[form]).sparse.accuracy == wanted
    assert wanted.total == 50


class _Recorder(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, x):
        self.seen.append(x.clone())
        return self.network(x)


def test_both_networks_see_the_same_batches_of_data_that_changes():
    generator = torch.Generator().manual_seed(0)
    batches = ((torch.randn(9, 6, generator=generator), torch.zeros(9).long()) for _ in range(3))
    dense, sparse = _Recorder(_network()), _Recorder(_pruned(_network()))
    _row(dense, sparse, batches, batch_sizes=(30,))
    full = [network.seen[1:4] for network in (dense, sparse)]
    assert [x.shape for x in full[0]] == [(9, 6)] * 3
    assert all(torch.equal(a, b) for a, b in zip(*full, strict=True))
    # 27 examples for a batch of 30: the first ones are repeated
    timed = next(x for x in dense.seen if len(x) == 30)
    assert torch.equal(timed, torch.cat([*full[0], *full[0]])[:30])


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ([], ValueRangeError, "no examples"),
        ((torch.zeros(0, 6), torch.zeros(0).long()), ValueRangeError, "no examples"),
        ([{"input_ids": torch.zeros(2, 6)}], ShapeError, "batch 0 is a dict.*named inputs"),
        ([((torch.zeros(2, 6),) * 2, torch.zeros(2))], ShapeError, "tuple of tuple, Tensor"),
        ([torch.zeros(2, 6)] * 3, ShapeError, "batch 0 is a tuple|batch 0 is a list|Tensor"),
        ((_data()[0].double(), _data()[1]), ShapeError, r"dense network.*float64"),
        ((torch.zeros(4, 5), torch.zeros(4).long()), ShapeError, r"inputs \[1, 5\]"),
        ((_data()[0], _data()[1].float()), ShapeError, "batch 0 .*float32 targets"),
        ((_data()[0], _data()[1] + 1), ValueRangeError, "targets 1..3"),
        ((_data()[0], _data()[1][:-1]), ShapeError, "50 inputs but 49 targets"),
        ((_data()[0] * math.nan, _data()[1]), NotFiniteError, "NaN"),
        (7, ShapeError, "data is a int; pass .inputs, targets."),
    ],
)
def test_wrong_data_is_refused_in_words(data, error, words):
    with pytest.raises(error, match=words):
        _row(data=data)


@pytest.mark.parametrize("sizes", [(), (0, 4), 64, None])
def test_wrong_batch_sizes_are_refused(sizes):
    with pytest.raises(ValueRangeError, match="batch_sizes"):
        _row(batch_sizes=sizes)


def test_a_foreign_file_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "x").write_bytes(b"nothing")
    recorder = _Recorder(_network())
    with pytest.raises(FormatError):
        _row(recorder, _network(), file=tmp_path / "x")
    assert not recorder.seen


def test_modes_are_restored_module_by_module():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model.train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    fast = copy.deepcopy(model).eval()
    row = _row(model, fast)
    assert [m.training for m in model] == [True, False, True, True]
    assert model.training
    assert not any(m.training for m in fast.modules())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert row.dense.accuracy == row.sparse.accuracy  # dropout was off


def test_one_module_for_both_sides_is_allowed():
    model = _network()
    row = _row(model, model)
    assert row.dense.accuracy == row.sparse.accuracy
    assert model.training


def test_a_network_without_a_non_zero_has_no_density_and_no_efficiency():
    empty = _network()
    for p in empty.parameters():
        p.data.zero_()
    row = _row(fast=empty, frontier=metrics.Frontier([(1.0, 0.0), (9.0, 1.0)]))
    side = row.sparse
    assert side.nonzeros == 0
    assert side.flops == 0
    assert (side.accuracy_density, side.correct_per_logit_and_parameter) == (None, None)
    assert side.efficiency is None
    json.dumps(row.to_dict())


def test_a_model_that_cannot_be_pickled_has_no_memory_and_a_reason():
    class Local(nn.Sequential):
        pass

    row = _row(Local(*_network()), _pruned(_network()), memory=True)
    assert row.dense.memory.bytes is None
    assert "pickle" in row.dense.memory.reason
    assert row.sparse.memory.bytes is not None
    assert row.to_dict()["dense"]["memory"]["reason"] == row.dense.memory.reason


def test_the_network_below_ddp_is_measured():
    model = _network()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        row = _row(wrapped, _pruned(model))
    finally:
        dist.destroy_process_group()
    assert row.dense.accuracy == _row(model).dense.accuracy
    assert row.dense.parameters == _row(model).dense.parameters


class _Compiled(nn.Module):
    def __init__(self, network):
        super().__init__()
        self._orig_mod, self.calls = network, 0

    def forward(self, x):
        self.calls += 1
        return self._orig_mod(x)


def test_what_torch_compile_made_is_timed_as_it_is():
    dense = _Compiled(_network())
    times = latencies(dense, _pruned(_network()), _data()[0], [2], repetitions=3)
    assert dense.calls >= 3
    assert times[2]["dense"].measurement == times[2]["sparse"].measurement


def test_convolutions_are_also_timed_with_channels_last_and_stay_as_they_were():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3))
    x = torch.randn(8, 3, 8, 8)
    row = _row(model, copy.deepcopy(model), (x, torch.zeros(8).long()))
    assert model[0].weight.is_contiguous()
    assert row.dense.flops == 2 * (4 * 36 * 27 + 4 * 36 * 3)
    assert set(row.speedup) == {1, 4}


def test_every_form_is_timed_in_eval_mode_and_the_faster_dense_one_counts(monkeypatch):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 3)).train()
    fast = copy.deepcopy(model)
    seen = {}

    def compare(runs, *, repetitions):
        for name, run in runs.items():
            network = run.__closure__[1].cell_contents
            seen[name] = (network.training, network[0].weight.is_contiguous())
        seconds = {"dense": 3.0, "channels_last": 2.0, "sparse": 1.0}
        return {n: metrics.Latency(seconds[n], 0, 0, 0, 1, (seconds[n],), 7) for n in runs}

    monkeypatch.setattr(metrics, "compare", compare)
    times = latencies(model, fast, torch.zeros(2, 2, 6, 6), [1, 2])
    assert seen == {
        "dense": (False, True),
        "sparse": (False, True),
        "channels_last": (False, False),
    }
    assert {n: by["dense"].median for n, by in times.items()} == {1: 2.0, 2: 2.0}
    assert {n: by["sparse"].median for n, by in times.items()} == {1: 1.0, 2: 1.0}
    assert model.training
    assert model[0].weight.is_contiguous()


def test_the_dense_file_is_dense_even_if_its_network_has_zeros():
    network = _pruned(_network())
    row = _row(network, copy.deepcopy(network))
    assert row.dense.nonzeros == row.sparse.nonzeros
    assert row.dense.index_bits == 0
    assert row.dense.bytes > 4 * row.dense.parameters > row.sparse.bytes - 1000


def test_to_dict_is_json_without_samples_and_the_same_every_time():
    model = _network()
    a, b = (_row(model).to_dict() for _ in range(2))
    text = json.dumps(a)
    assert "samples" not in text
    assert "measurement" not in text
    assert len(text) < 5000
    for row in (a, b):
        del row["speedup"], row["dense"]["latency"], row["sparse"]["latency"]
    assert a == b
    full = _row(model).to_dict(samples=True)
    assert len(full["sparse"]["latency"]["4"]["samples"]) >= 2
    json.dumps(full)


def test_speed_up_is_paired_and_the_line_says_what_was_bought():
    row = _row()
    for n, gain in row.speedup.items():
        pairs = zip(row.dense.latency[n].samples, row.sparse.latency[n].samples, strict=True)
        ratios = sorted(a / b for a, b in pairs)
        assert gain.median == pytest.approx(float(np.median(ratios)))
        assert gain.low <= gain.median <= gain.high
    line = str(row)
    assert "\n" not in line
    assert f"{row.dense.nonzeros:,} -> {row.sparse.nonzeros:,}" in line
    assert f"{row.sparse.bytes:,} bytes" in line
    assert f"{row.speedup[4].median:.2f}x at batch 4 on 1 thread" in line


def test_threads_are_restored_and_named():
    torch.set_num_threads(1)
    row = _row(threads=2)
    assert torch.get_num_threads() == 1
    assert row.threads == 2
    assert "2 threads" in str(row)
    assert row.plan is None
    assert row.environment["torch"] == torch.__version__

"""The planner with a clock of its own: noise, times on disk, buckets, bfloat16, never slower."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunus.runtime import Row, SparseLinear, cache, candidates, compile, decide, whole
from prunus.runtime.dense import DenseLayer, in_bfloat16
from prunus.runtime.measure import interleaved
from prunus.runtime.plan import Layer, Plan
from prunus.runtime.switch import Switch, bounds, bucket_of, rows_of
from prunus.runtime.whole import Form, judged

OPTIONS = decide.Options(1, 0.25, torch.float32, duplicate_weights=False, choose=None)
LAYER = Layer("fc", "linear", (8, 8), 0.9, 6)


def pruned(model, sparsity=0.9):
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= torch.rand_like(parameter) >= sparsity
    return model.eval()


class Machine:
    """A clock, and calls that take their time on it plus whatever else the machine does."""

    def __init__(self, noise):
        self.now, self.noise = 0.0, noise

    def __call__(self):
        return self.now

    def run(self, seconds):
        def call():
            self.now += seconds * self.noise(self.now)

        return call


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), share=st.floats(0.1, 0.9))
def test_a_loaded_machine_does_not_mislead_the_clock(seed, share):
    draw = random.Random(seed)

    def noise(now):
        # Phases in which everything takes long, and single interruptions in all of them.
        busy = draw.random() < share if int(now / 2e-3) % 2 else False
        return 1.0 + draw.random() * (4.0 if busy else 0.02) + 50.0 * (draw.random() < 0.01)

    machine = Machine(noise)
    runs = {"slow": machine.run(110e-6), "fast": machine.run(100e-6)}
    found = interleaved(runs, budget=0.15, clock=machine)
    assert found["fast"] < found["slow"] < 1.25 * found["fast"]


def test_timing_goes_on_while_a_close_race_is_disturbed():
    def spent(noise, other):
        machine = Machine(noise)
        interleaved(
            {"a": machine.run(1e-4), "b": machine.run(other)}, budget=0.05, most=4000, clock=machine
        )
        return machine.now

    draw = random.Random(0)
    quiet = spent(lambda now: 1.0, 1.02e-4)
    loud = spent(lambda now: 1.0 + 3.0 * (draw.random() < 0.7), 1.02e-4)
    clear = spent(lambda now: 1.0 + 3.0 * (draw.random() < 0.7), 3e-4)
    assert quiet < 0.055
    assert 0.15 < loud < 0.16
    assert clear < 0.06


@pytest.fixture
def few_ways(monkeypatch):
    """What the clock chooses between, whatever else the table offers."""
    table = tuple(way for way in candidates.TABLE if way.name in ("csr", "dense bf16"))
    monkeypatch.setattr(candidates, "TABLE", table)


@pytest.fixture
def kept(few_ways, tmp_path, monkeypatch):
    """A cache folder, and how often something is timed."""
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "times"))
    timed = []

    def fake(runs, *, budget):
        timed.append(sorted(runs))
        return {name: 1.0 if "csr" in name or "sparse" in name else 2.0 for name in runs}

    monkeypatch.setattr(decide, "interleaved", fake)
    monkeypatch.setattr(whole, "interleaved", fake)
    return tmp_path / "times", timed


def test_times_of_layers_are_kept_and_asked_for_by_what_they_depend_on(kept):
    folder, timed = kept
    model, x = pruned(nn.Sequential(nn.Linear(40, 30), nn.ReLU())), torch.randn(6, 40)
    first = compile(model, x, threads=1)
    assert timed == [["csr", "dense"], ["dense 0", "sparse 0"]]
    assert first.plan.sparse_layers == ("0",)
    (file,) = folder.glob("*.json")
    assert json.loads(file.read_text())["seconds"] == {"csr": 1.0, "dense": 2.0}
    timed.clear()
    again = compile(model, x, threads=1)
    assert again.plan == first.plan
    compile(model, torch.randn(8, 40), threads=1)  # the same bucket
    assert timed == [["dense 0", "sparse 0"]] * 2
    timed.clear()
    compile(model, torch.randn(9, 40), threads=1)
    compile(model, torch.randn(40, 6).t(), threads=1)
    compile(model, x, threads=2)
    compile(model, x, threads=1, dtype=torch.bfloat16)
    compile(pruned(nn.Sequential(nn.Linear(40, 30)), 0.5), x, threads=1)
    assert [names for names in timed if "csr" in names] == [["csr", "dense"]] * 3 + [
        ["csr", "dense", "dense bf16"],
        ["csr", "dense"],
    ]
    timed.clear()
    compile(model, x, threads=1, choose=lambda layer: "dense")
    assert timed == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff\xfe",
        b'{"key": 1}',
        b"[" * 100_000,
        '{"key": KEY}',
        '{"key": KEY, "seconds": 5}',
        '{"key": KEY, "seconds": {"csr": 1.0}}',
        '{"key": KEY, "seconds": {"csr": 1.0, "dense": "2"}}',
        '{"key": KEY, "seconds": {"csr": 1.0, "dense": NaN}}',
        '{"key": KEY, "seconds": {"csr": 1.0, "dense": -1.0}}',
        '{"key": {"a": 2}, "seconds": {"csr": 1.0, "dense": 2.0}}',
    ],
)
def test_a_spoilt_file_is_measured_again(content, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path))
    names = frozenset(("csr", "dense"))
    cache.put({"a": 1}, {"csr": 1.0, "dense": 2.0})
    assert cache.get({"a": 1}, names) == {"csr": 1.0, "dense": 2.0}
    (file,) = tmp_path.iterdir()
    if isinstance(content, str):
        content = content.replace("KEY", '{"a": 1, "version": 1}').encode()
    file.write_bytes(content)
    assert cache.get({"a": 1}, names) is None
    cache.put({"a": 1}, {"csr": 3.0, "dense": 2.0})
    assert cache.get({"a": 1}, names) == {"csr": 3.0, "dense": 2.0}
    assert [path.name for path in tmp_path.iterdir()] == [file.name]  # no temporary files


def test_where_times_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNUS_CACHE", "")
    assert cache.folder() is None
    cache.put({"a": 1}, {"x": 1.0})
    assert cache.get({"a": 1}, frozenset("x")) is None
    monkeypatch.delenv("PRUNUS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "prunus" / "plans"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "prunus" / "plans"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "file" / "below"))
    cache.put({"a": 1}, {"x": 1.0})  # cannot be written: no error
    assert cache.get({"a": 1}, frozenset("x")) is None


def test_the_fastest_way_is_taken_if_it_beats_the_best_dense_one():
    ways = {way.name: way for way in candidates.TABLE}

    def choice(**seconds):
        times = {3: {name.replace("_bf", " bf"): value for name, value in seconds.items()}}
        used = {name: ways[name] for name in times[3] if name in ways}
        row = decide.judged(LAYER, times, used, OPTIONS)
        return row.choice, row.reason

    assert choice(csr=1.0, dense=2.0) == ("csr", "2.00x dense")
    assert choice(csr=1.0, dense=1.04) == ("dense", "1.04x dense, below 1.05x")
    assert choice(csr=1.0, dense=2.0, dense_bf16=1.5) == ("csr", "1.50x dense bf16")
    assert choice(csr=1.0, dense=2.0, dense_bf16=0.5)[0] == "dense bf16"
    assert choice(csr=1.0, dense=2.0, dense_bf16=1.02)[0] == "dense bf16"
    assert choice(csr=1.0, dense=1.0, dense_bf16=0.99)[0] == "dense"
    assert choice(csr=1.0, dense=2.0, channels_last=1.2)[1] == "1.20x dense (channels_last)"
    assert choice(dense=1.0, dense_bf16=0.99) == ("dense", "dense bf16 1.01x, below 1.05x")
    assert choice(dense=1.0, dense_bf16=0.5) == ("dense bf16", "2.00x dense")


FORMS = [
    Form(swapped, half, last)
    for swapped in (False, True)
    for half in (False, True)
    for last in (False, True)
]


@given(
    st.lists(
        st.tuples(st.sampled_from(FORMS), st.lists(st.floats(0.1, 10), min_size=2, max_size=2)),
        max_size=8,
    ),
    st.lists(st.floats(0.1, 10), min_size=2, max_size=2),
)
def test_the_form_that_is_taken_is_never_slower_than_any_dense_one(drawn, dense):
    times = {**dict(drawn), Form(False): dense}
    row = Row("fc", "linear", (8, 8), 0.9, "csr", "2.00x dense")
    plan, form = judged(Plan((row,), 1, "avx2", "box", ""), times)
    best = min((f for f in times if not f.swapped), key=lambda f: sum(times[f]))
    assert sum(times[form]) <= sum(times[best])
    assert all(a <= b for a, b in zip(times[form], times[best], strict=True))
    assert plan.dense_seconds == sum(times[best])
    assert (plan.rows == (row,)) == (form.swapped or not any(f.swapped for f in times))
    assert plan.dtype == ("bfloat16" if form.half else "float32")


def spread(model, bucket_times, monkeypatch):
    """Compile for 4 and 300 rows with these times of the layer: {rows: {way: seconds}}."""

    def fake(runs, *, budget):
        if any(name.startswith("sparse") for name in runs):
            return {name: 1.0 if name.startswith("sparse") else 2.0 for name in runs}
        rows = next(iter(runs.values()))().shape[0]
        return {name: bucket_times[rows][name] for name in runs}

    monkeypatch.setattr(decide, "interleaved", fake)
    monkeypatch.setattr(whole, "interleaved", fake)
    return [torch.randn(4, 20), torch.randn(300, 20)]


def test_a_layer_may_switch_between_its_ways_if_it_may_hold_its_weight_twice(few_ways, monkeypatch):
    model = pruned(nn.Sequential(nn.Linear(20, 30), nn.GELU()))
    times = {4: {"csr": 1.0, "dense": 2.0}, 300: {"csr": 9.0, "dense": 8.0}}
    examples = spread(model, times, monkeypatch)
    single = compile(model, examples)
    assert single.plan.rows[0].choice == "dense"  # 10 against 10
    fast = compile(model, examples, duplicate_weights=True)
    (row,) = fast.plan.rows
    assert row.switch == ((32.0, "csr"), (float("inf"), "dense"))
    assert "csr to 32, dense" in str(fast.plan)
    assert fast.plan.sparse_layers == ("0",)
    assert isinstance(fast[0], Switch)
    assert isinstance(fast[0].ways["csr"], SparseLinear)
    seen = []
    for name, way in fast[0].ways.items():
        way.register_forward_hook(lambda *rest, name=name: seen.append(name))
    for n in (1, 32, 33, 300):
        x = torch.randn(n, 20)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert seen == ["csr", "csr", "dense", "dense"]
    assert json.loads(json.dumps(fast.plan.to_dict()))["rows"][0]["switch"][1] == [None, "dense"]
    again = compile(model, examples, choose=fast.plan.choose, duplicate_weights=True)
    assert again.plan.rows[0].switch == row.switch
    held = model[0].weight
    with torch.no_grad():
        held.zero_()  # the copy has weights of its own
    assert torch.equal(fast[0].ways["csr"].weight, fast[0].ways["dense"].weight)
    assert fast[0].ways["dense"].weight.any()


def test_whatever_loses_on_one_of_the_examples_is_dense():
    row = Row("fc", "linear", (8, 8), 0.9, "csr", "2.00x dense")
    plan = Plan((row,), 1, "avx2", "box", "")
    found, form = judged(plan, {Form(True): [1.0, 1.1], Form(False): [9.0, 1.0]})
    assert form == Form(False)
    assert "slower than dense on one of the examples" in found.reason


def test_buckets_are_powers_of_two_of_the_columns_of_the_product():
    assert [bucket_of(n) for n in (0, 1, 2, 3, 4, 5, 8, 9)] == [0, 0, 1, 2, 2, 3, 3, 4]
    assert rows_of("linear", (2, 3, 5)) == 6
    assert rows_of("conv2d", (2, 3, 4, 5)) == 40
    assert bounds({0: "a", 3: "a", 7: "b"}) == ((32.0, "a"), (float("inf"), "b"))
    assert bounds({5: "a"}) == ((float("inf"), "a"),)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(9, 7), (3, 4, 9)),
        (nn.Linear(9, 7, bias=False), (9,)),
        (nn.Conv2d(4, 6, 3, 2, 1, groups=2), (2, 4, 9, 7)),
        (nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="reflect", dilation=2), (2, 4, 9, 7)),
    ],
)
def test_a_dense_layer_in_bfloat16_rounds_only_weights_and_inputs(layer, shape):
    layer, x = layer.eval().requires_grad_(False), torch.randn(shape)
    narrow, exact = DenseLayer(layer, torch.bfloat16), DenseLayer(layer)
    assert torch.equal(exact(x), layer(x))
    assert narrow(x).dtype == torch.float32
    wanted = layer(x)
    torch.testing.assert_close(narrow(x), wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))
    assert not torch.equal(narrow(x), wanted)
    residual = torch.randn_like(wanted)
    torch.testing.assert_close(
        exact.with_activation("silu")(x, residual), nn.functional.silu(wanted + residual)
    )
    assert narrow.sparse_counts()["weight"][0] == tuple(layer.weight.shape)


def test_bfloat16_wins_where_it_is_allowed_and_faster(few_ways, monkeypatch):
    model = pruned(nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 9)), 0.5)
    x, seconds = torch.randn(6, 40), {"csr": 3.0, "dense": 2.0, "dense bf16": 1.0}

    def fake(runs, *, budget):
        forms = {"dense 0": 4.0, "sparse 0": 3.0, "dense bf16 0": 1.0, "sparse bf16 0": 2.0}
        return {name: {**seconds, **forms}[name] for name in runs}

    monkeypatch.setattr(decide, "interleaved", fake)
    monkeypatch.setattr(whole, "interleaved", fake)
    plain = compile(model, x)
    assert {row.choice for row in plain.plan.rows} == {"dense"}
    assert next(plain.parameters()).dtype == torch.float32
    narrow = compile(model, x, dtype=torch.bfloat16)
    assert narrow.plan.dtype == "bfloat16"
    assert narrow.plan.dense_seconds == 1.0
    assert "bfloat16" in str(narrow.plan)
    assert narrow[0].weight.dtype == torch.bfloat16
    y = narrow(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, model(x), rtol=0.05, atol=0.05)
    again = compile(model, x, dtype=torch.bfloat16, choose=narrow.plan.choose)
    assert torch.equal(again(x), y)
    forms_without = {"dense 0": 4.0, "sparse 0": 1.0, "dense bf16 0": 3.0, "sparse bf16 0": 2.0}
    monkeypatch.setattr(
        whole, "interleaved", lambda runs, budget: {n: forms_without[n] for n in runs}
    )
    mixed = compile(model, x, dtype=torch.bfloat16)
    assert {row.choice for row in mixed.plan.rows} == {"dense bf16"}
    assert isinstance(mixed[0], DenseLayer)
    assert mixed[0].activation == "relu"
    assert mixed(x).dtype == torch.float32


def test_a_model_that_bfloat16_is_too_coarse_for_keeps_fp32(monkeypatch):
    class Fine(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = pruned(nn.Linear(8, 8))

        def forward(self, x):
            return (self.fc(x) + 1000.0 - 1000.0) * 50.0

    seen = []

    def fake(runs, *, budget):
        seen.extend(runs)
        return dict.fromkeys(runs, 1.0)

    monkeypatch.setattr(decide, "interleaved", fake)
    monkeypatch.setattr(whole, "interleaved", fake)
    model, x = Fine(), torch.randn(4, 8)
    fast = compile(model, x, dtype=torch.bfloat16)
    assert "dense 0" in seen or fast.plan.dense_seconds is None
    assert "dense bf16 0" not in seen
    torch.testing.assert_close(fast(x), model(x))


def test_a_bfloat16_model_takes_and_gives_what_the_original_does():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(5, 8), nn.Linear(8, 4)

        def forward(self, index, *, scale):
            return {"y": self.fc(self.embed(index) * scale), "index": (index, [scale])}

    model = Nested()
    index, scale = torch.tensor([1, 2]), torch.tensor(0.5)
    found, wanted = in_bfloat16(model)(index, scale=scale), model(index, scale=scale)
    assert found["y"].dtype == found["index"][1][0].dtype == torch.float32
    assert torch.equal(found["index"][0], index)
    torch.testing.assert_close(found["y"], wanted["y"], rtol=0.02, atol=0.02)
    assert model.fc.weight.dtype == torch.float32

"""save and load: what comes back is what went in, and nothing changes when anything is wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from prunus import formats
from prunus.errors import FormatError, ShapeError, ValueRangeError
from prunus.runtime import SparseLinear, compile, layers_from_file, load, save


def prune_(model, sparsity=0.9, seed=0):
    """Zero a fraction of every matrix, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) >= sparsity)
                parameter.add_(0.0)  # -0.0 becomes +0.0, which is what a packed file holds
    return model


def network(seed=0):
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 40))
    model = prune_(nn.Sequential(*layers))
    model(torch.randn(4, 3, 8, 8))  # gives the running statistics values of their own
    return model


def bits(tensor):
    """The bytes of a tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def assert_same(one, other):
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].shape == other[name].shape, name
        assert torch.equal(bits(one[name]), bits(other[name])), name


def test_a_model_comes_back_bit_for_bit(tmp_path):
    model = network()
    save(model, tmp_path / "m.safetensors")
    assert_same(load(tmp_path / "m.safetensors"), model.state_dict())
    other = network(seed=1)
    assert load(tmp_path / "m.safetensors", other) is other
    assert_same(other.state_dict(), model.state_dict())
    assert other[1].num_batches_tracked == 1


def test_the_summary_counts_what_the_file_holds(tmp_path):
    model = network()
    saved = save(model, tmp_path / "m.safetensors")
    state = model.state_dict()
    assert saved.bytes == (tmp_path / "m.safetensors").stat().st_size
    assert saved.dense_bytes == sum(t.numel() * t.element_size() for t in state.values())
    assert saved.elements == sum(t.numel() for t in state.values())
    assert saved.nonzeros == sum(int(t.count_nonzero()) for t in state.values())
    assert saved.formats["4.weight"] in ("csr", "bitmap")
    assert saved.formats["4.bias"] == "dense"
    assert saved.bytes < 0.5 * saved.dense_bytes
    assert "% of" in str(saved)


@pytest.mark.parametrize("format", ["dense", "bitmap", "csr"])
def test_a_forced_format_is_used_for_matrices(tmp_path, format):
    model = network()
    saved = save(model, tmp_path / "m.safetensors", format=format)
    assert {saved.formats[name] for name in ("0.weight", "4.weight")} == {format}
    assert_same(load(tmp_path / "m.safetensors"), model.state_dict())


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueRangeError, match="bitmap"):
        save(network(), tmp_path / "m.safetensors", format="zip")
    assert list(tmp_path.iterdir()) == []


class Holder(nn.Module):
    """A module of given buffers."""

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool"),
    *("complex64", "complex128"),
]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (6, 4), (2, 3, 4)])
def test_every_dtype_and_rank_comes_back(tmp_path, name, shape):
    dtype = getattr(torch, name)
    values = (torch.arange(24) % 3 == 0).float() * torch.arange(24)
    tensor = values[: max(1, torch.Size(shape).numel())].to(dtype)
    tensor = tensor[: torch.Size(shape).numel()].reshape(shape)
    holder = Holder(t=tensor)
    save(holder, tmp_path / "m.safetensors")
    assert_same(load(tmp_path / "m.safetensors"), {"t": tensor})
    blank = Holder(t=torch.zeros(shape, dtype=dtype))
    load(tmp_path / "m.safetensors", blank)
    assert_same(blank.state_dict(), {"t": tensor})


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=4),
    sparsity=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_sparsity_comes_back(tmp_path_factory, shape, sparsity, seed):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator)
    tensor = tensor * (torch.rand(shape, generator=generator) >= sparsity) + 0.0
    path = tmp_path_factory.mktemp("shapes") / "m.safetensors"
    save(Holder(t=tensor), path)
    assert_same(load(path), {"t": tensor})


def test_nan_and_infinity_are_values(tmp_path):
    tensor = torch.zeros(40, 40)
    tensor[3, 4], tensor[5, 6], tensor[7, 8] = float("nan"), float("inf"), -float("inf")
    save(Holder(t=tensor), tmp_path / "m.safetensors")
    assert_same(load(tmp_path / "m.safetensors"), {"t": tensor})


def test_non_contiguous_tensors_come_back_in_order(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    holder = Holder(a=base.T, b=base[:, ::2], c=base[0].expand(3, 6), d=torch.arange(8)[2:5])
    save(holder, tmp_path / "m.safetensors")
    assert_same(load(tmp_path / "m.safetensors"), holder.state_dict())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    model = prune_(Tied())
    saved = save(model, tmp_path / "m.safetensors")
    assert list(saved.formats) == ["embed.weight"]
    assert saved.dense_bytes == 50 * 8 * 4
    state = load(tmp_path / "m.safetensors")
    assert set(state) == {"embed.weight", "head.weight"}
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()
    other = load(tmp_path / "m.safetensors", Tied())
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.head.weight, model.embed.weight)


def test_equal_but_separate_tensors_are_both_stored(tmp_path):
    saved = save(Holder(a=torch.ones(3, 3), b=torch.ones(3, 3)), tmp_path / "m.safetensors")
    assert set(saved.formats) == {"a", "b"}
    view = torch.arange(12.0).reshape(3, 4)
    holder = Holder(a=view, b=view[:2], c=view.T, d=view.view(4, 3))
    saved = save(holder, tmp_path / "m.safetensors")
    assert set(saved.formats) == {"a", "b", "c", "d"}
    assert_same(load(tmp_path / "m.safetensors"), holder.state_dict())


def test_wrappers_are_looked_through(tmp_path):
    model = network()
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    save(wrapped, tmp_path / "m.safetensors")
    assert_same(load(tmp_path / "m.safetensors"), model.state_dict())
    target = torch.compile(network(seed=1), backend="eager")
    assert load(tmp_path / "m.safetensors", target) is target
    assert_same(target._orig_mod.state_dict(), model.state_dict())


def test_a_compiled_submodule_keeps_its_own_names(tmp_path):
    model, partly = network(), network(seed=1)
    names = list(model.state_dict())
    partly[0] = torch.compile(partly[0], backend="eager")
    assert list(partly.state_dict()) != names
    save(model, tmp_path / "m.safetensors")
    load(tmp_path / "m.safetensors", partly)
    save(partly, tmp_path / "n.safetensors")
    assert_same(load(tmp_path / "n.safetensors"), model.state_dict())


def test_any_safetensors_reader_opens_the_file(tmp_path):
    model = network()
    save(model, tmp_path / "m.safetensors")
    assert torch.equal(load_file(tmp_path / "m.safetensors")["4.bias"], model[4].bias)


def fails_unchanged(path, model, error, match):
    """The load raises, and every tensor of the model is as before."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match) as caught:
        load(path, model)
    assert_same(model.state_dict(), before)
    return str(caught.value)


def test_loading_is_strict_and_all_or_nothing(tmp_path):
    path = tmp_path / "m.safetensors"
    save(network(), path)
    torch.manual_seed(1)
    message = fails_unchanged(
        path,
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, affine=False), nn.PReLU()),
        FormatError,
        "missing in the file: 2.weight",
    )
    assert "not in the model: 1.weight, 1.bias, 4.weight, 4.bias" in message
    wrong = network()
    wrong[4] = nn.Linear(576, 41)
    message = fails_unchanged(path, wrong, ShapeError, r"4\.weight is \[40, 576\] in the file")
    assert "4.bias is [40] in the file, [41] in the model" in message


def test_a_damaged_file_changes_nothing(tmp_path):
    path = tmp_path / "m.safetensors"
    save(network(), path)
    whole = path.read_bytes()
    for damaged in (whole[:-3], whole[: len(whole) // 2], b"", whole[:-9] + b"?" + whole[-8:]):
        path.write_bytes(damaged)
        fails_unchanged(path, network(seed=1), FormatError, "m.safetensors")


@pytest.mark.parametrize(
    ("meta", "match"),
    [
        ({"aliases": {"b": "zzz"}}, "absent"),
        ({"aliases": {"t": "t"}}, "stored twice"),
        ({"aliases": ["t"]}, "aliases in the meta"),
        ({"aliases": {"b": 3}}, "aliases in the meta"),
        ({"views": {"t": "Tensor"}}, "claims to be 'Tensor'"),
        ({"views": {"t": "complex64"}}, "claims to be 'complex64'"),
        ({"views": {"t": "complex128"}}, "claims to be 'complex128'"),
    ],
)
def test_hostile_meta_is_refused(tmp_path, meta, match):
    packed = formats.pack(torch.ones(2, 3, dtype=torch.int16).numpy())
    formats.write(tmp_path / "m.safetensors", {"t": packed}, meta)
    with pytest.raises(FormatError, match=match):
        load(tmp_path / "m.safetensors")


def test_bits_that_do_not_divide_into_the_claimed_dtype_are_refused(tmp_path):
    packed = formats.pack(torch.ones(2, 3).numpy())
    formats.write(tmp_path / "m.safetensors", {"t": packed}, {"views": {"t": "complex64"}})
    with pytest.raises(FormatError, match="last axis"):
        load(tmp_path / "m.safetensors")


def test_what_is_not_a_plain_tensor_is_refused(tmp_path):
    with pytest.raises(FormatError, match=r"meta"):
        save(nn.Linear(2, 2, device="meta"), tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match=r"'t'.*sparse"):
        save(Holder(t=torch.eye(3).to_sparse()), tmp_path / "m.safetensors")

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(FormatError, match=r"_extra_state.*dict"):
        save(Extra(2, 2), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def compiled(seed=0):
    return compile(network(seed), torch.zeros(2, 3, 8, 8), choose=lambda layer: "csr")


def test_a_compiled_model_saves_and_loads(tmp_path):
    path, fast = tmp_path / "m.safetensors", compiled()
    saved, plain = save(fast, path), save(network(), tmp_path / "dense.safetensors")
    norm = network()[1].state_dict().values()  # folded into the convolution
    assert saved.elements == plain.elements - sum(t.numel() for t in norm)
    assert saved.nonzeros == plain.nonzeros - sum(int(t.count_nonzero()) for t in norm)
    assert saved.dense_bytes == plain.dense_bytes - sum(t.nbytes for t in norm)
    other = compiled(seed=1)
    load(path, other)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(other(x), fast(x))
    assert_same(other.state_dict(), fast.state_dict())


def test_a_single_packed_layer_saves_and_loads(tmp_path):
    layer = SparseLinear.from_dense(prune_(nn.Linear(30, 20)))
    saved = save(layer, tmp_path / "m.safetensors")
    assert saved.elements == 620
    other = load(tmp_path / "m.safetensors", SparseLinear.from_dense(nn.Linear(30, 20)))
    assert torch.equal(other.weight, layer.weight)


def test_dense_and_compiled_files_do_not_mix(tmp_path):
    path = tmp_path / "m.safetensors"
    save(network(), path)
    message = fails_unchanged(path, compiled(), FormatError, "missing in the file: 0.packed")
    assert "compiled" in message


def test_a_hostile_blob_in_a_good_file_reaches_no_kernel(tmp_path):
    path, fast = tmp_path / "m.safetensors", compiled()
    state = fast.state_dict()
    hostile = state["4.packed"].clone()
    hostile[64 + 4 : 64 + 160] = 255
    entries = {
        name: formats.pack((hostile if name == "4.packed" else tensor).numpy())
        for name, tensor in state.items()
    }
    formats.write(path, entries, {})
    fails_unchanged(path, compiled(seed=1), FormatError, r"4\.packed")
    with pytest.raises(FormatError, match=r"4\.packed"):
        list(layers_from_file(path))


def test_a_blob_for_another_layer_is_refused(tmp_path):
    path, fast = tmp_path / "m.safetensors", compiled()
    wrong = copy.deepcopy(fast)
    wrong[4] = SparseLinear.from_dense(nn.Linear(570, 40))
    save(wrong, path)
    fails_unchanged(path, fast, ShapeError, r"4\.packed holds a 40x570 weight.*40x576")


def test_an_unfinished_schedule_warns_once(tmp_path):
    from prunus import methods
    from prunus.drive import attach

    model = nn.Linear(30, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(methods.gradual_magnitude(sparsity=0.9, steps=10), model, optimizer)
    with pytest.warns(UserWarning, match=r"not finished.*0\.9") as caught:
        save(model, tmp_path / "m.safetensors")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    for _ in range(11):
        optimizer.zero_grad()
        model(torch.randn(4, 30)).square().sum().backward()
        optimizer.step()
    save(model, tmp_path / "m.safetensors")


def test_layers_of_a_file_can_be_run_without_their_model(tmp_path):
    model = network()
    save(model, tmp_path / "m.safetensors")
    layers = {layer.name: layer for layer in layers_from_file(tmp_path / "m.safetensors")}
    assert set(layers) == {"0.weight", "4.weight"}
    for name, layer in layers.items():
        weight = model.state_dict()[name]
        assert torch.equal(layer.weight, weight)
        assert layer.nonzeros == int(weight.count_nonzero())
    x = torch.randn(3, 576)
    y = SparseLinear(layers["4.weight"].blob, model[4].bias)(x)
    torch.testing.assert_close(y, model[4](x))


def test_layers_of_half_and_compiled_files(tmp_path):
    half = prune_(nn.Linear(64, 32)).bfloat16()
    save(half, tmp_path / "h.safetensors")
    (layer,) = layers_from_file(tmp_path / "h.safetensors")
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight, half.weight.float())
    save(compiled(), tmp_path / "c.safetensors")
    layers = {layer.name: layer for layer in layers_from_file(tmp_path / "c.safetensors")}
    assert torch.equal(layers["4.packed"].weight, network()[4].weight)
    assert layers["0.packed"].weight.shape == (16, 27)


def test_an_absent_file_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.safetensors")

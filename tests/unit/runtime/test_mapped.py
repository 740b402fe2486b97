"""Packed weights that stay in their file: shared between processes, never written through."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from prunus import formats
from prunus.errors import FormatError
from prunus.runtime import compile, load, save
from prunus.runtime.adopt import LEAST

SIZE, LAYERS = 1024, 6
WAYS = ("csr", "bitmap", "bitmap bf16", "bitmap int8", "groups", "tiled")


def network(seed=0, size=48, layers=3, sparsity=0.8):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(layers)))
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator) / size**0.5
        if parameter.dim() > 1:
            # whole vectors of 16 rows, so that every way fits
            kept = torch.rand(size // 16, size, generator=generator) >= sparsity
            values *= kept.repeat_interleave(16, 0)
        parameter.data = values
    return model.eval()


def compiled(way="csr", **rest):
    model = network(**rest)
    x = torch.zeros(1, model[0].in_features)
    return compile(model, x, dtype=torch.int8, choose=lambda layer: way, verify=False)


def mapped(tensor, path):
    """Whether a tensor's memory is that of a file, by this process's table of mappings."""
    return _mapping(tensor, path) == "file"


def _mapping(tensor, path):
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            return "file" if str(path) in line else "memory"
    return None


linux = pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="reads /proc")


@linux
@pytest.mark.parametrize("way", WAYS)
def test_blobs_of_every_kind_stay_in_the_file(tmp_path, way):
    path, fast = tmp_path / "m.safetensors", compiled(way)
    save(fast, path)
    other = load(path, compiled(way, seed=1))
    again = load(path, compiled(way, seed=1), mapped=False)
    x = torch.randn(5, 48)
    assert len(other.plan.sparse_layers) == 3
    for layer, copy in zip(other, again, strict=True):
        assert mapped(layer.packed, path)
        assert layer.packed.data_ptr() % 64 == 0
        assert not mapped(copy.packed, path)
    assert torch.equal(other(x), fast(x))
    assert torch.equal(again(x), fast(x))


@linux
def test_dense_tensors_of_a_compiled_model_stay_in_the_file_and_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inner = nn.Embedding(60, 48), network()
            self.head = nn.Linear(48, 60, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(self.inner(self.table(x)))

    path, example = tmp_path / "m.safetensors", torch.arange(7)[None]

    def choose(layer):
        return "csr" if "inner" in layer.name else "dense"

    torch.manual_seed(0)
    fast = compile(Tied(), example, choose=choose)
    save(fast, path)
    other = compile(Tied(), example, choose=choose)
    weight, bias = other.head.weight, other.inner[0].bias
    assert not torch.equal(weight, fast.head.weight)
    load(path, other)
    assert other.head.weight is other.table.weight is weight  # ties and identity survive
    assert mapped(weight, path)
    assert weight.nbytes >= LEAST > bias.nbytes
    assert not mapped(bias, path)
    assert torch.equal(other(example), fast(example))


@linux
def test_a_plain_model_gets_copies(tmp_path):
    path, model = tmp_path / "m.safetensors", network(sparsity=0.0)
    save(model, path)
    other = load(path, network(seed=1))
    assert not any(mapped(tensor, path) for tensor in other.state_dict().values())
    assert not any(mapped(tensor, path) for tensor in load(path).values())
    assert torch.equal(other[0].weight, model[0].weight)


@linux
def test_writing_changes_neither_the_file_nor_others(tmp_path):
    path, fast = tmp_path / "m.safetensors", compiled()
    save(fast, path)
    before = path.read_bytes()
    one, other = load(path, compiled()), load(path, compiled())
    one[0].packed.zero_()
    assert path.read_bytes() == before
    assert torch.equal(other[0].packed, fast[0].packed)
    assert not one[0].packed.any()


@linux
def test_a_loaded_model_survives_its_file(tmp_path):
    path, fast = tmp_path / "m.safetensors", compiled()
    save(fast, path)
    other = load(path, compiled(seed=1))
    save(compiled(seed=2), path)
    x = torch.randn(3, 48)
    assert torch.equal(other(x), fast(x))
    path.unlink()
    assert torch.equal(other(x), fast(x))
    save(other, path)  # from the mapping of what was deleted
    assert torch.equal(load(path, compiled(seed=3))(x), fast(x))
    save(other, path)
    assert torch.equal(other(x), fast(x))


@linux
def test_a_model_saved_over_its_own_file_is_whole(tmp_path):
    path = tmp_path / "m.safetensors"
    save(compiled(), path)
    first = path.read_bytes()
    save(load(path, compiled(seed=1)), path)
    assert path.read_bytes() == first


def test_older_files_whose_blobs_are_not_aligned_load_into_memory(tmp_path):
    fast, path = compiled(), tmp_path / "m.safetensors"
    entries = {name: formats.pack(t.numpy()) for name, t in fast.state_dict().items()}
    formats.write(path, entries, {})
    raw = path.read_bytes()
    header = int.from_bytes(raw[:8], "little")
    # the same file with a header 8 bytes longer, as other writers make them
    path.write_bytes((header + 8).to_bytes(8, "little") + raw[8 : 8 + header] + b" " * 8
                     + raw[8 + header :])  # fmt: skip
    other, x = load(path, compiled(seed=1)), torch.randn(3, 48)
    assert all(layer.packed.data_ptr() % 64 == 0 for layer in other)
    assert torch.equal(other(x), fast(x))


def test_truncated_and_hostile_files_leave_the_model_as_it_was(tmp_path):
    path, fast = tmp_path / "m.safetensors", compiled()
    save(fast, path)
    good = path.read_bytes()
    other, x = compiled(seed=1), torch.randn(3, 48)
    wanted = other(x)
    bad = [good[:size] for size in (1, 9, 700, len(good) // 2, len(good) - 1)]
    for place in (len(good) // 3, len(good) // 2, len(good) - 40):
        bad.append(good[:place] + bytes([good[place] ^ 255]) + good[place + 1 :])
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(FormatError):
            load(path, other)
        assert torch.equal(other(x), wanted)


def test_a_hostile_blob_with_good_checksums_is_refused(tmp_path):
    path, fast = tmp_path / "m.safetensors", compiled("bitmap")
    state = {name: t.numpy().copy() for name, t in fast.state_dict().items()}
    state["1.packed"][64:96] = 255
    formats.write(path, {name: formats.pack(array) for name, array in state.items()}, {})
    other = compiled("bitmap", seed=1)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(FormatError, match=r"1\.packed"):
        load(path, other)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


def test_arrays_of_whole_multiples_of_64_bytes_are_aligned_in_the_file(tmp_path):
    path, sizes = tmp_path / "m.safetensors", (1, 3, 64, 128, 7, 640, 9, 192)
    entries = {f"t{i}": formats.pack(np.arange(n, dtype=np.uint8)) for i, n in enumerate(sizes)}
    entries["wide"] = formats.pack(np.arange(5, dtype=np.float64))
    formats.write(path, entries, {})
    read, _ = formats.read(path)
    places = {name: held.parts["values"].ctypes.data for name, held in read.items()}
    assert all(places[f"t{i}"] % 64 == 0 for i, n in enumerate(sizes) if n % 64 == 0)
    assert places["wide"] % 8 == 0
    with pytest.raises(ValueError, match="read-only"):
        read["wide"].parts["values"][0] = 1


def _facts():
    """Kilobytes of this process by kind."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) for line in lines}


def _child(path, way):
    """A process that loads a compiled model, uses it, tells its memory and waits for its end."""
    torch.set_num_threads(1)
    fast = compiled(size=SIZE, layers=LAYERS)
    x = torch.ones(1, SIZE)
    fast(x)
    for layer in fast:
        layer.packed = torch.zeros(0, dtype=torch.uint8)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _facts()
    load(path, fast, mapped=way == "mapped")
    y = fast(x)
    print("ready", flush=True)
    sys.stdin.readline()  # both are loaded
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    after = _facts()
    held = sum(layer.packed.nbytes for layer in fast)
    private = sum(after[f"Private_{k}"] - before[f"Private_{k}"] for k in ("Clean", "Dirty"))
    shared = sum(after[f"Shared_{k}"] - before[f"Shared_{k}"] for k in ("Clean", "Dirty"))
    facts = {"private": private << 10, "shared": shared << 10, "held": held}
    print(json.dumps(facts | {"sum": float(y.double().sum())}), flush=True)
    sys.stdin.readline()


def _compiler(way):
    """A process that compiles a model, lets go of the dense one and tells its memory, in bytes."""

    def measured(name):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        status = Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(name))
        return int(line.split()[1]) << 10

    torch.set_num_threads(1)
    compiled(way)  # what is imported and kept at the first use
    before, (size, layers) = measured("VmRSS"), (SIZE, 4 * LAYERS)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    model = network(size=size, layers=layers)
    x = torch.zeros(1, size)
    fast = compile(model, x, dtype=torch.int8, choose=lambda layer: way)
    del model
    facts = {
        "peak": measured("VmHWM") - before,
        "resident": measured("VmRSS") - before,
        "packed": sum(layer.packed.nbytes for layer in fast),
        "layer": 4 * size * size,
        "dense": 4 * size * size * layers,
    }
    print(json.dumps(facts))


@linux
@pytest.mark.slow
@pytest.mark.parametrize("way", ["csr", "bitmap int8"])
def test_packed_weights_are_the_only_copy_after_compile(way):
    command = [sys.executable, __file__, "compile", way]
    # blocks of their own: what glibc keeps of freed ones for later would drown the figures
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    facts = json.loads(done.stdout)
    assert facts["resident"] < 1.1 * facts["packed"] + (6 << 20)
    assert facts["packed"] < 0.4 * facts["dense"]
    # packing works on one layer at a time
    assert facts["peak"] < facts["dense"] + facts["packed"] + 12 * facts["layer"]


def _run(path, way):
    children = [
        subprocess.Popen(
            [sys.executable, __file__, str(path), way],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        for child in children:
            assert child.stdout.readline() == "ready\n"
        found = []
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
            found.append(json.loads(child.stdout.readline()))
        return found
    finally:
        for child in children:
            child.communicate("\n", timeout=60)


@linux
@pytest.mark.slow
def test_two_processes_share_the_memory_of_one_file(tmp_path):
    fast = compiled(size=SIZE, layers=LAYERS)
    path = tmp_path / "m.safetensors"
    save(fast, path)
    wanted = float(fast(torch.ones(1, SIZE)).double().sum())
    for facts in _run(path, "mapped"):
        assert facts["sum"] == wanted
        assert facts["shared"] > 0.95 * facts["held"]
        assert facts["private"] < 0.4 * facts["held"]
    for facts in _run(path, "memory"):
        assert facts["sum"] == wanted
        assert facts["private"] > 0.8 * facts["held"]


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        _compiler(sys.argv[2])
    else:
        _child(sys.argv[1], sys.argv[2])

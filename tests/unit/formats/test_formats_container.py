from __future__ import annotations

import json
import os
import zlib

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from prunus.errors import FormatError, ValueRangeError
from prunus.formats import describe, pack, read, unpack, write


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((64, 48)).astype(np.float32)
    return {
        "conv.weight": np.where(rng.random((8, 4, 3, 3)) < 0.6, 0, 1).astype(np.float16),
        "fc.weight": np.where(rng.random(dense.shape) < 0.99, 0, dense),
        "fc.bias": dense[0],
        "half": np.where(rng.random((20, 20)) < 0.5, 0, 3).astype(np.int8),
        "scalar": np.array(3.5, np.float64),
        "nothing": np.zeros((0, 7), np.float32),
    }


@pytest.fixture
def path(tmp_path, arrays):
    path = tmp_path / "model.safetensors"
    write(path, {k: pack(v) for k, v in arrays.items()}, {"steps": [1, 2], "name": "Ü"})
    return path


def test_read_gives_back_everything(path, arrays):
    tensors, meta = read(path)
    assert meta == {"steps": [1, 2], "name": "Ü"}
    assert list(tensors) == list(arrays)
    for name, array in arrays.items():
        assert unpack(tensors[name]).tobytes() == array.tobytes()
        assert unpack(tensors[name]).shape == array.shape
        assert not any(p.flags.writeable for p in tensors[name].parts.values() if p.size)
        assert all(p.flags.aligned for p in tensors[name].parts.values())
    assert {t.format for t in tensors.values()} == {"dense", "bitmap", "csr"}


def test_describe_reads_the_header_only(path, arrays):
    tensors, _ = read(path)
    shown = describe(path)
    assert shown["version"] == 1
    assert shown["bytes"] == path.stat().st_size
    for name, packed in tensors.items():
        row = shown["tensors"][name]
        assert row["format"] == packed.format
        assert row["shape"] == packed.shape == arrays[name].shape
        assert row["nonzeros"] == np.count_nonzero(arrays[name])
        assert row["bytes"] == packed.nbytes


def test_any_safetensors_reader_opens_it(path, arrays):
    plain = safetensors.numpy.load_file(path)
    tensors, _ = read(path)
    np.testing.assert_array_equal(plain["fc.bias"], arrays["fc.bias"])
    for part, array in tensors["fc.weight"].parts.items():
        np.testing.assert_array_equal(plain[f"fc.weight.{part}"], array)
    assert "fc.weight" not in plain
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert int(metadata["prunus_crc32"], 16) == zlib.crc32(metadata["prunus"].encode())


def test_bfloat16_and_float16_carry_their_true_dtype(tmp_path):
    values = torch.randn(5, 6, dtype=torch.bfloat16)
    values[values.abs() < 1] = 0
    bits = values.view(torch.uint16).numpy()
    entries = {"d": pack(bits, "dense", "bfloat16"), "b": pack(bits, "bitmap", "bfloat16")}
    write(tmp_path / "f", entries, {})
    plain = safetensors.torch.load_file(tmp_path / "f")
    assert torch.equal(plain["d"], values)
    assert torch.equal(plain["b.values"], values[values != 0])
    tensors, _ = read(tmp_path / "f")
    np.testing.assert_array_equal(unpack(tensors["b"]), bits)


def test_arrays_outlive_a_replaced_file(path, arrays):
    tensors, _ = read(path)
    write(path, {"x": pack(np.ones(3, np.float32))}, {})
    np.testing.assert_array_equal(unpack(tensors["fc.weight"]), arrays["fc.weight"])
    assert list(read(path)[0]) == ["x"]


def test_the_same_content_gives_the_same_bytes(path, tmp_path, arrays):
    write(tmp_path / "again", {k: pack(v) for k, v in arrays.items()}, describe(path)["meta"])
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_failed_write_leaves_the_old_file_and_no_litter(path, monkeypatch):
    before = path.read_bytes()

    def refuse(_handle):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="disk full"):
        write(path, {"x": pack(np.ones(3, np.float32))}, {})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_the_file_obeys_the_umask(path):
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_names_that_collide_are_refused(tmp_path):
    sparse = pack(np.eye(40, dtype=np.float32), "csr")
    dense = pack(np.ones(3, np.float32))
    with pytest.raises(ValueRangeError, match=r"w\.values"):
        write(tmp_path / "f", {"w": sparse, "w.values": dense}, {})
    with pytest.raises(ValueRangeError, match="__metadata__"):
        write(tmp_path / "f", {"__metadata__": dense}, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("meta", [{"a": object()}, {"a": float("nan")}, {"a": np.float32(1)}])
def test_meta_must_be_json(tmp_path, meta):
    with pytest.raises(ValueRangeError, match="JSON"):
        write(tmp_path / "f", {}, meta)


def test_empty_file_missing_file_and_no_tensors(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(FormatError, match="empty"):
        read(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent")
    write(tmp_path / "none", {}, {"a": 1})
    assert read(tmp_path / "none") == ({}, {"a": 1})


def test_plain_safetensors_says_how_to_open_it(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, tmp_path / "plain")
    with pytest.raises(FormatError, match=r"safetensors\.torch\.load_file"):
        read(tmp_path / "plain")


def reseal(path, change):
    """Rewrite the prunus header with a correct checksum after `change` edited it."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    inner = json.loads(header["__metadata__"]["prunus"])
    inner = change(inner, header) or inner
    text = inner if isinstance(inner, str) else json.dumps(inner)
    header["__metadata__"] |= {
        "prunus": text,
        "prunus_crc32": f"{zlib.crc32(text.encode()):08x}",
    }
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + length :])


def tensor(inner):
    return inner["tensors"]["fc.weight"]


HOSTILE = {
    "newer version": lambda i, h: i.update(version=3),
    "version true": lambda i, h: i.update(version=True),
    "no version": lambda i, h: i.pop("version") and None,
    "extra key": lambda i, h: i.update(more=1),
    "tensors list": lambda i, h: i.update(tensors=[]),
    "meta text": lambda i, h: i.update(meta="x"),
    "not an object": lambda i, h: "[1]",
    "not JSON": lambda i, h: "{",
    "deep JSON": lambda i, h: "[" * 200_000,
    "NaN": lambda i, h: '{"version": NaN}',
    "long integer": lambda i, h: '{"version": ' + "9" * 50_000 + "}",
    "duplicate key": lambda i, h: '{"version": 1, "version": 1, "tensors": {}, "meta": {}}',
    "tensor null": lambda i, h: i["tensors"].update({"fc.weight": None}),
    "tensor gone": lambda i, h: i["tensors"].pop("fc.weight") and None,
    "unknown format": lambda i, h: tensor(i).update(format="zip"),
    "format list": lambda i, h: tensor(i).update(format=[]),
    "other format": lambda i, h: tensor(i).update(format="bitmap"),
    "unknown dtype": lambda i, h: tensor(i).update(dtype="float8"),
    "other dtype": lambda i, h: tensor(i).update(dtype="float64"),
    "dtype null": lambda i, h: tensor(i).update(dtype=None),
    "huge shape": lambda i, h: tensor(i).update(shape=[1 << 62, 1 << 62]),
    "huge and zero": lambda i, h: tensor(i).update(shape=[0, 1 << 62]),
    "negative shape": lambda i, h: tensor(i).update(shape=[-64, -48]),
    "float shape": lambda i, h: tensor(i).update(shape=[64.0, 48]),
    "shape text": lambda i, h: tensor(i).update(shape="64"),
    "many dimensions": lambda i, h: tensor(i).update(shape=[1] * 1000),
    "transposed": lambda i, h: tensor(i).update(shape=[48, 64]),
    "wider": lambda i, h: tensor(i).update(shape=[64, 1 << 20]),
    "nonzeros off": lambda i, h: tensor(i).update(nonzeros=tensor(i)["nonzeros"] + 1),
    "nonzeros huge": lambda i, h: tensor(i).update(nonzeros=1 << 60),
    "nonzeros null": lambda i, h: tensor(i).update(nonzeros=None),
    "no parts": lambda i, h: tensor(i).update(parts={}),
    "parts list": lambda i, h: tensor(i).update(parts=[]),
    "part null": lambda i, h: tensor(i)["parts"].update(values=None),
    "part shape": lambda i, h: tensor(i)["parts"]["values"].update(shape=[1]),
    "part dtype": lambda i, h: tensor(i)["parts"]["values"].update(dtype="int32"),
    "part crc": lambda i, h: tensor(i)["parts"]["values"].update(crc32=1),
    "crc null": lambda i, h: tensor(i)["parts"]["values"].update(crc32=None),
    "array dtype": lambda i, h: h["fc.weight.values"].update(dtype="I32"),
    "array shape": lambda i, h: h["fc.weight.values"].update(shape=[1 << 40, 1 << 40]),
    "offsets past the end": lambda i, h: h["fc.bias"].update(
        data_offsets=[1 << 40, (1 << 40) + 192]
    ),
    "offsets reversed": lambda i, h: h["fc.bias"]["data_offsets"].reverse(),
    "overlap": lambda i, h: h["fc.bias"].update(data_offsets=[64, 256]),
    "stray array": lambda i, h: h.update(
        stray={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    ),
    "metadata number": lambda i, h: h["__metadata__"].update(x=1),
    "entry list": lambda i, h: h.update({"fc.bias": []}),
    "lone surrogate": lambda i, h: '"\\ud800"',
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_headers_raise_format_errors(path, name):
    reseal(path, lambda inner, header: None)
    read(path)  # resealing alone does no harm
    reseal(path, HOSTILE[name])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        read(path)


def test_version_error_names_what_is_readable(path):
    reseal(path, HOSTILE["newer version"])
    with pytest.raises(FormatError, match=r"version 3 .* reads 1, 2"):
        read(path)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00",
        b"\xff" * 8,
        b"\xff" * 100,
        (0).to_bytes(8, "little"),
        (2).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"\xff\xfe",
        (4).to_bytes(8, "little") + b"null",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        (1 << 63).to_bytes(8, "little") + b"{}",
    ],
)
def test_garbage_raises_format_errors(tmp_path, raw):
    (tmp_path / "f").write_bytes(raw)
    for reader in (read, describe):
        with pytest.raises(FormatError):
            reader(tmp_path / "f")

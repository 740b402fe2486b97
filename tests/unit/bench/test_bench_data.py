from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunus.bench import batches, digits, fashion_mnist, shift
from prunus.bench.data import DataError, generator
from prunus.errors import FormatError, ShapeError, ValueRangeError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def test_digits_are_complete_and_normalised():
    data = digits()
    assert data.train_inputs.shape[1:] == (1, 8, 8)
    assert len(data.train_inputs) + len(data.test_inputs) == 1797
    assert (data.classes, data.name) == (10, "digits")
    assert data.train_inputs.dtype == torch.float32
    assert float(data.train_inputs.mean()) == pytest.approx(0, abs=1e-5)
    assert float(data.train_inputs.std()) == pytest.approx(1, abs=1e-5)


def test_digits_split_is_stratified_disjoint_and_seeded():
    first, again, other = digits(0), digits(0), digits(1)
    assert torch.equal(first.test_inputs, again.test_inputs)
    assert not torch.equal(first.test_targets, other.test_targets)
    whole = first.train_targets.bincount() + first.test_targets.bincount()
    assert torch.equal(first.test_targets.bincount(), (whole * 0.2).round().long())
    images = torch.cat([first.train_inputs, first.test_inputs]).flatten(1)
    assert len(images.unique(dim=0)) == 1797  # no image is in both parts


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"prunus\[demo\]"):
        digits()


def idx(array: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, array.dim()]) + struct.pack(f">{array.dim()}I", *array.shape)
    return header + array.to(torch.uint8).numpy().tobytes()


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 6), ("t10k", 3)):
        images = torch.arange(count * 12).view(count, 3, 4) % 256
        for kind, array in (("images-idx3", images), ("labels-idx1", torch.arange(count) % 3)):
            with gzip.open(tmp_path / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(idx(array))
    return tmp_path


def test_idx_files_are_read_by_hand_written_bytes(folder, monkeypatch):
    data = fashion_mnist(folder)
    raw = torch.arange(72, dtype=torch.float32).view(6, 1, 3, 4)
    assert torch.allclose(data.train_inputs, (raw - raw.mean()) / raw.std())
    assert data.train_targets.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.test_inputs.shape == (3, 1, 3, 4)
    monkeypatch.setenv("PRUNUS_DATA", str(folder))
    assert torch.equal(fashion_mnist().train_inputs, data.train_inputs)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "header says"),
        (lambda raw: raw[:7], "not an IDX file"),
        (lambda raw: b"\0\0\x0d\3" + raw[4:], "not an IDX file"),
        (lambda raw: raw[:4] + b"\xff" * 12 + raw[16:], "header says"),
    ],
)
def test_damaged_idx_files_are_refused(folder, damage, message):
    path = folder / "train-images-idx3-ubyte.gz"
    with gzip.open(path) as file:
        raw = file.read()
    with gzip.open(path, "wb") as file:
        file.write(damage(raw))
    with pytest.raises(FormatError, match=message):
        fashion_mnist(folder)


def test_truncated_gzip_and_wrong_counts_are_refused(folder):
    path = folder / "t10k-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    for damaged in (whole[:-9], b"no gzip"):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match="gzip"):
            fashion_mnist(folder)
    path.write_bytes(gzip.compress(idx(torch.zeros(4))))
    with pytest.raises(FormatError, match="3 t10k images but 4 labels"):
        fashion_mnist(folder)


def test_missing_files_say_how_to_get_them(tmp_path):
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist(tmp_path)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist(monkeypatch):
    monkeypatch.delenv("PRUNUS_DATA", raising=False)
    data = fashion_mnist()
    assert data.train_inputs.shape == (60000, 1, 28, 28)
    assert data.test_targets.bincount().tolist() == [1000] * 10


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 9), st.integers(0, 9))
def test_batches_visit_every_example_once_in_a_fixed_order(n, size, seed, epoch):
    inputs = torch.arange(n)
    got = list(batches(inputs, inputs * 2, size, seed, epoch))
    again = list(batches(inputs, inputs * 2, size, seed, epoch))
    order = torch.cat([x for x, _ in got])
    assert order.sort().values.tolist() == list(range(n))
    assert all(torch.equal(2 * x, y) for x, y in got)
    assert torch.equal(order, torch.cat([x for x, _ in again]))
    assert {len(x) for x, _ in got[:-1]} <= {size}


def test_batches_change_with_seed_and_epoch_and_check_arguments():
    numbers = torch.arange(100)
    orders = {
        tuple(next(batches(numbers, numbers, 100, seed, epoch))[0].tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9
    with pytest.raises(ValueRangeError, match="batch_size"):
        next(batches(numbers, numbers, 0, 0, 0))
    with pytest.raises(ShapeError, match="100 inputs but 99"):
        next(batches(numbers, numbers[1:], 5, 0, 0))


def test_shift_moves_by_at_most_one_pixel_with_repeated_edges():
    images = torch.arange(2 * 2 * 4 * 5, dtype=torch.float32).view(2, 2, 4, 5)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    for seed in range(20):
        moved = shift(images, generator(seed))
        for before, after in zip(padded, moved, strict=True):
            windows = [before[:, r : r + 4, c : c + 5] for r in range(3) for c in range(3)]
            assert any(torch.equal(after, window) for window in windows)

"""Small real data sets as tensors, and deterministic batches without workers."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prunus.errors import FormatError, PrunusError, ShapeError, ValueRangeError

_FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class DataError(PrunusError, RuntimeError):
    """A data set is not installed; the message says how to install it."""


@dataclass(frozen=True)
class Dataset:
    """Inputs float32 [n, channels, height, width] and targets int64 [n], for training and test."""

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: int
    name: str


def digits(seed: int = 0) -> Dataset:
    """1797 handwritten digits 8x8 of scikit-learn, split 80/20 per class by `seed`.

    Normalised by mean and deviation of the training images. Raises DataError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed; "
            "run: pip install 'prunus[demo]'"
        ) from error
    images, labels = load_digits(return_X_y=True)
    inputs = torch.from_numpy(np.asarray(images, dtype=np.float32)).view(-1, 1, 8, 8)
    targets = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    test = _stratified(targets, 0.2, seed)
    return _dataset(inputs[~test], targets[~test], inputs[test], targets[test], "digits")


def fashion_mnist(folder: str | os.PathLike[str] | None = None) -> Dataset:
    """Fashion-MNIST: 60,000 and 10,000 images of clothes 28x28, from gzipped IDX files.

    Looks in `folder`, else in the environment variable PRUNUS_DATA, else where Debian's package
    dataset-fashion-mnist puts it. Raises DataError if absent, FormatError if damaged.
    """
    root = Path(folder or os.environ.get("PRUNUS_DATA") or _FASHION_FOLDER)
    if not folder and (root / "fashion-mnist").is_dir():
        root = root / "fashion-mnist"
    arrays = []
    for part in ("train", "t10k"):
        images = _read_idx(root / f"{part}-images-idx3-ubyte.gz", dimensions=3)
        labels = _read_idx(root / f"{part}-labels-idx1-ubyte.gz", dimensions=1)
        if images.shape[0] != labels.shape[0]:
            raise FormatError(
                f"{root}: {images.shape[0]} {part} images but {labels.shape[0]} labels; "
                "install the data set again"
            )
        arrays += [images.unsqueeze(1).float(), labels.long()]
    return _dataset(*arrays, name="fashion-mnist")


def batches(
    inputs: Tensor, targets: Tensor, batch_size: int, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches, the last possibly smaller; the order depends on seed and epoch only.

    Raises ValueRangeError for a batch size below 1, ShapeError if the lengths differ.
    """
    if batch_size < 1:
        raise ValueRangeError(f"batch_size is {batch_size}; it must be at least 1")
    if len(inputs) != len(targets):
        raise ShapeError(f"batches: {len(inputs)} inputs but {len(targets)} targets")
    order = torch.randperm(len(inputs), generator=generator(seed, epoch))
    for chosen in order.split(batch_size):
        yield inputs[chosen], targets[chosen]


def generator(*keys: int) -> torch.Generator:
    """A generator seeded by several integers; close keys give unrelated streams."""
    words = np.random.SeedSequence([key % 2**32 for key in keys]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


def shift(inputs: Tensor, stream: torch.Generator, pixels: int = 1) -> Tensor:
    """Move each image [n, c, h, w] by up to `pixels` in each direction; edges are repeated."""
    n, _, height, width = inputs.shape
    rows = torch.arange(height) + torch.randint(-pixels, pixels + 1, (n, 1), generator=stream)
    columns = torch.arange(width) + torch.randint(-pixels, pixels + 1, (n, 1), generator=stream)
    rows = rows.clamp(0, height - 1)[:, None, :, None]
    columns = columns.clamp(0, width - 1)[:, None, None, :]
    example = torch.arange(n)[:, None, None, None]
    channel = torch.arange(inputs.shape[1])[None, :, None, None]
    return inputs[example, channel, rows, columns]


def _stratified(targets: Tensor, fraction: float, seed: int) -> Tensor:
    """Boolean [n]: a random `fraction` of each class, rounded per class."""
    test = torch.zeros(len(targets), dtype=torch.bool)
    stream = generator(seed)
    for label in targets.unique().tolist():
        members = (targets == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=stream)
        test[members[order[: round(fraction * len(members))]]] = True
    return test


def _dataset(
    train_inputs: Tensor,
    train_targets: Tensor,
    test_inputs: Tensor,
    test_targets: Tensor,
    name: str,
) -> Dataset:
    # One mean and one deviation for all pixels: borders that are always zero stay harmless.
    deviation, mean = torch.std_mean(train_inputs)
    return Dataset(
        train_inputs=(train_inputs - mean) / deviation,
        train_targets=train_targets,
        test_inputs=(test_inputs - mean) / deviation,
        test_targets=test_targets,
        classes=int(train_targets.max()) + 1,
        name=name,
    )


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """Read an IDX file of unsigned bytes: 00 00 08 d, then d big-endian sizes, then the bytes."""
    if not path.is_file():
        raise DataError(
            f"{path} is missing; run: apt-get install dataset-fashion-mnist, "
            "or set PRUNUS_DATA to a folder that holds the four gzipped IDX files"
        )
    try:
        with gzip.open(path) as file:
            raw = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(
            f"{path}: not a complete gzip file ({error}); install it again"
        ) from error
    start = 4 + 4 * dimensions
    if len(raw) < start or raw[:4] != bytes([0, 0, 8, dimensions]):
        raise FormatError(f"{path}: not an IDX file of bytes with {dimensions} dimensions")
    shape = [int(size) for size in np.frombuffer(raw, ">u4", dimensions, offset=4)]
    if len(raw) - start != prod(shape):
        raise FormatError(
            f"{path}: the header says {shape}, that is {prod(shape)} bytes, "
            f"but {len(raw) - start} follow; install it again"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())

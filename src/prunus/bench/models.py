"""Small networks whose classes can be imported by name, initialised by a seed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from prunus.errors import ValueRangeError

Model = TypeVar("Model", bound=nn.Module)


class MLP(nn.Module):
    """Fully connected layers fc1, fc2, ... with ReLU between; flattens its input [n, ...]."""

    def __init__(self, inputs: int, hidden: Sequence[int], classes: int) -> None:
        super().__init__()
        sizes = [inputs, *hidden, classes]
        if min(sizes) < 1:
            raise ValueRangeError(f"MLP: the sizes {sizes} must all be at least 1")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
            layers[f"fc{number}"] = nn.Linear(fan_in, fan_out)
            if number < len(sizes) - 1:
                layers[f"relu{number}"] = nn.ReLU()
        self.layers = nn.Sequential(layers)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [n, classes]."""
        return self.layers(inputs.flatten(1))


class DigitsCNN(nn.Module):
    """3x3 and 1x1 convolutions with batch norm for images [n, 1, 8, 8]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        if width < 1 or classes < 1:
            raise ValueRangeError(f"DigitsCNN: width {width} and classes {classes} must be >= 1")
        self.features = nn.Sequential(
            _block(1, width, 3),
            _block(width, 2 * width, 3),
            nn.MaxPool2d(2),
            _block(2 * width, 4 * width, 1),
            _block(4 * width, 4 * width, 3),
            _block(4 * width, 8 * width, 1),
            nn.AdaptiveAvgPool2d(1),
        )
        self.classifier = nn.Linear(8 * width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [n, classes]."""
        return self.classifier(self.features(inputs).flatten(1))


class FashionCNN(nn.Module):
    """Four 3x3 convolutions with batch norm and pooling between, for images [n, 1, 28, 28]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        if width < 1 or classes < 1:
            raise ValueRangeError(f"FashionCNN: width {width} and classes {classes} must be >= 1")
        self.features = nn.Sequential(
            _block(1, width, 3),
            nn.MaxPool2d(2),
            _block(width, 2 * width, 3),
            nn.MaxPool2d(2),
            _block(2 * width, 4 * width, 3),
            _block(4 * width, 8 * width, 3),
            nn.AdaptiveAvgPool2d(1),
        )
        self.classifier = nn.Linear(8 * width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [n, classes]."""
        return self.classifier(self.features(inputs).flatten(1))


def mlp(
    inputs: int = 64, hidden: Sequence[int] = (1536, 1536), classes: int = 10, *, seed: int = 0
) -> MLP:
    """A wide MLP, 2.5 million parameters by default."""
    return seeded(seed, lambda: MLP(inputs, hidden, classes))


def digits_cnn(width: int = 32, classes: int = 10, *, seed: int = 0) -> DigitsCNN:
    """A CNN for 8x8 images, 211 thousand parameters by default."""
    return seeded(seed, lambda: DigitsCNN(width, classes))


def fashion_cnn(width: int = 16, classes: int = 10, *, seed: int = 0) -> FashionCNN:
    """A CNN for 28x28 images, 98 thousand weights by default."""
    return seeded(seed, lambda: FashionCNN(width, classes))


def lenet_300_100(inputs: int = 784, classes: int = 10, *, seed: int = 0) -> MLP:
    """The MLP 784-300-100-10 (LeCun, Bottou, Bengio, Haffner, 1998), with ReLU."""
    return seeded(seed, lambda: MLP(inputs, (300, 100), classes))


def _block(fan_in: int, fan_out: int, kernel: int) -> nn.Sequential:
    # The batch norm has its own shift, so that the convolution needs no bias.
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2, bias=False),
            norm=nn.BatchNorm2d(fan_out),
            relu=nn.ReLU(),
        )
    )


def seeded(seed: int, build: Callable[[], Model]) -> Model:
    """Build with the given seed and leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()

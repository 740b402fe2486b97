"""Networks of the usual sizes for inference benchmarks, written out so that nothing is downloaded.

ResNet-50 (He, Zhang, Ren, Sun, 2015, arXiv 1512.03385, stride in the 3x3 convolutions), MobileNetV2
(Sandler et al., 2018, arXiv 1801.04381) and the encoder of BERT (Devlin et al., 2018, arXiv
1810.04805), also in the sizes of MiniLM (Wang et al., 2020, arXiv 2002.10957).
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from prunus.bench.models import seeded

RESNET50_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # width, blocks, stride
MOBILENET_STAGES = (  # expansion, channels, blocks, stride
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a residual connection; one ReLU in three places."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """Images [n, inputs, h, w] to [n, 4 width, h / stride, w / stride]."""
        out = self.relu(self.bn1(self.conv1(inputs)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += inputs if self.downsample is None else self.downsample(inputs)
        return self.relu(out)


class ResNet50(nn.Module):
    """Images [n, 3, 224, 224] to logits."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        blocks: list[nn.Module] = []
        channels = 64
        for width, count, stride in RESNET50_STAGES:
            for number in range(count):
                blocks.append(Bottleneck(channels, width, stride if number == 0 else 1))
                channels = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [n, classes]."""
        features = self.maxpool(self.relu(self.bn1(self.conv1(inputs))))
        return self.fc(self.avgpool(self.blocks(features)).flatten(1))


class InvertedResidual(nn.Module):
    """Expansion, depthwise and projection; the input is added where shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [_unit(inputs, hidden, 1)]
        layers.append(_unit(hidden, hidden, 3, stride, groups=hidden))
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, inputs: Tensor) -> Tensor:
        """Images to images."""
        return inputs + self.conv(inputs) if self.adds else self.conv(inputs)


class MobileNetV2(nn.Module):
    """Images [n, 3, 224, 224] to logits."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [_unit(3, 32, 3, 2)]
        channels = 32
        for expansion, outputs, count, stride in MOBILENET_STAGES:
            for number in range(count):
                step = stride if number == 0 else 1
                layers.append(InvertedResidual(channels, outputs, step, expansion))
                channels = outputs
        layers.append(_unit(channels, 1280, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [n, classes]."""
        return self.classifier(self.features(inputs).mean((2, 3)))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward pair, layer norms behind the residual additions."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.first_norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.second_norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [n, length, width] to the same shape."""
        query, key, value = (
            part(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = self.output(mixed.transpose(1, 2).flatten(2))
        tokens = self.first_norm(mixed + tokens)
        return self.second_norm(self.down(F.gelu(self.up(tokens))) + tokens)


class Encoder(nn.Module):
    """Embedded tokens [n, length, width] through layers to the logits of the first token."""

    def __init__(self, layers: int, width: int, heads: int, classes: int = 2) -> None:
        super().__init__()
        stack = [EncoderLayer(width, heads, 4 * width) for _ in range(layers)]
        self.layers = nn.Sequential(*stack)
        self.classifier = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [n, classes]."""
        return self.classifier(self.layers(tokens)[:, 0])


def resnet50(classes: int = 1000, *, seed: int = 0) -> ResNet50:
    """ResNet-50, 25.6 million parameters."""
    return seeded(seed, lambda: ResNet50(classes))


def mobilenet_v2(classes: int = 1000, *, seed: int = 0) -> MobileNetV2:
    """MobileNetV2 at width 1, 3.5 million parameters."""
    return seeded(seed, lambda: MobileNetV2(classes))


def minilm(classes: int = 2, *, seed: int = 0) -> Encoder:
    """The encoder of MiniLM-L6: 6 layers of width 384, 10.6 million parameters."""
    return seeded(seed, lambda: Encoder(6, 384, 12, classes))


def bert_base(classes: int = 2, *, seed: int = 0) -> Encoder:
    """The encoder of BERT-base: 12 layers of width 768, 85 million parameters."""
    return seeded(seed, lambda: Encoder(12, 768, 12, classes))


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
    """Convolution, batch norm, ReLU6."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    parts = {"conv": conv, "norm": nn.BatchNorm2d(outputs), "relu": nn.ReLU6(inplace=True)}
    return nn.Sequential(OrderedDict(parts))

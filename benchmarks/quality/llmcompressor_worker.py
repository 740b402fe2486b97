"""Prune a Llama with llm-compressor, in an environment of its own; called by language_model.py.

python llmcompressor_worker.py FOLDER sparsegpt|wanda 0.5|2:4 THREADS
FOLDER holds config.json, dense.safetensors and windows.npy; pruned.safetensors is written there.

pip install llmcompressor==0.5.1 compressed-tensors==0.9.4 transformers==4.51.3 datasets==3.6.0
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
from llmcompressor.modifiers.obcq import SparseGPTModifier  # pyright: ignore[reportMissingImports]
from llmcompressor.modifiers.pruning import (  # pyright: ignore[reportMissingImports]
    WandaPruningModifier,
)
from safetensors.torch import load_file, save_file  # pyright: ignore[reportMissingImports]
from tokenizers import Tokenizer, models  # pyright: ignore[reportMissingImports]
from transformers import (  # pyright: ignore[reportMissingImports]
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

PART = "model.layers."


def main() -> None:
    folder, name, target, threads = Path(sys.argv[1]), *sys.argv[2:5]
    torch.set_num_threads(int(threads))
    model = LlamaForCausalLM(LlamaConfig(**json.loads((folder / "config.json").read_text())))
    model.load_state_dict(load_file(folder / "dense.safetensors"), strict=False)
    model.tie_weights()
    model.eval()
    windows = np.load(folder / "windows.npy")
    data = Dataset.from_dict({"input_ids": windows, "attention_mask": np.ones_like(windows)})
    semi = ":" in target
    kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[name]
    modifier = kind(
        sparsity=0.5 if semi else float(target),
        mask_structure=target if semi else "0:0",
        targets=["Linear"],
        ignore=["lm_head"],
    )
    # the windows are tokens already, but oneshot insists on a tokenizer
    words = Tokenizer(models.WordLevel({"[PAD]": 0}, "[PAD]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    start = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=data,
        recipe=[modifier],
        max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows),
    )
    seconds = time.perf_counter() - start
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items() if PART in k}
    save_file(state, folder / "pruned.safetensors")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"prune_seconds": round(seconds, 1), "peak_gib": round(peak, 2)}))


if __name__ == "__main__":
    main()

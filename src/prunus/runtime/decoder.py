"""Decoder layers of Llama models, which single tokens pass in two calls of the kernels.

Norms, products, rotation, SiLU and attention to the cache run natively; between the two halves the
cache of transformers takes the new key and value. Prompts, batches, masks, tracers, gradients and
layers that were exchanged or hooked get the layer's own forward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as globals_of_modules

from prunus import kernels
from prunus.runtime import candidates
from prunus.runtime.assemble import assemble
from prunus.runtime.decide import Options, bound
from prunus.runtime.forward import Forward, Shortcut
from prunus.runtime.fuse import plain
from prunus.runtime.measure import interleaved
from prunus.runtime.modules import SparseLinear
from prunus.runtime.part import LinearPart
from prunus.runtime.tracing import UNTRACEABLE
from prunus.runtime.verify import TOLERANCES, difference
from prunus.runtime.weight import observed

BUDGET = 0.5
"""Seconds of measuring the model with and without."""
TOGETHER, APART = "together", "apart"
_LAYER = ("transformers.models.llama.modeling_llama", "LlamaDecoderLayer")
_PATHS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_INSIDE = {"LlamaAttention", "LlamaMLP", "LlamaRMSNorm", "SiLU", "SiLUActivation"}
_DTYPES = (torch.float32, torch.bfloat16)


class Decoder(Shortcut):
    """The forward pass of a decoder layer: native for one token, else what it was before."""

    def attempt(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The output for a single token that nobody watches."""
        return None if len(args) != 1 or observed() else _passed(module, args[0], named)

    def __reduce__(self) -> tuple[Any, ...]:
        return Decoder, (self.before,)


def _passed(module: nn.Module, x: Any, named: Mapping[str, Any]) -> Tensor | None:
    """The output for one token; None for what the layer itself has to compute."""
    if type(x) is not Tensor or x.dtype not in _DTYPES or x.shape[:2] != (1, 1) or not x.is_cpu:
        return None
    past, angles = named.get("past_key_values"), named.get("position_embeddings")
    if named.get("attention_mask") is not None or named.get("output_attentions") or not angles:
        return None
    if past is not None and type(past).__name__ != "DynamicCache":
        return None
    held = _HELD.get(module)
    if held is None:
        held = _HELD[module] = _Held(module)
    place = held.place(x)
    return None if place is None else held.call(place, x, angles, past)


class _Held:
    """What a layer needs at every call, and to see whether it is still the same."""

    def __init__(self, module: nn.Module) -> None:
        inside = [child for path, child in module.named_modules() if path]
        places = [(owner._modules, name) for owner in module.modules() for name in owner._modules]
        self.parents, self.names = [owner for owner, _ in places], [name for _, name in places]
        self.children = list(map(dict.get, self.parents, self.names))
        self.hooks: list[Any] = [child._forward_hooks for child in inside]
        self.hooks += [child._forward_pre_hooks for child in inside]
        self.hooks += [globals_of_modules._global_forward_hooks]
        self.hooks += [globals_of_modules._global_forward_pre_hooks]
        self.sound, self.pointers, self.dtype = False, [0], torch.float32
        layers = packed_layers(module)
        if layers is None:
            return
        attention: Any = module.self_attn
        norms: list[Any] = [getattr(module, name) for name in _NORMS]
        self.sound = all(type(child).__name__ in _INSIDE for child in [attention, module.mlp])
        self.buffers = [{} if layer is None else layer._buffers for layer in layers] * 2
        self.leaves = ["packed"] * len(layers) + ["bias"] * len(layers)
        self.gammas = [norm._parameters for norm in norms]
        self.eps = [float(norm.variance_epsilon) for norm in norms]
        self.number, self.scale = attention.layer_idx, float(attention.scaling)
        dim = int(attention.head_dim)
        self.heads = attention.q_proj.out_features // dim
        self.groups, self.dim = attention.k_proj.out_features // dim, dim
        self.hidden = attention.o_proj.out_features
        self.inner = cast(Any, module.mlp).down_proj.in_features
        self.table = np.zeros(22, np.int64)

    def place(self, x: Tensor) -> int | None:
        """The address of the table; None unless all is as the kernels want it."""
        if not self.sound or any(self.hooks) or x.shape != (1, 1, self.hidden) or x.is_neg():
            return None
        # Compares by identity first, and modules do not define equality.
        if list(map(dict.get, self.parents, self.names)) != self.children:
            return None
        tensors = [*map(dict.get, self.buffers, self.leaves)]
        gammas = [held["weight"] for held in self.gammas]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *gammas)):
            return None
        pointers = [0 if t is None else t.data_ptr() for t in (*tensors, *gammas)]
        if pointers != self.pointers or x.dtype != self.dtype:
            if not self._usable(x, tensors, gammas):
                return None
            sizes = [self.hidden, self.heads, self.groups, self.dim, self.inner]
            self.table = np.array([*sizes, x.dtype == torch.bfloat16, *pointers], np.int64)
            self.pointers, self.dtype = pointers, x.dtype
        return self.table.__array_interface__["data"][0]

    def _usable(self, x: Tensor, tensors: list[Any], gammas: list[Any]) -> bool:
        """Whether the kernels may read these tensors."""
        packed, biases = tensors[: len(_PATHS)], tensors[len(_PATHS) :]
        return (
            all(t is None or (t.is_cpu and t.dtype == torch.uint8) for t in packed)
            and all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in biases)
            and all(t.dtype == x.dtype and t.is_contiguous() and t.is_cpu for t in gammas)
        )

    def call(self, table: int, x: Tensor, angles: Any, past: Any) -> Tensor | None:
        """The output of the layer; None, before the cache has seen anything, where it cannot be."""
        cos, sin = angles
        if not all(type(t) is Tensor and t.dtype == x.dtype and t.is_cpu for t in (cos, sin)):
            return None
        if cos.shape != (1, 1, self.dim) or sin.shape != cos.shape:
            return None
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        threads = torch.get_num_threads()
        q = torch.empty(self.heads * self.dim)
        k, v = (x.new_empty((1, self.groups, 1, self.dim)) for _ in range(2))
        kernels.token_in_ptr(
            table, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), q.data_ptr(), k.data_ptr(),
            v.data_ptr(), self.eps[0], threads,
        )  # fmt: skip
        if past is not None:
            k, v = (
                held if held.stride(3) == 1 and held.dtype == x.dtype else held.to(x).contiguous()
                for held in past.update(k, v, self.number)
            )
        y = torch.empty_like(x)
        kernels.token_out_ptr(
            table, x.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr(),
            k.shape[2], (*k.stride()[1:3], *v.stride()[1:3]), self.scale, self.eps[1], threads,
        )  # fmt: skip
        return y


_HELD: weakref.WeakKeyDictionary[nn.Module, _Held] = weakref.WeakKeyDictionary()


def packed_layers(module: nn.Module) -> list[SparseLinear | None] | None:
    """The packed layers in the kernel's order, None where another holds their rows.

    None unless the module is a decoder layer all of whose linear layers are packed.
    """
    if (type(module).__module__, type(module).__qualname__) != _LAYER:
        return None
    attention, mlp = module.get_submodule("self_attn"), module.get_submodule("mlp")
    if type(mlp.get_submodule("act_fn")).__name__ not in ("SiLU", "SiLUActivation"):
        return None
    owners = [attention] * 4 + [mlp] * 3
    held = [owner.get_submodule(path) for owner, path in zip(owners, _PATHS, strict=True)]
    found: list[SparseLinear | None] = []
    for family in (held[:3], held[3:4], held[4:6], held[6:]):
        parts = [layer for layer in family if isinstance(layer, LinearPart)]
        whole = [layer for layer in family if type(layer) is SparseLinear]
        if len(whole) == len(family):
            found += whole
        elif len(parts) == len(family) and _in_order(parts):
            found += [parts[0].whole, *([None] * (len(family) - 1))]
        else:
            return None
    return None if any(layer is not None and layer.activation for layer in found) else found


def _in_order(parts: list[LinearPart]) -> bool:
    """Whether these are all parts of one layer, in the order of its rows."""
    same = all(part.whole is parts[0].whole for part in parts)
    numbers = [part.number for part in parts]
    return same and numbers == list(range(len(parts[0].sizes)))


def place(
    base: nn.Module,
    example: Any,
    swaps: Mapping[str, nn.Module],
    forwards: Mapping[str, Forward],
    options: Options,
) -> tuple[dict[str, Forward], tuple[str, ...]]:
    """(forwards, names of decoder layers): native where a token is an example and that is faster.

    An older plan's are taken without the clock.
    """
    if not swaps or kernels.token_in_ptr is None:
        return dict(forwards), ()
    old = options.replayed
    model = assemble(base, swaps, forwards, share=True)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if packed_layers(layer) is not None and all(plain(child) for child in layer.modules())
    }
    if old is not None:
        layers = {name: layer for name, layer in layers.items() if name in old.decoders}
    if not layers or not _single(model, example, next(iter(layers.values()))):
        return dict(forwards), ()
    taken = {**forwards, **{name: Decoder(forwards.get(name)) for name in layers}}
    faster = assemble(base, swaps, taken, share=True)
    try:
        # int8 weights round their inputs, and small differences with them.
        if difference(model, faster, example, TOLERANCES[options.dtype]) is not None:
            return dict(forwards), ()
    except UNTRACEABLE:
        return dict(forwards), ()
    if options.choose is None:
        runs = {TOGETHER: bound(faster, example), APART: bound(model, example)}
        seconds = interleaved(runs, budget=BUDGET)
        if seconds[TOGETHER] > seconds[APART]:
            return dict(forwards), ()
    return taken, tuple(layers)


def _single(model: nn.Module, example: Any, layer: nn.Module) -> bool:
    """Whether this layer ever gets a single token."""
    seen: list[tuple[int, ...]] = []

    def look(module: nn.Module, args: Any, named: Any) -> None:
        x = args[0] if args else named.get("hidden_states")
        seen.append(tuple(x.shape[:2]) if isinstance(x, Tensor) else ())

    handle = layer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        candidates.run(model, example)
    finally:
        handle.remove()
    return (1, 1) in seen

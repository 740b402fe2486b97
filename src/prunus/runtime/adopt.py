"""Tensors of a mapped file taken into a model without a copy."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from prunus.runtime.weight import ALIGNMENT, PackedWeight

LEAST = 4096
"""Bytes from which a tensor is left in the file: a page."""


def adopt(model: nn.Module, state: Mapping[str, Tensor]) -> frozenset[str]:
    """Let a model's tensors use the memory of those in `state`; the names that could.

    Packed weights have to be aligned as the kernels want them, and validated. Others have to be of
    the same dtype and shape, contiguous, of a page or more, and of modules that load plainly.
    """
    taken = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = f"{path}.{leaf}" if path else leaf
            found = state.get(name)
            if tensor is None or found is None:
                continue
            packed = leaf == "packed" and isinstance(module, PackedWeight)
            if _fits_blob(tensor, found) if packed else _fits(module, tensor, found):
                # Not a new tensor: ties, and whoever else holds this one, stay.
                tensor.data = found
                taken.add(name)
    return frozenset(taken)


def _fits_blob(tensor: Tensor, found: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype == found.dtype and found.data_ptr() % ALIGNMENT == 0


def _fits(module: nn.Module, tensor: Tensor, found: Tensor) -> bool:
    loads = type(module)._load_from_state_dict is nn.Module._load_from_state_dict
    plain = isinstance(module, PackedWeight) or (loads and not module._load_state_dict_pre_hooks)
    same = (tensor.dtype, tensor.shape) == (found.dtype, found.shape)
    return plain and same and tensor.is_cpu and tensor.is_contiguous() and found.nbytes >= LEAST

"""Sparse kernels for CPUs: blobs, matrix products, and the choice of instruction set."""

from prunus.kernels import addresses, reference
from prunus.kernels.blob import KINDS, BlobInfo, pack, tile
from prunus.kernels.face import (
    ACTIVATIONS,
    FALLBACK,
    active_isa,
    available_isas,
    chain,
    chain_ptr,
    conv2d,
    conv_ptr,
    linear,
    linear_ptr,
    matmul_planes,
    planes_ptr,
    refused_isas,
    table,
    test_isas,
    transpose,
)
from prunus.kernels.geometry import Geometry, conv_block
from prunus.kernels.grouping import Grouping, grouping
from prunus.kernels.kinds import info, unpack, validate
from prunus.kernels.network import INPUT, Arrangement, Step, arrange, network, network_ptr
from prunus.kernels.nm import pack_nm, window_slots
from prunus.kernels.team import share_threads
from prunus.kernels.transformer import (
    ADDED,
    ALLOWED,
    NO_MASK,
    attention,
    attention_ptr,
    layer_norm,
    layer_norm_ptr,
    token_in_ptr,
    token_out_ptr,
)
from prunus.kernels.vectors import pack_vectors

__all__ = [
    "ACTIVATIONS",
    "ADDED",
    "ALLOWED",
    "FALLBACK",
    "INPUT",
    "KINDS",
    "NO_MASK",
    "Arrangement",
    "BlobInfo",
    "Geometry",
    "Grouping",
    "Step",
    "active_isa",
    "addresses",
    "arrange",
    "attention",
    "attention_ptr",
    "available_isas",
    "chain",
    "chain_ptr",
    "conv2d",
    "conv_block",
    "conv_ptr",
    "grouping",
    "info",
    "layer_norm",
    "layer_norm_ptr",
    "linear",
    "linear_ptr",
    "matmul_planes",
    "network",
    "network_ptr",
    "pack",
    "pack_nm",
    "pack_vectors",
    "planes_ptr",
    "reference",
    "refused_isas",
    "share_threads",
    "table",
    "test_isas",
    "tile",
    "token_in_ptr",
    "token_out_ptr",
    "transpose",
    "unpack",
    "validate",
    "window_slots",
]

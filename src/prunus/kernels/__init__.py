"""Sparse kernels for CPUs: blobs, matrix products, and the choice of instruction set."""

from prunus.kernels import addresses, reference
from prunus.kernels.blob import BlobInfo, info, pack, tile, unpack, validate
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
    table,
    transpose,
)
from prunus.kernels.geometry import Geometry, conv_block

__all__ = [
    "ACTIVATIONS",
    "FALLBACK",
    "BlobInfo",
    "Geometry",
    "active_isa",
    "addresses",
    "available_isas",
    "chain",
    "chain_ptr",
    "conv2d",
    "conv_block",
    "conv_ptr",
    "info",
    "linear",
    "linear_ptr",
    "matmul_planes",
    "pack",
    "planes_ptr",
    "reference",
    "table",
    "tile",
    "transpose",
    "unpack",
    "validate",
]

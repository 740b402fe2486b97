"""Sparse kernels for CPUs: blobs, matrix products, and the choice of instruction set."""

from prunus.kernels import reference
from prunus.kernels.blob import BlobInfo, info, pack, unpack, validate
from prunus.kernels.face import (
    FALLBACK,
    RELU,
    active_isa,
    available_isas,
    linear,
    linear_ptr,
    matmul_planes,
    planes_ptr,
    table,
    transpose,
)

__all__ = [
    "FALLBACK",
    "RELU",
    "BlobInfo",
    "active_isa",
    "available_isas",
    "info",
    "linear",
    "linear_ptr",
    "matmul_planes",
    "pack",
    "planes_ptr",
    "reference",
    "table",
    "transpose",
    "unpack",
    "validate",
]

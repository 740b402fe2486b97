"""Methods for a trained network and a little calibration data: no training after them."""

from __future__ import annotations

from prunus import allocations, schedules, scores, solvers, structures
from prunus.compose import compose
from prunus.core import Allocation, Schedule, Sparsifier, Structure
from prunus.errors import ValueRangeError


def _once(sparsity: float, structure: Structure | None) -> Schedule | None:
    """Return the schedule that prunes now; None if the structure pins the very sparsity."""
    pinned = None if structure is None else structure.pinned
    return None if pinned == sparsity else schedules.one_shot(sparsity)


def wanda(sparsity: float, *, structure: Structure | None = None) -> Sparsifier:
    """Remove the smallest |w_ij| * ||x_j||_2 of every output; no weight changes.

    Wants calibration batches. Default: fan_in, every output keeps as many; or n_of_m.
    Source: Sun, Liu, Bair, Kolter 2024, arXiv 2306.11695.
    """
    return compose(
        scores.wanda(),
        structure=structure or structures.fan_in(),
        schedule=_once(sparsity, structure),
        name=f"wanda({sparsity:g})",
    )


def sparsegpt(
    sparsity: float,
    *,
    block: int = 128,
    damping: float = 0.01,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Prune column by column and let later columns make up for what went: see solvers.sparsegpt.

    Wants calibration batches; `pr.prune(..., sequential=True)` is the paper's procedure.
    Defaults: element, uniform, 128 columns, damping 0.01. Source: Frantar & Alistarh 2023,
    arXiv 2301.00774. Differs: in sequence by blocks of layers, as in the authors' code.
    """
    return compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocation,
        schedule=_once(sparsity, structure),
        solve=solvers.sparsegpt(block, damping),
        name=f"sparsegpt({sparsity:g})",
    )


def exact_obc(
    sparsity: float,
    *,
    damping: float = 0.01,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Prune one weight at a time with exact updates: see solvers.exact_obc. Small layers only.

    Wants calibration batches. Defaults: element, uniform.
    Source: Frantar, Singh, Alistarh 2022, arXiv 2208.11580.
    """
    return compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocation,
        schedule=_once(sparsity, structure),
        solve=solvers.exact_obc(damping),
        name=f"exact_obc({sparsity:g})",
    )


def alps(
    sparsity: float,
    *,
    rounds: int = 300,
    rho: float = 0.1,
    damping: float = 0.01,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Find mask and weights of each layer together by ADMM: see solvers.alps.

    Wants calibration batches; `pr.prune(..., sequential=True)` is the paper's procedure.
    Defaults: element, uniform, 300 rounds at most, rho 0.1.
    Source: Meng, Behdin, Wang, Mazumder 2024, arXiv 2406.07831.
    """
    return compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocation,
        schedule=_once(sparsity, structure),
        solve=solvers.alps(rounds, rho, damping),
        name=f"alps({sparsity:g})",
    )


def layerwise_obs(
    sparsity: float,
    *,
    damping: float = 0.01,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove the least w^2 / [H^-1]_jj of each layer at once, H = E[x x^T], and re-fit the rest.

    Wants calibration batches. Defaults: element, uniform. Source: Dong, Chen, Pan 2017,
    arXiv 1705.07565. Differs: all that goes is treated together, exactly.
    """
    return compose(
        scores.layerwise_obs(damping),
        structure=structure,
        allocation=allocation,
        schedule=_once(sparsity, structure),
        solve=solvers.least_squares(damping),
        name=f"layerwise_obs({sparsity:g})",
    )


def obd(
    sparsity: float,
    *,
    diagonal: str = "exact",
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Optimal brain damage: remove the least w^2 d2L/dw^2 over all layers; nothing else changes.

    diagonal: "exact", "hutchinson" or "fisher" (mean squared gradient of single examples). Wants
    batches and loss. Defaults: element, global_. Source: Le Cun, Denker, Solla 1990; fisher: Theis
    et al. 2018, arXiv 1801.05787.
    """
    if diagonal not in ("exact", "hutchinson", "fisher"):
        raise ValueRangeError(f"diagonal is 'exact', 'hutchinson' or 'fisher', got {diagonal!r}")
    return compose(
        scores.diagonal_fisher() if diagonal == "fisher" else scores.obd(diagonal),
        structure=structure,
        allocation=allocation or (allocations.global_() if _free(structure) else None),
        schedule=_once(sparsity, structure),
        name=f"obd({sparsity:g}, {diagonal})",
    )


def obs(sparsity: float, *, damping: float = 0.0, structure: Structure | None = None) -> Sparsifier:
    """Optimal brain surgeon: remove weight after weight, each time adapting all others of a layer.

    Wants batches and loss; the exact Hessian of each layer, so for some thousand weights.
    Defaults: element, uniform. Source: Hassibi & Stork 1992.
    """
    return compose(
        scores.obs(damping),
        structure=structure,
        schedule=_once(sparsity, structure),
        solve=solvers.obs(damping),
        name=f"obs({sparsity:g})",
    )


def woodfisher(
    sparsity: float,
    *,
    block: int = 50,
    damping: float | None = None,
    taylor: bool = False,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove the least w^2 / [F^-1]_ii over all layers and adapt the rest; F: block Fisher matrix.

    taylor: WoodTaylor, for a network that is not at a minimum. Wants batches and loss, and holds
    the gradient of every example. Defaults: element, global_ (the paper's joint threshold), blocks
    of 50, damping 1e-5 (the paper's), or 0.1 with taylor, whose Newton step F^-1 g is far too long
    where F is of low rank. Source: Singh & Alistarh 2020, arXiv 2004.14340.
    """
    damping = (0.1 if taylor else 1e-5) if damping is None else damping
    return compose(
        scores.block_fisher(block, damping, taylor),
        structure=structure,
        allocation=allocation or (allocations.global_() if _free(structure) else None),
        schedule=_once(sparsity, structure),
        solve=solvers.block_fisher(block, damping, taylor),
        name=f"woodfisher({sparsity:g})",
    )


def kfac(
    sparsity: float,
    *,
    damping: float = 1e-4,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove the least w^2 / ([A^-1]_ii [G^-1]_oo) over all layers and adapt the rest of a layer.

    F = A (x) G: Kronecker-factored Fisher matrix of each layer. Wants batches and loss. Defaults:
    element, global_, damping 1e-4 of the mean of diag F. Source: Wang, Grosse, Fidler, Zhang 2019,
    arXiv 1905.05934 (Kron-OBS).
    """
    return compose(
        scores.kfac(damping),
        structure=structure,
        allocation=allocation or (allocations.global_() if _free(structure) else None),
        schedule=_once(sparsity, structure),
        solve=solvers.kfac(damping),
        name=f"kfac({sparsity:g})",
    )


def matrix_free_fisher(
    sparsity: float,
    *,
    damping: float = 1e-5,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """M-FAC: remove the least w^2 / [F^-1]_ii over all layers and adapt the rest of a layer.

    F: empirical Fisher matrix of each whole layer, never formed. Wants batches and loss, and holds
    the gradient of every example. Defaults: element, global_, damping 1e-5. Source: Frantar,
    Kurtic, Alistarh 2021, arXiv 2107.03356.
    """
    return compose(
        scores.matrix_free_fisher(damping),
        structure=structure,
        allocation=allocation or (allocations.global_() if _free(structure) else None),
        schedule=_once(sparsity, structure),
        solve=solvers.matrix_free_fisher(damping),
        name=f"matrix_free_fisher({sparsity:g})",
    )


def _free(structure: Structure | None) -> bool:
    return structure is None or structure.pinned is None

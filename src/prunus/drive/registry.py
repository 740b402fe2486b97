"""Which sparsifier is at work on which model, and whether another one may come."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

from torch import nn
from torch.optim import Optimizer

from prunus import sites as sites_
from prunus.core import Site, Sparsifier
from prunus.errors import AttachError

if TYPE_CHECKING:
    from prunus.drive.attach import Attached

# Weak on both sides: the optimizer's hooks keep an Attached alive, and nothing else has to.
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attached]] = weakref.WeakKeyDictionary()


def attached(model: nn.Module) -> Attached | None:
    """Return what is attached to a model, None if nothing is."""
    reference = _ATTACHED.get(sites_.unwrap(model))
    known = None if reference is None else reference()
    return known if known is not None and known.alive else None


def enter(model: nn.Module, found: Attached) -> None:
    """Note what is attached to an unwrapped model."""
    _ATTACHED[model] = weakref.ref(found)


def leave(model: nn.Module) -> None:
    """Forget what was attached to an unwrapped model, unless something lives there."""
    if attached(model) is None:
        _ATTACHED.pop(model, None)


def expect_arguments(sparsifier: Any, model: Any, seed: Any) -> None:
    """Raise AttachError for arguments of the wrong kind, such as swapped ones."""
    if not isinstance(sparsifier, Sparsifier) or not isinstance(model, nn.Module):
        raise AttachError(
            f"expected a method such as pr.methods.gradual_magnitude(...) and a torch.nn.Module, "
            f"got {type(sparsifier).__name__} and {type(model).__name__}; the order is "
            f"pr.attach(method, model, optimizer)"
        )
    if not isinstance(seed, SupportsIndex):
        raise AttachError(f"seed is a whole number, got {seed!r}")


def real_optimizer(optimizer: Any) -> Optimizer:
    """Return the optimizer whose hooks fire: the one inside, if it comes in a trainer's wrapper.

    Accelerate and Lightning hold it as `.optimizer`. Raises AttachError for anything else.
    """
    while not _has_hooks(optimizer):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or inner is optimizer:
            raise AttachError(
                f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}; "
                f"the order is pr.attach(method, model, optimizer)"
            )
        optimizer = inner
    return optimizer


def _has_hooks(optimizer: Any) -> bool:
    """Tell a real optimizer from a wrapper that never ran Optimizer.__init__."""
    return isinstance(optimizer, Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks")


def expect_free(model: nn.Module, optimizer: Optimizer, sites: Sequence[Site]) -> None:
    """Raise AttachError if the model, one of the sites, or the optimizer has a sparsifier."""
    known = attached(model)
    if known is not None:
        raise AttachError(
            f"{known.sparsifier} is already attached to this model: combine methods with "
            f"pr.combine, or end it first with pr.attached(model).detach()"
        )
    names = {id(weight): name for name, weight in sites_.parameters(model, sites).items()}
    for other in [reference() for reference in _ATTACHED.values()]:
        if other is None or not other.alive:
            continue
        if other.optimizer is optimizer:
            raise AttachError(
                f"{other.sparsifier} is already attached to this optimizer, and its state_dict has "
                f"room for one: give every model its own optimizer, or attach once to "
                f"nn.ModuleList([...]) of the models (pr.combine.by_site gives each its own method)"
            )
        shared = [names[id(p)] for p in other.parameters.values() if id(p) in names]
        if shared:
            raise AttachError(
                f"{other.sparsifier} already prunes {', '.join(shared)}, as part of another "
                f"module: pass exclude= for them, or attach once with pr.combine.by_site"
            )


def trained_sites(
    model: nn.Module, optimizer: Optimizer, include: sites_.Patterns, exclude: sites_.Patterns
) -> tuple[Site, ...]:
    """Find the sites and make sure that this optimizer trains them."""
    found = sites_.find(model, include, exclude)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = sites_.parameters(model, found)
    _expect_whole(parameters)
    trained = tuple(s for s in found if id(parameters[s.name]) in held)
    if not trained:
        raise AttachError(
            "the optimizer trains none of the prunable weights of this model; was it made before "
            "the model was moved or changed? Make the optimizer from model.parameters() again"
        )
    foreign = [
        s.name
        for s in found
        if id(parameters[s.name]) not in held and parameters[s.name].requires_grad
    ]
    if foreign:
        raise AttachError(
            f"this optimizer does not train {', '.join(foreign)}, so nothing would keep them "
            f"sparse; pass exclude= for them, or attach to the optimizer that trains them"
        )
    return trained


def _expect_whole(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise AttachError for what is sharded over ranks."""
    for name, parameter in parameters.items():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise AttachError(
                f"{name!r} is a sharded DTensor (FSDP), which masks do not support yet; use DDP"
            )

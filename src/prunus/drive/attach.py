"""Attach a sparsifier to an optimizer: one line, and the training loop does not change."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus import select
from prunus import sites as sites_
from prunus.core import Masks, Site, Sparsifier, State
from prunus.drive.agree import check_agreement
from prunus.drive.checkpoint import KEY, from_blob, same_method, to_blob
from prunus.drive.data import Data, batches_of
from prunus.drive.ends import without_ends
from prunus.drive.registry import (
    enter,
    expect_arguments,
    expect_free,
    leave,
    real_optimizer,
    trained_sites,
)
from prunus.drive.reserve import hide, recall, reset_moments, stale
from prunus.drive.rewrite import write
from prunus.drive.signals import Loss, Sources
from prunus.errors import AttachError, SignalError
from prunus.kinds import GRADIENT


def attach(
    sparsifier: Sparsifier,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    include: sites_.Patterns = None,
    exclude: sites_.Patterns = None,
    inputs: Any = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    validate: Callable[[], float] | None = None,
    seed: int = 0,
) -> Attached:
    """Let `sparsifier` prune `model` while `optimizer` trains it; the loop stays as it is.

    Works through the optimizer's own hooks: before each step a due update chooses masks and the
    gradients of what is off are cleared; after it, what is off is exactly zero. Parameters keep
    their names, shapes and identity. Masks, step and seed travel in `optimizer.state_dict()`, and
    a state that was loaded before attaching is taken up. Moments of what is dropped or grown
    become zero.

    include, exclude: which weights (see `sites.find`); inputs: one example batch, for methods that
    run the network themselves (SynFlow); batches and loss: calibration data as for `prune`, run at
    each update (an iterator is read now and kept; under DDP what rank 0 saw counts); a gradient
    stays that of the training step; validate: returns the loss on held-out data, for schedules that
    adapt to it; seed: of random choices. An optimizer in a trainer's wrapper is found inside it.
    Returns an Attached. Raises AttachError if the optimizer holds none of the weights, if it, the
    model or a weight already has a sparsifier; SiteError, NotFiniteError, SignalError as the parts.
    """
    expect_arguments(sparsifier, model, seed)
    optimizer = real_optimizer(optimizer)
    sites = trained_sites(model, optimizer, include, exclude)
    sites = without_ends(sparsifier, model, sites, include, inputs)
    expect_free(model, optimizer, sites)
    data = Data(inputs, batches_of(batches), loss, validate)
    attached = Attached(sparsifier, model, optimizer, sites, data, seed)
    try:
        attached._start()
    except BaseException:
        attached.detach()
        raise
    return attached


class Attached:
    """A sparsifier at work on a model and its optimizer.

    state: the pure State; masks: what is kept now; sites: what is pruned;
    parameters: site name -> its live parameter.
    """

    def __init__(
        self,
        sparsifier: Sparsifier,
        model: nn.Module,
        optimizer: Optimizer,
        sites: tuple[Site, ...],
        data: Data,
        seed: int,
    ) -> None:
        """Use `attach`."""
        self.sparsifier = sparsifier
        self.sites = sites
        self._optimizer = weakref.ref(optimizer)
        self._wrapped = model
        self._data = data
        self.parameters = sites_.parameters(model, sites)
        self.state: State = sparsifier.init(sites, sites_.weights(self.parameters), seed)
        self._off: dict[str, Tensor] = {}
        self._skipped = False
        self._recalled = False
        self._handles: list[Any] = []
        self._owned: Optimizer | None = None

    # --- what a user asks ---------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The user's own module, below DDP and torch.compile."""
        return sites_.unwrap(self._wrapped)

    @property
    def alive(self) -> bool:
        """Whether the optimizer still exists, so that the masks are still kept."""
        return self._optimizer() is not None and bool(self._handles)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer whose steps drive this."""
        optimizer = self._optimizer()
        if optimizer is None:
            raise AttachError(
                f"the optimizer that {self.sparsifier} was attached to is gone; keep a "
                f"reference to the optimizer as long as its masks matter"
            )
        return optimizer

    @property
    def masks(self) -> Masks:
        """Site name -> bool mask, True = kept; sites that are dense are absent."""
        return self.state.masks

    @property
    def sparsity(self) -> float:
        """Fraction of all weights of the sites that is off now."""
        total = sum(site.size for site in self.sites)
        return sum(int(off.count_nonzero()) for off in self._off.values()) / max(1, total)

    def site_sparsity(self) -> dict[str, float]:
        """Return the fraction that is off, for every site."""
        return {
            s.name: int(self._off[s.name].count_nonzero()) / s.size if s.name in self._off else 0.0
            for s in self.sites
        }

    def unfinished(self) -> str | None:
        """Say in a sentence what is owed: the end of the schedule, or zeros; None if nothing is."""
        return self._unkept() or self._early()

    def _early(self) -> str | None:
        """Say what the schedule still owes."""
        last, step = self.sparsifier.last, self.state.step
        if last is None or step > last:
            return None
        if step == last and self.sparsifier.needs(self.state) is None:
            return None
        target = self.sparsifier.target
        goal = "" if target is None else f", so that {self.sparsity:.4g} of {target:.4g} is reached"
        return (
            f"{self.sparsifier} is not finished: its last update is at optimizer step {last}, "
            f"{self.state.step} were made{goal}"
        )

    def _unkept(self) -> str | None:
        """Say what was changed behind the masks since the last step."""
        now = dict(self.model.named_parameters(remove_duplicate=False))
        replaced = [name for name, p in self.parameters.items() if now.get(name) is not p]
        if replaced:
            return (
                f"{', '.join(replaced)} became other parameters after {self.sparsifier} was "
                f"attached, and its masks do not reach them: detach, make a new optimizer, attach"
            )
        filled = [n for n, off in self._off.items() if self.parameters[n][off].count_nonzero()]
        if not filled:
            return None
        return (
            f"{', '.join(filled)} hold values where {self.sparsifier} keeps zeros, written after "
            f"its last step (load_state_dict?): call pr.attached(model).enforce() to clear them"
        )

    @torch.no_grad()
    def enforce(self) -> None:
        """Zero what is off now, as every step does; for weights that were loaded in between."""
        for name, off in self._off.items():
            parameter = self.parameters[name]
            if off.device != parameter.device:
                self._off[name] = off = off.to(parameter.device)
            select.clear(parameter, off)

    def detach(self) -> None:
        """Stop: hooks are removed, weights stay as they are (nothing keeps them zero any more)."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        leave(self.model)

    def __repr__(self) -> str:
        """Show the method, where it stands and what it reached."""
        return (
            f"<{self.sparsifier} at step {self.state.step}: {len(self.sites)} sites, "
            f"sparsity {self.sparsity:.4f}>"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Attached:
        """Copy model and optimizer with their sparsifier; plain copies of either lose the hooks."""
        model, optimizer = copy.deepcopy((self._wrapped, self.optimizer), memo)
        seed = self.state.seed
        twin = Attached(self.sparsifier, model, optimizer, self.sites, self._data, seed)
        twin._owned = optimizer  # nobody else may hold the copy
        memo[id(self)] = twin
        twin._install()
        twin._restore(to_blob(self.state))
        return twin

    # --- hooks --------------------------------------------------------------------------------

    def _start(self) -> None:
        self._install()
        blob = self.optimizer.param_groups[0].get(KEY)
        if blob is not None:
            self._restore(blob)
            del self.optimizer.param_groups[0][KEY]
            return
        due = self.sparsifier.needs(self.state)
        # Only what needs no gradient can happen before the first backward pass.
        while due is not None and GRADIENT not in due:
            self._update(due, training=False)
            due = self.sparsifier.needs(self.state)
        self.enforce()

    def _install(self) -> None:
        optimizer = self.optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_post_hook(self._load),
        ]
        enter(self.model, self)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # step hooks of torch get the optimizer again as args[0] in some versions
        rest = args[1:] if args and args[0] is optimizer else args
        closure = rest[0] if rest else kwargs.get("closure")
        if closure is None:
            self._prepare(first=True)
            return None
        wrapped = self._around(closure)
        if rest:
            return (*args[: len(args) - len(rest)], wrapped, *rest[1:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    def _around(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Wrap a closure: gradients exist only once it has run; the first run may update masks."""
        calls = 0

        def wrapped() -> Any:
            nonlocal calls
            self._hide()
            loss = closure()
            self._prepare(first=calls == 0)
            calls += 1
            return loss

        return wrapped

    def _prepare(self, first: bool) -> None:
        found_inf = getattr(self._optimizer(), "found_inf", None)
        # A fused optimizer under a GradScaler skips the step by itself: then nothing happened.
        self._skipped = found_inf is not None and bool(found_inf)
        if self._skipped:
            return
        if first:
            stale = False
            while (due := self.sparsifier.needs(self.state)) is not None:
                if stale and GRADIENT in due:
                    raise SignalError(
                        f"{self.sparsifier} wants a fresh gradient for every round, and a training "
                        f"step has one: prune with pr.prune(model, method, batches=, loss=) first, "
                        f"then attach pr.methods.fixed()"
                    )
                self._update(due, training=True)
                stale = stale or GRADIENT in due
        for name in self._off.keys() | self.state.trained.keys():
            grad, trained = self.parameters[name].grad, self.state.trained.get(name)
            if grad is not None:
                if grad.layout != torch.strided:
                    raise AttachError(
                        f"the gradient of {name!r} is sparse, and masks need a strided one: build "
                        f"the layer with sparse=False, or pass exclude= for it"
                    )
                frozen = self._off[name] if trained is None else ~trained
                select.clear(grad, frozen.to(grad.device))
        if self.state.trained:
            recall(self.parameters, self.state)
            self._recalled = True

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._hide()
        self.enforce()
        if not self._skipped:
            self.state = self.state.next_step()

    def _hide(self) -> None:
        """Put what the optimizer trained although it is off back into the reserve."""
        if self._recalled:
            self.state = hide(self.parameters, self.state)
            self._recalled = False

    # --- updates ------------------------------------------------------------------------------

    def _update(self, needs: frozenset[str], training: bool) -> None:
        distributed = (
            type(self._wrapped).__name__ == "DistributedDataParallel" and dist.is_initialized()
        )
        sources = Sources(
            self.model, self.sites, self.parameters, self.state.masks, training=training
        )
        signals = self._data.signals(needs, sources, distributed)
        weights = sites_.weights(self.parameters)
        result = self.sparsifier.update(self.state, self.sites, weights, signals)
        if result.state.round <= self.state.round:
            raise AttachError(
                f"{self.sparsifier} asked for an update and returned round {result.state.round} "
                f"after round {self.state.round}: an update has to count its round up"
            )
        write(self.model, self.sites, self.parameters, result)
        self._adopt(result.state, rewritten=frozenset(result.weights))
        if distributed:
            device = next(iter(self.parameters.values())).device
            check_agreement(self.state.masks, self.state.step, device)

    @torch.no_grad()
    def _adopt(self, state: State, rewritten: frozenset[str] = frozenset()) -> None:
        """Take over a state: what changed loses its moments, what came back starts at zero."""
        before, self._off = self._off, {}
        for site in self.sites:
            parameter = self.parameters[site.name]
            mask = state.masks.get(site.name)
            if mask is not None:
                self._off[site.name] = ~mask.to(parameter.device)
            old, new = before.get(site.name), self._off.get(site.name)
            if old is None and new is None:
                continue
            none = torch.zeros((), dtype=torch.bool, device=parameter.device)
            changed = (none if old is None else old) ^ (none if new is None else new)
            trained = state.trained.get(site.name)
            was_trained = site.name in self.state.trained
            reset_moments(self.optimizer, parameter, stale(changed, new, trained, was_trained))
            if site.name not in rewritten:
                select.clear(parameter, changed)
                if parameter.grad is not None:
                    select.clear(parameter.grad, changed)
        self.state = state
        self.enforce()

    # --- checkpoints --------------------------------------------------------------------------

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0][KEY] = to_blob(self.state, repr(self.sparsifier))

    def _load(self, optimizer: Optimizer) -> None:
        blob = optimizer.param_groups[0].pop(KEY, None)
        self._restore(to_blob(self.state) if blob is None else blob)

    def _restore(self, blob: dict[str, Any]) -> None:
        state = from_blob(blob, self.sites, repr(self.sparsifier))
        if not same_method(state, self.state):
            raise AttachError(
                f"the checkpoint was made with another combination of methods than "
                f"{self.sparsifier}: attach the method that it was made with"
            )
        self._off = {}
        with torch.no_grad():
            for name, mask in state.masks.items():
                parameter = self.parameters[name]
                off = ~mask.to(parameter.device)
                self._off[name] = off
                trained = state.trained.get(name)
                reset_moments(self.optimizer, parameter, off if trained is None else ~trained)
        self.state = state
        self.enforce()

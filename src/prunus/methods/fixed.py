"""Keep a mask as it is: fine-tune a sparse network without losing a zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prunus.core import Masks, Signals, Site, Sparsifier, State, Update, Weights
from prunus.errors import ShapeError, SiteError, TargetError
from prunus.select import check_weights


def fixed(masks: Masks | None = None) -> Sparsifier:
    """Keep given masks, or by default the zeros that the weights have now, through any training.

    masks: site name -> bool tensor of the site's shape, True = kept; a site without one stays
    dense. Raises ShapeError for a mask that does not fit, SiteError for one without a site,
    TargetError if there is no zero to keep.
    """

    def init(sites: Sequence[Site], weights: Weights, seed: int) -> State:
        check_weights(sites, weights)
        return State(seed=seed)

    def update(state: State, sites: Sequence[Site], weights: Weights, signals: Signals) -> Update:
        unknown = set(masks or ()) - {site.name for site in sites}
        if unknown:
            raise SiteError(
                f"masks for {', '.join(sorted(unknown))}, but the sites are "
                f"{', '.join(site.name for site in sites)}"
            )
        found = {
            site.name: weights[site.name] != 0 if masks is None else masks[site.name].bool()
            for site in sites
            if masks is None or site.name in masks
        }
        for site in sites:
            if site.name in found and tuple(found[site.name].shape) != site.shape:
                raise ShapeError(
                    f"the mask of {site.name!r} has shape {tuple(found[site.name].shape)}, "
                    f"the weight {site.shape}"
                )
        kept = {name: mask.clone() for name, mask in found.items() if not bool(mask.all())}
        if not kept:
            where = "none of the sites has a zero weight" if masks is None else "the masks are full"
            raise TargetError(f"there is nothing to keep: {where}")
        shares = {
            name: 1.0 - int(mask.count_nonzero()) / mask.numel() for name, mask in kept.items()
        }
        return Update(replace(state, round=state.round + 1, masks=kept, sparsity=shares))

    return Sparsifier(
        "fixed()",
        needs=lambda state: frozenset() if state.step == 0 and state.round == 0 else None,
        init=init,
        update=update,
        last=0,
    )

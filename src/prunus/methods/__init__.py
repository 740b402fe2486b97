"""Named methods: recipes of slots, with their papers' defaults."""

from prunus.methods.dynamic import granet, itop, mest, nest, rigl, set_, sparse_momentum
from prunus.methods.fixed import fixed
from prunus.methods.lottery import Ticket, lottery_ticket
from prunus.methods.post_training import (
    alps,
    exact_obc,
    layerwise_obs,
    obd,
    obs,
    sparsegpt,
    wanda,
    woodfisher,
)
from prunus.methods.pruning import (
    gradual_magnitude,
    one_shot_magnitude,
    random_pruning,
    snip,
    synflow,
)
from prunus.methods.reparameterization import dynamic_reparameterization
from prunus.methods.rewiring import deep_rewiring
from prunus.methods.top_kast import top_kast

__all__ = [
    "Ticket",
    "alps",
    "deep_rewiring",
    "dynamic_reparameterization",
    "exact_obc",
    "fixed",
    "gradual_magnitude",
    "granet",
    "itop",
    "layerwise_obs",
    "lottery_ticket",
    "mest",
    "nest",
    "obd",
    "obs",
    "one_shot_magnitude",
    "random_pruning",
    "rigl",
    "set_",
    "snip",
    "sparse_momentum",
    "sparsegpt",
    "synflow",
    "top_kast",
    "wanda",
    "woodfisher",
]

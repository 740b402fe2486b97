"""Named methods: recipes of slots, with their papers' defaults."""

from prunus.drive import Rotated, eigendamage
from prunus.methods.criteria import (
    lamp,
    movement,
    taylor,
    total_change,
)
from prunus.methods.dynamic import granet, itop, mest, nest, rigl, set_, sparse_momentum
from prunus.methods.early_bird import EarlyBird, early_bird
from prunus.methods.feedback import feedback, neural_wirings
from prunus.methods.fixed import fixed
from prunus.methods.initialization import (
    expander,
    force,
    grasp,
    iterative_snip,
)
from prunus.methods.loop import Loop
from prunus.methods.lottery import lottery_ticket, train_prune_finetune
from prunus.methods.neurons import Neurons, grow_neurons
from prunus.methods.outputs import (
    apoz,
    batchnorm_scale,
    constant_output,
    correlation,
    geometric_median,
    mean_activation,
    nisp,
    sensitivity,
    similarity,
    skeletonization,
    taylor_filter,
)
from prunus.methods.passive import global_sparse_momentum
from prunus.methods.phases import (
    ac_dc,
    adaptive_pruning,
    dense_sparse_dense,
    iterative_hard_thresholding,
    rising_threshold,
)
from prunus.methods.post_training import (
    alps,
    exact_obc,
    kfac,
    layerwise_obs,
    matrix_free_fisher,
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
from prunus.methods.repairing import (
    channel_lasso,
    fold_constant,
    greedy_forward,
    merge_similar,
    net_trim,
    thinet,
)
from prunus.methods.reparameterization import dynamic_reparameterization
from prunus.methods.rewiring import deep_rewiring
from prunus.methods.rounds import Ticket
from prunus.methods.surgery import dynamic_surgery
from prunus.methods.top_kast import top_kast

__all__ = [
    "EarlyBird",
    "Loop",
    "Neurons",
    "Rotated",
    "Ticket",
    "ac_dc",
    "adaptive_pruning",
    "alps",
    "apoz",
    "batchnorm_scale",
    "channel_lasso",
    "constant_output",
    "correlation",
    "deep_rewiring",
    "dense_sparse_dense",
    "dynamic_reparameterization",
    "dynamic_surgery",
    "early_bird",
    "eigendamage",
    "exact_obc",
    "expander",
    "feedback",
    "fixed",
    "fold_constant",
    "force",
    "geometric_median",
    "global_sparse_momentum",
    "gradual_magnitude",
    "granet",
    "grasp",
    "greedy_forward",
    "grow_neurons",
    "iterative_hard_thresholding",
    "iterative_snip",
    "itop",
    "kfac",
    "lamp",
    "layerwise_obs",
    "lottery_ticket",
    "matrix_free_fisher",
    "mean_activation",
    "merge_similar",
    "mest",
    "movement",
    "nest",
    "net_trim",
    "neural_wirings",
    "nisp",
    "obd",
    "obs",
    "one_shot_magnitude",
    "random_pruning",
    "rigl",
    "rising_threshold",
    "sensitivity",
    "set_",
    "similarity",
    "skeletonization",
    "snip",
    "sparse_momentum",
    "sparsegpt",
    "synflow",
    "taylor",
    "taylor_filter",
    "thinet",
    "top_kast",
    "total_change",
    "train_prune_finetune",
    "wanda",
    "woodfisher",
]

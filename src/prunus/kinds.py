"""Names of the signals that a part can ask for, and of the statistics that `compose` keeps."""

from __future__ import annotations

GRADIENT = "gradient"
"""Signal: dL/dw of the training loss at the present weights, dense (also where a weight is off)."""

FLOW = "flow"
"""Signal: dR/d|w| of the synaptic flow R = 1^T (prod |W_l|) 1 of the masked network."""

INPUT_SQUARE = "input_square"
"""Signal: E[x_j^2] of what each column of the turned 2-d weight is multiplied with, [groups, n]."""

GRAM = "gram"
"""Signal: E[x x^T] of the same inputs, float64 [groups, n, n]; groups: of a convolution, else 1."""

INPUT_MEAN = "input_mean"
"""Signal: E[x] of the same inputs, float64 [groups, n]."""

INPUT_ROWS = "input_rows"
"""Signal: a random sample of the same inputs, at most 1024 rows, [groups, rows, n]."""

BIAS = "bias"
"""Signal: the bias of the site's layer, float64 [outputs]; zeros if it has none."""

OUTPUT_GRAM = "output_gram"
"""Signal: mean over examples of sum over positions of g g^T, g = dL_n/d(what the layer puts out),
float64 [groups, outputs / groups, the same]."""

GRADIENT_SQUARE = "gradient_square"
"""Signal: mean over examples of (dL/dw)^2, the diagonal of the empirical Fisher matrix."""

GRADIENTS = "gradients"
"""Signal: dL/dw of every example, [examples, *shape]."""

HESSIAN = "hessian"
"""Signal: exact d2L/dw dw of one site, [size, size]; small sites only."""

HESSIAN_DIAGONAL = "hessian_diagonal"
"""Signal: exact d2L/dw_i^2; small networks only."""

HUTCHINSON = "hutchinson"
"""Signal: unbiased estimate of d2L/dw_i^2 from random directions."""

MOMENTUM = "momentum"
"""Signal: exponential average of GRADIENT over the training steps; `compose` keeps it, dense."""

COACTIVATION = "coactivation"
"""Signal: mean over examples of a unit's output times its input, for every weight (Hebb)."""

HESSIAN_GRADIENT = "hessian_gradient"
"""Signal: H g, the Hessian of the loss over all sites times its gradient."""

VALIDATION_LOSS = "validation_loss"
"""Signal: the loss on held-out data, in `Signals.loss`; from `validate=` of attach and prune."""

RESERVE = "reserve"
"""Statistic: values of weights that are off but not forgotten; 0 where a weight is on."""

# Signals of each output a of a site, after norm and activation, spread over the weight's shape:
NORM_SCALE = "norm_scale"  # |gamma| of the batch norm that follows
OUTPUT_ZEROS = "output_zeros"  # share of zeros
OUTPUT_MAGNITUDE = "output_magnitude"  # E|a|
OUTPUT_VARIANCE = "output_variance"  # E a^2 - (E a)^2
OUTPUT_DISTINCTNESS = "output_distinctness"  # 1 - |correlation| with the nearest, when removed
OUTPUT_SENSITIVITY = "output_sensitivity"  # max_k of the rms of do_k/da, o the network's outputs
OUTPUT_TAYLOR = "output_taylor"  # mean over examples of |mean over positions of dL/da a|
GATE = "gate"  # dL/d(alpha) of a gate alpha = 1 on a
IMPORTANCE = "importance"  # |W_(l+1)|^T ... |W_L|^T 1

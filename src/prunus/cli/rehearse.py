"""Try everything that can go wrong, in a second, before hours of training."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from prunus import sites
from prunus.bench import Dataset, steps_per_epoch
from prunus.cli.experiment import Experiment
from prunus.cli.user import blamed
from prunus.core import Signals
from prunus.drive.ends import without_ends
from prunus.errors import PrunusError, RecipeError


class Misfit(RecipeError):
    """Parts of a recipe do not go together; place: the key of the part to change."""

    def __init__(self, place: tuple[str, ...], message: str) -> None:
        super().__init__(message)
        self.place = place


def rehearse(job: Experiment) -> None:
    """Build data, model and method of the first seed and try them together. Raises Misfit."""
    data, model = job.data(job.seeds[0]), job.model(job.seeds[0])
    _training(job, data, model)
    _forward(model, data)
    _method(job, model, data, job.training.epochs * steps_per_epoch(data, job.training.batch_size))


def _training(job: Experiment, data: Dataset, model: nn.Module) -> None:
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if norms and len(data.train_inputs) % job.training.batch_size == 1:
        raise Misfit(
            ("training", "batch_size"),
            f"the last of {len(data.train_inputs)} examples would be a batch of its own, on which "
            f"batch norm cannot train; choose another batch_size than {job.training.batch_size}",
        )


def _method(job: Experiment, model: nn.Module, data: Dataset, steps: int) -> None:
    try:
        found = sites.find(model, list(job.include), list(job.exclude))
    except PrunusError as error:
        raise Misfit(("sites",), str(error)) from error
    weights = sites.weights(sites.parameters(model, found))
    for sparsity in (None, *job.sweep):
        place = ("method",) if sparsity is None else ("sweep",)
        try:
            method = job.method(sparsity, steps)
            meant = without_ends(method, model, found, list(job.include), data.train_inputs[:1])
            last = replace(method.init(meant, weights, 0), step=method.last or 0)
            if method.needs(last) == frozenset():  # no gradient: the final mask can be tried
                method.update(last, meant, weights, Signals())
        except PrunusError as error:
            raise Misfit(place, str(error)) from error
        if method.last is not None and method.last >= steps:
            raise Misfit(
                place,
                f"{method} acts last at optimizer step {method.last}, but the training has "
                f"{steps} ({job.training.epochs} epochs); train longer, or let it end earlier",
            )


def _forward(model: nn.Module, data: Dataset) -> None:
    inputs = data.train_inputs[:2]
    what = f"the model does not run on inputs {list(inputs.shape)} of {inputs.dtype}"
    try:
        with blamed(what), torch.no_grad(), sites.evaluating(model):
            logits = model(inputs)
    except RecipeError as error:
        raise Misfit(("model",), str(error)) from error
    if not isinstance(logits, Tensor) or logits.shape != (len(inputs), logits.shape[-1]):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise Misfit(
            ("model",),
            f"the model makes {got} of inputs {list(inputs.shape)}; expected a tensor of logits "
            f"[n, classes]",
        )
    if logits.shape[1] < data.classes:
        raise Misfit(
            ("model",),
            f"the model has {logits.shape[1]} logits, but the targets reach class "
            f"{data.classes - 1}; give it {data.classes}",
        )
    if not bool(torch.isfinite(logits).all()):
        raise Misfit(("model",), "the logits of the fresh model are not finite; check its weights")

"""Grow neurons: a hidden layer gets wider where its neighbours want to be connected."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from prunus import sites
from prunus.arguments import check_positive
from prunus.drive import attached
from prunus.drive.signals import untouched
from prunus.errors import AttachError, NotFiniteError, ShapeError, SiteError, ValueRangeError

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Neurons:
    """What was grown.

    places: the new outputs of the first layer; connections: int64 [neurons, pairs, 2], an output of
    the second and an input of the first layer each; bridging: float32 [neurons, pairs] of B there;
    loss: the mean over the batches before and after, no weight trained in between.
    """

    places: range
    connections: Tensor
    bridging: Tensor
    loss: tuple[float, float]


def grow_neurons(
    model: nn.Module,
    first: str,
    second: str,
    count: int,
    *,
    batches: Iterable[Any],
    loss: Loss,
    optimizer: Optimizer | None = None,
    pairs: int = 1,
    strength: float = 1.0,
) -> Neurons:
    """NeST's neuron growth: widen the linear layer `first`, which `second` reads, in place.

    B = -mean over batches of the sum of dL/du_j x_i bridges output j of `second` and input i of
    `first`; the count * pairs largest |B| become connections of `count` new neurons, the best one
    each before anyone's second. In: s sqrt|B|, out: s sgn(B) sqrt|B|, where s makes the neuron fire
    at the mean of x_i; then both are scaled to `strength` times the mean |w| of the layer's other
    connections. All else of a new neuron is 0. optimizer: its parameters are exchanged, and moments
    grow with zeros. Between the layers may stand what works on each neuron by itself (activations,
    dropout, BatchNorm1d, which grows too). loss(model, batch) -> scalar, in eval mode.
    Raises SiteError where a name is no plain nn.Linear or is tied, ShapeError where `second` does
    not read the neurons of `first` alone, AttachError for an attached sparsifier or DDP (grow
    before), NotFiniteError, ValueRangeError. Then nothing is changed.
    Source: Dai, Yin, Jha 2018, arXiv 1711.02017, section on neuron growth.
    Differs: the sign s is drawn there, which leaves half of the neurons behind a ReLU dead.
    """
    layers = _layers(model, first, second)
    check_positive(strength=strength)
    if not all(isinstance(n, int) and n > 0 for n in (count, pairs)):
        raise ValueRangeError(f"count={count!r}, pairs={pairs!r}: whole numbers, at least 1")
    held = list(batches)
    if not held:
        raise ValueRangeError("batches is empty: bridging gradients are means over batches")
    bridge, mean, before = _bridging(model, layers, held, loss, (first, second))
    if count * pairs > bridge.numel():
        raise ValueRangeError(
            f"{count} neurons with {pairs} pairs need {count * pairs} connections, and {first} and "
            f"{second} have {bridge.numel()} between them"
        )
    best = torch.sort(bridge.abs().flatten(), descending=True, stable=True).indices
    chosen = best[: count * pairs].reshape(pairs, count).T
    places = torch.stack([chosen // bridge.shape[1], chosen % bridge.shape[1]], -1)
    width = layers[0].out_features
    with _widened(model, layers, count, optimizer):
        silent = _mean_loss(model, held, loss)
        if not math.isclose(silent, before, rel_tol=1e-4, abs_tol=1e-6):
            raise ShapeError(
                f"silent neurons in {first!r} change the loss from {before:.6g} to {silent:.6g}: "
                f"something between it and {second!r} mixes neurons (a LayerNorm?), or another "
                f"layer reads them"
            )
        into, out = _born(bridge, mean, places)
        with torch.no_grad():
            layers[0].weight[width:] = _scaled(into, layers[0], strength).to(layers[0].weight)
            layers[1].weight[:, width:] = _scaled(out, layers[1], strength).T.to(layers[1].weight)
    value = bridge[places[..., 0], places[..., 1]].float()
    return Neurons(
        range(width, width + count), places, value, (before, _mean_loss(model, held, loss))
    )


def _born(bridge: Tensor, mean: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Connections of new neurons before they are scaled: [neurons, inputs], [neurons, outputs]."""
    outputs, inputs = places.unbind(-1)
    value = bridge[outputs, inputs]
    side = torch.where(mean[inputs] < 0, -1.0, 1.0).to(value)
    neurons = torch.arange(len(places))[:, None].expand_as(inputs)
    into, out = (value.new_zeros(len(places), n) for n in reversed(bridge.shape))
    size = side * value.abs().sqrt()
    into.index_put_((neurons, inputs), size, accumulate=True)
    out.index_put_((neurons, outputs), size * value.sign(), accumulate=True)
    return into, out


def _layers(model: nn.Module, *names: str) -> tuple[nn.Linear, nn.Linear]:
    """The two layers, if they can be widened."""
    if sites.unwrap(model) is not model or attached(model) is not None:
        raise AttachError(
            "growing neurons makes new parameters: do it before torch.compile, DDP and pr.attach"
        )
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = []
    for name in names:
        layer = dict(model.named_modules()).get(name)
        if type(layer) is not nn.Linear or any(owners[id(p)] > 1 for p in layer.parameters()):
            kind = "no module" if layer is None else f"a {type(layer).__name__}, or tied"
            raise SiteError(f"{name!r} is {kind}: name two nn.Linear modules, one behind the other")
        found.append(layer)
    if found[0] is found[1] or found[0].out_features != found[1].in_features:
        raise ShapeError(
            f"{names[1]!r} reads {found[1].in_features} numbers, {names[0]!r} makes "
            f"{found[0].out_features}: name the layer that reads its neurons"
        )
    return found[0], found[1]


def _bridging(
    model: nn.Module,
    layers: tuple[nn.Linear, nn.Linear],
    batches: list[Any],
    loss: Loss,
    names: tuple[str, str],
) -> tuple[Tensor, Tensor, float]:
    """B float64 [outputs of the second, inputs of the first], the mean of x, and of the loss."""
    bridge = torch.zeros(layers[1].out_features, layers[0].in_features, dtype=torch.float64)
    mean, total = torch.zeros(layers[0].in_features, dtype=torch.float64), 0.0
    with untouched(model), sites.evaluating(model), torch.enable_grad():
        for batch in batches:
            inputs: list[Tensor] = []
            results: list[Tensor] = []
            hooks = _listen(*layers, inputs, results)
            try:
                value = loss(model, batch)
            finally:
                for hook in hooks:
                    hook.remove()
            if len(inputs) != len(results) or not results:
                raise ShapeError(f"{names[1]!r} does not run once behind each run of {names[0]!r}")
            grads = torch.autograd.grad(value, results, allow_unused=True)
            for x, grad in zip(inputs, grads, strict=True):
                if grad is None or x.shape[:-1] != grad.shape[:-1]:
                    raise ShapeError(f"{names[1]!r} does not see the examples of {names[0]!r}")
                flat = x.detach().flatten(0, -2)
                bridge -= (grad.flatten(0, -2).T @ flat).double().cpu() / len(batches)
                mean += flat.sum(0).double().cpu()
            total += float(value.detach()) / len(batches)
    if not math.isfinite(total) or not bool(torch.isfinite(bridge).all()):
        raise NotFiniteError(f"loss or bridging gradient from {names[0]} to {names[1]} holds NaN")
    return bridge, mean, total


def _listen(
    first: nn.Linear, second: nn.Linear, inputs: list[Tensor], results: list[Tensor]
) -> list[RemovableHandle]:
    """Note what goes into the first layer and what comes out of the second."""

    def before(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs.append(given[0])

    def behind(_: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        results.append(result if result.requires_grad else result.requires_grad_())

    return [first.register_forward_pre_hook(before), second.register_forward_hook(behind)]


def _mean_loss(model: nn.Module, batches: list[Any], loss: Loss) -> float:
    with torch.no_grad(), untouched(model), sites.evaluating(model):
        return sum(float(loss(model, batch)) for batch in batches) / len(batches)


def _scaled(new: Tensor, layer: nn.Linear, strength: float) -> Tensor:
    """Scale each neuron's connections to `strength` times the mean |w| of the layer's non-zeros."""
    old = layer.weight.detach().abs().double().cpu()
    usual = float(old.sum()) / max(1, int((old > 0).sum()))
    count = (new != 0).sum(1, keepdim=True).clamp(min=1)
    own = new.abs().sum(1, keepdim=True) / count
    return new * (strength * usual / own.clamp(min=torch.finfo(own.dtype).tiny))


@contextmanager
def _widened(
    model: nn.Module,
    layers: tuple[nn.Linear, nn.Linear],
    count: int,
    optimizer: Optimizer | None,
) -> Iterator[None]:
    """Add silent neurons; an error takes them away again."""
    first, second = layers
    width, undone = first.out_features, []
    modules = list(model.modules())
    norms = modules[modules.index(first) : modules.index(second)]
    jobs: list[tuple[nn.Module, str, int, float]] = [(first, "weight", 0, 0), (first, "bias", 0, 0)]
    for norm in (m for m in norms if isinstance(m, nn.BatchNorm1d) and m.num_features == width):
        jobs += [(norm, "weight", 0, 1), (norm, "bias", 0, 0)]
        jobs += [(norm, "running_mean", 0, 0), (norm, "running_var", 0, 1)]
        undone.append((norm, "num_features", width))
        norm.num_features += count
    jobs.append((second, "weight", 1, 0))
    swapped = []
    for module, name, axis, fill in jobs:
        old = getattr(module, name)
        if old is None:
            continue
        undone.append((module, name, old))
        new = _longer(old.detach(), axis, count, fill)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            swapped.append((old, new, axis))
        setattr(module, name, new)
    undone += [(first, "out_features", width), (second, "in_features", width)]
    first.out_features = second.in_features = width + count

    try:
        yield
    except BaseException:
        for module, name, value in undone:
            setattr(module, name, value)
        raise
    if optimizer is not None:
        for old, new, axis in swapped:
            _exchange(optimizer, old, new, axis, count)


def _longer(tensor: Tensor, axis: int, count: int, fill: float) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = count
    return torch.cat([tensor, tensor.new_full(shape, fill)], axis)


def _exchange(
    optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, axis: int, count: int
) -> None:
    """Let the optimizer hold `new` where it held `old`; its moments grow with zeros."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is not None:
        optimizer.state[new] = {
            k: _longer(v, axis, count, 0) if isinstance(v, Tensor) and v.shape == old.shape else v
            for k, v in state.items()
        }

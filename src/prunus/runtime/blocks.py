"""Residual additions and activations in forward passes, moved into the layers before them."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunus.runtime.candidates import run
from prunus.runtime.epilogue import Fusing
from prunus.runtime.forward import Forward
from prunus.runtime.fuse import activation_name, plain
from prunus.runtime.part import LinearPart
from prunus.runtime.reach import hidden, switched
from prunus.runtime.tracing import Tracer, quietly

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_IN_PLACE = (operator.iadd,)
_ACTIVATIONS = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_"), "relu"),
    F.silu: "silu",
    F.relu6: "relu6",
    F.gelu: "gelu",
}
# Modules that change nothing in inference, and those known to leave their inputs as they are.
_TRANSPARENT = (nn.Identity, nn.Dropout)
_PURE = (
    *(
        *_TRANSPARENT,
        Fusing,
        LinearPart,
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.LayerNorm,
        nn.BatchNorm1d,
    ),
    *(nn.BatchNorm2d, nn.GELU, nn.Tanh, nn.Sigmoid, nn.MaxPool2d, nn.AvgPool2d),
    *(nn.Embedding, nn.AdaptiveAvgPool2d),
)


@dataclasses.dataclass(frozen=True)
class Fused:
    """What rewriting found: {block: forward pass}, {layer: activation}, layers that add."""

    forwards: dict[str, Forward] = dataclasses.field(default_factory=dict)
    activations: dict[str, str] = dataclasses.field(default_factory=dict)
    residuals: frozenset[str] = frozenset()


class _Tracer(Tracer):
    """Children are leaves, except plain nn.Sequential, which only calls one after another."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not _inlined(m)


def fuse(model: nn.Module, example: Any) -> Fused:
    """Rewrite every block whose forward pass leads sparse layers into additions or activations.

    model: with packed layers in place, a copy that may be changed. Each block (a module that calls
    sparse layers itself) is traced alone by torch.fx with its children as leaves, so that models
    which cannot be traced as a whole gain too; a block that cannot be traced is left as it is.
    """
    blocks = list(_blocks(model))
    calls = record_calls(model, [block for _, block in blocks], example)
    names = {id(module): name for name, module in model.named_modules()}
    found = Fused()
    for name, block in blocks:
        graph = None if switched(block) else trace(block, calls)
        if graph is None:
            continue
        taken = _Block(block, graph, calls.counts, names, set(found.activations) | found.residuals)
        if taken.rewrite():
            found.forwards[name] = Forward.of(graph)
            found.activations.update(taken.activations)
            residuals = found.residuals | taken.residuals
            found = dataclasses.replace(found, residuals=residuals)
    return found


def _inlined(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and plain(module)


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of those that call packed layers, outermost first."""
    for name, module in model.named_modules():
        if isinstance(module, (Fusing, nn.ModuleList, nn.ModuleDict)) or not plain(module):
            continue
        if any(isinstance(child, Fusing) for child in _children(module)):
            yield name, module


def _children(module: nn.Module) -> Iterator[nn.Module]:
    """Modules that the forward pass may call: its children, through lists and sequentials."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or _inlined(child):
            yield from _children(child)
        else:
            yield child


@dataclasses.dataclass
class _Calls:
    """How often modules were called, and which arguments blocks were given."""

    counts: Counter[int] = dataclasses.field(default_factory=Counter)
    arguments: dict[int, set[frozenset[str] | None]] = dataclasses.field(default_factory=dict)


def record_calls(model: nn.Module, blocks: list[nn.Module], example: Any) -> _Calls:
    """Counts of one forward pass."""
    calls = _Calls()

    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.counts[id(module)] += 1
        given = calls.arguments.setdefault(id(module), set())
        tensors = all(isinstance(value, Tensor) for value in (*args, *named.values()))
        bound = inspect.signature(module.forward).bind(*args, **named).arguments
        given.add(frozenset(bound) if tensors else None)

    packed = [module for module in model.modules() if isinstance(module, Fusing)]
    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in (*blocks, *packed)]
    try:
        run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def trace(block: nn.Module, calls: _Calls) -> fx.Graph | None:
    """The block's graph for the arguments it is called with; None if there is none to trust."""
    return trace_with(block, calls.arguments.get(id(block), set()))


def trace_with(block: nn.Module, given: set[frozenset[str] | None]) -> fx.Graph | None:
    """The block's graph for these names of arguments; None where calls differ in more."""
    parameters = inspect.signature(block.forward).parameters
    if len(given) != 1 or None in given:
        return None
    (bound,) = given
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters.values()):
        return None
    assert bound is not None
    defaults = {name: p.default for name, p in parameters.items() if name not in bound}
    before = _memory(block)
    graph = quietly(_Tracer(), block, defaults)
    # A forward pass that stores something, or a tensor made while tracing, is not in the graph.
    return graph if _memory(block) == before else None


def _memory(block: nn.Module) -> list[tuple[str, int, int]]:
    """Names, identities, and lengths or versions, of all that the modules of a block hold."""
    return [
        (name, id(value), len(value) if isinstance(value, list | dict | set | deque) else 0)
        if not isinstance(value, Tensor)
        else (name, id(value), 0 if value.is_inference() else value._version)
        for module in block.modules()
        for held in (vars(module), module._buffers, module._parameters)
        for name, value in held.items()
    ]


class _Block:
    """One graph while it is rewritten."""

    def __init__(
        self,
        block: nn.Module,
        graph: fx.Graph,
        counts: Counter[int],
        names: dict[int, str],
        taken: set[str],
    ) -> None:
        self.graph, self.names, self.taken = graph, names, taken
        self.modules = dict(block.named_modules(remove_duplicate=False))
        uses = Counter(id(self._module(node)) for node in graph.nodes if self._module(node))
        self.layers = [
            node
            for node in graph.nodes
            if isinstance(module := self._module(node), Fusing)
            and uses[id(module)] == 1
            and counts[id(module)] == counts[id(block)]
            and len(node.args) == 1
            and not node.kwargs
            and hidden(block, "", (str(node.target),))
        ]
        self.activations: dict[str, str] = {}
        self.residuals: set[str] = set()

    def rewrite(self) -> bool:
        """Fuse what follows each layer; True if anything was."""
        for node in self.layers:
            layer = self._module(node)
            assert isinstance(layer, Fusing)
            name = self.names[id(layer)]
            if not layer.activation and name not in self.taken:
                self._fuse(node, name)
        if not (self.activations or self.residuals):
            return False
        self.graph.lint()
        return True

    def _fuse(self, node: fx.Node, name: str) -> None:
        """Take the addition and the activation behind one layer into it."""
        last = self._through(node)
        addition = _only_user(last)
        residual = None if addition is None else self._residual(addition, last)
        if addition is not None and residual is not None and self._calm(node, addition):
            if self._before(node, residual):
                addition.prepend(node)  # the other summand comes from after the layer
            node.args = (*node.args, residual)
            addition.replace_all_uses_with(last)
            self.graph.erase_node(addition)
            self.residuals.add(name)
            last = self._through(last)
        activation = _only_user(last)
        kind = "" if activation is None else self._activation(activation, last)
        if activation is not None and kind:
            activation.replace_all_uses_with(last)
            self.graph.erase_node(activation)
            self.activations[name] = kind

    def _through(self, node: fx.Node) -> fx.Node:
        """The last of the modules behind a node that change nothing."""
        user = _only_user(node)
        while user is not None and type(self._module(user)) in _TRANSPARENT:
            if user.args != (node,) or user.kwargs or not plain(self.modules[str(user.target)]):
                break
            user.replace_all_uses_with(node)
            self.graph.erase_node(user)
            user = _only_user(node)
        return node

    def _residual(self, node: fx.Node, summand: fx.Node) -> fx.Node | None:
        """The other summand of an addition, None for anything else."""
        method = node.op == "call_method" and node.target in ("add", "add_")
        function = node.op == "call_function" and node.target in _ADDITIONS
        if not (method or function) or node.kwargs or len(node.args) != 2:
            return None
        one, two = node.args
        in_place = node.target in _IN_PLACE or node.target == "add_"
        other = two if one is summand else None if in_place else one
        return other if isinstance(other, fx.Node) and other is not summand else None

    def _activation(self, node: fx.Node, argument: fx.Node) -> str:
        """The name in kernels.ACTIVATIONS of what a node applies, "" if there is none."""
        module = self._module(node)
        if node.args != (argument,):
            return ""
        if module is not None:
            return "" if node.kwargs else activation_name(module)
        kind = _ACTIVATIONS.get(node.target, "") if node.op != "get_attr" else ""
        options = {key: value for key, value in node.kwargs.items() if key != "inplace"}
        if kind == "gelu":
            approximate = options.pop("approximate", "none")
            kind = {"none": "gelu", "tanh": "gelu_tanh"}.get(str(approximate), "")
        return "" if options else kind

    def _calm(self, start: fx.Node, end: fx.Node) -> bool:
        """Whether nothing between two nodes may write to a tensor that already exists."""
        node = start.next
        while node is not end:
            if not pure(node, self._module(node)):
                return False
            node = node.next
        return True

    def _before(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether a node comes before another."""
        while node is not self.graph._root:
            if node is other:
                return True
            node = node.next
        return False

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None


def pure(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node leaves all tensors as they are; module: the one it calls, if it does."""
    if node.op == "call_module":
        inplace = getattr(module, "inplace", False)
        known = type(module) in (nn.ReLU, nn.ReLU6, nn.SiLU) or isinstance(module, _PURE)
        return known and not inplace and module is not None and plain(module)
    name = getattr(node.target, "__name__", str(node.target))
    writes = name.endswith("_") and not name.endswith("__")
    if writes or name.startswith("__set") or node.kwargs.get("inplace"):
        return False
    assigns = getattr(node.target, "__module__", "") == "_operator" and name.startswith("i")
    return "out" not in node.kwargs and not (assigns and name not in ("inv", "invert", "index"))


def _only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads this one."""
    return next(iter(node.users)) if len(node.users) == 1 else None

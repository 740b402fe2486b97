"""torch.fx traces that other threads do not notice.

`fx.Tracer.trace` replaces `nn.Module.__call__` and `__getattr__` for the whole process while it
runs, and says so in a global flag: modules that another thread calls meanwhile would be traced, or
fail. Here only the modules of the traced model change, by a class of their own for that time. So
the model has to be a copy that nobody else uses.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace as symbolic
from torch.fx.proxy import TraceError

# What a forward pass that meets tracing proxies in place of tensors may fail with.
UNTRACEABLE = (
    TraceError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Tracer(fx.Tracer):
    """fx.Tracer for a module that this thread alone uses.

    Buffers are read when the graph runs, as parameters are: they may change from call to call.
    """

    proxy_buffer_attributes = True

    def trace(
        self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        """The graph of the module's forward pass, as `fx.Tracer.trace` gives it."""
        assert isinstance(root, nn.Module)
        forward: Any = type(root).forward
        self.root, self.root_module_name = root, root._get_name()
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        self.tensor_attrs = {
            value: f"{path}.{name}" if path else name
            for path, module in root.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, (torch.Tensor, torch.ScriptObject))
        }
        self.graph = fx.Graph(tracer_cls=type(self))
        with _leaf_functions(self, root), _own_classes(self, root):
            function, arguments = self.create_args_for_root(forward, True, concrete_args)
            self.create_node("output", "output", (self.create_arg(function(*arguments)),), {})
        self.submodule_paths = None
        return self.graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Modules of torch, and what torch.compile made: that knows no proxies."""
        compiled = m.__module__.startswith("torch._dynamo")
        return compiled or super().is_leaf_module(m, module_qualified_name)


def quietly(
    tracer: Tracer, root: nn.Module, defaults: dict[str, Any] | None = None
) -> fx.Graph | None:
    """The graph, or None of what cannot be traced; defaults: arguments that are no inputs."""
    with _LOCKS.one, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return tracer.trace(root, defaults or None)
        except UNTRACEABLE:
            return None


@contextlib.contextmanager
def _own_classes(tracer: Tracer, root: nn.Module) -> Iterator[None]:
    """Report calls and parameters of the root's modules to the tracer."""
    before = {module: type(module) for module in root.modules()}
    cache: dict[str, fx.Proxy] = {}
    made = {kind: _reporting(tracer, kind, cache) for kind in dict.fromkeys(before.values())}
    try:
        for module, kind in before.items():
            module.__class__ = made[kind]
        yield
    finally:
        for module, kind in before.items():
            module.__class__ = kind


def _reporting(
    tracer: Tracer, kind: type[nn.Module], cache: dict[str, fx.Proxy]
) -> type[nn.Module]:
    """The class with its calls and its missing attributes (parameters) seen by the tracer."""

    def called(module: nn.Module, *args: Any, **named: Any) -> Any:
        def forward(*args: Any, **named: Any) -> Any:
            return kind.__call__(module, *args, **named)

        return tracer.call_module(module, forward, args, named)

    def found(module: nn.Module, name: str) -> Any:
        return tracer.getattr(name, kind.__getattr__(module, name), cache)

    members = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__call__": called,
        "__getattr__": found,
    }
    meta: Any = type(kind)
    return meta(kind.__name__, (kind,), members)


@contextlib.contextmanager
def _leaf_functions(tracer: Tracer, root: nn.Module) -> Iterator[None]:
    """Record functions of `math` and those given to `fx.wrap` when they are called on proxies.

    They are replaced for the process, one trace at a time, by functions that do the same for all
    but proxies. What a torch release may lack is left out: then such a forward pass is untraceable.
    """
    needed = ("_new_patcher", "_patch_wrapped_functions", "_autowrap_check")
    if not all(hasattr(symbolic, name) for name in needed):
        yield
        return
    forwards = dict.fromkeys(type(module).forward for module in root.modules())
    scopes = [getattr(forward, "__globals__", {}) for forward in forwards]
    with _LOCKS.one, symbolic._new_patcher() as patcher:
        symbolic._patch_wrapped_functions(patcher)
        for scope in (*scopes, *(vars(module) for module in tracer._autowrap_search)):
            symbolic._autowrap_check(patcher, scope, tracer._autowrap_function_ids)
        yield


class _Locks:
    """The lock of what is the process's; anew after a fork, where nobody would release it."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """A lock that no thread holds."""
        self.one = threading.RLock()


_LOCKS = _Locks()
os.register_at_fork(after_in_child=_LOCKS.renew)

"""Who wrote over a value that the backward still needs: the forward once more, every version watched.

A tensor's version counts the writes in place to its memory. A node remembers the version of what it saved
and refuses to run when it has changed; it does not say by whom.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from clinometer.gradients.report.places import Where, runs_machinery, user_frame
from clinometer.gradients.sandbox.closure import Closure, evaluate
from clinometer.gradients.sandbox.code_origin import is_installed
from clinometer.gradients.sandbox.sandbox import Before
from clinometer.gradients.sandbox.tensors import tensors_in
from clinometer.gradients.trace.forward_trace import Trace
from clinometer.gradients.trace.function_calls import seen_calls
from clinometer.gradients.trace.graph import Graph, Node
from clinometer.gradients.trace.operations import kind_of
from clinometer.torch_internals.frames import steps_an_optimizer
from clinometer.torch_internals.nodes import names_saved, packs_saved_tensors
from clinometer.torch_internals.tensors import memory_of, version_of


def is_overwritten(error: BaseException) -> bool:
    """Whether a backward stopped because a value it needs was written over."""
    return isinstance(error, RuntimeError) and "modified by an inplace operation" in str(error)


@dataclass(frozen=True)
class Overwritten:
    """One value that was needed again, and was no longer there."""

    needed: Where
    """The call whose backward needs it."""
    written: Where | None
    """The call that wrote over it first; None when it could not be seen, or was not looked for."""
    writer: str = "call"
    """Who wrote, which chooses the remedy: an "optimizer", something else that writes a "weight", torch's own
    "module", an installed "library", an "index" that is assigned to, or a "call"."""


def find_overwritten(closure: Closure, before: Before) -> Overwritten | None:
    """Run the forward once more and name both lines; None when this time all values are still there."""
    before.rewind()
    writes = _Writes()
    try:
        with seen_calls(writes.function, lambda data, made: None, [], lambda entered: None), writes:
            roots = [evaluate(closure)]
    except RuntimeError as error:  # a closure that calls backward itself ends in the same error
        if not is_overwritten(error):
            raise
        roots = writes.roots
    reached = {node for root in roots for node in Graph(root).nodes}
    for node, saved in reversed(writes.saved.items()):  # the backward meets the latest first
        if roots and node not in reached:
            continue
        for tensor, version in saved:
            if version_of(tensor) != version and (needed := writes.places.get(node)) is not None:
                return Overwritten(needed, *writes.first(tensor, version))
    return None


def find_needed(roots: Iterable[Tensor], trace: Trace) -> Overwritten | None:
    """The line that needs the value, without another forward: to read what was written over is refused."""
    for node in (node for root in roots for node in Graph(root).nodes):
        needed = trace.places.get(node) if trace.may_read(node) else None
        if needed is not None and any(_is_refused(node, name) for name in names_saved(node)):
            return Overwritten(needed, None)
    return None


class _Writes(TorchFunctionMode):
    """What each node saved, at which version, and every call that changed a version."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: dict[Node, list[tuple[Tensor, int]]] = {}
        self.places: dict[Node, Where | None] = {}
        self.roots: list[Tensor] = []
        """Losses of backwards that the closure ran itself."""
        self._written: dict[int, list[tuple[int, Where | None, str]]] = {}
        """Memory → the version each write left behind, its place, and who wrote."""

    def first(self, tensor: Tensor, version: int) -> tuple[Where | None, str]:
        """The first write to the memory of `tensor` after `version`, and who wrote."""
        writes = self._written.get(_memory(tensor), [])
        return next(((where, writer) for after, where, writer in writes if after > version), (None, "call"))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, kind = kind_of(func)
        if kind == "quiet":
            return func(*args, **kwargs)
        if kind == "backward":
            self.roots.append(args[0])
            return func(*args, **{**kwargs, "retain_graph": True})
        ins = [tensor for tensor in tensors_in(args, kwargs) if not tensor.is_inference()]
        versions = [version_of(tensor) for tensor in ins]
        out = func(*args, **kwargs)
        where = user_frame(sys._getframe(1), op=name)
        for tensor, version in zip(ins, versions, strict=True):
            if version_of(tensor) > version:
                writer = _writer(tensor, name, where, sys._getframe(1))
                self._written.setdefault(_memory(tensor), []).append((version_of(tensor), where, writer))
        for tensor in tensors_in(out):
            self._know(tensor.grad_fn, where)
        return out

    def function(self, cls: Any, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        """A custom Function's apply, which a mode does not see."""
        out = call()
        where = user_frame(sys._getframe(1), op=cls.__name__)
        for tensor in tensors_in(out):
            self._know(tensor.grad_fn, where)
        return out

    def _know(self, root: Node | None, where: Where | None) -> None:
        """Note what a new node and the new ones below it saved."""
        stack = [root]
        while stack:
            node = stack.pop()
            if node is None or node in self.saved:
                continue
            packed = packs_saved_tensors()  # a checkpoint's may be read once only
            self.saved[node] = [] if packed else [(t, version_of(t)) for t in _saved_by(node)]
            self.places[node] = where
            stack += [below for below, _ in node.next_functions]


def _writer(tensor: Tensor, name: str, where: Where | None, frame: FrameType) -> str:
    """Who writes to a tensor: `Overwritten.writer`."""
    if steps_an_optimizer(frame):
        return "optimizer"
    if tensor.is_leaf and tensor.requires_grad:
        return "weight"
    if where is not None and is_installed(where.file):
        return "library"
    if name == "__setitem__":
        return "index"
    return "module" if runs_machinery(frame) else "call"


def _is_refused(node: Node, name: str) -> bool:
    try:
        getattr(node, name)
    except RuntimeError as error:
        return is_overwritten(error)
    return False


def _saved_by(node: Node) -> list[Tensor]:
    found = []
    for name in names_saved(node):
        try:
            found.append(getattr(node, name))
        except RuntimeError:  # written over already, or let go
            continue
    return list(tensors_in(found))


def _memory(tensor: Tensor) -> int:
    try:
        return memory_of(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # sparse tensors and wrappers have none
        return id(tensor)

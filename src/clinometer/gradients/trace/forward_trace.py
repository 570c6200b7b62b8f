"""One forward, observed: the line that made each node of the graph, and where paths out of parameters end.

A set of parameters is an int with one bit a parameter: unions and differences of hundreds of names cost
one machine operation, and a healthy forward hardly needs them.
"""

from __future__ import annotations

import functools
import operator
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from clinometer.gradients.report.places import Where, user_frame
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.sandbox.tensors import tensors_in
from clinometer.gradients.trace import operations
from clinometer.gradients.trace.cuts import Cell, Cut, Escape, each_bit, nudge
from clinometer.gradients.trace.function_calls import seen_calls
from clinometer.gradients.trace.grad_mode import GradOff
from clinometer.gradients.trace.graph import Node, live_below
from clinometer.gradients.trace.index_errors import note_range
from clinometer.gradients.trace.torch_errors import note_call
from clinometer.torch_internals.custom_functions import UNPACK_DUAL, inside_transform
from clinometer.torch_internals.modules import has_full_backward_hooks
from clinometer.torch_internals.nodes import order_of, packs_saved_tensors
from clinometer.torch_internals.tensors import base_of
from clinometer.torch_support import offers


class Trace(TorchFunctionMode):
    """Watches every call of torch made while it is active."""

    def __init__(self, subject: Subject, stand_ins: Mapping[int, Tensor] | None = None) -> None:
        """`stand_ins`: id of a tensor the forward uses instead → the subject's, as FSDP gathers them."""
        super().__init__()
        self.names = list(subject.tensors)
        self.bits = {id(tensor): 1 << i for i, tensor in enumerate(subject.tensors.values())}
        self.bits |= {key: self.bits[id(tensor)] for key, tensor in (stand_ins or {}).items()}
        self.places: dict[Node, Where | None] = {}
        self.packed: set[Node] = set()
        """Nodes whose saved tensors belong to a checkpoint or the like: those may be read once only."""
        self.cuts: list[Cut] = []
        self.escapes: list[Escape] = []
        self.nudged: Any = None
        """The place of an escape whose numbers are changed a little, to see whether the loss notices."""
        self.first_use: dict[int, Where | None] = {}
        self.used_in: dict[int, Node] = {}
        """The node that a parameter's first use made."""
        self.own_losses: list[Tensor] = []
        """Losses of backwards that the closure ran itself; of several that reach the same, the first."""
        self.ran: set[int] = set()
        """Numbers of the nodes that the closure's own backwards began at: nodes would hold their graphs."""
        self.vanished = 0
        """Parameters that `autograd.grad` differentiated away: no gradient of its result reaches them."""
        self.made: dict[int, Where | None] = {}
        """id of each nn.Parameter that the forward made → the line."""
        self.derived: set[int] = set()
        """Those of them that were made from values of other parameters: copies, and the like."""
        self.given: set[int] = set()
        """Tensors that were handed to an outermost module: inputs."""
        self.outermost: set[nn.Module] = set()
        """The modules that the closure called itself."""
        self.differentiated: list[Tensor] = []
        """Tensors that the closure took a gradient with respect to."""
        self.closure: Any = None
        """What is run, where that is known."""
        self.amp: dict[str, Where | None] = {}
        """Where the closure "scaled" a loss, "unscaled" gradients, and "clipped" still scaled ones."""
        self.masks: dict[Any, str] = {}
        """File and line of an attention → its arguments that hide every position."""
        self.on_node: Callable[[Node], None] | None = None
        """Called with every node made; backward sets it, for graphs that are built while it runs."""
        self.after_call: Callable[[str, list[Tensor], list[Tensor], Where | None], None] | None = None
        self.hooked: set[Node] = set()
        """Nodes whose result got a hook of the person's, which may change the gradient that arrives."""
        self._tensors = list(subject.tensors.values())  # their ids stay theirs
        self._below: dict[Node, int] = {}
        self._ends: list[Node] | None = None
        self._cells: dict[int, Cell] = {}
        self._modules: list[nn.Module] = []
        self._paths = subject.module_paths()
        self._inside: list[_Inside] = []
        self._grad_off = GradOff()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Active inside, with what the mode alone cannot see: Function.apply, Parameter(), modules."""
        offers("functions", "saved")
        hook = register_module_forward_pre_hook(self._before_module)
        try:
            with seen_calls(self._function, self._parameter, self._modules, self._grad_off.inference):
                with self:
                    yield
        finally:
            hook.remove()

    def live(self, tensor: Tensor) -> int:
        """The parameters that a backward from `tensor` would reach."""
        if id(tensor) in self.bits and tensor.is_leaf:
            return self.bits[id(tensor)] if tensor.requires_grad else 0
        found = 0
        if tensor.requires_grad and tensor.grad_fn is not None:
            found = self.live_node(tensor.grad_fn) | (self.bits.get(id(tensor), 0))
        inner = inside_transform(tensor)
        return found if inner is None else found | self.live(inner)

    def live_node(self, node: Node) -> int:
        """The parameters below a node."""
        return live_below(node, self.bits, self._below)

    @property
    def module_paths(self) -> dict[nn.Module, str]:
        """The subject's modules and their dotted paths."""
        return dict(self._paths)

    def _note_error(self, error: RuntimeError, name: str, ins: list[Tensor]) -> None:
        with suppress(Exception):  # torch's error is the one that counts
            note_call(error, ins, self.places, lambda: self._where(name), self._hooked)

    def _hooked(self) -> list[str]:
        """The modules that have full backward hooks, by their dotted paths."""
        return [path for module, path in self._paths.items() if has_full_backward_hooks(module)]

    def module_at(self, path: str) -> nn.Module | None:
        """The module of a dotted path, as in `Where.module`."""
        return next((module for module, known in self._paths.items() if known == path), None)

    def may_read(self, node: Node) -> bool:
        """Whether the tensors a node saved may be looked at."""
        return not self.packed or (node in self.places and node not in self.packed)

    def end_of(self, bit: int) -> Where | None:
        """The line of the last result computed from a parameter that nothing further was computed from."""
        if self._ends is None:
            read = {below for node in self.places for below, _ in node.next_functions}
            self._ends = [node for node in reversed(self.places) if node not in read and self.places[node]]
        return next((self.places[node] for node in self._ends if self.live_node(node) & bit), None)

    def _live_in(self, given: Any) -> int:
        return functools.reduce(operator.or_, map(self.live, tensors_in(given)), 0)

    def _own_backward(self, loss: Tensor, gradient: Any) -> None:
        # Held, so that they can be looked at; many micro-batches must not stay in memory for that.
        if self.live(loss) & ~self._live_in(self.own_losses):
            self.own_losses.append(loss if gradient is None else (loss * gradient).sum())

    def fed_by(self, bit: int) -> int:
        """The parameters that what met this one at its first use was computed from."""
        node = self.used_in.get(bit)
        return 0 if node is None else self.live_node(node) & ~bit

    def cuts_in(self, tensor: Tensor) -> int:
        """The cuts whose values are in `tensor`, as bits of positions in `cuts`."""
        cell = self._cell(tensor)
        found = cell.cuts if cell else 0
        base = base_of(tensor)
        if base is not None and (whole := self._cell(base)):
            found |= whole.cuts
        return found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, kind = operations.kind_of(func)
        if kind == "quiet":
            if name == "register_hook" and args[0].grad_fn is not None:
                self.hooked.add(args[0].grad_fn)
            return func(*args, **kwargs)
        if kind == "grad_mode":
            return self._grad_off.switched(func, args)
        if kind == "backward":
            self._own_backward(args[0], args[1] if len(args) > 1 else kwargs.get("gradient"))
            try:
                out = func(*args, **{**kwargs, "retain_graph": True})
                self.ran |= {n for t in tensors_in(args[:1]) if (n := order_of(t.grad_fn)) is not None}
                return out
            except RuntimeError as error:
                self._note_error(error, name, list(tensors_in(args[:1])))
                raise
        if name in operations.AMP:
            self._note_amp(name)
        ins = list(tensors_in(args, kwargs))
        came = 0
        if name.endswith("_"):  # what is written over no longer knows, afterwards, what it came from
            for tensor in ins:
                came |= self.live(tensor)
        try:
            out = func(*args, **kwargs)
        except IndexError as error:
            note_range(error, name, args, kwargs, self._where(name))
            raise
        except RuntimeError as error:
            self._note_error(error, name, ins)
            raise
        if self._inside:
            self._inside[-1].note(self, ins)
            return out
        if kind == "escape":
            return self._escape(name, ins, out)
        if name == "grad":
            self._differentiate(*args, out=out, **kwargs)
        if name == UNPACK_DUAL:
            self.vanished |= self._live_in(ins) & ~self._live_in(out[1:])
            return out
        self._note(name, kind, ins, out, kwargs=kwargs, came=came)
        return out

    def _differentiate(
        self,
        outputs: Any = None,
        inputs: Any = None,
        grad_outputs: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        *_: Any,
        out: Any,
        **__: Any,
    ) -> None:
        """A call of `torch.autograd.grad`, by whomever."""
        self.differentiated += tensors_in(inputs)
        if create_graph:
            self.vanished |= self._live_in(outputs) & ~self._live_in(out)

    def _note(
        self, name: str, kind: str, ins: list[Tensor], out: Any, *, kwargs: Mapping[str, Any], came: int
    ) -> None:
        written = operations.written_by(name, kind, ins, kwargs)
        outs = list(tensors_in(out))
        where = self._where(name)
        if name in operations.ATTENTION and (hiding := operations.masks_that_hide_all(name, kwargs)):
            self.masks[where and (where.file, where.line)] = hiding
        for tensor in ins:
            bit = self.bits.get(id(tensor))
            if bit is not None and bit not in self.first_use and tensor.requires_grad:
                self.first_use[bit] = where
                if outs and outs[0].grad_fn is not None:
                    self.used_in[bit] = outs[0].grad_fn
        suspect = written is not None
        for tensor in outs:
            if tensor.grad_fn is None:
                suspect = suspect or not tensor.requires_grad or tensor.is_leaf
            else:
                self._made(tensor.grad_fn, where)
            if (inner := inside_transform(tensor)) is not None and inner.grad_fn is not None:
                self._made(inner.grad_fn, where)
        for tensor in () if written is None else (written, base_of(written)):
            if tensor is not None and tensor.grad_fn is not None:
                self._made(tensor.grad_fn, where)
        if suspect:
            self._judge(name, kind, ins, outs, written, where=where, inner=came)
        elif self._cells:
            self._carry(ins, outs, written)
        if self.after_call is not None:
            self.after_call(name, ins, outs if written is None else [*outs, written], where)

    def _made(self, node: Node, where: Where | None) -> None:
        if node in self.places:
            return
        self.places[node] = where
        if packs_saved_tensors():
            self.packed.add(node)
        if self.on_node is not None:
            self.on_node(node)

    def _judge(
        self,
        name: str,
        kind: str,
        ins: list[Tensor],
        outs: list[Tensor],
        written: Tensor | None,
        *,
        where: Where | None,
        inner: int = 0,
    ) -> None:
        """Carry the cuts on, and see for each output whether it is one."""
        came = inner
        for tensor in ins:
            came |= self.live(tensor)
        carried = self._carry(ins, outs, written)
        if name == "grad":
            came &= ~self.vanished
        if not came:
            return
        for tensor in outs if written is None else [written]:
            lost = came & ~self.live(tensor)
            if lost:
                cut = self._cut(name, kind, tensor, lost, where)
                self._mark(tensor, carried | 1 << len(self.cuts), ins if kind == "alias" else ())
                self.cuts.append(cut)

    def _cut(self, name: str, kind: str, out: Tensor, lost: int, where: Where | None) -> Cut:
        group = None
        if kind == "op" and not torch.is_grad_enabled() and self._grad_off.openers:
            where, group = self._grad_off.place(where)
        return Cut(operations.cut_kind(name, kind, out), where, lost, group)

    def _carry(self, ins: Iterable[Tensor], outs: Iterable[Tensor], written: Tensor | None) -> int:
        carried = 0
        if self._cells:
            for tensor in ins:
                carried |= self.cuts_in(tensor)
            if carried:
                for tensor in outs:
                    self._mark(tensor, carried)
                if written is not None:
                    self._mark(written, carried)
        return carried

    def _mark(self, tensor: Tensor, cuts: int, sources: Iterable[Tensor] = ()) -> None:
        cell = self._cell(tensor)
        if cell is None:
            cell = self._cells[id(tensor)] = Cell(weakref.ref(tensor))
        cell.cuts |= cuts
        cell.shares += [weakref.ref(source) for source in sources]
        owners = (*[ref() for ref in cell.shares if not sources], base_of(tensor), inside_transform(tensor))
        for owner in owners:
            if (
                owner is not None
                and owner is not tensor
                and self.cuts_in(owner) | cuts != self.cuts_in(owner)
            ):
                self._mark(owner, cuts)

    def _cell(self, tensor: Tensor) -> Cell | None:
        cell = self._cells.get(id(tensor))
        return cell if cell is not None and cell.ref() is tensor else None

    def _escape(self, name: str, ins: list[Tensor], out: Any) -> Any:
        live = cuts = 0
        for tensor in ins:
            live |= self.live(tensor)
            cuts |= self.cuts_in(tensor)
        if live or cuts:
            escape = Escape(name, self._where(name), live, cuts)
            self.escapes.append(escape)
            if self.nudged is not None and escape.place == self.nudged:
                return nudge(out)
        return out

    def _where(self, op: str) -> Where | None:
        module = next((self._paths[m] for m in reversed(self._modules) if m in self._paths), "")
        return user_frame(sys._getframe(1), op=op, module=module)

    def _note_amp(self, name: str) -> None:
        event = operations.amp_event(name, sys._getframe(2))
        if event == "clipped" and ("scaled" not in self.amp or "unscaled" in self.amp):
            return
        if event and event not in self.amp:
            self.amp[event] = self._where("clip_grad_norm_" if event == "clipped" else event)

    # What the mode does not see; `seen_calls` calls these.

    def _function(self, cls: Any, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        """A custom Function's apply: one operation, whatever its forward does."""
        inside = _Inside()
        self._inside.append(inside)
        try:
            out = call()
        finally:
            self._inside.pop()
        ins = list(tensors_in(args))
        if self._inside:
            self._inside[-1].note(self, ins)
            return out
        outs = list(tensors_in(out))
        name = "checkpoint" if cls.__module__ == "torch.utils.checkpoint" else cls.__name__
        where = self._where(name)
        joined = any(tensor.grad_fn is not None for tensor in outs)
        for tensor in outs:
            if tensor.grad_fn is not None:
                self.places.setdefault(tensor.grad_fn, where)
                if self.on_node is not None:
                    self.on_node(tensor.grad_fn)
        for bit in each_bit(inside.live):
            self.first_use.setdefault(bit, where)
        # A reentrant checkpoint reaches what its function uses by a backward of its own.
        hidden = 0 if name == "checkpoint" and joined else inside.live
        kind = "checkpoint" if name == "checkpoint" else "function"
        self._judge(name, kind, ins, outs, None, where=where, inner=hidden)
        if self.after_call is not None:
            self.after_call(name, ins, outs, where)
        return out

    def _parameter(self, data: Any, made: Tensor) -> None:
        copying = _copying(sys._getframe(1))
        where = self.made[id(made)] = self._where("Parameter")
        if copying or (isinstance(data, Tensor) and (self.live(data) or self.cuts_in(data))):
            self.derived.add(id(made))
        if isinstance(data, Tensor) and not self._inside and not copying:
            self._judge("Parameter", "alias", [data], [made], None, where=where)

    def _before_module(self, module: nn.Module, args: Any) -> None:
        if not self._modules:
            self.outermost.add(module)
            self.given |= {id(tensor) for tensor in tensors_in(args)}


class _Inside:
    """What a Function's forward used; its calls are not recorded one by one."""

    def __init__(self) -> None:
        self.live = 0

    def note(self, trace: Trace, ins: Iterable[Tensor]) -> None:
        for tensor in ins:
            if tensor.requires_grad and tensor.is_leaf:
                self.live |= trace.bits.get(id(tensor), 0)


def _copying(frame: Any) -> bool:
    for _ in range(4):
        if frame is None:
            return False
        if frame.f_code.co_name == "__deepcopy__":
            return True
        frame = frame.f_back
    return False

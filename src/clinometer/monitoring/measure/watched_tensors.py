"""Which tensors are watched (the model's, then others that the optimizers hold), their copies from before the
step, and how each is described: its layer, its kind, its place in the forward.

Nothing here keeps a model, an optimizer or a tensor alive.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clinometer.distributed.sharded_tensors import local, version
from clinometer.gradients.optimizers.shared_memory import pairs_that_overlap
from clinometer.gradients.sandbox.subject import Subject
from clinometer.monitoring.measure.small_tensors import Places, Room, is_small
from clinometer.monitoring.measure.statistics import flat
from clinometer.torch_internals.nodes import order_of

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.)")


class WatchedTensors:
    """One tensor under its first name."""

    __slots__ = (
        "before",
        "dtype",
        "first_norm",
        "index",
        "look",
        "moved_elsewhere",
        "name",
        "numel",
        "of_model",
        "ref",
        "replaced",
        "replacement",
        "room",
        "shape",
        "shared",
        "weight_norm",
    )

    def __init__(self, index: int, name: str, tensor: Tensor) -> None:
        self.index = index
        self.name = name
        self.shape = tuple(tensor.shape)
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        self.numel = tensor.numel()
        self.ref = weakref.ref(tensor)
        self.before: Tensor | None = None
        """A flat copy of the tensor as it was at the last look."""
        self.room: Room | None = None
        """Where that copy stands beside those of other small tensors."""
        self.look: tuple[int, int] | None = None
        """Version and address of the tensor at the last measurement; if they differ, it was written to."""
        self.moved_elsewhere = False
        """It was written to between two steps."""
        self.of_model = False
        """The model named it."""
        self.shared = False
        """Its memory is another parameter's too, and optimizers hold both."""
        self.replaced = False
        """An optimizer holds it, and the model has another tensor instead that no optimizer holds."""
        self.replacement = False
        """It is such another tensor."""
        self.weight_norm = self.first_norm = float("nan")
        """After the last step; and before the first."""


def state_of(tensor: Tensor) -> tuple[int, int]:
    """A value that changes when a tensor is written to, except by `tensor.data.add_()`."""
    return (-1 if tensor.is_inference() else version(tensor)), local(tensor).data_ptr()


class Roster:
    """The watched tensors, in an order that only grows."""

    def __init__(self, model: Any, optimizers: Iterable[Optimizer]) -> None:
        self._model = _weak(model)
        self.optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        self.watched: list[WatchedTensors] = []
        self._by_id: dict[int, WatchedTensors] = {}
        self._owned: dict[int, list[WatchedTensors]] = {}
        self._sizes: tuple[tuple[int, ...], ...] = ()
        self.unowned: list[WatchedTensors] = []
        self.grow()

    @property
    def model(self) -> Any:
        return self._model()

    def grow(self) -> bool:
        """Look again; true if there are tensors that were not there before."""
        size = len(self.watched)
        model = self.model
        named = Subject.of(model).tensors if model is not None else {}
        for name, tensor in named.items():
            self._add(name, tensor).of_model = True
        self._owned, owned = {}, set()
        for place, optimizer in enumerate(self.living()):
            mine = self._owned.setdefault(id(optimizer), [])
            for group_index, group in enumerate(optimizer.param_groups):
                for index, tensor in enumerate(group["params"]):
                    # A tensor that the model does not name has the place it has in its optimizer.
                    mine.append(self._add(f"optimizer{place}.group{group_index}.param{index}", tensor))
                    owned.add(id(tensor))
        self.unowned = [w for w in self.watched if id(w.ref()) not in owned]
        self._sizes = self._count()
        self._compare_with_model({id(t): t for t in named.values()}, owned)
        return len(self.watched) > size

    def _compare_with_model(self, named: dict[int, Tensor], owned: set[int]) -> None:
        """Parameters that were replaced behind an optimizer's back, and parameters over one memory."""
        new = [w for w in self.unowned if (t := w.ref()) is not None and id(t) in named and t.requires_grad]
        gone = [
            w
            for w in self.watched
            if w.of_model and (t := w.ref()) is not None and id(t) in owned and id(t) not in named
        ]
        stale = bool(named) and bool(gone)
        # Only what came after them can have taken their place.
        new = [w for w in new if stale and w.index > max(g.index for g in gone)]
        for one in self.watched:
            one.replaced, one.replacement = bool(new) and one in gone, one in new
        self.compare_memory()

    def compare_memory(self) -> None:
        """Look for parameters of the optimizers that lie over one memory."""
        owned = {id(w): w for mine in self._owned.values() for w in mine}
        able = {
            str(w.index): t
            for w in owned.values()
            if (t := w.ref()) is not None and t.requires_grad and t.is_leaf and not t.is_inference()
        }
        pairs = pairs_that_overlap(able)
        shared = {int(name) for pair in pairs for name in pair}
        for one in self.watched:
            one.shared = one.index in shared

    def grew(self, *, look: bool = False) -> bool:
        """The same, if an optimizer was given other parameters since; with `look` in any case."""
        return (look or self._count() != self._sizes) and self.grow()

    def owned_by(self, optimizer: Optimizer) -> list[WatchedTensors]:
        return self._owned.get(id(optimizer), [])

    def living(self) -> Iterator[Optimizer]:
        for reference in self.optimizers:
            optimizer = reference()
            if optimizer is not None:
                yield optimizer

    def find(self, tensor: Tensor) -> WatchedTensors | None:
        found = self._by_id.get(id(tensor))
        return found if found is not None and found.ref() is tensor else None

    def tensors(self) -> list[Tensor]:
        """Those that still live."""
        return [t for w in self.watched if (t := w.ref()) is not None]

    def groups(self) -> dict[int, int]:
        """Which parameter group holds a tensor, by its id; groups are counted over all optimizers."""
        found: dict[int, int] = {}
        number = 0
        for optimizer in self.living():
            for group in optimizer.param_groups:
                found.update({id(tensor): number for tensor in group["params"]})
                number += 1
        return found

    def _count(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(map(id, group["params"])) for o in self.living() for group in o.param_groups)

    def _add(self, name: str, tensor: Tensor) -> WatchedTensors:
        known = self.find(tensor)
        if known is not None:
            return known
        taken = {w.name for w in self.watched} if any(w.name == name for w in self.watched) else set()
        while name in taken:
            name += "'"  # the tensor that had the name was freed
        new = WatchedTensors(len(self.watched), name, tensor)
        self.watched.append(new)
        self._by_id[id(tensor)] = new
        return new


def give_memory(watched: Iterable[WatchedTensors], places: Places) -> None:
    """A copy for each tensor that has none, in one buffer a precision; small ones in a room for them."""
    missing: dict[tuple[torch.dtype, torch.device], list[tuple[WatchedTensors, Tensor]]] = {}
    small: list[tuple[WatchedTensors, Tensor]] = []
    for one in watched:
        tensor = one.ref()
        if one.before is None and tensor is not None:
            values = flat(tensor)
            one.first_norm = float(torch.linalg.vector_norm(values, dtype=_sum_in(values.dtype)))
            one.look = state_of(tensor)
            if is_small(tensor) and tensor.dtype is torch.float32:
                small.append((one, tensor))
            else:
                missing.setdefault((values.dtype, values.device), []).append((one, values))
    if small:
        room = Room([tensor for _, tensor in small], places, [one.index for one, _ in small])
        for (one, _), copy in zip(small, room.copies(), strict=True):
            one.room, one.before = room, copy
    for (dtype, device), members in missing.items():
        buffer = torch.empty(sum(values.numel() for _, values in members), dtype=dtype, device=device)
        start = 0
        for one, values in members:
            one.before = buffer[start : start + values.numel()].copy_(values)
            start += values.numel()


def _sum_in(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _weak(model: Any) -> Callable[[], Any]:
    if isinstance(model, nn.Module):
        return weakref.ref(model)
    return lambda: model  # a mapping of tensors: the caller keeps it alive


def layer_of(name: str) -> int | None:
    """The first whole number in the path of the module: 3 in "h.3.attn.c_attn.weight"."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def kind_of(name: str) -> str:
    """The path without what comes up to the layer's number, and without ".weight": "attn.c_attn"."""
    found = _LAYER.search(name)
    inside = name[found.end() + 1 :] if found else name
    return inside.removesuffix(".weight") if inside != "weight" else inside


def describe(
    watched: Iterable[WatchedTensors], groups: Mapping[int, int], positions: Mapping[int, int]
) -> list[dict[str, Any]]:
    """One entry a tensor; `groups` is by the tensor's id, `positions` by its place in the list."""
    return [
        {
            "id": one.index,
            "name": one.name,
            "shape": list(one.shape),
            "dtype": one.dtype,
            "numel": one.numel,
            "group": groups.get(id(one.ref())),
            "layer": layer_of(one.name),
            "kind": kind_of(one.name),
            "position": positions.get(one.index, one.index),
        }
        for one in watched
    ]


def order_of_use(
    losses: Iterable[Tensor], watched: Sequence[WatchedTensors], stand_ins: Mapping[int, int] | None = None
) -> dict[int, int]:
    """Position of each tensor, by its place in the list, in the order in which the forward first used it.

    Nodes of the autograd graph are numbered as the forward makes them, and a tensor stands where its first
    user stands; a compiled function is one node, whose inputs come in the order of use. What the graph does
    not reach (frozen, unused) keeps its place behind the tensor registered before it. Empty if
    it reaches none. `stand_ins`: by the id of a tensor that the graph holds instead, that of the watched one.
    """
    used: dict[int, tuple[int, int]] = {}
    names = stand_ins or {}
    seen: set[Any] = set()
    queue = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        number = order_of(node)
        if number is None:  # this torch does not number its nodes
            return {}
        for place, (following, _) in enumerate(node.next_functions):
            if following is None:
                continue
            leaf = getattr(following, "variable", None)
            if leaf is None:
                queue.append(following)
            else:
                at = (number, place)
                name = names.get(id(leaf), id(leaf))
                used[name] = min(used.get(name, at), at)
    if not any(id(one.ref()) in used for one in watched):
        return {}  # another model's loss
    keys: list[tuple[tuple[int, int], int]] = []
    place = (-1, -1)
    for one in watched:
        place = used.get(id(one.ref()), place)
        keys.append((place, one.index))
    return {index: position for position, (_, index) in enumerate(sorted(keys))}


def leaves_of(losses: Iterable[Tensor]) -> list[Tensor]:
    """The tensors in which the graph of these losses ends."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    queue = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following is None:
                continue
            leaf = getattr(following, "variable", None)
            if leaf is None:
                queue.append(following)
            else:
                found[id(leaf)] = leaf
    return list(found.values())


def reaches_others(losses: Iterable[Tensor], roster: Roster) -> bool:
    """Whether the graph of these losses ends in a tensor that is not watched."""
    return any(roster.find(leaf) is None for leaf in leaves_of(losses))

"""Which tensors the optimizers hold: those that a step will miss, and those that are no longer the model's.

A tensor of an optimizer need not belong to the model given: a temperature, a criterion, another network. It
is stale only if nobody but optimizers has it any more, or if it stands in the model's own order where now
another tensor stands; equal shapes are no evidence.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clinometer.gradients.diagnose.loop_finding import loop_finding
from clinometer.gradients.optimizers.identity import tensors_of
from clinometer.gradients.report.finding import EXPLAINED, FAULT, Finding
from clinometer.gradients.report.module_names import owners
from clinometer.gradients.sandbox.subject import Subject

Optimizers = tuple[Optimizer, ...]


class Membership:
    """What the optimizers given hold of a subject. Made before anything is kept: it counts references."""

    def __init__(self, subject: Subject, optimizers: Optimizers) -> None:
        self._subject = subject
        self.optimizers = optimizers
        self._trainable = {n: t for n, t in subject.tensors.items() if t.requires_grad and t.is_leaf}
        ours = {id(tensor) for tensor in subject.tensors.values()}
        held = tensors_of(*optimizers)
        self.missing = [name for name, tensor in self._trainable.items() if id(tensor) not in held]
        strangers = [tensor for key, tensor in held.items() if key not in ours]
        self._holds_ours = len(strangers) < len(held)
        self.held = set(held)
        del held
        self._forgotten = _only_in_optimizers(strangers, optimizers) if self.missing else set()
        self._strangers = {id(tensor): tuple(tensor.shape) for tensor in strangers}
        self._moved = dict(self._in_anothers_place(ours))

    def outside(self, getting: Collection[str] | None = None) -> set[str]:
        """The tensors that no optimizer has, though they have others of this model; not those replaced."""
        replaced = self._replaced(self.missing, (), getting)
        if not self.optimizers or not (self._holds_ours or replaced):
            return set()
        held = (name for name, tensor in self._subject.tensors.items() if id(tensor) in self.held)
        return set(self._subject.tensors) - set(held) - set(replaced)

    def findings(
        self,
        apart: Collection[str] = (),
        reached: Collection[int] = (),
        getting: Collection[str] | None = None,
    ) -> Iterator[Finding]:
        """What a step will miss; tensors whose ids are in `reached` are not stale.

        `getting`: those that a backward brings a gradient; None if none ran.
        """
        if not self.optimizers or not self.missing:
            return
        tensors = self._trainable
        # A second optimizer, as in a GAN or with a separate one for the embeddings, steps what it holds.
        elsewhere = in_other_optimizers({id(tensors[name]) for name in self.missing}, self.optimizers)
        if others := tuple(n for n in self.missing if id(tensors[n]) in elsewhere and n not in apart):
            kinds = sorted({type(elsewhere[id(tensors[name])]).__name__ for name in others})
            yield loop_finding("not-in-optimizer", EXPLAINED, others, variant="other", other=", ".join(kinds))
        missing = [name for name in self.missing if id(tensors[name]) not in elsewhere]
        if replaced := self._replaced(missing, reached, getting):
            stale = len([key for key in self._stale() if key not in reached])
            yield loop_finding(
                "stale-in-optimizer", FAULT, replaced, linked=("not-in-optimizer",), stale=stale
            )
            missing = [name for name in missing if name not in replaced]
        if rest := tuple(name for name in missing if name not in apart):
            yield loop_finding("not-in-optimizer", FAULT, rest, owned=owners(rest, self._subject))

    def of_other_steps(
        self, missing: Iterable[str], reached: Collection[int], *, live: bool = False
    ) -> set[str]:
        """Those of `missing` whose optimizers get no gradient at all from this loss, while another does.

        `reached`: ids of the tensors that get one; `live`: ask all optimizers of this process.
        """
        optimizers = [*self.optimizers, *(_others(self.optimizers) if live else ())]
        trained = [o for o in optimizers if not tensors_of(o).keys().isdisjoint(reached)]
        if not trained or (self.optimizers and not set(map(id, trained)) & set(map(id, self.optimizers))):
            return set()
        theirs = tensors_of(*trained)
        others = tensors_of(*(optimizer for optimizer in optimizers if optimizer not in trained))
        ids = {name: id(self._subject.tensors[name]) for name in missing}
        return {name for name, key in ids.items() if key in others and key not in theirs}

    def of_other_losses(self, missing: Iterable[str]) -> set[str]:
        """Those of `missing` that two optimizers hold: both given, or one of this process that has moved it.

        Two optimizers over one network are two losses, of which one may use a part that the other does not.
        """
        given = [set(tensors_of(optimizer)) for optimizer in self.optimizers]
        others = list(_others(self.optimizers))
        found = set()
        for name in missing:
            tensor = self._subject.tensors[name]
            holding = sum(id(tensor) in held for held in given)
            holding += sum(bool(getattr(o, "state", {}).get(tensor)) for o in others)
            found |= {name} if holding > 1 else set()
        return found

    def _stale(self) -> set[int]:
        return self._forgotten | self._moved.keys()

    def _replaced(
        self, missing: list[str], reached: Collection[int], getting: Collection[str] | None
    ) -> tuple[str, ...]:
        """Those missing that took a stale tensor's place: of its shape, or beside one that is, or all."""
        stale = {key for key in self._stale() if key not in reached}
        if not stale or not missing:
            return ()
        likely = [name for name in missing if getting is None or name in getting] or missing
        shapes = {self._strangers[key] for key in stale}
        named = {self._moved[key] for key in stale if key in self._moved}
        alike = named or {name for name in likely if tuple(self._trainable[name].shape) in shapes}
        modules = {name.rpartition(".")[0] for name in alike}
        beside = {name for name in missing if name.rpartition(".")[0] in modules}
        return tuple(name for name in missing if name in (alike | beside or set(likely)))

    def _in_anothers_place(self, ours: set[int]) -> Iterator[tuple[int, str]]:
        """Strangers of an optimizer that holds the rest of the model in its order: whose place each has."""
        order = list(self._trainable.items())
        for optimizer in self.optimizers:
            held = tensors_of(optimizer)
            if len(held) != len(order) or ours.isdisjoint(held):
                continue
            pairs = [(key, name, key == id(now)) for key, (name, now) in zip(held, order, strict=True)]
            alike = all(held[key].shape == self._trainable[name].shape for key, name, _ in pairs)
            if alike and not any(key in ours and not same for key, _, same in pairs):
                yield from ((key, name) for key, name, same in pairs if not same)


def in_other_optimizers(ids: Collection[int], optimizers: Optimizers) -> dict[int, Optimizer]:
    """Which of these tensors another optimizer of this process holds."""
    found = {}
    for optimizer in _others(optimizers):
        found |= {key: optimizer for key in tensors_of(optimizer) if key in ids}
    return found


def _others(optimizers: Optimizers) -> Iterator[Optimizer]:
    for thing in gc.get_objects():
        # Its type, not isinstance: that would ask lazy proxies for their class and wake them up.
        if issubclass(type(thing), Optimizer) and not any(thing is optimizer for optimizer in optimizers):
            yield thing


def _only_in_optimizers(strangers: list[Tensor], optimizers: Optimizers) -> set[int]:
    """Those that nothing but optimizers refers to: no module, no variable, no list."""
    everyone = [*optimizers, *_others(optimizers)] if strangers else []
    lists = {id(g["params"]): g["params"] for o in everyone for g in getattr(o, "param_groups", ())}
    tables: dict[int, Mapping[Any, Any]] = {
        id(table): table for o in everyone if isinstance(table := getattr(o, "state", None), Mapping)
    }
    (alone,) = _references([torch.empty(0)])
    found = set()
    for tensor, count in zip(strangers, _references(strangers), strict=True):
        listed = sum(item is tensor for items in lists.values() for item in items)
        if count - alone <= listed + sum(tensor in table for table in tables.values()):
            found.add(id(tensor))
    return found


def _references(tensors: list[Tensor]) -> list[int]:
    return [sys.getrefcount(tensor) for tensor in tensors]

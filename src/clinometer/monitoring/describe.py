"""The list of tensors that a watch writes down: where each sits in the model, and when it is first used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from clinometer.monitoring.roster import Watched
from clinometer.torch_internals.nodes import order_of

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.)")


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
    watched: Iterable[Watched], groups: Mapping[int, int], positions: Mapping[int, int]
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
    losses: Iterable[Tensor], watched: Sequence[Watched], stand_ins: Mapping[int, int] | None = None
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

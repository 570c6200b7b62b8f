"""Parameters that are different tensors over the same memory: an optimizer that holds both moves it twice.

Made by `head.weight.data = embed.weight.data`, which shares the numbers and not the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clinometer.gradients.sandbox.tensors import dense_parts
from clinometer.torch_internals.tensors import memory_of

_COMPARED = 1 << 24
"""Entries of a storage that are compared one by one where spans overlap; a larger one is taken as it is."""


def pairs_that_overlap(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Pairs of names whose tensors have at least one number in memory in common."""
    spans: dict[int, list[tuple[int, int, str, Tensor]]] = {}
    for name, tensor in tensors.items():
        for part in dense_parts(tensor.detach()):
            if part.numel():
                start = int(part.storage_offset()) * part.element_size()
                reach = sum((n - 1) * stride for n, stride in zip(part.shape, part.stride(), strict=True))
                end = start + (int(reach) + 1) * part.element_size()
                spans.setdefault(memory_of(part.untyped_storage()), []).append((start, end, name, part))
    found: dict[tuple[str, str], None] = {}
    for members in spans.values():
        if len(members) < 2:
            continue
        members.sort(key=lambda member: member[:2])
        reaching: list[tuple[int, int, str, Tensor]] = []
        for member in members:
            reaching = [other for other in reaching if other[1] > member[0]]
            for other in reaching:
                if other[2] != member[2] and _share(other[3], member[3]):
                    found[other[2], member[2]] = None
            reaching.append(member)
    return [(a, b) if list(tensors).index(a) < list(tensors).index(b) else (b, a) for a, b in found]


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage, whose spans overlap, have an entry in common."""
    if one.is_contiguous() and other.is_contiguous():
        return True
    size = one.untyped_storage().nbytes() // one.element_size()
    if one.dtype != other.dtype or size > _COMPARED:
        return True
    taken = torch.zeros(size, dtype=torch.bool)
    taken.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(taken.as_strided(other.shape, other.stride(), other.storage_offset()).any())

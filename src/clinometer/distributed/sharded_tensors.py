"""Tensors that several processes hold in parts: which part is here, and whether it counts in a sum.

A DTensor (FSDP2, tensor parallel) has a part here and the rest on other ranks: `p.grad.norm().item()` sees
the part. A sum over the ranks' parts (reduce.py) is exact if each entry counts once: along a mesh dimension
where the tensor is replicated, only the first rank counts.

Nothing here imports torch.distributed before a DTensor was seen.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clinometer.torch_internals.tensors import version_of

_WHOLE = (Tensor, torch.nn.Parameter)


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor: one part of it in this process, the rest in others."""
    if type(tensor) in _WHOLE:  # most are, and a look for an attribute that is not there is slow
        return False
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def is_distributed() -> bool:
    """Whether this is one of several processes."""
    if "torch.distributed" not in sys.modules or not torch.distributed.is_available():
        return False
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def rank() -> int:
    """This process's number, 0 where there are not several."""
    return torch.distributed.get_rank() if is_distributed() else 0


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, the same memory; any other tensor as it is.

    Of a partial one, whose value is the sum over ranks, that sum: a copy, and a collective (all ranks call).
    """
    # Most tensors are whole, and to enter no_grad takes ten times as long as to see it.
    return _part(tensor) if is_sharded(tensor) else tensor


@torch.no_grad()
def _part(distributed: Any) -> Tensor:
    if any(placement.is_partial() for placement in distributed.placements):
        from torch.distributed.tensor import Replicate

        whole = [Replicate() if p.is_partial() else p for p in distributed.placements]
        distributed = distributed.redistribute(placements=whole)
    part = distributed.to_local()
    return part.wait() if hasattr(part, "trigger_wait") else part  # its collective may be under way


def version(tensor: Tensor) -> int:
    """A number that changes when the tensor is written in place; FSDP writes to a DTensor's part."""
    if not is_sharded(tensor):
        return version_of(tensor)
    distributed: Any = tensor
    with torch.no_grad():
        return version_of(tensor) + version_of(distributed.to_local())


def counts_here(tensor: Tensor) -> bool:
    """Whether this rank's part counts in a sum: it is the first along each replicated dimension."""
    distributed: Any = tensor
    place = distributed.device_mesh.get_coordinate()
    if place is None:
        return False
    pairs = zip(place, distributed.placements, strict=True)
    return all(at == 0 or _splits(placement) for at, placement in pairs)


def _splits(placement: Any) -> bool:
    return placement.is_shard() or hasattr(placement, "split_factor")


def place_here(tensor: Tensor, index: Sequence[int]) -> tuple[int, ...] | None:
    """Where entry `index` of a DTensor stands in this rank's part; None if another rank has it."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    distributed: Any = tensor
    found = []
    for dim, (wanted, size) in enumerate(zip(index, tensor.shape, strict=True)):
        placements: list[Any] = []
        for placement in distributed.placements:
            if not _splits(placement) or placement.dim != dim:
                placements.append(Replicate())
            elif hasattr(placement, "split_factor"):  # sharded once more by another mesh dimension
                placements.append(type(placement)(0, split_factor=placement.split_factor))
            else:
                placements.append(Shard(0))
        # Numbered and spread in the same way, without communication.
        numbers = distribute_tensor(
            torch.arange(size), distributed.device_mesh, placements, src_data_rank=None
        ).to_local()
        places = (numbers == wanted).nonzero().flatten().tolist()
        if not places:
            return None
        found.append(places[0])
    return tuple(found)

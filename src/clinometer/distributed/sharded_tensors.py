"""Tensors that several processes hold in parts, and the sums and maxima of all of them.

A DTensor (FSDP2, tensor parallel) has a part here and the rest on other ranks: `p.grad.norm().item()` sees
the part. What is added up over the ranks' parts is exact if each entry counts once: along a mesh dimension
where the tensor is replicated, only the first rank counts. Everything that is to be added or compared travels
in one vector, so that a step costs one reduction for each kind, however many tensors there are.

Nothing here imports torch.distributed before a DTensor was seen.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
    """Another number after anybody wrote to the tensor in place; FSDP writes to a DTensor's part."""
    if not is_sharded(tensor):
        return tensor._version
    distributed: Any = tensor
    with torch.no_grad():
        return tensor._version + distributed.to_local()._version


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
        # Numbered and spread in the same way, without a word to the others.
        numbers = distribute_tensor(
            torch.arange(size), distributed.device_mesh, placements, src_data_rank=None
        ).to_local()
        places = (numbers == wanted).nonzero().flatten().tolist()
        if not places:
            return None
        found.append(places[0])
    return tuple(found)


class Together:
    """The ranks that hold `tensors`, and one reduction for whatever is measured of them.

    `tensors`: the same, in the same order, on every rank. What is no DTensor (or None, for numbers that
    belong to no tensor) is a copy on each rank; the first's counts. Without a DTensor nothing is exchanged.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        by_ranks: dict[tuple[int, ...], list[int]] = {}
        meshes: dict[tuple[int, ...], Any] = {}
        for index, tensor in enumerate(tensors):
            if tensor is not None and is_sharded(tensor):
                mesh: Any = tensor.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
                ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
                by_ranks.setdefault(ranks, []).append(index)
                # Of several meshes over the same ranks, the flattest: fewer reductions.
                if ranks not in meshes or mesh.ndim < meshes[ranks].ndim:
                    meshes[ranks] = mesh
        self.tensors = len(tensors)
        self.ranks: tuple[int, ...] = tuple(sorted({rank for ranks in by_ranks for rank in ranks}))
        """All ranks that hold a part of some tensor; none if nothing is sharded."""
        self._rounds: list[tuple[list[int] | None, list[Any], torch.device]] = []
        self._counts = [t is None or not is_sharded(t) or counts_here(t) for t in tensors]
        self._once = list(self._counts)
        if not by_ranks:
            return
        widest = max(by_ranks, key=len)
        copies = [i for i, tensor in enumerate(tensors) if tensor is None or not is_sharded(tensor)]
        by_ranks[widest] = sorted([*by_ranks[widest], *copies])
        for index in copies:
            self._counts[index] = widest[0] == rank()
        # Over all ranks at once, a tensor spread over some of them has copies on others: the first's count.
        for ranks, indices in by_ranks.items():
            for index in indices:
                self._once[index] = self._counts[index] and self.ranks[0] in ranks
        for ranks, indices in by_ranks.items():
            everything = None if len(by_ranks) == 1 else indices
            device = torch.device(meshes[ranks].device_type)
            self._rounds.append((everything, _groups(meshes[ranks], ranks), device))

    @property
    def alone(self) -> bool:
        """Whether this is the only rank."""
        return not self._rounds

    @property
    def counts(self) -> list[bool]:
        """For each tensor whether its part here counts in a sum."""
        return list(self._counts)

    @property
    def counts_once(self) -> list[bool]:
        """The same for one sum over all of `ranks` at once."""
        return list(self._once)

    def sums(self, values: Tensor) -> Tensor:
        """Sums over the ranks of `values` [number of tensors, …], float64; each entry counted once."""
        if self.alone:
            return values
        counts = torch.tensor(self._counts, device=values.device)
        counts = counts.view(-1, *[1] * (values.ndim - 1))
        return self._reduced(torch.where(counts, values, 0.0), "SUM")

    def maxima(self, values: Tensor) -> Tensor:
        """The largest over the ranks of `values` [number of tensors, …]; NaN counts as infinity."""
        if self.alone:
            return values
        # A reduction of NaN is not the same on every backend.
        return self._reduced(values.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf), "MAX")

    def _reduced(self, values: Tensor, kind: str) -> Tensor:
        import torch.distributed as dist

        found = values.clone()
        for indices, groups, device in self._rounds:
            mine = (values if indices is None else values[indices]).to(device).contiguous()
            mine = mine.clone() if mine.data_ptr() == values.data_ptr() else mine
            for group in groups:
                dist.all_reduce(mine, getattr(dist.ReduceOp, kind), group=group)
            if indices is None:
                return mine.to(values.device)
            found[indices] = mine.to(values.device)
        return found


def _groups(mesh: Any, ranks: tuple[int, ...]) -> list[Any]:
    """One group with exactly these ranks if there is one, else those of the mesh's dimensions, one by one."""
    import torch.distributed as dist

    if ranks == tuple(range(dist.get_world_size())):
        return [dist.group.WORLD]
    return list(mesh.get_all_groups())

"""One reduction over ranks, and the form in which numbers travel in it.

Layout. Numbers travel in float64 vectors, one of sums and one of maxima, so that one exchange costs two
collectives, however many numbers it has.

    sums     each number counts once: of a copy that several ranks hold, all but the first rank add 0
    maxima   sizes (≥ 0), flags (0 or 1); x beside −x where ranks must agree on x: max(x) = −max(−x)

Encodings. A reduction of NaN differs from backend to backend, so no NaN travels among maxima:

    no value                        ABSENT, below every size
    NaN counts as infinity          nan_as_infinity
    NaN differs from infinity       encode_size, decode_size

Groups. A process group that holds exactly the ranks, or the groups of a mesh's dimensions, one after the
other: sums and maxima over all dimensions are those over all ranks. None is the group of all ranks.
Device. nccl reduces on a GPU and gloo on the host, so a vector is copied to the group's device and back.

Nothing here imports torch.distributed before a reduction or a DTensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from clinometer.distributed.sharded_tensors import counts_here, is_sharded, rank

ABSENT = -1.0
_NAN, _INFINITY = 1e300, 1e299

Operation = Literal["sum", "max"]


def all_reduce(vector: Tensor, operation: Operation, group: Any = None, *, wait: bool = True) -> Any:
    """Reduce `vector` in place over a group; without `wait`, returns the work under way."""
    import torch.distributed as dist

    kind = dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX
    return dist.all_reduce(vector, kind, group=group, async_op=not wait)


def reduce_over(values: Tensor, operation: Operation, groups: Iterable[Any], device: torch.device) -> Tensor:
    """`values` reduced over each group in turn, on their own device; `values` stay as they are."""
    vector = values.to(device).contiguous()
    vector = vector.clone() if vector.data_ptr() == values.data_ptr() else vector
    for group in groups:
        all_reduce(vector, operation, group)
    return vector.to(values.device)


def nan_as_infinity(values: Tensor) -> Tensor:
    """`values` for a maximum: NaN becomes +inf."""
    return values.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)


def encode_size(size: float | None) -> float:
    """A size, NaN or None as a number for a maximum: None < every size < inf < NaN."""
    return ABSENT if size is None else _NAN if math.isnan(size) else min(size, _INFINITY)


def decode_size(value: float) -> float | None:
    """The size that `encode_size` encoded."""
    if value == ABSENT:
        return None
    return math.nan if value == _NAN else math.inf if value == _INFINITY else value


class ShardReduction:
    """The ranks that hold `tensors`, and one reduction for numbers that are measured of them.

    `tensors`: the same, in the same order, on every rank. A tensor that is not a DTensor (or None, for
    numbers that belong to no tensor) is a copy on each rank; the first rank's counts. Without a DTensor
    nothing is exchanged.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        by_ranks: dict[tuple[int, ...], list[int]] = {}
        meshes: dict[tuple[int, ...], Any] = {}
        for index, tensor in enumerate(tensors):
            if tensor is not None and is_sharded(tensor):
                mesh: Any = tensor.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
                ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
                by_ranks.setdefault(ranks, []).append(index)
                # Of several meshes over the same ranks, the one with the fewest dimensions: fewer reductions.
                if ranks not in meshes or mesh.ndim < meshes[ranks].ndim:
                    meshes[ranks] = mesh
        self.tensors = len(tensors)
        self.ranks: tuple[int, ...] = tuple(sorted({rank for ranks in by_ranks for rank in ranks}))
        """All ranks that hold a part of some tensor; empty if nothing is sharded."""
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
        """Whether no other rank holds a part of these tensors."""
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
        return self._reduced(torch.where(counts, values, 0.0), "sum")

    def maxima(self, values: Tensor) -> Tensor:
        """The largest over the ranks of `values` [number of tensors, …]; NaN counts as infinity."""
        return values if self.alone else self._reduced(nan_as_infinity(values), "max")

    def _reduced(self, values: Tensor, operation: Operation) -> Tensor:
        found = values.clone()
        for indices, groups, device in self._rounds:
            if indices is None:
                return reduce_over(values, operation, groups, device)
            found[indices] = reduce_over(values[indices], operation, groups, device)
        return found


def _groups(mesh: Any, ranks: tuple[int, ...]) -> list[Any]:
    """The group with exactly these ranks if there is one, else those of the mesh's dimensions."""
    import torch.distributed as dist

    if ranks == tuple(range(dist.get_world_size())):
        return [dist.group.WORLD]
    return list(mesh.get_all_groups())

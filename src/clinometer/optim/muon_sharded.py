"""Matrices that several ranks hold by rows, each made whole on one rank, worked on, and sent back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clinometer.distributed.sharded_tensors import is_sharded


def by_rows(parameter: Tensor) -> Any:
    """What matrices that travel together share: (shape, mesh, dtype); None if it is not held by rows."""
    if not is_sharded(parameter):
        return None
    distributed: Any = parameter
    placements = distributed.placements
    if len(placements) != 1 or type(placements[0]).__name__ != "Shard" or placements[0].dim != 0:
        return None
    return parameter.shape, distributed.device_mesh, parameter.dtype


def each_on_one_rank(
    parts: list[Tensor], shape: tuple[int, int], mesh: Any, work: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """`work` of each whole matrix, in this rank's rows: rank j gathers matrix j and returns its result.

    `parts`: this rank's rows of at most W matrices of that whole shape, over a mesh of W ranks. They travel
    in bfloat16, in which `work` computes. Two exchanges; every rank calls.
    """
    rows, columns = shape
    size, rank = mesh.size(), mesh.get_local_rank()
    each = -(-rows // size)  # torch.chunk's rule, which is FSDP2's
    held = [max(0, min(each, rows - r * each)) * columns for r in range(size)]
    mine = rank < len(parts)
    to_owner = [held[rank]] * len(parts) + [0] * (size - len(parts))
    from_all = held if mine else [0] * size
    sent = torch.cat([part.to(torch.bfloat16).flatten() for part in parts])
    gathered = _exchange(sent, to_owner, from_all, mesh)
    result = work(gathered.view(rows, columns)).contiguous().flatten() if mine else gathered
    returned = _exchange(result, from_all, to_owner, mesh)
    return [piece.view(-1, columns) for piece in returned.split(held[rank])] if held[rank] else list(parts)


def _exchange(sent: Tensor, send: list[int], receive: list[int], mesh: Any) -> Tensor:
    """Rank i's piece j goes to rank j. As bytes: not every backend exchanges bfloat16."""
    received = torch.empty(sum(receive), dtype=sent.dtype, device=sent.device)
    width = sent.element_size()
    torch.distributed.all_to_all_single(
        received.view(torch.uint8),
        sent.contiguous().view(torch.uint8),
        [width * count for count in receive],
        [width * count for count in send],
        group=mesh.get_group(),
    )
    return received

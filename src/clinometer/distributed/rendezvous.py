"""The ranks that watch one sharded training together: who they are, and that each of them really watches.

Under FSDP2 or tensor parallelism a watch is made on every rank, as the optimizer is. That they all came, and
mean the same, is seen over the process group's store before anything waits for them. What they exchange at
each step goes over a gloo group of the watch's own: no order of the training's collectives can be disturbed,
a GPU waits for nothing, and what never comes is given up after a while.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clinometer.distributed.sharded_tensors import Together, is_distributed, is_sharded, rank
from clinometer.messages import InputError, say

PATIENCE = 300.0
"""Seconds that a rank waits for the others before it reports them and continues without the watch."""
_SPEAK = 15.0
_LOOK_AROUND = 0.1
_made: dict[tuple[int, ...], int] = {}
"""How many meetings of the same ranks there were: the ranks make their watches in the same order."""


class Meeting:
    """The ranks that hold parts of the watched tensors, in agreement about what is watched."""

    def __init__(self, tensors: Sequence[Tensor | None], told: dict[str, Any]) -> None:
        import torch.distributed as dist

        self.together = Together(tensors)
        self.ranks = self.together.ranks
        self.place = self.ranks.index(rank()) if rank() in self.ranks else 0
        number = _made[self.ranks] = _made.get(self.ranks, 0) + 1
        self._key = f"clinometer/watch/{'-'.join(map(str, _short(self.ranks)))}/{number}"
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._generation = 0
        self._confirm(told)
        self.group: Any = dist.new_group(
            list(self.ranks),
            timeout=timedelta(seconds=PATIENCE),
            backend="gloo",
            use_local_synchronization=True,
        )

    @property
    def writes(self) -> bool:
        """Whether this rank tells the sinks."""
        return self.place == 0

    def grown(self, tensors: Sequence[Tensor | None], told: dict[str, Any]) -> None:
        """There are more tensors: on every rank the same, or InputError."""
        self.together = Together(tensors)
        self._confirm(told)

    def left(self, reason: str) -> None:
        """This rank watches no longer; the others need not wait for it."""
        self._store.set(f"{self._key}/left/{rank()}", reason)

    def missing(self) -> InputError | None:
        """What to say of ranks that no longer watch."""
        for other in self.ranks:
            key = f"{self._key}/left/{other}"
            if other != rank() and self._store.check([key]):
                return InputError("watch.ranks.left", rank=other, reason=self._store.get(key).decode())
        return None

    def wait_for(self, work: Any, begun: float) -> None:
        """Until an exchange is there. Raises InputError if a rank left, or after `PATIENCE` seconds."""
        pause = 2e-5
        while not work.is_completed():
            passed = time.monotonic() - begun
            if passed > _LOOK_AROUND and (left := self.missing()) is not None:
                raise left
            if passed > PATIENCE:
                raise InputError("watch.ranks.silent", seconds=int(passed))
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        work.wait()

    def _confirm(self, told: dict[str, Any]) -> None:
        """Everybody came and says the same; else InputError on every rank that waits."""
        self._generation += 1
        base = f"{self._key}/{self._generation}"
        self._store.set(f"{base}/{rank()}", json.dumps(told, sort_keys=True))
        absent = [other for other in self.ranks if other != rank()]
        begun, spoken = time.monotonic(), False
        while absent := [other for other in absent if not self._store.check([f"{base}/{other}"])]:
            passed = time.monotonic() - begun
            names = ", ".join(map(str, absent[:8]))
            if passed > PATIENCE:
                self._store.delete_key(f"{base}/{rank()}")  # the other ranks must not wait for this one
                _made[self.ranks] -= 1
                raise InputError("watch.ranks.absent", ranks=names, seconds=int(passed))
            if passed > _SPEAK and not spoken:
                spoken = True
                print(say("watch.ranks.waiting", ranks=names), file=sys.stderr)
            time.sleep(min(0.001 + passed / 10, 0.2))
        for other in self.ranks:
            theirs = json.loads(self._store.get(f"{base}/{other}"))
            for key, mine in told.items():
                if theirs.get(key) != mine:
                    raise InputError(
                        "watch.ranks.differ", rank=other, what=key, theirs=theirs.get(key), mine=mine
                    )


def told_of(watched: Sequence[Any], every: int, optimizers: Sequence[str]) -> dict[str, Any]:
    """What must be the same on all ranks; the long list of tensors as its length and a digest."""
    listed = [[one.name, list(one.shape), one.dtype] for one in watched]
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
    return {"every": every, "optimizers": list(optimizers), "tensors": len(listed), "names": digest}


def any_sharded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether some of the tensors are in parts on several ranks."""
    return is_distributed() and any(t is not None and is_sharded(t) for t in tensors)


def replicas(model: Any) -> list[DistributedDataParallel]:
    """DDP's wrappers in a model, of several processes."""
    if not isinstance(model, nn.Module) or not is_distributed():
        return []
    return [part for part in model.modules() if isinstance(part, DistributedDataParallel)]


def _short(ranks: tuple[int, ...]) -> tuple[int, ...]:
    return (ranks[0], len(ranks), ranks[-1])

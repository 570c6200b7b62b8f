"""The ranks that watch one sharded training agree on the tensors, and notice when a rank stops watching.

Under FSDP2 or tensor parallelism a watch is made on every rank, as the optimizer is. Over the process group's
store the ranks see that all of them came and watch the same, before anything waits for them. What they
exchange at each step goes over a gloo group of the watch's own: the order of the training's collectives does
not change, a GPU waits for nothing, and a rank that does not answer is given up after `EXCHANGE_PATIENCE`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clinometer.distributed.board import Board
from clinometer.distributed.reduce import ShardReduction
from clinometer.distributed.sharded_tensors import is_distributed, is_sharded, rank
from clinometer.messages import InputError, say
from clinometer.torch_internals.modules import default_store

EXCHANGE_PATIENCE = 300.0
"""Seconds that a rank waits for the others before it says so and goes on without the watch."""
_SAY_SO = 15.0
"""Seconds after which a rank that waits prints for whom."""
_ASK_WHO_LEFT = 0.1
"""Seconds after which a rank that waits for an exchange looks whether another rank has left."""
_made: dict[tuple[int, ...], int] = {}
"""How many watches the same ranks have made: they make them in the same order."""


class WatchRanks:
    """The ranks that hold parts of the watched tensors, in agreement on what is watched."""

    def __init__(self, tensors: Sequence[Tensor | None], signature: dict[str, Any]) -> None:
        """Raises InputError if a rank does not come, or if its `signature` differs."""
        import torch.distributed as dist

        self.reduction = ShardReduction(tensors)
        self.ranks = self.reduction.ranks
        self.place = self.ranks.index(rank()) if rank() in self.ranks else 0
        number = _made[self.ranks] = _made.get(self.ranks, 0) + 1
        store: Any = default_store()
        if store is None:
            raise InputError("torch.store", torch=torch.__version__)
        name = f"{self.ranks[0]}-{len(self.ranks)}-{self.ranks[-1]}"
        self._board = Board(store, f"clinometer/watch/{name}/{number}")
        self._generation = 0
        self._agree(signature)
        self.group: Any = dist.new_group(
            list(self.ranks),
            timeout=timedelta(seconds=EXCHANGE_PATIENCE),
            backend="gloo",
            use_local_synchronization=True,
        )

    @property
    def writes(self) -> bool:
        """Whether this rank writes to the sinks."""
        return self.place == 0

    def grow(self, tensors: Sequence[Tensor | None], signature: dict[str, Any]) -> None:
        """Agree on more tensors. Raises InputError as the constructor does."""
        self.reduction = ShardReduction(tensors)
        self._agree(signature)

    def leave(self, reason: str) -> None:
        """This rank watches no longer; the others do not wait for it."""
        self._board.post(f"left/{rank()}", reason)

    def error_of_absent(self) -> InputError | None:
        """The error to raise if another rank has left."""
        for other in self.ranks:
            if other != rank() and (reason := self._board.read(f"left/{other}")) is not None:
                return InputError("watch.ranks.left", rank=other, reason=reason)
        return None

    def wait_for(self, work: Any, begun: float) -> None:
        """Wait for an exchange. Raises InputError if a rank left, or the patience after `begun` is over."""
        pause = 2e-5
        while not work.is_completed():
            passed = time.monotonic() - begun
            if passed > _ASK_WHO_LEFT and (left := self.error_of_absent()) is not None:
                raise left
            if passed > EXCHANGE_PATIENCE:
                raise InputError("watch.ranks.silent", seconds=int(passed))
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        work.wait()

    def _agree(self, signature: dict[str, Any]) -> None:
        """Every rank posts its signature and reads the others'. Raises InputError on all that wait."""
        self._generation += 1
        names = {other: f"{self._generation}/{other}" for other in self.ranks}
        self._board.post(f"{self._generation}/{rank()}", json.dumps(signature, sort_keys=True))
        everyone, begun = list(names.values()), time.monotonic()
        complete = self._board.wait(everyone, min(_SAY_SO, EXCHANGE_PATIENCE))
        if not complete and EXCHANGE_PATIENCE > _SAY_SO:
            print(say("watch.ranks.waiting", ranks=self._absent(names)), file=sys.stderr)
            complete = self._board.wait(everyone, EXCHANGE_PATIENCE - _SAY_SO)
        if not complete:
            absent = self._absent(names)
            self._board.remove(f"{self._generation}/{rank()}")  # a late rank must not count on this one
            _made[self.ranks] -= 1
            raise InputError("watch.ranks.absent", ranks=absent, seconds=int(time.monotonic() - begun))
        for other, name in names.items():
            theirs = json.loads(self._board.read(name) or "{}")
            for key, mine in signature.items():
                if theirs.get(key) != mine:
                    raise InputError(
                        "watch.ranks.differ", rank=other, what=key, theirs=theirs.get(key), mine=mine
                    )

    def _absent(self, names: dict[int, str]) -> str:
        missing = set(self._board.absent(list(names.values())))
        return ", ".join([str(other) for other, name in names.items() if name in missing][:8])


def watch_signature(watched: Sequence[Any], every: int, optimizers: Sequence[str]) -> dict[str, Any]:
    """What must be the same on all ranks; the long list of tensors as its length and a digest."""
    listed = [[one.name, list(one.shape), one.dtype] for one in watched]
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
    return {"every": every, "optimizers": list(optimizers), "tensors": len(listed), "names": digest}


def any_sharded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether some of the tensors are in parts on several ranks."""
    return is_distributed() and any(t is not None and is_sharded(t) for t in tensors)


def replicas(model: Any) -> list[DistributedDataParallel]:
    """The DDP wrappers in a model, if there are several processes."""
    if not isinstance(model, nn.Module) or not is_distributed():
        return []
    return [part for part in model.modules() if isinstance(part, DistributedDataParallel)]

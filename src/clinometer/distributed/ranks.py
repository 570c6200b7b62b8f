"""Several processes that train one model: what they hold together, and what they must agree on.

A rank sees its own part of the batch (DDP) and its own part of each tensor as well (FSDP2, tensor parallel).
What is said of a tensor is said of all of it, and of all ranks: so they exchange sizes, and no rank may run
a forward alone, for in it the others would be waited for.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clinometer.distributed.sharded_tensors import is_distributed, is_sharded
from clinometer.messages import InputError

_NOTHING = -1.0
_NAN = 1e300
"""NaN and infinity as they travel: a reduction of NaN is not the same on every backend."""


class Ranks:
    """The processes that hold `tensors` together, and the wrappers that make them wait for each other."""

    def __init__(self, tensors: Mapping[str, Tensor], modules: Iterable[nn.Module] = ()) -> None:
        self._tensors = dict(tensors)
        self._modules = list(dict.fromkeys(part for module in modules for part in module.modules()))
        self._replicas = [m for m in self._modules if isinstance(m, DistributedDataParallel)]
        self.sharded = [name for name, tensor in self._tensors.items() if is_sharded(tensor)]
        self._groups = self._all_groups()

    @property
    def alone(self) -> bool:
        """Whether no other rank takes part."""
        return not self._groups

    @property
    def unseen(self) -> bool:
        """Whether there are other processes, and nothing tells what they share with this one."""
        return self.alone and is_distributed()

    @property
    def replicated(self) -> bool:
        """Whether DDP averages the gradients of several ranks."""
        return bool(self._replicas) and not self.alone

    @property
    def place(self) -> tuple[int, int]:
        """This process and how many there are."""
        import torch.distributed as dist

        return (0, 1) if self.alone else (dist.get_rank(), dist.get_world_size())

    def refuse_sharded(self, key: str, names: Collection[str] | None = None) -> None:
        """Raises InputError `key` if one of `names` (default: any) is in parts."""
        for name in self.sharded:
            if names is None or name in names:
                raise InputError(key, name=name, type=type(self._tensors[name]).__name__)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, DDP neither averages gradients nor broadcasts buffers: each rank runs alone."""
        with ExitStack() as stack:
            for replica in self._replicas:
                stack.enter_context(replica.no_sync())
                stack.callback(setattr, replica, "require_forward_param_sync", _param_sync(replica))
                replica.require_forward_param_sync = False
            yield

    def stand_ins(self) -> dict[int, Tensor]:
        """id of the whole parameter that FSDP computes with → the shard it is gathered from.

        A collective the first time: FSDP makes them when it first gathers.
        """
        found: dict[int, Tensor] = {}
        mine = {id(tensor) for tensor in self._tensors.values()}
        for module in self._modules:
            groups = fsdp_groups(module)
            parts = [part for group in groups for part in group.fsdp_params]
            if any(not hasattr(part, "_unsharded_param") for part in parts):
                module.unshard()  # pyright: ignore[reportCallIssue]
                module.reshard()  # pyright: ignore[reportCallIssue]
            for part in parts:
                if id(part.sharded_param) in mine:
                    found[id(part._unsharded_param)] = part.sharded_param
        return found

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self._most([float(flag)])[0])

    def named_by_any(self, names: Collection[str]) -> set[str]:
        """The tensors that any rank names."""
        flags = self._most([float(name in names) for name in self._tensors])
        return {name for name, flag in zip(self._tensors, flags, strict=True) if flag}

    def largest(self, sizes: Mapping[str, float | None]) -> dict[str, float | None]:
        """The largest absolute value of each over all ranks; None where no rank has any."""
        found = self._most([_encoded(sizes[name]) for name in self._tensors])
        return {name: _decoded(value) for name, value in zip(self._tensors, found, strict=True)}

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean over ranks of numbers such as losses."""
        total = self._reduced([*values, 1.0], "SUM")
        return [value / total[-1] for value in total[:-1]]

    def average_gradients(self) -> None:
        """`.grad` of plain tensors becomes what DDP would make of it: the mean over ranks."""
        if not self._replicas or self.alone:
            return
        import torch.distributed as dist

        group = self._replicas[0].process_group
        count = dist.get_world_size(group)
        theirs = {id(p) for replica in self._replicas for p in replica.parameters()}
        mine = {n: t for n, t in self._tensors.items() if t.is_leaf and not is_sharded(t) and id(t) in theirs}
        some = self.named_by_any({name for name, tensor in mine.items() if tensor.grad is not None})
        for name, tensor in mine.items():
            if name in some:
                grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                grad = grad.to_dense() if grad.layout is not torch.strided else grad.contiguous()
                dist.all_reduce(grad, group=group)
                tensor.grad = grad.div_(count)

    def _most(self, values: list[float]) -> list[float]:
        return self._reduced(values, "MAX")

    def _reduced(self, values: list[float], kind: str) -> list[float]:
        if self.alone:
            return values
        import torch.distributed as dist

        groups = self._groups if kind == "MAX" else self._groups[:1]
        for group, device in groups:
            kept = torch.tensor(values, dtype=torch.float64, device=device)
            dist.all_reduce(kept, getattr(dist.ReduceOp, kind), group=group)
            values = kept.tolist()
        return values

    def _all_groups(self) -> list[tuple[Any, torch.device]]:
        """Every group of processes that a tensor or a wrapper belongs to, in an order all ranks share."""
        if not is_distributed():
            return []
        found: dict[Any, torch.device] = {}
        refuse_flattened(self._modules)
        for replica in self._replicas:
            found.setdefault(replica.process_group, next(replica.parameters()).device)
        for name in self.sharded:
            tensor: Any = self._tensors[name]
            for group in tensor.device_mesh.get_all_groups():
                found.setdefault(group, torch.device(tensor.device_mesh.device_type))
        return list(found.items())


def refuse_flattened(modules: Iterable[nn.Module]) -> None:
    """Raises InputError for FSDP's first version, which hands out views of one flat parameter."""
    if not is_distributed():
        return
    for module in modules:
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise InputError("gradients.ranks.fsdp1")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one a collective, which every rank must call."""
    if not is_sharded(tensor):
        return tensor
    distributed: Any = tensor
    return distributed.full_tensor()


def shard_again(modules: Iterable[nn.Module]) -> None:
    """FSDP's modules hold shards again, as they do between steps; a forward alone leaves some whole."""
    for module in modules:
        for group in fsdp_groups(module):
            if not group.is_sharded:
                group._to_sharded()


def fsdp_groups(module: nn.Module) -> list[Any]:
    """The groups of parameters that FSDP2 gathers for this module itself."""
    if not hasattr(module, "_get_fsdp_state") or "torch.distributed.fsdp" not in sys.modules:
        return []
    state: Any = module._get_fsdp_state()  # pyright: ignore[reportCallIssue]
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before torch 2.12 there was one
        one = getattr(state, "_fsdp_param_group", None)
        groups = [] if one is None else [one]
    return list(groups)


def _param_sync(replica: DistributedDataParallel) -> bool:
    return bool(replica.require_forward_param_sync)


def _encoded(size: float | None) -> float:
    return _NOTHING if size is None else _NAN if math.isnan(size) else min(size, _NAN / 10)


def _decoded(value: float) -> float | None:
    if value == _NOTHING:
        return None
    return math.nan if value == _NAN else math.inf if value == _NAN / 10 else value

"""Several processes that train one model: which tensors they share, and the numbers they must agree on.

A rank has its own part of the batch (DDP), and its own part of each tensor as well (FSDP2, tensor parallel).
A finding holds for the full tensor on all ranks, so the ranks exchange sizes. No rank may run a forward
alone: it would wait for the others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clinometer.distributed.reduce import Operation, all_reduce, decode_size, encode_size, reduce_over
from clinometer.distributed.sharded_tensors import is_distributed, is_sharded
from clinometer.messages import InputError
from clinometer.torch_internals.modules import fsdp_groups, gathered, shard_group, was_gathered


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
        """Whether no other process shares these tensors."""
        return not self._groups

    @property
    def unseen(self) -> bool:
        """Whether there are other processes, and it is unknown what they share with this one."""
        return self.alone and is_distributed()

    @property
    def replicated(self) -> bool:
        """Whether DDP averages the gradients of several ranks."""
        return bool(self._replicas) and not self.alone

    @property
    def place(self) -> tuple[int, int]:
        """The rank of this process, and the number of processes."""
        import torch.distributed as dist

        return (0, 1) if self.alone else (dist.get_rank(), dist.get_world_size())

    def awaited(self, called: Collection[nn.Module]) -> set[str]:
        """The tensors of which DDP waits for a gradient at every backward, of the wrappers in `called`.

        None of a wrapper that looks for unused parameters itself, or knows the graph.
        """
        waiting = [
            replica
            for replica in self._replicas
            if replica in called and not (replica.find_unused_parameters or replica.static_graph)
        ]
        theirs = {
            id(parameter)
            for replica in waiting
            for name, parameter in replica.module.named_parameters()
            if parameter.requires_grad and name not in replica.parameters_to_ignore
        }
        return {name for name, tensor in self._tensors.items() if id(tensor) in theirs}

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
            if not all(map(was_gathered, parts)):
                module.unshard()  # pyright: ignore[reportCallIssue]
                module.reshard()  # pyright: ignore[reportCallIssue]
            for part in parts:
                if id(part.sharded_param) in mine:
                    found[id(gathered(part))] = part.sharded_param
        return found

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return bool(self._most([float(flag)])[0])

    def named_by_any(self, names: Collection[str]) -> set[str]:
        """The tensors that are in `names` on any rank."""
        flags = self._most([float(name in names) for name in self._tensors])
        return {name for name, flag in zip(self._tensors, flags, strict=True) if flag}

    def largest(self, sizes: Mapping[str, float | None]) -> dict[str, float | None]:
        """The largest absolute value of each over all ranks; None where no rank has any."""
        found = self._most([encode_size(sizes[name]) for name in self._tensors])
        return {name: decode_size(value) for name, value in zip(self._tensors, found, strict=True)}

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean over ranks of numbers such as losses."""
        total = self._reduced([*values, 1.0], "sum")
        return [value / total[-1] for value in total[:-1]]

    def average_gradients(self) -> None:
        """`.grad` of plain tensors becomes the mean over ranks, as DDP computes it."""
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
                all_reduce(grad, "sum", group)
                tensor.grad = grad.div_(count)

    def _most(self, values: list[float]) -> list[float]:
        return self._reduced(values, "max")

    def _reduced(self, values: list[float], operation: Operation) -> list[float]:
        if self.alone:
            return values
        vector = torch.tensor(values, dtype=torch.float64)
        # A sum over the first group alone: over several, a rank would count more than once.
        for group, device in self._groups if operation == "max" else self._groups[:1]:
            vector = reduce_over(vector, operation, [group], device)
        return vector.tolist()

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
    """The full tensor. Of a sharded tensor a collective: every rank must call it."""
    if not is_sharded(tensor):
        return tensor
    distributed: Any = tensor
    return distributed.full_tensor()


def shard_again(modules: Iterable[nn.Module]) -> None:
    """Shard FSDP's modules again, as between steps; a forward without a backward leaves some gathered."""
    for module in modules:
        for group in fsdp_groups(module):
            shard_group(group)


def _param_sync(replica: DistributedDataParallel) -> bool:
    return bool(replica.require_forward_param_sync)

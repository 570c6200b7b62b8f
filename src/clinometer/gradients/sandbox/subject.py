"""What is looked at: named tensors, from a module, a mapping, or pairs of names and tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from clinometer.distributed.ranks import shard_again
from clinometer.messages import InputError
from clinometer.torch_internals.modules import WRAPPERS, child_of, is_compiled


class UnknownName(InputError, KeyError):
    """Raised for a name that no tensor has; also a KeyError, as `result[name]` should raise."""

    def __init__(self, name: object, known: Iterable[str]) -> None:
        known = list(known)
        near = get_close_matches(str(name), known, n=1, cutoff=0.0) or ["?"]
        super().__init__("gradients.subject.unknown_name", name=name, count=len(known), near=near[0])


@dataclass(frozen=True, eq=False)
class Subject:
    """Named tensors in the order given; a tensor under several names stands once, under its first."""

    tensors: dict[str, Tensor]
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """First name → the other names of the same tensor; only tied tensors are in it."""
    canonical: dict[str, str] = field(default_factory=dict)
    """Any name a person may use (alias, or with a wrapper's prefix) → the name in `tensors`."""
    module: nn.Module | None = None
    """The module as given, wrappers included; None when names and tensors were given."""

    @classmethod
    def of(cls, params: Any) -> Subject:
        """The subject `params` means.

        Raises InputError for anything that is not a module, a mapping of names to tensors, pairs of
        names and tensors, or tensors; also when it is empty or a tensor has no values yet.
        """
        if isinstance(params, Subject):
            return params
        module = params if isinstance(params, nn.Module) else None
        if module is not None:
            shard_again(module.modules())  # what the optimizer holds, and where gradients come, is the shards
        tensors: dict[str, Tensor] = {}
        canonical: dict[str, str] = {}
        others: dict[str, list[str]] = {}
        first: dict[int, str] = {}
        given: dict[str, Tensor] = {}
        for raw, tensor in _pairs(params):
            if not isinstance(tensor, Tensor):
                raise InputError("gradients.subject.not_a_tensor", name=raw, type=_type(tensor))
            if given.setdefault(raw, tensor) is not tensor:
                raise InputError("gradients.subject.same_name", name=raw)
            if is_lazy(tensor):
                raise InputError("gradients.subject.lazy", name=raw)
            name = clean_name(raw, module)
            if name in canonical and tensors[canonical[name]] is not tensor:
                name = raw  # two names became one without their prefixes: keep them apart
            kept = first.setdefault(id(tensor), name)
            canonical[raw] = canonical[name] = kept
            if kept == name:
                tensors[name] = tensor
            elif name not in others.setdefault(kept, []):
                others[kept].append(name)
        if not tensors:
            if module is not None:
                raise InputError("gradients.subject.module_empty", type=_type(module))
            raise InputError("gradients.subject.empty", type=_type(params))
        return cls(tensors, {k: tuple(v) for k, v in others.items()}, canonical, module)

    @property
    def eager_module(self) -> nn.Module | None:
        """The module inside torch.compile's, DataParallel's and FSDP's wrappers."""
        module = self.module
        while module is not None and (inner := _inner_child(module)) is not None:
            module = child_of(module, inner)
        return module

    @property
    def compiled(self) -> bool:
        """Whether torch.compile wraps the module or any part of it."""
        return self.module is not None and any(is_compiled(m) for m in self.module.modules())

    @property
    def size(self) -> int:
        """How many numbers the tensors hold, tied ones counted once."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def name_of(self, name: str) -> str:
        """The name in `tensors` for any name a person may use; raises UnknownName."""
        found = name if name in self.tensors else self.canonical.get(name)
        if found is None:
            raise UnknownName(name, self.tensors)
        return found

    def module_paths(self) -> dict[nn.Module, str]:
        """Every module and its dotted path, without wrappers' prefixes; empty when none was given."""
        if self.module is None:
            return {}
        return {m: clean_name(path, self.module) for path, m in self.module.named_modules()}


def clean_name(raw: str, module: nn.Module | None = None) -> str:
    """A dotted name without the prefixes wrappers put in.

    DataParallel's "module." is an ordinary name too, so it goes only where `module` shows the wrapper.
    """
    parts: list[str] = []
    for part in raw.split("."):
        child = child_of(module, part)
        wrapper = part in WRAPPERS or (module is not None and part == _inner_child(module))
        if not wrapper:
            parts.append(part)
        module = child
    return ".".join(parts)


def _inner_child(module: nn.Module) -> str | None:
    for name in WRAPPERS:
        if child_of(module, name) is not None:
            return name
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    return None


def _pairs(params: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(params, nn.Module):
        return list(params.named_parameters(remove_duplicate=False))
    if isinstance(params, Tensor):
        raise InputError("gradients.subject.bare_tensor")
    if isinstance(params, Mapping):
        return [(str(name), tensor) for name, tensor in params.items()]
    if isinstance(params, str | bytes | Optimizer) or not isinstance(params, Iterable):
        raise InputError("gradients.subject.kind", type=_type(params))
    pairs: list[tuple[str, Any]] = []
    for position, item in enumerate(params):
        if isinstance(item, Tensor):
            pairs.append((str(position), item))
        elif isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str):
            pairs.append((item[0], item[1]))
        else:
            raise InputError("gradients.subject.item", position=position, type=_type(item))
    return pairs


def _type(value: Any) -> str:
    return type(value).__name__

"""Where tensors are kept: the variable, attribute or entry of a list by which the person's code reaches them.

A search from the model and from the names that the closure uses, through modules, objects, containers and
functions of the person's own; it runs no code of theirs (no property, no `__getattr__`).
"""

from __future__ import annotations

import functools
import inspect
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from clinometer.gradients.sandbox.code_origin import is_machinery

_MOST = 50_000
"""Values that are looked at: a list of a million numbers is no place to look for tensors."""
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_SCALARS = (int, float, complex, str, bytes, type(None))


@dataclass(frozen=True)
class Holder:
    """Where one tensor is kept."""

    tensor: Tensor
    name: str
    """As the person's code says it: "temperature", "criterion.centers", "kept[0]"."""
    owner: nn.Module | None
    """The module that has it, directly or in a list or an object; None for a variable."""
    root: nn.Module | None
    """The outermost module on the way to it."""
    registered: bool
    """Whether it is one of the parameters or buffers of its owner."""


@dataclass(frozen=True)
class _Found:
    """A value and the way to it."""

    value: Any
    name: str
    owner: nn.Module | None = None
    root: nn.Module | None = None
    registered: bool = False


def find_holders(
    model: nn.Module | None, closure: Any, others: Iterable[nn.Module] = ()
) -> dict[int, Holder]:
    """Returns id of a tensor → where it is kept, for all that can be reached; the shortest way counts.

    Names in `model` are its own ("blocks[0].weight"); `others` are modules that no name leads to.
    """
    seen: set[int] = set()
    found: dict[int, Holder] = {}
    if model is not None:
        _search([_Found(model, "")], seen, found)
    _search(_of_function(closure, ""), seen, found)
    _search((_Found(module, type(module).__name__) for module in others), seen, found)
    return found


def _search(first: Iterable[_Found], seen: set[int], found: dict[int, Holder]) -> None:
    queue = deque(first)
    while queue and len(seen) < _MOST:
        at = queue.popleft()
        if id(at.value) in seen or isinstance(at.value, _SCALARS):
            continue
        seen.add(id(at.value))
        if isinstance(at.value, Tensor):
            found[id(at.value)] = Holder(at.value, at.name or "?", at.owner, at.root, at.registered)
        else:
            queue.extend(_inside(at))


def _inside(at: _Found) -> Iterator[_Found]:
    value, name = at.value, at.name
    if isinstance(value, nn.Module):
        yield from _of_module(at)
    elif isinstance(value, list | tuple | deque | set | frozenset):
        for position, item in enumerate(value):
            yield _Found(item, f"{name}[{position}]", at.owner, at.root)
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str | int):
                yield _Found(item, f"{name}[{key!r}]", at.owner, at.root)
    elif inspect.isroutine(value) or isinstance(value, functools.partial):
        yield from _of_function(value, name)
    elif not isinstance(value, ModuleType) and not _is_foreign(value):
        for key, item in getattr(value, "__dict__", {}).items():
            yield _Found(item, _joined(name, key), at.owner, at.root)


def _of_module(at: _Found) -> Iterator[_Found]:
    module: nn.Module = at.value
    root = module if at.root is None else at.root
    own = (nn.Module.named_parameters(module, recurse=False), nn.Module.named_buffers(module, recurse=False))
    for key, item in (pair for pairs in own for pair in pairs):
        yield _Found(item, _joined(at.name, key), module, root, True)
    for key, item in nn.Module.named_children(module):
        yield _Found(item, _joined(at.name, key), module, root)
    for key, item in vars(module).items():
        if key not in _OF_EVERY_MODULE:
            yield _Found(item, _joined(at.name, key), module, root)


def _of_function(function: Any, name: str) -> Iterator[_Found]:
    """What a function names: enclosed and global variables, defaults, what it is bound to."""
    if isinstance(function, functools.partial):
        yield from _of_function(function.func, name)
        for position, item in enumerate((*function.args, *function.keywords.values())):
            yield _Found(item, f"{name or 'closure'}.args[{position}]")
        return
    if inspect.ismethod(function):
        owner = function.__self__
        yield _Found(owner, type(owner).__name__ if not isinstance(owner, type) else owner.__name__)
        function = function.__func__
    if not isinstance(function, FunctionType):
        if not inspect.isroutine(function) and callable(function):  # an object that can be called
            yield _Found(function, type(function).__name__)
        return
    if is_machinery(function.__code__.co_filename):
        return
    for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield _Found(cell.cell_contents, key)
        except ValueError:  # enclosed, not yet assigned
            continue
    for item in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield _Found(item, "default")
    names = _names(function.__code__)
    for key in names & function.__globals__.keys():
        item = function.__globals__[key]
        if isinstance(item, ModuleType):  # of a module, what is named of it
            if not is_machinery(getattr(item, "__file__", None) or "<frozen >"):
                for part in names & vars(item).keys():
                    yield _Found(vars(item)[part], f"{key}.{part}")
        else:
            yield _Found(item, key)


def _names(code: CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _is_foreign(value: Any) -> bool:
    """Whether a value is of a class of torch, the standard library or ours, and no mere namespace."""
    if isinstance(value, SimpleNamespace | Namespace):
        return False
    kind = value if isinstance(value, type) else type(value)
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    if file is None:
        return kind.__module__ not in ("__main__", "__mp_main__")
    return is_machinery(file)


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key

"""Is a module or parameter that was not used perhaps not meant to be used every time?

An accusation needs more than "this run did not use it": an expert that no token chose, a branch behind
an `if`, a layer dropped at random are all as they should be.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

from clinometer.gradients.diagnose.container_use import chooses_members
from clinometer.gradients.sandbox.code_origin import is_machinery
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.trace.cuts import each_bit
from clinometer.gradients.trace.forward_trace import Trace
from clinometer.torch_internals.modules import child_of

_NO_FORWARD = {
    "__init__",
    "__setstate__",
    "reset_parameters",
    "_reset_parameters",
    "_init_weights",
    "init_weights",
}
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.Sequential)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def may_be_skipped(name: str, subject: Subject, trace: Trace) -> str:
    """Why leaving `name` out may be meant.

    "choice" (one of several alternatives), "depth" (a value of the run says how much of a list is used),
    "branch" (code that was not taken mentions it), or "" for no reason.
    """
    module = subject.eager_module
    if module is None:
        return ""
    path = name.split(".")
    holders: list[tuple[nn.Module, str]] = []
    for part in path:
        holders.append((module, part))
        child = child_of(module, part)
        if child is None:
            break
        module = child
    for depth, (holder, part) in enumerate(holders):
        prefix = ".".join(path[: depth + 1])
        if _any_used(prefix, subject, trace):
            continue
        if isinstance(holder, _CONTAINERS) and _parallel(".".join(path[:depth]), subject, trace):
            return "choice"
        if isinstance(holder, _LISTS):
            return "depth" if _chosen(holder, holders[:depth], trace) else ""
        # The outermost part of the path of which nothing was used: does any method speak of it?
        return "branch" if _mentioned(holder, part) else ""
    # Others of its own module were used, but not this one.
    holder, part = holders[-1]
    return "branch" if _mentioned(holder, part) else ""


def _any_used(prefix: str, subject: Subject, trace: Trace) -> bool:
    return any(
        trace.bits[id(tensor)] in trace.first_use
        for name, tensor in subject.tensors.items()
        if name == prefix or name.startswith(prefix + ".")
    )


def _parallel(container: str, subject: Subject, trace: Trace) -> bool:
    """Whether the container's members are alternatives: none that was used feeds another."""
    members: dict[str, int] = {}
    used: dict[str, int] = {}
    for name, tensor in subject.tensors.items():
        if name.startswith(container + "."):
            member = name[len(container) + 1 :].partition(".")[0]
            bit = trace.bits[id(tensor)]
            members[member] = members.get(member, 0) | bit
            if bit in trace.first_use:
                used[member] = used.get(member, 0) | bit
    if not used:
        return False
    return not any(
        trace.fed_by(bit) & others
        for member, bits in used.items()
        for bit in each_bit(bits)
        for others in [sum(b for m, b in used.items() if m != member)]
    )


def _chosen(container: nn.Module, above: list[tuple[nn.Module, str]], trace: Trace) -> bool:
    """Whether code of the modules around a container, or of the closure, chooses members in each run."""
    if type(container) not in _LISTS:  # a list with a forward of its own
        return True
    named = [(holder, part) for holder, part in above if not isinstance(holder, _LISTS)]
    if not named:
        return False
    attribute = named[-1][1]
    functions = [function for holder, _ in above for function in _functions(holder)]
    functions += _functions_of(trace.closure)
    return any(chooses_members(f, attribute) for f in functions if attribute in _names(f.__code__))


def _mentioned(holder: nn.Module, attribute: str) -> bool:
    """Whether a method of the module speaks of an attribute, by name or by a name that it puts together."""
    for function in _functions(holder):
        names = _names(function.__code__)
        if attribute in names:
            return True
        parts = (name for name in names if len(name) > 1 and attribute.startswith(name))
        if "getattr" in names and any(parts):
            return True
    return False


def _functions(holder: nn.Module) -> Iterator[Any]:
    """The methods of a module that its forward may call, those of torch's own classes left out."""
    for cls in type(holder).__mro__:
        if is_machinery(getattr(sys.modules.get(cls.__module__), "__file__", None) or ""):
            continue  # torch's own layers leave nothing out
        for key, value in vars(cls).items():
            function = inspect.unwrap(getattr(value, "__func__", value))
            if key not in _NO_FORWARD and inspect.isfunction(function):
                yield function


def _functions_of(closure: Any) -> list[Any]:
    """A closure and the functions that it names."""
    function = getattr(closure, "__func__", getattr(closure, "func", closure))
    if not inspect.isfunction(function):
        return []
    named = inspect.getclosurevars(function)
    return [function, *filter(inspect.isfunction, (*named.nonlocals.values(), *named.globals.values()))]


def _names(code: CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    own = (c for c in code.co_consts if isinstance(c, str))
    return {*code.co_names, *own}.union(*map(_names, inner))

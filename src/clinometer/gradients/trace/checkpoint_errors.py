"""A checkpointed block that computes something else when it is run again: which, and what changed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from clinometer.gradients.report.places import definition_of
from clinometer.gradients.sandbox.closure import Closure, evaluate
from clinometer.gradients.sandbox.sandbox import Before, modules_named_by
from clinometer.messages import say
from clinometer.torch_internals.checkpoints import is_checkpoint_error, recomputed_function
from clinometer.torch_internals.modules import RunningNorm
from clinometer.torch_internals.tensors import version_of


def note_checkpoint(
    error: RuntimeError, paths: dict[nn.Module, str], closure: Closure, before: Before
) -> None:
    """Add to a checkpoint's error the block and those of its attributes that the forward changes."""
    function = recomputed_function(error) if is_checkpoint_error(error) else None
    if function is None:
        return
    own = getattr(function, "__self__", None)
    block = function if isinstance(function, nn.Module) else own if isinstance(own, nn.Module) else None
    place = definition_of(type(function).forward if isinstance(function, nn.Module) else function)
    told = str(getattr(function, "__qualname__", type(function).__name__)).rpartition("<locals>.")[2]
    if block is not None:
        path = paths.get(block)
        told = f"{type(block).__name__} {path!r}" if path else type(block).__name__
    modules = [block] if block is not None else list(modules_named_by(function))
    try:
        changed = _changed_by_a_forward(modules, closure, before)
    except Exception:  # a closure that cannot be run twice: its first error is the one to tell
        changed = []
    values = {"block": told, "place": "" if place is None else place.label}
    if changed:
        error.add_note(say("diagnosis.checkpoint.state", attributes=", ".join(changed), **values))
    else:
        error.add_note(say("diagnosis.checkpoint.differs", **values))


def _changed_by_a_forward(modules: list[nn.Module], closure: Closure, before: Before) -> list[str]:
    """Names of attributes of these modules that are not after a forward what they were before it."""
    before.rewind()
    kept = _attributes(modules)
    evaluate(closure)
    now = _attributes(modules)
    return [name for name in now if kept.get(name) != now[name]]


def _attributes(modules: list[nn.Module]) -> dict[str, Any]:
    found = {}
    for module in modules:
        for path, part in module.named_modules():
            if isinstance(part, RunningNorm):  # statistics, which no shape depends on
                continue
            own = {k: v for k, v in vars(part).items() if not k.startswith("_") and k != "training"}
            for name, value in (*own.items(), *part.named_buffers(recurse=False)):
                found[f"{path}.{name}" if path else name] = _look(value)
    return found


def _look(value: Any) -> Any:
    """What can be compared later of a value that may be changed in place meanwhile."""
    if isinstance(value, Tensor):
        return id(value), version_of(value) if not value.is_inference() else 0, value.shape
    if isinstance(value, list | tuple | set):
        return type(value), [_look(one) for one in value]
    if isinstance(value, dict):
        return type(value), [(str(key), _look(one)) for key, one in value.items()]
    return value if isinstance(value, int | float | str | bool | None) else id(value)

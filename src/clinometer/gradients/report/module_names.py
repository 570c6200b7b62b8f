"""Whose parameters some tensors are: the modules that can be spoken of in their place."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from clinometer.gradients.sandbox.subject import Subject


def owners(names: Collection[str], subject: Subject) -> tuple[str, ...]:
    """The largest modules in which these tensors, and no others, would learn, written as Python.

    A module counts when every parameter in it that asks for a gradient is among `names`; a tensor that
    is in no such module stands for itself.
    """
    ids = {id(subject.tensors[name]) for name in names}
    modules = {path: module for module, path in subject.module_paths().items()}
    whole = {path for path, module in modules.items() if path and _only(module, ids)}
    return tuple(_spelled(owner) for owner in dict.fromkeys(_largest(name, whole) for name in names))


def _only(module: nn.Module, ids: set[int]) -> bool:
    return all(id(p) in ids or not p.requires_grad for p in module.parameters())


def _largest(name: str, whole: set[str]) -> str:
    parts = name.split(".")
    paths = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((path for path in paths if path in whole), name)


def _spelled(path: str) -> str:
    """As one writes it in Python: layers.0.attn → layers[0].attn."""
    first, *rest = path.split(".")
    code = f"model[{first}]" if first.isdigit() else first
    return code + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in rest)

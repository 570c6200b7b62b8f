"""Looking up what a torch may not have, and putting something in the place of what it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

MISSING: list[str] = []
"""Features that something is missing for, in the order they were looked up."""


def look_up(path: str, missing: str = "") -> Any:
    """The attribute of torch at a dotted path; None, and `missing` noted, if this torch has no such thing."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    if found is None and missing and missing not in MISSING:
        MISSING.append(missing)
    return found


def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[], None]:
    """Put `make(what is there)` in the place of an attribute of a class or module; returns what undoes it.

    Nothing happens if there is no such attribute. Whoever replaced it again after us keeps theirs.
    """
    places = owner.__mro__ if isinstance(owner, type) else (owner,)
    original = next((vars(place)[name] for place in places if name in vars(place)), None)
    if original is None:
        return lambda: None
    own, ours = name in vars(owner), make(original)
    setattr(owner, name, ours)

    def back() -> None:
        if vars(owner).get(name) is ours:
            setattr(owner, name, original) if own else delattr(owner, name)

    return back

"""Looking up what a torch may not have."""

from __future__ import annotations

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

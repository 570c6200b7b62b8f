"""What a rule says of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Trouble:
    """The cause shows now: in these tensors (by index; none: in the loop as a whole), with these values."""

    severity: Literal["fault", "warning", "explained"]
    tensors: tuple[int, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    """Sentences of its own: `alert.{cause}.{variant}.what`."""

"""Who wants to know that gradients are about to be clipped.

A list of its own, because optim (which clips) and monitoring (which watches) must not import each other.
An observer is called with the gradients, their total norm (a tensor) and the largest norm allowed, before a
number is changed; it must change none, and must not raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

observers: list[Callable[[list[Any], Any, float], None]] = []

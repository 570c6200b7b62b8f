"""Values of any program as JSON: a value without a JSON form becomes its text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np


def to_json(value: Any) -> str:
    """JSON as Python reads it back: NaN and Infinity stand as such."""
    return clean(json.dumps(_plain(value), ensure_ascii=False))


def clean(text: Any) -> str:
    """Text that UTF-8 can hold: half a surrogate pair (from a file name, say) becomes an escape."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def _plain(value: Any, depth: int = 0) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if depth > 32:
        return str(value)
    if isinstance(value, np.generic):
        return _plain(value.item(), depth + 1)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth + 1) for item in value]
    return str(value)

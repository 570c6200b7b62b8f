"""Validation of a replay's step.json: a run folder can come from another person."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Test = Callable[[Any], bool]


def is_step(info: Any) -> bool:
    """Whether it is a table whose fields, where it has them, hold what their readers take for granted."""
    return (
        isinstance(info, dict)
        and _texts(info.get("names"))
        and len(set(info["names"])) == len(info["names"])
        and _named(_texts)(info.get("state", {}))
        and _named(lambda file: isinstance(file, dict) and _whole(file.get("bytes")))(info.get("files"))
        and _named(_summary)(info.get("tensors", {}))
        and _batch(info.get("batch", {}))
        and all(_number(info.get(name, 0.0)) for name in _NUMBERS)
        and all(isinstance(info.get(name, False), bool) for name in ("taken", "exact"))
    )


_NUMBERS = (
    "step",
    "loss",
    "recorded_loss",
    "recorded_norm",
    "lr",
    "clip",
    "max_norm",
    "total_norm",
    "loss_before",
    "loss_after",
    "predicted",
)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    """A number; what is not finite may be written as text."""
    if isinstance(value, str):
        return value in ("NaN", "Infinity", "-Infinity")
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _named(fits: Test) -> Test:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _rows(fits: Test) -> Test:
    """Rows of one length."""

    def test(value: Any) -> bool:
        return (
            isinstance(value, list)
            and all(isinstance(row, list) and all(map(fits, row)) for row in value)
            and len({len(row) for row in value}) <= 1
        )

    return test


def _summary(value: Any) -> bool:
    return isinstance(value, dict) and all(_number(v) for k, v in value.items() if k != "shape")


def _batch(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    for name, fits in _BATCH.items():
        if name in value and not fits(value[name]):
            return False
    shapes = {(len(rows), len(rows[0]) if rows else 0) for name, rows in value.items() if name in _BATCH}
    return len(shapes) <= 1


_BATCH = {
    "token_ids": _rows(_whole),
    "targets": _rows(_whole),
    "pieces": _rows(_text),
    "target_pieces": _rows(_text),
    "loss": _rows(_number),
    "grad_norm": _rows(_number),
}

"""The valid content of a checkpoint's state.json, checked before it is used.

A checkpoint can come from a stranger, with correct checksums: each of its values is checked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch

_FILE = re.compile(r"(model|optimizer)(-\d{5}-of-\d{5})?\.safetensors")
Test = Callable[[Any], bool]


def require_state(state: Any) -> None:
    """Raises ValueError with the name of the first field that is missing or holds what it cannot."""
    if not isinstance(state, dict):
        raise ValueError("state.json")
    for name, fits in _FIELDS.items():
        if name not in state or not fits(state[name]):
            raise ValueError(name)
    for name, fits in _MAYBE.items():
        if name in state and not fits(state[name]):
            raise ValueError(name)


def group_names(optimizer: torch.optim.Optimizer, number: int = 0) -> list[list[str]]:
    """The names of each group's parameters: those it was made with, or else their numbers in optimizer
    `number` ("0.3" is the fourth of the first)."""
    names, first = [], 0
    for group in optimizer.param_groups:
        last = first + len(group["params"])
        names.append(group.get("param_names") or [f"{number}.{i}" for i in range(first, last)])
        first = last
    return names


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _table(value: Any, **fields: Test) -> bool:
    """Whether it is a table with exactly these fields."""
    return (
        isinstance(value, dict)
        and value.keys() == fields.keys()
        and all(fits(value[name]) for name, fits in fields.items())
    )


def _or_none(fits: Test) -> Test:
    return lambda value: value is None or fits(value)


def _each(fits: Test) -> Test:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _named(fits: Test) -> Test:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _generator(value: Any) -> bool:
    """A generator's state as hexadecimal text; a text that is too long is rejected unread."""
    try:
        return isinstance(value, str) and len(value) <= 1 << 16 and len(bytes.fromhex(value)) > 0
    except ValueError:
        return False


def _cpu_generator(value: Any) -> bool:
    return _generator(value) and len(value) == 2 * torch.get_rng_state().numel()


def _model(value: Any) -> bool:
    sizes = ("vocab_size", "context_length", "d_model", "num_layers", "num_heads", "d_ff")
    finite = lambda number: _number(number) and math.isfinite(number)  # noqa: E731
    if not isinstance(value, dict):
        return False
    known = {"rope_scaling": None, **value}  # a checkpoint of before has no such field
    return _table(
        known, **dict.fromkeys(sizes, _whole), rope_theta=finite, rope_scaling=_or_none(_each(finite))
    )


def _option(value: Any) -> bool:
    """A learning rate, a pair of betas, a switch."""
    return value is None or isinstance(value, bool | int | float | str) or _each(_number)(value)


def _group(value: Any) -> bool:
    return _table(value, param_names=_each(_text), options=_named(_option), state=_named(_named(_option)))


_FIELDS: dict[str, Test] = {
    "step": _whole,
    "files": lambda value: (
        _named(lambda file: _table(file, bytes=_whole, sha256=_text))(value)
        and all(_FILE.fullmatch(name) for name in value)
    ),
    "optimizers": _each(_each(_group)),
    "random": lambda value: (
        isinstance(value, dict)
        and _cpu_generator(value.get("cpu"))
        and _each(_generator)(value.get("cuda", []))
    ),
}
"""Of every checkpoint."""

_MAYBE: dict[str, Test] = {
    "parts": lambda value: _table(
        value,
        count=lambda count: _whole(count) and 0 < count < 100_000,
        split=lambda split: _table(split, model=_named(_each(_whole)), optimizer=_named(_each(_whole))),
    ),
    "config": lambda value: isinstance(value, dict),
    "model": _model,
    "choices": _or_none(lambda value: isinstance(value, dict)),
    "data": _or_none(lambda value: _table(value, content=_text, tokenizer=_text)),
    "separated": lambda value: isinstance(value, bool),
    "metrics_bytes": _whole,
    "skipped_bytes": _whole,
    "skipped_in_a_row": _whole,
    "best_loss": _or_none(_number),
    "best_step": _or_none(_whole),
}
"""Of a training run's."""

"""What somebody else may have written: text to be parsed, and folders to be gone on with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clinometer.messages import InputError


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for whatever is none, nesting without end included."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raises `InputError` if one of the `names` that we are to write in `folder` leads elsewhere.

    Whoever packs a run folder can pack a link with it: metrics.jsonl → ~/.profile would be cut and continued.
    """
    for name in names:
        path = folder / name
        if path.is_symlink():
            raise InputError("foreign.link", path=path, to=os.readlink(path), folder=folder)

"""The folder of a new run that was given no name."""

from __future__ import annotations

from pathlib import Path


def next_run_folder(name: str) -> Path:
    """`runs/<name>-<n>` with the first number that is free; `name` keeps letters, digits, "-" and "_"."""
    stem = "".join(sign if sign.isalnum() or sign in "-_" else "-" for sign in name) or "run"
    number = 1
    while Path("runs", f"{stem}-{number}").exists():
        number += 1
    return Path("runs", f"{stem}-{number}")

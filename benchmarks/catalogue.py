"""Which rows there are and what was asked for (`catalogue.toml`), and the words around (`words.toml`)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

UNITS = ("s", "ms", "µs", "tokens/s", "MB/s", "GB/s", "TFLOP/s", "GB", "MB", "loss", "exponent", "cores")
SHOWN = ("fraction", "times", "over", "share", "own")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What `catalogue.toml` says of one row."""

    name: str
    group: str
    benchmark: str
    unit: str
    shown: str
    en: str
    zh: str
    at_most: Fraction | None = None
    at_least: Fraction | None = None
    readme: bool = False
    peer: Mapping[str, str] | None = None
    limit: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"{self.name}: the unit {self.unit!r} is none of {', '.join(UNITS)}")
        if self.shown not in SHOWN:
            raise ValueError(f"{self.name}: shown {self.shown!r} is none of {', '.join(SHOWN)}")
        if self.at_most is not None and self.at_least is not None:
            raise ValueError(f"{self.name}: one target at most")

    @property
    def target(self) -> Fraction | None:
        return self.at_most if self.at_most is not None else self.at_least

    def reached(self, row: Mapping[str, Any]) -> bool | None:
        """Whether the figure itself, not its rounded form, is within the target; None where none was set."""
        value = row["ours"] if self.shown == "own" else row["ratio"]
        if self.at_most is not None:
            return value <= float(self.at_most)
        return value >= float(self.at_least) if self.at_least is not None else None


@cache
def catalogue() -> dict[str, Entry]:
    """Every row there is, by name, in the order of the tables."""
    found = tomllib.loads((Path(__file__).parent / "catalogue.toml").read_text(encoding="utf-8"))
    for entry in found.values():
        for bound in ("at_most", "at_least"):
            if bound in entry:
                entry[bound] = Fraction(str(entry[bound]))
    return {name: Entry(name=name, **entry) for name, entry in found.items()}


@cache
def words(language: str) -> dict[str, Any]:
    """The words around the rows."""
    return tomllib.loads((Path(__file__).parent / "words.toml").read_text(encoding="utf-8"))[language]

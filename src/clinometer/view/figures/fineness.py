"""How finely to ask the run file: where a coarser roll-up is nearly as fine, it answers many times faster."""

from __future__ import annotations

from clinometer.record.format.schema import LEVELS
from clinometer.record.read.reader import RunFile

SLACK = 4
"""A curve may have this many times fewer points than requested, if one roll-up then holds each of them."""


def points_for(run: RunFile, first: int | None, last: int | None, points: int, slack: int = SLACK) -> int:
    """At most `points`, so that the stride is the width of a roll-up's window where one is near."""
    info = run.info()
    if info["last_step"] is None:
        return points
    low = max(info["first_step"], first or 0)
    high = info["last_step"] if last is None else min(last, info["last_step"])
    span = high - low + 1
    stride = -(-span // points)
    for level in LEVELS:
        exact = -(-span // level)
        if stride < level <= stride * slack and -(-span // max(1, exact)) == level:
            return exact
    return points

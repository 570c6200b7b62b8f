"""Which rows of a tensor a rank holds."""

from __future__ import annotations


def rows_of(rows: int, rank: int, size: int) -> tuple[int, int]:
    """First and last (exclusive) row of a rank: equal parts, rounded up, to the end (FSDP2's rule)."""
    each = -(-rows // size)
    return min(rank * each, rows), min((rank + 1) * each, rows)

"""An index that no row of a table answers to, or no class of a loss: how far it is out, and on which line."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from clinometer.gradients.report.places import Where
from clinometer.messages import say

_TABLES = {"embedding": ("input", "weight", 0), "embedding_bag": ("input", "weight", 0)}
_LOSSES = {"cross_entropy": ("target", "input", 1), "nll_loss": ("target", "input", 1)}


def note_range(
    error: IndexError, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], where: Where | None
) -> None:
    """Add to torch's error the range of the indices, how many there may be, and the line."""
    known = {**_TABLES, **_LOSSES}.get(name)
    if known is None or where is None or getattr(error, "__notes__", None):
        return
    asked, table, dim = known
    given = inspect.signature(getattr(F, name)).bind(*args, **kwargs).arguments
    indices, rows = given.get(asked), given.get(table)
    if not isinstance(indices, Tensor) or not isinstance(rows, Tensor) or indices.is_floating_point():
        return
    if name in _LOSSES:
        indices = indices[indices != given.get("ignore_index", -100)]
    if not indices.numel():
        return
    values = {"lowest": int(indices.min()), "highest": int(indices.max())}
    values["count"] = rows.shape[min(dim, rows.dim() - 1)]
    if values["lowest"] >= 0 and values["highest"] < values["count"]:
        return
    key = "diagnosis.target_range" if name in _LOSSES else "diagnosis.index_range"
    error.add_note(say(key, place=where.label, source=where.source, **values))

"""Two runs held against each other: what a trainer's callback wrote, and what a plain loop's watch wrote."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from clinometer.record.read.reader import RunFile

TIMES = {"seconds", "memory"}


class Words(nn.Module):
    """Small, and with what matters here: an embedding, dropout that draws numbers, a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.drop = nn.Embedding(16, 8), nn.Dropout(0.2)
        self.head = nn.Linear(8, 16)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.drop(self.table(input_ids)))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def words(number: int = 128) -> list[dict[str, torch.Tensor]]:
    drawn = torch.randint(0, 16, (number, 6), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": ids, "labels": (ids + 1) % 16} for ids in drawn]


def assert_same_numbers(one: Path, other: Path) -> int:
    """Every scalar but those of time, and every statistic, of every step, bit for bit; how many steps."""
    ours, theirs = (_read(folder) for folder in (one, other))
    np.testing.assert_array_equal(ours["step"], theirs["step"])
    np.testing.assert_array_equal(ours["statistics"], theirs["statistics"])
    assert set(ours["scalars"]) - TIMES == set(theirs["scalars"]) - TIMES
    for name in set(ours["scalars"]) - TIMES:
        np.testing.assert_array_equal(ours["scalars"][name], theirs["scalars"][name], err_msg=name)
    assert np.isfinite(ours["scalars"]["loss"]).all()
    assert (ours["statistics"][:, :, 0] > 0).all(), "a gradient norm of every tensor at every step"
    return len(ours["step"])


def _read(folder: Path) -> dict[str, Any]:
    file = RunFile.open(folder)
    try:
        return file.rows()
    finally:
        file.close()


def events(folder: Path) -> list[tuple[int, str]]:
    file = RunFile.open(folder)
    try:
        return [(event["step"], event["kind"]) for event in file.events()]
    finally:
        file.close()


def info(folder: Path) -> dict[str, Any]:
    file = RunFile.open(folder)
    try:
        return file.info()
    finally:
        file.close()


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


def assert_same_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

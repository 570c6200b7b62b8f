"""A replayed step as a whole: its loss, its clipping, the parameters that moved most, the hardest tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clinometer.gradients.attribute.tokens import Text
from clinometer.gradients.report.document import (
    Document,
    Line,
    Table,
    code,
    dim,
    fault,
    name,
    note,
    number,
    sentence,
)
from clinometer.gradients.report.formatting import format_number
from clinometer.gradients.report.result import Result
from clinometer.messages import say

_LISTED = 3


class StepSummary(Result):
    """A replayed step as a whole."""

    def __init__(self, info: Mapping[str, Any], run: Path, path: Path, whole: bool = True) -> None:
        self._info, self._run, self._path, self._all = info, run, path, whole

    @property
    def taken(self) -> bool:
        return bool(self._info["taken"])

    def headed(self) -> StepSummary:
        """Only which step it is, and whether it is the run's own."""
        return StepSummary(self._info, self._run, self._path, whole=False)

    def entries(self) -> Mapping[str, Any]:
        return self._info["tensors"]

    def facts(self) -> Mapping[str, Any]:
        return self._info

    def document(self, language: str | None = None) -> Document:
        info = self._info
        lines: Document = [
            Line(sentence("explain.title", language, step=info["step"], run=name(str(self._run))))
        ]
        if info["differs"] is None and not info["exact"]:
            off = number(f"{info['off']:.1e}")
            values: dict[str, Any] = {"ranks": number(str(info["ranks"])), "off": off}
            lines.append(Line((note("· "), *sentence("explain.ranks", language, **values)), 2, 2))
        elif info["exact"]:
            origin = "explain.exact" if info["from_step"] else "explain.exact_start"
            lines.append(Line((dim(say(origin, language, base=info["from_step"])),), 2, 2))
        else:
            values = dict(info["differs"] or {})
            for key in ("recorded", "found"):
                values[key] = number(repr(float(values[key])))
            lines.append(Line((fault("✗ "), *sentence("explain.inexact", language, **values)), 2, 2))
        if not self.taken:
            values = {"loss": number(_shown(info["loss"])), "norm": number(_shown(info["total_norm"]))}
            lines.append(Line((note("· "), *sentence("explain.skipped", language, **values)), 2, 2))
        return [*lines, *self._body(language)] if self._all else lines

    def _body(self, language: str | None) -> Document:
        info = self._info
        loss: list[Any] = [number(_shown(info["loss_before"]))]
        if self.taken:
            loss += [" → ", number(_shown(info["loss_after"]))]
        clipped = say("explain.clipped", language, factor=_shown(info["clip"]), limit=f"{info['max_norm']}")
        rows = [
            (
                say("explain.loss", language),
                loss,
                dim(say("explain.on_batch", language) if self.taken else ""),
            ),
            (
                say("explain.norm", language),
                number(_shown(info["total_norm"])),
                dim(clipped if info["clip"] != 1 else ""),
            ),
            (say("explain.lr", language), number(_shown(info["lr"])), dim(info["optimizer"])),
        ]
        lines: Document = [Table(rows, "lll", 2)]
        if self.taken:
            values = {
                "predicted": number(_shown(info["predicted"], sign=True)),
                "happened": number(_shown(float(info["loss_after"]) - float(info["loss_before"]), sign=True)),
            }
            lines.append(Line(sentence("step.predicted_happened", language, **values), 2))
            lines.append(Line((*sentence("explain.moved", language), "  ", *_between(self._movers())), 2, 4))
        if hardest := self._hardest():
            lines.append(Line((*sentence("explain.hardest", language), "  ", *_between(hardest)), 2, 4))
        lines.append(Line((dim(say("explain.kept", language, path=self._path)),), 2, 2))
        return lines

    def _movers(self) -> list[list[Any]]:
        ratios = {
            key: float(told["update_norm"]) / float(told["weight_norm"])
            for key, told in self._info["tensors"].items()
            if float(told["weight_norm"])
        }
        most = sorted(ratios, key=lambda key: ratios[key], reverse=True)[:_LISTED]
        return [[name(key), " ", number(_shown(ratios[key]))] for key in most]

    def _hardest(self) -> list[list[Any]]:
        batch = self._info["batch"]
        losses = torch.tensor([[float(x) for x in row] for row in batch["loss"]])
        pieces = {
            i: piece
            for ids, said in zip(batch["targets"], batch["target_pieces"], strict=True)
            for i, piece in zip(ids, said, strict=True)
        }
        text = Text(batch["targets"], pieces.__getitem__)
        most = losses.nan_to_num(nan=float("inf")).flatten().argsort(descending=True, stable=True)[:_LISTED]
        found = []
        for flat in most.tolist():
            at = divmod(flat, losses.shape[1])
            # The target is one place after the position that predicts it.
            found.append([code(f"“{text.at(at)}” {at[0]}:{at[1] + 1} "), number(_shown(losses[at]))])
        return found


def _between(parts: list[list[Any]]) -> list[Any]:
    joined: list[Any] = []
    for i, part in enumerate(parts):
        joined += [*([dim(" · ")] if i else []), *part]
    return joined


def _shown(value: Any, *, sign: bool = False) -> str:
    return format_number(float(value), sign=sign, place="")

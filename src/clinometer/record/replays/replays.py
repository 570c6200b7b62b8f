"""Replayed steps, read: the folders that `clinometer explain` leaves.

    RUN/replays/step-00000137/
        step.json              the step as a whole, its batch, loss and gradient norm by token
        tensors.safetensors    NAME.before, NAME.after, NAME.grad (before clipping), NAME.exp_avg, …
        tokens.safetensors     the norm of what each token adds to each gradient: tensor × sequence × position
        weights/<hash>.json    weights that were looked at: anatomy and attribution

A folder that is there is whole: it was written under another name and renamed. Where the run's folder cannot
be written, its replays lie in the user's cache. Numbers that are not finite are, in JSON, the strings "NaN",
"Infinity" and "-Infinity".
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from clinometer.foreign_files import parse_json
from clinometer.record.replays.replay_step import is_step

FORMAT = 1
STEP_FILE, TENSORS_FILE, WEIGHTS = "step.json", "tensors.safetensors", "weights"
TOKENS_FILE, TOKENS = "tokens.safetensors", "shares"
MOST_MOVED = 100
"""Tensors that are reported for one token."""
KINDS = ("grad", "weight", "update", "exp_avg", "exp_avg_sq")
_STATE = {"exp_avg": ("exp_avg", "momentum_buffer"), "exp_avg_sq": ("exp_avg_sq",)}
_NAME = re.compile(r"step-(\d{8,})")


def replay_places(folder: Path) -> list[Path]:
    """Where the replays of the run in `folder` may lie, the first to be written first."""
    given = os.environ.get("CLINOMETER_CACHE")
    base = (
        Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "clinometer"
    )
    return [folder / "replays", base / "replays" / _identity(folder)]


def replayed_steps(folder: Path) -> list[int]:
    """The steps of the run in `folder` that can be looked at, in order."""
    return sorted(
        {
            int(match[1])
            for place in replay_places(folder)
            for path in _entries(place)
            if (match := _NAME.fullmatch(path.name)) and (path / STEP_FILE).is_file()
        }
    )


def weight_key(name: str, index: Sequence[int]) -> str:
    """The file name of a weight: names may hold anything, and no part of one is used as a path."""
    place = f"{name}[{','.join(str(int(i)) for i in index)}]"
    return sha256(place.encode()).hexdigest()[:16] + ".json"


class Replay:
    """One replayed step. Tensors are read from the file when asked, and only the part that is asked for."""

    def __init__(self, path: Path, step_info: dict[str, Any]) -> None:
        self.path = path
        self.step_info = step_info

    @classmethod
    def open(cls, folder: Path, step: int) -> Replay | None:
        """The replay of `step` of the run in `folder`; None if there is none, or it is incomplete."""
        for place in replay_places(folder):
            if (found := cls.at(place / f"step-{step:08d}")) is not None:
                return found
        return None

    @classmethod
    def at(cls, path: Path) -> Replay | None:
        """The replay in the folder `path`; None if it is not one of this format, or a file was cut short."""
        try:
            info = parse_json((path / STEP_FILE).read_text(encoding="utf-8"))
            if not is_step(info):
                return None
            files = info["files"]
            names = {TENSORS_FILE, *({TOKENS_FILE} & set(files))}
            whole = info["format"] == FORMAT and all(
                (path / name).stat().st_size == files[name]["bytes"] for name in names
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return cls(path, {"batch": {}, "tensors": {}, "state": {}} | info) if whole else None

    @property
    def names(self) -> list[str]:
        """The tensors, in the order of their first use in the forward."""
        return list(self.step_info["names"])

    def matrix(
        self,
        name: str,
        kind: str,
        rows: tuple[int, int] | None = None,
        cols: tuple[int, int] | None = None,
        *,
        height: int = 256,
        width: int = 256,
    ) -> dict[str, Any]:
        """A part of a tensor, seen as first axis × the rest, in at most `height` × `width` blocks.

        "values": float32, the mean of |x| over each block; where a block is one entry, that entry, signed.
        "block": entries of a block, down and across (the last ones may be smaller). "largest": the entry of
        largest |x| in the part, with its index in the tensor; an entry that is not finite counts as largest.
        `kind` "weight" is θ after the step, "update" is θ after − θ before; the moments are those before it.
        `rows` and `cols` are cut to what there is. Raises KeyError for a name or kind the replay has not.
        """
        with self._tensors() as file:
            read = self._reader(file, name, kind)
            shape = self._shape(file, name)
            size = (1, 1) if not shape else (shape[0], math.prod(shape[1:]))
            (r0, r1), (c0, c1) = _within(rows, size[0]), _within(cols, size[1])
            down, across = (
                max(1, math.ceil((b - a) / max(1, n))) for a, b, n in ((r0, r1, height), (c0, c1, width))
            )
            starts = np.arange(0, c1 - c0, across)
            counts = np.diff(np.append(starts, c1 - c0))
            bands = range(r0, r1, down)
            values = np.empty((len(bands), len(starts)), np.float32)
            largest: tuple[float, float, int] | None = None
            for i, top in enumerate(bands if c1 > c0 else ()):
                band = read(top, min(top + down, r1), c0, c1)
                size_of = np.abs(band)
                at = int(np.argmax(np.where(np.isnan(size_of), np.inf, size_of)))
                row, col = divmod(at, c1 - c0)
                found = float(band[row, col])
                rank = math.inf if math.isnan(found) else abs(found)
                if largest is None or rank > largest[0]:
                    largest = (rank, found, (top + row) * size[1] + c0 + col)
                if down == across == 1:
                    values[i] = band[0]
                else:
                    sums = np.add.reduceat(size_of.sum(0), starts)
                    values[i] = sums / (counts * len(band))
        return {
            "values": values,
            "rows": [r0, r1],
            "cols": [c0, c1],
            "block": [down, across],
            "shape": list(shape),
            "largest": None
            if largest is None
            else {"index": _unravel(largest[2], shape), "value": largest[1]},
        }

    def entry(self, name: str, index: Sequence[int]) -> dict[str, float | None]:
        """One weight: before, after, grad, exp_avg, exp_avg_sq; None for what the optimizer does not keep.

        Raises KeyError for a name and IndexError for an index the replay has not.
        """
        with self._tensors() as file:
            shape = self._shape(file, name)
            index = tuple(int(i) for i in index)
            if len(index) != len(shape) or not all(0 <= i < n for i, n in zip(index, shape, strict=True)):
                raise IndexError(f"{name} has shape {list(shape)}; there is nothing at {list(index)}")
            row, col = 0, 0
            if shape:
                row, col = index[0], int(np.ravel_multi_index(index[1:], shape[1:])) if shape[1:] else 0
            values: dict[str, float | None] = {}
            for key, kind in (
                ("before", "before"),
                ("after", "weight"),
                ("grad", "grad"),
                ("exp_avg", "exp_avg"),
                ("exp_avg_sq", "exp_avg_sq"),
            ):
                try:
                    read = self._reader(file, name, kind)
                except KeyError:
                    values[key] = None
                else:
                    values[key] = float(read(row, row + 1, col, col + 1)[0, 0])
        return values

    @property
    def by_token(self) -> bool:
        """Whether it says what each token moved; those of earlier versions do not."""
        return TOKENS_FILE in self.step_info["files"]

    def token(self, sequence: int, position: int, most: int = MOST_MOVED) -> list[dict[str, Any]] | None:
        """The tensors whose gradient this token added most to, strongest first, at most `most`.

            ∂L/∂W = Σ over tokens of δ xᵀ        "norm": ‖δ‖ ‖x‖,  "share": ‖δ‖ ‖x‖ / ‖∂L/∂W‖

        Tokens pull against each other: shares of one tensor add up to more than 1, and one may be more than
        1; it is None where the gradient is zero or not finite. A norm that is not finite counts as the
        strongest and is inf. Tensors of which it could not be told are left out. None if the replay does not
        say. Raises IndexError for a place the batch has not.
        """
        if not self.by_token:
            return None
        with self._tensors(TOKENS_FILE) as file:
            if TOKENS not in set(file.keys()):
                raise KeyError(TOKENS)
            lazy = file.get_slice(TOKENS)
            shape = lazy.get_shape()
            if len(shape) != 3 or shape[0] != len(self.names):
                raise KeyError(f"{TOKENS}: {shape}")
            _, sequences, length = shape
            if not (0 <= sequence < sequences and 0 <= position < length):
                raise IndexError(f"the batch is {sequences} × {length}; there is no {sequence}, {position}")
            norms = lazy[:, sequence : sequence + 1, position : position + 1].astype(np.float64).reshape(-1)
        found = []
        for name, norm in zip(self.names, norms.tolist(), strict=True):
            if math.isnan(norm):
                continue
            whole = float(self.step_info["tensors"].get(name, {}).get("grad_norm") or math.nan)
            share = norm / whole if whole and math.isfinite(whole) and math.isfinite(norm) else None
            found.append({"name": name, "norm": norm, "share": share})
        return sorted(found, key=lambda one: -one["norm"])[:most]

    def weight(self, name: str, index: Sequence[int]) -> dict[str, Any] | None:
        """The anatomy of a weight (or of a part of a tensor), if it was computed."""
        try:
            told = parse_json((self.path / WEIGHTS / weight_key(name, index)).read_text(encoding="utf-8"))
            return told if told["name"] == name and told["index"] == [int(i) for i in index] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _tensors(self, name: str = TENSORS_FILE) -> Any:
        try:
            return safe_open(self.path / name, framework="numpy")
        except (OSError, SafetensorError) as error:  # pruned since it was opened, or damaged
            raise KeyError(str(error)) from error

    def _shape(self, file: Any, name: str) -> tuple[int, ...]:
        if f"{name}.before" not in set(file.keys()):
            raise KeyError(name)
        return tuple(file.get_slice(f"{name}.before").get_shape())

    def _reader(self, file: Any, name: str, kind: str) -> Any:
        """A function of (row, end, column, end) that gives that part in float64."""
        keys = set(file.keys())
        shape = self._shape(file, name)
        if kind in ("before", "grad"):
            return _part_of(file, f"{name}.{kind}", shape, keys)
        if kind in ("weight", "update"):
            after = _part_of(file, f"{name}.after", shape, keys)
            before = _part_of(file, f"{name}.before", shape, keys)
            return after if kind == "weight" else lambda *part: after(*part) - before(*part)
        for key in _STATE.get(kind, ()):
            if key in self.step_info["state"].get(name, ()):
                if f"{name}.{key}" not in keys:  # the optimizer's first step: it began with zeros
                    return lambda top, end, left, right: np.zeros((end - top, right - left))
                return _part_of(file, f"{name}.{key}", shape, keys)
        raise KeyError(f"{name}: {kind}")


def _part_of(file: Any, key: str, shape: tuple[int, ...], keys: set[str]) -> Any:
    if key not in keys:
        raise KeyError(key)
    if not shape:
        whole = file.get_tensor(key).astype(np.float64).reshape(1, 1)
        return lambda top, end, left, right: whole[top:end, left:right]
    lazy = file.get_slice(key)

    def read(top: int, end: int, left: int, right: int) -> np.ndarray:
        if len(shape) == 2:
            return lazy[top:end, left:right].astype(np.float64)
        return lazy[top:end].astype(np.float64).reshape(end - top, -1)[:, left:right]

    return read


def _within(part: tuple[int, int] | None, size: int) -> tuple[int, int]:
    first, end = (0, size) if part is None else (int(part[0]), int(part[1]))
    first = min(max(0, first), size)
    return first, min(max(first, end), size)


def _unravel(flat: int, shape: tuple[int, ...]) -> list[int]:
    return [int(i) for i in np.unravel_index(flat, shape)] if shape else []


def _identity(folder: Path) -> str:
    """The run's name among others: its place and its first recorded row, which holds a measured time."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            first = file.readline()
    except OSError:
        first = b""
    return sha256(os.fsencode(folder.absolute()) + b"\0" + first).hexdigest()[:16]


def _entries(place: Path) -> list[Path]:
    try:
        return list(place.iterdir())
    except OSError:
        return []


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a process without a home folder
        return Path("/nonexistent")

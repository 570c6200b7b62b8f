"""Where a replayed step is kept: written whole or not at all, the newest three, and found again.

record/replays/replays.py, which reads a folder, describes what is in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from clinometer.foreign_files import refuse_links
from clinometer.gradients.report.result import jsonable
from clinometer.messages import InputError
from clinometer.record.replays.replays import (
    FORMAT,
    STEP_FILE,
    TENSORS_FILE,
    TOKENS,
    TOKENS_FILE,
    WEIGHTS,
    Replay,
    replay_places,
    weight_key,
)
from clinometer.training.checkpoints.checkpoint import (
    digest,
    fingerprint,
    reason_of,
    save_tensors,
)
from clinometer.whole_files import commit_folder, remove_folder, temporary_name, write_whole

KEPT = 3
_LEFTOVER_SECONDS = 3600.0


def save_replay(
    run: Path, step: int, info: dict[str, Any], tensors: dict[str, Tensor], shares: Tensor
) -> Path:
    """Write the folder of a replayed step beside the run, or in the user's cache if that cannot be written.

    `shares` are each token's norms, float32 (tensors, B, S).

    Raises `InputError` if it cannot be written; nothing is left behind then, nor when it is interrupted.
    """
    place = _place(run)
    final = place / f"step-{step:08d}"
    partial = temporary_name(final)
    try:
        partial.mkdir()
        save_tensors(partial / TENSORS_FILE, {name: t.detach().cpu() for name, t in tensors.items()})
        save_tensors(partial / TOKENS_FILE, {TOKENS: shares.detach().cpu()})
        files = {name: fingerprint(partial / name) for name in (TENSORS_FILE, TOKENS_FILE)}
        told = jsonable({"format": FORMAT, **info, "files": files})
        told["sha256"] = digest(told)
        write_whole(partial / STEP_FILE, json.dumps(told, ensure_ascii=False))
        commit_folder(partial, final)
    except (OSError, SafetensorError) as error:
        raise InputError("explain.not_written", path=final, reason=reason_of(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _prune(place)
    return final


def find_replay(run: Path, step: int, loss: float, norm: float) -> Replay | None:
    """The replay of that step that is there already: exact, undamaged, with the numbers now recorded.

    A replay of an earlier version, without the tokens' shares, has to be made again.
    """
    replay = Replay.open(run, step)
    if replay is None or not replay.by_token:
        return None
    info = dict(replay.step_info)
    try:
        written = info.pop("sha256", None)
        same = jsonable([loss, norm]) == [info["recorded_loss"], info["recorded_norm"]]
        files = (TENSORS_FILE, TOKENS_FILE)
        whole = written == digest(info) and all(
            fingerprint(replay.path / name) == info["files"][name] for name in files
        )
        if not (info["exact"] and same and whole):
            return None
        os.utime(replay.path)  # of the three that are kept, this one is the newest now
    except (KeyError, TypeError):
        return None
    except OSError:  # a run that cannot be written, or a folder that has just gone
        return replay if replay.path.is_dir() else None
    return replay


def save_weight(path: Path, name: str, index: tuple[int, ...], told: dict[str, Any]) -> None:
    """Store the explanation of a weight with its step, if the folder can be written."""
    refuse_links(path.parent, (path.name,))
    refuse_links(path, (WEIGHTS,))
    try:
        (path / WEIGHTS).mkdir(exist_ok=True)
        write_whole(path / WEIGHTS / weight_key(name, index), json.dumps(told, ensure_ascii=False))
    except OSError as error:
        raise InputError("explain.not_written", path=path / WEIGHTS, reason=reason_of(error)) from error


def _place(run: Path) -> Path:
    """The first place that can be written; the run's own folder is never made."""
    beside, *elsewhere = replay_places(run)
    reason = ""
    for place in (beside, *elsewhere):
        try:
            place.mkdir(parents=place is not beside, exist_ok=True)
            # This folder is pruned: a stranger's run must not lead to another run's steps.
            if not place.is_symlink() and os.access(place, os.W_OK):
                return place
        except OSError as error:
            reason = reason_of(error)
    raise InputError("explain.not_written", path=beside, reason=reason)


def _prune(place: Path) -> None:
    """Keep the newest; remove what a killed process left, and the place itself if nothing is in it."""
    dated = []
    for path in place.glob("step-*"):
        try:
            dated.append((path.stat().st_mtime, path))
        except OSError:  # another process prunes too
            continue
    for _, path in sorted(dated)[:-KEPT]:
        remove_folder(path)
    for leftover in place.glob(".step-*.tmp"):
        try:
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
        except OSError:
            continue
    with contextlib.suppress(OSError):
        place.rmdir()

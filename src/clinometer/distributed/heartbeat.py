"""A heartbeat between ranks: each posts every second how far it is; one that stops is reported by name.

A rank that waits for another waits inside a collective, where it can do nothing else; so a thread posts for
it. Rank 0 reads the beats of all others, and every other rank those of rank 0: two messages a rank and
interval, for any number of ranks. Time is counted in the reader's own rounds, so that no rank is reported
after the whole machine was stopped (a suspended laptop, a debugger).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clinometer.distributed.board import Board
from clinometer.distributed.launch import host_name

LOST = 3
"""Exit code of a rank whose run ended because another rank did."""
GIVE_UP = 10
"""A rank that answers and makes no progress is reported after the patience, and given up after so many."""
_GRACE_SECONDS = 5.0
"""The main thread may take so long to notice the verdict by itself and to close the run's files."""
_CLOSING_SECONDS = 20.0


@dataclass(frozen=True)
class RankProgress:
    """What a rank posted last: the number of the beat, how many places it has passed, and its step."""

    number: int = 0
    passed: int = 0
    step: int = 0
    host: str = ""

    def encode(self) -> str:
        return json.dumps([self.number, self.passed, self.step, self.host])

    @classmethod
    def decode(cls, text: str) -> RankProgress:
        return cls(*json.loads(text))


@dataclass(frozen=True)
class RankTrouble:
    """What is wrong, as a message's key and values; `fatal` if the run cannot go on."""

    key: str
    values: dict[str, Any]
    fatal: bool = True


class LivenessCheck:
    """Decides from the last beats which rank is silent, behind or stuck. `clock` counts seconds awake."""

    def __init__(self, ranks: list[int], patience: float) -> None:
        self.patience = patience
        self._heard: dict[int, tuple[RankProgress, float]] = {rank: (RankProgress(), 0.0) for rank in ranks}
        self._furthest, self._since = 0, 0.0
        self._told: set[tuple[int, int]] = set()

    def look(
        self,
        clock: float,
        beats: dict[int, RankProgress],
        own: RankProgress | None = None,
        patience: float | None = None,
    ) -> RankTrouble | None:
        """`own` is the reader's place; None before the first step, when no rank can be behind.

        `patience` is shorter than usual once a connection has broken: a silent rank has then ended.
        """
        for rank, beat in beats.items():
            if beat.number != self._heard[rank][0].number:
                self._heard[rank] = (beat, clock)
        longest = self.patience if patience is None else patience
        for rank, (beat, heard) in self._heard.items():
            if clock - heard > longest:
                values = {"rank": rank, "host": beat.host, "step": beat.step, "seconds": round(clock - heard)}
                return RankTrouble("parallel.silent", values)
        if own is None:
            self._since = clock
            return None
        return self._behind(clock, own)

    def _behind(self, clock: float, own: RankProgress) -> RankTrouble | None:
        places = {rank: beat for rank, (beat, _) in self._heard.items()}
        furthest = max(own.passed, *(beat.passed for beat in places.values()))
        if furthest != self._furthest:
            self._furthest, self._since = furthest, clock
        waited = clock - self._since
        if waited <= self.patience:
            return None
        give_up = waited > GIVE_UP * self.patience
        rank, slowest = min(places.items(), key=lambda item: item[1].passed)
        if own.passed < slowest.passed:
            return None  # the others wait for this rank
        step = max(own.step, *(beat.step for beat in places.values()))
        if slowest.passed == furthest:
            return (
                RankTrouble("parallel.stuck", {"step": step, "seconds": round(waited)}) if give_up else None
            )
        if not give_up and (rank, furthest) in self._told:
            return None
        self._told.add((rank, furthest))
        values = {"rank": rank, "host": slowest.host, "step": step, "seconds": round(waited)}
        return RankTrouble("parallel.given_up" if give_up else "parallel.slow", values, give_up)


class Heartbeat:
    """The thread that posts this rank's beats and reads the others'.

    `tell` is called in the thread with what a person should see; the process ends with LOST if the main
    thread does not end it first.
    """

    def __init__(
        self,
        board: Board,
        rank: int,
        size: int,
        *,
        patience: float,
        tell: Callable[[RankTrouble], None],
        place: str = "",
    ) -> None:
        self._place = place
        self._board, self._rank, self._size, self._tell = board, rank, size, tell
        self._liveness = LivenessCheck(list(range(1, size)) if rank == 0 else [0], patience)
        self._number = self._passed = self._step = 0
        self._training = False
        self._stopped, self._taken = threading.Event(), threading.Event()
        self.verdict: dict[str, Any] | None = None
        """Why the run ends, once some rank has posted it."""
        self._beat()
        self._thread = threading.Thread(target=self._run, name="clinometer heartbeat", daemon=True)

    @property
    def interval(self) -> float:
        """Seconds between beats: one, longer with thousands of ranks, shorter with little patience."""
        return max(0.1, min(1.0, self._liveness.patience / 5), self._size / 2000)

    @property
    def patience(self) -> float:
        return self._liveness.patience

    @patience.setter
    def patience(self, seconds: float) -> None:
        self._liveness.patience = seconds

    def start(self) -> None:
        self._thread.start()

    def reach(self, step: int) -> None:
        """The main thread has reached the next place in that step; the places are the same on every rank."""
        self._training = True
        self._step = step
        self._passed += 1

    def rest(self) -> None:
        """Until the next place work may take any time: no rank is behind, though all must answer."""
        self._training = False

    def stop(self) -> None:
        """Stop posting: this rank has ended, or has posted why the run ends."""
        self._stopped.set()
        if self._thread.is_alive():  # it starts when all ranks have come
            self._thread.join(5)

    def take(self) -> None:
        """The main thread has read the verdict and ends the process by itself."""
        self._taken.set()

    def end_with(self, verdict: dict[str, Any], board: Board) -> bool:
        """Post why the run ends; returns whether this rank is the first to post it, and so prints it."""
        mine = json.dumps({**verdict, "by": self._rank})
        text = board.first("verdict", mine)
        self.verdict = json.loads(text)
        return text == mine

    def _run(self) -> None:
        clock, last = 0.0, time.monotonic()
        while not self._stopped.wait(self.interval):
            now = time.monotonic()
            clock += min(now - last, 3 * self.interval)
            last = now
            try:
                self._beat()
                text = self._board.read("verdict")
                if text is None:
                    text = self._look(clock)
            except RuntimeError:  # the rank that holds the board has ended
                finding = RankTrouble("parallel.board", {"rank": self._rank, "place": self._place})
                text = json.dumps({"key": finding.key, "code": LOST})
                if not self._stopped.is_set():
                    self._tell(finding)
            if text is not None:
                self.verdict = json.loads(text)
                return self._end()

    def _beat(self) -> None:
        self._number += 1
        beat = RankProgress(self._number, self._passed, self._step, host_name())
        self._board.post(f"beat/{self._rank}", beat.encode())

    def _look(self, clock: float) -> str | None:
        others = list(self._liveness._heard)
        beats = dict(
            zip(
                others,
                map(RankProgress.decode, self._board.read_all([f"beat/{r}" for r in others])),
                strict=True,
            )
        )
        left = self._left(others)
        for rank in left:  # a rank that has ended does not answer
            beats[rank] = RankProgress(-self._number, self._passed, self._step)
        own = RankProgress(self._number, self._passed, self._step) if self._training and not left else None
        broken = self._board.read("broken") is not None
        finding = self._liveness.look(clock, beats, own, 4 * self.interval if broken else None)
        if finding is None:
            return None
        if not finding.fatal:
            me, values = str(self._rank), finding.values
            if self._board.first(f"told/{values['rank']}/{values['step']}", me) == me:
                self._tell(finding)
            return None
        verdict = {"key": finding.key, "values": finding.values, "code": LOST}
        if self.end_with(verdict, self._board):
            self._tell(finding)
        return json.dumps(self.verdict)

    def _left(self, others: list[int]) -> list[int]:
        if self._board.read("left") is None:
            return []
        return [rank for rank in others if self._board.read(f"left/{rank}") is not None]

    def _end(self) -> None:
        """End the process, unless the main thread does: one that waits in a collective cannot."""
        if self._stopped.wait(_GRACE_SECONDS) or (
            self._taken.is_set() and self._stopped.wait(_CLOSING_SECONDS)
        ):
            return
        verdict = self.verdict or {}
        os._exit(int(verdict.get("code", LOST)))

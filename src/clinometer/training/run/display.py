"""What a run looks like on screen: one live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
import unicodedata
from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from clinometer.messages import say
from clinometer.messages.folding import tell

PLAIN_EVERY_SECONDS = 10.0


class RunDisplay:
    """Shows preparation, steps, validations, samples and notices on `console`.

    Speed is measured over the last steps, from the end of one to the end of the next, so it counts
    everything a step costs, the loop's own work included.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = console.is_terminal
        self._progress: Progress | None = None
        self._task: Any = None
        self._bar_key = ""
        self._ends: deque[float] = deque(maxlen=21)
        self._printed = -math.inf
        self._validation: float | None = None
        self.loss = math.nan
        self.steps = 0
        self.tokens_per_step = 0
        self.flops_per_token = 0.0
        self.peak = 0.0

    def begin(
        self, *, step: int, steps: int, tokens_per_step: int, flops_per_token: float, peak: float
    ) -> None:
        """From here on steps are shown: `peak` is this machine's measured matrix-product rate in FLOP/s."""
        self._end_bar()
        self.steps, self.tokens_per_step = steps, tokens_per_step
        self.flops_per_token, self.peak = flops_per_token, peak
        self._ends.append(time.perf_counter())
        if self._live:
            self._progress = Progress(
                TextColumn("{task.completed:>{task.fields[digits]}.0f}/{task.total:.0f}"),
                _WideBar(bar_width=12, min_width=96),
                TextColumn("{task.fields[line]}"),
                console=self.console,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task(
                "", total=steps, completed=step, line="", digits=len(str(steps))
            )
            self._progress.start()

    def end(self) -> None:
        """Take the live line down; it stays on screen as it was last."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def step(self, row: dict[str, Any]) -> None:
        now = time.perf_counter()
        self._ends.append(now)
        loss = row["loss"]
        if math.isfinite(loss):
            self.loss = loss if math.isnan(self.loss) else 0.9 * self.loss + 0.1 * loss
        line = self._line(row)
        if self._progress is not None:
            self._progress.update(self._task, completed=row["step"], line=line)
        elif now - self._printed >= PLAIN_EVERY_SECONDS or row["step"] == self.steps:
            self._printed = now
            self.console.print(f"{row['step']:>{len(str(self.steps))}}/{self.steps}  {line}", highlight=False)

    def validation(self, step: int, loss: float, best: bool) -> None:
        self._validation = loss
        if not self._live:
            self._say("train.validation_best" if best else "train.validation", step=step, loss=loss)

    def sample(self, step: int, text: str) -> None:
        self._say("train.sample", step=step)
        self.console.print(Text(printable(text), style="dim" if self._live else ""), soft_wrap=True)
        self.console.print()

    def notice(self, key: str, /, **values: Any) -> None:
        self._end_bar()
        self._say(key, **values)

    def progress(self, key: str, done: int, total: int) -> None:
        """A bar for preparation; nothing without a terminal."""
        if not self._live or total <= 0:
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                console=self.console,
                transient=True,
            )
            self._task = self._progress.add_task(say(key), total=total)
            self._progress.start()
            self._bar_key = key
        self._progress.update(self._task, completed=done, total=total)

    def tokens_per_second(self) -> float:
        """Median over the last steps: a validation or a sample between two of them does not count."""
        times = sorted(b - a for a, b in zip(self._ends, list(self._ends)[1:], strict=False))
        return self.tokens_per_step / times[len(times) // 2] if times else 0.0

    def _end_bar(self) -> None:
        if self._bar_key and self._progress is not None:
            self._progress.stop()
            self._progress, self._bar_key = None, ""

    def _say(self, key: str, **values: Any) -> None:
        tell(self.console, say(key, **values))

    def _line(self, row: dict[str, Any]) -> str:
        speed = self.tokens_per_second()
        parts = [say("train.loss", loss=self.loss)]
        if self._validation is not None:
            parts.append(say("train.validation_short", loss=self._validation))
        if self.console.width >= 100:
            parts.append(f"lr {row['lr']:.1e}")
        parts.append(f"‖g‖ {row['grad_norm']:.2f}")
        parts.append(say("train.speed", speed=short_count(speed)))
        if self.peak and self.console.width >= 100:
            parts.append(say("train.share", share=speed * self.flops_per_token / self.peak))
        left = (self.steps - row["step"]) * self.tokens_per_step / speed if speed else 0.0
        parts.append(say("train.left", time=clock(left)))
        return "  ".join(parts)


class _WideBar(BarColumn):
    """A bar where the terminal is wide enough for one."""

    def __init__(self, *, bar_width: int, min_width: int) -> None:
        super().__init__(bar_width=bar_width)
        self._min_width = min_width

    def __call__(self, task: Task) -> Any:
        progress_console = getattr(self, "console", None)
        width = progress_console.width if progress_console else Console().width
        return ProgressColumn.__call__(self, task) if width >= self._min_width else Text("")


def printable(text: str) -> str:
    """The text without control characters: a young model writes bytes a terminal would obey."""
    return "".join("�" if _commands(c) else c for c in text.replace("\r\n", "\n"))


def _commands(character: str) -> bool:
    """Whether a terminal might act on it: controls, halves of surrogates, reversals of writing direction."""
    if character in "\n\t":
        return False
    return (
        unicodedata.category(character) in ("Cc", "Cs")
        or character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    )


def short_count(number: float) -> str:
    """950, 12.3k, 4.56M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """0:42, 12:03, 3:00:00."""
    seconds = round(seconds)
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"

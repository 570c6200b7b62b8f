"""One step's batch: loss by position, and the tokens that pushed a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clinometer.record.read.reader import RunFile
from clinometer.record.replays.replays import Replay
from clinometer.view.figures.scalars import escaped
from clinometer.view.figures.style import Figure, band, four, line, percent, style
from clinometer.view.figures.weight import number, place

STRONGEST = 10


def batch_loss(run: RunFile, *, step: int, language: str = "en", theme: str = "light") -> Figure:
    """The loss at each position of the context, over the sequences of a replayed batch."""
    say = style(language, theme)
    replay = Replay.open(run.folder, step)
    losses = None if replay is None else matrix(replay.step_info["batch"].get("loss"))
    targets = None if replay is None else matrix(replay.step_info["batch"].get("targets"))
    if losses is None or not losses.size:
        return say.empty("batch", step=f"{step:,}")
    if targets is not None and targets.shape == losses.shape:
        losses[targets < 0] = np.nan  # these do not count
    position = np.arange(losses.shape[1])
    with np.errstate(all="ignore"):
        seen = np.isfinite(losses).any(0)
        filled = np.where(np.isfinite(losses), losses, np.nan)
        mean, low, high = (np.full(len(position), np.nan) for _ in range(3))
        mean[seen] = np.nanmean(filled[:, seen], 0)
        low[seen] = np.nanmin(filled[:, seen], 0)
        high[seen] = np.nanmax(filled[:, seen], 0)
    data = band(position, low, high, say["accent"])
    data.append(line(position, mean, say.say("batch.mean"), say["accent"]))
    n = max(1, len(position) // 8)
    early, late = float(np.nanmean(filled[:, :n])), float(np.nanmean(filled[:, -n:]))
    caption = say.join(
        say.say("batch.healthy"),
        say.say(
            "batch.this", early=four(early), late=four(late), count=n, top=four(float(np.nanmax(filled)))
        ),
    )
    layout = say.layout(
        f"{run.id}-batch-{step}",
        xaxis=say.axis(say.say("axis.position"), showgrid=False),
        yaxis=say.axis(say.say("axis.loss_nats"), rangemode="tozero"),
        showlegend=False,
    )
    return Figure(data, layout, caption)


def shares(
    run: RunFile,
    *,
    tensor: dict[str, Any],
    index: Sequence[int],
    step: int,
    language: str = "en",
    theme: str = "light",
) -> Figure:
    """The ten tokens whose parts of a weight's gradient are largest."""
    say = style(language, theme)
    replay = Replay.open(run.folder, step)
    found = None if replay is None else replay.weight(tensor["name"], tuple(index))
    attribution = None if found is None else found.get("attribution")
    top = attribution.get("top", [])[:STRONGEST] if attribution else []
    if not top or attribution is None:
        return say.empty("shares", place=place(tensor, index), step=f"{step:,}")
    values = [number(push["value"]) for push in top]
    labels = [f"{escaped(visible(push['text']), 24)}  {':'.join(map(str, push['position']))}" for push in top]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "x": [v if np.isfinite(v) else None for v in values],
            "y": list(range(len(top))),
            "customdata": labels,
            "text": [four(v, sign=True) for v in values],
            "marker": {"color": [say["raise"] if v > 0 else say["lower"] for v in values]},
            "hovertemplate": "%{customdata}<br>%{text}<extra></extra>",
        }
    ]
    share = sum(number(push["share"]) for push in top)
    gradient = four(number(attribution["gradient"]), sign=True)
    layout = say.layout(
        f"{run.id}-shares-{tensor['id']}-{list(index)}-{step}",
        xaxis=say.axis(say.say("axis.push"), exponentformat="e", zeroline=True),
        yaxis=say.axis(
            say.say("axis.tokens_positions"),
            autorange="reversed",
            tickvals=list(range(len(top))),
            ticktext=labels,
            showgrid=False,
        ),
        hovermode="closest",
        showlegend=False,
    )
    caption = say.join(
        say.say("shares.healthy"),
        say.say(
            "shares.this",
            count=len(top),
            share=percent(share),
            gradient=gradient,
        ),
    )
    return Figure(data, layout, caption)


def matrix(rows: Any) -> np.ndarray | None:
    """Rows of numbers, of which some may be null or words like "NaN", as (sequences, positions)."""
    if not rows:
        return None
    width = max(len(row) for row in rows)
    values = np.full((len(rows), width), np.nan)
    for place_, row in zip(values, rows, strict=True):
        place_[: len(row)] = [number(value) for value in row]
    return values


def visible(text: str) -> str:
    """A token with its blanks to be seen."""
    return "“" + text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") + "”"

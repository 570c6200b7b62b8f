"""One weight: the waterfall of one of its steps, and its quantities over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clinometer.record.read.reader import RunFile
from clinometer.record.replays.replays import Replay
from clinometer.view.figures.scalars import over_steps, positive
from clinometer.view.figures.style import Figure, Style, four, line, style


def waterfall(
    run: RunFile,
    *,
    tensor: dict[str, Any],
    index: Sequence[int],
    step: int,
    language: str = "en",
    theme: str = "light",
) -> Figure:
    """θ before, what moves it, θ after: from a replay, or from what was recorded of a pinned weight."""
    say = style(language, theme)
    parts = step_parts(run, tensor, index, step)
    if parts is None:
        return say.empty("waterfall", place=place(tensor, index), step=f"{step:,}")
    before, after = parts["before"], parts["after"]
    moves = [(name, value) for name, value in parts["moves"] if value is not None]
    if all(np.isfinite(v) for v in (before, after, *(m for _, m in moves))):
        left = after - before - sum(value for _, value in moves)
        if moves and abs(left) > 0:
            moves.append(("rounding", left))
    labels = [
        say.say("waterfall.before"),
        *(say.say(f"waterfall.{n}") for n, _ in moves),
        say.say("waterfall.after"),
    ]
    numbers = [before, *(value for _, value in moves), after]
    heights = np.cumsum([before, *(value for _, value in moves)])
    low, high = float(min(heights.min(), after)), float(max(heights.max(), after))
    pad = (high - low) * 0.25 or abs(before) * 1e-6 or 1e-9
    data = [
        {
            "type": "waterfall",
            "x": labels,
            "y": [_number(v) for v in numbers],
            "measure": ["absolute", *("relative" for _ in moves), "total"],
            "text": [
                _exact(before, high - low),
                *(four(v, sign=True) for _, v in moves),
                _exact(after, high - low),
            ],
            "textposition": "outside",
            "cliponaxis": False,
            "connector": {"line": {"color": say["faint"], "width": 1}},
            "increasing": {"marker": {"color": say["raise"]}},
            "decreasing": {"marker": {"color": say["lower"]}},
            "totals": {"marker": {"color": say["faint"]}},
            "hovertemplate": "%{x}<br>%{text}<extra></extra>",
        }
    ]
    layout = say.layout(
        f"{run.id}-waterfall-{tensor['id']}-{list(index)}-{step}",
        xaxis=say.axis("", type="category", showgrid=False),
        yaxis=say.axis(
            say.say("axis.weight"), range=[low - pad, high + pad], zeroline=False, tickformat=".7~g"
        ),
        hovermode="closest",
        showlegend=False,
    )
    return Figure(data, layout, _waterfall_caption(say, parts, moves))


def step_parts(
    run: RunFile, tensor: dict[str, Any], index: Sequence[int], step: int
) -> dict[str, Any] | None:
    """before, after and the moves between, named; `source` names their origin."""
    replay = Replay.open(run.folder, step)
    computed = None if replay is None else replay.weight(tensor["name"], tuple(index))
    if computed is not None:
        anatomy = computed["anatomy"]
        return {
            "before": number(anatomy["before"]),
            "after": number(anatomy["after"]),
            "gradient": number(anatomy.get("gradient")),
            "moves": _moves(anatomy),
            "source": "replay",
        }
    row = pinned_row(run, tensor, index, step)
    if row is None:
        return None
    before, after = number(row.get("before")), number(row.get("after"))
    lr, rate = number(row.get("lr")), number(row.get("weight_decay"))
    decay = -lr * rate * before if lr == lr and rate == rate and rate else None
    return {
        "before": before,
        "after": after,
        "gradient": number(row.get("grad")),
        # What the formula would give is not recomputed here: the rest of what happened is the update.
        "moves": [("update", after - before - (decay or 0.0)), ("decay", decay)],
        "source": "recorded",
    }


def pinned_row(
    run: RunFile, tensor: dict[str, Any], index: Sequence[int], step: int
) -> dict[str, Any] | None:
    """What was recorded of a pinned weight at one step; None if nothing was."""
    if not any(p["tensor"] == tensor["id"] and list(p["index"]) == list(index) for p in run.pinned()):
        return None
    found = run.weight(tensor["id"], tuple(index), step, step)
    at = np.flatnonzero(np.asarray(found["step"]) == step)
    if not len(at):
        return None
    return {
        name: float(values[at[0]])
        for name, values in found.items()
        if isinstance(values, np.ndarray) and name != "step" and len(values) == len(found["step"])
    }


def weight_history(
    run: RunFile,
    *,
    tensor: dict[str, Any],
    index: Sequence[int],
    language: str = "en",
    theme: str = "light",
    first: int | None = None,
    last: int | None = None,
    points: int = 1000,
) -> Figure:
    """θ, then g and m, then √v of a pinned weight, one above the other."""
    say = style(language, theme)
    if not any(p["tensor"] == tensor["id"] and list(p["index"]) == list(index) for p in run.pinned()):
        return say.empty("weight", place=place(tensor, index))
    found = run.weight(tensor["id"], tuple(index), first, last, points)
    step = np.asarray(found["step"])
    if not len(step):
        return say.empty("weight", place=place(tensor, index))
    colour = say.series
    data = [line(step, found["after"], "θ", colour[0])]
    grad = found.get("grad")
    momentum = found.get("exp_avg_after", found.get("momentum_buffer_after"))
    if grad is not None:
        faint = {"color": colour[1], "width": 1}
        data.append(line(step, grad, "g", colour[1], yaxis="y2", line=faint, opacity=0.6))
    if momentum is not None:
        data.append(line(step, momentum, "m", colour[2], yaxis="y2"))
    square = found.get("exp_avg_sq_after")
    root = None
    if square is not None and np.isfinite(square).any():
        root = np.sqrt(np.maximum(square, 0.0))
        data.append(line(step, positive(root), "√v", colour[3], yaxis="y3"))
    layout = say.layout(
        f"{run.id}-weight-{tensor['id']}-{list(index)}",
        xaxis=over_steps(run, say, first, last, anchor="y3" if root is not None else "y2"),
        yaxis=say.axis(say.say("axis.theta"), domain=[0.68, 1.0] if root is not None else [0.54, 1.0]),
        yaxis2=say.axis(say.say("axis.g"), domain=[0.34, 0.62] if root is not None else [0.0, 0.46]),
        yaxis3=say.log(say.say("axis.v"), domain=[0.0, 0.28]),
    )
    if root is None:
        del layout["yaxis3"]
    return Figure(data, layout, _history_caption(say, step, found, grad=grad, momentum=momentum, root=root))


def _history_caption(
    say: Style,
    step: np.ndarray,
    found: Mapping[str, Any],
    *,
    grad: np.ndarray | None,
    momentum: np.ndarray | None,
    root: np.ndarray | None,
) -> str:
    after = np.asarray(found["after"], dtype=np.float64)
    start, end = float(np.asarray(found["before"])[0]), float(after[-1])
    parts: list[str | None] = [
        say.say("weight.healthy"),
        say.say("weight.moved", start=four(start), end=four(end), first=f"{step[0]:,}", last=f"{step[-1]:,}"),
    ]
    if grad is not None and np.isfinite(grad).any():
        good = grad[np.isfinite(grad)]
        if not good.any():
            parts.append(say.say("weight.no_gradient"))
        else:
            signs = np.sign(good[good != 0])
            flips = float((signs[1:] != signs[:-1]).mean()) if len(signs) > 1 else 0.0
            parts.append(say.say("weight.flips", share=f"{flips * 100:.0f}"))
    return say.join(*parts)


def _waterfall_caption(say: Style, parts: dict[str, Any], moves: list[tuple[str, float]]) -> str:
    change = parts["after"] - parts["before"]
    said: list[str | None] = [say.say("waterfall.healthy")]
    if not np.isfinite(change):
        return say.join(*said, say.say("waterfall.not_finite"))
    if change == 0:
        said.append(say.say("waterfall.still"))
    else:
        biggest = max(moves, key=lambda move: abs(move[1]))[0] if moves else "update"
        said.append(
            say.say("waterfall.this", change=four(change, sign=True), part=say.say(f"waterfall.{biggest}"))
        )
    gradient = parts["gradient"]
    if change and gradient == gradient and gradient:
        key = "waterfall.downhill" if gradient * change < 0 else "waterfall.uphill"
        said.append(say.say(key, gradient=four(gradient, sign=True)))
    return say.join(*said, say.say(f"waterfall.source_{parts['source']}"))


def _moves(anatomy: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """Update, apart into earlier batches and this one where the formula lets it, and decay."""
    known = {q["key"]: q for q in anatomy.get("quantities", [])}
    if "update" not in known:
        return [("update", number(anatomy["after"]) - number(anatomy["before"]))]
    update = number(known["update"]["after"])
    decay = number(known["decay"]["after"]) if "decay" in known else None
    momentum, beta = known.get("momentum"), number(anatomy.get("numbers", {}).get("beta1"))
    if momentum is not None and beta == beta:
        now = number(momentum["after"])
        if now:
            old = update * beta * number(momentum["before"]) / now  # the update is linear in m
            return [("earlier", old), ("fresh", update - old), ("decay", decay)]
    return [("update", update), ("decay", decay)]


def place(tensor: dict[str, Any], index: Sequence[int]) -> str:
    """The entry as one writes it: `w[3, 5]`."""
    return f"{tensor['name']}[{', '.join(map(str, index))}]" if len(index) else str(tensor["name"])


def number(value: Any) -> float:
    """A number as results store it, where not-finite ones are strings and missing ones None."""
    return float("nan") if value is None else float(value)


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _exact(value: float, span: float) -> str:
    """A weight with enough digits that its step can be seen in it."""
    if not np.isfinite(value) or value == 0 or not span:
        return four(value)
    digits = int(np.clip(np.ceil(np.log10(abs(value) / span)) + 3, 4, 9))
    return f"{value:.{digits}g}".replace("-", "−")

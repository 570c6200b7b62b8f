"""The drawing of growth in docs/performance: time and memory of a step over each axis, by a straight line.

Both directions are logarithmic and relative to the smallest point, so a straight line through the origin has
slope 1; it is dashed. A curve below it grows more slowly than its axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.catalogue import words

AXES = ("parameters", "context", "batch", "tensors")
MEASURED = (("time", "ms"), ("memory", "MB"))
WIDE, HIGH = 176, 150
LEFT, TOP, GAP_ACROSS, GAP_DOWN = 62, 44, 32, 52
FROM, TO = -0.4, 2.95
"""Both scales, in powers of four: from below 1× to so far above 16× that the last figure has room."""

STYLE = """
  .growth { --ink: #24292f; --soft: #656d76; --rule: #d0d7de; --line: #0f62b4; --straight: #9a6700; }
  @media (prefers-color-scheme: dark) {
    .growth { --ink: #e6edf3; --soft: #9198a1; --rule: #3d444d; --line: #6cb2ff; --straight: #d9a53a; }
  }
  .growth text { fill: var(--soft); font: 11px system-ui, sans-serif; }
  .growth .title { fill: var(--ink); font-weight: 600; font-size: 13px; }
  .growth .value { fill: var(--ink); }
  .growth .rule { stroke: var(--rule); fill: none; }
  .growth .straight { stroke: var(--straight); stroke-dasharray: 4 4; fill: none; }
  .growth .line { stroke: var(--line); stroke-width: 2; fill: none; }
  .growth .dot { fill: var(--line); }
"""


def growth(kept: Mapping[str, Any], language: str) -> str:
    """The SVG of what was measured; an axis that was not is left empty and says so."""
    said = words(language)
    width = LEFT + len(AXES) * WIDE + (len(AXES) - 1) * GAP_ACROSS + 20
    height = TOP + len(MEASURED) * HIGH + (len(MEASURED) - 1) * GAP_DOWN + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="growth" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(said['growth-title'])}</title>",
        f"<style>{STYLE}</style>",
    ]
    for down, (measured, unit) in enumerate(MEASURED):
        for across, axis in enumerate(AXES):
            x, y = LEFT + across * (WIDE + GAP_ACROSS), TOP + down * (HIGH + GAP_DOWN)
            row = kept["rows"].get(f"growth-{axis}-{measured}")
            parts.append(f'<g transform="translate({x} {y})">')
            parts += panel(said[f"growth-{axis}"], row, unit, said)
            parts.append("</g>")
        middle = TOP + down * (HIGH + GAP_DOWN) + HIGH / 2
        turned = f'transform="translate(15 {middle}) rotate(-90)" text-anchor="middle"'
        parts.append(f'<text class="title" {turned}>{escape(said[f"growth-{measured}"])}</text>')
    parts.append("</svg>\n")
    return "\n".join(parts)


def panel(title: str, row: Mapping[str, Any] | None, unit: str, said: Mapping[str, str]) -> list[str]:
    """One axis: its title with the exponent, the straight line, the measured points with their figures."""
    parts = [f'<rect class="rule" width="{WIDE}" height="{HIGH}"/>']
    for power in (0, 1, 2):
        x, y = place(power, power)
        parts.append(f'<text x="{x:.1f}" y="{HIGH + 15}" text-anchor="middle">{4**power}×</text>')
        parts.append(f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{4**power}×</text>')
    (x0, y0), (x1, y1) = place(FROM, FROM), place(TO, TO)
    parts.append(f'<line class="straight" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>')
    if row is None:
        parts.append(f'<text class="title" y="-10">{escape(title)}</text>')
        parts.append(f'<text x="{WIDE / 2}" y="{HIGH / 4}" text-anchor="middle">{said["unmeasured"]}</text>')
        return parts
    exponent = (
        f'<tspan class="value" dx="6" font-weight="400">{said["exponent-of"]} {row["ours"]:.2f}</tspan>'
    )
    parts.append(f'<text class="title" y="-10">{escape(title)}{exponent}</text>')
    spots = [place(*relative(point, row["points"][0])) for point in row["points"]]
    parts.append(f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in spots)}"/>')
    for (x, y), (_, value) in zip(spots, row["points"], strict=True):
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
        shown = f"{value:,.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
        parts.append(f'<text class="value" x="{x + 6:.1f}" y="{y + 14:.1f}">{shown}</text>')
    return parts


def relative(point: Sequence[float], first: Sequence[float]) -> tuple[float, float]:
    """How many times fourfold of the first point this one is, along the axis and in its figure."""
    return math.log(point[0] / first[0], 4), math.log(point[1] / first[1], 4)


def place(across: float, up: float) -> tuple[float, float]:
    """Where a pair of powers of four stands in a panel; what leaves the panel is held at its edge."""
    share = [(min(max(power, FROM), TO) - FROM) / (TO - FROM) for power in (across, up)]
    return share[0] * WIDE, (1 - share[1]) * HIGH

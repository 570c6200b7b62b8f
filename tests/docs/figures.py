"""The lessons' figures, drawn from what their pages computed: python -m tests.docs.figures

A page is run and its variables are drawn, so a figure cannot show other numbers than its page.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from tests.docs.pages import DOCS, run

IMAGES = DOCS / "images" / "lessons"
STYLE = """
  .figure { --ink: #24292f; --soft: #656d76; --rule: #d0d7de; --one: #0f62b4; --two: #bc4c00; }
  @media (prefers-color-scheme: dark) {
    .figure { --ink: #e6edf3; --soft: #9198a1; --rule: #3d444d; --one: #6cb2ff; --two: #ff9e57; }
  }
  .figure text { fill: var(--soft); font: 11px system-ui, sans-serif; }
  .figure .ink { fill: var(--ink); }
  .figure .small { font-size: 9px; }
  .figure .rule { stroke: var(--rule); fill: none; }
  .figure .one { fill: var(--one); } .figure .two { fill: var(--two); }
  .figure .line { stroke-width: 2; fill: none; stroke-linejoin: round; }
  .figure .line.one { stroke: var(--one); } .figure .line.two { stroke: var(--two); }
  .figure .line.one, .figure .line.two { fill: none; }
"""
WORDS = {
    "en": {
        "title": "Error of a numeric derivative over its step",
        "step": "step h",
        "error": "relative error",
        "digits": "too few digits: grows with 1/h",
        "bend": "the loss bends: h²",
    },
    "zh": {
        "title": "数值导数的误差随步长的变化",
        "step": "步长 h",
        "error": "相对误差",
        "digits": "位数不够：随 1/h 增大",
        "bend": "损失是弯的：h²",
    },
}
CELL, GAP, LEVELS = 6, 12, 8


PAGES = (DOCS / "en/lessons/2-how-it-is-computed.md", DOCS / "en/lessons/7-checking-gradients.md")


def figures(two: Mapping[str, Any], seven: Mapping[str, Any]) -> dict[str, str]:
    """File name and SVG of each, from the variables that the two pages leave."""
    drawn = {"gradients.svg": gradients({name: w.grad for name, w in two["weights"].items()})}
    for language, suffix in (("en", ""), ("zh", "-zh")):
        drawn[f"error-curve{suffix}.svg"] = error_curve(seven["curves"], WORDS[language])
    return drawn


def svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="figure" role="img"'
        f' viewBox="0 0 {width:g} {height:g}">'
    )
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def gradients(grads: Mapping[str, Tensor]) -> str:
    """Every entry of every gradient as a cell, the model from left to right; an entry of zero is empty."""
    largest = max(grad.abs().max().item() for grad in grads.values())
    layers = 1 + max(int(name.split(".")[1]) for name in grads if name.startswith("layers."))
    parts: list[str] = []
    x, bottom = 8.0, 0.0

    def place(name: str, label: str, left: float, top: float) -> tuple[float, float]:
        """Draw one gradient; how far it goes to the right and down."""
        grad = grads[name] if grads[name].dim() == 2 else grads[name][None]
        high, wide = grad.shape[0] * CELL, grad.shape[1] * CELL
        parts.append(f'<g transform="translate({left:g} {top:g})">')
        parts.append(f'<text class="small" y="-3">{escape(label)}</text>')
        parts.extend(cells(grad, largest))
        parts.append(f'<rect class="rule" width="{wide}" height="{high}"/></g>')
        return left + wide, top + high

    x, bottom = place("token_embeddings.weight", "embeddings", x, 40)
    for layer in range(layers):
        x += 2.5 * GAP
        right, top = x, 40.0
        parts.append(f'<text class="ink" x="{x:g}" y="20">layers.{layer}</text>')
        for row in (
            ("ln1",),
            ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj"),
            ("ln2",),
            ("ffn.w1", "ffn.w2", "ffn.w3"),
        ):
            left, under = x, top
            for short in row:
                label = short.rpartition(".")[2].replace("output_proj", "output_p…")
                end, down = place(f"layers.{layer}.{short}.weight", label, left, top)
                left, under, right = end + GAP, max(under, down), max(right, end)
            top = under + 22
        x, bottom = right, max(bottom, top - 22)
    x += 2.5 * GAP
    right, down = place("ln_final.weight", "ln_final", x, 40)
    right, down = place("lm_head.weight", "lm_head", x, down + 22)
    bottom = max(bottom, down)
    legend = bottom + 26
    parts.append(f'<rect class="one" x="8" y="{legend - 8:g}" width="9" height="9"/>')
    parts.append(f'<text x="22" y="{legend:g}">∂L/∂θ &gt; 0</text>')
    parts.append(f'<rect class="two" x="92" y="{legend - 8:g}" width="9" height="9"/>')
    parts.append(f'<text x="106" y="{legend:g}">∂L/∂θ &lt; 0</text>')
    return svg(right + 12, legend + 12, "∂L/∂θ", parts)


def cells(grad: Tensor, largest: float) -> list[str]:
    """One path for each sign and each level of strength (the root of the size, in LEVELS steps)."""
    paths: dict[tuple[str, int], list[str]] = {}
    for i, row in enumerate(grad.tolist()):
        for j, value in enumerate(row):
            if value:
                level = max(1, round(LEVELS * math.sqrt(abs(value) / largest)))
                key = ("one" if value > 0 else "two", level)
                paths.setdefault(key, []).append(f"M{j * CELL} {i * CELL}h{CELL}v{CELL}h-{CELL}z")
    return [
        f'<path class="{sign}" opacity="{(level + 1) / (LEVELS + 1):.2g}" d="{"".join(steps)}"/>'
        for (sign, level), steps in sorted(paths.items())
    ]


def error_curve(curves: Mapping[str, Sequence[tuple[float, float]]], said: Mapping[str, str]) -> str:
    """Both axes logarithmic: the step from 1e-12 to 1e-1, the error from 1e-12 to 1e3."""
    wide, high, left, top = 520, 300, 64, 16
    parts = [
        f'<g transform="translate({left} {top})">',
        f'<rect class="rule" width="{wide}" height="{high}"/>',
    ]

    def spot(h: float, error: float) -> tuple[float, float]:
        power = min(max(math.log10(max(error, 1e-300)), -12.0), 3.0)
        return (math.log10(h) + 12) / 11 * wide, (3 - power) / 15 * high

    for power in range(-12, 0, 2):
        x, _ = spot(10.0**power, 1)
        parts.append(f'<text x="{x:.1f}" y="{high + 16}" text-anchor="middle">1e{power}</text>')
    for power in range(-12, 4, 3):
        _, y = spot(1, 10.0**power)
        parts.append(f'<line class="rule" x1="0" x2="{wide}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{f"1e{power}" if power else "1"}</text>'
        )
    for (name, points), sign in zip(curves.items(), ("two", "one"), strict=True):
        spots = [spot(h, error) for h, error in points]
        parts.append(
            f'<polyline class="line {sign}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in spots)}"/>'
        )
        x, y = max(spots, key=lambda p: p[1])
        parts.append(f'<circle class="{sign}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        y += 18 if sign == "one" else -26
        parts.append(f'<text class="ink" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{name}</text>')
    x, y = spot(10**-11.7, 10**-7.7)
    parts.append(f'<text x="{x:.1f}" y="{y:.1f}">{escape(said["digits"])}</text>')
    x, y = spot(10**-1.1, 10**-7.7)
    parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="end">{escape(said["bend"])}</text>')
    parts.append(f'<text x="{wide / 2}" y="{high + 36}" text-anchor="middle">{escape(said["step"])}</text>')
    turned = f'transform="translate(-46 {high / 2}) rotate(-90)" text-anchor="middle"'
    parts.append(f"<text {turned}>{escape(said['error'])}</text></g>")
    return svg(left + wide + 16, top + high + 48, said["title"], parts)


def main() -> None:
    torch.set_num_threads(1)
    IMAGES.mkdir(parents=True, exist_ok=True)
    left: list[dict[str, Any]] = [{}, {}]
    for page, variables in zip(PAGES, left, strict=True):
        run(page, variables)
    for name, drawn in figures(*left).items():
        (IMAGES / name).write_text(drawn, encoding="utf-8")
        print(f"docs/images/lessons/{name}: {len(drawn):,} bytes")


if __name__ == "__main__":
    main()

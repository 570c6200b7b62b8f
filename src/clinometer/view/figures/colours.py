"""Every colour of the page and of the figures: the only place where one is written.

Text colours reach a contrast of 4.5 on `paper` and on `panel` (a test computes it). Orange and blue are up
and down and can be distinguished by the colour-blind; `alarm` is for what is not finite, and on the map for
nothing else.
"""

from __future__ import annotations

from typing import Literal, get_args

Theme = Literal["light", "dark"]
THEMES: tuple[Theme, ...] = get_args(Theme)

_TOKENS: dict[str, tuple[str, str]] = {
    #              light      dark
    "paper": ("#fcfbf8", "#15171a"),
    "panel": ("#f3f1eb", "#1d2024"),
    "ink": ("#1f1f1d", "#e8e6e1"),
    "soft": ("#5f5d57", "#a8a59d"),
    "rule": ("#dad7ce", "#34383d"),
    "faint": ("#b5b1a6", "#5b6067"),
    "accent": ("#1f5f99", "#7db4e6"),
    "alarm": ("#c4003f", "#ff6b93"),
    "warning": ("#855600", "#e0a93b"),
    "good": ("#2a6b3d", "#7cc48d"),
    "raise": ("#a85200", "#f0a04b"),
    "lower": ("#1f66a8", "#6fb1ec"),
    "validation": ("#a85200", "#f0a04b"),
    "series-1": ("#1f5f99", "#7db4e6"),
    "series-2": ("#a85200", "#f0a04b"),
    "series-3": ("#00705a", "#4fc3a1"),
    "series-4": ("#9c3870", "#e08bbd"),
    "series-5": ("#665800", "#cdbb4a"),
    "series-6": ("#574ca0", "#a99cf0"),
    "series-7": ("#8c3b1e", "#e58f6e"),
    "series-8": ("#46636f", "#9fb9c4"),
}

# Cividis (Nuñez, Anderton and Renslow 2018): perceptually even, the same to colour-blind eyes.
_CIVIDIS = (
    "#00224e",
    "#123570",
    "#3b496c",
    "#575d6d",
    "#707173",
    "#8a8678",
    "#a59c74",
    "#c3b369",
    "#e1cc55",
    "#fee838",
)


def tokens(theme: Theme) -> dict[str, str]:
    """Colours by name."""
    return {name: pair[THEMES.index(theme)] for name, pair in _TOKENS.items()}


def scale(theme: Theme) -> list[list[object]]:
    """The map's colour scale, from 0 to 1; the same on both papers, so that two screenshots compare."""
    return [[round(i / (len(_CIVIDIS) - 1), 4), colour] for i, colour in enumerate(_CIVIDIS)]


def series(theme: Theme) -> list[str]:
    """Colours of lines beside each other."""
    return [colour for name, colour in tokens(theme).items() if name.startswith("series-")]


def see_through(colour: str, share: float) -> str:
    """`#rrggbb` with an opacity, as Plotly reads it."""
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{share:g})"


def stylesheet() -> str:
    """The tokens as CSS custom properties: light, dark by the system's wish, and either by a switch."""

    def block(theme: Theme) -> str:
        return " ".join(f"--{name}: {colour};" for name, colour in tokens(theme).items())

    light = f"{{ color-scheme: light; {block('light')} }}"
    dark = f"{{ color-scheme: dark; {block('dark')} }}"
    return (
        f":root, [data-theme=light] {light}\n"
        f"@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {dark} }}\n"
        f"[data-theme=dark] {dark}\n"
    )

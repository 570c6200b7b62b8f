"""The tables of docs/performance and of the READMEs, from the rows that the benchmarks kept.

    python -m benchmarks.table FILE.json [--language zh]     print them
    python -m benchmarks.table --write                       put them into the pages, from benchmarks/results

A page says where a table goes by a pair of comments, `<!-- bench: step -->` and `<!-- end -->`; what stands
between them is written here and nowhere else. `benchmarks/results/published` names the
machine they speak of.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figure as drawing
from benchmarks import rows
from benchmarks.catalogue import Entry, catalogue, words

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
LANGUAGES = ("en", "zh")
READMES = {"en": ROOT / "README.md", "zh": ROOT / "README.zh-CN.md"}
PAGES = {language: ROOT / "docs" / language / "performance.md" for language in LANGUAGES}
DRAWINGS = {"en": ROOT / "docs" / "images" / "growth.svg", "zh": ROOT / "docs" / "images" / "growth-zh.svg"}
MARKED = re.compile(r"(<!-- bench: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def three(value: float) -> str:
    """Three significant digits, thousands separated, no exponent: 0.314, 42.9, 1,264."""
    if value == 0:
        return "0"
    digits = max(0, 2 - len(str(int(abs(value)))) + 1) if abs(value) >= 1 else None
    if digits is None:
        return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"
    return f"{value:,.{digits}f}"


def figure(value: float, unit: str, language: str, beside: float = 0) -> str:
    """A figure with its unit: "1,264 tokens/s", "1,264 token/秒"; in ms if both sides are below 1 s."""
    if unit == "s" and max(abs(value), abs(beside)) < 1:
        value, unit = value * 1e3, "ms"
    if unit == "loss":
        return f"{value:.4g}"
    return f"{three(value)} {words(language).get(unit, unit)}".rstrip()


def ratio(value: float, shown: str) -> str:
    """A ratio, ours over the peer's, in the form that the row is talked about."""
    if shown == "fraction":
        return f"1/{three(1 / value)}" if value < 1 else f"{three(value)}×"
    if shown == "over":
        return f"{100 * (value - 1):+.1f} %".replace("-", "−")
    return f"{100 * value:.0f} %" if shown == "share" else f"{three(value)}×"


def target(entry: Entry, language: str) -> str:
    """What was asked for: "≤ 1/6", "≥ 1.3×", "≤ 50 µs"."""
    bound = entry.target
    if bound is None:
        return ""
    sign = "≤" if entry.at_most is not None else "≥"
    if entry.shown == "own":
        said = f"{float(bound):,g} {words(language).get(entry.unit, entry.unit)}".rstrip()
    elif entry.shown == "over":
        said = f"{100 * float(bound - 1):g} %"
    elif entry.shown == "share":
        said = f"{100 * float(bound):g} %"
    elif entry.shown == "fraction":
        said = str(bound)
    else:
        said = f"{float(bound):g}×"
    return f"{sign} {said}"


def with_spread(row: Mapping[str, Any], shown: str) -> str:
    """The ratio and, from more than one round, the quartiles of the rounds."""
    if row.get("ratio") is None or shown == "own":
        return ""
    said = ratio(row["ratio"], shown)
    low, high = row.get("low"), row.get("high")
    if low is None or high is None or row["rounds"] < 2:
        return said
    return f"{said} ({ratio(low, shown)} … {ratio(high, shown)})"


def cells(entry: Entry, kept: Mapping[str, Any], language: str) -> list[str]:
    """One row of a page's table."""
    label = getattr(entry, language)
    peer = (entry.peer or {}).get(language, "")
    row = kept["rows"].get(entry.name)
    if row is None:
        what = kept["missing"].get(entry.name)
        said = words(language)["missing"].format(what=what) if what else words(language)["unmeasured"]
        return [label, said, peer, "", "", target(entry, language), ""]
    unit, theirs = entry.unit, row.get("theirs")
    beside = figure(theirs, unit, language, row["ours"]) if theirs is not None else ""
    verdict = {True: "✓", False: "✗", None: ""}[entry.reached(row)]
    ours = figure(row["ours"], unit, language, theirs or 0)
    asked = target(entry, language)
    return [label, ours, peer or row.get("peer", ""), beside, with_spread(row, entry.shown), asked, verdict]


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| {' | '.join(one)} |".replace("|  ", "| ") for one in body]
    return "\n".join(lines)


def group_table(group: str, kept: Mapping[str, Any], language: str) -> str:
    entries = [entry for entry in catalogue().values() if entry.group == group]
    return markdown(words(language)["columns"], [cells(entry, kept, language) for entry in entries])


def limits(kept: Mapping[str, Any], language: str) -> str:
    """Each row that missed its target: what it is, what was reached, and what holds it back."""
    said = []
    for entry in catalogue().values():
        row = kept["rows"].get(entry.name)
        if row and entry.reached(row) is False:
            label, ours, _, _, compared, asked, _ = cells(entry, kept, language)
            fields = {"label": label, "reached": compared or ours, "asked": asked}
            limit = (entry.limit or {}).get(language, "")
            said.append("- " + words(language)["limit"].format(**fields, name=entry.name, limit=limit))
    return "\n".join(said) or words(language)["all"]


def machine_line(kept: Mapping[str, Any], language: str) -> str:
    """The machine in one line."""
    facts, said = kept["machine"], words(language)
    names = ", ".join(facts["bfloat16"])
    units = said["units"].format(names=names) if names else said["no-units"]
    form = said["one-core" if facts["cores"] == 1 else "machine"]
    return form.format(**{**facts, "units": units})


def origins(kept: Mapping[str, Any], language: str) -> str:
    """By which command, from which commit and when each row was measured."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for name in catalogue():
        if row := kept["rows"].get(name):
            grouped.setdefault((row["command"], row["date"], row["commit"]), []).append(name)
    body = [
        [", ".join(f"`{n}`" for n in names), f"`{command}`", day, f"`{commit}`" if commit else ""]
        for (command, day, commit), names in grouped.items()
    ]
    return markdown(words(language)["origins"], body)


def readme_table(kept: Mapping[str, Any], language: str) -> str:
    """The machine and the rows that the README shows, of those that were measured."""
    body = []
    for entry in catalogue().values():
        if entry.readme and entry.name in kept["rows"]:
            label, ours, peer, beside, compared, asked, _ = cells(entry, kept, language)
            body.append([label, peer, beside, ours, compared, asked])
    head = words(language)["readme-machine"].format(machine=machine_line(kept, language))
    return f"{head}\n\n{markdown(words(language)['readme'], body)}"


def fill(text: str, kept: Mapping[str, Any], language: str) -> str:
    """The page with every marked place written anew. Raises KeyError for a mark that nobody knows."""
    groups = {entry.group for entry in catalogue().values()}
    others = {"readme": readme_table, "machine": machine_line, "limits": limits, "origins": origins}

    def written(found: re.Match[str]) -> str:
        place = found[2]
        body = group_table(place, kept, language) if place in groups else others[place](kept, language)
        return f"{found[1]}{body}\n{found[3]}"

    return MARKED.sub(written, text)


def published() -> Path:
    """The file of the machine that the pages speak of."""
    return RESULTS / (RESULTS / "published").read_text(encoding="utf-8").strip()


def write_pages(kept: Mapping[str, Any]) -> list[Path]:
    """Write the tables into the pages and READMEs of both languages; returns those that changed."""
    changed = []
    for language in LANGUAGES:
        pages = (PAGES[language], READMES[language])
        contents = {path: fill(path.read_text(encoding="utf-8"), kept, language) for path in pages}
        contents[DRAWINGS[language]] = drawing.growth(kept, language)
        for path, after in contents.items():
            if not path.exists() or path.read_text(encoding="utf-8") != after:
                path.write_text(after, encoding="utf-8")
                changed.append(path)
    return changed


def plain(kept: Mapping[str, Any], language: str) -> str:
    """Everything for a terminal."""
    lines = [machine_line(kept, language)]
    group = ""
    for entry in catalogue().values():
        if entry.group != group:
            group = entry.group
            lines.append(f"\n{group}")
        label, ours, peer, beside, compared, asked, verdict = cells(entry, kept, language)
        against = f"{peer}: {beside}" if beside else ""
        lines.append(f"  {verdict or '·'} {label}")
        lines.append("      " + "   ".join(part for part in (ours, against, compared, asked) if part))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="?", help="default: the published machine's")
    parser.add_argument("--language", choices=LANGUAGES, default="en")
    parser.add_argument("--write", action="store_true", help="into the pages and READMEs")
    given = parser.parse_args()
    kept = rows.read(given.file or published())
    if given.write:
        for path in write_pages(kept):
            print(f"written: {path.relative_to(ROOT)}")
    else:
        print(plain(kept, given.language))


if __name__ == "__main__":
    main()

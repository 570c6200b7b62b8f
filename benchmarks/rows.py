"""The rows of docs/performance: what was measured, beside whom, kept as JSON.

A benchmark hands over each row as a `Row`, by its name in `catalogue.toml`:

    from benchmarks import rows

    rows.options(parser)                                      # --json FILE
    rows.keep(given.json, [rows.paired("adamw-20m", "torch 2.13 fused", ours, theirs, "s")])
    rows.keep(given.json, missing={"watch-large-cockpit": "Cockpit"})

One file holds one machine. A row that is measured again takes its old place and the others stay, so that one
benchmark can be repeated alone. `benchmarks.table` writes the pages from it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.catalogue import catalogue


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: medians of both sides, and the median of the rounds' ratios, ours / theirs.

    `low` and `high` are the quartiles of those ratios (of fewer than four rounds the least and the greatest).
    `points` are the (size, figure) pairs of a row that is the slope of a curve.
    """

    name: str
    unit: str
    ours: float
    peer: str = ""
    theirs: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 1
    points: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        entry = catalogue().get(self.name)
        if entry is None:
            raise ValueError(f"{self.name!r} is no row of benchmarks/catalogue.toml")
        if self.unit != entry.unit:
            raise ValueError(f"{self.name} is kept in {entry.unit}, not in {self.unit}")
        if self.ratio is None and entry.shown != "own":
            raise ValueError(f"{self.name} is judged by its ratio, and has none")
        if (self.theirs is None) != (not self.peer):
            raise ValueError(f"{self.name}: a peer's name and its figure come together")
        if self.rounds < 1:
            raise ValueError(f"{self.name}: {self.rounds} rounds")


def paired(name: str, peer: str, ours: Sequence[float], theirs: Sequence[float], unit: str) -> Row:
    """The row of two sides that took turns; `ours[i]` and `theirs[i]` are of the same round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, high = spread(ratios)
    return Row(
        name=name,
        unit=unit,
        ours=statistics.median(ours),
        peer=peer,
        theirs=statistics.median(theirs),
        ratio=statistics.median(ratios),
        low=low,
        high=high,
        rounds=len(ratios),
    )


def alone(name: str, ours: Sequence[float], unit: str, points: Iterable[tuple[float, float]] = ()) -> Row:
    """The row of a figure that stands for itself; `low` and `high` are then its own quartiles."""
    low, high = spread(ours)
    return Row(
        name=name,
        unit=unit,
        ours=statistics.median(ours),
        low=low,
        high=high,
        rounds=len(ours),
        points=tuple((float(x), float(y)) for x, y in points),
    )


def spread(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile; of fewer than four values the least and the greatest."""
    if len(values) < 4:
        return min(values), max(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def options(parser: argparse.ArgumentParser) -> None:
    """The option every benchmark takes."""
    parser.add_argument("--json", type=Path, help="keep the rows in this file, beside those it holds")


def keep(path: Path | None, measured: Iterable[Row] = (), missing: Mapping[str, str] | None = None) -> None:
    """Put the rows into the file, each with the day, commit and command that made it; None keeps nothing.

    `missing` names the rows that could not be measured and what was missing for each. A row that the file has
    from an earlier time stays. Raises SystemExit if the file holds another machine's figures.
    """
    missing = dict(missing or {})
    for name, what in missing.items():
        print(f"skipped: {name} ({what} is missing)")
    if path is None:
        return
    here = machine()
    kept = read(path) if path.exists() else {"machine": here, "rows": {}, "missing": {}}
    if identity(kept["machine"]) != identity(here):
        sys.exit(f"{path} holds figures of {identity(kept['machine'])}, and this is {identity(here)}")
    made = {"date": datetime.date.today().isoformat(), "commit": commit(), "command": command(sys.argv)}
    made["torch"] = here["torch"]
    for row in measured:
        figures = {k: v for k, v in asdict(row).items() if k != "name" and v not in (None, "", ())}
        kept["rows"][row.name] = {k: shortened(v) for k, v in figures.items()} | made
        kept["missing"].pop(row.name, None)
    for name, what in missing.items():
        if name not in kept["rows"]:
            kept["missing"][name] = what
    kept["machine"] = here
    write(path, kept)


def read(path: Path) -> dict[str, Any]:
    """The file as it was kept: machine, rows by name, what was missing."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, kept: Mapping[str, Any]) -> None:
    """Whole or not at all: a benchmark that is stopped leaves the rows of those before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(kept, ensure_ascii=False, indent=1, sort_keys=True)
    text = re.sub(r"\[\s+([-\d.e+]+),\s+([-\d.e+]+)\s+\]", r"[\1, \2]", text)  # a point on one line
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(text + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def shortened(value: Any) -> Any:
    """Five significant digits: more than any of these figures has, and the file stays readable."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list | tuple):
        return [shortened(one) for one in value]
    return value


def command(arguments: Sequence[str]) -> str:
    """The command as another machine would type it: paths by their option's name alone, no --json."""
    module = Path(arguments[0])
    said = [f"python -m {module.parent.name}.{module.stem}"]
    given = list(arguments[1:])
    while given:
        word = given.pop(0)
        option, equals, _ = word.partition("=")
        if option == "--json":
            if not equals:
                given.pop(0)
        elif os.sep in word:
            said.append(f"{option}=PATH" if equals else "PATH")
        else:
            said.append(word)
    return " ".join(said)


def commit() -> str:
    """The commit of the code that was measured, with a + if the sources differ from it; "" without git."""
    root = Path(__file__).parent.parent
    try:
        name = _git(root, "rev-parse", "--short=7", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", "src", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return name + ("+" if changed else "")


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, memory, bfloat16 units, device, torch."""
    import torch

    from clinometer.training.settings.precision import processor_name

    facts: dict[str, Any] = {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory_bytes() / 1e9),
        "bfloat16": bfloat16_units(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    return facts


def bfloat16_units() -> list[str]:
    """The processor's bfloat16 instructions, by name: of "AMX" and "AVX512-BF16" those it has."""
    try:
        flags = set(re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[0].split())
    except (OSError, IndexError):
        return []
    return [name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")) if flag in flags]


def memory_bytes() -> int:
    """The machine's memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def identity(facts: Mapping[str, Any]) -> str:
    """What may not change within one file: "AMD EPYC, 2 cores", with the device if there is one."""
    name = f"{facts['processor']}, {facts['cores']} cores"
    return f"{name}, {facts['device']}" if facts.get("device") else name


def file_name(facts: Mapping[str, Any]) -> str:
    """`identity`, as a file is called."""
    return re.sub(r"[^a-z0-9]+", "-", identity(facts).lower()).strip("-") + ".json"

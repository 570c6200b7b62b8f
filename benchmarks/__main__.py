"""Every benchmark, one after the other, and the tables they fill: `make bench`, or

    python -m benchmarks [--nanogpt DIR] [--text FILE] [--only watching,training] [--quick] [--publish]

Rows are kept in benchmarks/results, a file a machine. The pages (docs/*/performance.md, the READMEs) speak of
the published machine: run there, they are written anew; elsewhere only with --publish. --quick takes few
rounds, to see that everything runs: its figures mean little and go to build/bench.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import rows, table
from benchmarks.catalogue import catalogue

Commands = list[list[str]]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One module, the minutes it took on two cores, and what it is called with, in full and quick.

    `needs` are the options without which nothing of it can run.
    """

    name: str
    minutes: float
    full: Callable[[argparse.Namespace], Commands]
    quick: Callable[[argparse.Namespace], Commands]
    needs: Sequence[str] = field(default=())


def _training(given: argparse.Namespace, *more: str) -> list[str]:
    return ["--nanogpt", str(given.nanogpt), "--text", str(given.text), *more]


def _text(given: argparse.Namespace) -> list[str]:
    return ["--text", str(given.text)] if given.text else []


_WATCHERS = ["--wandb", "--tensorboard", "--cockpit"]

BENCHMARKS = [
    Benchmark(
        name="startup",
        minutes=1,
        full=lambda given: [[]],
        quick=lambda given: [["--rounds", "1"]],
    ),
    Benchmark(
        name="optimizer",
        minutes=1,
        full=lambda given: [["--params", "20e6"], ["--gpt2"]],
        quick=lambda given: [["--params", "20e6", "--rounds", "3", "--slow-rounds", "1"]],
    ),
    Benchmark(
        name="recording",
        minutes=1,
        full=lambda given: [[]],
        quick=lambda given: [["--steps", "200"]],
    ),
    Benchmark(
        name="watching",
        minutes=8,
        full=lambda given: [
            ["--shape", "small", "--rounds", "96", *_WATCHERS],
            ["--shape", "large", "--rounds", "8", *_WATCHERS],
            [
                "--shape",
                "large",
                "--rounds",
                "64",
            ],  # of 32 the result depended on the minute; its row takes the place of the shorter one's
        ],
        quick=lambda given: [["--shape", "small", "--rounds", "4", *_WATCHERS]],
    ),
    Benchmark(
        name="diagnosis",
        minutes=1,
        full=lambda given: [[]],
        quick=lambda given: [["--width", "128", "--layers", "2", "--rounds", "1"]],
    ),
    Benchmark(
        name="check",
        minutes=4,
        full=lambda given: [["--gpt2"]],
        quick=lambda given: [["--only", "small"]],
    ),
    Benchmark(
        name="tokenizer",
        minutes=15,
        full=lambda given: [_text(given), ["--memory", "5"]],
        quick=lambda given: [[*_text(given), "--rounds", "1"]],
    ),
    Benchmark(
        name="generation",
        minutes=2,
        full=lambda given: [[]],
        quick=lambda given: [["--rounds", "1", "--tokens", "16", "--batches", "1"]],
    ),
    Benchmark(
        name="growth",
        minutes=2,
        full=lambda given: [[]],
        quick=lambda given: [["--rounds", "1", "--steps", "2", "--axes", "batch"]],
    ),
    Benchmark(
        name="training",
        minutes=15,
        full=lambda given: [_training(given, "--rounds", "2", "--only", "loss,longer,speed,memory,loop")],
        quick=lambda given: [_training(given, "--rounds", "1", "--steps", "2", "--only", "speed")],
        needs=("nanogpt", "text"),
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument(
        "--text", type=Path, help="tinyshakespeare's input.txt, for training and the tokenizer"
    )
    parser.add_argument("--only", default="", help=f"of {', '.join(names)}, those")
    parser.add_argument("--quick", action="store_true", help="a few rounds of each, kept apart")
    parser.add_argument("--publish", action="store_true", help="let the pages speak of this machine")
    parser.add_argument("--language", choices=table.LANGUAGES, default="en")
    given = parser.parse_args()
    wanted = [name for name in given.only.split(",") if name]
    if unknown := set(wanted) - set(names):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    for path in (given.nanogpt, given.text):
        if path is not None and not path.exists():
            parser.error(f"{path} does not exist")

    chosen = [benchmark for benchmark in BENCHMARKS if not wanted or benchmark.name in wanted]
    here = rows.machine()
    folder = table.ROOT / "build" / "bench" if given.quick else table.RESULTS
    results = folder / rows.file_name(here)
    if given.quick:
        results.unlink(missing_ok=True)
    print(f"{rows.identity(here)}, torch {here['torch']}; rows are kept in {results.relative_to(table.ROOT)}")
    if not given.quick:
        print(f"About {sum(one.minutes for one in chosen):g} minutes; leave the machine alone meanwhile.")
    failed = [benchmark.name for benchmark in chosen if not run(benchmark, given, results)]

    if results.exists():
        kept = rows.read(results)
        print(f"\n{table.plain(kept, given.language)}\n")
        if not given.quick:
            publish(kept, results, given.publish)
    if failed:
        print(f"These ended with an error, see above: {', '.join(failed)}")
    return 1 if failed else 0


def run(benchmark: Benchmark, given: argparse.Namespace, results: Path) -> bool:
    """One benchmark in processes of its own; a missing peer is named, an error does not stop the others."""
    absent = [option for option in benchmark.needs if getattr(given, option) is None]
    print(f"\n== {benchmark.name}: about {benchmark.minutes:g} min", flush=True)
    if absent:
        print(f"not given: {', '.join(f'--{option} PATH' for option in absent)}")
        asked = [entry.name for entry in catalogue().values() if entry.benchmark == benchmark.name]
        rows.keep(results, missing=dict.fromkeys(asked, {"nanogpt": "nanoGPT"}.get(absent[0], absent[0])))
        return True
    start, fine = time.perf_counter(), True
    for arguments in (benchmark.quick if given.quick else benchmark.full)(given):
        command = [sys.executable, "-m", f"benchmarks.{benchmark.name}", *arguments, "--json", str(results)]
        fine &= subprocess.run(command, cwd=table.ROOT, check=False).returncode == 0
    print(f"== {benchmark.name}: {(time.perf_counter() - start) / 60:.1f} min", flush=True)
    return fine


def publish(kept: dict, results: Path, here: bool) -> None:
    """Write the pages if they speak of this machine, or shall from now on."""
    if here:
        (table.RESULTS / "published").write_text(f"{results.name}\n", encoding="utf-8")
    if table.published() != results:
        other = rows.identity(rows.read(table.published())["machine"])
        print(
            f"The pages stay: they speak of {other}. PUBLISH=1 (--publish) lets them speak of this machine."
        )
        return
    for path in table.write_pages(kept):
        print(f"written: {path.relative_to(table.ROOT)}")


if __name__ == "__main__":
    sys.exit(main())

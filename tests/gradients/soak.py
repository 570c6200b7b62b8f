"""Every healthy model over many seeds: `python -m tests.gradients.soak --seeds 200 --minutes 60`.

A seed draws other weights, inputs, dropout masks and directions. Seed by seed through all models, so that
time that runs out leaves every model with about as many; what was done is counted and printed.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.gradients import healthy
from tests.gradients.check.test_check_healthy import BUILDERS
from tests.gradients.check.test_check_modules import CASES
from tests.gradients.check.tiny import MORE, TINY

from clinometer.gradients.check.check_gradients import check_gradients

SEEDS = 200
TWICE = {
    "bart",
    "deberta",
    "albert",
    "mistral",
    "resnet",
    "swin",
    "wav2vec2",
    "mamba2",
    "mamba",
    "gpt2",
    "llama",
}
"""In both collections: the smaller of the two configurations is enough."""


@dataclass
class Tally:
    """What came of one model."""

    seeds: int = 0
    no_verdict: int = 0
    """Seeds with a tensor on a corner, or without a step size to trust: said, and no accusation."""
    seconds: float = 0.0
    alarms: list[str] = field(default_factory=list)


def models() -> dict[str, Callable[[int], Any]]:
    """Builders of (params, closure), by name; each takes the seed it was called after."""
    found: dict[str, Callable[[int], Any]] = {b.__name__: b for b in BUILDERS}
    found |= {f"modules.{name}": _seeded(build) for name, build in CASES.items()}
    found |= {f"torch.{name}": _seeded(build) for name, build in healthy.TORCH.items()}
    found |= {f"transformers.{name}": _seeded(build) for name, build in healthy.TRANSFORMERS.items()}
    rest = {name: build for name, build in {**TINY, **MORE}.items() if name not in healthy.TRANSFORMERS}
    return found | {f"transformers.{name}": _with_inputs(b) for name, b in rest.items() if name not in TWICE}


def _seeded(build: Callable[[], Any]) -> Callable[[int], Any]:
    return lambda seed: build()


def _with_inputs(build: Callable[[], Any]) -> Callable[[int], Any]:
    def made(seed: int) -> Any:
        model, inputs = build()
        model.train()
        return model, lambda: model(**inputs)

    return made


def false_alarms(name: str, build: Callable[[int], Any], seed: int, tally: Tally) -> list[str]:
    """What a check of a healthy model says against it: nothing, if all is well."""
    started = time.process_time()
    torch.manual_seed(seed)
    params, loss = build(seed)
    check = check_gradients(params, loss, seed=seed)
    tally.seeds += 1
    tally.seconds += time.process_time() - started
    statuses = {check[n].status for n in check}
    tally.no_verdict += bool(statuses & {"kink", "unclear"})
    said = [f"finding {f.cause}" for f in check.findings if f.severity == "fault"]
    said += [f"status {s}" for s in sorted(statuses & {"wrong", "surrogate"})]
    said += [f"layer {layer.path} {layer.kind}" for layer in check.wrong_layers]
    tally.alarms += [f"seed {seed}: {one}" for one in said]
    return said


def soak(
    chosen: dict[str, Callable[[int], Any]], seeds: range, until: float
) -> Iterator[tuple[int, dict[str, Tally]]]:
    """The tallies after every seed; ends when the time is over."""
    tallies = {name: Tally() for name in chosen}
    healthy.LAYERS = 1
    try:
        for seed in seeds:
            for name, build in chosen.items():
                if time.monotonic() > until:
                    yield seed, tallies
                    return
                if said := false_alarms(name, build, seed, tallies[name]):
                    print(f"{name}, seed {seed}: {', '.join(said)}", flush=True)
            yield seed, tallies
    finally:
        healthy.LAYERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--without", default="-", help="leave out models whose name contains this")
    parser.add_argument("--report", type=Path, help="write the counts here after every seed, as JSON")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chosen = {n: b for n, b in models().items() if given.only in n and given.without not in n}
    tallies: dict[str, Tally] = {}
    for _, tallies in soak(
        chosen, range(given.first, given.first + given.seeds), time.monotonic() + 60 * given.minutes
    ):
        if given.report:
            given.report.write_text(json.dumps({n: vars(t) for n, t in tallies.items()}, indent=1))
    for name, tally in tallies.items():
        counts = f"{tally.seeds:4} seeds  {tally.no_verdict:3} no verdict  {len(tally.alarms):3} alarms"
        print(f"{name:36} {counts}  {tally.seconds:7.1f} s")
    checks, alarms = (sum(t.seeds for t in tallies.values()), sum(len(t.alarms) for t in tallies.values()))
    print(f"{checks} checks, {alarms} alarms")


if __name__ == "__main__":
    main()

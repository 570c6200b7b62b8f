"""`clinometer diagnose`: says why gradients are None, zero or not finite, and on which line."""

from __future__ import annotations

from rich.console import Console

from clinometer.commands.helpers.targets import aside, examine, keep, prints_to_stderr, read_target, show
from clinometer.gradients.diagnose.diagnose import diagnose
from clinometer.training.run.display import RunDisplay


def diagnose_command(console: Console, target: str, as_json: bool = False) -> int:
    """Print the diagnosis; 1 if something is very likely wrong."""
    with prints_to_stderr(as_json):
        given = read_target(target, RunDisplay(aside(console, as_json)))
        result = examine(given, lambda: diagnose(given.params, given.closure, optimizer=given.optimizer))
    show(console, result, as_json)
    keep(given, result)
    return 0 if result.healthy else 1

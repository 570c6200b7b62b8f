"""`clinometer check`: compares every gradient with the derivative of the loss."""

from __future__ import annotations

from rich.console import Console

from clinometer.commands.helpers.targets import aside, examine, keep, prints_to_stderr, read_target, show
from clinometer.gradients.check.check_gradients import check_gradients
from clinometer.training.run.display import RunDisplay


def check_command(console: Console, target: str, as_json: bool = False) -> int:
    """Print the check; 1 if a gradient is not the derivative of the loss."""
    display = RunDisplay(aside(console, as_json))
    with prints_to_stderr(as_json):
        given = read_target(target, display, short=True)
        try:
            result = examine(
                given,
                lambda: check_gradients(
                    given.params,
                    given.closure,
                    progress=lambda done, total: display.progress("demo.check_bar", done, total),
                ),
            )
        finally:
            display.end()
    show(console, result, as_json)
    keep(given, result)
    return 0 if result.passed else 1

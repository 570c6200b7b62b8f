"""The commands: the name and the parameters of each. The file of its name has its work.

To add a command, add its function here and its file beside; the work is imported inside the function, so that
`--help` answers before anything heavy is imported. The help's sentences are in `messages/` under
`cli.<name>.about` and `cli.<name>.<parameter>`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from clinometer.commands.helpers import process_settings
from clinometer.commands.helpers.console import open_console
from clinometer.commands.helpers.page_process import page_process
from clinometer.messages import InputError
from clinometer.training.settings.config import RunConfig, config_from
from clinometer.training.settings.settings_file import read_toml

Command = Callable[..., int]

COMMANDS: dict[str, Command] = {}
"""Each command's function by its name; "runs export" is the command `export` below `runs`."""


def command(name: str) -> Callable[[Command], Command]:
    """Registers the function as the command `name`."""

    def register(function: Command) -> Command:
        COMMANDS[name] = function
        return function

    return register


@command("train")
def train(
    *,
    corpus: str | None = None,
    config: Path | None = None,
    run: Path | None = None,
    resume: bool = False,
    view: bool = False,
    settings: Annotated[RunConfig | None, Parameter(name="*")] = None,
) -> int:
    process_settings.restart_with_settings()
    from clinometer.commands.train import configuration_of, train_command

    if resume and run is None:
        raise InputError("cli.resume_needs_run")
    given = settings if settings is not None or config is None else config_from(read_toml(config))
    if corpus is not None:
        given = given or (configuration_of(run) if resume and run else RunConfig())
        given = dataclasses.replace(given, data=dataclasses.replace(given.data, corpus=corpus))
    if not view:
        return train_command(open_console(), given, run, resume)
    with page_process() as open_page:
        return train_command(open_console(), given, run, resume, open_page)


@command("generate")
def generate(
    run: Path,
    *,
    prompt: str,
    tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    seed: int | None = None,
    checkpoint: str = "best",
    device: str = "auto",
) -> int:
    from clinometer.commands.generate import generate_command

    return generate_command(
        open_console(stderr=True),
        run,
        prompt=prompt,
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        checkpoint=checkpoint,
        device=device,
    )


@command("export")
def export(run: Path, *, to: Path, checkpoint: str = "best", overwrite: bool = False) -> int:
    from clinometer.commands.export import export_command

    return export_command(open_console(), run, to, checkpoint, overwrite)


@command("import")
def import_(source: Path, *, run: Path, corpus: str = "python") -> int:
    from clinometer.commands.import_ import import_command

    return import_command(open_console(), source, run, corpus)


@command("doctor")
def doctor() -> int:
    from clinometer.commands.doctor import doctor_command

    return doctor_command(open_console())


@command("diagnose")
def diagnose(target: str, *, json: bool = False) -> int:
    from clinometer.commands.diagnose import diagnose_command

    return diagnose_command(open_console(), target, json)


@command("check")
def check(target: str, *, json: bool = False) -> int:
    from clinometer.commands.check import check_command

    return check_command(open_console(), target, json)


@command("explain")
def explain(
    run: Path,
    *,
    step: int,
    parameter: str | None = None,
    index: str | None = None,
    machine: bool = False,
    inexact: bool = False,
) -> int:
    process_settings.restart_with_settings()
    from clinometer.commands.explain import explain_command

    return explain_command(open_console(), run, step, parameter, index, machine=machine, inexact=inexact)


@command("view")
def view(
    path: Path = Path("runs"),
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    token: str | None = None,
    allow_host: tuple[str, ...] = (),
    no_open: bool = False,
) -> int:
    from clinometer.commands.view import view_command

    return view_command(
        open_console(),
        path,
        host=host,
        port=port,
        token=token,
        allow_host=allow_host,
        open_browser=not no_open,
    )


@command("report")
def report(run: Path, *, to: Path) -> int:
    from clinometer.commands.report import report_command

    return report_command(open_console(), run, to)


@command("runs")
def runs(folder: Path = Path("runs")) -> int:
    from clinometer.commands.runs import runs_command

    return runs_command(open_console(), folder)


@command("runs export")
def runs_export(
    run: Path,
    *,
    to: Path,
    table: str = "steps",
    first: int | None = None,
    last: int | None = None,
    overwrite: bool = False,
) -> int:
    from clinometer.commands.runs import export_command

    return export_command(open_console(), run, to, table, first=first, last=last, overwrite=overwrite)


@command("learn")
def learn(
    lesson: int | None = None,
    *,
    all: bool = False,
    notebook: Path | None = None,
    overwrite: bool = False,
) -> int:
    from clinometer.commands.learn import learn_command

    return learn_command(open_console(), lesson, all, notebook, overwrite)


@command("demo")
def demo(*, run: Path | None = None, quick: bool = False) -> int:
    process_settings.restart_with_settings()
    from clinometer.commands.demo import demo_command

    console = open_console()
    code, folder = demo_command(console, run, quick)
    if code == 0 and not quick and console.is_terminal:  # in a log no reader could close it
        from clinometer.commands.view import view_command

        console.print()
        return view_command(console, folder)
    return code

"""The command line. Nothing heavy is imported before a command runs: `--help` answers at once."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import cyclopts
from cyclopts import App, Group, Parameter
from cyclopts.config import Dict

from clinometer import __version__
from clinometer.commands.command_help import with_help
from clinometer.commands.usage_errors import explain_usage
from clinometer.messages import InputError, say, set_language
from clinometer.messages.folding import tell
from clinometer.training.settings.config import SECTIONS, RunConfig, config_from
from clinometer.training.settings.settings_file import read_toml

if TYPE_CHECKING:
    from rich.console import Console

PROCESS_SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(64 << 30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "GOMP_SPINCOUNT": "1000",
}
"""Read by the C library and OpenMP when a process starts, so `train` starts itself once more with them.

glibc hands big blocks back to the system and pays for fresh pages at every step; keeping them makes training
on a CPU a fifth to two fifths faster. OpenMP's threads spin while they wait for each other; spinning briefly
costs nothing on an idle machine and doubles the speed where another program wants a core (docs/log.md)."""


def main() -> NoReturn:
    """Run the command in sys.argv; exits 0 fine, 1 a finding, 2 wrong use or bad input, 130 on Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a sign shows "?" instead
            stream.reconfigure(errors="replace")
    if os.environ.get("WORLD_SIZE", "1") != "1":  # a lost rank is named in our words, not in stack frames
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    arguments = sys.argv[1:]
    with_traceback = "--traceback" in arguments
    arguments = [a for a in arguments if a != "--traceback"]
    try:
        arguments = _take_language(arguments)
        code = build_app(_in_question(arguments))(arguments, exit_on_error=False, print_error=False)
        sys.exit(code if isinstance(code, int) else 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, cyclopts.CycloptsError) as error:
        if with_traceback:
            raise
        _refuse(_explain(error))
    except (MemoryError, RuntimeError) as error:
        from clinometer.training.run.out_of_memory import is_out_of_memory

        if with_traceback or not is_out_of_memory(error):
            raise
        tell(_console(stderr=True), say("cli.memory", reason=error), "red")
        sys.exit(2)
    except BrokenPipeError:  # `clinometer … | head`: whoever read us has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a disk that is full or read-only, a folder that went away
        if with_traceback:
            raise
        _refuse(say("cli.system", path=error.filename or "?", reason=error.strerror or error))


def _refuse(text: str) -> NoReturn:
    """Say what is wrong, and end with 2; of several ranks that find the same one says it."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from clinometer.training.ranks.world import refuse_together

        refuse_together(text, 2)
    tell(_console(stderr=True), text, "red")
    sys.exit(2)


def _in_question(arguments: list[str]) -> str | None:
    """The command that is called, "" where the list of commands is asked for, None if it is not clear."""
    if not arguments or arguments in (["--help"], ["-h"]):
        return ""
    return arguments[0] if arguments[0] in _commands() else None


def _commands() -> dict[str, Callable[..., int]]:
    return {
        "train": train,
        "generate": generate,
        "diagnose": diagnose,
        "check": check,
        "explain": explain,
        "view": view,
        "report": report,
        "export": export,
        "import": import_,
        "learn": learn,
        "doctor": doctor,
        "demo": demo,
    }


def build_app(only: str | None = None) -> App:
    """The commands, with help in the current language; with `only`, that one's parameters alone have it."""
    app = App(
        name="clinometer",
        help=say("cli.about"),
        version=__version__,
        result_action="return_value",
        config=(_layer_configuration,),
        group_commands=Group(say("cli.commands"), sort_key=0),
        group_parameters=Group(say("cli.parameters"), sort_key=1),
        help_epilogue=say("cli.epilogue"),
        help_format="plaintext",
    )

    def told(command: Callable[..., int], name: str) -> Callable[..., int]:
        return with_help(command, name) if only in (None, name) else command

    for name, command in _commands().items():
        app.command(told(command, name), name=name, help=say(f"cli.{name}.about"))
    records = App(name="runs", help=say("cli.runs.about"), help_format="plaintext")
    records.default(told(runs, "runs"))
    records.command(told(runs_export, "runs_export"), name="export", help=say("cli.runs_export.about"))
    app.command(records)
    app.register_install_completion_command(name="--install-completion")  # pyright: ignore
    return app


def train(
    *,
    corpus: str | None = None,
    config: Path | None = None,
    run: Path | None = None,
    resume: bool = False,
    view: bool = False,
    settings: Annotated[RunConfig | None, Parameter(name="*")] = None,
) -> int:
    _restart_with_settings()
    from clinometer.commands import train as command

    if resume and run is None:
        raise InputError("cli.resume_needs_run")
    given = settings if settings is not None or config is None else config_from(read_toml(config))
    if corpus is not None:
        given = given or (command.configuration_of(run) if resume and run else RunConfig())
        given = dataclasses.replace(given, data=dataclasses.replace(given.data, corpus=corpus))
    if not view:
        return command.train_command(_console(), given, run, resume)
    with _page_beside() as began:
        return command.train_command(_console(), given, run, resume, began)


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
    from clinometer.commands import train as command

    return command.generate_command(
        _console(stderr=True),
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


def export(run: Path, *, to: Path, checkpoint: str = "best", overwrite: bool = False) -> int:
    from clinometer.commands import train as command

    return command.export_command(_console(), run, to, checkpoint, overwrite)


def import_(source: Path, *, run: Path, corpus: str = "python") -> int:
    from clinometer.commands import train as command

    return command.import_command(_console(), source, run, corpus)


def doctor() -> int:
    from clinometer.commands.doctor import doctor_command

    return doctor_command(_console())


def diagnose(target: str, *, json: bool = False) -> int:
    from clinometer.commands.diagnose import diagnose_command

    return diagnose_command(_console(), target, json)


def check(target: str, *, json: bool = False) -> int:
    from clinometer.commands.diagnose import check_command

    return check_command(_console(), target, json)


def explain(
    run: Path,
    *,
    step: int,
    parameter: str | None = None,
    index: str | None = None,
    machine: bool = False,
    inexact: bool = False,
) -> int:
    _restart_with_settings()
    from clinometer.commands.explain import explain_command

    return explain_command(_console(), run, step, parameter, index, machine=machine, inexact=inexact)


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
        _console(),
        path,
        host=host,
        port=port,
        token=token,
        allow_host=allow_host,
        open_browser=not no_open,
    )


def report(run: Path, *, to: Path) -> int:
    from clinometer.commands.view import report_command

    return report_command(_console(), run, to)


def runs(folder: Path = Path("runs")) -> int:
    from clinometer.commands.runs import runs_command

    return runs_command(_console(), folder)


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

    return export_command(_console(), run, to, table, first, last, overwrite)


def learn(
    lesson: int | None = None,
    *,
    all: bool = False,
    notebook: Path | None = None,
    overwrite: bool = False,
) -> int:
    from clinometer.commands.learn import learn_command

    return learn_command(_console(), lesson, all, notebook, overwrite)


def demo(*, run: Path | None = None, quick: bool = False) -> int:
    _restart_with_settings()
    from clinometer.commands.demo import demo_command

    console = _console()
    code, folder = demo_command(console, run, quick)
    if code == 0 and not quick and console.is_terminal:  # in a log nobody could close it
        from clinometer.commands.view import view_command

        console.print()
        return view_command(console, folder)
    return code


@contextmanager
def _page_beside() -> Iterator[Callable[[Path], None]]:
    """Gives what opens the microscope on a run in a process of its own; it stays until Ctrl-C."""
    pages: list[subprocess.Popen[str]] = []

    def began(run: Path) -> None:
        command = [sys.executable, "-m", "clinometer", "view", str(run)]
        page = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        pages.append(page)
        assert page.stdout is not None
        for line in page.stdout:  # its address, before the training's own line begins to move
            print(line, end="", flush=True)
            if "http" in line:
                break
        threading.Thread(target=page.stdout.read, daemon=True).start()

    try:
        yield began
        if pages and pages[0].poll() is None:
            print(say("view.stop_with"), flush=True)
            with suppress(KeyboardInterrupt):  # the training is done: to close the page is no failure
                pages[0].wait()
    finally:
        for page in pages:
            page.terminate()
            page.wait()


def _layer_configuration(app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Below what the command line says: the file of --config, then, on --resume, the run's own settings."""
    if commands != ("train",):
        return
    given = {a.name: [t.value for t in a.tokens] for a in arguments if a.tokens}
    if not {name.split(".")[0].removeprefix("--") for name in given} & {*SECTIONS, "config"}:
        return  # no setting was given at all: a resumed run keeps its own, a new one takes the defaults
    for option, file in (("--config", ""), ("--run", "config.toml")):
        if option not in given or (option == "--run" and "--resume" not in given):
            continue
        path = Path(given[option][0]) / file
        if option == "--run" and not path.is_file():
            continue  # the command says it better
        table = read_toml(path)
        Dict(table, source=str(path), use_commands_as_keys=False)(app, commands, arguments)


def _explain(error: Exception) -> str:
    """One paragraph: what, the value, the remedy."""
    return explain_usage(error) if isinstance(error, cyclopts.CycloptsError) else str(error)


def _take_language(arguments: list[str]) -> list[str]:
    """`--language zh` may stand anywhere; it must be known before the help is made."""
    for i, argument in enumerate(arguments):
        name, has_value, value = argument.partition("=")
        if name == "--language":
            if not has_value:
                if i + 1 == len(arguments):
                    raise InputError("cli.language_value")
                value = arguments[i + 1]
            set_language(value)
            return arguments[:i] + arguments[i + (1 if has_value else 2) :]
    return arguments


def _restart_with_settings() -> None:
    """Start this process again with PROCESS_SETTINGS, those that the user has set left as they are."""
    if sys.platform != "linux" or "LD_PRELOAD" in os.environ:  # a preloaded allocator has its own
        return
    missing = {name: value for name, value in PROCESS_SETTINGS.items() if name not in os.environ}
    if missing:
        os.environ.update(missing)
        os.execv(sys.executable, [sys.executable, "-m", "clinometer", *sys.argv[1:]])


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    class Unheard(Console):
        """A console whose reader may leave (`… | head`): the work goes on, unseen."""

        def on_broken_pipe(self) -> None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    return Unheard(stderr=stderr)

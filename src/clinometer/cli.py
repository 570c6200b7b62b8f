"""The command line. Nothing heavy is imported before a command runs: `--help` answers at once."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import cyclopts
from cyclopts import App, Group
from cyclopts.config import Dict

from clinometer import __version__
from clinometer.commands.entries import COMMANDS
from clinometer.commands.helpers.command_help import with_help
from clinometer.commands.helpers.console import open_console
from clinometer.commands.helpers.usage_errors import explain_usage
from clinometer.messages import LANGUAGES, InputError, say, set_language
from clinometer.messages.folding import tell
from clinometer.training.settings.config import SECTIONS
from clinometer.training.settings.settings_file import read_toml


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
        tell(open_console(stderr=True), say("cli.memory", reason=error), "red")
        sys.exit(2)
    except BrokenPipeError:  # `clinometer … | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a disk that is full or read-only, a folder that went away
        if with_traceback:
            raise
        _refuse(say("cli.system", path=error.filename or "?", reason=error.strerror or error))


def _refuse(text: str) -> NoReturn:
    """Print what is wrong and exit with 2; if several ranks find the same error, one prints it."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from clinometer.training.ranks.world import refuse_together

        refuse_together(text, 2)
    tell(open_console(stderr=True), text, "red")
    sys.exit(2)


def _in_question(arguments: list[str]) -> str | None:
    """The command in the arguments; "" for the list of commands; None if it is not known."""
    if not arguments or arguments in (["--help"], ["-h"]):
        return ""
    return arguments[0] if arguments[0] in COMMANDS else None


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
        help_epilogue=say("cli.epilogue", languages="|".join(LANGUAGES)),
        help_format="plaintext",
    )
    apps = {"": app}
    for name, command in COMMANDS.items():
        parent, _, last = name.rpartition(" ")
        key = name.replace(" ", "_")
        if only is None or name.split()[0] == only:
            command = with_help(command, key)
        about = say(f"cli.{key}.about")
        if any(other.startswith(f"{name} ") for other in COMMANDS):  # a command with commands below it
            apps[name] = App(name=last, help=about, help_format="plaintext")
            apps[name].default(command)
            apps[parent].command(apps[name])
        else:
            apps[parent].command(command, name=last, help=about)
    app.register_install_completion_command(name="--install-completion")  # pyright: ignore
    return app


def _layer_configuration(app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Values that the command line leaves open: from --config, then, on --resume, from the run."""
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
            continue  # the command reports it with its remedy
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

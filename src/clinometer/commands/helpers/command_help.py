"""The help of a command's parameters, in the current language."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, get_type_hints

from cyclopts import Group, Parameter, Token

from clinometer.messages import say
from clinometer.training.settings.config import SECTIONS, RunConfig


def with_help(command: Any, name: str) -> Any:
    """The command with its parameters' help, and the settings' help, in the current language."""
    hints = get_type_hints(command, include_extras=True)
    annotations: dict[str, Any] = {"return": int}
    for parameter, hint in hints.items():
        if parameter == "settings":
            annotations[parameter] = Annotated[_settings_type() | None, Parameter(name="*")]
        elif parameter != "return":
            # A lone "-" is standard input, a prompt may begin with one, and -1 is the last entry.
            dash = parameter in ("corpus", "prompt", "index")
            # Under torchrun, Python 3.11's argparse takes --run for the launcher's own --run-path.
            names = ("--run", "--folder") if (name, parameter) == ("train", "run") else None
            told = Parameter(
                names,
                help=say(f"cli.{name}.{parameter}"),
                allow_leading_hyphen=dash,
                negative=(),
                converter=_converter(hint),
            )
            annotations[parameter] = Annotated[hint, told]

    command.__annotations__ = annotations
    return command


def _converter(hint: Any) -> Any:
    """A whole number is read by us: cyclopts rounds, and 1.5 layers would be 2."""
    return _whole if hint in (int, int | None) else None


def _whole(kind: type, tokens: Sequence[Token]) -> int:
    text = tokens[0].value.lower()
    if text.lstrip("+-").startswith(("0x", "0o", "0b")):
        return int(text, 0)
    try:
        return int(text)
    except ValueError:
        number = float(text)  # 30.0 and 1e6 are whole
    if not number.is_integer():
        raise ValueError(f"{tokens[0].value} is not whole")
    return int(number)


def _settings_type() -> type[RunConfig]:
    """RunConfig with the help of each field, and a group for each section."""
    here = {"__module__": __name__}
    sections = []
    for number, (section, cls) in enumerate(SECTIONS.items(), 2):
        group = Group(say(f"cli.group.{section}"), sort_key=number)
        hints = get_type_hints(cls)
        fields = [
            (
                f.name,
                Annotated[
                    hints[f.name],
                    Parameter(
                        help=say(f"config.{section}.{f.name}"),
                        group=group,
                        negative=(),
                        converter=_converter(hints[f.name]),
                    ),
                ],
                dataclasses.field(default=f.default),
            )
            for f in dataclasses.fields(cls)
        ]
        told = dataclasses.make_dataclass(
            cls.__name__, fields, bases=(cls,), frozen=True, kw_only=True, namespace=here
        )
        sections.append((section, told, dataclasses.field(default_factory=told)))
    return dataclasses.make_dataclass(
        "RunConfig", sections, bases=(RunConfig,), frozen=True, kw_only=True, namespace=here
    )

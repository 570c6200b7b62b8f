"""Errors in the words of a command line, explained in the current language."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Iterable
from itertools import chain
from typing import Any

import cyclopts

from clinometer.commands.helpers.other_names import option_for
from clinometer.messages import say

_KINDS: dict[Any, str] = {int: "whole", float: "number", bool: "truth"}
_KINDS |= {kind | None: name for kind, name in _KINDS.items()}


def explain_usage(error: cyclopts.CycloptsError) -> str:
    """One paragraph: what, the value, the remedy; cyclopts' own text for an error without a sentence."""
    seen = "clinometer " + "".join(f"{name} " for name in error.command_chain or ()) + "--help"
    if isinstance(error, cyclopts.UnknownOptionError) and error.token.source == "cli":
        given = (error.token.keyword or error.token.value).partition("=")[0]
        names = chain.from_iterable(one.names for one in error.argument_collection if one.parse)
        return _unknown("option", given, names, seen)
    if isinstance(error, cyclopts.UnknownCommandError) and error.unused_tokens:
        commands = [] if error.app is None else [name for name in error.app if not name.startswith("-")]
        return _unknown("command", error.unused_tokens[0], commands, seen)
    if isinstance(error, cyclopts.UnusedCliTokensError) and error.unused_tokens:
        return _unused([str(token) for token in error.unused_tokens], error, seen)
    if isinstance(error, cyclopts.RepeatArgumentError) and error.token.source == "cli":
        return say("cli.repeated", option=error.token.keyword or error.token.value, help=seen)
    if isinstance(error, cyclopts.CoercionError) and error.token is not None and error.argument is not None:
        kind = _KINDS.get(error.target_type)
        if kind is not None and error.token.source == "cli":
            option = error.token.keyword or error.argument.name.lstrip("-").upper()
            return say(f"cli.value_{kind}", option=option, value=error.token.value)
    if isinstance(error, cyclopts.MissingArgumentError) and error.argument is not None:
        name = error.argument.name
        option = name if error.argument.field_info.is_keyword_only else f"{name.lstrip('-').upper()} ({name})"
        return say("cli.missing", option=error.keyword or option, help=seen)
    if hasattr(error, "verbose"):
        error.verbose = False
    return say("cli.wrong", text=str(error), help=seen)


def _unused(given: list[str], error: cyclopts.CycloptsError, seen: str) -> str:
    """What stands where nothing may: several files are most likely a pattern that the shell has opened."""
    if tuple(error.command_chain or ()) == ("train",) and all(map(os.path.exists, given)):
        files = [text for text in error.root_input_tokens or given if os.path.isfile(text)] or given
        folder, ends = os.path.dirname(files[-1]), {os.path.splitext(text)[1] for text in files}
        pattern = os.path.join(folder, f"*{ends.pop() if len(ends) == 1 else ''}")
        corpus = shlex.quote(pattern if len(files) > 1 else files[0])
        return say("cli.unused_files", given=" ".join(given), corpus=corpus, help=seen)
    return say("cli.unused", given=" ".join(given), help=seen)


def _unknown(what: str, given: str, known: Iterable[str], seen: str) -> str:
    names = set(known)
    near = option_for(given, names) if what == "option" else None
    near = near or next(iter(difflib.get_close_matches(given, sorted(names), n=1)), None)
    if near:
        return say(f"cli.unknown_{what}_near", given=given, near=near, help=seen)
    return say(f"cli.unknown_{what}", given=given, help=seen)

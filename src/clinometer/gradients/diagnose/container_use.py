"""How code uses the members of a container: always the same ones, or those that a value of the run chooses.

`blocks[: self.depth]`, an `if … : return` within the loop, `blocks[i]` with an argument i choose: another
depth, exit or input reaches the rest. `blocks[:-1]` or `range(len(blocks) - 1)` take the same members in
every run. Read from the source; what cannot be read counts as a choice, for it must not be accused.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

_WHOLE = ("len", "enumerate", "zip", "reversed", "list", "tuple", "iter", "range")
"""Functions that hand on all members, or their number."""


def chooses_members(function: Callable[..., Any], attribute: str) -> bool:
    """Whether a function that names `self.<attribute>` may use other members of it in another run."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return True
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == attribute]
    counted = set(_counters(tree, attribute))
    return any(_is_chosen(use, parents, attribute, counted) for use in uses)


def _is_chosen(use: ast.AST, parents: dict[ast.AST, ast.AST], attribute: str, counted: set[str]) -> bool:
    """Whether one use of the container depends on a value of the run."""
    node = use
    while (parent := parents.get(node)) is not None and not isinstance(parent, ast.stmt):
        if isinstance(parent, ast.Subscript) and node is parent.value:
            if not _is_fixed(parent.slice, attribute, counted):
                return True
            if not isinstance(parent.slice, ast.Slice):
                node = parent
                break  # one member: what is done with it is no choice among them
        elif isinstance(parent, ast.comprehension):
            if parent.ifs:
                return True
        elif isinstance(parent, ast.IfExp | ast.BoolOp):
            return True
        elif isinstance(parent, ast.Call) and node is not parent.func:
            if not (isinstance(parent.func, ast.Name) and parent.func.id in _WHOLE):
                return True
            if parent.func.id == "len":
                return False
        node = parent
    if isinstance(parent, ast.Assign | ast.AnnAssign) and node is parent.value:
        return True  # a name for it, whose uses are not followed
    if isinstance(parent, ast.For) and node is parent.iter and any(map(_decides, parent.body)):
        return True
    while parent is not None and not isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef):
        if isinstance(parent, ast.If | ast.While | ast.Match | ast.Try):
            return True
        if isinstance(parent, ast.For) and any(map(_decides, parent.body)):
            return True
        parent = parents.get(parent)
    return False


def _decides(statement: ast.AST) -> bool:
    """Whether a statement in a loop may leave it, or leave out a part of it."""
    return any(
        isinstance(node, ast.If | ast.IfExp | ast.Break | ast.Continue | ast.Return | ast.Match)
        for node in ast.walk(statement)
    )


def _is_fixed(index: ast.AST, attribute: str, counted: set[str]) -> bool:
    """Whether an index or a bound is made of constants and of the container's own length alone."""
    named = (node for node in ast.walk(index) if isinstance(node, ast.Name | ast.Attribute))
    allowed = {*counted, *_WHOLE}
    return all(
        node.attr == attribute if isinstance(node, ast.Attribute) else node.id in allowed or node.id == "self"
        for node in named
    )


def _counters(tree: ast.AST, attribute: str) -> Iterator[str]:
    """Variables of loops over a fixed range, or over the container itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.comprehension) and _is_fixed(node.iter, attribute, set()):
            yield from (target.id for target in ast.walk(node.target) if isinstance(target, ast.Name))

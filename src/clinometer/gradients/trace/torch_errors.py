"""torch's own errors get a note: the person's line, and a remedy that can be followed there.

The error itself comes through as it is. What torch says is matched by its words: it has no codes for them.
Errors about indices are in `index_errors`, values written over in `inplace_errors`, checkpoints that compute
something else the second time in `checkpoint_errors`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from clinometer.gradients.report.places import Where, user_line_of
from clinometer.gradients.trace.graph import Graph, Node
from clinometer.messages import say
from clinometer.torch_internals.custom_functions import carries_module_hooks, function_of
from clinometer.torch_internals.tensors import base_of

_WORDS = {
    "function that returns multiple views": "several_views",
    "is a view and is being modified inplace": "view_of_a_function",
    "leaf Variable that requires grad": "write_to_a_leaf",
    "Inference tensors cannot be saved for backward": "inference_tensor",
    "Inplace update to inference tensor": "inference_tensor_written",
    "grad can be implicitly created only for scalar outputs": "backward_of_many",
    "grad can be implicitly created only for real scalar outputs": "backward_of_complex",
    "backward through the graph a second time": "second_backward",
    "is not implemented": "no_derivative",
}
"""Words of a message of torch → the sentence that explains it."""


def kind_of_error(error: BaseException) -> str:
    """The sentence that explains an error of torch; "" if none does."""
    if not isinstance(error, RuntimeError) or getattr(error, "__notes__", None):
        return ""
    message = str(error)
    kind = next((kind for words, kind in _WORDS.items() if words in message), "")
    return "" if kind == "no_derivative" and "erivative for" not in message else kind


def note_call(
    error: RuntimeError,
    ins: list[Tensor],
    places: dict[Node, Where | None],
    where: Callable[[], Where | None],
    hooked: Callable[[], list[str]],
) -> None:
    """Add to the error of a call the line, and what is special about the tensors that it got.

    `where` returns the call's line, `hooked` the names of modules with full backward hooks: both are asked
    when there is an error only.
    """
    kind = kind_of_error(error)
    if kind in ("", "no_derivative", "second_backward") or (line := where()) is None:
        return
    values = {"place": _at(line), "source": line.source}
    if kind == "view_of_a_function":
        node = next(filter(None, map(_custom_node, ins)), None)
        made = places.get(node)
        if made is not None and carries_module_hooks(function_of(node)):
            kind = "view_of_a_hook"
            names = hooked()
            values["hooked"] = names[0] if len(names) == 1 else made.module
        values |= {"made": made.label, "made_source": made.source} if made else {}
        kind = "view_of_something" if made is None else kind
    elif kind == "backward_of_many":
        values["shape"] = str(list(ins[0].shape)) if ins else "[…]"
    error.add_note(say(f"diagnosis.torch_error.{kind}", **values))


def note_backward(error: RuntimeError, roots: Iterable[Tensor], places: dict[Node, Where | None]) -> None:
    """Add to the error of a backward the line of the forward, or of the backward, that it is about."""
    kind = kind_of_error(error)
    where = user_line_of(error)
    values: dict[str, Any] = {}
    if kind == "no_derivative":
        named = re.search(r"erivative for '?(?:aten::)?(\w+)", str(error))
        values["op"] = named[1].strip("_") if named else ""
        nodes = (node for root in roots for node in Graph(root).nodes)
        found = (places.get(node) for node in nodes if "NotImplemented" in node.name())
        where = next((place for place in found if place is not None), where)
    if kind and where is not None:
        values |= {"place": _at(where), "source": where.source}
        if kind == "backward_of_many":
            values["shape"] = "[…]"
        error.add_note(say(f"diagnosis.torch_error.{kind}", **values))


def _at(where: Where) -> str:
    """The line, and the module that ran there: one line may call many."""
    return where.label if not where.module else f"{where.label}, {where.module}"


def _custom_node(tensor: Tensor) -> Node | None:
    """The node of a custom Function that returned a tensor, or the tensor that it is a view of."""
    for one in (tensor, base_of(tensor)):
        try:
            node = None if one is None else one.grad_fn
        except RuntimeError:  # torch refuses it once such a view was written to
            continue
        while node is not None and function_of(node) is None and len(node.next_functions) == 1:
            node = node.next_functions[0][0]
        if node is not None and function_of(node) is not None:
            return node
    return None

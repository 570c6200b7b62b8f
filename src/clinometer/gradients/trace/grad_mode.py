"""Where gradients were switched off: the `with torch.no_grad():` above a line that lost its path."""

from __future__ import annotations

import sys
from typing import Any

import torch

from clinometer.gradients.report.places import Where, user_frame
from clinometer.gradients.sandbox.code_origin import is_machinery
from clinometer.torch_internals.frames import switches_grad_mode


class GradOff:
    """The with-blocks and decorated functions that are open now."""

    def __init__(self) -> None:
        self.openers: list[tuple[int, Any]] = []
        """Frame and code of each, outermost first."""

    def switched(self, func: Any, args: tuple[Any, ...]) -> Any:
        """A call that sets the grad mode."""
        before = torch.is_grad_enabled()
        result = func(*args)
        self._changed(before, torch.is_grad_enabled())
        return result

    def inference(self, entered: bool) -> None:
        """inference_mode was entered, or left."""
        self._changed(entered, not entered)

    def place(self, where: Where | None) -> tuple[Where | None, Any]:
        """The line inside the with-block (or the decorated function) under which a path was lost."""
        opener = self.openers[-1]
        frame, inner = sys._getframe(1), None
        while frame is not None:
            if not is_machinery(frame.f_code.co_filename):
                if (id(frame), frame.f_code) == opener:
                    break
                inner = frame
            elif switches_grad_mode(frame.f_code):
                break
            frame = frame.f_back
        else:
            return where, opener
        place = inner if is_machinery(frame.f_code.co_filename) else frame
        if place is None:
            return where, opener
        found = user_frame(place, op="no_grad", module=where.module if where else "")
        return found, (*opener, len(self.openers))

    def _changed(self, before: bool, now: bool) -> None:
        if before and not now:
            frame = sys._getframe(1)
            while frame is not None and is_machinery(frame.f_code.co_filename):
                frame = frame.f_back
            if frame is not None:
                self.openers.append((id(frame), frame.f_code))
        elif now and not before and self.openers:
            self.openers.pop()

"""Asking diagnose() in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from clinometer.gradients.diagnosis import diagnose
from clinometer.messages import LANGUAGES


def diagnose_now(model: Any, closure: Callable[[], Any]) -> dict[str, Any]:
    """The data of a "report" event: the diagnosis of this batch, or why there is none."""
    try:
        with torch.enable_grad():
            result = diagnose(model, closure)
    except Exception as error:
        return {"kind": "diagnosis", "title": "Diagnosis", "error": f"{type(error).__name__}: {error}"}
    text = {language: result.render(language) for language in LANGUAGES}
    return {"kind": "diagnosis", "title": "Diagnosis", "document": result.to_dict(), "text": text}

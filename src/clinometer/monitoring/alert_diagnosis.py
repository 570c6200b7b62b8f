"""Running diagnose() in the middle of a run, and results as the data of an event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from clinometer.gradients.diagnose.diagnose import diagnose
from clinometer.gradients.report.result import Result
from clinometer.messages import LANGUAGES


def diagnose_now(model: Any, closure: Callable[[], Any]) -> dict[str, Any]:
    """The data of a "report" event: the diagnosis of this batch, or the error that prevented it."""
    try:
        with torch.enable_grad():
            result = diagnose(model, closure)
    except Exception as error:
        return {"kind": "diagnosis", "title": "Diagnosis", "error": f"{type(error).__name__}: {error}"}
    return report_data(result)


def report_data(result: Result) -> dict[str, Any]:
    """The data of a "report" event: a diagnosis or a check, as a document and as text in every language."""
    name = type(result).__name__
    return {
        "kind": "diagnosis" if name == "Diagnosis" else "check",
        "title": name,
        "document": result.to_dict(),
        "text": {language: result.render(language) for language in LANGUAGES},
    }

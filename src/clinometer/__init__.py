"""Clinometer trains Transformer language models, and shows, checks and explains every gradient.

The names below load on first use: `import clinometer` alone does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from clinometer.gradients.attribute.attribute import attribute as attribute
    from clinometer.gradients.check.accumulation import check_accumulation as check_accumulation
    from clinometer.gradients.check.check_gradients import check_gradients as check_gradients
    from clinometer.gradients.check.leakage import check_causality as check_causality
    from clinometer.gradients.diagnose.diagnose import diagnose as diagnose
    from clinometer.gradients.step.explain_step import explain_step as explain_step
    from clinometer.integrations.loops import watch as watch
    from clinometer.lm.functional import cross_entropy as cross_entropy
    from clinometer.lm.functional import transformer_lm as transformer_lm
    from clinometer.lm.generate import generate as generate
    from clinometer.lm.model import TransformerLM as TransformerLM
    from clinometer.lm.transformer_config import TransformerConfig as TransformerConfig
    from clinometer.messages import InputError as InputError
    from clinometer.messages import set_language as set_language
    from clinometer.optim.adamw import AdamW as AdamW
    from clinometer.optim.clipping import clip_grad_norm_ as clip_grad_norm_
    from clinometer.optim.schedule import cosine_schedule as cosine_schedule
    from clinometer.optim.sgd import SGD as SGD
    from clinometer.text.tokenizer import Tokenizer as Tokenizer

_HOME = {
    "diagnose": "clinometer.gradients.diagnose.diagnose",
    "check_gradients": "clinometer.gradients.check.check_gradients",
    "check_accumulation": "clinometer.gradients.check.accumulation",
    "check_causality": "clinometer.gradients.check.leakage",
    "explain_step": "clinometer.gradients.step.explain_step",
    "attribute": "clinometer.gradients.attribute.attribute",
    "watch": "clinometer.integrations.loops",
    "TransformerConfig": "clinometer.lm.transformer_config",
    "TransformerLM": "clinometer.lm.model",
    "transformer_lm": "clinometer.lm.functional",
    "cross_entropy": "clinometer.lm.functional",
    "generate": "clinometer.lm.generate",
    "InputError": "clinometer.messages",
    "set_language": "clinometer.messages",
    "Tokenizer": "clinometer.text.tokenizer",
    "AdamW": "clinometer.optim.adamw",
    "SGD": "clinometer.optim.sgd",
    "cosine_schedule": "clinometer.optim.schedule",
    "clip_grad_norm_": "clinometer.optim.clipping",
}

__all__ = sorted([*_HOME, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'clinometer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

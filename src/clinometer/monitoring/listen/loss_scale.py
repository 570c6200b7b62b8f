"""What a loss scaler (torch.amp.GradScaler) has done to the gradients of the step under way."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from enum import Enum
from typing import Any

from clinometer.torch_internals.kernels import scale_of


class Scaling(Enum):
    """NOT_SCALED ──scale()──▶ SCALED ──unscale_()──▶ UNSCALED ──the step is complete──▶ NOT_SCALED."""

    NOT_SCALED = "the loss was not scaled"
    SCALED = "the gradients are multiplied by the scale"
    UNSCALED = "the gradients of some optimizer were divided by the scale"


class LossScale:
    """The scaler that the loop uses, if any, and the phase of the step's gradients."""

    def __init__(self) -> None:
        self.phase = Scaling.NOT_SCALED
        self._scaler: Callable[[], Any] = lambda: None

    @property
    def is_used(self) -> bool:
        """Whether the loop uses a scaler: overflowing gradients are then part of its search."""
        return self._scaler() is not None

    def loss_scaled(self, scaler: Any) -> None:
        """`scaler.scale(loss)` was called."""
        if scaler.is_enabled():
            self._scaler = weakref.ref(scaler)
            if self.phase is Scaling.NOT_SCALED:
                self.phase = Scaling.SCALED

    def unscaled(self) -> None:
        """`scaler.unscale_(optimizer)` was called."""
        if self.phase is Scaling.SCALED:
            self.phase = Scaling.UNSCALED

    def step_complete(self) -> None:
        """The next step's loss has not been scaled yet."""
        self.phase = Scaling.NOT_SCALED

    def of_loss(self) -> Any:
        """The scale in the loss that was differentiated; None if it was not scaled."""
        scaler = self._scaler()
        return scale_of(scaler) if scaler is not None and self.phase is not Scaling.NOT_SCALED else None

    def value(self) -> Any:
        """A copy of the scaler's scale now, on its device; None without a scaler."""
        scaler = self._scaler()
        scale = None if scaler is None else scale_of(scaler)
        return None if scale is None else scale.clone()

"""The alerts `dead` (a gradient of zeros), `no-gradient` (none at all) and `nothing-learns` (neither
anywhere)."""

from __future__ import annotations

import numpy as np

from clinometer.monitoring.alerts.facts import Facts, Trouble, indices_of


class Dead:
    """Every entry of a gradient is exactly zero, for 50 steps, while other tensors have a gradient.

    A zero step or two is usual: what stands above a zero-initialised weight (LoRA's A, a gated branch) has no
    gradient until that weight has moved. A bias beside a weight that has a gradient cancels out of the loss
    (a Wasserstein critic's last one: it adds the same to real and fake), and that is no fault.
    """

    cause, opens, closes = "dead", 50, 10

    def look(self, facts: Facts) -> Trouble | None:
        dead = (facts.of("grad_zeros") == 1) & (facts.numel > 0) & facts.learns & ~facts.replaced
        alive = facts.of("grad_norm") > 0
        if not dead.any() or not alive.any():
            return None
        living = {facts.names[i] for i in np.flatnonzero(alive)}
        for index in np.flatnonzero(dead):
            stem = facts.names[index].removesuffix("bias")
            dead[index] = stem == facts.names[index] or f"{stem}weight" not in living
        if not dead.any():
            return None
        return Trouble("warning", indices_of(dead))


class NoGradient:
    """From the model's first matrix on, tensors have no gradient for 50 steps, though the optimizer holds
    them and other tensors of the step have one: most likely detach() or no_grad() stands between.

    Only with the first matrix among them. Unused tensors usually stand at the end (a pooler, a second task's
    head), and a model with unused tensors is healthy.
    """

    cause, opens, closes = "no-gradient", 50, 3

    def look(self, facts: Facts) -> Trouble | None:
        able = facts.stepped & facts.learns & (facts.numel > 0) & ~facts.replaced
        norm = facts.of("grad_norm")
        first = np.flatnonzero(able & facts.matrix)[:1]
        if not facts.taken or not first.size or not np.isnan(norm[first[0]]):
            return None
        if not (norm[able] > 0).any():
            return None
        return Trouble("warning", indices_of(able & np.isnan(norm)))


class NothingLearns:
    """No tensor of the optimizers has had a gradient other than zero in any step so far, for ten steps.

    Every gradient is None, because no backward reached the tensors or because zero_grad() stands between
    backward and step; or every gradient is exactly zero. A loss that is 0 in all of these steps (rewards
    that are still all 0, a margin that is kept) has no gradient to give: that is a warning.
    """

    cause, opens, closes = "nothing-learns", 10, 1
    LATER_STEPS = 50

    def __init__(self) -> None:
        self._began = False
        self._without = 0
        """Steps in a row in which no tensor had a gradient."""
        self._loss_seen = False

    def look(self, facts: Facts) -> Trouble | None:
        able = facts.stepped & facts.learns & (facts.numel > 0)
        norm = facts.of("grad_norm")
        cleared = facts.backwards > 0 and bool(np.isnan(norm).all())
        self._began = self._began or bool((norm[able] > 0).any())
        self._loss_seen = self._loss_seen or facts.scalar("loss") != 0
        if not facts.taken or not able.any():
            return None
        if cleared:
            return Trouble("fault", (), {}, "cleared")
        nothing = np.isnan(norm[able]).all() and not facts.replaced.any()
        self._without = self._without + 1 if nothing else 0
        if self._began and self._without > self.LATER_STEPS - self.opens:
            return Trouble("warning", (), {"since": facts.step - self._without + 1}, "stopped")
        if self._began:
            return None
        if np.isnan(norm[able]).all():
            return Trouble("fault", (), {}, "none")
        return Trouble("fault" if self._loss_seen else "warning", (), {})

"""The optimizers' formulas, one function each, in float64 and by their parts.

A function takes what the optimizer held just before the step and gives what it must hold after it:

    g gradient   m, v running means of g and g²   b momentum buffer   t step, from 1   λ decay
    Δθ = update + decay        update = from earlier batches (momentum) + from this one (fresh)

The parts answer "how much of this step is momentum": the denominator is held as it is, and the numerator,
which is linear in the old m and in g, is taken apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients.optimizers.identity import ancestor_of, has_own_step
from clinometer.gradients.report.document import NBSP
from clinometer.gradients.step import torch_formulas as others
from clinometer.gradients.step.optimizer_state import (
    OptimizerState,
    Quantity,
    ReplayedUpdate,
    or_zero,
    wide,
)


def sgd(held: OptimizerState) -> ReplayedUpdate:
    """g ← g + λθ;  b ← μ b + (1−τ) g (at first b ← g);  θ ← θ − lr b, with Nesterov θ ← θ − lr (g + μ b).

    Source: torch.optim.SGD; Sutskever et al. 2013.
    """
    lr, mu = held.number("lr", "alpha"), held.number("momentum")
    tau, decay_rate = held.number("dampening"), held.number("weight_decay")
    theta, g = wide(held.theta), held.signed_grad
    old = held.kept("momentum_buffer") if mu else None
    first = mu == 0 or old is None
    nesterov = bool(held.option("nesterov")) and mu != 0
    b_old = torch.zeros_like(theta) if old is None else old
    taken = 1.0 if first else 1.0 - tau
    b = mu * b_old + taken * (g + decay_rate * theta)
    of_g = 1.0 + mu * taken if nesterov else taken
    of_b = (mu * mu if nesterov else mu) if mu else 0.0

    momentum, fresh = -lr * of_b * b_old, -lr * of_g * g
    decay = -lr * of_g * decay_rate * theta
    quantities = [Quantity("gradient", "g", None, g)]
    if mu:
        formula = "μ b + (1−τ) (g + λθ)" if tau else "μ b + g + λθ" if decay_rate else "μ b + g"
        quantities.append(Quantity("momentum", "b", b_old, b, "b = g" if first else formula))
    quantities.append(Quantity("rate", "lr", None, lr))
    step = "−lr (g + μ b)" if nesterov else "−lr b" if mu else "−lr g"
    quantities.append(Quantity("update", "", None, momentum + fresh, step))
    if decay_rate:
        quantities.append(Quantity("decay", "", None, decay, f"−lr (λθ in g), λ = {decay_rate:g}"))
    return ReplayedUpdate(
        tuple(quantities),
        update=momentum + fresh,
        decay=decay,
        momentum=momentum,
        fresh=fresh,
        theta=theta + momentum + fresh + decay,
        rounded=momentum.abs() + fresh.abs() + decay.abs(),
        numbers={"lr": lr, "momentum": mu, "dampening": tau, "weight_decay": decay_rate},
    )


def adam(held: OptimizerState) -> ReplayedUpdate:
    """m ← β₁m + (1−β₁)g;  v ← β₂v + (1−β₂)g²;  θ ← θ − lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε), g with λθ in it.

    With amsgrad √v is the largest so far. Source: torch.optim.Adam; Kingma & Ba 2015, Reddi et al. 2018.
    """
    return _adam(held, decoupled=bool(held.option("decoupled_weight_decay")))


def adamw(held: OptimizerState) -> ReplayedUpdate:
    """θ ← θ − lr λ θ, then Adam's update with g alone.

    Source: torch.optim.AdamW; Loshchilov & Hutter 2019.
    """
    return _adam(held, decoupled=True)


def adamw_after(held: OptimizerState) -> ReplayedUpdate:
    """θ ← θ − lr √(1−β₂ᵗ)/(1−β₁ᵗ) · m / (√v + ε), then θ ← θ − lr λ θ on what came out.

    Source: Kingma & Ba 2015 §2, the efficient order; Loshchilov & Hutter 2019. Clinometer's own AdamW.
    """
    return _adam(held, decoupled=True, decay_after=True, efficient=True)


def _adam(
    held: OptimizerState,
    *,
    decoupled: bool,
    decay_after: bool = False,
    efficient: bool = False,
    eps_inside: bool = False,
    corrected: bool = True,
) -> ReplayedUpdate:
    lr, eps, decay_rate = (
        held.number("lr", "alpha"),
        held.number("eps", "epsilon"),
        held.number("weight_decay"),
    )
    (beta1, beta2), t = held.betas, held.t
    theta, g = wide(held.theta), held.signed_grad
    m_old = or_zero(held.kept("exp_avg", "m"), theta)
    v_old = or_zero(held.kept("exp_avg_sq", "v"), theta)
    penalty = torch.zeros_like(theta) if decoupled else decay_rate * theta
    m = beta1 * m_old + (1 - beta1) * (g + penalty)
    v = beta2 * v_old + (1 - beta2) * (g + penalty).square()
    correction1, correction2 = (1 - beta1**t, 1 - beta2**t) if corrected else (1.0, 1.0)
    if t == 0 and corrected:  # a count that somebody else keeps: no step of Adam begins at 0
        correction1 = correction2 = math.nan
    quantities = [
        Quantity("gradient", "g", None, g),
        Quantity("momentum", "m", m_old, m, "β₁ m + (1−β₁) g" if decoupled else "β₁ m + (1−β₁) (g + λθ)"),
        Quantity("scale", "√v", v_old.sqrt(), v.sqrt(), "v: β₂ v + (1−β₂) g²"),
    ]
    used, sign = v, "v"
    if held.option("amsgrad"):
        largest = or_zero(held.kept("max_exp_avg_sq"), theta)
        used, sign = torch.maximum(largest, v), "v̂"
        quantities.append(Quantity("largest", "√v̂", largest.sqrt(), used.sqrt(), "v̂: max(v̂, v)"))
    if efficient:
        rate, shrink = lr * math.sqrt(correction2) / correction1, 1.0
        rate_formula, denominator_formula = f"lr √(1−β₂ᵗ)/(1−β₁ᵗ), lr{NBSP}={NBSP}{lr:.4g}", f"√{sign} + ε"
    else:
        rate, shrink = lr / correction1, math.sqrt(correction2)
        rate_formula, denominator_formula = f"lr/(1−β₁ᵗ), lr{NBSP}={NBSP}{lr:.4g}", f"√{sign}/√(1−β₂ᵗ) + ε"
    denominator = (used / shrink**2 + eps).sqrt() if eps_inside else used.sqrt() / shrink + eps
    momentum = -rate * beta1 * m_old / denominator
    fresh = -rate * (1 - beta1) * g / denominator
    update = momentum + fresh
    coupled = -rate * (1 - beta1) * penalty / denominator
    if not decoupled:
        decay, decay_formula = coupled, f"−lr_t (1−β₁) λθ / d, λ = {decay_rate:g}"
    elif decay_after:
        decay, decay_formula = -lr * decay_rate * (theta + update), f"−lr λ θ, λ = {decay_rate:g}"
    else:
        decay, decay_formula = -lr * decay_rate * theta, f"−lr λ θ, λ = {decay_rate:g}"
    quantities += [
        Quantity("rate", "lr_t", None, rate, rate_formula),
        Quantity("denominator", "d", None, denominator, denominator_formula),
        Quantity("update", "", None, update, "−lr_t m / d"),
    ]
    if decay_rate:
        quantities.append(Quantity("decay", "", None, decay, decay_formula))
    return ReplayedUpdate(
        tuple(quantities),
        update=update,
        decay=decay,
        momentum=momentum,
        fresh=fresh,
        theta=theta + update + decay,
        rounded=momentum.abs() + fresh.abs() + coupled.abs(),
        numbers={
            "lr": lr,
            "lr_t": rate,
            "beta1": beta1,
            "beta2": beta2,
            "eps": eps,
            "weight_decay": decay_rate,
            "t": t,
            "bias_correction1": correction1,
            "bias_correction2": correction2,
        },
    )


def muon(held: OptimizerState) -> ReplayedUpdate:
    """b ← μ b + (1−μ) g;  O = Newton-Schulz of b (Nesterov: of (1−μ) g + μ b);  θ ← θ − lr λ θ − lr' O.

    O depends on the whole matrix, and torch computes it in bfloat16: it is computed here by the same
    operations, for a float64 one would be another direction. Source: torch.optim.Muon; Jordan et al. 2024.
    """
    lr, mu, decay_rate = held.number("lr"), held.number("momentum"), held.number("weight_decay")
    theta, g = wide(held.theta), wide(held.grad)
    buffer = held.state.get("momentum_buffer")
    buffer = torch.zeros_like(held.grad) if buffer is None else buffer
    nesterov = bool(held.option("nesterov"))
    stored = buffer.lerp(held.grad, 1 - mu)
    direction = held.grad.lerp(stored, mu) if nesterov else stored
    coefficients, steps = held.options["ns_coefficients"], int(held.options["ns_steps"])
    orthogonal = wide(_newton_schulz(direction, coefficients, steps, held.number("eps")))
    rows, columns = held.theta.shape
    adjust = held.option("adjust_lr_fn")
    if adjust in (None, "original"):
        rate, rate_formula = lr * math.sqrt(max(1, rows / columns)), "lr √max(1, n₀/n₁)"
    elif adjust == "match_rms_adamw":
        rate, rate_formula = lr * 0.2 * math.sqrt(max(rows, columns)), "0.2 lr √max(n₀, n₁)"
    else:
        rate, rate_formula = lr, ""
    update, decay = -rate * orthogonal, -lr * decay_rate * theta
    of_b, of_g = (mu * mu, 1 - mu * mu) if nesterov else (mu, 1 - mu)
    old = wide(buffer)
    quantities = [
        Quantity("gradient", "g", None, g),
        Quantity("momentum", "b", old, mu * old + (1 - mu) * g, "μ b + (1−μ) g"),
        Quantity(
            "direction",
            "O",
            None,
            orthogonal,
            "O Oᵀ ≈ I: NS((1−μ) g + μ b)" if nesterov else "O Oᵀ ≈ I: NS(b)",
        ),
        Quantity("rate", "lr'", None, rate, f"{rate_formula}, lr{NBSP}={NBSP}{lr:.4g}".lstrip(", ")),
        Quantity("update", "", None, update, "−lr' O"),
    ]
    if decay_rate:
        quantities.append(Quantity("decay", "", None, decay, f"−lr λ θ, λ = {decay_rate:g}"))
    return ReplayedUpdate(
        tuple(quantities),
        update=update,
        decay=decay,
        momentum=of_b * old,
        fresh=of_g * g,
        theta=theta + update + decay,
        rounded=update.abs(),
        numbers={"lr": lr, "lr_t": rate, "momentum": mu, "weight_decay": decay_rate},
    )


def _newton_schulz(matrix: Tensor, coefficients: tuple[float, ...], steps: int, eps: float) -> Tensor:
    """X ← aX + (bA + cA²)X with A = XXᵀ: every singular value moves towards 1. In bfloat16."""
    a, b, c = coefficients
    x = matrix.bfloat16()
    tall = matrix.size(0) > matrix.size(1)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


Formula = Callable[[OptimizerState], ReplayedUpdate]


@dataclass(frozen=True)
class RegisteredFormula:
    """One line of FORMULAS: a formula, and the optimizers that follow it."""

    name: str
    """What an optimizer's attribute `formula` says, and an anatomy shows."""
    replay: Formula
    torchs: str
    """The name in torch.optim of the class that follows it; "" if none of torch's does."""
    options: frozenset[str]
    """What an optimizer that follows it has in its param_groups."""
    of_whole: bool = False
    """Whether an entry depends on the rest of its tensor."""

    def __call__(self, state: OptimizerState) -> ReplayedUpdate:
        """Returns what the formula makes of a state."""
        return self.replay(state)


def _registered(name: str, replay: Formula, torchs: str, options: str, *, of_whole: bool = False) -> Any:
    return RegisteredFormula(name, replay, torchs, frozenset(options.split()), of_whole)


# To add an optimizer: its function, and its line here. Of several formulas that may fit, the likeliest first.
_REGISTERED = (
    _registered("sgd", sgd, "SGD", "lr"),
    _registered("adam", adam, "Adam", "lr betas eps"),
    _registered("adamw", adamw, "AdamW", "lr betas eps"),
    _registered("adamw-after", adamw_after, "", "lr betas eps"),
    _registered("muon", muon, "Muon", "lr momentum ns_coefficients ns_steps eps", of_whole=True),
    _registered("rmsprop", others.rmsprop, "RMSprop", "lr alpha eps"),
    _registered("adagrad", others.adagrad, "Adagrad", "lr lr_decay eps"),
    _registered("adadelta", others.adadelta, "Adadelta", "lr rho eps"),
    _registered("adamax", others.adamax, "Adamax", "lr betas eps"),
    _registered("nadam", others.nadam, "NAdam", "lr betas eps momentum_decay"),
    _registered("radam", others.radam, "RAdam", "lr betas eps"),
    _registered("asgd", others.asgd, "ASGD", "lr lambd alpha t0"),
    _registered("rprop", others.rprop, "Rprop", "lr etas step_sizes"),
    _registered("adafactor", others.adafactor, "Adafactor", "lr beta2_decay eps d", of_whole=True),
)
FORMULAS: dict[str, RegisteredFormula] = {formula.name: formula for formula in _REGISTERED}

SLIPS: dict[str, Formula] = {
    "eps-inside": lambda held: _adam(held, decoupled=True, eps_inside=True),
    "eps-inside-after": lambda held: _adam(
        held, decoupled=True, eps_inside=True, decay_after=True, efficient=True
    ),
    "uncorrected": lambda held: _adam(held, decoupled=True, corrected=False),
    "uncorrected-after": lambda held: _adam(held, decoupled=True, corrected=False, decay_after=True),
    "coupled": lambda held: _adam(held, decoupled=False),
    "decay-after": lambda held: _adam(held, decoupled=True, decay_after=True),
    "eps-uncorrected": lambda held: _adam(held, decoupled=True, efficient=True),
}
"""What an Adam that misses its formula may be doing instead; the key is that of its sentence."""


@dataclass(frozen=True)
class Claim:
    """Which formulas an optimizer may follow, the likeliest first, and how that is known."""

    formulas: tuple[str, ...]
    basis: str
    """"stated" (by its attribute `formula`), "torch" (its step is that of a class of torch.optim),
    "descent" (a step of its own, in a subclass of torch's), or "fit" (it is known only if what it does
    fits)."""

    @property
    def is_held_to(self) -> bool:
        """Whether a step that differs from the formula is a fault. A step of its own may differ on
        purpose."""
        return self.basis in ("stated", "torch")


def claim_of(optimizer: Any) -> Claim:
    """The formula an optimizer claims by what it states or by the identity of its class, never by a name.

    Of any other class the formulas whose options it has; one of them is its formula if all it does fits.
    """
    for cls in type(optimizer).__mro__:
        stated = cls.__dict__.get("formula")
        if isinstance(stated, str) and stated in FORMULAS:
            return Claim((stated,), "stated")
    given = set(optimizer.param_groups[0]) if optimizer.param_groups else set()
    ancestor = ancestor_of(optimizer)
    for formula in _REGISTERED:
        if ancestor is not None and formula.torchs == ancestor.__name__ and formula.options <= given:
            return Claim((formula.name,), "descent" if has_own_step(optimizer) else "torch")
    if ancestor is not None and not has_own_step(optimizer):
        return Claim((), "torch")  # LBFGS, SparseAdam
    return Claim(tuple(f.name for f in _REGISTERED if f.options <= given), "fit")

"""The formulas of the rest of torch.optim: RMSprop, Adagrad, Adadelta, Adamax, NAdam, RAdam, ASGD, Rprop,
Adafactor.

As in formulas.py: from what the optimizer held before the step to what it must hold after it, in float64.
Where the result depends on a rounding that is not the last one (a sign, a norm of many entries), the
operation is torch's own in the tensor's own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from clinometer.gradients.report.document import NBSP
from clinometer.gradients.step.optimizer_state import (
    OptimizerState,
    Quantity,
    ReplayedUpdate,
    or_zero,
    real_pairs,
    wide,
)


def rmsprop(held: OptimizerState) -> ReplayedUpdate:
    """v ← α v + (1−α) g²;  d = √v + ε, centred √(v − ḡ²) + ε;  b ← μ b + g/d;  θ ← θ − lr b, g with λθ in it.

    Source: torch.optim.RMSprop; Tieleman & Hinton 2012, Graves 2013.
    """
    lr, alpha, eps = held.number("lr"), held.number("alpha"), held.number("eps")
    mu, decay_rate = held.number("momentum"), held.number("weight_decay")
    theta, g = wide(held.theta), held.signed_grad
    pushed = g + decay_rate * theta
    v_old = or_zero(held.kept("square_avg"), theta)
    v = alpha * v_old + (1 - alpha) * pushed.square()
    used = v
    if held.option("centered"):
        mean = or_zero(held.kept("grad_avg"), theta)
        used = v - (mean + (1 - alpha) * (pushed - mean)).square()
    denominator = used.sqrt() + eps
    b_old = or_zero(held.kept("momentum_buffer"), theta)
    momentum = -lr * mu * b_old
    fresh, decay = -lr * g / denominator, -lr * decay_rate * theta / denominator
    quantities = [
        Quantity("gradient", "g", None, g),
        Quantity("scale", "√v", v_old.sqrt(), v.sqrt(), "v: α v + (1−α) g²"),
        Quantity(
            "denominator", "d", None, denominator, "√(v − ḡ²) + ε" if held.option("centered") else "√v + ε"
        ),
    ]
    if mu:
        b = mu * b_old + pushed / denominator
        quantities.append(Quantity("momentum", "b", b_old, b, "μ b + g/d"))
    numbers = {"lr": lr, "alpha": alpha, "eps": eps, "momentum": mu, "weight_decay": decay_rate}
    step = "−lr b" if mu else "−lr g / d"
    return _update(theta, quantities, (momentum, fresh, decay), step, numbers)


def adagrad(held: OptimizerState) -> ReplayedUpdate:
    """s ← s + g²;  θ ← θ − lr/(1 + (t−1) η) · g / (√s + ε), g with λθ in it.

    Source: torch.optim.Adagrad; Duchi et al. 2011.
    """
    lr, eps, decay_rate = held.number("lr"), held.number("eps"), held.number("weight_decay")
    theta, g = wide(held.theta), held.signed_grad
    old = or_zero(held.kept("sum"), theta)
    new = old + (g + decay_rate * theta).square()
    rate, denominator = lr / (1 + (held.t - 1) * held.number("lr_decay")), new.sqrt() + eps
    quantities = [
        Quantity("gradient", "g", None, g),
        Quantity("scale", "√s", old.sqrt(), new.sqrt(), "s: s + g²"),
        Quantity("rate", "lr_t", None, rate, f"lr/(1 + (t−1) η), lr{NBSP}={NBSP}{lr:.4g}"),
        Quantity("denominator", "d", None, denominator, "√s + ε"),
    ]
    parts = torch.zeros_like(theta), -rate * g / denominator, -rate * decay_rate * theta / denominator
    numbers = {"lr": lr, "lr_t": rate, "eps": eps, "weight_decay": decay_rate, "t": held.t}
    return _update(theta, quantities, parts, "−lr_t g / d", numbers)


def adadelta(held: OptimizerState) -> ReplayedUpdate:
    """v ← ρ v + (1−ρ) g²;  Δ = √(u+ε)/√(v+ε) · g;  u ← ρ u + (1−ρ) Δ²;  θ ← θ − lr Δ, g with λθ in it.

    Source: torch.optim.Adadelta; Zeiler 2012.
    """
    lr, rho, eps, decay_rate = (held.number(key) for key in ("lr", "rho", "eps", "weight_decay"))
    theta, g = wide(held.theta), held.signed_grad
    v_old, u = or_zero(held.kept("square_avg"), theta), or_zero(held.kept("acc_delta"), theta)
    v = rho * v_old + (1 - rho) * (g + decay_rate * theta).square()
    rate = lr * (u + eps).sqrt() / (v + eps).sqrt()
    quantities = [
        Quantity("gradient", "g", None, g),
        Quantity("scale", "√v", v_old.sqrt(), v.sqrt(), "v: ρ v + (1−ρ) g²"),
        Quantity("rate", "lr_t", None, rate, f"lr √(u+ε)/√(v+ε), lr{NBSP}={NBSP}{lr:.4g}"),
    ]
    parts = torch.zeros_like(theta), -rate * g, -rate * decay_rate * theta
    numbers = {"lr": lr, "rho": rho, "eps": eps, "weight_decay": decay_rate}
    return _update(theta, quantities, parts, "−lr_t g", numbers)


def adamax(held: OptimizerState) -> ReplayedUpdate:
    """m ← β₁ m + (1−β₁) g;  u ← max(β₂ u, |g| + ε);  θ ← θ − lr/(1−β₁ᵗ) · m/u, g with λθ in it.

    Source: torch.optim.Adamax; Kingma & Ba 2015, §7.1.
    """
    lr, eps, decay_rate = held.number("lr"), held.number("eps"), held.number("weight_decay")
    (beta1, beta2), t = held.betas, held.t
    theta, g = wide(held.theta), held.signed_grad
    m_old, u_old = or_zero(held.kept("exp_avg"), theta), or_zero(held.kept("exp_inf"), theta)
    pushed = g + decay_rate * theta
    u = torch.maximum(beta2 * u_old, pushed.abs() + eps)
    rate = lr / (1 - beta1**t)
    quantities = [
        Quantity("gradient", "g", None, g),
        Quantity("momentum", "m", m_old, beta1 * m_old + (1 - beta1) * pushed, "β₁ m + (1−β₁) g"),
        Quantity("largest", "u", u_old, u, "max(β₂ u, |g| + ε)"),
        Quantity("rate", "lr_t", None, rate, f"lr/(1−β₁ᵗ), lr{NBSP}={NBSP}{lr:.4g}"),
    ]
    parts = (
        -rate * beta1 * m_old / u,
        -rate * (1 - beta1) * g / u,
        -rate * (1 - beta1) * decay_rate * theta / u,
    )
    numbers = {"lr": lr, "lr_t": rate, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": decay_rate}
    return _update(theta, quantities, parts, "−lr_t m / u", {**numbers, "t": t})


def nadam(held: OptimizerState) -> ReplayedUpdate:
    """m, v as in Adam;  μ_t = β₁ (1 − 0.96^{tψ}/2);  θ ← θ − lr [(1−μ_t)/(1−Πμ) g + μ_{t+1}/(1−Πμ μ_{t+1})
    m] / d.

    Source: torch.optim.NAdam; Dozat 2016.
    """
    moments = _Moments(held)
    beta1, lr, t, psi = moments.beta1, moments.lr, held.t, held.number("momentum_decay")
    mu, following = (beta1 * (1 - 0.5 * 0.96 ** (n * psi)) for n in (t, t + 1))
    kept = held.state.get("mu_product", torch.tensor(1.0, dtype=_count_dtype()))
    product = float(kept * mu)
    of_g, of_m = lr * (1 - mu) / (1 - product), lr * following / (1 - product * following)
    denominator = (moments.v / (1 - moments.beta2**t)).sqrt() + moments.eps
    fresh = -(of_g + of_m * (1 - beta1)) * moments.g / denominator
    coupled = -(of_g + of_m * (1 - beta1)) * moments.penalty / denominator
    momentum = -of_m * beta1 * moments.m_old / denominator
    quantities = [*moments.quantities(), Quantity("denominator", "d", None, denominator, "√v/√(1−β₂ᵗ) + ε")]
    return _update(
        moments.theta, quantities, (momentum, fresh, coupled + moments.shrink), "", moments.numbers(lr_t=of_m)
    )


def radam(held: OptimizerState) -> ReplayedUpdate:
    """m, v as in Adam;  θ ← θ − lr/(1−β₁ᵗ) m r √(1−β₂ᵗ)/(√v + ε) once ρ_t > 5, before that θ ← θ −
    lr/(1−β₁ᵗ) m.

    Source: torch.optim.RAdam; Liu et al. 2020.
    """
    moments = _Moments(held)
    beta1, beta2, t = moments.beta1, moments.beta2, held.t
    correction = 1 - beta2**t
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / correction
    rate = moments.lr / (1 - beta1**t)
    scale = torch.ones_like(moments.theta)
    if length > 5:
        rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        scale = math.sqrt(rectified) * math.sqrt(correction) / (moments.v.sqrt() + moments.eps)
    momentum = -rate * beta1 * moments.m_old * scale
    fresh, coupled = (-rate * (1 - beta1) * part * scale for part in (moments.g, moments.penalty))
    quantities = [
        *moments.quantities(),
        Quantity("rate", "lr_t", None, rate * scale, f"lr{NBSP}={NBSP}{moments.lr:.4g}"),
    ]
    parts = momentum, fresh, coupled + moments.shrink
    return _update(moments.theta, quantities, parts, "−lr_t m", moments.numbers(lr_t=rate))


def asgd(held: OptimizerState) -> ReplayedUpdate:
    """θ ← (1 − λ' η) θ − η (g + λθ), with η ← lr/(1 + λ' lr t)^α after the step.

    Source: torch.optim.ASGD; Polyak & Juditsky 1992.
    """
    lr, shrink, decay_rate = held.number("lr"), held.number("lambd"), held.number("weight_decay")
    theta, g = wide(held.theta), held.signed_grad
    rate = float(held.state.get("eta", torch.tensor(lr, dtype=_count_dtype())))
    quantities = [
        Quantity("gradient", "g", None, g),
        Quantity("rate", "η", None, rate, f"lr{NBSP}={NBSP}{lr:.4g}"),
    ]
    parts = torch.zeros_like(theta), -rate * g, -rate * (decay_rate + shrink) * theta
    numbers = {"lr": lr, "lr_t": rate, "weight_decay": decay_rate + shrink}
    return _update(theta, quantities, parts, "−η g", numbers)


def rprop(held: OptimizerState) -> ReplayedUpdate:
    """η ← η η₊ where g keeps its sign, η η₋ where it turns (and g counts as 0 there);  θ ← θ − sign(g) η.

    Source: torch.optim.Rprop; Riedmiller & Braun 1993.
    """
    lr = held.number("lr")
    shrunk, grown = (float(x) for x in held.options["etas"])
    smallest, largest = (float(x) for x in held.options["step_sizes"])
    theta, g = wide(held.theta), held.signed_grad
    old = held.kept("step_size")
    old = torch.full_like(theta, lr) if old is None else old
    previous, real = held.state.get("prev"), real_pairs(held.grad)
    # In torch's own dtype and operations: the product may vanish, and a factor written into a float64
    # tensor by an index is rounded to float32.
    factor = (torch.zeros_like(real) if previous is None else real * real_pairs(previous)).sign()
    factor = -factor if held.option("maximize") else factor
    if held.option("capturable"):
        factor = torch.where(factor > 0, grown, torch.where(factor < 0, shrunk, 1.0)).to(factor.dtype)
    else:
        factor[factor.gt(0)], factor[factor.lt(0)], factor[factor.eq(0)] = grown, shrunk, 1
    turned = factor.eq(shrunk)
    size = (old * wide(factor)).clamp(smallest, largest)
    fresh = -torch.where(turned, 0.0, g).sign() * size
    quantities = [
        Quantity("gradient", "g", None, g),
        Quantity("rate", "η", old, size, "η η₊ or η η₋"),
    ]
    zero = torch.zeros_like(theta)
    return _update(theta, quantities, (zero, fresh, zero), "−sign(g) η", {"lr": lr})


def adafactor(held: OptimizerState) -> ReplayedUpdate:
    """θ ← (1 − lr λ) θ − α u/max(1, RMS(u)/d), u = g/√v̂, α = max(ε₂, RMS(θ)) min(lr, 1/√t).

    v̂ is the outer product of the running means of g² over rows and over columns; of a vector v itself.
    Source: torch.optim.Adafactor; Shazeer & Stern 2018.
    """
    lr, decay_rate, t = held.number("lr"), held.number("weight_decay"), held.t
    eps1, eps2 = held.options["eps"]
    eps1 = torch.finfo(held.theta.dtype).eps if eps1 is None else float(eps1)
    theta, g = wide(held.theta), held.signed_grad
    taken = t ** held.number("beta2_decay")
    count = max(held.theta.numel(), 1)
    size = max(float(eps2), held.theta.norm(2).item() / math.sqrt(count))
    alpha = size * min(lr, 1 / math.sqrt(t))
    if held.grad.dim() > 1:
        means = [wide(held.grad.norm(dim=d, keepdim=True)).square() / held.grad.size(d) for d in (-1, -2)]
        rows, columns = (
            old + taken * (mean - old)
            for mean, key in zip(means, ("row_var", "col_var"), strict=True)
            for old in (or_zero(held.kept(key), mean),)
        )
        v = rows @ columns / rows.mean(dim=-2, keepdim=True).clamp(min=eps1)
    else:
        old = or_zero(held.kept("variance"), theta)
        v = old + taken * (g.square() - old)
    direction = g * v.clamp(min=eps1 * eps1).rsqrt()
    length = direction.to(held.theta.dtype).norm(2).item() / (
        math.sqrt(count) * held.number("d", default=1.0)
    )
    rate = alpha / max(1.0, length)
    quantities = [
        Quantity("gradient", "g", None, g),
        Quantity(
            "scale", "√v̂", None, v.sqrt(), "v̂: rows × columns of mean g²" if g.dim() > 1 else "v: mean of g²"
        ),
        Quantity("rate", "lr_t", None, rate, f"α/max(1, RMS(u)/d), lr{NBSP}={NBSP}{lr:.4g}"),
    ]
    zero = torch.zeros_like(theta)
    parts = zero, -rate * direction, -lr * decay_rate * theta
    return _update(
        theta, quantities, parts, "−lr_t g/√v̂", {"lr": lr, "lr_t": rate, "weight_decay": decay_rate, "t": t}
    )


class _Moments:
    """What NAdam and RAdam share with Adam: m, v, and decay inside the gradient or on the weight itself."""

    def __init__(self, held: OptimizerState) -> None:
        self.lr, self.eps, self.decay_rate = (
            held.number("lr"),
            held.number("eps"),
            held.number("weight_decay"),
        )
        (self.beta1, self.beta2), self.t = held.betas, held.t
        self.theta, self.g = wide(held.theta), held.signed_grad
        decoupled = bool(held.option("decoupled_weight_decay"))
        self.penalty = (0.0 if decoupled else self.decay_rate) * self.theta
        self.shrink = (-self.lr * self.decay_rate if decoupled else 0.0) * self.theta
        self.m_old = or_zero(held.kept("exp_avg"), self.theta)
        self.v_old = or_zero(held.kept("exp_avg_sq"), self.theta)
        pushed = self.g + self.penalty
        self.m = self.beta1 * self.m_old + (1 - self.beta1) * pushed
        self.v = self.beta2 * self.v_old + (1 - self.beta2) * pushed.square()

    def quantities(self) -> list[Quantity]:
        return [
            Quantity("gradient", "g", None, self.g),
            Quantity("momentum", "m", self.m_old, self.m, "β₁ m + (1−β₁) g"),
            Quantity("scale", "√v", self.v_old.sqrt(), self.v.sqrt(), "v: β₂ v + (1−β₂) g²"),
        ]

    def numbers(self, *, lr_t: float) -> dict[str, float]:
        found = {"lr": self.lr, "lr_t": lr_t, "beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}
        return {**found, "weight_decay": self.decay_rate, "t": self.t}


def _update(
    theta: Tensor,
    quantities: list[Quantity],
    parts: tuple[Tensor, Tensor, Tensor],
    step: str,
    numbers: Mapping[str, float],
) -> ReplayedUpdate:
    """`parts`: momentum, fresh and decay; `step`: the update as a formula."""
    momentum, fresh, decay = parts
    update = momentum + fresh
    quantities = [*quantities, Quantity("update", "", None, update, step)]
    if decay_rate := numbers.get("weight_decay"):
        quantities.append(Quantity("decay", "", None, decay, f"λ = {decay_rate:g}"))
    return ReplayedUpdate(
        tuple(quantities),
        update=update,
        decay=decay,
        momentum=momentum,
        fresh=fresh,
        theta=theta + update + decay,
        rounded=momentum.abs() + fresh.abs() + decay.abs(),
        numbers=numbers,
    )


def _count_dtype() -> torch.dtype:
    """The dtype in which torch keeps the scalars of a state."""
    return torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32

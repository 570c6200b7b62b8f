"""AdamW's arithmetic: against a float64 replay, against torch.optim.AdamW, and in every dtype."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clinometer.optim import adamw
from clinometer.optim.adamw import AdamW

UNFUSED = float(torch.backends.cpu.get_cpu_capability() == "DEFAULT")
"""1 where torch's kernels round a product before they add it: processors without AVX2."""
PATHS = pytest.mark.parametrize("fused", [None, False], ids=["fast", "reference"])


def replay(
    theta: Tensor, m: Tensor, v: Tensor, g: Tensor, t: int, group: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas of METHODS in float64, from float32 inputs."""
    theta, m, v, g = theta.double(), m.double(), v.double(), g.double()
    lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    lr_t = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
    theta = theta - lr_t * m / (v.sqrt() + eps)
    theta = theta - lr * group["weight_decay"] * theta
    return theta, m, v


def ulp_of(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place of numbers of this size in `dtype`."""
    finfo = torch.finfo(dtype)
    bits = scale.double().clamp_min(finfo.tiny).view(torch.int64)
    return finfo.eps * (bits & 0x7FF << 52).view(torch.float64)  # without its mantissa: a power of two


def ulps(got: Tensor, want: Tensor, old: Tensor) -> Tensor:
    """|got − want| in units in the last place of max(|old|, |got|), in `got`'s dtype."""
    scale = torch.maximum(old.abs(), got.abs())
    return (got.double() - want).abs() / ulp_of(scale, got.dtype)


def test_ulps_counts_neighbouring_floats() -> None:
    one = torch.tensor([1.0])
    above = torch.nextafter(one, torch.tensor([2.0]))
    assert ulps(above, one.double(), one) == 1.0
    assert ulps(torch.nextafter(above, torch.tensor([2.0])), one.double(), one) == 2.0


KEYS = ("exp_avg", "exp_avg_sq")


def joined(tensors: list[Tensor]) -> Tensor:
    """A copy of their entries, one after the other."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


SETTINGS = {
    "usual": ({}, 1.0),
    "cs336": ({"betas": (0.9, 0.95), "weight_decay": 0.1, "lr": 3e-3}, 1.0),
    "heavy decay": ({"weight_decay": 50.0, "lr": 1e-2}, 1.0),
    "tiny gradients": ({"weight_decay": 0.1}, 1e-12),
    "large eps": ({"eps": 1e-2}, 1e-3),
    "no memory": ({"betas": (0.0, 0.0)}, 1.0),
}


@PATHS
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_thousand_steps_agree_with_the_float64_replay_to_4_ulp(setting: str, fused: bool | None) -> None:
    """The reference everywhere; float32 arithmetic wherever a weight is not smaller than one update.

    Where it is, and the gradient happens to cancel the momentum, what is left in θ is the rounding of the old
    momentum (2.4 ulp of it), which max(|θ_old|, |θ_new|) does not see: under heavy decay, torch's own AdamW
    was 93 ulp from its own replay. There the bound is 4 ulp of the weight and 2.4 of the update.

    The moment m' = m + (1−β)(g−m) is within 2.5 ulp where multiplication and addition are fused.
    Elsewhere the product is rounded, too. It is m' − m, at most 2·max(|m|, |m'|), so half of its ulp is
    at most one ulp more. Through the update this reaches θ, which was 4.25 ulp away under heavy decay;
    one more is allowed there, too.
    """
    options, size = SETTINGS[setting]
    generator = torch.Generator().manual_seed(7)
    shapes = [(33, 17), (64,), (), (129, 130)]  # the last is too large to be joined with the others
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = AdamW(parameters, **options, fused=fused)
    base = optimizer.param_groups[0]["lr"]
    largest = {key: [] for key in ("theta", "theta beyond an update", "of the bound", *KEYS)}
    moved = []
    for t in range(1, 1001):
        group = optimizer.param_groups[0]
        group["lr"] = base * (0.55 + 0.45 * math.cos(t / 50))
        for p in parameters:
            p.grad = size * torch.randn(p.shape, generator=generator)
        theta, g = joined(parameters), joined([p.grad for p in parameters])
        states = [optimizer.state.get(p) or dict.fromkeys(KEYS, torch.zeros_like(p)) for p in parameters]
        m, v = (joined([state[key] for state in states]) for key in KEYS)
        optimizer.step()
        states = [optimizer.state[p] for p in parameters]
        assert all(state["step"].item() == t for state in states)
        want = replay(theta, m, v, g, t, group)
        got = joined(parameters)
        beta1, beta2 = group["betas"]
        lr_t = group["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        update = lr_t * torch.maximum(m.abs(), want[1].abs()) / (want[2].sqrt() + group["eps"])
        size_of_theta = torch.maximum(theta.abs(), got.abs())
        error = (got.double() - want[0]).abs()
        unit = ulp_of(size_of_theta, got.dtype)
        in_ulps = error / unit
        figures = {
            "theta": in_ulps,
            "theta beyond an update": in_ulps.where(size_of_theta >= update, 0.0),
            "of the bound": error / (4 * unit + 2.4 * ulp_of(update, got.dtype)),
            "exp_avg": ulps(joined([state["exp_avg"] for state in states]), want[1], m),
            "exp_avg_sq": ulps(joined([state["exp_avg_sq"] for state in states]), want[2], v),
        }
        for key, figure in figures.items():
            largest[key].append(figure.max())
        moved.append((got - theta).abs().max())
    worst = {key: torch.stack(figures).max().item() for key, figures in largest.items()}
    moved = max(moved).item()
    print(setting, fused, worst)
    assert moved > 1e-5
    assert worst["theta beyond an update"] <= 4.0 + UNFUSED
    assert worst["of the bound"] <= 1.0 + UNFUSED / 4
    assert max(worst["exp_avg"], worst["exp_avg_sq"]) <= 2.5 + UNFUSED
    if fused is False:
        assert max(worst.values()) <= 0.51


@PATHS
@pytest.mark.parametrize(
    ("lr", "weight_decay"),
    [(0.0, 0.1), (0.1, 10.0), (0.1, 10.0 + 1e-9), (0.1, 30.0), (1e-30, 0.1)],
    ids=["lr 0", "lr·λ = 1", "lr·λ just above 1", "lr·λ = 3", "lr near 0"],
)
def test_the_corners_of_the_algebra_still_follow_the_formula(
    lr: float, weight_decay: float, fused: bool | None
) -> None:
    theta, g = torch.linspace(-2, 2, 50), torch.linspace(3, -1, 50)
    p = torch.nn.Parameter(theta.clone())
    p.grad = g.clone()
    optimizer = AdamW([p], lr=lr, weight_decay=weight_decay, fused=fused)
    optimizer.step()
    want = replay(theta, theta * 0, theta * 0, g, 1, optimizer.param_groups[0])
    assert ulps(p.detach(), want[0], theta).max() <= 4
    assert ulps(optimizer.state[p]["exp_avg"], want[1], theta * 0).max() <= 4
    assert ulps(optimizer.state[p]["exp_avg_sq"], want[2], theta * 0).max() <= 4


@PATHS
@pytest.mark.parametrize("t", [1, 2, 10, 1000])
def test_one_step_differs_from_torch_by_what_the_two_formulas_predict(t: int, fused: bool | None) -> None:
    """ours − torch's = (u_torch − u) + lr·λ·u, with u our update before the decay and u_torch torch's."""
    lr, beta1, beta2, eps, decay = 0.05, 0.9, 0.99, 1e-3, 0.3
    generator = torch.Generator().manual_seed(t)
    theta, g, m = (torch.randn(200, generator=generator, dtype=torch.float64) for _ in range(3))
    v = torch.rand(200, generator=generator, dtype=torch.float64) * 1e-4
    state = {"step": torch.tensor(float(t - 1)), "exp_avg": m, "exp_avg_sq": v}
    results = []
    for build in (lambda p: AdamW([p], fused=fused), lambda p: torch.optim.AdamW([p])):
        p = torch.nn.Parameter(theta.clone())
        p.grad = g.clone()
        optimizer = build(p)
        optimizer.param_groups[0].update(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
        optimizer.state[p].update({key: value.clone() for key, value in state.items()})
        optimizer.step()
        results.append(p.detach())
    m_t, v_t = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    correction = math.sqrt(1 - beta2**t)
    lr_t = lr * correction / (1 - beta1**t)
    ours = lr_t * m_t / (v_t.sqrt() + eps)
    theirs = lr_t * m_t / (v_t.sqrt() + eps * correction)  # ε after the bias correction
    predicted = (theirs - ours) + lr * decay * ours  # the decay acts on the update too
    difference = results[0] - results[1]
    assert predicted.abs().max() > 1e-3
    assert (difference - predicted).abs().max() < 1e-14


def test_without_decay_and_eps_it_is_torchs_adamw() -> None:
    theta, g = torch.linspace(1, 2, 100, dtype=torch.float64), torch.linspace(1, 3, 100, dtype=torch.float64)
    results = []
    for kind in (AdamW, torch.optim.AdamW):
        p = torch.nn.Parameter(theta.clone())
        optimizer = kind([p], lr=0.01, eps=0.0, weight_decay=0.0)
        for _ in range(5):
            p.grad = g * p.detach()
            optimizer.step()
        results.append(p.detach())
    assert (results[0] - theta).abs().min() > 0.04
    assert (results[0] - results[1]).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fast_path_and_reference_agree_to_rounding_in_every_dtype(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    p = torch.nn.Parameter(torch.randn(1000, generator=generator).to(dtype))
    q = torch.nn.Parameter(p.detach().clone())
    fast, reference = (
        AdamW([x], lr=0.01, weight_decay=0.1, fused=fused) for x, fused in ((p, None), (q, False))
    )
    worst = 0.0
    for _ in range(20):
        old = p.detach().clone()
        p.grad = torch.randn(1000, generator=generator).to(dtype)
        q.grad = p.grad.clone()
        fast.step()
        reference.step()
        assert fast.state[p]["exp_avg"].dtype == fast.state[p]["exp_avg_sq"].dtype == dtype
        assert fast.state[p]["step"].dtype == torch.float32
        worst = max(worst, ulps(p.detach(), q.detach().double(), old).max().item())
        assert not torch.equal(p, old)
        with torch.no_grad():  # each step by itself: rounding apart must not add up
            q.copy_(p)
            for key, value in fast.state[p].items():
                reference.state[q][key].copy_(value)
    # float32: the reference is exact to rounding. float64: both carry float64's own errors, 4 ulp each.
    assert worst <= {torch.float32: 4, torch.float64: 8}.get(dtype, 1)


def test_a_gradient_with_other_strides_meets_the_right_weights() -> None:
    """torch's fused kernel walks memory: here it would move weight [0,1] by the gradient of [1,0]."""
    p = torch.nn.Parameter(torch.zeros(3, 4).t())
    p.grad = torch.arange(12.0).reshape(4, 3) - 5.5
    optimizer = AdamW([p], lr=0.1, weight_decay=0.0)
    optimizer.step()
    assert torch.equal(p.detach().sign(), -p.grad.sign())
    assert torch.allclose(optimizer.state[p]["exp_avg"], 0.1 * p.grad)


def test_the_fast_path_really_calls_torchs_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = torch._fused_adamw_
    monkeypatch.setattr(adamw, "fused_adamw_", lambda *a, **k: (calls.append(len(a[0])), kernel(*a, **k)))
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in (20000, 5, 30000, 6, 7)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    AdamW(parameters).step()
    assert calls == [3]  # the two large ones, and the small ones joined
    AdamW(parameters, fused=False).step()
    assert calls == [3]

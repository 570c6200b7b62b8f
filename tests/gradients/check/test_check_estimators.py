"""Gradients that are no exact derivatives and right all the same: estimators, and approximations.

Nothing is called wrong whose difference is small in every part (torch's own constants, adjoints within
their solver's tolerance), nor what is a surrogate by definition (fake quantisation, implicit gradients of
samples). What is off by a percent, an operation without a derivative, and a single wrong entry are.
"""

import pytest
import torch
from torch import distributions as dist
from torch import nn

from clinometer.gradients.check.check_gradients import check_gradients


def linear():
    torch.manual_seed(0)
    return nn.Linear(6, 5), torch.randn(12, 6)


def faults(check):
    return [finding for finding in check.findings if finding.severity == "fault"]


# ---- samples ----

SAMPLED = {
    "gamma": lambda a, b: dist.Gamma(a, b).rsample().mean(),
    "beta": lambda a, b: dist.Beta(a, b).rsample().square().mean(),
    "dirichlet": lambda a, b: dist.Dirichlet(a).rsample().square().sum(),
    "chi2": lambda a, b: dist.Chi2(a).rsample().mean(),
    "student": lambda a, b: dist.StudentT(a + 3, 0.0, b).rsample().square().mean(),
    "inverse gamma": lambda a, b: dist.InverseGamma(a + 2, b).rsample().mean(),
}
EXACT = {
    "normal": lambda a, b: dist.Normal(a, b).rsample().square().mean(),
    "kumaraswamy": lambda a, b: dist.Kumaraswamy(a, b).rsample().mean(),
    "weibull": lambda a, b: dist.Weibull(a, b).rsample().square().mean(),
    "straight-through": lambda a, b: (
        (dist.OneHotCategoricalStraightThrough(logits=a).rsample() @ b[0]).square().mean()
    ),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_an_implicit_gradient_of_a_sample_is_explained_with_its_line(name):
    model, x = linear()
    check = check_gradients(model, lambda: SAMPLED[name](model(x).exp() + 1, model(x).exp() + 1))
    (finding,) = check.findings
    assert (finding.cause, finding.severity) == ("surrogate-gradient", "explained")
    assert "on average" in finding.say("why")
    assert "rsample()" in finding.where.source or name == "straight-through"
    assert set(finding.names) == {"weight", "bias"}


@pytest.mark.parametrize("name", EXACT)
def test_a_reparameterised_sample_passes(name):
    model, x = linear()
    check = check_gradients(model, lambda: EXACT[name](model(x).exp() + 1, model(x).exp() + 1))
    assert check.passed, check.render("en")


def test_an_operation_without_a_derivative_is_a_fault_though_another_term_hides_it():
    model, x = linear()
    check = check_gradients(
        model,
        lambda: torch.normal(model(x), 1.0).square().mean() + 0.1 * model(x).square().mean(),  # the line
    )
    (finding,) = check.findings
    assert (finding.cause, finding.severity) == ("wrong-gradient", "fault")
    assert finding.where.source.endswith("# the line")
    assert "randn_like" in finding.say("remedy")
    right = check_gradients(model, lambda: (model(x) + torch.randn(12, 5)).square().mean())
    assert right.findings == ()


# ---- quantisation ----


def per_tensor(v):
    return torch.fake_quantize_per_tensor_affine(v, 0.05, 0, -128, 127)


def per_channel(v):
    scale, zero = torch.full((5,), 0.05), torch.zeros(5, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(v, scale, zero, v.ndim - 1, -128, 127)


@pytest.mark.parametrize("quantise", [per_tensor, per_channel])
def test_fake_quantisation_is_a_straight_through_estimator_at_its_line(quantise):
    model, x = linear()
    check = check_gradients(model, lambda: (quantise(model(x)) + model(x)).square().mean())
    (finding,) = check.findings
    assert (finding.cause, finding.severity) == ("surrogate-gradient", "explained")
    assert "straight-through" in finding.say("what")
    assert "fake_quantize" in finding.where.source


class LearnedStep(torch.autograd.Function):
    """Quantisation with a learned step (Esser et al. 2020): steps in v, and a gradient for the step s."""

    @staticmethod
    def forward(ctx, v, s):
        ctx.save_for_backward(v, s)
        return (v / s).round().clamp(-8, 7) * s

    @staticmethod
    def backward(ctx, g):
        v, s = ctx.saved_tensors
        r = v / s
        inside = (r >= -8) & (r <= 7)
        ds = torch.where(inside, r.round() - r, r.round().clamp(-8, 7))
        return g * inside, (g * ds).sum().reshape(s.shape)


def test_a_quantiser_that_learns_its_step_is_a_surrogate_too():
    model, x = linear()
    step = nn.Parameter(torch.tensor(0.1))
    weights = {"w": model.weight, "s": step}
    check = check_gradients(
        weights, lambda: nn.functional.linear(x, LearnedStep.apply(model.weight, step)).square().mean()
    )
    (finding,) = check.findings
    assert (finding.cause, finding.severity) == ("surrogate-gradient", "explained")


class Swapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g * a, g * b


def test_gradients_in_the_wrong_order_are_no_surrogate():
    model, x = linear()
    check = check_gradients(model, lambda: Swapped.apply(model(x), model(x).sin() + 2).square().mean())
    assert [finding.cause for finding in faults(check)] == ["wrong-backward"]


# ---- what is right up to a small error ----


class Slope(torch.autograd.Function):
    factor = 1.0

    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return v.tanh()

    @staticmethod
    def backward(ctx, g):
        (v,) = ctx.saved_tensors
        return g * (1 - v.tanh() ** 2) * Slope.factor


@pytest.mark.parametrize(
    ("factor", "healthy"), [(1 + 1e-7, True), (1 + 1e-5, True), (1.01, False), (1.02, False)]
)
def test_a_small_relative_error_is_said_and_a_percent_is_wrong(factor, healthy, monkeypatch):
    monkeypatch.setattr(Slope, "factor", factor)
    model, x = linear()
    check = check_gradients(model, lambda: Slope.apply(model(x)).square().mean())
    assert check.healthy == healthy
    (finding,) = check.findings
    assert finding.cause == ("approximate" if healthy else "wrong-backward")
    assert finding.where.function == "Slope.backward"
    if healthy:
        assert check["weight"].share == pytest.approx(factor - 1, rel=1)
        assert float(finding.values["own"]) == pytest.approx(factor - 1, rel=3)


def test_torchs_own_constants_are_torchs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Hardsigmoid(), nn.Linear(8, 1))
    x = torch.randn(16, 6)
    check = check_gradients(model, lambda: model(x).square().mean())
    assert check.passed
    (finding,) = check.findings
    assert (finding.cause, finding.severity, finding.variant) == ("approximate", "explained", "torch")
    assert "Hardsigmoid" in finding.say("why")
    functional = check_gradients(
        model, lambda: model[2](nn.functional.hardsigmoid(model[0](x))).square().mean()
    )
    (finding,) = functional.findings
    assert (finding.cause, finding.severity) == ("approximate", "explained")


class OneEntry(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        return 2 * v

    @staticmethod
    def backward(ctx, g):
        g = 2 * g
        g.view(-1)[4711] *= 1.5
        return g


def test_one_wrong_entry_among_many_is_no_approximation():
    w = torch.randn(100, 100, requires_grad=True)
    check = check_gradients({"w": w}, lambda: (3 * OneEntry.apply(w.sin())).cos().sum())
    assert check["w"].share < 1e-2
    assert [finding.cause for finding in faults(check)] == ["wrong-backward"]

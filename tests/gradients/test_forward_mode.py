"""Forward-mode differentiation: a finer number beside the differences, which alone decide."""

import pytest
import torch
from tests.gradients.broken import BrokenLinear
from tests.gradients.healthy import TORCH
from tests.gradients.test_check_modules import CASES
from tests.gradients.traces import trace_of
from torch import nn

from clinometer.gradients.check.check_gradients import check_gradients


def forward_mode(params, loss):
    return check_gradients(params, loss, forward_mode=True)


POSSIBLE = ["transformer_lm", "lstm", "convolutional", "tied", "checkpoint", "complex", "mixture_by_index"]


@pytest.mark.parametrize("name", POSSIBLE)
def test_a_healthy_model_agrees_a_thousand_times_finer_than_differences(name):
    found = forward_mode(*TORCH[name]())
    assert found.passed
    assert found.forward_mode.agrees
    difference = abs(found.forward_mode.forward - found.forward_mode.analytic)
    assert difference <= 0.01 * found.forward_mode.tolerance
    assert found.everything.analytic == pytest.approx(found.forward_mode.analytic, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("embedding_bag", "NotImplementedError"),
        ("connectionist", "NotImplementedError"),
        ("scripted", "unseen"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_operation_without_a_forward_rule_skips_it_and_says_so_only_in_the_details(name, reason):
    found = forward_mode(*CASES[name]())
    assert found.passed
    assert found.findings == ()
    assert found.forward_mode.agrees is None
    assert found.to_dict()["forward_mode"]["reason"].startswith(reason)
    assert reason not in found.render("en")


class Slightly(torch.autograd.Function):
    """sin, with a rule for each direction of differentiation and a mistake in either."""

    @staticmethod
    def forward(x, backward_factor, forward_factor):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.backward_factor, ctx.forward_factor = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.cos() * ctx.backward_factor, None, None

    @staticmethod
    def jvp(ctx, tangent, *rest):
        (x,) = ctx.saved_tensors
        return tangent * x.cos() * ctx.forward_factor


def slightly(backward_factor, forward_factor):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    x = torch.randn(6, 4)
    return (
        model,
        lambda: model[1](Slightly.apply(model[0](x), backward_factor, forward_factor)).square().mean(),
    )


def test_an_error_below_what_differences_see_shows_in_forward_mode_alone():
    found = forward_mode(*slightly(1 + 1e-11, 1.0))
    assert found.passed
    assert found.forward_mode.agrees is False


def test_a_wrong_forward_rule_accuses_no_one():
    found = forward_mode(*slightly(1.0, 2.0))
    assert found.passed
    assert found.findings == ()
    assert found.forward_mode.agrees is False


def test_the_differences_decide_where_both_rules_have_the_same_mistake():
    found = forward_mode(*slightly(2.0, 2.0))
    assert found.forward_mode.agrees
    assert [finding.cause for finding in found.findings] == ["wrong-backward"]


def test_it_is_left_out_unless_asked_for():
    found = check_gradients(*TORCH["tied"]())
    assert found.forward_mode is None
    assert found.to_dict()["forward_mode"] is None


def test_a_weight_given_to_a_function_with_a_forward_rule_is_followed_into_it():
    w = torch.randn(4, requires_grad=True)  # used by the Function and beside it
    found = forward_mode({"w": w}, lambda: (Slightly.apply(w, 1.0, 1.0) * w).sum())
    assert found.forward_mode.agrees


def test_it_leaves_no_trace():
    model, loss = TORCH["convolutional"]()
    before = trace_of(model)
    assert forward_mode(model, loss).forward_mode.agrees
    assert trace_of(model) == before
    assert all(torch.autograd.forward_ad.unpack_dual(p).tangent is None for p in model.parameters())


def test_a_function_without_a_forward_rule_skips_it():
    model = BrokenLinear(4, 4, lambda dx, dw, db, x, w, g: (dx, 2 * dw, db))
    x = torch.randn(6, 4)
    found = forward_mode(model, lambda: model(x).square().mean())
    assert found.forward_mode.agrees is None
    assert "jvp" in found.forward_mode.reason
    assert not found.healthy

"""What is said about a wrong backward beyond that it is wrong: only what was measured."""

import pytest
import torch
from tests.gradients.check import broken
from tests.gradients.check.broken import Apply, BrokenLinear
from torch import nn
from torch.nn import functional as F

from clinometer.gradients.check.check_gradients import check_gradients


class Rotary(nn.Module):
    def forward(self, x):
        angle = torch.arange(x.shape[0])[:, None] * torch.tensor([1.0, 0.1, 0.01])
        return broken.RotaryFunction.apply(x, angle.cos(), angle.sin())


def told(check, language="en"):
    return " ".join(check.render(language, width=1000).split())


def checked(*layers):
    model = nn.Sequential(*layers)
    x = torch.randn(12, 6)
    return check_gradients(model, lambda: model(x).square().mean())


def the_finding(check):
    (finding,) = [f for f in check.findings if f.severity == "fault"]
    return finding


def test_everything_upstream_fails_and_everything_downstream_passes():
    check = checked(nn.Linear(6, 6), nn.Tanh(), Rotary(), nn.Linear(6, 6), nn.Linear(6, 2))
    assert the_finding(check).values["parts"]
    assert "Everything downstream of RotaryFunction passes; everything upstream fails." in told(check)
    assert "RotaryFunction 下游的全部通过；上游的全部不通过。" in told(check, "zh")


def test_the_layer_is_what_parts_the_tensors_when_it_has_no_function():
    class Scaled(nn.Module):
        def forward(self, x):
            h = x.tanh()
            h.data.mul_(2)
            return h

    check = checked(nn.Linear(6, 6), Scaled(), nn.Linear(6, 2))
    assert "Everything downstream of 1 passes; everything upstream fails." in told(check)


def test_nothing_is_said_of_upstream_when_some_of_it_passes():
    # Only the weight's own gradient is wrong; what lies before it is right.
    check = checked(
        nn.Linear(6, 6), BrokenLinear(6, 6, lambda dx, dw, db, x, w, g: (dx, 2 * dw, db)), nn.Tanh()
    )
    assert check["0.weight"].passed
    assert not the_finding(check).values["parts"]
    assert "upstream" not in told(check)


def test_nothing_is_said_of_downstream_when_there_is_none():
    check = checked(nn.Linear(6, 6), Rotary())
    assert check["0.weight"].status == "wrong"
    assert "upstream" not in told(check)


def test_a_second_wrong_layer_further_down_forbids_the_sentence():
    double = BrokenLinear(6, 6, lambda dx, dw, db, x, w, g: (dx, 2 * dw, db))
    check = checked(nn.Linear(6, 6), Rotary(), nn.Linear(6, 6), double)
    assert not any(finding.values["parts"] for finding in check.findings)


def test_a_path_around_the_wrong_layer_does_not_hide_who_is_upstream():
    model = nn.ModuleList([nn.Linear(6, 6), Rotary(), nn.Linear(6, 2), nn.Linear(6, 2)])
    x = torch.randn(12, 6)

    def loss():
        h = model[0](x)
        return model[2](h + model[1](h)).square().mean() + model[3](x).square().mean()

    check = check_gradients(model, loss)
    (layer,) = [layer for layer in check.wrong_layers if layer.function]
    assert layer.upstream == ("0.weight", "0.bias")
    assert the_finding(check).values["parts"]


def test_a_rotation_that_does_not_turn_back_is_recognised():
    check = checked(nn.Linear(6, 6), Rotary(), nn.Linear(6, 2))
    hint = the_finding(check).values["hint"]
    assert (hint.kind, hint.argument) == ("forward", "x")
    assert "in a rotation, the sign of the sine" in told(check)
    assert "RotaryFunction.backward" in told(check)
    hints = [layer["hint"] for layer in check.to_dict()["layers"] if layer["function"]]
    assert [hint["kind"] for hint in hints] == ["forward"]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_cross_entropy_whose_gradient_does_not_add_up_to_zero_is_recognised(share):
    model = nn.Linear(6, 5)
    x, y = torch.randn(12, 6), torch.randint(0, 5, (12,))
    check = check_gradients(model, lambda: broken.CrossEntropyFunction.apply(model(x), y, share))
    hint = the_finding(check).values["hint"]
    assert (hint.kind, hint.argument, hint.dim, hint.size) == ("shift", "logits", 1, 5)
    (layer,) = [layer for layer in check.wrong_layers if layer.function]
    assert layer.hint == hint
    assert "must add up to 0" in told(check)


def test_a_right_cross_entropy_passes():
    model = nn.Linear(6, 5)
    x, y = torch.randn(12, 6), torch.randint(0, 5, (12,))
    check = check_gradients(model, lambda: broken.CrossEntropyFunction.apply(model(x), y, 1.0))
    assert check.passed
    (layer,) = [layer for layer in check.layers if layer.function]
    assert layer.hint is None


class Softmax(torch.autograd.Function):
    """A softmax over the first dimension whose backward forgets to take the mean away."""

    @staticmethod
    def forward(x):
        return x.softmax(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (p,) = ctx.saved_tensors
        return p * g


def test_a_softmax_without_its_second_term_is_recognised_along_its_dimension():
    check = checked(nn.Linear(6, 6), Apply(Softmax), nn.Linear(6, 2))
    hint = the_finding(check).values["hint"]
    assert (hint.kind, hint.argument, hint.dim, hint.size) == ("shift", "x", 0, 12)


@pytest.mark.parametrize(
    ("mistake", "kind", "factor"),
    [
        (lambda dx, dw, db, x, w, g: (-dx, dw, db), "factor", -1.0),
        (lambda dx, dw, db, x, w, g: (3 * dx, dw, db), "factor", 3.0),
        (lambda dx, dw, db, x, w, g: (None, dw, db), "missing", 1.0),
    ],
)
def test_a_sign_a_factor_and_a_forgotten_gradient_are_recognised(mistake, kind, factor):
    hint = the_finding(checked(nn.Linear(6, 6), BrokenLinear(6, 6, mistake))).values["hint"]
    assert (hint.kind, hint.argument) == (kind, "x")
    assert hint.factor == pytest.approx(factor, abs=1e-7)


def test_an_error_without_a_pattern_gets_no_hint():
    def mistake(dx, dw, db, x, w, g):
        return dx.sin(), dw, db

    finding = the_finding(checked(nn.Linear(6, 6), BrokenLinear(6, 6, mistake)))
    assert finding.values["hint"] is None


def test_torchs_own_cross_entropy_needs_no_hint():
    model = nn.Linear(6, 5)
    x, y = torch.randn(12, 6), torch.randint(0, 5, (12,))
    assert check_gradients(model, lambda: F.cross_entropy(model(x), y)).findings == ()

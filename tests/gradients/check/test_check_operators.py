"""Operators of torch.library: a wrong backward names the operator and the line that calls it."""

import inspect

import pytest
import torch
from torch import Tensor, nn

from clinometer.gradients.check.check_gradients import check_gradients


def keep(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.factor = inputs[1]


def right(ctx, grad):
    (x,) = ctx.saved_tensors
    return 2 * grad * x * ctx.factor, None


def halved(ctx, grad):
    (x,) = ctx.saved_tensors
    return grad * x * ctx.factor, None


@torch.library.custom_op("clinometer_tests::square", mutates_args=())
def square(x: Tensor, factor: float) -> Tensor:
    return x * x * factor


@torch.library.custom_op("clinometer_tests::square_wrong", mutates_args=())
def square_wrong(x: Tensor, factor: float) -> Tensor:
    return x * x * factor


square.register_autograd(right, setup_context=keep)
square_wrong.register_autograd(halved, setup_context=keep)

LIBRARY = torch.library.Library("clinometer_tests_old", "DEF")
LIBRARY.define("square_wrong(Tensor x, float factor) -> Tensor")
LIBRARY.impl("square_wrong", lambda x, factor: x * x * factor, "CompositeExplicitAutograd")
torch.library.register_autograd("clinometer_tests_old::square_wrong", halved, setup_context=keep, lib=LIBRARY)


class Squared(nn.Module):
    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, x):
        return self.operator(x, 0.5)  # the call


def checked(operator):
    model = nn.Sequential(nn.Linear(4, 4), Squared(operator), nn.Linear(4, 2))
    x = torch.randn(6, 4)
    return check_gradients(model, lambda: model(x).square().mean())


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        (square_wrong, "clinometer_tests::square_wrong"),
        (torch.ops.clinometer_tests.square_wrong, "clinometer_tests::square_wrong"),
        (torch.ops.clinometer_tests_old.square_wrong.default, "clinometer_tests_old::square_wrong"),
    ],
)
def test_a_wrong_backward_of_an_operator_is_named_with_its_call(operator, name):
    check = checked(operator)
    (finding,) = check.findings
    assert (finding.cause, finding.severity, finding.values["kind"]) == ("wrong-backward", "fault", name)
    assert finding.names == ("0.weight", "0.bias")
    assert finding.where.function == "halved"
    _, first = inspect.getsourcelines(halved)
    assert finding.where.line == first
    (layer,) = [layer for layer in check.wrong_layers if layer.function]
    assert layer.path == "1"
    assert layer.called.source == "return self.operator(x, 0.5)  # the call"
    assert (layer.hint.kind, layer.hint.argument) == ("factor", "x")
    assert layer.hint.factor == pytest.approx(0.5)
    told = " ".join(check.render("en").split())
    assert f"The backward of the operator {name} is wrong" in told
    assert f"test_check_operators.py:{layer.called.line}" in told


def test_a_right_operator_passes_and_was_asked_alone():
    check = checked(square)
    assert check.passed
    assert check.findings == ()
    (layer,) = [layer for layer in check.layers if layer.function]
    assert layer.kind == "clinometer_tests::square"
    assert layer.passed

"""The modes under which the person's code runs are part of the run: what differs from it is said first.

Gradients that are off at the place of the call are a fault where the person's own backward would fail; code
that torch.compile made is not what ran here. Neither gets a ✓, and the modes are afterwards what they were.
"""

import pytest
import torch
from torch import nn

from clinometer.gradients.check.check_gradients import check_gradients
from clinometer.gradients.diagnose.diagnose import diagnose

TOOLS = [diagnose, check_gradients]
MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def x():
    return torch.linspace(-1, 1, 20).reshape(5, 4)


def first(result):
    return result.findings[0]


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_are_off_are_said_first(model, tool, mode):
    inputs = x()
    with MODES[mode]():
        found = tool(model, lambda: model(inputs).square().mean())
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (mode == "inference_mode")
    assert torch.is_grad_enabled()
    assert not found.healthy
    assert (first(found).cause, first(found).severity) == ("gradients-off", "fault")
    assert first(found).variant == ("inference_mode" if mode == "inference_mode" else "no_grad")
    assert "✓" not in found.render("en")
    assert ("inference_mode()" if mode == "inference_mode" else "set_grad_enabled(True)") in first(found).say(
        "remedy", "en"
    )


@pytest.mark.parametrize("tool", TOOLS)
def test_a_closure_that_switches_gradients_on_is_no_fault(model, tool):
    def loss():
        with torch.enable_grad():
            return model(x()).square().mean()

    with torch.no_grad():
        found = tool(model, loss)
    assert found.healthy, found.render()
    assert (first(found).cause, first(found).variant) == ("gradients-off", "allowed")
    assert "✓" not in found.render("en")


def test_a_closure_whose_own_backward_fails_without_gradients_is_a_fault(model):
    def loss():
        value = model(x()).square().mean()
        value.backward()
        return value

    with torch.no_grad():
        found = diagnose(model, loss)
    assert (first(found).cause, first(found).severity) == ("gradients-off", "fault")


def test_other_faults_stand_below_it(model):
    with torch.no_grad():
        found = diagnose(model, lambda: model[2](model[0](x()).detach()).square().mean())
    assert [f.cause for f in found.findings] == ["gradients-off", "cut"]


def test_running_statistics_are_what_they_were():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        diagnose(model, lambda: model(x()).square().mean())
        check_gradients(model, lambda: model(x()).pow(3).mean())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("part", ["whole", "in place", "block", "loss"])
def test_compiled_code_is_not_what_ran(model, tool, part):
    loss = torch.compile(lambda out: out.square().mean(), backend="eager") if part == "loss" else None
    asked = model
    if part == "whole":
        asked = torch.compile(model, backend="eager")
    elif part == "in place":
        model.compile(backend="eager")
    elif part == "block":
        model[0] = torch.compile(model[0], backend="eager")
    found = tool(asked, lambda: loss(asked(x())) if loss is not None else asked(x()).square().mean())
    assert found.healthy, found.render()
    assert [(f.cause, f.severity) for f in found.findings] == [("not-compiled", "explained")]
    assert "✓" not in found.render("en")


@pytest.mark.parametrize("tool", TOOLS)
def test_nothing_is_said_where_nothing_is_compiled_and_gradients_are_on(model, tool):
    torch.compile(lambda out: out, backend="eager")  # the compiler is loaded, and nothing of it runs
    found = tool(model, lambda: model(x()).square().mean())
    assert not found.findings
    assert "✓" in found.render("en")

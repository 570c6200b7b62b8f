"""Where each path to the loss has a cut of its own, all lines are named, first the one that is not meant."""

import pytest
import torch
from torch import nn

from clinometer.gradients.diagnose.diagnose import diagnose

X, RETURNS = torch.linspace(-1, 1, 96).reshape(16, 6), torch.linspace(-1, 2, 16)
ACTIONS = torch.arange(16) % 3


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Linear(6, 8), "value": nn.Linear(8, 1), "policy": nn.Linear(8, 3)})


def no_cut(value):
    return value


def data(value):
    return value.data  # <- the fault


def constructed(value):
    return nn.Parameter(value)  # <- the fault


def actor_critic(model, treat):
    h = model["body"](X).tanh()
    value = model["value"](h).squeeze(-1)
    advantage = RETURNS - value.detach()  # <- meant
    chosen = model["policy"](h).log_softmax(-1)[torch.arange(16), ACTIONS]
    return -(chosen * advantage).mean() + (treat(value) - RETURNS).square().mean()


@pytest.mark.parametrize("treat", [data, constructed])
def test_both_lines_are_named_and_the_one_that_is_not_meant_comes_first(model, treat):
    found = diagnose(model, lambda: actor_critic(model, treat))
    (finding,) = (f for f in found.findings if f.cause == "cut")
    assert finding.severity == "fault"
    assert finding.names == ("value.weight", "value.bias")
    assert finding.where.source.endswith("# <- the fault")
    assert [where.source for where in finding.others] == ["advantage = RETURNS - value.detach()  # <- meant"]
    assert [where["source"] for where in finding.to_dict()["others"]] == [w.source for w in finding.others]
    text = found.render("en")
    assert "# <- meant" in text
    assert "these 2 lines" in text
    if treat is data:
        assert "instead of its .data" in finding.say("remedy", "en")


def test_with_one_path_open_the_other_s_detach_is_no_finding(model):
    assert not diagnose(model, lambda: actor_critic(model, no_cut)).findings


def test_two_lines_that_both_may_be_meant_are_named_too(model):
    def loss():
        h = model["body"](X).tanh()
        value = model["value"](h).squeeze(-1)
        advantage = RETURNS - value.detach()
        fixed = value.detach()
        chosen = model["policy"](h).log_softmax(-1)[torch.arange(16), ACTIONS]
        return -(chosen * advantage).mean() + (fixed - RETURNS).square().mean()

    (finding,) = (f for f in diagnose(model, loss).findings if f.cause == "cut")
    assert {w.source for w in (finding.where, *finding.others)} == {
        "advantage = RETURNS - value.detach()",
        "fixed = value.detach()",
    }


def test_one_cut_that_is_used_twice_is_one_line(model):
    def loss():
        h = model["body"](X).tanh().detach()
        return model["value"](h).square().mean() + model["policy"](h).square().mean()

    (finding,) = (f for f in diagnose(model, loss).findings if f.cause == "cut")
    assert finding.others == ()

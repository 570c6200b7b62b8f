"""What training scripts as people write them brought up: false alarms, wrong lines, untrue sentences."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clinometer.gradients.check.check_gradients import check_gradients
from clinometer.gradients.diagnose.diagnose import diagnose
from clinometer.messages import InputError


@pytest.mark.parametrize("target", [float("nan"), float("inf")])
def test_a_loss_that_is_nan_is_not_called_random(target):
    model, x = nn.Linear(4, 1), torch.randn(3, 4)
    (finding,) = check_gradients(model, lambda: model(x).mean() * target).findings
    assert finding.cause == "not-finite"
    assert finding.key == "check.not_finite"


class Learner(nn.Module):
    def __init__(self):
        super().__init__()
        self.online = nn.Linear(4, 2)
        self.target = copy.deepcopy(self.online)


@pytest.mark.parametrize("how", ["no_grad", "detach"])
def test_a_target_network_outside_the_optimizer_is_meant(how):
    model, x = Learner(), torch.randn(5, 4)

    def loss():
        if how == "detach":
            aim = model.target(x).detach() + 1
        else:
            with torch.no_grad():
                aim = model.target(x) + 1
        return F.mse_loss(model.online(x), aim)

    found = diagnose(model, loss, optimizer=torch.optim.Adam(model.online.parameters()))
    assert found.healthy
    assert found["target.weight"].cause == "cut"
    assert [f.variant for f in found.findings] == ["apart"]
    # In the optimizer it is expected to learn, and without one nothing tells.
    assert not diagnose(model, loss, optimizer=torch.optim.Adam(model.parameters())).healthy
    assert not diagnose(model, loss).healthy


def test_an_optimizer_with_stale_tensors_excuses_no_cut():
    model, x = Learner(), torch.randn(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.target = nn.Linear(4, 2)
    found = diagnose(model, lambda: (model.online(x) - model.target(x).detach()).sum(), optimizer=optimizer)
    assert not found.healthy


def test_silent_units_are_counted_along_the_dimension_of_the_units():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    with torch.no_grad():
        model[0].bias[2] = -100.0
    x = torch.randn(2, 9, 4)
    found = diagnose(model, lambda: model(x).square().mean())
    finding = next(f for f in found.findings if f.cause == "dead-activation")
    assert finding.values["all"] == 6
    assert finding.values["zero"] >= 1


@pytest.mark.parametrize("layer", [nn.Softmax(-1), nn.LogSoftmax(-1)])
def test_a_softmax_over_one_value_is_told_as_such(layer):
    model, x = nn.Sequential(nn.Linear(4, 1), layer), torch.randn(3, 4)
    found = diagnose(model, lambda: (model(x) - 2).square().mean())
    assert not found.healthy
    assert [f.variant for f in found.findings] == ["single"]


def test_an_expert_without_tokens_written_by_mask_is_told_as_such():
    experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    x, chosen = torch.randn(6, 4), torch.tensor([1, 1, 2, 2, 1, 2])

    def loss():
        out = torch.zeros_like(x)
        for i, expert in enumerate(experts):
            out[chosen == i] = expert(x[chosen == i])
        return (out - 1).square().mean()

    found = diagnose(experts, loss)
    assert found.healthy
    assert found["0.weight"].cause == "absent-rows"


def test_nobody_asks_a_bias_that_cancels_to_move():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    x = torch.randn(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = diagnose(model, lambda: model(x).square().mean(), optimizer=optimizer)
    assert not [f for f in found.findings if f.cause == "never-moves"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_check_tells_a_closure_that_calls_backward_itself(dtype):
    model, x = nn.Linear(4, 1).to(dtype), torch.randn(3, 4, dtype=dtype)

    def loss():
        value = model(x).square().mean()
        value.backward()
        return value

    with pytest.raises(InputError, match="calls backward itself"):
        check_gradients(model, loss)


def test_a_bias_that_cancels_is_not_called_imprecise():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    x = torch.randn(6, 4)
    assert not check_gradients(model, lambda: model(x).square().mean()).findings


def test_frozen_tensors_are_counted_apart():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), torch.randn(3, 4)
    model[0].requires_grad_(False)
    check = check_gradients(model, lambda: model(x).square().mean())
    assert "all 2 tensors that ask for one" in check.render("en", width=500)
    assert "2 are frozen" in check.render("en", width=500)

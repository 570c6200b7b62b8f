"""A zero gradient is explained only if something that can move would change it.

The principle: one run does not tell a weight of zero that will move, a minimum, or a teacher that still
equals the student, from a loss that is constant. Where a zero would be explained, the closure runs again at
other values of what has a gradient, of what has none, of all, and with other data. Zero at all of them is a
fault at the line where the gradient dies; so is a point that no step leaves though the loss can be smaller.
"""

import copy

import pytest
import torch
from tests.gradients.diagnose.test_diagnose_strange import line_of
from torch import nn
from torch.nn import functional as F

from clinometer.gradients.diagnose.diagnose import diagnose


def mlp(outputs, activation=nn.Tanh, inputs=6):
    return nn.Sequential(nn.Linear(inputs, 16), activation(), nn.Linear(16, outputs))


def x():
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


def only_fault(found, cause, variant, line=None):
    (fault,) = [f for f in found.findings if f.severity == "fault"]
    assert (fault.status, fault.cause, fault.variant) == ("zero", cause, variant), found.render("en")
    if line is not None:
        assert fault.where.line == line_of(line, __file__)
    for language in ("en", "zh"):
        assert fault.say("why", language)
        assert fault.say("remedy", language)
    return fault


def test_cross_entropy_over_one_class_is_a_constant_and_no_minimum():
    model, labels = mlp(1), torch.zeros(16, dtype=torch.long)

    def loss():
        return F.cross_entropy(model(x()), labels)  # one class

    fault = only_fault(
        diagnose(model, loss),
        "dead-activation",
        "single",
        "return F.cross_entropy(model(x()), labels)  # one class",
    )
    assert len(fault.names) == 4
    assert fault.where.op == "cross_entropy"
    assert "binary_cross_entropy_with_logits" in fault.say("remedy", "en")


def test_cross_entropy_over_two_classes_is_healthy_also_when_it_is_fitted():
    model, labels = mlp(2), torch.zeros(16, dtype=torch.long)
    assert diagnose(model, lambda: F.cross_entropy(model(x()), labels)).healthy
    nn.init.zeros_(model[2].weight)
    model[2].bias.data.copy_(torch.tensor([500.0, -500.0]))
    found = diagnose(model, lambda: F.cross_entropy(model(x()), labels))
    assert found.healthy, found.render()


def against(student, teacher):
    def loss():
        with torch.no_grad():
            target = teacher(x())
        return F.mse_loss(student(x()), target)  # student and teacher

    return loss


def test_a_teacher_that_is_the_student_is_a_fault():
    student = mlp(3)
    fault = only_fault(
        diagnose(student, against(student, student)),
        "constant",
        "equal",
        "return F.mse_loss(student(x()), target)  # student and teacher",
    )
    assert len(fault.names) == 4
    assert "copy.deepcopy" in fault.say("remedy", "en")


def test_a_target_that_is_the_prediction_is_a_fault():
    model = mlp(3)

    def loss():
        out = model(x())
        return F.smooth_l1_loss(out, out.detach())

    only_fault(diagnose(model, loss), "constant", "equal")


@pytest.mark.parametrize("kind", ["same values", "another model"])
def test_a_teacher_of_its_own_is_healthy_also_while_it_has_the_same_values(kind):
    student = mlp(3)
    teacher = copy.deepcopy(student) if kind == "same values" else mlp(3)
    found = diagnose(student, against(student, teacher))
    assert found.healthy, found.render()
    assert [f.variant for f in found.findings] == (["minimum"] if kind == "same values" else [])


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_fitted_model_is_at_its_minimum(outputs):
    model = nn.Linear(6, outputs)
    target = model(x()).detach()
    for constant in (0.0, 1.5):  # a loss has its minimum at any value
        found = diagnose(model, lambda shift=constant: F.mse_loss(model(x()), target) + shift)
        assert found.healthy, found.render()
        assert [f.variant for f in found.findings] == ["lowest" if constant else "minimum"]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.Tanh, nn.SiLU])
def test_a_second_derivative_of_straight_pieces_is_a_fault(activation):
    model = mlp(1, activation, inputs=1)

    def loss():
        points = torch.linspace(-1, 1, 20)[:, None].requires_grad_()
        u = model(points)
        (u_x,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x.sum(), points, create_graph=True)
        return (u_xx + torch.sin(points)).square().mean()

    found = diagnose(model, loss)
    if activation in (nn.Tanh, nn.SiLU):
        assert found.healthy, found.render()
        assert {name for f in found.findings for name in f.names} == {"2.bias"}
        return
    fault = only_fault(
        found, "constant", "slope", "(u_xx,) = torch.autograd.grad(u_x.sum(), points, create_graph=True)"
    )
    assert "0.weight" in fault.names
    assert "SiLU" in fault.say("remedy", "en")


def test_a_normalisation_over_one_feature_is_a_fault_although_its_bias_learns():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1), nn.LayerNorm(1))
    fault = only_fault(diagnose(model, lambda: (model(x()) - 1).square().mean()), "constant", "")
    assert {"0.weight", "2.weight", "2.bias"} <= set(fault.names)
    assert fault.where.op == "layer_norm"
    wide = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.LayerNorm(3))
    assert diagnose(wide, lambda: (wide(x()) - 1).square().mean()).healthy


def boxes_loss(place):
    model = nn.Linear(6, 4)
    nn.init.normal_(model.weight, std=1e-3)
    target = torch.tensor([place, place, place + 1.0, place + 1.0]).expand(16, 4)

    def loss():
        p = model(x())
        box = torch.cat([p[:, :2], p[:, :2] + p[:, 2:].exp()], -1)
        low, high = torch.maximum(box[:, :2], target[:, :2]), torch.minimum(box[:, 2:], target[:, 2:])
        sides = (high - low).clamp(min=0)
        shared = sides[:, 0] * sides[:, 1]
        area = (box[:, 2:] - box[:, :2]).prod(-1)
        return (1 - shared / (area + 1 - shared)).mean()

    return model, loss


def test_boxes_that_do_not_overlap_are_a_point_that_no_step_leaves():
    only_fault(
        diagnose(*boxes_loss(5.0)), "zero-weight-downstream", "fixed", "shared = sides[:, 0] * sides[:, 1]"
    )
    assert diagnose(*boxes_loss(0.3)).healthy


@pytest.mark.parametrize("kind", ["lora", "rezero", "margin", "squared weight", "zero context"])
def test_zeros_that_can_become_others_are_explained(kind):
    model = nn.ModuleDict({"a": nn.Linear(6, 6, bias=False), "b": nn.Linear(6, 6, bias=False)})
    model["head"] = nn.Linear(6, 1)
    scale = nn.Parameter(torch.zeros(6))
    model.register_parameter("scale", scale)
    if kind == "lora":
        nn.init.zeros_(model["b"].weight)

    def loss():
        h = x()
        if kind == "lora":
            h = h + model["b"](model["a"](h)) * (1 + scale)
        elif kind == "rezero":
            h = h + scale * model["b"](model["a"](h).tanh())
        elif kind == "zero context":
            context = torch.zeros(4, 6)
            h = h * (1 + scale) + (model["a"](h) @ model["b"](context).T) @ context
        else:
            h = h * (1 + scale) + model["b"](model["a"](h))
        value = (model["head"](h) - 1).square().mean()
        if kind == "margin":
            return F.relu(1e-3 - model["a"](x()).std(0)).mean() + value
        return value + scale.square().sum() if kind == "squared weight" else value

    found = diagnose(model, loss)
    assert found.healthy, found.render()


def test_margins_that_are_satisfied_are_explained():
    model, anchor = nn.Linear(6, 4), x()
    found = diagnose(
        model,
        lambda: F.triplet_margin_loss(model(anchor), model(anchor + 1e-3), model(-20 * anchor), margin=0.1),
    )
    assert found.healthy, found.render()


def test_a_closure_that_cannot_run_again_is_not_accused():
    model, batches = mlp(3), iter([x()])

    def loss():
        out = model(next(batches))
        return F.mse_loss(out, out.detach())

    found = diagnose(model, loss)
    assert found.healthy
    assert [f.variant for f in found.findings] == ["minimum"]


def test_values_gradients_and_random_state_are_afterwards_what_they_were():
    model = mlp(3)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    diagnose(model, against(model, model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[2].weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)

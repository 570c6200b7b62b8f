"""Trainable tensors outside the module tree: what counts is what the graph of the loss ends in.

Each leaf that requires a gradient and is in no optimizer is named, with what holds it and the line that uses
it. It is a fault only if it can be neither an input nor a network that is fixed on purpose.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from clinometer.gradients.diagnose.diagnose import diagnose


def x():
    return torch.linspace(-1, 1, 24).reshape(6, 4)


def adam(model, *others):
    return torch.optim.Adam([*model.parameters(), *others])


def about(found):
    return [f for f in found.findings if f.cause == "not-in-optimizer"]


def one(found):
    (finding,) = about(found)
    assert finding.severity == "fault", found.render()
    return finding


class Kept(nn.Module):
    """Adds a tensor that is kept in one of several ways."""

    def __init__(self, make, where="scale"):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.where = where
        setattr(self, where, make())

    def forward(self, inputs):
        kept = getattr(self, self.where)
        while isinstance(kept, list | dict | SimpleNamespace):
            kept = kept[0] if isinstance(kept, list) else kept["w"] if isinstance(kept, dict) else kept.w
        return self.body(inputs) * kept  # <- here


KEPT = {
    "result of to()": (
        lambda: nn.Parameter(torch.ones(4, dtype=torch.float64)).to(torch.float32),
        "computed",
    ),
    "scaled parameter": (lambda: nn.Parameter(torch.ones(4)) * 0.1, "computed"),
    "scaled plain leaf": (lambda: torch.ones(4, requires_grad=True) * 0.1, "computed"),
    "plain tensor": (lambda: torch.ones(4, requires_grad=True), "plain"),
    "list": (lambda: [nn.Parameter(torch.ones(4))], "hidden"),
    "dict in a list": (lambda: [{"w": nn.Parameter(torch.ones(4))}], "hidden"),
    "object": (lambda: SimpleNamespace(w=nn.Parameter(torch.ones(4))), "hidden"),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_the_model_keeps_and_does_not_list_is_named_with_the_line(kind):
    make, variant = KEPT[kind]
    model = Kept(make)
    optimizer = adam(model)
    finding = one(diagnose(model, lambda: model(x()).square().mean(), optimizer=optimizer))
    assert finding.variant == variant
    assert all(name.startswith("scale") for name in finding.names)
    assert finding.where.source.endswith("# <- here")


def test_the_same_as_a_registered_parameter_is_healthy():
    model = Kept(lambda: nn.Parameter(torch.ones(4)))
    optimizer = adam(model)
    assert not diagnose(model, lambda: model(x()).square().mean(), optimizer=optimizer).findings


def test_a_tensor_of_a_list_that_an_optimizer_holds_is_not_mentioned():
    model = Kept(lambda: [nn.Parameter(torch.ones(4))])
    optimizer = adam(model, *model.scale)
    assert not diagnose(model, lambda: model(x()).square().mean(), optimizer=optimizer).findings
    assert not diagnose(model, lambda: model(x()).square().mean()).findings  # it exists, and holds it


def test_a_result_that_only_the_graph_knows_is_a_fault_without_an_optimizer_too():
    model = Kept(lambda: nn.Parameter(torch.ones(4)) * 0.1)
    assert one(diagnose(model, lambda: model(x()).square().mean())).variant == "computed"


def test_a_layer_made_in_the_forward_is_a_fault_at_the_line_that_makes_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, inputs):
            head = nn.Linear(4, 1)  # <- here
            return head(self.body(inputs))

    model = Model()
    for optimizer in (None, adam(model)):
        finding = one(diagnose(model, lambda: model(x()).square().mean(), optimizer=optimizer))
        assert finding.variant == "new"
        assert finding.where.source.endswith("# <- here")
        assert "__init__" in finding.say("remedy", "en")


class Centres(nn.Module):
    def __init__(self):
        super().__init__()
        self.centers = nn.Parameter(torch.randn(3, 4))

    def forward(self, features, labels):
        return (features - self.centers[labels]).square().mean()  # <- here


def test_a_criterion_s_own_parameters_are_named_until_an_optimizer_holds_them():
    model, criterion, labels = nn.Linear(4, 4), Centres(), torch.arange(6) % 3
    only = adam(model)

    def loss():
        return criterion(model(x()), labels)

    finding = one(diagnose(model, loss, optimizer=only))
    assert (finding.names, finding.variant) == (("criterion.centers",), "outside")
    assert finding.where.source.endswith("# <- here")
    assert "requires_grad_(False)" in finding.say("remedy", "en")
    without = diagnose(model, loss)
    assert without.healthy
    assert [f.variant for f in about(without)] == ["beside"]
    criterion.requires_grad_(False)
    assert not diagnose(model, loss, optimizer=only).findings
    criterion.requires_grad_(True)
    assert not diagnose(model, loss, optimizer=adam(model, *criterion.parameters())).findings


def test_a_parameter_of_a_variable_is_named():
    model, temperature = nn.Linear(4, 4), nn.Parameter(torch.ones(()))
    found = diagnose(model, lambda: (model(x()) / temperature).square().mean(), optimizer=adam(model))
    assert one(found).names == ("temperature",)


def test_a_plain_tensor_of_a_variable_may_be_the_loop_s_own():
    model, multiplier = nn.Linear(4, 4), torch.ones((), requires_grad=True)
    found = diagnose(model, lambda: (model(x()) * multiplier).square().mean(), optimizer=adam(model))
    assert found.healthy
    assert [(f.variant, f.names) for f in about(found)] == [("variable", ("multiplier",))]


def attack(model):
    delta = torch.zeros(6, 4, requires_grad=True)
    return lambda: model(x() + delta).square().mean()


def coordinates(model):
    points = x().requires_grad_()

    def loss():
        u = model(points)
        (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        return (slope - points).square().mean()

    return loss


def coordinates_made_inside(model):
    def loss():
        points = x().requires_grad_()
        (slope,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
        return slope.square().mean() + model(points).square().mean()

    return loss


def precomputed_input(model):
    points = x().requires_grad_() * 2
    return lambda: model(points).square().mean()


def teacher(model):
    fixed = copy.deepcopy(model)
    return lambda: (model(x()) - fixed(x()) - 1).square().mean()


@pytest.mark.parametrize("form", [attack, coordinates, coordinates_made_inside, precomputed_input, teacher])
def test_inputs_and_fixed_networks_are_no_fault(form):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    loss = form(model)
    for optimizer in (None, adam(model)):
        found = diagnose(model, loss, optimizer=optimizer)
        assert found.healthy, found.render()
        if form in (coordinates, coordinates_made_inside, precomputed_input):
            assert not about(found), found.render()


def test_an_optimizer_made_elsewhere_counts():
    model, head = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
    other = torch.optim.SGD([head], 0.1)
    found = diagnose(model, lambda: (model(x()) * head).square().mean(), optimizer=adam(model))
    assert not found.findings
    assert other.state == {}

"""A loss whose backward reaches the parameters by a hook or a Function: what is in .grad then counts."""

import pytest
import torch
from torch import nn

from clinometer.gradients.diagnose.diagnose import diagnose

X = torch.linspace(-1, 1, 48).reshape(8, 6)


def contrast(embedded):
    return nn.functional.cross_entropy(embedded @ embedded.T, torch.arange(8))


def second_pass(model, gradients, scale=1.0):
    with torch.enable_grad():
        for part, gradient in zip(X.split(2), gradients.split(2), strict=True):
            (model(part) * gradient * scale).sum().backward()


class Cached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, gradients, model):
        ctx.rest = model, gradients
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        second_pass(*ctx.rest, gradient)
        return gradient, None, None


def embeddings(model):
    with torch.no_grad():
        return torch.cat([model(part) for part in X.split(2)]).requires_grad_()


def cached(model):
    leaves = embeddings(model)
    value = contrast(leaves)
    (gradients,) = torch.autograd.grad(value, leaves)
    return value.detach().requires_grad_(), gradients


def hook_on_the_loss(model):
    value, gradients = cached(model)
    value.register_hook(lambda scale: second_pass(model, gradients, scale))
    return value


def hook_below_the_loss(model):
    return hook_on_the_loss(model) * 0.5


def hook_on_the_embeddings(model):
    leaves = embeddings(model)
    leaves.register_hook(lambda gradients: second_pass(model, gradients))
    return contrast(leaves)


def custom_function(model):
    value, gradients = cached(model)
    return Cached.apply(value, gradients, model)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(6, 4)


HOOKED = [hook_on_the_loss, hook_below_the_loss, hook_on_the_embeddings, custom_function]


@pytest.mark.parametrize("form", HOOKED)
def test_a_backward_that_reaches_every_parameter_by_a_hook_is_no_fault(model, form):
    found = diagnose(model, lambda: form(model), optimizer=torch.optim.Adam(model.parameters()))
    assert found.healthy, found.render()
    assert {entry.status for entry in found.entries().values()} == {"ok"}
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("form", [embeddings, lambda model: cached(model)[0]])
def test_the_same_without_the_hook_is_a_fault(model, form):
    found = diagnose(model, lambda: form(model).sum())
    assert not found.healthy
    assert found["weight"].status == "none"


def test_what_the_hook_leaves_out_is_a_fault(model):
    both = nn.ModuleDict({"encoder": model, "spare": nn.Linear(6, 4)})
    found = diagnose(both, lambda: hook_on_the_loss(model))
    assert found["spare.weight"].cause == "unused"
    assert found["encoder.weight"].status == "ok"

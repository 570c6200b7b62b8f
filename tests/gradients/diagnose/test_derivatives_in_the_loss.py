"""A derivative of the model in the loss: what it does not depend on is explained, whichever call takes it.

The bias that is added last does not change a slope, be it taken by `torch.func` or by `torch.autograd`. A
detach inside a transform is a cut, with its line.
"""

import pytest
import torch
from torch import nn
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

from clinometer.gradients.diagnose.diagnose import diagnose

X = torch.linspace(-1, 1, 18).reshape(6, 3)


def total(model):
    return lambda inputs: model(inputs).sum()


def of_autograd(model):
    inputs = X.clone().requires_grad_()
    return torch.autograd.grad(outputs=model(inputs).sum(), inputs=inputs, create_graph=True)[0]


SLOPES = {
    "grad": lambda m: grad(total(m))(X),
    "vmap of grad": lambda m: vmap(grad(total(m)))(X),
    "jacrev": lambda m: jacrev(m)(X),
    "jacfwd": lambda m: jacfwd(m)(X),
    "vjp": lambda m: vjp(m, X)[1](torch.ones(6, 1))[0],
    "jvp": lambda m: jvp(m, (X,), (torch.ones_like(X),))[1],
    "hessian": lambda m: vmap(hessian(total(m)))(X),
    "autograd": of_autograd,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


@pytest.mark.parametrize("slope", SLOPES)
def test_the_bias_that_is_added_last_is_explained(model, slope):
    found = diagnose(model, lambda: SLOPES[slope](model).square().mean())
    assert found.healthy, found.render()
    assert found["2.bias"].cause == "not-reaching-loss"
    assert found["2.bias"].finding.variant == "differentiated"
    assert all(found[name].cause is None for name in ("0.weight", "0.bias", "2.weight"))


def test_with_the_value_in_the_loss_it_has_a_gradient(model):
    def loss():
        slopes, value = grad_and_value(total(model))(X)
        return slopes.square().mean() + value.square()

    assert not diagnose(model, loss).findings


@pytest.mark.parametrize("transform", [grad, jacrev, lambda f: lambda inputs: vmap(grad(f))(inputs)])
def test_a_detach_inside_is_a_cut_at_its_line(model, transform):
    def cut(inputs):
        h = model[0](inputs)
        h = h.detach()  # <- here
        return model[2](model[1](h + inputs.sum())).sum()

    found = diagnose(model, lambda: transform(cut)(X).square().mean())
    assert not found.healthy
    for name in ("0.weight", "0.bias"):
        assert (found[name].cause, found[name].finding.variant) == ("cut", "detach")
        assert found[name].where.source.endswith("# <- here")


def test_without_create_graph_it_is_still_a_cut(model):
    def loss():
        inputs = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(inputs).sum(), inputs)  # <- here
        return slope.square().mean() + model[0](X).sum()

    found = diagnose(model, loss)
    assert (found["2.weight"].cause, found["2.weight"].finding.variant) == ("cut", "grad")
    assert found["2.weight"].where.source.endswith("# <- here")

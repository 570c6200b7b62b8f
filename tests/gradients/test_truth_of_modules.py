"""A module may have a length or a truth value of its own; no call asks for it."""

import pytest
import torch
from torch import nn

import clinometer


class Empty(nn.Linear):
    def __len__(self):
        return 0


class Refuses(nn.Linear):
    def __bool__(self):
        raise TypeError("ambiguous")


class RefusesItsLength(nn.Linear):
    def __len__(self):
        raise TypeError("Net does not support len()")  # as a compiled module does


@pytest.mark.parametrize("kind", [Empty, Refuses, RefusesItsLength])
def test_each_call_takes_it_like_any_other_module(kind):
    torch.manual_seed(0)
    model, x, y = kind(3, 1), torch.randn(4, 3), torch.randn(4, 1)

    def loss(rows=slice(None)):
        return ((model(x[rows]) - y[rows]) ** 2).mean()

    assert clinometer.diagnose(model, loss).healthy
    assert clinometer.check_gradients(model, loss).passed
    assert clinometer.check_accumulation(
        model, loss, [lambda: loss(slice(0, 2)) / 2, lambda: loss(slice(2, 4)) / 2]
    ).passed
    assert clinometer.attribute(model, loss, "weight", (0, 0)).gradient == pytest.approx(
        float(torch.autograd.grad(loss(), model.weight)[0][0, 0])
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with clinometer.explain_step(optimizer, model, loss=loss) as step:
        loss().backward()
        optimizer.step()
    assert step["weight"].status == "stepped"

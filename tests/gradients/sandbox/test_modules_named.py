import functools

import torch
from torch import nn

from clinometer.gradients.sandbox.sandbox import modules_named_by

MODULE = nn.Linear(2, 2)


def uses_a_global():
    return [MODULE(torch.ones(2)) for _ in range(1)]


class Trainer:
    def __init__(self, model):
        self.model = model

    def loss(self):
        return self.model(torch.ones(2)).sum()

    __call__ = loss


def test_modules_are_found_however_the_closure_names_them():
    def default(model=MODULE):
        return model

    enclosed = MODULE
    for closure in (
        uses_a_global,
        default,
        lambda: enclosed,
        lambda: [enclosed for _ in range(2)],
        functools.partial(uses_a_global),
        functools.partial(torch.sum, MODULE),
        Trainer(MODULE).loss,
        Trainer(MODULE),
        MODULE.forward,
        MODULE,
    ):
        assert modules_named_by(closure) == [MODULE]
    assert modules_named_by(None) == modules_named_by(torch.sum) == []

"""The promise of no trace holds for modules that nobody names: a criterion imported from another file."""

import sys
import weakref

import pytest
import torch
from torch import nn

from clinometer import check_gradients, diagnose

CRITERION = """
import torch
from torch import nn


class Centred(nn.Module):
    def __init__(self, update):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.calls = 0
        self.update = update

    def forward(self, out, y):
        self.calls += 1
        if self.update == "assign":
            self.mean = 0.9 * self.mean + 0.1 * out.detach().mean()
        elif self.update == "in place":
            self.mean.mul_(0.9).add_(0.1 * out.detach().mean())
        return ((out - self.mean - y) ** 2).mean()


_CRITERIA = {}


def loss(out, y, update="assign"):
    return _CRITERIA.setdefault(update, Centred(update))(out, y)
"""


@pytest.fixture
def criterion(tmp_path, monkeypatch):
    (tmp_path / "criterion_of_another_file.py").write_text(CRITERION)
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("criterion_of_another_file")
    del sys.modules["criterion_of_another_file"]


def batch():
    torch.manual_seed(0)
    return nn.Linear(4, 1), torch.randn(8, 4), torch.randn(8, 1)


@pytest.mark.parametrize("update", ["assign", "in place"])
@pytest.mark.parametrize("call", [diagnose, check_gradients])
def test_a_criterion_of_another_file_is_afterwards_what_it_was(criterion, call, update):
    model, x, y = batch()
    criterion.loss(model(x), y, update)
    kept = criterion._CRITERIA[update]
    mean, calls = kept.mean, kept.calls
    value = mean.clone()
    call(model, lambda: criterion.loss(model(x), y, update))
    assert kept.mean is mean
    assert torch.equal(kept.mean, value)
    assert kept.calls == calls


def test_its_running_statistics_are_not_taken_for_randomness(criterion):
    model, x, y = batch()
    criterion.loss(model(x), y)
    assert check_gradients(model, lambda: criterion.loss(model(x), y)).passed


@pytest.mark.parametrize("call", [diagnose, check_gradients])
def test_modules_that_the_closure_makes_anew_are_let_go(call):
    model, x, y = batch()
    alive, most = weakref.WeakSet(), 0

    class Fresh(nn.Module):
        def forward(self, out):
            return ((out - y) ** 2).mean()

    def loss():
        nonlocal most
        criterion = Fresh()
        alive.add(criterion)
        most = max(most, len(alive))
        return criterion(model(x))

    call(model, loss)
    assert most <= 3


def test_no_hook_is_left_behind(criterion):
    from torch.nn.modules import module

    model, x, y = batch()
    before = len(module._global_forward_pre_hooks)
    with pytest.raises(ZeroDivisionError):
        diagnose(model, lambda: criterion.loss(model(x), y) / (1 // 0))
    assert len(module._global_forward_pre_hooks) == before

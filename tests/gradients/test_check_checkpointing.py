"""Checkpointed blocks, reentrant or not: what happens inside them is checked like anything else."""

import pytest
import torch
from tests.gradients.broken import Apply
from tests.gradients.test_check_meant import ByDetach, Round, Spike
from torch import nn
from torch.utils.checkpoint import checkpoint

from clinometer.gradients.check import check_gradients


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_checked(reentrant):
    first, inner, last = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)
    model = nn.ModuleList([first, inner, last])
    x = torch.randn(6, 4)
    check = check_gradients(
        model, lambda: last(checkpoint(inner, first(x), use_reentrant=reentrant)).square().mean()
    )
    assert check.passed


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", ["round", "no_grad", "stopped target", "gumbel", "numpy"])
def test_what_a_checkpointed_block_holds_back_is_held_constant_too(form, reentrant):
    first, inner, last = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), ByDetach(form)), nn.Linear(4, 2)
    model = nn.ModuleList([first, inner, last])
    x = torch.randn(6, 4)
    check = check_gradients(
        model, lambda: last(checkpoint(inner, first(x), use_reentrant=reentrant)).square().mean()
    )
    assert check.findings == (), check.render("en")
    assert check.passed


@pytest.mark.parametrize("function", [Round, Spike])
def test_a_surrogate_function_in_a_reentrant_checkpoint_is_explained(function):
    first, inner, last = nn.Linear(4, 4), Apply(function), nn.Linear(4, 2)
    model = nn.ModuleList([first, inner, last])
    x = torch.randn(6, 4)
    check = check_gradients(
        model, lambda: last(checkpoint(inner, first(x), use_reentrant=True)).square().mean()
    )
    (finding,) = check.findings
    assert (finding.cause, finding.names) == ("surrogate-gradient", ("0.weight", "0.bias"))


def test_a_wrong_backward_in_a_reentrant_checkpoint_is_named():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    first, inner, last = nn.Linear(4, 4), Apply(Wrong), nn.Linear(4, 2)
    model = nn.ModuleList([first, inner, last])
    x = torch.randn(6, 4)
    check = check_gradients(
        model, lambda: last(checkpoint(inner, first(x), use_reentrant=True)).square().mean()
    )
    (finding,) = check.findings
    assert (finding.cause, finding.values["kind"]) == ("wrong-backward", "Wrong")
    assert finding.values["parts"]


def test_checkpointing_is_afterwards_what_it_was():
    forward = torch.utils.checkpoint.CheckpointFunction.__dict__["forward"]
    test_checkpointed_layers_are_checked(True)
    assert torch.utils.checkpoint.CheckpointFunction.__dict__["forward"] is forward

"""Checkpointed blocks, reentrant or not: what happens inside them is checked like anything else."""

import pytest
import torch
from tests.gradients.check.broken import Apply
from tests.gradients.check.test_check_meant import ByDetach, Round, Spike
from tests.gradients.healthy import TRANSFORMERS
from torch import nn
from torch.utils.checkpoint import checkpoint

from clinometer.gradients.check.check_gradients import check_gradients


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


class Normalised(nn.Module):
    """As Llama's norm does: in float32, whatever came in."""

    def forward(self, x):
        y = x.to(torch.float32)
        return (y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_that_asks_for_float32_is_computed_again_in_double(reentrant, dtype):
    first, last = nn.Linear(4, 4), nn.Linear(4, 2)
    inner = nn.Sequential(nn.Linear(4, 4), Normalised(), nn.Linear(4, 4))
    model = nn.ModuleList([first, inner, last]).to(dtype)
    x = torch.randn(6, 4, dtype=dtype)
    check = check_gradients(
        model, lambda: last(checkpoint(inner, first(x), use_reentrant=reentrant)).square().mean()
    )
    assert {check[name].status for name in check} == {"passed"}, check.render("en")
    assert check.wrong_layers == ()


def test_corners_in_a_checkpointed_block_do_not_disturb_what_torch_saves_for_it():
    first, last = nn.Linear(4, 4), nn.Linear(4, 2)
    inner = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4))
    model = nn.ModuleList([first, inner, last])
    x = torch.randn(6, 4)
    check = check_gradients(
        model, lambda: last(checkpoint(inner, first(x), use_reentrant=False)).square().mean()
    )
    assert check.passed, check.render("en")


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_transformers_models_pass_with_gradient_checkpointing(name, reentrant):
    model, loss = TRANSFORMERS[name]()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    check = check_gradients(model, loss)
    assert check.passed, check.render("en")

"""explain_step() leaves nothing behind."""

import copy

import pytest
import torch
from tests.gradients.traces import trace_of
from torch import nn

from clinometer.gradients.step.explain_step import explain_step
from clinometer.optim.adamw import AdamW


def trained():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(10, 6)

    def loss():
        return model(x).square().mean()

    loss().backward()
    optimizer.step()
    optimizer.zero_grad()
    loss().backward()
    return model, optimizer, loss


def hooks(optimizer):
    return len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)


def test_a_watched_step_is_bit_for_bit_the_step_that_nobody_watched():
    model, optimizer, loss = trained()
    twin, twin_optimizer, _ = copy.deepcopy((model, optimizer, None))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    state = torch.get_rng_state()
    with explain_step(optimizer, model, loss=loss) as anatomy:
        optimizer.step()
    assert torch.equal(state, torch.get_rng_state())
    twin_optimizer.step()
    for (name, p), q in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, twin_optimizer.state[q][key])
    assert hooks(optimizer) == (0, 0)
    assert anatomy.faithful is True


def test_looking_changes_nothing_and_later_training_does_not_change_what_was_seen():
    model, optimizer, loss = trained()
    with explain_step(optimizer, model, loss=loss) as anatomy:
        optimizer.step()
    before = trace_of(model, optimizer)
    seen = anatomy.to_dict(), anatomy["0.weight"][2, 3].to_dict()
    anatomy.render("en"), anatomy["0.weight"].render("zh"), anatomy["0.weight"][2, 3].render("en")
    assert trace_of(model, optimizer) == before
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert (anatomy.to_dict(), anatomy["0.weight"][2, 3].to_dict()) == seen


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_passes_and_the_hooks_are_gone(error):
    model, optimizer, loss = trained()
    before = trace_of(model, optimizer)
    with pytest.raises(error), explain_step(optimizer, model, loss=loss):
        raise error
    assert trace_of(model, optimizer) == before
    assert hooks(optimizer) == (0, 0)


def test_a_failing_loss_stops_the_step_before_it_and_leaves_all_as_it_was():
    model, optimizer, _ = trained()

    def broken():
        model.eval()
        model[1].running_mean.add_(1)
        torch.rand(3)
        raise ZeroDivisionError

    before = trace_of(model, optimizer)
    with pytest.raises(ZeroDivisionError), explain_step(optimizer, model, loss=broken):
        optimizer.step()
    assert trace_of(model, optimizer) == before
    assert hooks(optimizer) == (0, 0)


def test_an_exception_inside_the_step_passes():
    model, _, _ = trained()

    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise ZeroDivisionError

    optimizer = Failing(model.parameters(), lr=0.1)
    with pytest.raises(ZeroDivisionError), explain_step(optimizer, model):
        optimizer.step()
    assert hooks(optimizer) == (0, 0)


def test_the_users_own_step_hooks_stay():
    model, optimizer, _ = trained()
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    with explain_step(optimizer, model):
        optimizer.step()
    optimizer.step()
    assert called == ["before", "after"] * 2
    assert hooks(optimizer) == (1, 1)


def test_an_optimizer_without_torchs_hooks_is_watched_from_outside():
    class Plain:
        def __init__(self, params, lr):
            self.param_groups, self.state = [{"params": list(params), "lr": lr}], {}

        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                p -= self.param_groups[0]["lr"] * p.grad

    model, _, _ = trained()
    optimizer = Plain(model.parameters(), 0.1)
    with explain_step(optimizer, model) as anatomy:
        optimizer.step()
    assert anatomy.faithful is True  # known by what it does, whatever its name
    assert anatomy["0.weight"].measures.cosine == pytest.approx(1, abs=1e-6)
    optimizer = type("SGD", (Plain,), {})(model.parameters(), 0.1)
    with explain_step(optimizer, model) as anatomy:
        optimizer.step()
    assert anatomy.faithful is True
    assert anatomy["0.weight"].measures.worst_ulp <= 4


def test_a_wrapped_optimizer_is_unwrapped():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            self.optimizer.step()

    model, optimizer, _ = trained()
    wrapper = Wrapper(optimizer)
    with explain_step(wrapper, model) as anatomy:
        wrapper.step()
    assert anatomy.optimizer == "AdamW"
    assert anatomy.faithful is True


def test_a_compiled_models_names_and_loss_are_those_of_the_model():
    model, optimizer, _ = trained()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(10, 6)
    with explain_step(optimizer, compiled, loss=lambda: compiled(x).square().mean()) as anatomy:
        optimizer.step()
    assert next(iter(anatomy)) == "0.weight"
    assert anatomy.loss_change is not None

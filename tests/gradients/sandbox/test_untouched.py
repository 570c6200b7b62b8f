import random

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.gradients.traces import bits, hooks_of, trace_of
from torch import nn

from clinometer.gradients.sandbox.closure import evaluate
from clinometer.gradients.sandbox.sandbox import untouched
from clinometer.gradients.sandbox.subject import Subject


class Model(nn.Module):
    """One of everything: running statistics, a tied pair, a reassigned buffer, attributes that change."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.inner[3].weight
        self.unused = nn.Parameter(torch.tensor([float("nan"), -0.0, float("inf")]))
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.ema = torch.zeros(4)
        self.calls, self.history = 0, []
        self.hidden = [nn.Linear(4, 4)]

    def forward(self, x):
        y = self.head(self.hidden[0](self.inner(x)))
        self.average = 0.9 * self.average + y.detach().mean(0)
        self.steps += 1
        self.ema.mul_(0.9).add_(y.detach().mean(0))
        self.calls += 1
        self.history.append(self.calls)
        return y


def trained(steps=2):
    """A model in the middle of its training, with gradients and an optimizer's state."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def everything(model, optimizer=None):
    return {
        **trace_of(model, optimizer),
        "ema": bits(model.ema),
        "history": list(model.history),
        "hidden": trace_of(model.hidden[0]),
    }


def difference(before, after):
    return [key for key in before if before[key] != after[key]]


def weight(model):
    return model.inner[0].weight


@torch.no_grad()
def scale(model, optimizer):
    weight(model).mul_(3)


def scale_data(model, optimizer):
    weight(model).data.clamp_(-0.01, 0.01)


def other_memory(model, optimizer):
    weight(model).data = torch.randn(4, 4)


def half(model, optimizer):
    model.half()


def other_shape(model, optimizer):
    weight(model).data = torch.randn(7)


def other_parameter(model, optimizer):
    model.inner[0].weight = nn.Parameter(torch.zeros(4, 4))


def negative_zero(model, optimizer):
    model.unused.data[1] = 0.0


def freeze(model, optimizer):
    model.requires_grad_(False)


def backward(model, optimizer):
    model(torch.randn(8, 4)).sum().backward()


def zero_grads(model, optimizer):
    optimizer.zero_grad(set_to_none=False)
    weight(model).grad = torch.ones(4, 4)


def step(model, optimizer):
    backward(model, optimizer)
    optimizer.step()


def other_groups(model, optimizer):
    optimizer.param_groups[0]["lr"] = 7.0
    optimizer.add_param_group({"params": [torch.ones(1, requires_grad=True)]})


def forget_state(model, optimizer):
    optimizer.state.clear()


def to_eval(model, optimizer):
    model.inner.eval()


def add_hook(model, optimizer):
    model.inner[1].register_forward_hook(lambda *_: None)


def attributes(model, optimizer):
    model.new, model.calls = 1, "many"
    del model.ema


def draw(model, optimizer):
    torch.rand(3), random.random(), numpy.random.rand()


def switches(model, optimizer):
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.float16)
    torch.set_anomaly_enabled(True)


def buffer_with_graph(model, optimizer):
    model.average.mul_(weight(model).sum())


MUTATIONS = [
    *(scale, scale_data, other_memory, half, other_shape, other_parameter, negative_zero, freeze, backward),
    *(zero_grads, step, other_groups, forget_state, to_eval, add_hook, attributes, draw, switches),
    buffer_with_graph,
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda f: f.__name__)
def test_each_mutation_is_seen_by_the_trace_and_undone(mutation):
    model, optimizer = trained()
    before = everything(model, optimizer)
    changed = None
    with untouched(Subject.of(model), optimizer=optimizer):
        inside = everything(model, optimizer)
        mutation(model, optimizer)
        if mutation is not attributes:
            changed = difference(inside, everything(model, optimizer))
    assert difference(before, everything(model, optimizer)) == []
    assert changed is None or changed, "the mutation changed nothing, so the test proves nothing"


@given(
    mutations=st.lists(st.sampled_from(MUTATIONS), max_size=8),
    error=st.sampled_from([None, RuntimeError, KeyboardInterrupt, SystemExit]),
    without_grads=st.booleans(),
)
def test_any_sequence_of_mutations_and_any_exception_leaves_no_bit_changed(mutations, error, without_grads):
    model, optimizer = trained(1)
    if without_grads:
        optimizer.zero_grad()
    weight(model).grad = None
    before = everything(model, optimizer)
    came = None
    try:
        with untouched(Subject.of(model), optimizer=optimizer):
            for mutation in mutations:
                try:
                    mutation(model, optimizer)
                except (RuntimeError, AttributeError, KeyError):  # two mutations may exclude each other
                    continue
            if error is not None:
                raise error
    except BaseException as caught:
        came = type(caught)
    assert came is error
    assert difference(before, everything(model, optimizer)) == []


def test_gradients_are_none_inside_and_the_same_objects_afterwards():
    model, _ = trained()
    held = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
    assert len(held) >= 4
    with untouched(Subject.of(model)):
        assert all(p.grad is None for p in model.parameters())
        model(torch.randn(8, 4)).square().sum().backward()
        assert weight(model).grad is not None
    for name, (grad, values) in held.items():
        assert model.get_parameter(name).grad is grad
        assert torch.equal(grad, values)


def test_a_gradient_that_the_closure_holds_and_zeroes_has_its_values_again():
    model, _ = trained()
    grad = weight(model).grad
    values = bits(grad)
    with untouched(Subject.of(model)):
        grad.zero_()
    assert bits(grad) == values


def test_a_graph_the_user_holds_can_still_be_walked_backward_afterwards():
    model, _ = trained()
    loss = model(torch.randn(8, 4)).square().mean()
    with untouched(Subject.of(model)):
        scale(model, None)
        model(torch.randn(8, 4)).square().mean().backward()
    loss.backward()  # a moved version counter would raise here
    assert torch.isfinite(weight(model).grad).all()


def test_what_nobody_wrote_to_keeps_its_version():
    model, _ = trained()
    versions = [p._version for p in model.parameters()]
    with untouched(Subject.of(model)):
        pass
    assert [p._version for p in model.parameters()] == versions


def test_interruption_while_putting_back_still_puts_everything_back(monkeypatch):
    model, optimizer = trained()
    before = everything(model, optimizer)
    from clinometer.gradients.sandbox import saved_state

    original, calls = saved_state.KeptBits.restore, []

    def interrupted_once(self):
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(saved_state.KeptBits, "restore", interrupted_once)
    with pytest.raises(KeyboardInterrupt), untouched(Subject.of(model), optimizer=optimizer):
        step(model, optimizer)
    assert len(calls) > 3
    assert difference(before, everything(model, optimizer)) == []


def test_a_cast_cached_inside_is_not_used_in_the_next_forward():
    model, x = nn.Linear(4, 4, bias=False), torch.ones(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        with untouched(Subject.of(model)):
            first = evaluate(lambda: model(x).float().sum()).item()
            model.weight.data.mul_(2)
            assert evaluate(lambda: model(x).float().sum()).item() == 2 * first
        assert torch.equal(model(x), expected)


def test_what_cannot_be_put_back_does_not_keep_the_rest_from_it(monkeypatch):
    model, optimizer = trained()
    before = everything(model, optimizer)
    from clinometer.gradients.sandbox import saved_state

    original = saved_state.KeptTensor.restore

    def failing(self):
        original(self)
        raise RuntimeError("this one cannot")

    monkeypatch.setattr(saved_state.KeptTensor, "restore", failing)
    with (
        pytest.raises(RuntimeError, match="this one cannot"),
        untouched(Subject.of(model), optimizer=optimizer),
    ):
        step(model, optimizer)
    assert difference(before, everything(model, optimizer)) == []


def test_modules_that_only_the_closure_names_are_put_back():
    model, _ = trained()
    x = torch.randn(8, 4)
    bound = nn.Linear(4, 4)

    def inner():
        return model(bound(x)).mean()

    def closure():
        return inner()

    before = everything(model), trace_of(bound)
    with untouched(Subject.of({"w": weight(model)}), closure=closure):
        evaluate(closure).backward()
        assert model.calls == 3
    assert difference(before[0], everything(model)) == []
    assert trace_of(bound) == before[1]


def test_rewind_gives_the_closure_the_same_state_but_leaves_the_values():
    model, _ = trained()
    x = torch.randn(8, 4)
    with untouched(Subject.of(model)) as before:
        first = evaluate(lambda: model(x).mean()).item()
        average = bits(model.average)
        before.rewind()
        assert model.steps.item() == 2
        assert evaluate(lambda: model(x).mean()).item() == first
        assert bits(model.average) == average
        with torch.no_grad():
            weight(model).add_(1)
        before.rewind()
        assert evaluate(lambda: model(x).mean()).item() != first
    leaf = torch.ones(3, requires_grad=True)
    with untouched(Subject.of({"w": leaf})) as before:
        leaf.data.add_(1)
        before.rewind()
        assert leaf.tolist() == [2.0, 2.0, 2.0]
    assert leaf.tolist() == [1.0, 1.0, 1.0]


def test_tied_and_shared_memory_is_copied_once():
    model = Model()
    with untouched(Subject.of(model)) as before:
        starts = [kept.key for kept in before._bits.values()]
    assert len(starts) == len(set(starts))


def test_hooks_of_counts_what_a_module_has():
    model = nn.Sequential(nn.Linear(2, 2))
    assert hooks_of(model) == {}
    model[0].register_forward_hook(lambda *_: None)
    assert hooks_of(model) == {("0", "_forward_hooks"): 1}

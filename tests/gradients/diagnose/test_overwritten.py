"""A value that the backward needs and somebody wrote over: both lines are named."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clinometer.distributed.ranks import Ranks
from clinometer.gradients.diagnose.diagnose import diagnose


def x():
    return torch.ones(3, 4)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        ctx.save_for_backward(value)
        return value * value

    @staticmethod
    def backward(ctx, gradient):
        (value,) = ctx.saved_tensors
        return 2 * value * gradient


def plus_equals(model):
    h = model(x()).exp()  # needs
    h += 1  # writes
    return h.sum()


def assignment_to_an_index(model):
    h = model(x()).sigmoid()  # needs
    h[:, 0] = 0.0  # writes
    return h.sum()


def relu_in_place(model):
    h = model(x()).tanh()  # needs
    F.relu_(h)  # writes
    return h.sum()


def relu_module_in_place(model):
    h = model(x()).sigmoid()  # needs
    h = nn.ReLU(inplace=True)(h)  # writes
    return h.sum()


def a_copy_into_a_view(model):
    h = model(x()).exp()  # needs
    h[1:].copy_(torch.zeros(2, 4))  # writes
    return h.sum()


def out_argument(model):
    buffer = torch.ones(3, 4)
    h = model(x()) * buffer  # needs
    torch.add(torch.ones(3, 4), 1, out=buffer)  # writes
    return h.sum()


def a_buffer_that_is_used_twice(model):
    state = torch.ones(4)
    total = 0
    for _ in range(2):
        total = total + (model(x()) * state).sum()  # needs
        state.mul_(0.9)  # writes
    return total


def a_weight_stepped_between_forward_and_backward(model):
    first = model(model(x())).sum()  # needs
    model(x()).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1, foreach=True).step()  # writes
    return first


def what_a_custom_function_saved(model):
    h = model(x()) + 0
    y = Square.apply(h)  # needs
    h.zero_()  # writes
    return y.sum()


def a_closure_with_a_backward_of_its_own(model):
    h = model(x()).exp()  # needs
    h += 1  # writes
    loss = h.sum()
    loss.backward()
    return loss


def the_first_of_two_writers(model):
    h = model(x()).exp()  # needs
    h += 1  # writes
    h *= 2
    return h.sum()


def two_that_need_it(model):
    h = model(x()).exp()
    y = h.sigmoid() * h  # needs
    h += 1  # writes
    return y.sum()


FAULTS = [
    plus_equals,
    assignment_to_an_index,
    relu_in_place,
    relu_module_in_place,
    a_copy_into_a_view,
    out_argument,
    a_buffer_that_is_used_twice,
    a_weight_stepped_between_forward_and_backward,
    what_a_custom_function_saved,
    a_closure_with_a_backward_of_its_own,
    the_first_of_two_writers,
    two_that_need_it,
]


def line_of(function, comment):
    first = function.__code__.co_firstlineno
    with open(__file__) as file:
        lines = file.read().splitlines()[first:]
    return first + 1 + next(i for i, line in enumerate(lines) if line.endswith(comment))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_who_needs_it_and_who_wrote_are_named(fault):
    model = nn.Linear(4, 4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inplace") as caught:
        diagnose(model, lambda: fault(model))
    (note,) = caught.value.__notes__
    needs, writes = (f"test_overwritten.py:{line_of(fault, c)} " for c in ("# needs", "# writes"))
    assert f"the backward of {needs}(" in note
    assert f"that {writes}(" in note
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_writing_over_what_nobody_needs_is_no_fault():
    model = nn.Linear(4, 4)

    def closure():
        h = model(x())
        h += 1
        h[:, 0] = 0.0
        F.relu_(h)
        return h.sum()

    assert diagnose(model, closure).healthy


def test_a_closure_that_cannot_run_twice_keeps_its_error_with_the_line_that_needs_the_value():
    model, batches = nn.Linear(4, 4), iter([x()])

    def closure():
        h = model(next(batches)).exp()
        h += 1
        return h.sum()

    with pytest.raises(RuntimeError, match="inplace") as caught:
        diagnose(model, closure)
    (note,) = caught.value.__notes__
    assert "(h = model(next(batches)).exp())" in note


@pytest.mark.parametrize("fault", [plus_equals, what_a_custom_function_saved, two_that_need_it])
def test_the_line_that_needs_it_is_found_without_another_forward(fault, monkeypatch):
    """As it is where other ranks would wait."""
    monkeypatch.setattr(Ranks, "alone", False)
    monkeypatch.setattr(Ranks, "stand_ins", lambda self: {})
    model, forwards = nn.Linear(4, 4), []
    with pytest.raises(RuntimeError, match="inplace") as caught:
        diagnose(model, lambda: forwards.append(1) or fault(model))
    (note,) = caught.value.__notes__
    assert f"the backward of test_overwritten.py:{line_of(fault, '# needs')} (" in note
    assert len(forwards) == 1


# ---- the remedy can be followed at the line that is named ----


def the_gan_s_step_between_forward_and_backward(model, mended):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    first = model(model(x())).sum()  # needs
    model(x()).sum().backward()
    if mended:
        first.backward()
    optimizer.step()  # writes
    if not mended:
        first.backward()
    return first


def an_average_copied_into_the_weights(model, mended):
    first = model(model(x())).sum()  # needs
    if mended:
        first.backward()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p * 0.9)  # writes
    if not mended:
        first.backward()
    return model(x()).sum() + first.detach()


def a_state_loaded_between(model, mended):
    state = {name: value * 2 for name, value in model.state_dict().items()}
    h = model(x())
    first = (h @ model.weight).sum()  # needs
    if mended:
        first.backward()
    model.load_state_dict(state)  # writes
    if not mended:
        first.backward()
    return first


def weights_clipped_between(model, mended):
    first = model(model(x())).sum()  # needs
    if mended:
        first.backward()
    with torch.no_grad():
        model.weight.clamp_(-0.01, 0.01)  # writes
    if not mended:
        first.backward()
    return first


def a_weight_normalised_in_the_forward(model, mended):
    total = 0
    for _ in range(2):
        weight = model.weight
        if mended:
            weight = weight / weight.norm()
        else:
            with torch.no_grad():
                weight.div_(weight.norm())  # writes
        h = F.linear(x(), weight, model.bias)
        total = total + F.linear(h, weight).sum()  # needs
    return total


def an_activation_set_to_zero(model, mended):
    h = model(x()).exp()  # needs
    if mended:
        h = h.clone()
    h.zero_()  # writes
    return h.sum()


def an_entry_assigned(model, mended):
    h = model(x()).sigmoid()  # needs
    if mended:
        h = h.clone()
    h[:, 0] = 0.0  # writes
    return h.sum()


def a_sum_into_a_view(model, mended):
    h = model(x()).exp()  # needs
    if mended:
        h = h.clone()
    part = h[1:]
    part += 1  # writes
    return h.sum()


def an_in_place_layer(model, mended):
    h = model(x()).tanh()  # needs
    h = nn.ReLU(inplace=not mended)(h)  # writes
    return h.sum()


def in_place_dropout(model, mended):
    h = model(x()).tanh()  # needs
    h = F.dropout(h, 0.5, inplace=not mended)  # writes
    return h.sum()


WEIGHTS = "Run this backward before the write"
REMEDIES = [
    (the_gan_s_step_between_forward_and_backward, "Run this backward before the step, or run the forward at"),
    (an_average_copied_into_the_weights, WEIGHTS),
    (a_state_loaded_between, WEIGHTS),
    (weights_clipped_between, WEIGHTS),
    (a_weight_normalised_in_the_forward, "compute a new tensor (w = …)"),
    (an_activation_set_to_zero, "x = x.clone() before it"),
    (an_entry_assigned, "x = x.clone() before"),
    (a_sum_into_a_view, "x = x.clone() before it"),
    (an_in_place_layer, "give it inplace=False"),
    (in_place_dropout, ""),
]


@pytest.mark.parametrize(("fault", "remedy"), REMEDIES, ids=lambda value: getattr(value, "__name__", ""))
def test_who_wrote_chooses_the_remedy_and_following_it_helps(fault, remedy):
    model = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="inplace") as caught:
        diagnose(model, lambda: fault(model, False))
    (note,) = caught.value.__notes__
    needs, writes = (f"test_overwritten.py:{line_of(fault, c)} (" for c in ("# needs", "# writes"))
    assert needs in note
    assert writes in note
    assert remedy in note
    if remedy in (WEIGHTS, REMEDIES[0][1]):
        assert "clone" not in note
        assert "torch.where" not in note
        assert "addcdiv" not in note
    diagnose(model, lambda: fault(model, True))

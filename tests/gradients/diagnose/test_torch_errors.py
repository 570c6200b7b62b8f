"""torch's own errors come through as they are, with a note: the person's lines and a remedy.

Principle: whatever torch refuses, its error reaches the person unchanged and is never replaced by an error of
the tool; the note names the line, and for what was prepared elsewhere both lines. The twin that follows the
remedy runs.
"""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from clinometer.gradients.check.check_gradients import check_gradients
from clinometer.gradients.diagnose.diagnose import diagnose
from clinometer.messages import set_language

X = torch.linspace(-1, 1, 12).view(3, 4)
CASES = []


def case(words, *said):
    """A faulty closure of (model, whether the remedy is followed), torch's words, and words of the note."""

    def add(closure):
        CASES.append((closure, words, said))
        return closure

    return add


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))


class View(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@case("leaf Variable", "torch.no_grad()")
def a_write_to_a_weight(model, mended):
    if mended:
        with torch.no_grad():
            model[0].weight += 0.1
    else:
        model[0].weight += 0.1  # here
    return model(X).sum()


@case("view of a leaf Variable", "torch.no_grad()")
def a_row_of_a_weight_is_set(model, mended):
    with torch.set_grad_enabled(not mended):
        model[0].weight[0] = 1.0  # here
    return model(X).sum()


@case("multiple views", "unbind", "x.clone()")
def a_write_to_one_of_several_views(model, mended):
    first, second = model(X).expand(3, 2).unbind(1)
    if mended:
        return (first.clone().add_(1) + second).sum()
    first += 1  # here
    return (first + second).sum()


@case("is a view and is being modified", "custom Function", "x.clone()")
def a_write_to_what_a_function_returned(model, mended):
    h = View.apply(model(X))  # here
    h = h.clone() if mended else h
    h += 1  # here
    return h.sum()


@case("Inference tensors cannot be saved", "torch.no_grad()", "x.clone()")
def a_tensor_of_inference_mode(model, mended):
    with torch.no_grad() if mended else torch.inference_mode():
        scale = torch.ones(3, 1) * 2
    return (model(X) * scale).sum()  # here


@case("Inplace update to inference tensor", "torch.no_grad()")
def a_write_to_a_tensor_of_inference_mode(model, mended):
    with torch.no_grad() if mended else torch.inference_mode():
        total = torch.ones(3, 1) * 2
    total.add_(model(X))  # here
    return total.sum()


@case("only for scalar outputs", "[3, 1]", ".mean()")
def a_backward_of_many_numbers(model, mended):
    loss = model(X)
    (loss.mean() if mended else loss).backward()  # here
    return loss.sum()


@case("real scalar outputs", ".abs()")
def a_backward_of_a_complex_number(model, mended):
    loss = torch.complex(model(X), model(X)).sum()
    (loss.abs() if mended else loss).backward()  # here
    return loss.abs()


@case("derivative for aten::binomial", "binomial", "x.detach()")
def a_binomial_sample(model, mended):
    p = model(X).sigmoid()
    drawn = torch.binomial(torch.full_like(p, 5.0), p.detach() if mended else p)  # here
    return (drawn * p).sum()


@case("derivative for aten::_sample_dirichlet", "x.detach()")
def a_dirichlet_sample_of_torch_s_own(model, mended):
    p = model[0](X).exp() + model(X).square()
    return (torch._sample_dirichlet(p.detach() if mended else p) * p).sum()  # here


@case("a second time", "retain_graph=True")
def two_backwards_through_one_graph(model, mended):
    loss = model(X).square().sum()
    torch.autograd.backward(loss, retain_graph=mended)
    torch.autograd.backward(loss)  # here
    return model(X).sum()


def lines_of(closure, comment="# here"):
    first = closure.__code__.co_firstlineno
    with open(__file__) as file:
        lines = file.read().splitlines()
    ends = [i for i in range(first + 1, len(lines)) if lines[i].startswith(("@", "def ", "class "))]
    return [i + 1 for i in range(first - 1, ends[0]) if lines[i].endswith(comment)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", [diagnose, check_gradients], ids=lambda tool: tool.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_the_error_is_torch_s_and_the_note_has_the_lines(case, tool):
    closure, words, said = case
    model = layers()
    with pytest.raises(RuntimeError, match=words) as caught:
        tool(model, lambda: closure(model, False))
    (note,) = caught.value.__notes__
    assert all(f"test_torch_errors.py:{line} (" in note for line in lines_of(closure)), note
    assert all(word in note for word in said), note
    model = layers()
    diagnose(model, lambda: closure(model, True))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_notes_exist_in_both_languages(language):
    set_language(language)
    try:
        for closure, _, _ in CASES:
            model = layers()
            with pytest.raises(RuntimeError) as caught:
                diagnose(model, lambda closure=closure, model=model: closure(model, False))
            (note,) = caught.value.__notes__
            assert "{" not in note
            assert note.startswith("Clinometer: " if language == "en" else "Clinometer：")
    finally:
        set_language(None)


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("tool", [diagnose, check_gradients], ids=lambda tool: tool.__name__)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Hardswish])
def test_an_in_place_layer_behind_a_hooked_one_is_named_with_it(tool, activation):
    def model(inplace):
        layers = nn.Sequential(nn.Conv1d(1, 2, 3), activation(inplace=inplace), nn.Conv1d(2, 1, 3))
        layers[0].register_full_backward_hook(lambda module, into, out: None)
        return layers

    broken, x = model(True), torch.randn(2, 1, 8)
    with pytest.raises(RuntimeError, match="BackwardHookFunction") as caught:
        tool(broken, lambda: broken(x).square().mean())
    (note,) = caught.value.__notes__
    assert "test_torch_errors.py" in note
    assert ", 1 (" in note  # the layer that writes
    assert "full backward hook (0, called at" in note
    assert "inplace=False" in note
    mended = model(False)
    assert diagnose(mended, lambda: mended(x).square().mean()).healthy
    plain = nn.Sequential(nn.Conv1d(1, 2, 3), activation(inplace=True), nn.Conv1d(2, 1, 3))
    assert diagnose(plain, lambda: plain(x).square().mean()).healthy


class Cached(nn.Module):
    """Attention that remembers earlier keys; or counts its calls; or neither."""

    def __init__(self, keeps):
        super().__init__()
        self.qkv, self.keeps = nn.Linear(4, 12), keeps
        self.past, self.calls = [], 0

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.keeps == "cache":
            self.past.append((k, v))
            k, v = (torch.cat(t, 1) for t in zip(*self.past, strict=True))
        if self.keeps == "counter":
            self.calls += 1
            k, v = k[:, : self.calls], v[:, : self.calls]
        return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize(("keeps", "attribute"), [("cache", "past"), ("counter", "calls")])
@pytest.mark.parametrize("how", ["module", "method", "lambda"])
def test_a_checkpointed_block_that_keeps_state_is_named_with_it(keeps, attribute, how):
    def build(keeps):
        model = nn.Sequential(nn.Linear(4, 4), Cached(keeps))
        block = model[1]
        function = {"module": block, "method": block.forward, "lambda": lambda h: block(h)}[how]

        def closure():
            block.past.clear()
            block.calls = 0
            return checkpoint(function, model[0](X[None]), use_reentrant=False).square().mean()

        return model, closure

    with pytest.raises(RuntimeError, match="recompute") as caught:
        diagnose(*build(keeps))
    (note,) = caught.value.__notes__
    assert "test_torch_errors.py:" in note
    assert attribute in note
    assert how == "lambda" or "Cached '1'" in note
    assert diagnose(*build("")).healthy


def test_a_checkpointed_block_that_draws_other_numbers_has_no_state_to_accuse():
    model, numbers = nn.Linear(4, 4), iter(range(2, 100))

    def block(h):
        return model(h)[:, : next(numbers) % 3 + 1].exp()

    with pytest.raises(RuntimeError, match="recompute") as caught:
        diagnose(model, lambda: checkpoint(block, X, use_reentrant=False).sum())
    (note,) = caught.value.__notes__
    assert "must do the same twice" in note
    assert "block (" in note


def test_an_error_inside_a_reentrant_checkpoint_comes_through():
    model = layers()

    def block(h):
        if torch.is_grad_enabled():
            raise RuntimeError("mine, in the second run")
        return model(h)

    def closure():
        return checkpoint(block, X.clone().requires_grad_(), use_reentrant=True).sum()

    for tool in (diagnose, check_gradients):
        with pytest.raises(RuntimeError, match="mine, in the second run"):
            tool(model, closure)
    assert diagnose(model, lambda: model(X).sum()).healthy  # nothing is left behind


def test_a_reentrant_checkpoint_over_an_input_of_the_closure_s_own_is_checked():
    model = layers()

    def closure(inplace):
        def block(h):
            h = model[0](h).exp()
            h = h.add_(1) if inplace else h + 1
            return model[1](h)

        return checkpoint(block, X.clone().requires_grad_(), use_reentrant=True).sum()

    assert check_gradients(model, lambda: closure(False)).passed
    for tool in (diagnose, check_gradients):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            tool(model, lambda: closure(True))


def test_mismatched_types_pass_through_without_a_note():
    model = layers()
    with pytest.raises(RuntimeError, match="dtype") as caught:
        diagnose(model, lambda: model(X.double()).sum())
    assert not getattr(caught.value, "__notes__", None)

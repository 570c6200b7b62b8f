"""Checking leaves nothing behind: bit for bit, also when an exception or Ctrl-C comes at any evaluation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.gradients.check.broken import BrokenLinear
from tests.gradients.traces import bits, trace_of
from torch import nn

from clinometer.gradients.check.check_gradients import check_gradients


class Busy(nn.Module):
    """Running statistics, dropout, a counter, a hook, a tied pair, a clamp of its own weights."""

    def __init__(self, dtype):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.ReLU())
        self.broken = BrokenLinear(4, 4, lambda dx, dw, db, x, w, g: (dx, 2 * dw, db))
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.inner[0].weight
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0
        self.to(dtype)

    def forward(self, x):
        self.seen += 1
        self.calls += 1
        self.inner[0].weight.data.clamp_(-3, 3)
        return self.head(self.broken(self.inner(x)))


def trained(dtype):
    torch.manual_seed(1)
    model = Busy(dtype)
    model.inner[3].register_forward_hook(lambda module, args, out: None)
    x = torch.randn(6, 4, dtype=dtype)
    model(x).square().mean().backward()
    return model, x


def difference(before, after):
    return [key for key in before if before[key] != after[key]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nothing_is_left_behind(dtype):
    model, x = trained(dtype)
    before, inputs = trace_of(model), (bits(x), x._version, x.data_ptr())
    check = check_gradients(model, lambda: model(x).square().mean(), entries={"head.weight": [(0, 1)]})
    assert check["broken.weight"].status == "wrong"
    assert difference(before, trace_of(model)) == []
    assert inputs == (bits(x), x._version, x.data_ptr())


@settings(max_examples=12)
@given(
    # The second run is the first in float64: an error there means that float64 is not possible.
    stop=st.integers(1, 80).filter(lambda n: n != 2),
    error=st.sampled_from([KeyboardInterrupt, RuntimeError, MemoryError]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_nothing_is_left_behind_when_it_is_interrupted_at_any_evaluation(stop, error, dtype):
    model, x = trained(dtype)
    before = trace_of(model)
    count = 0

    def closure():
        nonlocal count
        loss = model(x).square().mean()
        count += 1
        if count == stop:
            raise error
        return loss

    with pytest.raises(error):
        check_gradients(model, closure)
    assert difference(before, trace_of(model)) == []


def test_a_closure_that_fails_at_its_third_run_is_not_taken_for_one_that_cannot_run_in_float64():
    model, batches = torch.nn.Linear(4, 1), iter(torch.randn(2, 8, 4))
    with pytest.raises(StopIteration):
        check_gradients(model, lambda: model(next(batches)).square().mean())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_the_first_run_in_float64_leaves_nothing_either(error):
    model, x = trained(torch.float32)
    before = trace_of(model)
    calls = iter(range(10**6))

    def closure():
        if next(calls) == 1:
            raise error("no float64 here")
        return model(x).square().mean()

    if error is KeyboardInterrupt:
        with pytest.raises(error):
            check_gradients(model, closure)
    else:
        check = check_gradients(model, closure)
        assert "own-precision" in [finding.cause for finding in check.findings]
    assert difference(before, trace_of(model)) == []


def test_an_interruption_from_the_progress_callback_passes_and_leaves_nothing():
    model, x = trained(torch.float32)
    before = trace_of(model)

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_gradients(model, lambda: model(x).square().mean(), progress=stop)
    assert difference(before, trace_of(model)) == []


def test_a_custom_functions_forward_is_its_own_again():
    model, x = trained(torch.float32)
    own = vars(model.broken.function)["forward"]
    check_gradients(model, lambda: model(x).square().mean())
    assert vars(model.broken.function)["forward"] is own


def test_a_graph_the_user_holds_stays_valid():
    w = trained(torch.float32)[0].head.weight
    held = (w * w).sum()
    check_gradients({"w": w}, lambda: (w @ w).square().sum())
    held.backward()
    assert torch.isfinite(w.grad).all()


def test_progress_counts_up_to_its_total():
    model, x = trained(torch.float32)
    seen = []
    check_gradients(model, lambda: model(x).square().mean(), progress=lambda *given: seen.append(given))
    total = seen[0][1]
    assert seen == [(i, total) for i in range(1, total + 1)]
    assert total > 7


def test_the_same_seed_gives_the_same_result_and_another_seed_other_directions():
    model, x = trained(torch.float32)
    closure = lambda: model(x).square().mean()  # noqa: E731
    first, second, other = (check_gradients(model, closure, seed=s).to_dict() for s in (3, 3, 4))
    for result in (first, second, other):
        del result["seconds"]
    assert first == second
    assert first["tensors"]["broken.bias"]["numeric"] != other["tensors"]["broken.bias"]["numeric"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_result_has_all_its_forms(language):
    model, x = trained(torch.float32)
    check = check_gradients(model, lambda: model(x).square().mean())
    text = check.render(language)
    assert "broken.weight" in text
    assert ("every entry is 2 times" if language == "en" else "2 倍") in text
    assert max(len(line) for line in check.render(language, width=90).splitlines()) <= 90
    assert "<div" in check._repr_html_()
    assert check.to_dict()["tensors"]["broken.weight"]["factor"] == pytest.approx(2)

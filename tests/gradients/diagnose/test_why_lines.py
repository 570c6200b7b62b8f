"""A second look at rows and columns that are zero: patterns, what is left as it was, what may not be run."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.gradients.diagnose.planted.zero_gradient import Heads
from torch import nn

from clinometer.gradients.diagnose.diagnose import diagnose
from clinometer.gradients.diagnose.why_blocks_zero import _pattern


@given(
    st.lists(st.booleans(), min_size=1, max_size=6).filter(lambda part: any(part) and not all(part)),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_a_pattern_is_found_in_what_was_stretched_and_repeated_from_it(part, tiled, stretched, repeated):
    part = torch.tensor(part)
    found = _pattern(part.repeat(tiled), part.repeat_interleave(stretched).repeat(repeated))
    assert found is not None
    assert torch.equal(found.repeat(len(part) // len(found)), part)


@pytest.mark.parametrize(
    ("made", "zero"),
    [([1, 0, 0], [0, 1, 0]), ([1, 0], [1, 0, 0]), ([0, 0], [1, 0]), ([1, 1], [1, 1]), ([1, 0, 0, 0], [1, 0])],
)
def test_other_lines_are_no_pattern(made, zero):
    assert _pattern(torch.tensor(made).bool(), torch.tensor(zero).bool()) is None


def masked():
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0]).view(4, 1, 1)
    return Heads(lambda h: h * mask)


def test_a_masked_head_counts_as_a_head():
    model, inputs = masked(), torch.randn(2, 5, 16)
    (finding,) = diagnose(model, lambda: (model(inputs) - 1).square().mean()).findings
    assert (finding.values["zero"], finding.values["all"]) == (1, 4)
    assert "1 of 4 slices (heads, experts, channels, units) is masked here" in finding.say("what", "en")
    assert len(finding.names) == 4


def test_heads_that_share_their_keys_are_looked_at_in_groups():
    q, kv, o = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
    model = nn.ModuleDict({"q": q, "kv": kv, "o": o})
    mask = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(4, 1, 1)
    inputs = torch.randn(2, 5, 16)

    def closure():
        k, v = kv(inputs).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        p = (q(inputs).unflatten(-1, (4, 4)).transpose(1, 2) @ k.transpose(-1, -2)).softmax(-1)
        return (o((p @ v * mask).transpose(1, 2).flatten(2)) - 1).square().mean()

    found = diagnose(model, closure)
    assert {found[n].cause for n in found} == {"masked"}, found.render()


def test_gradients_are_the_first_backwards_and_nothing_is_left_behind():
    model, inputs = masked(), torch.randn(2, 5, 16)
    model.q.weight.grad = torch.full_like(model.q.weight, 3.0)
    before = model.q.weight.grad
    random = torch.get_rng_state()
    diagnose(model, lambda: (model(nn.functional.dropout(inputs, 0.1)) - 1).square().mean())
    assert model.q.weight.grad is before
    assert bool((before == 3).all())
    assert model.k.weight.grad is None
    assert torch.equal(random, torch.get_rng_state())


def test_a_closure_that_cannot_run_twice_is_asked_once():
    model = masked()
    batches = iter([torch.randn(2, 5, 16)])
    found = diagnose(model, lambda: (model(next(batches)) - 1).square().mean())
    assert found.healthy
    assert (found["q.weight"].status, found["q.weight"].cause) == ("partly-zero", None)


def test_heads_that_all_count_are_left_in_peace():
    model, inputs = Heads(), torch.randn(2, 5, 16)
    found = diagnose(model, lambda: (model(inputs) - 1).square().mean())
    assert not found.findings
    assert {found[n].status for n in found} == {"ok"}


def test_a_mask_over_positions_is_no_mask_over_heads():
    model, inputs = Heads(), torch.randn(2, 4, 16)
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0]).view(4, 1)  # four positions, as there are four heads
    model.between = lambda h: h * keep
    found = diagnose(model, lambda: (model(inputs) - 1).square().mean())
    assert {found[n].status for n in found} == {"ok"}, found.render()

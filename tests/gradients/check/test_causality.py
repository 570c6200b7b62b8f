"""Causality: no output depends on a later input, and a mask that leaks is found at its positions."""

import pytest
import torch
from tests.gradients.healthy import TRANSFORMERS
from tests.gradients.traces import trace_of
from torch import nn
from torch.nn import functional as F

import clinometer
from clinometer.gradients.check.leakage import MOST_POSITIONS, check_causality
from clinometer.messages import InputError


class Attention(nn.Module):
    """One layer of attention with the mask it is given."""

    def __init__(self, mask, dropout=0.1):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(20, 8), nn.Linear(8, 24), nn.Linear(8, 20)
        self.dropout = nn.Dropout(dropout)
        self.mask = mask

    def forward(self, ids):
        x = self.embed(ids) if not ids.is_floating_point() else ids
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.mT / 8**0.5
        seen = self.mask(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool))
        scores = scores.masked_fill(~seen, float("-inf"))
        return self.head(x + self.dropout(scores.softmax(-1) @ v))


def checked(mask, length=9):
    model = Attention(mask)
    return check_causality(model, model, torch.randint(0, 20, (2, length)))


def test_a_causal_model_passes_in_train_mode_and_nothing_is_left_behind():
    model = Attention(lambda ones: ones.tril())
    ids = torch.randint(0, 20, (2, 9))
    before = trace_of(model)
    check = check_causality(model, model, ids)
    assert check.passed
    assert check.findings == ()
    assert check.changed == tuple(range(1, 9))
    assert check.render("en").startswith("✓ No output depends on a later input")
    assert trace_of(model) == before


@pytest.mark.parametrize(
    ("mask", "variant", "pairs"),
    [
        (lambda ones: ones, "everything", 36),
        (lambda ones: ones.tril(1), "next", 8),
        (lambda ones: ones.tril(3), "", 21),
    ],
)
def test_a_mask_that_leaks_is_found_and_its_pattern_named(mask, variant, pairs):
    check = checked(mask)
    assert not check.healthy
    (finding,) = check.findings
    assert (finding.cause, finding.severity, finding.variant) == ("future-leak", "fault", variant)
    assert len(check.leaks) == pairs
    assert all(leak.output < leak.input for leak in check.leaks)
    assert check.to_dict()["leaks"][0].keys() == {"output", "input", "change"}


def test_a_leak_between_two_positions_is_named_with_both():
    def mask(ones):
        seen = ones.tril()
        seen[5, 7] = True
        return seen

    check = checked(mask)
    assert [(leak.output, leak.input) for leak in check.leaks] == [(5, 7)]
    assert "position 5 depends on position 7" in check.render("en")
    assert "位置 5 依赖它后面的位置 7" in check.render("zh")


def test_vectors_take_the_place_of_tokens():
    model = Attention(lambda ones: ones.tril())
    assert check_causality(model, model, torch.randn(2, 6, 8)).passed
    leaking = Attention(lambda ones: ones.tril(1))
    assert len(check_causality(leaking, leaking, torch.randn(2, 6, 8)).leaks) == 5


def test_the_derivative_says_the_same():
    """∂ output[s] / ∂ input[t] is zero exactly where no leak is found."""
    model = Attention(lambda ones: ones.tril(2), dropout=0.0).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    out, found = model(x), set()
    for s in range(6):
        (grad,) = torch.autograd.grad(out[0, s].sin().sum(), x, retain_graph=True)
        found |= {(s, t) for t in range(s + 1, 6) if float(grad[0, t].abs().max()) > 0}
    leaks = check_causality(model, model, x.detach()).leaks
    assert {(leak.output, leak.input) for leak in leaks} == found != set()


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bloom", "mamba", "rwkv", "mixtral", "opt"])
@pytest.mark.filterwarnings("ignore")
def test_causal_models_of_transformers_pass(name):
    model, _ = TRANSFORMERS[name]()
    ids = torch.randint(3, 50, (2, 7))
    assert check_causality(model, lambda given: model(input_ids=given), ids).passed


def test_an_encoder_is_not_causal():
    model, _ = TRANSFORMERS["bert"]()
    check = check_causality(model, lambda given: model(input_ids=given), torch.randint(3, 50, (2, 7)))
    assert check.findings[0].variant == "everything"


def test_a_convolution_that_pads_on_both_sides_leaks_and_one_that_pads_on_the_left_does_not():
    conv = nn.Conv1d(4, 4, 3)
    x = torch.randn(2, 10, 4)

    def padded(left, right):
        return lambda given: conv(F.pad(given.mT, (left, right))).mT

    assert check_causality(conv, padded(2, 0), x).passed
    (finding,) = check_causality(conv, padded(1, 1), x).findings
    assert finding.variant == "next"


def test_a_long_sequence_is_changed_at_evenly_spread_positions():
    embed = nn.Embedding(20, 4)
    check = check_causality(embed, embed, torch.randint(0, 20, (1, 500)))
    assert len(check.changed) == MOST_POSITIONS
    assert (check.changed[0], check.changed[-1]) == (1, 499)


@pytest.mark.parametrize(
    ("inputs", "function", "key"),
    [
        (torch.zeros(2, 1, dtype=torch.long), lambda x: x, "causality.too_short"),
        (torch.zeros(2, 5, dtype=torch.long), lambda x: x.double(), "causality.one_token"),
        (torch.arange(10).view(2, 5), lambda x: x.double().mean(), "causality.outputs"),
        (torch.arange(10).view(2, 5), lambda x: None, "causality.outputs"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_the_remedy(inputs, function, key):
    with pytest.raises(InputError) as raised:
        check_causality(nn.Linear(1, 1), function, inputs)
    assert raised.value.key == key


def test_a_function_that_is_not_repeatable_is_refused():
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(InputError) as raised:
        check_causality(
            nn.Linear(1, 1), lambda x: torch.rand(x.shape, generator=generator), torch.arange(10).view(2, 5)
        )
    assert raised.value.key == "causality.not_repeatable"


def test_the_language_model_is_causal():
    config = clinometer.TransformerConfig(
        vocab_size=50, context_length=16, d_model=16, num_layers=2, num_heads=2, d_ff=32
    )
    model = clinometer.TransformerLM(config)
    assert clinometer.check_causality(model, model, torch.randint(0, 50, (2, 12))).passed

"""What masks something is called by its name: the module of a dropout, the argument of an attention."""

import pytest
import torch
from tests.gradients.diagnose.planted.zero_gradient import Attending
from torch import nn

from clinometer.gradients.diagnose.diagnose import diagnose

HIDDEN = torch.ones(2, 5, dtype=torch.bool)
LAST_TWO = torch.tensor([0, 0, 0, 1, 1]).bool()


def masked(found):
    (finding,) = [f for f in found.findings if f.severity == "fault"]
    assert finding.cause == "masked"
    return finding


def test_a_dropout_of_everything_is_named_by_its_path():
    model = nn.Sequential()
    model.body = nn.Sequential(nn.Linear(4, 4), nn.Dropout(1.0))
    model.head = nn.Linear(4, 1)
    finding = masked(diagnose(model, lambda: model(torch.randn(3, 4)).square().mean()))
    assert finding.values["module"] == "body.1" == finding.where.module
    assert "The module body.1 is a dropout" in finding.say("why", "en")
    assert "body.1.p = 0.1" in finding.say("remedy", "en")


@pytest.mark.parametrize(
    ("masks", "named"),
    [
        ({"key_padding_mask": HIDDEN}, "key_padding_mask"),
        ({"attn_mask": torch.ones(5, 5, dtype=torch.bool)}, "attn_mask"),
        (
            {"key_padding_mask": HIDDEN, "attn_mask": torch.ones(5, 5).triu(1).bool()},
            "key_padding_mask",
        ),
        (
            {"key_padding_mask": LAST_TWO.repeat(2, 1), "attn_mask": ~LAST_TWO.repeat(5, 1)},
            "attn_mask + key_padding_mask",  # together they leave nothing, neither does alone
        ),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_mask_that_hides_everything_is_named(masks, named, dropout):
    model = Attending(dropout)
    finding = masked(diagnose(model, lambda: model(torch.randn(2, 5, 8), **masks)))
    assert finding.values["mask"] == named
    assert f"Here {named} leaves nothing" in finding.say("why", "en")
    assert named in finding.say("why", "zh")


def test_every_layer_of_an_encoder_under_one_mask_is_one_finding():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    found = diagnose(model, lambda: model(torch.randn(2, 5, 8), src_key_padding_mask=HIDDEN).square().mean())
    finding = masked(found)
    assert finding.values["mask"] == "key_padding_mask"
    assert len(finding.names) == 9


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_padding_mask_with_one_sample_hidden_is_no_fault(dropout):
    model = Attending(dropout)
    mask = torch.tensor([[0] * 5, [1] * 5]).bool()
    assert not diagnose(model, lambda: model(torch.randn(2, 5, 8), key_padding_mask=mask)).findings
    causal = torch.ones(5, 5).triu(1).bool()
    assert not diagnose(model, lambda: model(torch.randn(2, 5, 8), attn_mask=causal)).findings


def test_an_ordinary_dropout_is_no_fault():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    assert not diagnose(model, lambda: model(torch.randn(30, 4)).square().mean()).findings


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_a_softmax_along_the_wrong_dimension_is_not_blamed_on_the_mask(dim):
    weight = nn.Parameter(torch.randn(4, 4))
    x = torch.randn(2, 3, 4)
    later = torch.ones(3, 3).triu(1).bool()
    if dim == -1:
        later = torch.ones(3, 3).tril().bool()  # hides every position from the last

    def loss():
        scores = (x @ weight @ x.mT).masked_fill(later, float("-inf"))
        return (scores.softmax(dim) @ x).sum()

    if dim == 1:  # a column that no position may see
        later = later | torch.tensor([False, False, True])
    (finding,) = diagnose({"weight": weight}, loss).findings
    assert (finding.status, finding.cause) == ("non-finite", "forward")
    assert finding.variant == ("softmax" if dim == -1 else "softmax-across")
    assert ("softmax(…, dim=-1)" in finding.say("remedy", "en")) == (dim != -1)


def test_layers_that_die_at_one_line_are_one_finding():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
            nn.init.constant_(self.up.bias, -100.0)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(x)))

    model = nn.Sequential(*(Block() for _ in range(12)))
    (finding,) = diagnose(model, lambda: model(torch.randn(3, 4)).square().mean()).findings
    assert finding.cause == "dead-activation"
    assert len(finding.names) == 36  # all but the biases behind the activation


@pytest.mark.parametrize(
    "term",
    [
        lambda d: d**2,
        lambda d: d * d,
        lambda d: d.abs(),
        lambda d: d.norm(),
        lambda d: nn.functional.mse_loss(d, torch.zeros_like(d)),
    ],
)
def test_a_term_at_its_minimum_is_called_that_and_no_product_with_zero(term):
    w = nn.Parameter(torch.full((2, 1), 2.0))
    (finding,) = diagnose({"w": w}, lambda: term(torch.ones(1, 2) @ w - 4).sum()).findings
    assert (finding.cause, finding.variant, finding.severity) == (
        "zero-loss-gradient",
        "minimum",
        "explained",
    )


def test_a_power_at_zero_is_not_told_of_another_factor():
    w = nn.Parameter(torch.full((2, 1), 2.0))
    (finding,) = diagnose({"w": w}, lambda: ((torch.ones(1, 2) @ w - 4) ** 2).sum() + 1).findings
    assert finding.severity == "explained"
    assert "what goes into pow is exactly zero" in finding.say("what", "en")


def test_a_loss_that_is_not_finite_is_called_the_loss():
    model = nn.Linear(4, 3)
    targets = torch.full((2,), -100)
    found = diagnose(model, lambda: nn.functional.cross_entropy(model(torch.ones(2, 4)), targets))
    (finding,) = found.findings
    assert finding.say("what", "en") == "The loss is not finite, and it began here"

"""What masks something is called by its name: the module of a dropout, the argument of an attention."""

import pytest
import torch
from tests.gradients.planted.zero_gradient import Attending
from torch import nn

from clinometer.gradients.diagnosis import diagnose

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

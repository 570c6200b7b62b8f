"""What a person reads of an attribution, and what a machine reads."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clinometer.gradients.attribute.attribute import attribute
from clinometer.gradients.report.formatting import format_number
from clinometer.messages import InputError

WORDS = [" the", " return", "\n", " import", "你好", " self", ":\n", " a_very_long_identifier_that_goes_on"]
IDS = torch.tensor([[1, 3, 2, 5, 0, 7], [4, 6, 1, 1, 3, 0]])


def model_and_loss():
    model = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 8)).double()
    return model, lambda: F.cross_entropy(model(IDS).flatten(0, 1), IDS.roll(-1, 1).flatten())


def decode(token):
    return WORDS[token]


def test_the_strongest_tokens_are_listed_with_text_place_and_share():
    model, loss = model_and_loss()
    found = attribute(model, loss, "1.weight", (2, 3), decode=decode)
    matrix = found.matrix
    top = found.top(5)
    order = matrix.flatten().abs().sort(descending=True)
    assert [abs(p.value) for p in top] == order.values[:5].tolist()
    for push in top:
        assert push.value == matrix[push.position].item()
        word = WORDS[int(IDS[push.position])].replace("\n", "\\n")
        assert push.text == (word if len(word) <= 24 else word[:23] + "…")
        assert push.share == pytest.approx(abs(push.value) / matrix.abs().sum().item())
    text = found.render("en", 80)
    head = (
        f"Who pushed 1.weight[2, 3]? gradient {format_number(found.gradient, sign=True)} = sum over 12 tokens"
    )
    assert head in " ".join(text.split())
    share = sum(p.share for p in found.top(10))
    assert f"the 10 strongest tokens make {100 * share:.0f} %" in text
    assert max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("index", [(2, 3), 2, None])
def test_the_numbers_on_screen_are_those_of_the_dictionary(language, index):
    model, loss = model_and_loss()
    found = attribute(
        model, loss, "1.weight", index, tokenizer=type("T", (), {"decode": lambda _, ids: decode(ids[0])})()
    )
    told, text = found.to_dict(), found.render(language, 80)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert torch.tensor(told["matrix"], dtype=torch.float64).sum().item() == pytest.approx(told["total"])
    assert told["tokens"] == IDS.tolist()
    assert told["total"] + told["remainder"] == pytest.approx(told["gradient"], rel=1e-15)
    shown = re.findall(r"[”] (\d):(\d+) ([+−][\d.e−]+)", text)
    assert 3 <= len(shown) <= 8
    by_place = {tuple(p["position"]): p["value"] for p in told["top"]}
    for b, s, value in shown:
        assert value == format_number(by_place[int(b), int(s)], sign=True)
    assert format_number(told["gradient"]).lstrip("−") in text
    assert (told["norms"] is None) == (index == (2, 3))
    assert found._repr_html_().startswith("<div")


def test_it_reads_as_in_the_voice():
    w = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    delta = torch.tensor([[[0.5, 0], [-0.25, 0], [7, 0]]], dtype=torch.float64)
    found = attribute(
        {"w": w}, lambda: (F.linear(x, w) * delta).sum(), "w", (0, 0), tokens=[[1, 6, 4]], decode=decode
    )
    assert found.render("en", 80).splitlines() == [
        "Who pushed w[0, 0]? gradient +0.7500 = sum over 3 tokens (remainder 0)",
        "  ▲ raise  “ return” 0:0 +1.000",
        "  ▼ lower  “:\\n” 0:1 −0.2500",
        "  the 2 strongest tokens make 100 % of all pushes, signs ignored",
    ]
    assert found.render("zh", 80).splitlines() == [
        "谁推动了 w[0, 0]？梯度 +0.7500 = 3 个 token 的贡献之和（余项 0）",
        "  ▲ 推高  “ return” 0:0 +1.000",
        "  ▼ 压低  “:\\n” 0:1 −0.2500",
        "  最强的 2 个 token 占全部推力的 100 %（不计正负号）",
    ]


def test_without_a_decoder_ids_are_shown_and_without_ids_places():
    model, loss = model_and_loss()
    assert re.search(r" #\d \d:\d [+−]", attribute(model, loss, "1.weight", (2, 3)).render("en"))
    hidden = model[0](IDS).detach()
    tail = nn.Sequential(*model[1:])
    found = attribute(tail, lambda: tail(hidden).pow(2).sum(), "0.weight", (2, 3))
    assert re.search(r"raise  \d:\d [+−]", found.render("en"))
    assert found.to_dict()["tokens"] is None


def test_tokens_given_flat_turned_or_with_another_shape_are_laid_where_they_fit():
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    w = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(12).view(3, 4)
    flat = attribute({"w": w}, lambda: (x.flatten(0, 1) @ w.t()).pow(2).sum(), "w", (1, 2), tokens=ids)
    turned = attribute({"w": w}, lambda: F.linear(x.transpose(0, 1), w).pow(2).sum(), "w", (1, 2), tokens=ids)
    plain = attribute({"w": w}, lambda: F.linear(x, w).pow(2).sum(), "w", (1, 2), tokens=ids)
    assert plain.matrix.shape == (3, 4)
    torch.testing.assert_close(flat.matrix, plain.matrix, rtol=1e-13, atol=0)
    torch.testing.assert_close(turned.matrix, plain.matrix, rtol=1e-13, atol=0)
    other = attribute({"w": w}, lambda: F.linear(x, w).pow(2).sum(), "w", (1, 2), tokens=torch.arange(5))
    assert other.complete
    assert all(push.text == "" for push in other.top())
    with pytest.raises(InputError, match="token ids"):
        attribute({"w": w}, lambda: F.linear(x, w).sum(), "w", (1, 2), tokens=["a", "b"])


def test_uses_that_do_not_fit_the_tokens_are_listed_by_use():
    x, y = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    w = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(6).view(2, 3)
    found = attribute(
        {"w": w}, lambda: F.linear(x, w).pow(2).sum() + F.linear(y, w).pow(2).sum(), "w", (1, 2), tokens=ids
    )
    assert found.complete
    assert found.positions == 6 + 7
    assert {push.use for push in found.top(13)} == {None, 1}
    assert re.search(r"use 2 \d [+−]", found.render("en"))
    assert found.total == pytest.approx(found.gradient, rel=1e-13)

"""Micro-batches against the full batch: equal, or the factor, the weights, or the cause by name."""

import pytest
import torch
from tests.gradients.traces import trace_of
from torch import nn
from torch.nn import functional as F

from clinometer.gradients.check.accumulation import check_accumulation
from clinometer.messages import InputError


def setting(*layers, rows=8):
    model = nn.Sequential(*(layers or (nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))))
    return model, torch.randn(rows, 5), torch.randint(0, 3, (rows,))


def parts_of(model, x, y, sizes, scale=lambda n: 1.0, reduction="mean"):
    return [
        lambda x=a, y=b: F.cross_entropy(model(x), y, reduction=reduction) * scale(len(x))
        for a, b in zip(x.split(sizes), y.split(sizes), strict=True)
    ]


def test_parts_divided_by_their_number_add_up_to_the_full_batch():
    model, x, y = setting()
    full = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    check = check_accumulation(model, full, parts_of(model, x, y, [2] * 4, lambda n: 0.25))
    assert check.passed
    assert check.findings == ()
    assert max(tensor.difference for tensor in check.entries().values()) < 1e-13
    assert check.parts_loss == pytest.approx(check.full_loss, rel=1e-13)
    assert check.render("en").startswith("✓ The gradients of the 4 parts add up")


@pytest.mark.parametrize(
    ("scale", "factor", "said"),
    [
        (1.0, 4.0, "Divide each part's loss by 4"),
        (1 / 16, 0.25, "once too often"),
        (0.5, 2.0, "only the scale of the loss differs"),
    ],
)
def test_a_common_factor_is_named(scale, factor, said):
    model, x, y = setting()
    check = check_accumulation(
        model, lambda: F.cross_entropy(model(x), y), parts_of(model, x, y, [2] * 4, lambda n: scale)
    )
    assert (check.cause, check.passed) == ("factor", False)
    assert check.factor == pytest.approx(factor, rel=1e-12)
    assert said in " ".join(check.render("en").split())
    assert set(check.findings[0].names) == set(check)


def test_unequal_parts_get_the_weights_that_would_be_right():
    model, x, y = setting()
    parts = parts_of(model, x, y, [1, 2, 5], lambda n: 1 / 3)
    check = check_accumulation(model, lambda: F.cross_entropy(model(x), y), parts)
    assert check.cause == "weights"
    assert check.weights == pytest.approx([3 / 8, 6 / 8, 15 / 8], rel=1e-9)
    summed = parts_of(model, x, y, [1, 2, 5], lambda n: 1 / 8, reduction="sum")
    assert check_accumulation(model, lambda: F.cross_entropy(model(x), y), summed).passed


def test_ignored_tokens_make_parts_unequal_though_they_are_as_long():
    model, x, y = setting()
    y[:3] = -100
    check = check_accumulation(
        model, lambda: F.cross_entropy(model(x), y), parts_of(model, x, y, [4, 4], lambda n: 0.5)
    )
    assert check.weights == pytest.approx([2 * 1 / 5, 2 * 4 / 5], rel=1e-9)


def test_dropout_is_switched_off_and_said():
    model, x, y = setting(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    check = check_accumulation(
        model, lambda: F.cross_entropy(model(x), y), parts_of(model, x, y, [4, 4], lambda n: 0.5)
    )
    assert check.passed
    assert [finding.cause for finding in check.findings] == ["dropout"]


def test_functional_dropout_and_attentions_own_are_switched_off_too():
    q = nn.Linear(5, 5)

    def loss(x):
        h = F.dropout(q(x), 0.3, True)[None]
        return F.scaled_dot_product_attention(
            h.mT[..., None], h.mT[..., None], h.mT[..., None], dropout_p=0.2
        ).sum(), h

    x = torch.randn(8, 5)
    full = lambda: (loss(x)[1] ** 2).mean()  # noqa: E731
    parts = [lambda a=a: (loss(a)[1] ** 2).mean() / 2 for a in x.split(4)]
    check = check_accumulation(q, full, parts)
    assert check.passed
    assert check.dropout


def test_batch_statistics_are_named():
    model, x, y = setting(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    parts = parts_of(model, x, y, [4, 4], lambda n: 0.5)
    check = check_accumulation(model, lambda: F.cross_entropy(model(x), y), parts)
    assert check.cause == "batch-norm"
    assert "batch statistics differ" in check.render("en")
    model.eval()
    assert check_accumulation(model, lambda: F.cross_entropy(model(x), y), parts).passed


def test_a_loss_that_couples_samples_is_no_sum():
    model, x, _ = setting()

    def contrastive(x):
        h = F.normalize(model(x), dim=-1)
        return F.cross_entropy(h @ h.T / 0.1, torch.arange(len(x)))

    check = check_accumulation(
        model, lambda: contrastive(x), [lambda a=a: contrastive(a) / 2 for a in x.split(4)]
    )
    assert check.cause == "not-a-sum"
    assert check.weights is None
    assert check.factor is None


def test_a_penalty_added_in_every_part_is_narrowed_to_its_tensor():
    model, x, y = setting()

    def loss(x, y, share):
        return share * F.cross_entropy(model(x), y) + model[0].weight.square().sum()

    pairs = list(zip(x.split(4), y.split(4), strict=True))
    check = check_accumulation(
        model, lambda: loss(x, y, 1.0), lambda: [lambda a=a, b=b: loss(a, b, 0.5) for a, b in pairs]
    )
    assert check.cause == "some-tensors"
    assert check.findings[0].names == ("0.weight",)
    assert check["2.bias"].passed


def test_a_structurally_zero_gradient_is_no_difference():
    attention = nn.MultiheadAttention(8, 2)  # the gradient of its key bias cancels to rounding
    x = torch.randn(4, 6, 8)
    loss = lambda x: attention(x, x, x, need_weights=False)[0].square().mean()  # noqa: E731
    check = check_accumulation(
        attention, lambda: loss(x), [lambda a=a: loss(a) / 3 for a in x.split(2, dim=1)]
    )
    assert check.passed


def test_no_parts_is_an_error_that_says_what_to_give():
    model, x, y = setting()
    with pytest.raises(InputError) as error:
        check_accumulation(model, lambda: F.cross_entropy(model(x), y), [])
    assert error.value.key == "accumulation.no_parts"
    with pytest.raises(InputError) as error:  # one function for a list of them: it returns a loss
        check_accumulation(model, lambda: F.cross_entropy(model(x), y), lambda: F.cross_entropy(model(x), y))
    assert error.value.key == "accumulation.not_parts"


def test_nothing_is_left_behind():
    model, x, y = setting(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
    F.cross_entropy(model(x), y).backward()
    before = trace_of(model)
    check_accumulation(model, lambda: F.cross_entropy(model(x), y), parts_of(model, x, y, [4, 4]))
    after = trace_of(model)
    assert [key for key in before if before[key] != after[key]] == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_form_of_the_result_is_there(language):
    model, x, y = setting()
    check = check_accumulation(model, lambda: F.cross_entropy(model(x), y), parts_of(model, x, y, [2] * 4))
    assert "4" in check.render(language)
    facts = check.to_dict()
    assert facts["factor"] == pytest.approx(4)
    assert facts["tensors"]["0.weight"]["factor"] == pytest.approx(4)
    assert "<div" in check._repr_html_()


def test_a_factor_is_told_without_the_rounding_of_a_part_in_float32():
    model, x, y = setting()
    full = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    parts = [
        lambda part=part, scale=scale: part().float() * scale
        for part, scale in zip(parts_of(model, x, y, [4] * 2), (0.25000001, 0.24999999), strict=True)
    ]
    check = check_accumulation(model, full, parts)
    assert check.cause == "factor"
    assert check.factor == pytest.approx(0.5, rel=1e-6)
    assert "gradient is 0.5 times" in check.render("en")


def test_a_single_tensor_is_spoken_of_in_the_singular():
    model = nn.Linear(5, 1, bias=False)
    x = torch.randn(4, 5)
    check = check_accumulation(
        model, lambda: model(x).sum(), [lambda: model(x[:2]).sum(), lambda: model(x[2:]).sum()]
    )
    assert "in the 1 tensor (" in check.render("en", 200)

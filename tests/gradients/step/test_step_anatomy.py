"""explain_step(): the fields of the anatomy, what is seen of clipping, scaling, skipping, and the words."""

import json
import re

import pytest
import torch
from torch import nn

from clinometer.gradients.report.formatting import format_number
from clinometer.gradients.step.explain_step import explain_step
from clinometer.messages import InputError
from clinometer.optim.adamw import AdamW
from clinometer.optim.clipping import clip_grad_norm_


def model_and_loss(dtype=torch.float32):
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    x, y = torch.randn(32, 8, dtype=dtype), torch.randn(32, 4, dtype=dtype)
    return model, lambda: (model(x) - y).square().mean()


def stepped(make, steps=3, dtype=torch.float32, **options):
    model, loss = model_and_loss(dtype)
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        with explain_step(optimizer, model, **({"loss": loss} | options)) as anatomy:
            optimizer.step()
    return model, optimizer, anatomy


def ours(parameters):
    return AdamW(parameters, lr=1e-2, weight_decay=0.1)


def test_the_fields_of_one_weight_satisfy_the_formula():
    model, optimizer, anatomy = stepped(ours, dtype=torch.float64)
    weight = anatomy["0.weight"][3, 5]
    q = weight.quantities
    m, v = q["momentum"], q["scale"]
    g = model[0].weight.grad[3, 5].item()
    assert weight.gradient == q["gradient"]["after"] == g
    assert m["after"] == pytest.approx(0.9 * m["before"] + 0.1 * g, rel=1e-14)
    assert v["after"] ** 2 == pytest.approx(0.999 * v["before"] ** 2 + 0.001 * g * g, rel=1e-12)
    assert m["after"] == pytest.approx(optimizer.state[model[0].weight]["exp_avg"][3, 5].item(), rel=1e-13)
    assert q["rate"]["after"] == pytest.approx(1e-2 * (1 - 0.999**3) ** 0.5 / (1 - 0.9**3), rel=1e-14)
    assert q["denominator"]["after"] == pytest.approx(v["after"] + 1e-8, rel=1e-14)
    update = -q["rate"]["after"] * m["after"] / q["denominator"]["after"]
    assert q["update"]["after"] == pytest.approx(update, rel=1e-13)
    assert q["decay"]["after"] == pytest.approx(-1e-3 * (weight.before + update), rel=1e-13)
    assert weight.replayed == pytest.approx(
        weight.before + q["update"]["after"] + q["decay"]["after"], rel=1e-14
    )
    assert weight.after == model[0].weight[3, 5].item()
    assert weight["momentum"]["formula"] == "β₁ m + (1−β₁) g"
    old, new = abs(0.9 * m["before"]), abs(0.1 * g)
    assert weight.momentum_share == pytest.approx(old / (old + new), rel=1e-12)
    assert weight.step == 3


def test_the_measures_of_a_tensor_are_sums_over_its_weights():
    _, _, anatomy = stepped(ours, dtype=torch.float64)
    tensor = anatomy["2.weight"]
    weights = [tensor[i, j] for i in range(4) for j in range(16)]
    change = sum(w.change**2 for w in weights)
    m = tensor.measures
    assert m.rms_update == pytest.approx((change / 64) ** 0.5, rel=1e-12)
    assert m.update_ratio == pytest.approx((change / sum(w.before**2 for w in weights)) ** 0.5, rel=1e-12)
    assert m.predicted == pytest.approx(sum(w.predicted for w in weights), rel=1e-12)
    decay = sum(abs(w.quantities["decay"]["after"]) for w in weights)
    update = sum(abs(w.quantities["update"]["after"]) for w in weights)
    assert m.decay_share == pytest.approx(decay / (decay + update), rel=1e-12)
    assert m.worst_ulp == max(w.ulp for w in weights)
    row = tensor[2]
    assert row.measures.numbers == 16
    assert row.measures.predicted == pytest.approx(sum(w.predicted for w in weights[32:48]), rel=1e-12)
    assert row[5].change == tensor[2, 5].change
    total = anatomy.measures
    assert total.numbers == 8 * 16 + 16 + 64 + 4
    assert total.predicted == pytest.approx(
        sum(t.measures.predicted for t in map(anatomy.__getitem__, anatomy))
    )


def test_the_foretold_change_of_the_loss_is_the_real_one_to_first_order():
    errors = []
    for lr in (1e-2, 1e-3, 1e-4):
        _, _, anatomy = stepped(lambda p, lr=lr: torch.optim.SGD(p, lr=lr), steps=1, dtype=torch.float64)
        assert anatomy.predicted < 0
        errors.append(abs(anatomy.loss_change / anatomy.predicted - 1))
    assert errors[0] < 0.05
    assert errors[1] < errors[0] / 5
    assert errors[2] < errors[1] / 5


def test_the_loss_is_compared_under_the_same_dropout_masks():
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    x = torch.randn(4, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(x).square().mean().backward()
    state = torch.get_rng_state()
    with explain_step(optimizer, model, loss=lambda: model(x).square().mean()) as anatomy:
        optimizer.step()
    assert anatomy.loss_change == 0
    assert torch.equal(state, torch.get_rng_state())


def test_clipping_inside_the_block_is_seen():
    model, loss = model_and_loss()
    optimizer = ours(model.parameters())
    loss().backward()
    raw = model[0].weight.grad.clone()
    with explain_step(optimizer, model) as anatomy:
        total = clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
    factor = 0.25 / (total.item() + 1e-6)
    weight = anatomy["0.weight"][3, 5]
    assert factor < 0.9
    assert weight.gradient == raw[3, 5].item()
    assert weight.clip == pytest.approx(factor, rel=1e-6)
    assert anatomy["0.weight"].moved.clip == pytest.approx(factor, rel=1e-6)
    assert weight.gradient_used == model[0].weight.grad[3, 5].item()
    assert f"clipped × {format_number(factor)}" in weight.render("en")
    assert "裁剪 ×" in weight.render("zh")


def test_clipping_before_the_block_is_known_from_the_norm_or_from_a_call():
    model, loss = model_and_loss(torch.float64)
    optimizer = ours(model.parameters())
    loss().backward()
    raw = model[0].weight.grad[3, 5].item()
    total = clip_grad_norm_(model.parameters(), 0.25)
    with explain_step(optimizer, model, clipped_from=total) as anatomy:
        optimizer.step()
    assert anatomy["0.weight"][3, 5].gradient == pytest.approx(raw, rel=1e-12)
    assert anatomy["0.weight"][3, 5].clip == pytest.approx(0.25 / (total.item() + 1e-6), rel=1e-9)

    optimizer.zero_grad()
    with explain_step(optimizer, model) as anatomy:
        loss().backward()
        raw = model[0].weight.grad[3, 5].item()
        anatomy.before_clipping()
        clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
    assert anatomy["0.weight"][3, 5].gradient == raw
    assert anatomy["0.weight"][3, 5].clip < 1


def test_without_clipping_no_factor_is_shown():
    _, _, anatomy = stepped(ours)
    assert anatomy["0.weight"][3, 5].clip is None
    assert "clipped" not in anatomy["0.weight"][3, 5].render("en")


def test_swallowed_steps_of_bfloat16_weights_are_counted():
    p = nn.Parameter(torch.full((100,), 1.0, dtype=torch.bfloat16))
    with torch.no_grad():
        p[:30] = 1e-3
    optimizer = torch.optim.SGD([p], lr=1e-3)
    p.grad = torch.full_like(p, 0.5)
    with explain_step(optimizer, {"p": p}) as anatomy:
        optimizer.step()
    # 1 − 5e-4 rounds back to 1 in bfloat16; 1e-3 − 5e-4 does not.
    m = anatomy["p"].measures
    assert m.swallowed == pytest.approx(0.7)
    assert m.lost == pytest.approx(0.7**0.5, rel=1e-2)
    assert anatomy.faithful is True
    assert "70 % of the weights that should move did not move" in " ".join(anatomy.render("en").split())


def test_several_groups_have_their_own_numbers():
    model, loss = model_and_loss()
    groups = [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[2].parameters(), "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups)
    loss().backward()
    with explain_step(optimizer, model) as anatomy:
        optimizer.param_groups[1]["lr"] = 5e-3  # a schedule inside the block
        optimizer.step()
    assert anatomy["0.weight"][0, 0].to_dict()["numbers"]["lr"] == 1e-2
    assert anatomy["2.weight"][0, 0].to_dict()["numbers"]["lr"] == 5e-3
    assert anatomy.faithful is True


def test_tensors_without_gradient_or_outside_the_optimizer_are_said_and_so_is_that_they_moved():
    model, _ = model_and_loss()
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=1e-2)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with explain_step(optimizer, model) as anatomy:
        optimizer.step()
        optimizer.zero_grad()
    assert [anatomy[n].status for n in anatomy] == ["stepped", "no-gradient", "not-held", "not-held"]
    text = anatomy.render("en")
    assert "No gradient, so not updated: 0.bias" in text
    assert "Not in the optimizer, so not updated: 2.weight, 2.bias" in text
    assert "first order" not in anatomy["2.weight"].render("en")

    class Nudging(torch.optim.AdamW):
        def step(self, closure=None):
            super().step()
            with torch.no_grad():
                model[0].bias.add_(1)
                model[2].bias.add_(1)

    optimizer = Nudging(model[0].parameters(), lr=1e-2)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with explain_step(optimizer, model) as anatomy:
        optimizer.step()
    text = anatomy.render("en")
    assert "Moved without a gradient: 0.bias." in text
    assert "Moved without being in the optimizer: 2.bias." in text


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("overflow", [False, True])
def test_a_gradscaler_is_seen_through(fused, overflow):
    model, loss = model_and_loss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss().backward()
    true = model[0].weight.grad[3, 5].item()
    optimizer.zero_grad()
    scaler.scale(loss()).backward()
    if overflow:
        model[0].weight.grad[0, 0] = float("inf")
    with explain_step(optimizer, model) as anatomy:
        scaler.step(optimizer)
        scaler.update()
    if overflow:
        assert anatomy.skipped == ("scaler" if fused else "no-step")
        assert {anatomy[n].status for n in anatomy} == {"skipped"}
        assert anatomy["0.weight"].measures.change_sq == 0
        assert "GradScaler" in anatomy.render("en")
        assert "GradScaler" in anatomy["0.weight"][3, 5].render("zh")
    else:
        assert anatomy.skipped is None
        assert anatomy.faithful is True
        assert anatomy["0.weight"][3, 5].gradient == pytest.approx(true, rel=1e-6)
        assert anatomy["0.weight"][3, 5].clip is None


def test_a_step_with_a_closure_is_replayed_with_the_gradients_the_closure_made():
    model, loss = model_and_loss()
    optimizer = ours(model.parameters())
    for call in (lambda c: optimizer.step(c), lambda c: optimizer.step(closure=c)):

        def closure():
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        with explain_step(optimizer, model) as anatomy:
            returned = call(closure)
        assert returned.item() > 0
        assert anatomy.faithful is True
        assert anatomy["0.weight"][1, 1].gradient == model[0].weight.grad[1, 1].item()


def test_of_two_steps_in_one_block_the_last_is_kept():
    model, loss = model_and_loss()
    optimizer = ours(model.parameters())
    loss().backward()
    with explain_step(optimizer, model) as anatomy:
        optimizer.step()
        middle = model[0].weight[0, 0].item()
        optimizer.step()
    assert anatomy["0.weight"][0, 0].before == middle
    assert anatomy["0.weight"][0, 0].step == 2
    assert anatomy.faithful is True


def test_a_few_names_cost_only_their_memory_and_say_nothing_of_the_whole():
    model, loss = model_and_loss()
    optimizer = ours(model.parameters())
    loss().backward()
    with explain_step(optimizer, {"w": model[2].bias}) as anatomy:
        optimizer.step()
    held = anatomy["w"].moved
    assert list(anatomy) == ["w"]
    assert held.before.numel() == held.after.numel() == 4
    assert "whole step" not in anatomy.render("en")
    assert anatomy["w"][1].faithful is True


def test_muon_is_told_by_tensor_by_row_and_by_weight():
    p = nn.Parameter(torch.randn(6, 4))
    optimizer = torch.optim.Muon([p], lr=0.02)
    p.grad = torch.randn(6, 4)
    with explain_step(optimizer, {"p": p}) as anatomy:
        optimizer.step()
    weight = anatomy["p"][2, 1]
    assert weight.faithful is True
    o = torch.tensor(
        [[anatomy["p"][i, j].quantities["direction"]["after"] for j in range(4)] for i in range(6)]
    )
    singular = torch.linalg.svdvals(o)
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    assert weight.quantities["update"]["after"] == pytest.approx(-0.02 * 1.5**0.5 * o[2, 1].item(), rel=1e-6)
    rows = [anatomy["p"][i].measures for i in range(6)]
    whole = anatomy["p"].measures
    for key in ("predicted", "change_sq", "update", "decay", "momentum", "fresh"):
        assert sum(getattr(row, key) for row in rows) == pytest.approx(getattr(whole, key), rel=1e-9)
    assert all(row.missed == 0 for row in rows)
    assert anatomy["p"][2].faithful is True
    assert "p[2]" in anatomy["p"][2].render("en")


@pytest.mark.parametrize(
    "make", [ours, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.optim.RMSprop]
)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_numbers_on_screen_are_those_of_the_dictionary(make, language):
    _, _, anatomy = stepped(make)
    weight = anatomy["0.weight"][3, 5]
    told, text = weight.to_dict(), weight.render(language, 80)
    assert json.loads(json.dumps(told)) == told
    expected = [told["gradient"], *(q["after"] for q in told["quantities"])]
    expected += [q["before"] for q in told["quantities"] if q["before"] is not None]
    expected += [anatomy.predicted, told["loss_after"] - told["loss_before"]]
    shown = text.replace("\n", " ")
    for value in expected:
        assert format_number(value).lstrip("−") in shown
    before, after = re.search(r"θ\s+([−\d.]+) → ([−\d.]+)", text).groups()
    assert float(before.replace("−", "-")) == pytest.approx(told["before"], rel=1e-5)
    assert float(after.replace("−", "-")) == pytest.approx(told["after"], rel=1e-5)
    assert before != after
    if told["ulp"] is not None:
        assert f"{told['ulp']:.1f} ulp" in shown
    for result in (anatomy, anatomy["0.weight"], weight):
        lines = result.render(language, 80).splitlines()
        assert max(sum(2 if ord(c) > 0x2E7F else 1 for c in line) for line in lines) <= 80
        assert len(lines) <= 20
        assert result._repr_html_().startswith("<div")
        json.dumps(result.to_dict(), allow_nan=False)


def test_the_waterfall_reads_as_in_the_voice():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -0.25]]))
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model.weight.grad = torch.tensor([[2e-3, -1e-3]])
    with explain_step(optimizer, model) as anatomy:
        optimizer.step()
    assert anatomy["weight"][0, 0].render("en", 80).splitlines()[:8] == [
        "weight[0, 0], step 1 (AdamW)",
        "  gradient       g     +0.002000",
        "  momentum       m     0 → +2.000e-04       β₁ m + (1−β₁) g",
        "  scale          √v    0 → 6.325e-05        v: β₂ v + (1−β₂) g²",
        "  learning rate  lr_t  0.003162             lr √(1−β₂ᵗ)/(1−β₁ᵗ), lr = 0.01",
        "  denominator    d     6.326e-05            √v + ε",
        "  update               −0.009998            −lr_t m / d",
        "  decay                −4.900e-04           −lr λ θ, λ = 0.1",
    ]


def test_a_large_model_is_shown_by_its_extremes():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    with explain_step(optimizer, model) as anatomy:
        optimizer.step()
    text = anatomy.render("en", 80)
    assert "… 30 in between" in text
    assert len(text.splitlines()) < 20
    assert len(anatomy.to_dict()["tensors"]) == 40


def test_wrong_uses_are_refused_with_a_remedy():
    model, loss = model_and_loss()
    with pytest.raises(InputError, match="is not an optimizer"), explain_step(model, model):
        pass
    optimizer = ours(model.parameters())
    loss().backward()
    with explain_step(optimizer, model) as anatomy:
        with pytest.raises(InputError, match="after the with-block"):
            anatomy["0.weight"]
        optimizer.step()
    with pytest.raises(InputError, match=r"shape \[16, 8\]"):
        anatomy["0.weight"][16, 0]
    with pytest.raises(KeyError, match=r"nearest name is '0\.weight'"):
        anatomy["0.weigh"]
    assert anatomy["0.weight"][-1, -1].index == (15, 7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_gradients_that_are_not_finite_are_followed_without_an_accusation(bad, language):
    params = {"w": nn.Parameter(torch.randn(3, 2)), "none": nn.Parameter(torch.zeros(0, 3))}
    optimizer = torch.optim.AdamW(list(params.values()), lr=1e-2)
    for value in (1.0, bad, bad):
        for p in params.values():
            p.grad = torch.ones_like(p)
        params["w"].grad[1, 1] = value
        with explain_step(optimizer, params) as anatomy:
            optimizer.step()
    assert anatomy.faithful is True
    weight = anatomy["w"][1, 1]
    assert weight.clip is None
    assert weight.to_dict()["after"] == "NaN"
    assert "diagnose" in weight.render(language)
    for result in (anatomy, anatomy["w"], weight, anatomy["w"][0, 0], anatomy["none"]):
        assert "nan" not in result.render(language, 80)
        json.dumps(result.to_dict(), allow_nan=False)


def test_sparse_gradients_are_replayed():
    model = nn.Embedding(10, 3, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([1, 2, 2])).sum().backward()
    with explain_step(optimizer, model) as anatomy:
        optimizer.step()
    assert anatomy.faithful is True
    assert anatomy["weight"][2, 0].gradient == 2.0
    assert anatomy["weight"][0, 0].change == 0.0

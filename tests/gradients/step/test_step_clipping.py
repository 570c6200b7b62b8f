"""What an optimizer got and how it steps: clipped, unscaled, fused; told with certainty or not at all."""

import pytest
import torch
from torch import nn

from clinometer.gradients.step.explain_step import explain_step
from clinometer.optim.adamw import AdamW
from clinometer.optim.clipping import clip_grad_norm_


def model_and_loss(dtype=torch.float32):
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    x, y = torch.randn(32, 8, dtype=dtype), torch.randn(32, 4, dtype=dtype)
    return model, lambda: (model(x) - y).square().mean()


def ours(parameters):
    return AdamW(parameters, lr=1e-2, weight_decay=0.1)


def test_clipping_after_a_backward_in_the_same_block_is_seen():
    """Old gradients were there when the block began: they are not what was clipped."""
    model, loss = model_and_loss()
    optimizer = ours(model.parameters())
    (3 * loss().sin()).backward()
    hooks = [p._post_accumulate_grad_hooks for p in model.parameters()]
    with explain_step(optimizer, model) as anatomy:
        optimizer.zero_grad()
        loss().backward()
        raw = model[0].weight.grad[3, 5].item()
        total = clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
    weight = anatomy["0.weight"][3, 5]
    assert weight.gradient == raw
    assert weight.clip == pytest.approx(0.25 / (total.item() + 1e-6), rel=1e-6)
    assert [p._post_accumulate_grad_hooks or None for p in model.parameters()] == [h or None for h in hooks]


def test_unscaling_and_clipping_in_one_block_are_told_apart():
    model, loss = model_and_loss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    unscale = torch.amp.GradScaler.unscale_
    loss().backward()
    true = model[0].weight.grad[3, 5].item()
    optimizer.zero_grad()
    scaler.scale(loss()).backward()
    with explain_step(optimizer, model) as anatomy:
        scaler.unscale_(optimizer)
        total = clip_grad_norm_(model.parameters(), 0.25)
        scaler.step(optimizer)
        scaler.update()
    weight = anatomy["0.weight"][3, 5]
    assert weight.gradient == pytest.approx(true, rel=1e-6)
    assert weight.clip == pytest.approx(0.25 / (total.item() + 1e-6), rel=1e-6)
    assert torch.amp.GradScaler.unscale_ is unscale


def test_clipping_by_value_is_seen():
    model, loss = model_and_loss()
    optimizer = ours(model.parameters())
    loss().backward()
    raw = model[0].weight.grad.clone()
    limit = float(raw.abs().median())
    with explain_step(optimizer, model) as anatomy:
        torch.nn.utils.clip_grad_value_(model.parameters(), limit)
        optimizer.step()
    at = tuple(int(i) for i in torch.unravel_index(raw.abs().argmax(), raw.shape))
    weight = anatomy["0.weight"][at]
    assert weight.gradient == raw[at].item()
    assert abs(weight.gradient_used) == pytest.approx(limit)
    assert anatomy["0.weight"].moved.clip < 1


def test_a_gradient_that_is_another_one_is_not_called_clipped():
    model, loss = model_and_loss()
    optimizer = ours(model.parameters())
    loss().backward()
    with explain_step(optimizer, model) as anatomy:
        for p in model.parameters():
            p.grad = p.grad * (0.3 + 0.2 * torch.rand_like(p))  # the same direction, nearly
        optimizer.step()
    assert anatomy["0.weight"].moved.clip is None
    assert "clipped" not in anatomy["0.weight"][3, 5].render("en")


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True}),
        (torch.optim.Adam, {"weight_decay": 0.1}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
@pytest.mark.parametrize("lr", [1e-2, "tensor"])
def test_every_implementation_of_torch_is_the_same_step(options, kind, extra, lr):
    model, loss = model_and_loss()
    if lr == "tensor" and options == {"foreach": True}:
        pytest.skip("torch refuses a tensor lr with foreach, unless it is capturable")
    rate = torch.tensor(1e-2) if lr == "tensor" else lr
    optimizer = kind(model.parameters(), lr=rate, **extra, **options)
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        with explain_step(optimizer, model) as anatomy:
            optimizer.step()
    assert anatomy.faithful is True
    assert anatomy["0.weight"][3, 5].ulp < 4


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"capturable": True}, {"fused": True}, {"foreach": True}], ids=str)
def test_a_step_on_the_gpu_is_replayed_there(options):
    model, _ = model_and_loss()
    model.cuda()
    given = torch.randn(4, model[0].weight.shape[1], device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    for _ in range(2):
        optimizer.zero_grad()
        model(given).square().mean().backward()
        with explain_step(optimizer, model, loss=lambda: model(given).square().mean()) as anatomy:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    assert anatomy.faithful is True
    assert anatomy["0.weight"][3, 5].clip < 1

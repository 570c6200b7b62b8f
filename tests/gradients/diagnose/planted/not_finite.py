"""Gradients that are NaN or infinite: from the forward, from the backward, from too small a number type."""

import torch
import torch.nn.functional as F
from tests.gradients.diagnose.planted.registry import Registry
from torch import nn

FAULTS = Registry()
fault = FAULTS.fault


def ones():
    return torch.ones(3, 4)


def layer():
    model = nn.Linear(4, 4)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


@fault("non-finite", "backward", "*")
def square_root_at_zero():
    model = layer()

    def closure():
        h = model(ones()).square().sum(-1)
        return h.sqrt().mean()  # <- here

    return model, closure


@fault("non-finite", "backward", "*")
def where_does_not_protect_a_square_root():
    model = layer()

    def closure():
        h = model(ones())
        root = h.sqrt()  # <- here
        return torch.where(h > 0, root, torch.zeros(())).sum() + h.sum()

    return model, closure


@fault("non-finite", "backward", "*")
def where_does_not_protect_a_logarithm():
    model = layer()

    def closure():
        h = model(ones())
        log = h.log()  # <- here
        return torch.where(h > 0, log, h).sum()

    return model, closure


@fault("non-finite", "backward", "*")
def where_does_not_protect_a_division():
    model = layer()

    def closure():
        h = model(ones())
        share = 1.0 / h  # <- here
        return torch.where(h != 0, share, h).sum()

    return model, closure


@fault("non-finite", "backward", "*")
def masked_fill_does_not_protect_an_arc_cosine():
    model = layer()

    def closure():
        h = model(ones()) + 1
        angle = h.acos()  # <- here
        return angle.masked_fill(h >= 1, 0.0).sum() + h.sum()

    return model, closure


@fault("non-finite", "backward", "*")
def arc_cosine_at_one():
    model = layer()

    def closure():
        h = model(ones()) + 1
        return h.acos().sum()  # <- here

    return model, closure


@fault("non-finite", "backward", "*")
def power_below_one_at_zero():
    model = layer()

    def closure():
        h = model(ones())
        return (h**0.5).sum()  # <- here

    return model, closure


@fault("non-finite", "backward", "*")
def standard_deviation_of_equal_values():
    model = layer()

    def closure():
        h = model(ones())
        return h.var(-1).sqrt().sum()  # <- here

    return model, closure


@fault("non-finite", "backward", "2.*")
def softmax_over_a_masked_row_that_the_loss_leaves_out():
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    x, padding = torch.randn(2, 3, 4), torch.tensor([[False] * 3, [True] * 3])

    def closure():
        q, k, v = (layer(x) for layer in model)
        scores = (q @ k.mT).masked_fill(padding[:, None, :], float("-inf"))
        weights = scores.softmax(-1)  # <- here
        return (weights @ v)[~padding].square().sum()

    return model, closure


@fault("non-finite", "backward", "weight")
def nan_in_padding_that_the_loss_leaves_out():
    model = nn.Linear(4, 4)
    batch = torch.ones(3, 4)
    batch[2] = float("nan")

    def closure():
        h = model(batch)  # <- here
        return h[:2].square().sum()

    return model, closure


@fault("non-finite", "backward", "scale")
def division_by_zero_far_before_the_mask():
    tensors = {"scale": nn.Parameter(torch.ones(4)), "other": nn.Parameter(torch.ones(4))}
    count = torch.tensor([1.0, 0.0, 2.0, 3.0])

    def closure():
        share = torch.ones(4) / count  # <- here
        share = share + 1.0
        scaled = share * tensors["scale"]
        return torch.where(count > 0, scaled * 2, torch.zeros(())).sum() + tensors["other"].sum()

    return tensors, closure


@fault("non-finite", "backward", "scale")
def custom_backward_divides_by_zero():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value * 1.0

        @staticmethod
        def backward(ctx, gradient):  # <- here
            return gradient / 0.0

    tensors = {"scale": nn.Parameter(torch.ones(4)), "other": nn.Parameter(torch.ones(4))}
    return tensors, lambda: (Scale.apply(tensors["scale"]) * tensors["other"]).sum()


@fault("non-finite", "forward")
def logarithm_of_a_negative_number():
    model = layer()

    def closure():
        h = model(ones()) - 1
        return h.log().mean()  # <- here

    return model, closure


@fault("non-finite", "forward")
def logarithm_of_zero_times_zero():
    model = layer()

    def closure():
        p = torch.relu(model(ones()))
        entropy = p * p.log()  # <- here
        return entropy.sum()

    return model, closure


@fault("non-finite", "forward", "*")
def division_of_zero_by_zero():
    model = layer()

    def closure():
        h = model(ones())
        return (h / h.sum(-1, keepdim=True)).sum()  # <- here

    return model, closure


@fault("non-finite", "forward")
def mean_over_nothing():
    model = layer()

    def closure():
        h = model(ones())
        return h[h > 5].mean() + h.sum()  # <- here

    return model, closure


@fault("non-finite", "forward")
def softmax_over_a_masked_row():
    model = layer()

    def closure():
        mask = torch.tensor([[False, True, True, True], [True, True, True, True], [False] * 4])
        scores = model(ones()).masked_fill(mask, float("-inf"))
        weights = scores.softmax(-1)  # <- here
        return weights.square().sum()

    return model, closure


@fault("non-finite", "forward", "*")
def additive_mask_of_minus_infinity_everywhere():
    model = layer()

    def closure():
        mask = torch.full((3, 4), float("-inf"))
        scores = model(ones()) + mask
        return scores.softmax(-1).sum()  # <- here

    return model, closure


@fault("non-finite", "forward", "*")
def root_of_a_negative_number():
    model = layer()

    def closure():
        h = model(ones()) - 2
        return h.sqrt().sum()  # <- here

    return model, closure


@fault("non-finite", "forward", "*")
def fractional_power_of_a_negative_number():
    model = layer()

    def closure():
        h = model(ones()) - 2
        return (h**1.5).sum()  # <- here

    return model, closure


@fault("non-finite", "forward", "*")
def nan_in_the_batch():
    model = nn.Linear(4, 4)
    batch = ones()
    batch[1, 2] = float("nan")

    def closure():
        h = model(batch)  # <- here
        return h.square().mean()

    return model, closure


@fault("non-finite", "forward", "*")
def nan_in_a_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")

    def closure():
        h = model[0](ones())
        h = model[1](h)  # <- here
        return h.square().mean()

    return model, closure


@fault("non-finite", "forward")
def every_target_is_ignored():
    model = nn.Linear(4, 4)

    def closure():
        targets = torch.full((3,), -100)
        return F.cross_entropy(model(ones()), targets)  # <- here

    return model, closure


@fault("non-finite", "forward", "*")
def standard_deviation_of_one_value():
    model = nn.Linear(4, 1)

    def closure():
        h = model(ones())
        return (h - h.std(-1, keepdim=True)).sum()  # <- here

    return model, closure


@fault("non-finite", "overflow", "*")
def exponential_overflows():
    model = layer()

    def closure():
        h = model(ones()) + 100
        return h.exp().log().sum()  # <- here

    return model, closure


@fault("non-finite", "overflow", "*")
def half_precision_overflows_in_the_forward():
    model = nn.Linear(4, 4).half()
    nn.init.ones_(model.weight)

    def closure():
        h = model(ones().half()) * 1e3
        return h.square().float().mean()  # <- here

    return model, closure


@fault("non-finite", "overflow", "*")
def loss_scale_overflows_half_precision():
    model = nn.Linear(4, 4).half()
    nn.init.ones_(model.weight)

    def closure():
        h = model(ones().half())
        scaled = h.float()  # <- here
        return scaled.sum() * 1e6

    return model, closure


@fault("non-finite", "overflow", "*")
def float32_overflows_by_squaring():
    model = nn.Linear(4, 4)

    def closure():
        h = model(ones()) * 1e15
        return (h * 1e15).square().sum()  # <- here

    return model, closure

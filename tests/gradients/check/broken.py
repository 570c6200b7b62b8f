"""Layers with a right forward and one planted mistake in the backward."""

from __future__ import annotations

import torch
from torch import nn


def linear_function(mistake):
    """`y = x Wᵀ + b` as a custom Function; `mistake(dx, dw, db, x, w, g)` spoils its three gradients."""

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w, b):
            ctx.save_for_backward(x, w)
            return x @ w.T + b

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            flat_g, flat_x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
            return mistake(g @ w, flat_g.T @ flat_x, flat_g.sum(0), x, w, g)

    return Linear


class BrokenLinear(nn.Module):
    def __init__(self, inputs, outputs, mistake):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs) / 10)
        self.function = linear_function(mistake)

    def forward(self, x):
        return self.function.apply(x, self.weight, self.bias)


class NormFunction(torch.autograd.Function):
    """LayerNorm whose backward forgets the weight's gradient, or a term of the input's."""

    @staticmethod
    def forward(ctx, x, weight, bias, forget):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        rstd = (var + 1e-5).rsqrt()
        xhat = (x - mean) * rstd
        ctx.save_for_backward(xhat, rstd, weight)
        ctx.forget = forget
        return xhat * weight + bias

    @staticmethod
    def backward(ctx, g):
        xhat, rstd, weight = ctx.saved_tensors
        dxhat = g * weight
        term = (dxhat * xhat).mean(-1, keepdim=True) * xhat
        if ctx.forget == "term":
            term = 0
        dx = rstd * (dxhat - dxhat.mean(-1, keepdim=True) - term)
        dims = tuple(range(g.ndim - 1))
        dw = torch.zeros_like(weight) if ctx.forget == "weight" else (g * xhat).sum(dims)
        return dx, dw, g.sum(dims), None


class BrokenNorm(nn.Module):
    def __init__(self, size, forget):
        super().__init__()
        self.weight = nn.Parameter(1 + torch.randn(size) / 10)
        self.bias = nn.Parameter(torch.randn(size) / 10)
        self.forget = forget

    def forward(self, x):
        return NormFunction.apply(x, self.weight, self.bias, self.forget)


class MaskedReluFunction(torch.autograd.Function):
    """ReLU whose backward lets through what is above 0.5 instead of above 0."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x > 0.5)


class RareFunction(torch.autograd.Function):
    """tanh whose backward is wrong only for rows whose first number is above 2."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        right = g * (1 - y * y)
        return torch.where(x[:, :1] > 2, 1.5 * right, right)


class RotaryFunction(torch.autograd.Function):
    """Rotates the two halves of every head; the backward forgets that the angle turns back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    @staticmethod
    def backward(ctx, g):
        cos, sin = ctx.saved_tensors
        a, b = g.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1), None, None


class Apply(nn.Module):
    """A Function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


class CrossEntropyFunction(torch.autograd.Function):
    """Mean cross-entropy whose backward forgets the targets, or halves them."""

    @staticmethod
    def forward(ctx, logits, targets, share):
        log_p = logits - logits.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(log_p, targets)
        ctx.share = share
        return -log_p.gather(-1, targets[:, None]).mean()

    @staticmethod
    def backward(ctx, g):
        log_p, targets = ctx.saved_tensors
        grad = log_p.exp()
        grad = grad - ctx.share * torch.zeros_like(grad).scatter(-1, targets[:, None], 1.0)
        return g * grad / len(targets), None, None

"""Parameters whose gradient is zero, as a whole or in rows and columns."""

import torch
import torch.nn.functional as F
from tests.gradients.diagnose.planted.registry import Registry
from torch import nn
from torch.nn.utils import prune

FAULTS = Registry()
fault, explained = FAULTS.fault, FAULTS.explained


def x(rows=3):
    return torch.randn(rows, 4)


class Two(nn.Module):
    """An encoder and a head; what lies between them is the fault."""

    def __init__(self, between=None):
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.head = nn.Linear(4, 1)
        self.between = between

    def forward(self, inputs):
        return self.head(self.between(self.encoder(inputs))).mean()


def between(function):
    model = Two(function)
    return model, lambda: model(x())


@fault("zero", "dead-activation", "encoder.*", "head.weight")
def relu_of_negative_numbers():
    def function(h):
        return torch.relu(h - 100)  # <- here

    return between(function)


@fault("zero", "dead-activation", "0.*", "2.weight")
def relu_module_after_a_bias_far_below_zero():
    class Model(nn.Sequential):
        def forward(self, inputs):
            h = self[0](inputs)
            h = self[1](h)  # <- here
            return self[2](h)

    model = Model(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    nn.init.constant_(model[0].bias, -1e3)
    return model, lambda: model(x()).mean()


@fault("zero", "dead-activation", "*")
def square_of_a_silent_relu():
    model = nn.Linear(4, 1)

    def closure():
        h = torch.relu(model(x()) - 100)  # <- here
        return h.square().mean() + 1

    return model, closure


@fault("zero", "dead-activation", "encoder.*")
def gelu_far_below_zero():
    def function(h):
        return F.gelu(h - 1e3) + 1  # <- here

    return between(function)


@fault("zero", "dead-activation", "encoder.*")
def saturated_sigmoid():
    def function(h):
        return torch.sigmoid(h + 200)  # <- here

    return between(function)


@fault("zero", "dead-activation", "encoder.*")
def saturated_tanh():
    def function(h):
        return torch.tanh(h * 0.01 + 100)  # <- here

    return between(function)


@fault("zero", "dead-activation", "encoder.*")
def saturated_softmax():
    def function(h):
        offset = torch.tensor([0.0, 0.0, 0.0, 1e4])
        return torch.softmax(h + offset, -1)  # <- here

    return between(function)


@fault("zero", "clamped", "encoder.*")
def clamp_outside_its_limits():
    def function(h):
        return (h + 100).clamp(-1, 1)  # <- here

    return between(function)


@fault("zero", "clamped", "encoder.*")
def hardtanh_outside_its_limits():
    def function(h):
        return F.hardtanh(h - 50)  # <- here

    return between(function)


@fault("zero", "clamped", "encoder.*")
def maximum_with_a_larger_constant():
    def function(h):
        return torch.maximum(h, torch.full((4,), 1e3))  # <- here

    return between(function)


@fault("zero", "clamped", "encoder.*")
def rounding():
    def function(h):
        return h.round()  # <- here

    return between(function)


@fault("zero", "clamped", "encoder.*")
def sign():
    def function(h):
        return torch.sign(h)  # <- here

    return between(function)


@fault("zero", "masked", "encoder.*")
def masked_fill_of_everything():
    def function(h):
        return h.masked_fill(torch.ones(3, 4, dtype=torch.bool), 0.5)  # <- here

    return between(function)


@fault("zero", "masked", "encoder.*")
def where_never_chooses_it():
    def function(h):
        return torch.where(torch.zeros(3, 4, dtype=torch.bool), h, torch.ones(3, 4))  # <- here

    return between(function)


@fault("zero", "masked", "encoder.*")
def mask_of_zeros():
    def function(h):
        return h * torch.zeros(3, 1) + 1  # <- here

    return between(function)


@fault("zero", "masked", "encoder.*")
def dropout_of_everything():
    def function(h):
        return F.dropout(h, p=1.0) + 1  # <- here

    return between(function)


@fault("zero", "masked", "0.*", "3.weight")
def dropout_module_of_everything():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(1.0), nn.Linear(4, 1))

    def closure():
        return model(x()).square().mean()  # <- here

    return model, closure


@fault("zero", "masked", "0.*", "3.weight")
def channels_dropped_altogether():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout2d(1.0), nn.Flatten(), nn.Linear(144, 1))

    def closure():
        return model(torch.randn(2, 3, 8, 8)).square().mean()  # <- here

    return model, closure


class Attending(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, inputs, **masks):
        h, _ = self.attention(inputs, inputs, inputs, need_weights=False, **masks)
        return self.head(h + inputs).square().mean()


@fault("zero", "masked", "attention.in_proj_*", "attention.out_proj.weight")
def attention_with_an_inverted_padding_mask():
    model = Attending()

    def closure():
        padding = torch.ones(2, 5, dtype=torch.bool)
        return model(torch.randn(2, 5, 8), key_padding_mask=padding)

    return model, closure


@fault("zero", "masked", "attention.in_proj_*", "attention.out_proj.weight")
def attention_with_a_mask_of_minus_infinity():
    model = Attending(dropout=0.1)

    def closure():
        return model(torch.randn(2, 5, 8), attn_mask=torch.full((5, 5), -torch.inf))

    return model, closure


@fault("zero", "masked", "qkv.*", "out.weight")
def attention_that_shows_nothing():
    model = nn.Module()
    model.qkv, model.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def closure():
        inputs = torch.randn(2, 2, 5, 8)
        q, k, v = model.qkv(inputs).chunk(3, -1)
        mask = torch.zeros(5, 5, dtype=torch.bool)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # <- here
        return (model.out(h) + inputs).square().mean()

    return model, closure


@fault("zero", "masked", "encoder.*")
def loss_term_with_coefficient_zero():
    model = Two()

    def closure():
        extra = model.encoder(x()).square().mean() * 0.0  # <- here
        return model.head(x()).mean() + extra

    return model, closure


@fault("zero", "zero-loss-gradient", "*")
def whole_loss_times_zero():
    model = Two(lambda h: h)

    def closure():
        return model(x()) * 0.0  # <- here

    return model, closure


@fault("zero", "zero-loss-gradient", "*")
def loss_of_rounded_error():
    model = Two(lambda h: h)

    def closure():
        return (model(x()) * 100).round().abs()  # <- here

    return model, closure


@explained("zero", "zero-loss-gradient", "*")
def all_margins_are_satisfied():
    model = nn.Linear(4, 1)
    nn.init.constant_(model.weight, 1.0)

    def closure():
        good, bad = model(x().abs() + 1), model(-x().abs() - 1)
        return F.margin_ranking_loss(good, bad, torch.ones(3, 1), margin=1.0)  # <- here

    return model, closure


@fault("zero", "constant", "*")
def both_scores_of_a_margin_are_one():
    model = nn.Linear(4, 1)

    def closure():
        score = model(x())
        good, bad = score + 10, score - 10
        return F.margin_ranking_loss(good, bad, torch.ones(3, 1), margin=1.0)  # <- here

    return model, closure


@explained("zero", "zero-loss-gradient", "*")
def predictions_equal_the_targets():
    model = nn.Linear(4, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)

    def closure():
        return F.mse_loss(model(x()), torch.zeros(3, 1))  # <- here

    return model, closure


@explained("zero", "zero-weight-downstream", "a")
def lora_begins_at_zero():
    model = nn.Module()
    model.base = nn.Linear(4, 4)
    model.a = nn.Parameter(torch.randn(4, 2))
    model.b = nn.Parameter(torch.zeros(2, 4))

    def closure():
        inputs = x()
        return (model.base(inputs) + inputs @ model.a @ model.b).square().mean()  # <- here

    return model, closure


@fault("zero", "zero-weight-downstream", "a", "b")
def both_factors_begin_at_zero():
    model = nn.Module()
    model.base = nn.Linear(4, 4)
    model.a = nn.Parameter(torch.zeros(4, 2))
    model.b = nn.Parameter(torch.zeros(2, 4))

    def closure():
        inputs = x()
        low = inputs @ model.a
        return (model.base(inputs) + low @ model.b).square().mean()

    return model, closure


@explained("zero", "zero-weight-downstream", "branch.*")
def residual_branch_scaled_by_a_learned_zero():
    model = nn.Module()
    model.main, model.branch = nn.Linear(4, 4), nn.Linear(4, 4)
    model.scale = nn.Parameter(torch.zeros(()))

    def closure():
        inputs = x()
        return (model.main(inputs) + model.scale * model.branch(inputs)).square().mean()  # <- here

    return model, closure


@explained("zero", "zero-weight-downstream", "encoder.*")
def output_layer_begins_at_zero():
    model = Two(torch.tanh)
    nn.init.zeros_(model.head.weight)

    def closure():
        h = torch.tanh(model.encoder(x()))
        return (model.head(h) - 1).square().mean()  # <- here

    return model, closure


@fault("zero", "underflow", "encoder.*")
def half_precision_loses_a_small_gradient():
    model = Two().half()

    def closure():
        h = model.encoder(x().half())
        h = h * 1e-4  # <- here
        return model.head(x().half()).float().mean() + h.float().mean() * 1e-5

    return model, closure


@fault("zero", "underflow", "encoder.*")
def cast_to_half_loses_a_small_gradient():
    model = Two()

    def closure():
        h = model.encoder(x()).half()
        small = h.float().mean() * 1e-9  # <- here
        return model.head(x()).mean() + small

    return model, closure


@explained("partly-zero", "absent-rows", "weight")
def tokens_absent_from_the_batch():
    model = nn.Embedding(10, 4)

    def closure():
        return model(torch.tensor([1, 2, 3])).square().sum()  # <- here

    return model, closure


@explained("partly-zero", "absent-rows", "weight")
def padding_row():
    model = nn.Embedding(4, 4, padding_idx=0)

    def closure():
        return model(torch.tensor([0, 1, 2, 3])).square().sum()  # <- here

    return model, closure


@explained("partly-zero", "absent-rows", "weight")
def sparse_embedding():
    model = nn.Embedding(10, 4, sparse=True)

    def closure():
        return model(torch.tensor([1, 2, 3])).square().sum()  # <- here

    return model, closure


@explained("partly-zero", "absent-rows", "positions")
def positions_beyond_the_sequence():
    tensors = {"positions": nn.Parameter(torch.randn(8, 4))}

    def closure():
        return (torch.ones(3, 4) + tensors["positions"][:3]).square().sum()  # <- here

    return tensors, closure


@explained("zero", "absent-rows", "weight")
def only_padding():
    model = nn.Embedding(4, 4, padding_idx=0)
    tensors = {"weight": model.weight, "scale": nn.Parameter(torch.ones(()))}

    def closure():
        h = model(torch.zeros(3, dtype=torch.long))  # <- here
        return (h + tensors["scale"]).square().sum()

    return tensors, closure


@explained("zero", "absent-rows", "weight")
def inputs_are_all_zero():
    model = nn.Linear(4, 2)

    def closure():
        return (model(torch.zeros(3, 4)) - 1).square().mean()  # <- here

    return model, closure


@explained("partly-zero", "dead-activation", "0.*", "2.weight")
def some_silent_units():
    class Model(nn.Sequential):
        def forward(self, inputs):
            return self[2](self[1](self[0](inputs)))  # <- here

    model = Model(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias[:2] = -100.0
    return model, lambda: model(x()).square().mean()


def split(rows):
    """(B, S, 16) into 4 heads of 4 numbers: (B, 4, S, 4)."""
    return rows.unflatten(-1, (4, 4)).transpose(1, 2)


class Heads(nn.Module):
    """Self-attention of 4 heads of 4 numbers; `between` sees each head's result as (B, 4, S, 4)."""

    def __init__(self, between=None):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.o = nn.Linear(16, 16, bias=False)
        self.between = between

    def forward(self, inputs):
        q, k, v = (split(layer(inputs)) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h if self.between is None else self.between(h)
        h = h.transpose(1, 2).flatten(2)
        return self.o(h)


def heads(between=None):
    model = Heads(between)
    return model, lambda: (model(torch.randn(2, 5, 16)) - 1).square().mean()


@explained("partly-zero", "masked", "q.*", "k.*", "v.*", "o.*")
def heads_multiplied_by_a_head_mask():
    def between(h):
        return h * torch.tensor([1.0, 0.0, 1.0, 1.0]).view(1, 4, 1, 1)  # <- here

    return heads(between)


@explained("partly-zero", "masked", "q.*", "k.*", "v.*", "o.*")
def head_filled_with_zeros():
    def between(h):
        return h.masked_fill(torch.tensor([0, 0, 1, 1]).bool().view(4, 1, 1), 0.0)  # <- here

    return heads(between)


@explained("partly-zero", "masked", "q.*", "k.*", "v.*", "o.*")
def head_written_over_with_zeros():
    def between(h):
        h = h.clone()
        h[:, 2] = 0.0  # <- here
        return h

    return heads(between)


@explained("partly-zero", "masked", "qkv.weight", "o.weight")
def head_masked_in_the_probabilities_of_a_joint_projection():
    model = nn.Module()
    model.qkv, model.o = nn.Linear(16, 48, bias=False), nn.Linear(16, 16, bias=False)

    def closure():
        q, k, v = model.qkv(torch.randn(2, 5, 16)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        p = (q @ k.transpose(-1, -2)).softmax(-1)
        p = p * torch.tensor([1.0, 1.0, 1.0, 0.0]).view(4, 1, 1)  # <- here
        return (model.o((p @ v).transpose(1, 2).flatten(2)) - 1).square().mean()

    return model, closure


@explained("partly-zero", "zero-weight-downstream", "q.*", "k.*", "v.*", "o.*")
def head_closed_by_a_learned_gate():
    model = Heads()
    model.gate = nn.Parameter(torch.tensor([1.0, 0.0, 1.0, 1.0]))

    def between(h):
        return h * model.gate.view(4, 1, 1)  # <- here

    model.between = between
    return model, lambda: (model(torch.randn(2, 5, 16)) - 1).square().mean()


@explained("partly-zero", "zero-weight-downstream", "q.*", "k.*", "v.*")
def head_whose_columns_of_the_output_projection_are_zero():
    model = nn.Module()
    model.q, model.k, model.v, model.o = (nn.Linear(16, 16, bias=False) for _ in range(4))
    with torch.no_grad():
        model.o.weight[:, 8:12] = 0.0

    def closure():
        inputs = torch.randn(2, 5, 16)
        q, k, v = (split(layer(inputs)) for layer in (model.q, model.k, model.v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return (model.o(h) - 1).square().mean()  # <- here

    return model, closure


@explained("partly-zero", "masked", "v.weight", "o.weight_orig")
def columns_pruned():
    model = Heads()
    prune.ln_structured(model.o, "weight", 0.25, n=2, dim=1)

    def closure():
        return (model(torch.randn(2, 5, 16)) - 1).square().mean()

    return model, closure


@explained("partly-zero", "absent-rows", "q.*", "k.*", "v.*")
def head_left_out_by_slices():
    model = nn.Module()
    model.q, model.k, model.v = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def closure():
        inputs = torch.randn(2, 5, 16)
        q, k, v = (split(layer(inputs)) for layer in (model.q, model.k, model.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return h[:, :1].square().mean() + h[:, 2:].square().mean()  # <- here

    return model, closure


@explained("partly-zero", "absent-rows", "0.weight")
def features_that_are_zero_in_this_batch():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))

    def closure():
        inputs = x() * torch.tensor([1.0, 0.0, 1.0, 0.0])
        return model(inputs).square().mean()  # <- here

    return model, closure


@explained("zero", "structural", "key.bias")
def bias_of_the_keys_in_a_softmax():
    model = nn.Module()
    model.query, model.key, model.value = (nn.Linear(4, 4) for _ in range(3))

    def closure():
        inputs = x(6)
        scores = model.query(inputs) @ model.key(inputs).T
        return (scores.softmax(-1) @ model.value(inputs)).square().sum()

    return model, closure


@explained("zero", "structural", "0.bias")
def bias_before_a_batch_norm():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    return model, lambda: model(torch.randn(4, 3, 8, 8)).square().mean()


@fault("zero", "zeroed", "first")
def function_returns_zeros():
    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value * 2

        @staticmethod
        def backward(ctx, gradient):  # <- here
            return torch.zeros_like(gradient)

    tensors = {"first": nn.Parameter(torch.ones(4)), "second": nn.Parameter(torch.ones(4))}
    return tensors, lambda: (Same.apply(tensors["first"]) * tensors["second"]).sum()


@explained("zero", "zeroed", "0.weight")
def hook_multiplies_by_zero():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].weight.register_hook(lambda gradient: gradient * 0)
    return model, lambda: model(x()).mean()


@fault("zero", "zero-loss-gradient", "*")
def every_target_is_ignored_by_a_sum():
    model = nn.Linear(4, 4)

    def closure():
        targets = torch.full((3,), -100)
        return F.cross_entropy(model(x()), targets, reduction="sum")  # <- here

    return model, closure

"""Parameters whose gradient is None for other reasons than a cut path."""

import torch
import torch.nn.functional as F
from tests.gradients.diagnose.planted.registry import Registry
from torch import nn
from torch.func import functional_call

FAULTS = Registry()
fault, explained = FAULTS.fault, FAULTS.explained


def x():
    return torch.randn(3, 4)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)


@explained("none", "frozen", "0.*")
def frozen_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    return model, lambda: model(x()).mean()


@explained("none", "frozen", "a.*", "b.own")
def frozen_shared_submodule():
    shared = nn.Linear(4, 4)
    model = nn.Module()
    model.a, model.head = shared, nn.Linear(4, 1)
    model.b = nn.Module()
    model.b.shared, model.b.own = shared, nn.Parameter(torch.ones(()), requires_grad=False)
    shared.requires_grad_(False)
    return model, lambda: model.head(model.b.shared(model.a(x())) * model.b.own).mean()


@explained("none", "frozen", "running_mean", "count")
def buffers_given_as_if_they_were_parameters():
    norm = nn.BatchNorm1d(4)
    tensors = {"weight": norm.weight, "running_mean": norm.running_mean, "count": norm.num_batches_tracked}
    return tensors, lambda: norm(x()).square().sum()


@fault("none", "loss-without-graph")
def everything_is_frozen():
    model = nn.Linear(4, 1).requires_grad_(False)
    return model, lambda: model(x()).mean()


@fault("none", "not-leaf", "w")
def scaled_after_requires_grad():
    w = torch.randn(4, 4, requires_grad=True) * 0.1
    return {"w": w}, lambda: (x() @ w).mean()


@fault("none", "not-leaf", "w")
def moved_after_requires_grad():
    w = torch.randn(4, 4, requires_grad=True).double()
    return {"w": w}, lambda: (x().double() @ w).mean()


@fault("none", "unused", "second.*")
def layer_never_called():
    class Model(Pair):
        def forward(self, inputs):
            return self.first(inputs)

    model = Model()
    return model, lambda: model(x()).mean()


@fault("none", "unused", "second.*")
def wrong_layer_called_twice():
    class Model(Pair):
        def forward(self, inputs):
            return self.first(torch.relu(self.first(inputs)))

    model = Model()
    return model, lambda: model(x()).mean()


@fault("none", "unused", "layers.2.*")
def last_layer_of_a_stack_left_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, inputs):
            for layer in self.layers[:-1]:
                inputs = layer(inputs)
            return inputs

    model = Model()
    return model, lambda: model(x()).mean()


@fault("none", "unused", "bias")
def bias_left_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, inputs):
            return inputs @ self.weight

    model = Model()
    return model, lambda: model(x()).mean()


@fault("none", "unused", "weight", "bias")
def functional_call_with_other_weights():
    model = nn.Linear(4, 1)
    others = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    return model, lambda: functional_call(model, others, (x(),)).mean()


@explained("none", "unused", "experts.1.*", "experts.2.*")
def experts_that_no_token_chose():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, inputs):
            return self.experts[0](inputs) + self.experts[3](inputs)

    model = Model()
    return model, lambda: model(x()).mean()


@explained("none", "unused", "layers.1.*")
def layer_dropped_by_chance():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.runs = 0

        def forward(self, inputs):
            for i, layer in enumerate(self.layers):
                skipped = i == 1 and self.runs == 0  # what a random number decides in LayerDrop
                inputs = inputs if skipped else layer(inputs)
            self.runs += 1
            return inputs

    model = Model()
    return model, lambda: model(x()).mean()


@explained("none", "unused", "side.*")
def branch_not_taken():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.side = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, inputs, both=False):
            return self.main(inputs) + (self.side(inputs) if both else 0)

    model = Model()
    return model, lambda: model(x()).mean()


@fault("none", "not-reaching-loss", "second.*")
def computed_and_not_added():
    model = Pair()

    def closure():
        first = model.first(x())
        second = model.second(x())  # <- here
        assert second.shape == first.shape
        return first.mean()

    return model, closure


@fault("none", "not-reaching-loss", "second.*")
def dict_entry_overwritten():
    model = Pair()

    def closure():
        losses = {}
        losses["total"] = model.second(x()).mean()  # <- here
        losses["total"] = model.first(x()).mean()
        return losses["total"]

    return model, closure


@fault("none", "not-reaching-loss", "second.*")
def computed_further_and_left_aside_at_the_end():
    model = Pair()

    def closure():
        h = model.second(x())
        h = torch.tanh(h) * 2
        score = h.square().mean()  # <- here
        assert score.dim() == 0
        return model.first(x()).mean()

    return model, closure


@fault("none", "not-reaching-loss", "second.*")
def logged_and_left_aside():
    model, log = Pair(), []

    def closure():
        main = model.first(x()).mean()
        extra = model.second(x()).square().mean()  # <- here
        log.append(f"extra {extra.item():.3f}, {extra.detach().numpy()}")
        return main

    return model, closure


@fault("none", "cut", "second.*")
def logged_here_and_used_as_a_number_there():
    model, log = Pair(), []

    def closure():
        extra = model.second(x()).square().mean()
        log.append(extra.item())
        weight = float(extra)  # <- here
        log.append(extra.tolist())
        return model.first(x()).mean() * weight

    return model, closure


@fault("none", "cut", "second.*")
def counted_with_a_whole_number():
    model = Pair()

    def closure():
        count = int(model.second(x()).abs().sum().ceil())  # <- here
        return model.first(x()).mean() / count

    return model, closure


@fault("none", "undefined-in-backward", "weight")
def function_returns_none_for_the_weight():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, weight):
            ctx.save_for_backward(weight)
            return value @ weight

        @staticmethod
        def backward(ctx, gradient):  # <- here
            return gradient @ ctx.saved_tensors[0].T, None

    tensors = {"weight": nn.Parameter(torch.randn(4, 4)), "scale": nn.Parameter(torch.ones(()))}
    return tensors, lambda: Product.apply(x() * tensors["scale"], tensors["weight"]).sum()


@fault("none", "undefined-in-backward", "first.*")
def function_returns_none_for_everything_before_it():
    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):  # <- here
            return None

    model = Pair()
    return model, lambda: model.second(Same.apply(model.first(x()))).mean()


@explained("none", "cleared", "weight", "bias")
def hook_takes_the_gradient():
    model = nn.Linear(4, 1)

    def take(parameter):
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(take)
    return model, lambda: model(x()).mean()


@fault("none", "unused", "extra")
def parameter_registered_but_its_copy_is_used():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.extra = nn.Parameter(torch.ones(4))
            self.plain = nn.Parameter(self.extra)
            self.register_parameter("plain", nn.Parameter(torch.ones(4)))

        def forward(self, inputs):
            return F.linear(inputs, self.plain)

    model = Model()
    return model, lambda: model(x()).mean()

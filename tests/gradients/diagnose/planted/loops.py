"""Faults of the training loop rather than of one gradient."""

import torch
from tests.gradients.diagnose.planted.registry import Registry
from torch import nn

FAULTS = Registry()
fault, explained = FAULTS.fault, FAULTS.explained


def x():
    return torch.ones(3, 4)


def two_layers():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))


@fault("loop", "not-in-optimizer", "0.*")
def layer_not_given_to_the_optimizer():
    model = two_layers()
    return model, lambda: model(x()).mean(), torch.optim.SGD(model[2].parameters(), 0.1)


@fault("loop", "not-in-optimizer", "2.*")
def layer_added_after_the_optimizer_was_made():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model.append(nn.Linear(4, 1))
    return model, lambda: model(x()).mean(), optimizer


@fault("loop", "stale-in-optimizer", "0.weight")
def weight_replaced_after_the_optimizer_was_made():
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model[0].weight = nn.Parameter(torch.randn(4, 4))
    return model, lambda: model(x()).mean(), optimizer


@fault("loop", "stale-in-optimizer", "2.*")
def head_replaced_after_the_optimizer_was_made():
    model = two_layers()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model[2] = nn.Linear(4, 3)
    return model, lambda: model(x()).mean(), optimizer


@fault("loop", "stale-in-optimizer", "*")
def model_made_anew_after_the_optimizer():
    optimizer = torch.optim.AdamW(two_layers().parameters(), 0.1)
    model = two_layers()
    return model, lambda: model(x()).mean(), optimizer


@fault("loop", "not-in-optimizer", "blocks[[]0].*", "blocks[[]1].*")
def layers_hidden_in_a_python_list():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = [nn.Linear(4, 4), nn.Linear(4, 4)]
            self.head = nn.Linear(4, 1)

        def forward(self, inputs):
            for block in self.blocks:
                inputs = torch.tanh(block(inputs))
            return self.head(inputs)

    model = Model()
    return model, lambda: model(x()).mean()


@fault("loop", "accumulating", "*")
def zero_grad_forgotten():
    model = two_layers()
    for _ in range(3):
        model(x()).mean().backward()
    return model, lambda: model(x()).mean(), torch.optim.SGD(model.parameters(), 0.1)


@fault("loop", "moved-while-frozen", "0.*")
def frozen_after_a_backward():
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    model(x()).mean().backward()
    model[0].requires_grad_(False)
    return model, lambda: model(x()).mean(), optimizer


@explained("loop", "decay", "a")
def decay_moves_a_weight_without_a_gradient():
    tensors = {"a": nn.Parameter(torch.randn(4, 2)), "b": nn.Parameter(torch.zeros(2, 1))}
    optimizer = torch.optim.AdamW(tensors.values(), 0.1, weight_decay=0.1)
    return tensors, lambda: ((x() @ tensors["a"] @ tensors["b"]) - 1).square().mean(), optimizer


@explained("loop", "moved-while-frozen", "0.1.running_mean", "0.1.running_var")
def running_statistics_of_a_frozen_backbone():
    backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = nn.Sequential(backbone.requires_grad_(False), nn.Linear(4, 1))
    return model, lambda: model(x()).mean(), torch.optim.SGD(model[1].parameters(), 0.1)


@fault("loop", "never-moves", "*")
def step_too_small_for_the_number_type():
    model = nn.Linear(4, 1).bfloat16()
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    return model, lambda: model(x().bfloat16()).float().mean(), optimizer


@fault("loop", "zero-lr")
def learning_rate_zero():
    model = two_layers()
    return model, lambda: model(x()).mean(), torch.optim.SGD(model.parameters(), 0.0)


@explained("loop", "zero-lr")
def schedule_begins_at_zero():
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    return model, lambda: model(x()).mean(), optimizer


@fault("loop", "unscaled-amp")
def clipped_before_unscaling():
    model = two_layers()
    scaler = torch.amp.GradScaler("cpu")

    def closure():
        loss = model(x()).mean()
        scaler.scale(loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # <- here
        return loss

    return model, closure


@explained("loop", "unscaled-amp", "*")
def gradients_that_still_carry_the_loss_scale():
    model = two_layers()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(x()).mean()).backward()
    return model, lambda: model(x()).mean()

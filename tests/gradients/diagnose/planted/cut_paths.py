"""Parameters whose gradient is None because something cuts their path to the loss."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from tests.gradients.diagnose.planted.registry import Registry
from torch import nn
from torch.utils.checkpoint import checkpoint

FAULTS = Registry()
fault, explained = FAULTS.fault, FAULTS.explained


class Two(nn.Module):
    """An encoder and a head; what lies between them is the fault."""

    def __init__(self, between=None):
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.head = nn.Linear(4, 1)
        self.between = between

    def forward(self, x):
        return self.head(self.between(self.encoder(x))).mean()


def x():
    return torch.randn(3, 4)


@fault("none", "cut", "encoder.*")
def detach():
    def between(h):
        return h.detach()  # <- here

    model = Two(between)
    return model, lambda: model(x())


@fault("none", "cut", "encoder.*")
def detach_in_place():
    def between(h):
        h = h * 1
        h.detach_()  # <- here
        return h

    model = Two(between)
    return model, lambda: model(x())


@fault("none", "cut", "encoder.*")
def data_of_an_activation():
    def between(h):
        return h.data * 2  # <- here

    model = Two(between)
    return model, lambda: model(x())


@fault("none", "cut", "encoder.weight")
def data_of_a_weight():
    model = Two()

    def closure():
        h = F.linear(x(), model.encoder.weight.data, model.encoder.bias)  # <- here
        return model.head(h).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def no_grad_block():
    model = Two()

    def closure():
        with torch.no_grad():
            h = model.encoder(x())  # <- here
        return model.head(h).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def no_grad_decorator():
    model = Two()

    @torch.no_grad()
    def encode(inputs):
        return model.encoder(inputs)  # <- here

    return model, lambda: model.head(encode(x())).mean()


@fault("none", "cut", "0.*", "1.*", "2.*")
def no_grad_around_a_deep_stack():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))

    def closure():
        with torch.no_grad():
            h = model[:3](x())  # <- here
        return model[3](h).mean()

    return model, closure


@fault("none", "cut", "0.*", "1.*")
def two_lines_under_one_no_grad():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))

    def closure():
        with torch.no_grad():
            h = model[0](x())  # <- here
            h = model[1](h)
        return model[2](h).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def set_grad_enabled_false():
    model = Two()

    def closure():
        with torch.set_grad_enabled(False):
            h = model.encoder(x())  # <- here
        return model.head(h).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def inference_mode_block():
    model = Two()

    def closure():
        with torch.inference_mode():
            h = model.encoder(x())  # <- here
        return model.head(h.clone()).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def inference_mode_decorator():
    model = Two()

    @torch.inference_mode()
    def encode(inputs):
        return model.encoder(inputs)  # <- here

    return model, lambda: model.head(encode(x()).clone()).mean()


@fault("none", "cut", "encoder.*")
def argmax():
    model = Two(lambda h: h)
    model.head = nn.Embedding(4, 1)

    def closure():
        best = model.encoder(x()).argmax(-1)  # <- here
        return model.head(best).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def indices_of_max():
    model = Two()

    def closure():
        best = model.encoder(x()).max(-1).indices  # <- here
        return model.head(F.one_hot(best, 4).float()).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def indices_of_topk():
    model = Two()

    def closure():
        _, chosen = model.encoder(x()).topk(2)  # <- here
        return model.head(torch.ones(3, 4).scatter(1, chosen, 2.0)).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def integer_cast():
    def between(h):
        return h.long().float()  # <- here

    model = Two(between)
    return model, lambda: model(x())


@fault("none", "cut", "encoder.*")
def comparison():
    def between(h):
        return (h > 0).float()  # <- here

    model = Two(between)
    return model, lambda: model(x())


@fault("none", "cut", "encoder.*")
def item():
    model = Two()

    def closure():
        scale = model.encoder(x()).mean().item()  # <- here
        return (model.head(x()) * scale).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def python_float():
    model = Two()

    def closure():
        scale = float(model.encoder(x()).mean())  # <- here
        return (model.head(x()) * scale).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def tolist():
    model = Two()

    def closure():
        rows = model.encoder(x()).tolist()  # <- here
        return model.head(torch.tensor(rows)).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def numpy_round_trip():
    model = Two()

    def closure():
        array = np.tanh(model.encoder(x()).detach().numpy())  # <- here
        return model.head(torch.from_numpy(array)).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def numpy_asarray():
    model = Two()

    def closure():
        array = np.asarray(model.encoder(x()).detach())  # <- here
        return model.head(torch.as_tensor(array.copy())).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def torch_tensor_of_a_tensor():
    model = Two()

    def closure():
        h = model.encoder(x())
        h = torch.tensor(h)  # <- here
        return model.head(h).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def torch_tensor_of_a_list_of_tensors():
    model = Two()

    def closure():
        h = model.encoder(torch.ones(1, 4))[0]
        h = torch.tensor([h[0], h[1], h[2], h[3]])  # <- here
        return model.head(h).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def new_tensor():
    model = Two()

    def closure():
        h = model.encoder(x())
        h = h.new_tensor(h)  # <- here
        return model.head(h).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def wrapped_as_a_parameter():
    model = Two()

    def closure():
        h = nn.Parameter(model.encoder(x()))  # <- here
        return model.head(h).mean()

    return model, closure


@fault("none", "cut", "scale")
def weight_wrapped_again():
    model = nn.Linear(4, 1)
    model.scale = nn.Parameter(torch.ones(()))

    def closure():
        weight = nn.Parameter(model.weight * model.scale)  # <- here
        return (F.linear(x(), weight, model.bias) + model.weight.sum()).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def deep_copied_layer():
    model = Two()

    def closure():
        layer = copy.deepcopy(model.encoder)  # <- here
        return model.head(layer(x())).mean()

    return model, closure


@fault("none", "cut", "hyper.*")
def copied_into_a_weight_under_no_grad():
    model = nn.Module()
    model.hyper = nn.Linear(2, 16)
    model.main = nn.Linear(4, 4)

    def closure():
        with torch.no_grad():
            model.main.weight.copy_(model.hyper(torch.ones(2)).view(4, 4))  # <- here
        return model.main(x()).mean()

    return model, closure


@fault("none", "cut", "hyper.*")
def data_of_a_weight_assigned():
    model = nn.Module()
    model.hyper = nn.Linear(2, 16)
    model.main = nn.Linear(4, 4)

    def closure():
        model.main.weight.data = model.hyper(torch.ones(2)).view(4, 4)  # <- here
        return model.main(x()).mean()

    return model, closure


@fault("none", "cut", "hyper.*")
def data_of_a_weight_copied_into():
    model = nn.Module()
    model.hyper = nn.Linear(2, 16)
    model.main = nn.Linear(4, 4)

    def closure():
        new = model.hyper(torch.ones(2)).view(4, 4)
        model.main.weight.data.copy_(new.detach())  # <- here
        return model.main(x()).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def row_by_row_into_a_detached_buffer():
    model = Two()

    def closure():
        rows = torch.zeros(3, 4)
        for i, row in enumerate(x()):
            rows[i] = model.encoder(row).detach()  # <- here
        return model.head(rows).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def written_into_a_buffer_under_no_grad():
    model = Two()

    def closure():
        h = model.encoder(x())
        buffer = torch.empty(3, 4)
        with torch.no_grad():
            buffer[:] = h  # <- here
        return model.head(buffer).mean()

    return model, closure


@fault("none", "cut", "encoder.*")
def reentrant_checkpoint_without_an_input_that_requires_grad():
    model = Two()

    def closure():
        h = checkpoint(model.encoder, x(), use_reentrant=True)  # <- here
        return model.head(h).mean()

    return model, closure


class ScaleBySecret(torch.autograd.Function):
    secret: torch.Tensor

    @staticmethod
    def forward(ctx, value):
        return value * ScaleBySecret.secret.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ScaleBySecret.secret.detach()


@fault("none", "cut", "scale")
def function_uses_a_parameter_it_was_not_given():
    model = Two()
    model.scale = nn.Parameter(torch.ones(()))

    def closure():
        ScaleBySecret.secret = model.scale
        h = ScaleBySecret.apply(model.encoder(x()))  # <- here
        return model.head(h).mean()

    return model, closure


@fault("none", "cut", "critic.weight")
def gradient_penalty_without_create_graph():
    model = nn.Module()
    model.critic = nn.Linear(4, 1)

    def closure():
        inputs = x().requires_grad_()
        score = torch.tanh(model.critic(inputs)).sum()
        (slope,) = torch.autograd.grad(score, inputs)  # <- here
        return (slope.norm() - 1).square() + model.critic.bias.sum()

    return model, closure


@fault("none", "cut", "encoder.*")
def one_of_two_losses_is_detached():
    model = Two()

    def closure():
        first = model.encoder(x()).square().mean().detach()  # <- here
        return first + model.head(x()).mean()

    return model, closure


@fault("none", "cut", "layers.0.*", "layers.1.*")
def two_cuts_in_a_row():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def closure():
        h = model.layers[1](model.layers[0](x()))
        h = h.detach()  # <- here
        return model.layers[2](h.detach()).mean()

    return model, closure


@fault("none", "cut", "embed.weight", "rnn.*")
def cut_inside_a_library_module_call():
    model = nn.Module()
    model.embed = nn.Embedding(5, 4)
    model.rnn = nn.GRU(4, 4, batch_first=True)
    model.head = nn.Linear(4, 2)

    def closure():
        states, _ = model.rnn(model.embed(torch.tensor([[1, 2, 3]])))
        last = states[:, -1].detach()  # <- here
        return F.cross_entropy(model.head(last), torch.tensor([1]))

    return model, closure


@fault("none", "cut", "0.*")
def histogram_is_not_differentiable():
    model = nn.Sequential(nn.Linear(4, 4))

    def closure():
        counts = torch.histc(model(x()), bins=3)  # <- here
        return counts.mean() + torch.ones((), requires_grad=True)

    return model, closure


@fault("none", "loss-without-graph", "*")
def everything_under_no_grad():
    model = Two(lambda h: h)

    @torch.no_grad()
    def closure():
        return model(x())  # <- here

    return model, closure


@fault("none", "loss-without-graph", "*")
def loss_wrapped_in_a_new_tensor():
    model = Two(lambda h: h)

    def closure():
        loss = model(x())
        return torch.tensor(loss.item(), requires_grad=True)  # <- here

    return model, closure


@fault("none", "loss-without-graph", "*")
def loss_from_argmax():
    model = Two(lambda h: h)
    model.head = nn.Linear(4, 3)

    def closure():
        guess = model.head(model.encoder(x())).argmax(-1)  # <- here
        return (guess != torch.tensor([0, 1, 2])).float().mean()

    return model, closure

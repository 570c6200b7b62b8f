"""Closures that run backward themselves, several times, or through a gradient: none is accused for that."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clinometer.gradients.diagnose.diagnose import diagnose

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def critic():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def adversaries():
    model = nn.ModuleDict({"generator": nn.Linear(4, 4), "critic": critic()})
    return model, [torch.optim.Adam(part.parameters(), 1e-3) for part in model.values()]


def line_of(text):
    with open(__file__) as lines:
        return next(i for i, line in enumerate(lines, 1) if line.strip().endswith(text))


def losses(model):
    real, fake = model["critic"](X), model["critic"](model["generator"](X).detach())
    yield F.softplus(-real).mean() + F.softplus(fake).mean()
    yield F.softplus(-model["critic"](model["generator"](X))).mean()


def returns_the_sum(values):
    return sum(values)


def returns_the_last(values):
    return values[-1]


def returns_the_first(values):
    return values[0]


def returns_a_number_as_a_tensor(values):
    return torch.tensor(sum(value.item() for value in values))


def returns_it_detached(values):
    return sum(value.detach() for value in values)


RETURNS = [
    returns_the_sum,
    returns_the_last,
    returns_the_first,
    returns_a_number_as_a_tensor,
    returns_it_detached,
]


@pytest.mark.parametrize("returns", RETURNS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("steps", [True, False])
def test_a_whole_step_of_two_adversaries_is_healthy(returns, steps):
    model, optimizers = adversaries()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def closure():
        values = []
        for value, optimizer in zip(losses(model), reversed(optimizers), strict=True):
            optimizer.zero_grad()
            value.backward()
            if steps:
                optimizer.step()
            values.append(value)
        return returns(values)

    found = diagnose(model, closure, optimizer=optimizers)
    assert not found.findings, found.render()
    assert {found[name].status for name in found} == {"ok"}
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert not any(optimizer.state for optimizer in optimizers)


@pytest.mark.parametrize("returns", RETURNS, ids=lambda f: f.__name__)
def test_micro_batches_that_are_accumulated_are_healthy(returns):
    model = critic()

    def closure():
        values = [model(part).mean() / 3 for part in X.chunk(3)]
        for value in values:
            value.backward()
        return returns(values)

    found = diagnose(model, closure)
    assert not found.findings, found.render()


def test_several_losses_of_one_graph_are_healthy():
    model, _ = adversaries()

    def closure():
        h = model["generator"](X)
        first, second = model["critic"](h).mean(), h.square().mean()
        first.backward(retain_graph=True)
        second.backward()
        return second

    assert not diagnose(model, closure).findings


def test_backward_of_several_at_once_is_healthy():
    model, _ = adversaries()

    def closure():
        h = model["generator"](X)
        torch.autograd.backward([model["critic"](h).mean(), h.square().mean()])
        return h.detach().mean()

    assert not diagnose(model, closure).findings


def test_a_cut_is_found_although_the_closure_runs_backward_itself():
    model, _ = adversaries()

    def closure():
        h = model["generator"](X)
        h = h.detach()  # planted
        value = model["critic"](h).mean()
        value.backward()
        return value.detach()

    (finding,) = diagnose(model, closure).findings
    assert (finding.cause, finding.where.line) == ("cut", line_of("# planted"))
    assert set(finding.names) == {"generator.weight", "generator.bias"}


def test_a_layer_left_out_of_all_of_several_losses_is_found():
    model, optimizers = adversaries()
    model["spare"] = nn.Linear(4, 4)

    def closure():
        for value, optimizer in zip(losses(model), reversed(optimizers), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        return value

    found = diagnose(model, closure)
    assert {found[n].cause for n in found if n.startswith("spare")} == {"unused"}
    assert not found.healthy


class TestThroughAGradient:
    def gradient(self, model, **options):
        z = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(z).sum(), z, **options)  # the penalty's
        return slope

    def test_a_loss_with_a_gradient_penalty_is_healthy(self):
        model = critic()

        def closure():
            slope = self.gradient(model, create_graph=True)
            return model(X).mean() + (slope.norm(dim=1) - 1).square().mean()

        assert not diagnose(model, closure).findings

    def test_a_penalty_alone_does_not_train_the_last_bias_and_that_is_explained(self):
        model = critic()
        found = diagnose(model, lambda: self.gradient(model, create_graph=True).square().mean())
        (finding,) = found.findings
        assert found.healthy
        assert (finding.cause, finding.variant) == ("not-reaching-loss", "differentiated")
        assert (finding.names, finding.where.line) == (("2.bias",), line_of("# the penalty's"))

    def test_a_penalty_without_create_graph_is_a_cut_at_its_line(self):
        model = critic()
        found = diagnose(model, lambda: self.gradient(model).square().mean() + model[2].bias.sum())
        (finding,) = [f for f in found.findings if f.severity == "fault"]
        assert (finding.cause, finding.variant) == ("cut", "grad")
        assert finding.where.line == line_of("# the penalty's")
        assert set(finding.names) == {"0.weight", "0.bias", "2.weight"}

    def test_a_gradient_that_is_computed_and_left_aside_is_no_excuse(self):
        model, other = critic(), nn.Linear(4, 1)

        def closure():
            slope = self.gradient(model, create_graph=True)
            assert slope.shape == X.shape
            return other(X).mean()

        found = diagnose(nn.ModuleList([model, other]), closure)
        (finding,) = [f for f in found.findings if f.severity == "fault"]
        assert (finding.cause, finding.where.line) == ("not-reaching-loss", line_of("# the penalty's"))
        assert set(finding.names) == {"0.0.weight", "0.0.bias", "0.2.weight"}

    def test_a_second_backward_over_the_parameters_is_healthy(self):
        model = critic()

        def closure():
            value = model(X).square().mean()
            slopes = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
            return value + sum(slope.square().sum() for slope in slopes)

        assert not diagnose(model, closure).findings

    @pytest.mark.parametrize("create_graph", [True, False])
    def test_weights_one_step_ahead_are_healthy(self, create_graph):
        model = critic()

        def closure():
            names, weights = zip(*model.named_parameters(), strict=True)
            slopes = torch.autograd.grad(model(X).square().mean(), weights, create_graph=create_graph)
            ahead = {n: w - 0.1 * s for n, w, s in zip(names, weights, slopes, strict=True)}
            return torch.func.functional_call(model, ahead, (X,)).square().mean()

        assert not diagnose(model, closure).findings

    def test_a_backward_that_keeps_its_graph_for_the_loss_is_healthy(self):
        model = critic()

        def closure():
            z = X.clone().requires_grad_()
            model(z).sum().backward(create_graph=True)
            return z.grad.square().mean() + model(X).mean()

        assert not diagnose(model, closure).findings

"""What no one should be accused of: surrogate gradients, stopped gradients, corners, random losses."""

import inspect

import pytest
import torch
from tests.gradients.check.broken import Apply
from torch import nn
from torch.nn import functional as F

from clinometer.gradients.check.check_gradients import check_gradients


class Round(torch.autograd.Function):
    """A straight-through estimator as a custom Function."""

    @staticmethod
    def forward(ctx, x):
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, g):
        return g


class Spike(torch.autograd.Function):
    """A spiking neuron: a step forwards, a fast sigmoid's slope backwards."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g / (1 + 10 * x.abs()) ** 2


class Reverse(torch.autograd.Function):
    """Gradient reversal (Ganin & Lempitsky 2015)."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -0.3 * g


def around(middle, **options):
    model = nn.Sequential(nn.Linear(5, 6), middle, nn.Linear(6, 2))
    x = torch.randn(9, 5)
    return check_gradients(model, lambda: model(x).square().mean(), **options)


@pytest.mark.parametrize(
    ("function", "surrogate"), [(Round, "steps"), (Spike, "steps"), (Reverse, "identity")]
)
def test_a_surrogate_gradient_is_explained_and_not_accused(function, surrogate):
    check = around(Apply(function))
    assert check.healthy
    assert not check.passed  # the tensors before it were not proved right either
    (finding,) = check.findings
    assert (finding.cause, finding.severity) == ("surrogate-gradient", "explained")
    assert finding.names == ("0.weight", "0.bias")
    assert check["0.weight"].status == "surrogate"
    assert check["2.weight"].passed
    (layer,) = [layer for layer in check.wrong_layers if layer.function]
    assert layer.surrogate == surrogate
    assert "most likely" in " ".join(check.render("en").split())
    _, first = inspect.getsourcelines(function.backward)
    assert finding.where.line == first + 1  # below its @staticmethod


class ByDetach(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        match self.form:
            case "round":
                return x + (x.round() - x).detach()
            case "data":
                return x + (x.sign() - x).data
            case "no_grad":
                with torch.no_grad():
                    step = (x > 0.1).to(x.dtype) - x
                return x + step
            case "number":
                return x * x.max().item()
            case "stopped target":
                return (x - x.detach().mean(0)).square()
            case "gumbel":
                return F.gumbel_softmax(x, hard=True)
            case "branch":
                return x.exp() if x.sum() > 0 else x.cos()
            case "copied":
                held = torch.zeros_like(x)
                with torch.no_grad():
                    held.copy_(x).mul_(2)
                return x * held
            case "numpy":
                return x * torch.from_numpy(x.detach().numpy().copy())


FORMS = ["round", "data", "no_grad", "number", "stopped target", "gumbel", "branch", "copied", "numpy"]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_held_back_from_the_gradient_is_held_constant_in_the_differences(form):
    check = around(ByDetach(form))
    assert check.findings == ()
    assert check.passed
    assert all(layer.judgement.verdict == "passed" for layer in check.layers)


def test_the_lines_that_hold_values_back_are_listed():
    check = around(ByDetach("round"))
    assert [where.source for where in check.held] == ["return x + (x.round() - x).detach()"]


def test_a_wrong_backward_before_a_straight_through_estimator_is_still_found():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    check = around(nn.Sequential(Apply(Doubled), ByDetach("round")))
    assert [finding.cause for finding in check.findings] == ["wrong-backward"]
    assert check["0.weight"].status == "wrong"


def test_values_exactly_on_a_corner_are_counted_and_said():
    w = torch.tensor([0.0, 1.0, -1.0], requires_grad=True)
    check = check_gradients({"w": w}, lambda: (F.relu(w) * torch.tensor([1.0, 2.0, 3.0])).sum())
    assert check.healthy
    (finding,) = check.findings
    assert (finding.cause, finding.severity) == ("corner", "explained")
    assert finding.values == {"op": "relu", "values": "1"}
    assert check["w"].passed


def test_a_corner_no_one_knows_by_name_is_said_and_never_called_wrong():
    w = torch.zeros(3, requires_grad=True)
    check = check_gradients({"w": w}, lambda: torch.stack([w, 2 * w]).max(0).values.sum())
    assert check.healthy
    assert check["w"].status == "kink"
    assert [finding.cause for finding in check.findings] == ["kink"]
    assert not check.passed


def test_a_loss_that_draws_from_its_own_generator_is_not_deterministic_and_the_line_is_named():
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 1)

    def loss():
        x = torch.randn(8, 4, generator=generator)  # the line
        return model(x).square().mean()

    check = check_gradients(model, loss)
    (finding,) = check.findings
    assert (finding.cause, finding.severity) == ("not-repeatable", "fault")
    assert finding.where.source == "x = torch.randn(8, 4, generator=generator)  # the line"
    assert {tensor.status for tensor in check.entries().values()} == {"unchecked"}
    assert "not deterministic" in check.render("en")


def test_a_loss_that_takes_the_next_batch_is_not_deterministic():
    model = nn.Linear(4, 1)
    batches = iter(torch.randn(50, 8, 4))
    check = check_gradients(model, lambda: model(next(batches)).square().mean())
    assert [finding.cause for finding in check.findings] == ["not-repeatable"]


def test_dropout_and_noise_from_the_global_generator_are_replayed():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Linear(8, 2))
    check = check_gradients(model, lambda: model(torch.randn(6, 4)).square().mean())
    assert check.passed
    assert check.findings == ()


def test_a_loss_that_is_not_finite_is_handed_to_diagnose():
    w = torch.zeros(2, requires_grad=True)
    check = check_gradients({"w": w}, lambda: w.sqrt().sum())
    (finding,) = check.findings
    assert finding.cause == "not-finite"
    assert not check.healthy


def test_a_gradient_penalty_is_checked_through_its_double_backward():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    x = torch.randn(6, 4, requires_grad=True)

    def loss():
        y = model(x).sum()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        return y.square() + (g.norm(dim=-1) - 1).square().mean()

    assert check_gradients(model, loss).passed


def test_complex_parameters_are_checked():
    w = torch.randn(3, 3, dtype=torch.complex64, requires_grad=True)
    x = torch.randn(3, dtype=torch.complex64)
    assert check_gradients({"w": w}, lambda: (w @ x).abs().square().sum()).passed


def test_tied_weights_and_their_other_names():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    x = torch.randn(5, 4)
    check = check_gradients(model, lambda: model(x).square().mean())
    assert list(check) == ["0.weight"]
    assert check["2.weight"].passed


def test_tensors_without_a_gradient_to_check_are_listed_as_unchecked():
    model = nn.Linear(4, 2)
    model.bias.requires_grad_(False)
    x = torch.randn(5, 4)
    check = check_gradients(model, lambda: model(x).square().mean())
    assert check["bias"].status == "unchecked"
    assert check["weight"].passed
    assert check.healthy


def test_weights_that_the_forward_clips_to_a_norm_stand_on_a_corner():
    module = nn.Embedding(9, 4, max_norm=1.0)  # F.embedding rescales the rows it reads, in place
    check = check_gradients(module, lambda: module(torch.arange(9)).sin().sum())
    assert check.healthy
    assert check["weight"].status == "kink"


def by_frequency(kind, **options):
    model = nn.ModuleList([kind(9, 4, scale_grad_by_freq=True, **options), nn.Linear(4, 3)])
    ids = torch.tensor([[1, 1, 1, 2], [3, 1, 2, 2]])
    targets = torch.randint(0, 3, (2,) if kind is nn.EmbeddingBag else (2, 4))

    def loss():
        return F.cross_entropy(model[1](model[0](ids)).reshape(-1, 3), targets.flatten())

    return model, loss


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_gradient_divided_by_frequencies_is_explained_and_not_accused(kind):
    model, loss = by_frequency(kind)
    check = check_gradients(model, loss)
    assert check.healthy
    (finding,) = check.findings
    assert (finding.cause, finding.names) == ("divided", ("0.weight",))
    assert (
        finding.where.source
        == "return F.cross_entropy(model[1](model[0](ids)).reshape(-1, 3), targets.flatten())"
    )
    assert check["0.weight"].status == "surrogate"
    assert check["1.weight"].passed
    assert check.wrong_layers == ()
    assert "scale_grad_by_freq" in check.render("en")


def test_a_wrong_backward_behind_such_an_embedding_is_still_found():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    model, _ = by_frequency(nn.Embedding)
    ids = torch.tensor([1, 1, 2])
    check = check_gradients(model, lambda: model[1](Twice.apply(model[0](ids))).square().mean())
    assert not check.healthy
    assert check["0.weight"].status == "wrong"


STOPPED = {"round": "detach", "data": "data", "no_grad": "sub", "number": "item", "stopped target": "detach"}


@pytest.mark.parametrize("form", STOPPED)
def test_a_line_that_keeps_a_part_of_the_loss_from_the_gradient_is_named_beside_the_verdict(form):
    check = around(ByDetach(form))
    (line,) = check.stopped
    assert line.op == STOPPED[form]
    told = " ".join(check.render("en").split())
    assert "✓" in told
    assert f"stopped at {line.label} ({line.op})" in told
    assert check.to_dict()["stopped"] == [line.to_dict()]


class Logged(nn.Module):
    """What it takes out of the gradient does not come back into the loss, or makes no difference there."""

    def forward(self, x):
        self.seen = x.detach().mean(), x.norm().item(), x.tolist()
        scores = x - x.detach().amax(-1, keepdim=True)
        return scores.exp() / scores.exp().sum(-1, keepdim=True)


def test_lines_whose_values_make_no_difference_to_the_loss_are_not_named():
    check = around(Logged())
    assert len(check.held) == 2
    assert check.stopped == ()
    assert "stopped" not in check.render("en")

"""State that the closure changes, and values that torch.func wraps: followed into float64, and put back.

Buffers that a forward updates and uses are put back between evaluations, however they are written; what they
hold is a constant for the gradient, and so for the differences. Generators of the closure's own and switches
of the process are put back at the end. Nothing of this ends in an exception.
"""

import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

from clinometer.gradients.check.check_gradients import check_gradients
from clinometer.gradients.diagnose.diagnose import diagnose


class Centred(nn.Module):
    """Keeps a running mean and uses it in the same forward."""

    def __init__(self, how):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.fc, self.how = nn.Linear(6, 1), how

    def forward(self, x):
        with torch.no_grad():
            now = x.mean(0)
            match self.how:
                case "lerp_":
                    self.mean.lerp_(now, 0.1)
                case "copy_":
                    self.mean.copy_(0.9 * self.mean + 0.1 * now)
                case "data":
                    self.mean.data = 0.9 * self.mean.data + 0.1 * now
                case "foreach":
                    torch._foreach_lerp_([self.mean], [now], 0.1)
                case "view":
                    self.mean[:3].copy_(now[:3])
                case "item":
                    self.mean[0] = now[0]
                case "out":
                    torch.add(self.mean, now, alpha=0.1, out=self.mean)
                case "new":
                    self.mean = torch.lerp(self.mean, now, 0.1)
                case "augmented":
                    self.mean += 0.1 * now
        return self.fc((x - self.mean).sin())


WAYS = ["lerp_", "copy_", "data", "foreach", "view", "item", "out", "new", "augmented"]


@pytest.mark.parametrize("how", WAYS)
def test_a_buffer_that_is_updated_and_used_follows_into_float64_and_is_put_back(how):
    model, x, y = Centred(how), torch.randn(16, 6), torch.randn(16, 1)
    before = model.mean
    check = check_gradients(model, lambda: (model(x) - y).square().mean())
    assert check.passed, check.render("en")
    assert max(tensor.error for tensor in check.entries().values()) < 1e-10
    assert model.mean is before
    assert before.dtype is torch.float32
    assert not before.any()


def test_running_statistics_that_the_loss_reads_are_those_of_this_run():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.randn(8, 4)
    check = check_gradients(model, lambda: (model(x) - model[1].running_mean).square().mean())
    assert check.passed, check.render("en")


@pytest.mark.parametrize("how", WAYS)
def test_a_running_mean_of_what_the_model_computes_is_held_constant(how):
    model, x = nn.Sequential(nn.Linear(4, 6), Centred(how)), torch.randn(16, 4)
    check = check_gradients(model, lambda: model(x).square().mean())
    assert check.passed, check.render("en")


def test_noise_of_a_generator_that_nothing_resets_is_still_not_deterministic():
    own = torch.Generator().manual_seed(0)
    model, x = nn.Linear(6, 1), torch.randn(16, 6)
    check = check_gradients(model, lambda: (model(x) + torch.randn(16, 1, generator=own)).square().mean())
    assert [finding.cause for finding in check.findings] == ["not-repeatable"]


def test_generators_of_the_closure_are_put_back_at_the_end():
    own, python, numpy, old = (
        torch.Generator(),
        random.Random(4),
        np.random.default_rng(5),
        np.random.RandomState(6),
    )
    model, x = nn.Linear(6, 1), torch.randn(16, 6)
    model.generator = torch.Generator().manual_seed(9)

    def loss():
        torch.rand(2, generator=own), torch.rand(2, generator=model.generator)
        python.random(), numpy.random(), old.rand()
        return model(x).square().mean()

    def state():
        torches = [g.get_state().tolist() for g in (own, model.generator)]
        return torches, python.getstate(), numpy.bit_generator.state, old.get_state()[1].tolist()

    before = state()
    for tool in (check_gradients, diagnose):
        assert tool(model, loss).healthy
        assert state() == before


def test_switches_of_the_process_that_the_closure_turns_are_put_back():
    model, x = nn.Linear(6, 1), torch.randn(16, 6)
    threads = torch.get_num_threads()

    def loss():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_num_threads(threads + 1)
        torch.set_float32_matmul_precision("medium")
        torch.set_flush_denormal(True)
        torch.set_default_device("cpu")
        torch.backends.cudnn.benchmark = True
        return model(x).square().mean()

    assert check_gradients(model, loss).healthy
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads
    assert torch.get_float32_matmul_precision() == "highest"
    assert sys.float_info.min * 0.5 > 0
    assert not torch.backends.cudnn.benchmark


def test_random_numbers_of_an_own_generator_are_not_taken_for_rounding():
    own = torch.Generator()
    model, x = nn.Linear(6, 1), torch.randn(16, 6)

    def seeded():
        own.manual_seed(0)  # other numbers in float64 than in float32
        return (model(x) * torch.randn(16, 1, generator=own)).square().mean()

    def forked():
        with torch.random.fork_rng():
            return torch.dropout(model(x), 0.5, True).square().mean()

    for loss in (seeded, forked):
        assert check_gradients(model, loss).findings == ()


def test_autocast_is_never_called_the_rounding_of_float32():
    model, x = nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 1)), torch.randn(30, 20)

    def loss():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        # The difference of two large numbers: little is left of 8 bits.
        return ((out.float() + 300).to(torch.bfloat16).float() - 300).square().mean()

    text = check_gradients(model, loss).render("en")
    assert "In float32" not in text
    assert "%" not in text


# ---- torch.func ----


def body(m):
    return lambda v: m(v).sum()


FORMS = {
    "grad": lambda m, x: grad(body(m))(x).square().mean(),
    "vmap of grad": lambda m, x: vmap(grad(body(m)))(x).square().mean(),
    "grad of grad": lambda m, x: grad(lambda v: grad(body(m))(v).square().sum())(x).square().mean(),
    "jacrev": lambda m, x: jacrev(m)(x).square().mean(),
    "jacfwd": lambda m, x: jacfwd(m)(x).square().mean(),
    "vjp": lambda m, x: vjp(m, x)[1](torch.ones(6, 1))[0].square().mean(),
    "jvp": lambda m, x: jvp(m, (x,), (torch.ones_like(x),))[1].square().mean(),
    "inner step": lambda m, x: inner_step(m, x),
}


def inner_step(m, x):
    weights = dict(m.named_parameters())
    inner = grad(lambda w: functional_call(m, w, (x,)).square().mean())(weights)
    return (
        functional_call(m, {name: w - 0.1 * inner[name] for name, w in weights.items()}, (x,)).square().mean()
    )


@pytest.mark.parametrize("form", FORMS)
def test_transforms_of_torch_func_in_the_loss_pass(form):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)), torch.randn(6, 3)
    check = check_gradients(model, lambda: FORMS[form](model, x))
    assert check.healthy, check.render("en")
    bias = "passed" if form == "inner step" else "no-gradient"
    assert {name: tensor.status for name, tensor in check.entries().items()} == {
        "0.weight": "passed", "0.bias": "passed", "2.weight": "passed", "2.bias": bias,
    }  # fmt: skip


def test_a_value_detached_inside_grad_is_held_constant_and_its_parameters_are_said_to_be_cut():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)), torch.randn(6, 3)
    check = check_gradients(
        model,
        lambda: grad(lambda v: model[2](model[1](model[0](v).detach() + v.sum())).sum())(x).square().mean(),
    )
    assert check["2.weight"].passed
    cut = next(finding for finding in check.findings if finding.cause == "no-gradient-cut")
    assert cut.names == ("0.weight", "0.bias")


@pytest.mark.parametrize("form", ["detached", "rounded"])
def test_values_cut_off_inside_vmap_give_no_verdict_and_no_accusation(form):
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)), torch.randn(6, 3)
    f = {
        "detached": lambda v: model(v) * model(v).detach(),
        "rounded": lambda v: model(v) + (model(v).round() - model(v)).detach(),
    }[form]
    check = check_gradients(model, lambda: vmap(f)(x).mean())
    assert check.healthy
    assert not check.passed
    (finding,) = check.findings
    assert (finding.cause, finding.variant) == ("unclear", "vmap")
    assert "detach" in finding.where.source


@pytest.mark.parametrize("many", [False, True])
def test_a_teacher_that_the_forward_moves_on_is_put_back_between_evaluations(many):
    class Taught(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)

        def forward(self, x):
            pairs = [[*self.teacher.parameters()], [*self.student.parameters()]]
            with torch.no_grad():
                if many:
                    torch._foreach_lerp_(*pairs, 0.1)
                else:
                    for p, q in zip(*pairs, strict=True):
                        p.mul_(0.9).add_(q, alpha=0.1)
            return self.student(x) - self.teacher(x)

    torch.manual_seed(0)
    model, x = Taught(), torch.randn(8, 4)
    kept = model.teacher.weight.clone()
    check = check_gradients(model, lambda: model(x).square().mean())
    assert check.findings == ()
    assert check["student.weight"].passed
    assert torch.equal(model.teacher.weight, kept)


def test_a_wrong_backward_of_complex_numbers_is_named():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            return a * a

        @staticmethod
        def backward(ctx, g):
            (a,) = ctx.saved_tensors
            return 2 * g * a  # the conjugate is missing

    c = torch.randn(4, 4, dtype=torch.complex64, requires_grad=True)
    check = check_gradients({"c": c}, lambda: Product.apply(c).real.sin().mean(), entries={"c": [(0, 1)]})
    (finding,) = check.findings
    assert finding.cause == "wrong-backward"
    assert finding.where.function == "Product.backward" or "Product" in finding.say("what")


def test_a_normalisation_may_run_twice_around_a_gradient_in_the_loss():
    """As in adversarial training and MAML: what the first run saved is needed when the second writes."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    x, weight = torch.randn(16, 4), model[0].weight

    def loss():
        (gradient,) = torch.autograd.grad(model(x).square().mean(), weight)
        return model(x + gradient.mean()).square().mean()

    assert check_gradients(model, loss).findings == ()

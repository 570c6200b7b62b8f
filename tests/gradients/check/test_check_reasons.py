"""Why a gradient is wrong is found by trying: one circumstance is changed at a time.

Healthy twins say nothing. What the person does to the gradient on purpose (a hook, compressed activations)
is explained with its line; what makes it wrong unseen (other random numbers in a checkpoint, a backward that
reads memory, one that cannot be differentiated, a write that autograd does not see) is a fault with its line.
"""

import functools

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from clinometer.gradients.check.check_gradients import check_gradients


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 1)
    ), torch.randn(16, 4)


def the_only(check):
    (finding,) = check.findings
    assert "most likely in a hook" not in check.render("en")
    return finding


# ---- hooks ----


def halve(grad):
    return grad * 0.5


class Halving:
    def __call__(self, grad):
        return grad * 0.5


def on_activation(model, x):
    h = model[0](x)
    h.register_hook(lambda g: g.clamp(-1e-4, 1e-4))  # the line
    return model[4](model[3](model[2](model[1](h))))


def on_node(model, x):
    h = model[0](x)
    h.grad_fn.register_hook(lambda into, out: tuple(2 * g if g is not None else g for g in into))  # the line
    return model[4](model[3](model[2](model[1](h))))


def on_node_before(model, x):
    h = model[0](x)
    h.grad_fn.register_prehook(lambda out: (out[0] * 2,))  # the line
    return model[4](model[3](model[2](model[1](h))))


@pytest.mark.parametrize("form", [on_activation, on_node, on_node_before])
def test_a_hook_on_an_activation_is_explained_with_the_line_that_registers_it(form):
    model, x = network()
    check = check_gradients(model, lambda: form(model, x).square().mean())
    finding = the_only(check)
    assert check.healthy
    assert not check.passed
    assert (finding.cause, finding.severity) == ("hooked", "explained")
    assert finding.where.source.endswith("# the line")
    assert {"0.weight", "0.bias"} >= set(finding.names) > set()
    assert check[finding.names[0]].status == "surrogate"


@pytest.mark.parametrize("hook", [halve, functools.partial(torch.mul, other=0.5), Halving()])
def test_a_hook_on_a_parameter_is_explained_whatever_kind_of_callable_it_is(hook):
    model, x = network()
    model[2].weight.register_hook(lambda g: hook(g))
    check = check_gradients(model, lambda: model(x).square().mean())
    finding = the_only(check)
    assert (finding.cause, finding.severity, finding.names) == ("hooked", "explained", ("2.weight",))


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_module_hook_is_explained_at_its_definition(register):
    def hook(module, first, *rest):
        return (3 * first[0],)

    model, x = network()
    getattr(model[1], register)(hook)
    check = check_gradients(model, lambda: model(x).square().mean())
    finding = the_only(check)
    assert (finding.cause, finding.names) == ("hooked", ("0.weight", "0.bias"))
    assert finding.where.source == "def hook(module, first, *rest):"
    assert check.wrong_layers == ()


def test_a_hook_that_changes_nothing_is_not_named_and_a_wrong_backward_beside_it_is():
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            return a.sin()

        @staticmethod
        def backward(ctx, g):
            (a,) = ctx.saved_tensors
            return g * a.cos() * 1.02

    model, x = network()
    seen = []

    def loss(function):
        h = model[0](x)
        h.register_hook(lambda g: seen.append(g.norm()))
        return function(h).square().mean()

    check = check_gradients(model, lambda: loss(Steep.apply))
    assert the_only_fault(check).cause == "wrong-backward"
    healthy = check_gradients(model[:1], lambda: loss(torch.sin))
    assert healthy.passed
    assert healthy.findings == ()


def the_only_fault(check):
    (finding,) = [finding for finding in check.findings if finding.severity == "fault"]
    return finding


# ---- checkpoints ----


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_draws_other_random_numbers_is_named(reentrant):
    model, x = network()

    def loss(keep):
        h = model[1](model[0](x))
        h = checkpoint(model[2:4], h, use_reentrant=reentrant, preserve_rng_state=keep)  # the line
        return model[4](h).square().mean()

    finding = the_only(check := check_gradients(model, lambda: loss(False)))
    assert (finding.cause, finding.severity) == ("wrong-gradient", "fault")
    assert finding.where.source.endswith("# the line")
    assert "preserve_rng_state=True" in finding.say("remedy")
    assert check["4.weight"].passed
    assert check_gradients(model, lambda: loss(True)).findings == ()


def test_a_checkpointed_block_that_counts_its_calls_is_named():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.fc = 0, nn.Linear(4, 4)

        def forward(self, x):
            self.calls += 1
            return self.fc(x) * self.calls

    model, x = nn.Sequential(nn.Linear(4, 4), Counting()), torch.randn(5, 4)
    check = check_gradients(
        model, lambda: checkpoint(model[1], model[0](x).tanh(), use_reentrant=True).square().mean()
    )
    finding = the_only_fault(check)
    assert "Without checkpointing" in finding.say("why")
    assert finding.where.op == "checkpoint"
    assert check_gradients(model, lambda: model[1](model[0](x).tanh()).square().mean()).passed


# ---- hooks on what is saved ----


@pytest.mark.parametrize(
    ("unpack", "severity"),
    [
        (lambda t: t.to(torch.bfloat16).to(t.dtype) * 1.004, "explained"),
        (torch.ones_like, "fault"),
        (lambda t: t, None),
    ],
)
def test_hooks_on_saved_tensors_are_explained_as_compression_or_a_fault(unpack, severity):
    model, x = network()

    def loss():
        with saved_tensors_hooks(lambda t: t, unpack):  # the line
            h = model[1](model[0](x))
        return model[4](model[2](h)).square().mean()

    check = check_gradients(model, loss)
    if severity is None:
        assert check.findings == ()
        return
    finding = the_only(check)
    assert finding.severity == severity
    assert finding.where.source.endswith("# the line")
    assert "saved" in finding.say("what")


# ---- a backward that reads memory ----


class Strided(torch.autograd.Function):
    """Its backward takes the gradient's memory for rows that follow each other."""

    @staticmethod
    def forward(ctx, a):
        return 2 * a

    @staticmethod
    def backward(ctx, g):
        return 2 * torch.as_strided(g, g.shape, (g.shape[1], 1))


def test_a_backward_that_needs_a_contiguous_gradient_is_named():
    model, x = network()
    weights = torch.randn(8, 16)
    body = model[:3]
    turned = check_gradients(body, lambda: (Strided.apply(body(x)).T.clone() * weights).sum())
    finding = the_only(turned)
    assert (finding.cause, finding.severity) == ("wrong-gradient", "fault")
    assert "contiguous" in finding.say("what")
    assert "Strided" in finding.say("remedy")
    assert finding.where.source == "def backward(ctx, g):"
    assert check_gradients(body, lambda: Strided.apply(body(x)).square().sum()).passed


# ---- second derivatives ----


class Squared(torch.autograd.Function):
    """(2v)²; `fixed` computes 2v anew in backward, else it is kept on ctx."""

    fixed = False

    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        ctx.twice = v * 2
        return ctx.twice**2

    @staticmethod
    def backward(ctx, g):
        (v,) = ctx.saved_tensors
        return 4 * (2 * v if Squared.fixed else ctx.twice) * g


@pytest.mark.parametrize("fixed", [False, True])
def test_a_backward_that_cannot_be_differentiated_is_named_where_a_penalty_does_so(fixed, monkeypatch):
    monkeypatch.setattr(Squared, "fixed", fixed)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1)), torch.randn(6, 4)

    def penalty():
        v = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model[1](Squared.apply(model[0](v))).sum(), v, create_graph=True)
        return (slope.norm(dim=1) - 1).square().mean()

    check = check_gradients(model, penalty)
    assert check.healthy == fixed
    if not fixed:
        finding = the_only_fault(check)
        assert "second derivative of Squared" in finding.say("what")
        assert "twice" in finding.say("remedy")
        assert finding.where.source == "def backward(ctx, g):"
    plain = check_gradients(model, lambda: model[1](Squared.apply(model[0](x))).square().mean())
    assert plain.passed
    assert plain.findings == ()


# ---- writes that autograd does not see ----


def test_a_write_under_no_grad_into_the_graph_is_named():
    model, x = network()

    def loss():
        h = model[2](model[1](model[0](x)))
        with torch.no_grad():
            h.mul_(2)  # the line
        return model[4](h).square().mean()

    finding = the_only(check_gradients(model, loss))
    assert (finding.cause, finding.severity) == ("wrong-gradient", "fault")
    assert finding.where.source == "h.mul_(2)  # the line"


def test_a_write_by_numpy_is_named_at_the_line_that_takes_the_alias():
    w = torch.randn(5, 4, requires_grad=True)

    def loss():
        h = w.sin()
        h.detach().numpy()[:] *= 2  # the line
        return (h * 3).square().mean()

    finding = the_only_fault(check_gradients({"w": w}, loss))
    assert finding.where.source.endswith("# the line")


def test_what_no_trial_explains_is_said_not_to_be_found():
    state = {"factor": 1.0}

    class Elsewhere(torch.autograd.Function):  # right alone, wrong after another one ran in between
        @staticmethod
        def forward(ctx, a):
            return 2 * a

        @staticmethod
        def backward(ctx, g):
            return 2 * g * state["factor"]

    model, x = network()

    def loss():
        state["factor"] = 1.0
        out = Elsewhere.apply(model[:3](x)).square().mean()
        state["factor"] = 1.5
        return out

    finding = the_only_fault(check_gradients(model[:3], loss))
    assert finding.cause in ("wrong-gradient", "wrong-backward")
    assert "most likely" not in finding.say("why")


# ---- a backward inside a hook ----


@pytest.mark.parametrize("hooked", [True, False])
def test_a_gradient_that_a_hook_accumulates_is_compared_with_the_loss(hooked):
    model, x = nn.Linear(6, 4), torch.randn(8, 6)

    def loss():
        batch = x.to(model.weight.dtype)
        with torch.no_grad():
            parts = [model(part) for part in batch.split(2)]
        leaves = torch.cat(parts).detach().requires_grad_()
        value = nn.functional.cross_entropy(leaves @ leaves.T, torch.arange(8))
        (cached,) = torch.autograd.grad(value, leaves)

        def second_pass(grad):
            with torch.enable_grad():
                for part, c in zip(batch.split(2), cached.split(2), strict=True):
                    (model(part) * c * grad).sum().backward()

        value = value.detach().requires_grad_()
        if hooked:
            value.register_hook(second_pass)  # the line
        return value

    check = check_gradients(model, loss)
    assert check.passed == hooked
    assert check.healthy == hooked
    finding = the_only(check)
    assert finding.cause == ("hook-backward" if hooked else "no-gradient-cut")
    if hooked:
        assert finding.where.source.endswith("# the line")

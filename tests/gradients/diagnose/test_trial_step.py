"""What a step of the optimizer does with the gradients of this run, said with its size and its reason, or
not at all.

Accuse with evidence only. A step that moves nothing is a fault if a larger step would lower the loss; it is
none at a minimum, and none of an optimizer that waits. What moves a weight without a gradient is measured,
not guessed. What a step makes NaN of finite numbers is the step's.
"""

import pytest
import torch
from torch import nn

from clinometer.gradients.diagnose.diagnose import diagnose


def found_in(found, cause):
    return [f for f in found.findings if f.cause == cause]


class Line(nn.Module):
    """A regression of 64 points, and its loss."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.layer = nn.Linear(3, 1).to(dtype)
        self.x = torch.randn(64, 3).to(dtype)
        self.y = (
            self.x @ torch.tensor([[1.0], [-2.0], [0.5]]).to(dtype) + 0.3 + 0.1 * torch.randn(64, 1).to(dtype)
        )

    def loss(self):
        return (self.layer(self.x) - self.y).square().mean()


def converged(make=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), dtype=torch.float32):
    line = Line(dtype)
    optimizer = make(line.parameters())
    for _ in range(400):
        optimizer.zero_grad()
        line.loss().backward()
        optimizer.step()
    return line, optimizer


def still(line, optimizer):
    return found_in(diagnose(line, line.loss, optimizer=optimizer), "never-moves")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_converged_model_is_not_told_to_raise_its_rate(dtype):
    for finding in still(*converged(dtype=dtype)):
        assert (finding.severity, finding.variant) == ("explained", "minimum")


@pytest.mark.parametrize("lr", [1e-12, 1e-30])
def test_a_rate_too_small_from_the_start_is_a_fault(lr):
    line = Line()
    (finding,) = still(line, torch.optim.SGD(line.parameters(), lr=lr))
    assert (finding.severity, finding.variant) == ("fault", "")
    assert "Raise the learning rate" in finding.say("remedy", "en")


def test_a_rate_too_small_for_a_half_trained_model_is_a_fault():
    line, _ = converged(lambda p: torch.optim.SGD(p, lr=3e-4))
    (finding,) = still(line, torch.optim.SGD(line.parameters(), lr=1e-12))
    assert finding.severity == "fault"


class Every(torch.optim.SGD):
    """Steps at each fourth call only, as one that accumulates does."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls % 4 == 0:
            super().step(closure)


class Never(torch.optim.SGD):
    def step(self, closure=None):
        pass


class NeedsClosure(torch.optim.Optimizer):
    """As sharpness-aware minimisation: its step calls the closure again."""

    def __init__(self, params, base):
        super().__init__(params, {"lr": 0.1})
        self.base = base

    def step(self, closure=None):
        assert closure is not None, "a closure is needed"
        closure()
        self.base.step()


def test_an_optimizer_that_waits_is_not_accused():
    line = Line()
    assert still(line, Every(line.parameters(), lr=0.1)) == []
    (finding,) = still(line, Never(line.parameters(), lr=0.1))
    assert (finding.severity, finding.variant) == ("explained", "waits")
    (finding,) = still(line, Every(line.parameters(), lr=1e-12))
    assert (finding.severity, finding.variant) == ("fault", "")


def test_an_optimizer_that_raises_leaves_the_rest_of_the_diagnosis():
    line = Line()
    optimizer = NeedsClosure(line.parameters(), torch.optim.SGD(line.parameters(), lr=0.1))
    found = diagnose(line, line.loss, optimizer=optimizer)
    (finding,) = found_in(found, "trial-step")
    assert finding.severity == "explained"
    assert "NeedsClosure was tried and raised AssertionError: a closure is needed" in finding.say(
        "what", "en"
    )
    assert found.healthy


def test_lbfgs_and_sparse_adam_are_diagnosed_without_a_word():
    line = Line()
    assert not diagnose(line, line.loss, optimizer=torch.optim.LBFGS(line.parameters())).findings
    table = nn.Embedding(10, 4, sparse=True)
    ids = torch.arange(10)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=0.1)
    assert diagnose(table, lambda: table(ids).square().sum(), optimizer=optimizer).healthy


def tied(how):
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20, bias=False))
    if how == "data":
        model[1].weight.data = model[0].weight.data
    elif how == "view":
        model[1].weight = nn.Parameter(model[0].weight.detach().view(20, 8))
    elif how == "parameter":
        model[1].weight = model[0].weight
    elif how == "frozen":
        model[1].weight = nn.Parameter(model[0].weight.detach(), requires_grad=False)
    elif how == "neighbours":
        flat = torch.randn(320)
        model[0].weight.data, model[1].weight.data = flat[:160].view(20, 8), flat[160:].view(20, 8)
    ids = torch.arange(20)
    return (
        model,
        lambda: nn.functional.cross_entropy(model(ids), ids.flip(0)),
        torch.optim.AdamW(model.parameters(), 1e-2),
    )


@pytest.mark.parametrize(
    ("how", "faulty"),
    [
        ("data", True),
        ("view", True),
        ("parameter", False),
        ("frozen", False),
        ("neighbours", False),
        ("", False),
    ],
)
def test_parameters_over_one_memory_are_a_fault_and_a_shared_parameter_is_none(how, faulty):
    model, loss, optimizer = tied(how)
    found = found_in(diagnose(model, loss, optimizer=optimizer), "shared-memory")
    assert bool(found) == faulty
    for finding in found:
        assert finding.names == ("0.weight", "1.weight")
        assert "Assign the Parameter itself" in finding.say("remedy", "en")
        assert "1.weight = 0.weight" in finding.say("remedy", "zh")


class Divides(torch.optim.Optimizer):
    """θ ← θ − lr g/n, n the gradient's norm (or its root of mean squares, or each entry's size)."""

    def __init__(self, params, size, guarded=False):
        super().__init__(params, {"lr": 0.1})
        self.size, self.guarded = size, guarded

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(0.1 * p.grad / (self.size(p.grad) + (1e-8 if self.guarded else 0)))


@pytest.mark.parametrize("size", [torch.Tensor.norm, lambda g: g.square().mean().sqrt(), torch.abs])
@pytest.mark.parametrize("guarded", [False, True])
def test_nan_that_a_step_makes_at_a_gradient_of_zero_is_the_steps(size, guarded):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    nn.init.constant_(model[0].bias, -100.0)
    x = torch.randn(6, 4)
    found = diagnose(
        model, lambda: (model(x) - 1).square().mean(), optimizer=Divides(model.parameters(), size, guarded)
    )
    broken = found_in(found, "step-not-finite")
    assert bool(broken) == (not guarded)
    assert not found_in(found, "moved-while-frozen")
    for finding in broken:
        assert (finding.severity, finding.variant) == ("fault", "zero_gradient")
        assert set(finding.names) == {"0.weight", "0.bias", "2.weight"}
        assert "0/0" in finding.say("why", "en")
        assert "decay" not in finding.say("why", "en")


@pytest.mark.parametrize(
    "cls", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam]
)
@pytest.mark.parametrize("eps", [1e-9, 1e-4])
def test_an_eps_that_is_zero_in_float16_is_named(cls, eps):
    model = nn.Linear(8, 3).half()
    optimizer = cls(model.parameters(), lr=1e-3, eps=eps)
    x = torch.randn(4, 8).half()
    found = found_in(
        diagnose(model, lambda: 1e-3 * model(x).float().mean(), optimizer=optimizer), "step-not-finite"
    )
    assert [f.variant for f in found] == (["eps"] if eps < 1e-8 else [])


@pytest.mark.parametrize("order", ["abc", "bac", "bca"])
def test_second_moments_that_belong_to_another_tensor_are_found(order):
    weights = {n: nn.Parameter(0.1 * torch.randn(16, 16)) for n in "abc"}
    scales = {"a": 100.0, "b": 1.0, "c": 0.01}

    def loss():
        return sum(scales[n] * (w @ torch.randn(16, 4)).cos().mean() for n, w in weights.items())

    old = torch.optim.Adam(weights.values(), lr=1e-5)
    for _ in range(30):
        old.zero_grad()
        loss().backward()
        old.step()
    optimizer = torch.optim.Adam([weights[n] for n in order], lr=1e-5)
    optimizer.load_state_dict(old.state_dict())
    torch.manual_seed(3)
    found = found_in(diagnose(weights, loss, optimizer=optimizer), "state-of-another")
    assert [set(f.names) for f in found] == (
        [{n for n, m in zip(order, "abc", strict=True) if n != m}] if order != "abc" else []
    )
    for finding in found:
        assert "order" in finding.say("why", "en")


def test_a_batch_of_larger_gradients_is_no_sign_of_another_tensors_state():
    weights = {n: nn.Parameter(0.1 * torch.randn(16, 16)) for n in "abc"}
    scales = {"a": 100.0, "b": 1.0, "c": 0.01}
    optimizer = torch.optim.Adam(weights.values(), lr=1e-5)

    def loss(size=1.0):
        return size * sum(scales[n] * (w @ torch.randn(16, 4)).cos().mean() for n, w in weights.items())

    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert not found_in(diagnose(weights, lambda: loss(100.0), optimizer=optimizer), "state-of-another")


@pytest.mark.parametrize(
    ("cls", "lr", "decay", "faulty"),
    [
        (torch.optim.AdamW, 1e-3, 500.0, True),
        (torch.optim.AdamW, 1.0, 0.1, True),
        (torch.optim.SGD, 0.1, 5.0, True),
        (torch.optim.AdamW, 1e-3, 0.1, False),
        (torch.optim.SGD, 0.1, 5e-4, False),
        (torch.optim.Adam, 1e-3, 0.1, False),
    ],
)
def test_decay_that_leaves_nothing_is_a_fault(cls, lr, decay, faulty):
    line = Line()
    optimizer = cls(line.parameters(), lr=lr, weight_decay=decay)
    found = [
        f for f in found_in(diagnose(line, line.loss, optimizer=optimizer), "decay") if f.severity == "fault"
    ]
    assert bool(found) == faulty
    for finding in found:
        assert "exchanged" in finding.say("remedy", "en")


def test_rows_that_only_decay_are_said_with_their_share():
    table = nn.Embedding(50, 8)
    ids = torch.arange(10)

    def loss():
        return table(ids).square().mean()

    (finding,) = found_in(
        diagnose(table, loss, optimizer=torch.optim.AdamW(table.parameters(), 1e-2, weight_decay=0.1)),
        "decay",
    )
    assert (finding.severity, finding.variant) == ("explained", "rows")
    assert (finding.values["rows"], finding.values["total"]) == (40, 50)
    assert float(finding.values["share"]) == pytest.approx(1e-3, rel=1e-2)
    assert not found_in(diagnose(table, loss, optimizer=torch.optim.SGD(table.parameters(), 1e-2)), "decay")


def test_rows_that_momentum_still_moves_are_not_counted_as_decaying():
    table = nn.Embedding(50, 8)
    optimizer = torch.optim.AdamW(table.parameters(), 1e-2, weight_decay=0.1)
    table(torch.arange(10, 20)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    found = diagnose(table, lambda: table(torch.arange(10)).square().mean(), optimizer=optimizer)
    (finding,) = found_in(found, "decay")
    assert (finding.values["rows"], finding.values["total"]) == (30, 50)


class Sign(torch.optim.Optimizer):
    """A sign step with decoupled decay, as Lion's."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * p.grad.sign())


@pytest.mark.parametrize(("decay", "faulty"), [(500.0, True), (10.0, False)])
def test_the_decay_of_an_optimizer_of_ones_own_is_tried(decay, faulty):
    line = Line()
    found = diagnose(line, line.loss, optimizer=Sign(line.parameters(), 1e-3, decay))
    assert [f.severity for f in found_in(found, "decay")] == (["fault"] if faulty else [])


class Noisy(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.add_(0.01)


@pytest.mark.parametrize(
    ("make", "steps", "cause", "variant"),
    [
        (
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
            1,
            "moved-while-frozen",
            "zero_gradient_momentum",
        ),
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1), 0, "decay", "tensors"),
        (lambda p: Noisy(p, lr=0.1), 0, "moved-while-frozen", "zero_gradient_unknown"),
    ],
)
def test_what_moves_a_tensor_without_a_gradient_is_measured(make, steps, cause, variant):
    weights = {"a": nn.Parameter(torch.randn(4, 2)), "b": nn.Parameter(torch.randn(2, 1))}
    x = torch.randn(5, 4)

    def loss():
        return (x @ weights["a"] @ weights["b"] - 1).square().mean()

    optimizer = make(weights.values())
    for _ in range(steps):
        loss().backward()
        optimizer.step()
    with torch.no_grad():
        weights["b"].zero_()
    moved = [f for f in diagnose(weights, loss, optimizer=optimizer).findings if f.status == "loop"]
    assert [(f.cause, f.variant, f.names) for f in moved] == [(cause, variant, ("a",))]

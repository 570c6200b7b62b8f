"""A loop is judged by what becomes of its backwards and its weights; and a healthy loop of the same build is
silent.

Gradients that no step used, steps that moved nothing, weights that something else wrote, an optimizer that
steps what is no longer the model's, a step that makes NaN of finite numbers, a decay that erases: each is
found in numbers the watch has anyway. Each comes with constructions that look like it and are meant.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clinometer.messages import LANGUAGES
from clinometer.monitoring.alerts.alerts import render
from clinometer.monitoring.watch import watch


def net(width=16):
    return nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Linear(width, 3))


def batch(rows=32):
    x = torch.randn(rows, 6)
    return x, x[:, :3].argmax(1)


def told(watching):
    watching.close()
    for alert in watching.alerts:
        assert all(len(render(alert, language)) > 20 for language in LANGUAGES)
    return [alert["cause"] for alert in watching.alerts]


def run(model, optimizer, steps=60, *, loss=None, after=lambda step: None, zero=True):
    watching = watch(model, optimizer, to=[])
    for step in range(1, steps + 1):
        x, y = batch()
        (F.cross_entropy(model(x), y) if loss is None else loss(model, x, y)).backward()
        optimizer.step()
        if zero:
            optimizer.zero_grad()
        after(step)
    return watching


# ---- nothing learns from the start ----


@pytest.mark.parametrize(
    ("loss", "severity"),
    [
        (lambda model, x, y: F.cross_entropy(model(x) * 0, y), "fault"),
        (lambda model, x, y: F.cross_entropy(model(x)[:, :1], y * 0) + 1, "fault"),
        (lambda model, x, y: (model(x) * 0).sum(), "warning"),  # rewards that are still all zero
    ],
)
def test_gradients_that_are_all_zero_from_the_start_are_told_within_ten_steps(loss, severity):
    model = net()
    watching = run(model, torch.optim.AdamW(model.parameters(), weight_decay=0), 15, loss=loss)
    assert told(watching) == ["nothing-learns"]
    assert (watching.alerts[0]["step"], watching.alerts[0]["severity"]) == (10, severity)


def test_an_optimizer_whose_tensors_no_backward_reaches_is_told():
    model, other = net(), net()
    watching = watch(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1), to=[])
    for _ in range(15):
        F.cross_entropy(other(batch()[0]), batch()[1]).backward()
        optimizer.step()
    assert told(watching) == ["nothing-learns"]
    assert "No backward() reached one" in render(watching.alerts[0], "en")


def test_a_model_that_is_made_anew_in_the_run_is_told():
    models = [net(), net()]
    optimizer = torch.optim.SGD(models[0].parameters(), lr=0.1)
    watching = watch(models[0], optimizer, to=[])
    for step in range(90):
        F.cross_entropy(models[step > 20](batch()[0]), batch()[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert told(watching) == ["nothing-learns"]
    assert watching.alerts[0]["values"]["since"] == 22


def test_a_gradient_that_comes_late_is_no_alert():
    model = net()
    steps = iter(range(100))
    watching = run(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        60,
        loss=lambda m, x, y: F.cross_entropy(m(x) * (next(steps) > 8), y),
    )
    assert told(watching) == []


# ---- parameters replaced ----


def replaced(how, renew):
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def after(step):
        if step != 20:
            return
        if how == "assign":
            model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        elif how == "head":
            model[2] = nn.Linear(16, 3)
        elif how == "frozen head":
            model[2] = nn.Linear(16, 3).requires_grad_(False)
        elif how == "parameter":
            model[0].weight = nn.Parameter(model[0].weight.detach().clone())
        elif how == "to":
            model.double().float()
        elif how == "parametrized":
            nn.utils.parametrizations.orthogonal(model[0])
        elif how == "frozen":
            model[0].requires_grad_(False)
        if renew:
            optimizer.param_groups.clear()
            optimizer.state.clear()
            optimizer.add_param_group({"params": list(model.parameters())})

    return run(model, optimizer, 80, after=after)


@pytest.mark.parametrize(("how", "count"), [("assign", 4), ("head", 2), ("parameter", 1)])
def test_parameters_that_are_replaced_in_a_run_are_told(how, count):
    watching = replaced(how, False)
    assert told(watching) == ["stale-in-optimizer"]
    (alert,) = watching.alerts
    assert (len(alert["tensors"]), alert["severity"]) == (count, "fault")
    assert alert["values"]["since"] in (20, 21)
    assert alert["step"] <= 40


@pytest.mark.parametrize(
    ("how", "renew"),
    [("assign", True), ("head", True), ("frozen head", False), ("to", False), ("frozen", False), ("", False)],
)
def test_a_model_whose_parameters_the_optimizer_has_is_silent(how, renew):
    assert told(replaced(how, renew)) == []


# ---- a gradient that arrives at no step ----


class Centres(nn.Module):
    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 3))

    def forward(self, features, y):
        return (features - self.centres[y]).square().sum(1).mean()


@pytest.mark.parametrize(
    ("how", "causes"),
    [
        ("forgotten", ["not-in-optimizer"]),
        ("eval", ["not-in-optimizer"]),
        ("optimizer", []),
        ("another optimizer", []),
        ("frozen", []),
        ("by hand", []),
        ("input", []),
    ],
)
def test_parameters_of_a_criterion_that_nothing_moves_are_told(how, causes):
    model, criterion = net(), Centres()
    if how == "eval":
        criterion.eval()
    if how == "frozen":
        criterion.requires_grad_(False)
    held = [*model.parameters(), *(criterion.parameters() if how == "optimizer" else ())]
    optimizer = torch.optim.SGD(held, lr=0.05)
    other = torch.optim.SGD(criterion.parameters(), lr=0.5) if how == "another optimizer" else None
    points = torch.randn(32, 6, requires_grad=how == "input")  # collocation points of a physical loss
    watching = watch(model, optimizer, to=[])
    for _ in range(8):
        x, y = batch()
        loss = model(points).square().mean() if how == "input" else criterion(model(x), y)
        loss.backward()
        optimizer.step()
        if other is not None:
            other.step()
        if how == "by hand":
            with torch.no_grad():
                criterion.centres -= 0.1 * criterion.centres.grad
    assert told(watching) == causes
    if causes:
        assert watching.alerts[0]["severity"] == ("explained" if how == "eval" else "warning")
        assert "Centres.centres" in render(watching.alerts[0], "en")


# ---- backwards that no step used ----


def micro_batches(inside, steps=30, parts=4):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watching = watch(model, optimizer, to=[])
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=inside != "zeros")
        for _ in range(parts):
            if inside:
                optimizer.zero_grad(set_to_none=inside != "zeros")
            x, y = batch()
            (F.cross_entropy(model(x), y) / parts).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return watching


@pytest.mark.parametrize("inside", ["none", "zeros"])
def test_zero_grad_among_the_micro_batches_is_told_with_its_counts(inside):
    watching = micro_batches(inside)
    assert told(watching) == ["discarded"]
    assert watching.alerts[0]["step"] <= 12
    assert "3 of 4 backwards" in render(watching.alerts[0], "en")


def accumulation(watching, model, optimizer):
    for _ in range(4):
        x, y = batch()
        F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def adversarial_input(watching, model, optimizer):
    """The inner backward asks for the gradient of the input; what it leaves at the weights is cleared."""
    x, y = batch()
    delta = torch.zeros_like(x, requires_grad=True)
    for _ in range(2):
        F.cross_entropy(model(x + delta), y).backward()
        delta.data += 0.01 * delta.grad.sign()
        delta.grad = None
    optimizer.zero_grad()
    F.cross_entropy(model(x + delta.detach()), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def several_tasks(watching, model, optimizer):
    """One gradient is made of those of several tasks (PCGrad)."""
    kept = []
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        kept.append([p.grad.clone() for p in model.parameters()])
    for p, *grads in zip(model.parameters(), *kept, strict=True):
        p.grad = sum(grads)
    optimizer.step()
    optimizer.zero_grad()


def sharpness_aware(watching, model, optimizer):
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    old = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.data.add_(1e-2 * p.grad)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        for p, before in zip(model.parameters(), old, strict=True):
            p.copy_(before)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("step", [accumulation, adversarial_input, several_tasks, sharpness_aware])
def test_backwards_that_serve_another_end_are_not_called_discarded(step):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watching = watch(model, optimizer, to=[])
    for _ in range(40):
        step(watching, model, optimizer)
    assert told(watching) == []


@pytest.mark.parametrize("watched", ["both", "generator"])
def test_a_gan_whose_critic_reaches_the_generator_is_silent(watched):
    generator, critic = net(), nn.Sequential(nn.Linear(3, 16), nn.GELU(), nn.Linear(16, 1))
    g, d = torch.optim.Adam(generator.parameters(), 1e-3), torch.optim.Adam(critic.parameters(), 1e-3)
    both = nn.ModuleDict({"generator": generator, "critic": critic})
    watching = watch(both, [d, g], to=[]) if watched == "both" else watch(generator, g, to=[])
    for _ in range(60):
        d.zero_grad()
        (
            F.softplus(critic(generator(batch()[0]))).mean() + F.softplus(-critic(torch.randn(32, 3))).mean()
        ).backward()
        d.step()
        g.zero_grad()
        F.softplus(-critic(generator(batch()[0]))).mean().backward()
        g.step()
    assert told(watching) == []


# ---- steps that never come ----


@pytest.mark.parametrize(("backwards", "causes"), [(5, ["no-step"]), (1005, ["no-step"]), (1, [])])
def test_backwards_without_any_step_are_told(backwards, causes):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watching = watch(model, optimizer, to=[])
    for _ in range(backwards):
        model.zero_grad()
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    if backwards > 100:
        assert [alert["cause"] for alert in watching.alerts] == causes  # while it runs
    assert told(watching) == causes


def test_a_pass_over_the_data_before_the_first_step_is_no_alert():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watching = watch(model, optimizer, to=[])
    for _ in range(150):  # Fisher information, sample by sample
        model.zero_grad()
        F.cross_entropy(model(batch(1)[0]), batch(1)[1]).backward()
    for _ in range(20):
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert told(watching) == []


class SharpnessAware(torch.optim.SGD):
    """Tries other weights inside its step, by a closure that runs twice."""

    @torch.no_grad()
    def step(self, closure):
        params = self.param_groups[0]["params"]
        with torch.enable_grad():
            closure()
        old = [p.clone() for p in params]
        for p in params:
            p.add_(0.05 * p.grad)
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for p, before in zip(params, old, strict=True):
            p.copy_(before)
        super().step()


def test_weights_that_a_step_tries_are_not_written_between_steps():
    model = net()
    optimizer = SharpnessAware(model.parameters(), lr=0.1)
    watching = watch(model, optimizer, to=[])
    for _ in range(60):
        x, y = batch()
        optimizer.zero_grad()

        def closure(x=x, y=y):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert told(watching) == []


def test_a_scaler_that_skips_for_ever_is_named():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    watching = watch(model, optimizer, to=[])
    for _ in range(30):
        scaler.scale(F.cross_entropy(model(batch()[0]), batch()[1]) * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert "non-finite" in told(watching)
    assert "GradScaler has skipped 20 steps in a row" in render(watching.alerts[0], "en")


def test_steps_that_are_always_skipped_are_told():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watching = watch(model, optimizer, to=[])
    for _ in range(30):
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        watching.skip()
        optimizer.zero_grad()
    assert told(watching) == ["no-step"]


# ---- a rate that has fallen ----


def scheduled(rate, steps):
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    return run(model, optimizer, steps, after=lambda step: schedule.step())


@pytest.mark.parametrize(
    "rate", [lambda step: 0.5**step, lambda step: 0.3**step, lambda step: 0.1 ** (step // 3)]
)
def test_a_rate_too_small_to_change_any_weight_is_told_with_its_step(rate):
    watching = scheduled(rate, 150)
    assert told(watching) == ["never-moves"]
    assert watching.alerts[0]["severity"] == "fault"
    assert watching.alerts[0]["values"]["since"] < 50
    assert "the schedule" in render(watching.alerts[0], "en")


@pytest.mark.parametrize(
    "rate",
    [
        lambda step: 0.5 ** (step // 100),
        lambda step: max(0.0, 1 - step / 150),
        lambda step: (1 + torch.cos(torch.tensor(step * 3.14159 / 150)).item()) / 2,
        lambda step: min(step / 40, 1.0),
    ],
)
def test_a_schedule_that_ends_with_the_run_is_silent(rate):
    assert told(scheduled(rate, 150)) == []


# ---- weights written between the steps ----


def written(kind, steps=60):
    model = net()
    average = copy.deepcopy(model).requires_grad_(False)
    first = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    @torch.no_grad()
    def after(step):
        for live, slow in zip(model.parameters(), average.parameters(), strict=True):
            if kind == "average over live":
                live.copy_(0.005 * live + 0.995 * slow)
            elif kind == "average over live, .data":
                live.data.mul_(0.005).add_(0.995 * slow)
            elif kind == "clipped":
                live.clamp_(-0.5, 0.5)
            elif kind == "clipped hard":
                live.clamp_(-0.01, 0.01)
            elif kind == "normalised" and live.dim() > 1:
                live.div_(live.norm(dim=1, keepdim=True))
            elif kind == "spectral" and live.dim() > 1:
                live.div_(max(1.0, torch.linalg.matrix_norm(live, 2).item()))
            elif kind == "decayed by hand":
                live.mul_(1 - 1e-4)
            elif kind == "swapped in and out":
                kept = live.clone()
                live.copy_(slow)
                live.copy_(kept)
            elif kind == "lookahead" and step % 5 == 0:
                slow.lerp_(live, 0.5)
                live.copy_(slow)
            slow.lerp_(live, 0.005)
        if kind == "loaded each time":
            model.load_state_dict(first)

    return run(model, optimizer, steps, after=after)


@pytest.mark.parametrize("kind", ["average over live", "average over live, .data", "loaded each time"])
def test_steps_that_something_else_undoes_are_told(kind):
    watching = written(kind)
    assert told(watching) == ["written-between"]
    (alert,) = watching.alerts
    assert (alert["severity"], alert["step"]) == ("fault", 21)
    assert "outside the optimizer" in render(alert, "en")


@pytest.mark.parametrize(
    "kind",
    [
        "clipped",
        "clipped hard",
        "normalised",
        "spectral",
        "decayed by hand",
        "swapped in and out",
        "lookahead",
        "average",
    ],
)
def test_weights_that_are_written_on_purpose_are_no_fault(kind):
    assert told(written(kind)) == []


class Masked(torch.optim.AdamW):
    """Its step calls torch's and then writes: one step, not a write between two."""

    @torch.no_grad()
    def step(self, closure=None):
        before = [p.clone() for p in self.param_groups[0]["params"]]
        super().step(closure)
        for p, old in zip(self.param_groups[0]["params"], before, strict=True):
            p.lerp_(old, 0.8)


def test_a_step_inside_a_step_is_one_step():
    model = net()
    watching = run(model, Masked(model.parameters(), lr=1e-2))
    assert watching.step == 60
    assert told(watching) == []


# ---- what the step itself does ----


@pytest.mark.parametrize(("eps", "causes"), [(1e-8, ["step-not-finite", "non-finite"]), (1e-4, [])])
def test_an_eps_that_is_zero_in_float16_is_told(eps, causes):
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3)).half()
    optimizer = torch.optim.Adam(model.parameters(), eps=eps)
    watching = watch(model, optimizer, to=[])
    for _ in range(6):
        F.cross_entropy(model(torch.tensor([1, 2, 3])).float(), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert told(watching) == causes
    if causes:
        assert watching.alerts[0]["step"] == 1
        assert "ε = 1e-08 is 0 in float16" in render(watching.alerts[0], "en")


def test_a_batch_of_nan_is_not_the_steps():
    model = net()
    steps = iter(range(100))

    def loss(m, x, y):
        return F.cross_entropy(m(x), y) * (float("nan") if next(steps) == 5 else 1)

    watching = run(model, torch.optim.SGD(model.parameters(), lr=0.1), 9, loss=loss)
    assert "step-not-finite" not in told(watching)


@pytest.mark.parametrize(
    ("make", "causes"),
    [
        (lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=500.0), ["decay"]),
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=4.0), ["decay"]),
        (lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1), []),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4), []),
    ],
)
def test_a_decay_that_erases_is_told(make, causes):
    model = net()
    assert told(run(model, make(model.parameters()))) == causes


@pytest.mark.parametrize(
    ("how", "causes"), [("data", ["shared-memory"]), ("parameter", []), ("later", ["shared-memory"])]
)
def test_parameters_over_one_memory_are_told(how, causes):
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20, bias=False))
    if how == "data":
        model[1].weight.data = model[0].weight.data
    if how == "parameter":
        model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    watching = watch(model, optimizer, to=[])
    for step in range(20):
        if how == "later" and step == 5:
            model[1].weight.data = model[0].weight.data
        F.cross_entropy(model(torch.arange(20)), torch.arange(20)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert told(watching) == causes


@pytest.mark.parametrize("cls", ["LBFGS", "SparseAdam", "Muon", "Adafactor", "Rprop", "ASGD"])
def test_the_rest_of_torch_is_watched_without_a_false_word(cls):
    model = nn.Sequential(nn.Linear(6, 16, bias=False), nn.GELU(), nn.Linear(16, 3, bias=False))
    if cls == "SparseAdam":
        model = nn.Sequential(nn.EmbeddingBag(50, 3, sparse=True))
    optimizer = getattr(torch.optim, cls)(model.parameters(), lr=1e-2)
    x, y = batch(64)
    x = torch.randint(50, (64, 4)) if cls == "SparseAdam" else x

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    watching = watch(model, optimizer, to=[])
    for _ in range(40):
        optimizer.step(closure)
    assert told(watching) == []


# ---- what a watch says before it has seen enough ----


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (0, "No step was seen yet"),
        (48, "not enough steps yet for every rule (48 of 50)"),
        (50, "✓ No alert."),
    ],
)
def test_no_mark_before_every_rule_could_have_failed(steps, text):
    model = net()
    watching = run(model, torch.optim.SGD(model.parameters(), lr=0.1), steps)
    watching.close()
    assert text in " ".join(str(watching).split())
    assert ("✓" in str(watching)) == (steps == 50)


def test_an_optimizer_that_steps_inside_another_is_no_missing_step():
    """SAM as it is recommended: first_step and second_step; its base optimizer moves the weights."""
    model = net()
    outer = torch.optim.SGD(model.parameters(), lr=0.1)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    watching = watch(model, outer, to=[])
    for _ in range(30):
        model.zero_grad()
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        base.step()
    assert "no-step" not in told(watching)

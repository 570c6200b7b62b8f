"""Each fault of the catalogue, planted, is found within a stated number of steps, and nothing else is."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clinometer.messages import LANGUAGES
from clinometer.monitoring.alerts.alerts import render
from clinometer.monitoring.watch import watch
from tests.monitoring.sink import Kept


def mlp(width=32):
    return nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 3))


def data():
    return torch.randn(8, 16), torch.randint(3, (8,))


def loop(net, optimizer, sink, steps, *, loss=None, before=lambda step: None, clip=None, zero=True):
    with watch(net, optimizer, to=sink) as watching:
        for step in range(1, steps + 1):
            before(step)
            x, y = data()
            watching.batch({"step": step})
            (F.cross_entropy(net(x), y) if loss is None else loss(net, x, y, step)).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            if zero:
                optimizer.zero_grad()


def sgd(net, lr=0.1, **more):
    return torch.optim.SGD(net.parameters(), lr=lr, **more)


def non_finite(sink):
    net = mlp()

    def loss(net, x, y, step):
        return F.cross_entropy(net(x), y) * (float("inf") if step == 30 else 1.0)

    loop(net, sgd(net), sink, 30, loss=loss)


def exploding_at_once(sink):
    net = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 1))
    loop(net, sgd(net, 3.0), sink, 12, loss=lambda n, x, y, s: (n(x) - 1).square().mean())


def exploding_later(sink):
    net = nn.Linear(16, 1)
    optimizer = sgd(net, 0.02)

    def before(step):
        if step == 100:
            optimizer.param_groups[0]["lr"] = 0.9

    loop(net, optimizer, sink, 125, before=before, loss=lambda n, x, y, s: (n(x) - x[:, :1]).square().mean())


def vanishing(sink):
    net = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(16, 16), nn.Sigmoid())])
    loop(net, sgd(net), sink, 35, loss=lambda n, x, y, s: F.cross_entropy(n(x)[:, :3], y))


def dead(sink):
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
    nn.init.constant_(net[0].bias, -100.0)
    loop(net, sgd(net), sink, 60)


def no_gradient(sink):
    net = mlp()
    loop(net, sgd(net), sink, 60, loss=lambda n, x, y, s: F.cross_entropy(n[2](n[1](n[0](x)).detach()), y))


def zeroed_before_the_step(sink):
    net = mlp()
    optimizer = sgd(net)
    with watch(net, optimizer, to=sink):
        for _ in range(55):
            for _ in range(2):  # accumulated: watch asks for the first part's norm, too
                x, y = data()
                F.cross_entropy(net(x), y).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.zero_grad()
            optimizer.step()


def every_target_ignored(sink):
    net = mlp()

    def loss(net, x, y, step):
        return F.cross_entropy(net(x), y if step <= 5 else torch.full_like(y, -100))

    loop(net, sgd(net), sink, 12, loss=loss)


def always_clipped(sink):
    net = mlp()
    loop(net, sgd(net), sink, 105, clip=0.01)


def loss_spike(sink):
    net = mlp()
    loop(
        net, sgd(net, 0.01), sink, 80,
        loss=lambda n, x, y, s: F.cross_entropy(n(x), y) * (10 if s == 75 else 1),
    )  # fmt: skip


def steps_too_large(sink):
    net = mlp()
    loop(net, torch.optim.AdamW(net.parameters(), lr=3.0), sink, 40)


def steps_too_small(sink):
    net = mlp()
    loop(net, torch.optim.AdamW(net.parameters(), lr=3e-8, weight_decay=0), sink, 210)


def moved_while_frozen(sink):
    net = mlp()
    optimizer = sgd(net, momentum=0.9)

    def before(step):
        if step == 20:
            net(data()[0]).sum().backward()
            net[0].requires_grad_(False)

    def loss(net, x, y, step):
        return F.cross_entropy(net(x), y)

    with watch(net, optimizer, to=sink):
        for step in range(1, 30):
            before(step)
            loss(net, *data(), step).backward()
            optimizer.step()
            net[2].zero_grad()
            if step < 20:
                net.zero_grad()


def never_moves(sink):
    net = mlp().bfloat16()
    for p in net.parameters():
        nn.init.ones_(p)
    loop(
        net, sgd(net, 1e-5), sink, 25,
        loss=lambda n, x, y, s: F.cross_entropy(n(x.bfloat16()).float() * torch.tensor([1.0, 2.0, 3.0]), y),
    )  # fmt: skip


def not_in_optimizer(sink):
    net = mlp()
    loop(
        net,
        torch.optim.SGD(net[2].parameters(), lr=0.1),
        sink,
        25,
        zero=False,
        before=lambda s: net.zero_grad(),
    )


def accumulating(sink):
    net = mlp()
    loop(net, sgd(net, 1e-4), sink, 15, zero=False)


def unscaled_amp(sink):
    net = mlp()
    optimizer = sgd(net)
    scaler = torch.amp.GradScaler("cpu")
    with watch(net, optimizer, to=sink):
        for _ in range(6):
            x, y = data()
            scaler.scale(F.cross_entropy(net(x), y)).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()


def zero_lr(sink):
    net = mlp()
    loop(net, sgd(net, 0.0), sink, 25)


PLANTED = {
    # cause: (the run, the first step that shows it, found by this step at the latest)
    non_finite: ("non-finite", 30),
    exploding_at_once: ("exploding", 12),
    exploding_later: ("exploding", 120),
    vanishing: ("vanishing", 30),
    dead: ("dead", 50),
    no_gradient: ("no-gradient", 50),
    zeroed_before_the_step: ("nothing-learns", 10),
    every_target_ignored: ("non-finite", 8),
    always_clipped: ("always-clipped", 100),
    loss_spike: ("loss-spike", 75),
    steps_too_large: ("update-ratio", 40),
    steps_too_small: ("update-ratio", 202),
    moved_while_frozen: ("moved-while-frozen", 24),
    never_moves: ("never-moves", 20),
    not_in_optimizer: ("not-in-optimizer", 20),
    accumulating: ("accumulating", 12),
    unscaled_amp: ("unscaled-amp", 3),
    zero_lr: ("zero-lr", 20),
}
BESIDES = {"exploding": {"loss-spike", "non-finite", "update-ratio"}, "vanishing": {"never-moves"}}
"""What a fault brings with it."""


@pytest.mark.parametrize("run", PLANTED, ids=lambda run: run.__name__)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_planted_fault_is_found(run):
    cause, latest = PLANTED[run]
    torch.manual_seed(2)
    sink = Kept()
    run(sink)
    told = [alert for alert in sink.told if alert["cause"] == cause]
    assert told, [render(alert) for alert in sink.told]
    assert told[0]["step"] <= latest
    assert set(sink.causes) - {cause} <= BESIDES.get(cause, set())
    assert len({alert["id"] for alert in told}) == 1
    for language in LANGUAGES:
        assert len(render(told[-1], language)) > 20


def test_the_tensors_named_are_those_concerned():
    expected = {
        dead: {"0.weight", "0.bias", "2.weight"},
        no_gradient: {"0.weight", "0.bias"},
        not_in_optimizer: {"0.weight", "0.bias"},
        moved_while_frozen: {"0.weight", "0.bias"},
    }
    for run, names in expected.items():
        sink = Kept()
        run(sink)
        assert set(sink.told[-1]["tensors"]) == names, run.__name__


def test_an_alert_grows_and_closes_under_one_id():
    net = mlp()

    def loss(net, x, y, step):
        first = net[2](torch.tanh(net[0](x).detach()) if step == 5 else torch.tanh(net[0](x)))
        return F.cross_entropy(first, y) * (float("nan") if step in (5, 6) else 1.0)

    sink = Kept()
    before = [p.detach().clone() for p in net.parameters()]

    def restore(step):
        with torch.no_grad():
            for p, old in zip(net.parameters(), before, strict=True):
                p.copy_(old)

    loop(net, sgd(net), sink, 30, loss=loss, before=restore)
    # The weights that are put back before each step are told as well, and rightly.
    told = [alert for alert in sink.told if alert["cause"] == "non-finite"]
    assert [(a["id"], a["step"], a["until"], len(a["tensors"])) for a in told] == [
        (0, 5, None, 2),
        (0, 5, None, 4),
        (0, 5, 6, 4),
    ]


def test_an_alert_keeps_the_batch_and_reaches_the_callback():
    heard = []
    net = mlp()
    optimizer = sgd(net, 0.01)
    with watch(net, optimizer, to=Kept()) as watching:
        watching.on_alert = heard.append
        for step in range(1, 70):
            x, y = data()
            watching.batch({"windows": [step]})
            loss = F.cross_entropy(net(x), y) * (50 if step == 60 else 1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert heard[0]["cause"] == "loss-spike"
    assert heard[0]["values"]["batch"] == {"windows": [60]}
    assert watching.alerts[0]["id"] == heard[0]["id"]


def test_a_callback_that_raises_is_told_so_and_the_watching_goes_on():
    net, sink = mlp(), Kept()
    optimizer = sgd(net, 0.01)

    def train():
        for step in range(1, 70):
            x, y = data()
            (F.cross_entropy(net(x), y) * (50 if step == 60 else 1)).backward()
            optimizer.step()
            optimizer.zero_grad()

    with watch(net, optimizer, to=sink) as watching:
        watching.on_alert = lambda alert: alert["no such key"]
        with pytest.warns(RuntimeWarning, match=r"on_alert failed .*KeyError: 'no such key'"):
            train()
        assert watching.on_alert is None
    assert sink.told[0]["cause"] == "loss-spike"
    assert (sink.state, len(sink.rows)) == ("done", 69)


def test_a_gradient_that_is_not_finite_is_diagnosed_with_the_closure():
    net = mlp()
    optimizer = sgd(net, 0.01)
    sink = Kept()
    with watch(net, optimizer, to=sink) as watching:
        for step in range(1, 6):
            x, y = data()
            bad = step == 4

            def closure(x=x, y=y, bad=bad):
                logits = net(x)
                return F.cross_entropy(logits, y) + ((logits * 0).sqrt().sum() if bad else 0)

            watching.closure = closure
            closure().backward()
            optimizer.step()
            optimizer.zero_grad()
    reports = [(step, data) for step, kind, data in sink.events if kind == "report"]
    assert len(reports) == 1
    assert reports[0][0] == 3  # the last whole step, when it was asked
    assert "sqrt" in reports[0][1]["text"]["en"]
    assert [a["step"] for a in sink.told if a["cause"] == "non-finite"][:1] == [4]

"""What a watch writes down is what happened."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clinometer.gradients.diagnose.diagnose import diagnose
from clinometer.messages import InputError
from clinometer.monitoring.watch import Sink, watch
from clinometer.optim.clipping import clip_grad_norm_
from clinometer.vocabulary import STATISTICS
from tests.monitoring.sink import Kept


def net_and_optimizer(lr=1e-2):
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    return net, torch.optim.AdamW(net.parameters(), lr=lr)


def batch():
    return torch.randn(5, 6), torch.randint(3, (5,))


def norms(net):
    return {n: float(p.grad.double().norm()) for n, p in net.named_parameters()}


def test_every_statistic_of_every_tensor_is_the_plain_one():
    net, optimizer = net_and_optimizer()
    sink, expected = Kept(), []
    with watch(net, optimizer, to=sink):
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(net(batch()[0]), torch.randint(3, (5,))).backward()
            row = {}
            for name, p in net.named_parameters():
                g = p.grad.double()
                m = optimizer.state[p]["exp_avg"].double() if p in optimizer.state else None
                row[name] = [
                    float(g.norm()), float(g.abs().max()), float((g == 0).double().mean()), 0,
                    p.detach().double(),
                    math.nan if m is None else float((g * m).sum() / g.norm() / m.norm()),
                    math.nan if m is None else float(m.norm()),
                ]  # fmt: skip
            optimizer.step()
            for name, p in net.named_parameters():
                before = row[name].pop(4)
                row[name][4:4] = [float(p.double().norm()), float((p.double() - before).norm())]
            expected.append(row)
    for (_, _, _, statistics), row in zip(sink.rows, expected, strict=True):
        for tensor in sink.listed:
            np.testing.assert_allclose(
                statistics[tensor["id"]], row[tensor["name"]], rtol=1e-5, atol=1e-7, equal_nan=True
            )


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, clip_grad_norm_], ids=["torch", "clinometer"])
def test_gradients_are_those_before_clipping(clip):
    net, optimizer = net_and_optimizer()
    sink, expected = Kept(), []
    with watch(net, optimizer, to=sink) as watching:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(net(batch()[0]), torch.randint(3, (5,))).backward()
            expected.append(norms(net))
            total = clip(net.parameters(), 0.1)
            watching.clipped(total, 0.1)  # told as well as seen counts once
            optimizer.step()
    for name, values in zip(expected[0], zip(*(e.values() for e in expected), strict=True), strict=True):
        assert sink.of(name, "grad_norm") == pytest.approx(list(values), rel=1e-5)
    totals = [math.sqrt(sum(v * v for v in e.values())) for e in expected]
    assert sink.scalar("total_norm") == pytest.approx(totals, rel=1e-5)
    assert sink.scalar("clip") == pytest.approx([0.1 / (t + 1e-6) for t in totals], rel=1e-5)
    assert sink.scalar("max_norm") == [0.1] * 3
    assert sink.scalar("before_clipping") == [1] * 3


def test_a_clipping_that_only_the_loop_knows_can_be_told():
    net, optimizer = net_and_optimizer()
    sink = Kept()
    with watch(net, optimizer, to=sink) as watching:
        F.cross_entropy(net(batch()[0]), torch.randint(3, (5,))).backward()
        before = norms(net)
        total = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
        for p in net.parameters():
            p.grad.mul_(0.01 / (total + 1e-6))
        watching.clipped(total, 0.01)
        optimizer.step()
    assert sink.of("0.weight", "grad_norm") == pytest.approx([before["0.weight"]], rel=1e-5)


def test_gradients_are_those_before_clipping_by_value():
    net, optimizer = net_and_optimizer()
    sink = Kept()
    with watch(net, optimizer, to=sink):
        F.cross_entropy(net(batch()[0]), torch.randint(3, (5,))).backward()
        before = norms(net)
        nn.utils.clip_grad_value_(net.parameters(), 1e-4)
        optimizer.step()
    assert sink.of("2.weight", "grad_norm") == pytest.approx([before["2.weight"]], rel=1e-5)
    assert sink.scalar("before_clipping") == [1]


def test_without_clipping_nothing_is_said_of_it():
    net, optimizer = net_and_optimizer()
    sink = Kept()
    with watch(net, optimizer, to=sink):
        F.cross_entropy(net(batch()[0]), torch.randint(3, (5,))).backward()
        optimizer.step()
    assert not {"clip", "before_clipping", "max_norm"} & set(sink.rows[0][2])


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_loss_scaler_numbers_are_the_unscaled_ones_and_skipped_steps_are_marked(fused):
    net, _ = net_and_optimizer()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    sink, losses, expected = Kept(), [], []
    with watch(net, optimizer, to=sink):
        for step in range(4):
            x, y = batch()
            loss = F.cross_entropy(net(x), y)
            losses.append(float(loss.detach()))
            scaler.scale(loss).backward()
            expected.append(norms(net)["0.weight"] / scaler.get_scale())
            if step == 2:
                net[0].weight.grad[0, 0] = math.inf
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert sink.scalar("loss") == pytest.approx(losses)
    assert sink.scalar("taken") == [1, 1, 0, 1]
    found = sink.of("0.weight", "grad_norm")
    assert found[2] == math.inf
    assert [found[i] for i in (0, 1, 3)] == pytest.approx([expected[i] for i in (0, 1, 3)], rel=1e-5)
    assert sink.of("0.weight", "update_norm")[2] == 0
    assert sink.of("0.weight", "grad_nonfinite") == [0, 0, 1, 0]
    assert sink.scalar("grad_scale")[:2] == [1024, 1024]


def test_a_step_the_loop_skips_is_written_down():
    net, optimizer = net_and_optimizer()
    sink = Kept()
    with watch(net, optimizer, to=sink) as watching:
        for step in range(3):
            (net(batch()[0]).sum() * (math.nan if step == 1 else 1)).backward()
            if step == 1:
                watching.skip()
            else:
                optimizer.step()
            optimizer.zero_grad()
    assert [row[0] for row in sink.rows] == [1, 2, 3]
    assert sink.scalar("taken") == [1, 0, 1]
    assert sink.of("0.weight", "update_norm")[1] == 0


def test_micro_batches_add_up_to_one_loss_and_give_a_noise_scale():
    net, optimizer = net_and_optimizer(1e-4)
    sink, losses = Kept(), []
    with watch(net, optimizer, to=sink) as watching:
        for _ in range(100):
            total = 0.0
            for _ in range(4):
                x, y = batch()
                loss = F.cross_entropy(net(x), y) / 4
                loss.backward()
                total += float(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            watching.log(tokens=20)
            losses.append(total)
    assert sink.scalar("loss") == pytest.approx(losses)
    assert sink.scalar("tokens") == [20] * 100
    noise = [value for value in sink.scalar("noise_scale") if value is not None]
    assert noise
    assert all(value > 0 for value in noise)


def test_the_noise_scale_is_that_of_a_known_gradient_distribution():
    from clinometer.monitoring.measure.noise_scale import NoiseScale

    generator = torch.Generator().manual_seed(0)
    true, size, parts = 0.3, 1000, 8
    noise = NoiseScale()
    for _ in range(400):
        pieces = (true + torch.randn(parts, size, generator=generator)) / parts
        noise.add(float(pieces[0].square().sum()), float(pieces.sum(0).square().sum()), parts)
    # tr Σ / |G|² = 1000 / (1000 · 0.09)
    assert noise.value() == pytest.approx(1 / 0.09, rel=0.1)


def test_what_is_logged_belongs_to_its_step_before_and_after():
    for early in (True, False):
        net, optimizer = net_and_optimizer()
        sink = Kept()
        with watch(net, optimizer, to=sink) as watching:
            for step in range(1, 5):
                x, y = batch()
                loss = F.cross_entropy(net(x), y)
                if early:
                    watching.log(number=step, loss=torch.tensor(float(step)))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if not early:
                    watching.log(number=step, loss=step)
        assert sink.scalar("number") == [1, 2, 3, 4]
        assert sink.scalar("loss") == [1, 2, 3, 4]


def test_weights_moved_by_others_are_no_update():
    net, optimizer = net_and_optimizer()
    sink = Kept()
    with watch(net, optimizer, to=sink):
        for _ in range(3):
            net(batch()[0]).sum().backward()
            before = net[0].weight.detach().clone()
            optimizer.step()
            moved = float((net[0].weight.detach() - before).norm())
            with torch.no_grad():
                net[0].weight.add_(100.0)
            optimizer.zero_grad()
    assert sink.of("0.weight", "update_norm")[-1] == pytest.approx(moved, rel=1e-4)


def test_tensors_are_described_in_the_order_of_their_first_use():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.layers = nn.ModuleList([nn.ModuleDict({"ffn": nn.Linear(4, 4)}) for _ in range(2)])

        def forward(self, x):
            for layer in reversed(self.layers):
                x = layer["ffn"](x)
            return self.head(x)

    net = Backwards()
    optimizer = torch.optim.SGD(
        [{"params": net.layers.parameters()}, {"params": net.head.parameters(), "lr": 0.5}], lr=0.1
    )
    sink = Kept()
    with watch(net, optimizer, to=sink):
        net(torch.randn(3, 4)).sum().backward()
        optimizer.step()
    order = [t["name"] for t in sorted(sink.listed, key=lambda t: t["position"])]
    assert [name.removesuffix(".weight").removesuffix(".bias") for name in order[::2]] == [
        "layers.1.ffn",
        "layers.0.ffn",
        "head",
    ]
    by_name = {t["name"]: t for t in sink.listed}
    assert by_name["layers.1.ffn.weight"] | {"position": 0, "id": 0} == {
        "id": 0, "name": "layers.1.ffn.weight", "shape": [4, 4], "dtype": "float32", "numel": 16,
        "group": 0, "layer": 1, "kind": "ffn", "position": 0,
    }  # fmt: skip
    assert by_name["layers.0.ffn.bias"]["kind"] == "ffn.bias"
    assert by_name["head.weight"]["layer"] is None
    assert by_name["head.weight"]["group"] == 1
    assert (sink.scalar("lr"), sink.scalar("lr.1")) == ([0.1], [0.5])
    assert sink.run["statistics"] == list(STATISTICS)


def test_a_pinned_weight_is_written_down_to_the_bit():
    net, optimizer = net_and_optimizer()
    sink, expected = Kept(), []
    with watch(net, optimizer, to=sink) as watching:
        watching.pin("0.weight", (2, 3))
        for _ in range(3):
            optimizer.zero_grad()
            net(batch()[0]).square().sum().backward()
            p = net[0].weight
            row = {"before": p[2, 3].item(), "grad": p.grad[2, 3].item()}
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            state = optimizer.state[p]
            row |= {"after": p[2, 3].item(), "exp_avg_after": state["exp_avg"][2, 3].item()}
            expected.append(row)
    for (step, [found]), row in zip(sink.pinned, expected, strict=True):
        assert {key: found[key] for key in row} == row, step
        assert found["clip"] < 1
    assert sink.pinned[1][1][0]["exp_avg_before"] == expected[0]["exp_avg_after"]


def test_every_second_step_is_measured_and_all_are_counted():
    net, optimizer = net_and_optimizer()
    sink = Kept()
    with watch(net, optimizer, to=sink, every=2) as watching:
        for _ in range(5):
            net(batch()[0]).sum().backward()
            before = net[0].weight.detach().clone()
            optimizer.step()
            moved = float((net[0].weight.detach() - before).norm())
            optimizer.zero_grad()
        assert watching.step == 5
    assert [row[0] for row in sink.rows] == [1, 3, 5]
    assert sink.of("0.weight", "update_norm")[-1] == pytest.approx(moved, rel=1e-4)


def test_histograms_come_every_sixteen_steps_and_count_every_entry():
    net, optimizer = net_and_optimizer()
    sink = Kept()
    with watch(net, optimizer, to=sink):
        for _ in range(34):
            net(batch()[0]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [step for step, _ in sink.counts] == [1, 17, 33]
    for _, counts in sink.counts:
        assert counts.dtype == np.int64
        assert counts.sum(-1).tolist() == [[t["numel"]] * 3 for t in sink.listed]


def test_steps_go_on_from_where_a_run_was():
    net, optimizer = net_and_optimizer()
    sink = Kept()
    with watch(net, optimizer, to=sink) as watching:
        watching.step = 100
        net(batch()[0]).sum().backward()
        optimizer.step()
    assert [row[0] for row in sink.rows] == [101]


def test_events_and_reports_reach_the_sinks():
    net, optimizer = net_and_optimizer()
    sink = Kept()
    assert isinstance(sink, Sink)
    with watch(net, optimizer, to=sink) as watching:
        watching.event("validation", loss=1.5, best=True)
        watching.report(diagnose(net, lambda: net(batch()[0]).sum()))
    assert sink.events[0][1:] == ("validation", {"loss": 1.5, "best": True})
    assert set(sink.events[1][2]) == {"kind", "title", "document", "text"}
    assert set(sink.events[1][2]["text"]) == {"en", "zh"}


def test_bad_input_is_refused_with_the_value():
    net, optimizer = net_and_optimizer()
    for wrong in (
        lambda: watch(net, net, to=Kept()),
        lambda: watch(net, [], to=Kept()),
        lambda: watch(net, optimizer, to="run"),
        lambda: watch(net, optimizer, to=Kept(), every=0),
        lambda: watch(3, optimizer, to=Kept()),
    ):
        with pytest.raises(InputError):
            wrong()
    assert not optimizer._optimizer_step_pre_hooks
    with watch(net, optimizer, to=Kept()) as watching:
        for wrong in (
            lambda: watching.log(Loss=1),
            lambda: watching.log(loss="high"),
            lambda: watching.pin("nothing", (0,)),
            lambda: watching.pin("0.weight", (0,)),
            lambda: watching.pin("0.weight", (9, 0)),
        ):
            with pytest.raises(InputError):
                wrong()
        assert not watching.closed


def test_of_several_evaluations_of_a_closure_the_first_counts():
    net = nn.Linear(6, 1)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=5)
    sink, first, x = Kept(), [], torch.randn(5, 6)
    with watch(net, optimizer, to=sink):
        for _ in range(3):
            losses = []

            def closure(losses=losses):
                optimizer.zero_grad()
                loss = (net(x) - 1).square().mean()
                loss.backward()
                losses.append((float(loss.detach()), float(net.weight.grad.norm())))
                return loss

            optimizer.step(closure)
            assert len(losses) > 1
            first.append(losses[0])
    assert sink.scalar("loss") == pytest.approx([loss for loss, _ in first])
    assert sink.of("weight", "grad_norm") == pytest.approx([norm for _, norm in first], rel=1e-5)


def test_a_sparse_gradient_that_is_never_cleared_does_not_end_the_watch():
    table = nn.Embedding(20, 4, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=1e-3)
    sink = Kept()
    with watch(table, optimizer, to=sink) as watching:
        for _ in range(12):
            table(torch.tensor([1, 2])).square().sum().backward()
            optimizer.step()
        assert not watching.closed
    assert sink.causes == ["accumulating"]


def test_another_models_loss_is_not_this_ones():
    net, optimizer = net_and_optimizer()
    other = nn.Linear(2, 1)
    sink = Kept()
    with watch(net, optimizer, to=sink):
        other(torch.ones(1, 2)).sum().backward()
        loss = net(batch()[0]).sum()
        loss.backward()
        optimizer.step()
    assert sink.scalar("loss") == pytest.approx([float(loss.detach())])


@pytest.mark.gpu
def test_on_a_gpu_the_numbers_are_those_of_the_host():
    rows = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net, _ = net_and_optimizer()
        net = net.to(device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        sink = Kept()
        x = torch.randn(5, 6)
        with watch(net, optimizer, to=sink):
            for _ in range(20):
                net(x.to(device)).square().sum().backward()
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        rows.append(sink)
    for one, other in zip(rows[0].rows, rows[1].rows, strict=True):
        np.testing.assert_allclose(one[3], other[3], rtol=1e-3, atol=1e-5, equal_nan=True)
        assert one[2]["loss"] == pytest.approx(other[2]["loss"], rel=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_the_update_of_a_measured_step_is_its_own_though_steps_before_were_not_measured(fused):
    """torch's fused AdamW writes to weights and leaves their version as it was."""
    found = {}
    for every in (1, 3):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=fused)
        sink = Kept()
        with watch(net, optimizer, to=sink, every=every):
            for _ in range(8):
                optimizer.zero_grad()
                x, y = batch()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
        found[every] = {step: statistics for step, _, _, statistics in sink.rows}
    assert sorted(found[3]) == [1, 4, 7]
    for step, statistics in found[3].items():
        np.testing.assert_array_equal(statistics, found[1][step], err_msg=str(step))


def test_a_pinned_gradient_is_that_of_the_measured_step_though_steps_before_were_clipped_too():
    net, optimizer = net_and_optimizer()
    sink, expected = Kept(), {}
    with watch(net, optimizer, to=sink, every=3) as watching:
        watching.pin("0.weight", (1, 2))
        for step in range(1, 8):
            optimizer.zero_grad()
            x, y = batch()
            F.cross_entropy(net(x), y).backward()
            expected[step] = float(net[0].weight.grad[1, 2])
            clip_grad_norm_(net.parameters(), 0.01)
            optimizer.step()
    assert {step: rows[0]["grad"] for step, rows in sink.pinned} == {s: expected[s] for s in (1, 4, 7)}

"""Small tensors measured together have the numbers that each has alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clinometer.monitoring.measure import small_tensors
from clinometer.monitoring.measure.histograms import count_into
from clinometer.monitoring.measure.small_tensors import Gradients, Places, Room, is_small
from clinometer.monitoring.measure.statistics import PIECE, Scratch, measure_gradient
from clinometer.monitoring.measure.step_row import _count
from clinometer.monitoring.watch import watch
from tests.monitoring.sink import Kept

SHAPES = [(1,), (7, 5), (1024,), (1025,), (128, 128), (), (344, 128), (2, 3, 4, 5), (256, 256), (512, 100)]


def gradients_of(seed, kinds):
    generator = torch.Generator().manual_seed(seed)
    grads, moments = [], []
    for shape, dtype, kind in kinds:
        g = (torch.randn(shape, generator=generator) * 10.0 ** (seed % 7 - 3)).to(dtype)
        m = torch.randn(shape, generator=generator).to(dtype)
        if kind == "transposed" and g.dim() == 2:
            g, m = g.t().contiguous().t(), m.t().contiguous().t()
        if kind == "zeros":
            g.view(-1)[::3] = 0
            g.view(-1)[1::3] = -0.0
        if kind == "dead":
            g.zero_()
        if kind == "broken":
            g.view(-1)[-1] = math.nan
        if kind == "tiny":
            g = g * 1e-25
        if kind == "huge" and dtype is torch.float32:
            g = g * 1e30
        grads.append(g)
        moments.append(None if kind == "no moment" else m)
    return grads, moments


tensors = st.tuples(
    st.sampled_from(SHAPES),
    st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["plain", "transposed", "zeros", "dead", "broken", "tiny", "huge", "no moment"]),
)


@given(st.integers(0, 100), st.lists(tensors, min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_joined_gradients_have_the_numbers_of_separate_ones(seed, kinds):
    grads, moments = gradients_of(seed, kinds)
    assert all(is_small(g) for g in grads)
    counts = np.zeros((len(grads), 64), np.int64)
    measuring = Gradients()
    measuring.measure(grads, moments, Scratch(), counts)
    # What the first left in the buffers is no part of the second.
    found = measuring.measure(grads, moments, Scratch(), counts)
    for number, (g, m) in enumerate(zip(grads, moments, strict=True)):
        alone = np.zeros(64, np.int64)
        expected = measure_gradient(g, m, Scratch(), alone)
        np.testing.assert_allclose(found[number], expected, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert counts[number].tolist() == (2 * alone).tolist()
        wide = g.double()
        assert found[number, 1:4].tolist() == list(expected[1:4])  # no sums: to the bit
        if kinds[number][2] in ("broken", "tiny", "huge"):  # measured alone in the end, to five digits
            continue
        assert found[number, 0] == pytest.approx(float(wide.norm()), rel=1e-6)
        if m is not None:
            assert found[number, 5] == pytest.approx(float(m.double().norm()), rel=1e-6)


def test_a_tensors_numbers_do_not_depend_on_its_neighbours():
    grads, moments = gradients_of(3, [(shape, torch.float32, "plain") for shape in SHAPES * 3])
    together = Gradients().measure(grads, moments, Scratch())
    for number, (g, m) in enumerate(zip(grads, moments, strict=True)):
        assert Gradients().measure([g], [m], Scratch()).tolist()[0] == together[number].tolist()


def test_numpy_without_vecdot_says_the_same(monkeypatch):
    grads, moments = gradients_of(5, [(shape, torch.float32, "plain") for shape in SHAPES])
    expected = Gradients().measure(grads, moments, Scratch())
    monkeypatch.delattr(np, "vecdot", raising=False)
    np.testing.assert_allclose(Gradients().measure(grads, moments, Scratch()), expected, rtol=2e-6, atol=1e-7)


def test_joined_sums_keep_five_digits():
    """Equal entries are the worst case: each error has the same sign."""
    g = torch.full((1 << 16,), 0.1)
    [found] = Gradients().measure([g], [g], Scratch())
    exact = float(g.double().norm())
    assert found.tolist() == pytest.approx([exact, float(g[0]), 0, 0, 1, exact], rel=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-22, 1e-3, 1e13, 1e25])
def test_joined_weights_have_their_norms_and_updates(size):
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=generator) * (size or 1.0) for shape in SHAPES * 2]
    room = Room(weights, Places())
    for _ in range(2):
        before = [w.clone() for w in weights]
        for w in weights:
            w.add_(torch.randn(w.shape, generator=generator), alpha=size)
        counts = np.zeros((2, len(weights), 64), np.int64)
        found = room.measure(weights, counts)
        for number, (now, old) in enumerate(zip(weights, before, strict=True)):
            moved = old - now
            exact = [float(now.double().norm()), float(moved.double().norm())]
            assert found[number].tolist() == pytest.approx(exact, rel=1e-6)
            assert torch.equal(room.copies()[number].view(now.shape), now)
            for row, values in zip(counts[:, number], (now, moved), strict=True):
                expected = np.zeros(64, np.int64)
                count_into(expected, values.reshape(-1), Scratch())
                assert row.tolist() == expected.tolist()


def test_a_weight_that_is_not_finite_has_an_infinite_norm():
    weights = [torch.ones(3), torch.ones(4)]
    room = Room(weights, Places())
    weights[1][0] = math.nan
    assert room.measure(weights).tolist() == [[pytest.approx(math.sqrt(3)), 0], [math.inf, math.inf]]


def test_gradients_that_are_missing_replaced_or_cast_between_steps_are_measured_right():
    torch.manual_seed(0)
    net = nn.ModuleDict({name: nn.Linear(20, 30) for name in "abcd"})
    net["d"].to(torch.bfloat16)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    sink, expected = Kept(), []

    def change(step):
        with torch.no_grad():
            if step == 3:
                net["a"].weight.data = torch.randn(30, 20)  # other memory
            if step == 4:
                net["b"].weight.data = net["b"].weight.data.t().contiguous().t()  # another layout
            if step == 5:
                net["c"].to(torch.float64)
                optimizer.state.clear()
            if step == 6:
                net["a"].bias.requires_grad_(False)

    with watch(net, optimizer, to=sink):
        for step in range(9):
            change(step)
            row = {}
            for name, p in net.named_parameters():
                p.grad = (
                    torch.randn_like(p) if p.requires_grad and not (step % 3 == 1 and "b" in name) else None
                )
                row[name] = (None if p.grad is None else float(p.grad.double().norm()), p.detach().clone())
            optimizer.step()
            for name, p in net.named_parameters():
                norm, before = row[name]
                moved = float((p.detach().double() - before.double()).norm())
                row[name] = (norm, float(p.detach().double().norm()), moved)
            optimizer.zero_grad()
            expected.append(row)
    assert sink.state == "done"
    for name in expected[0]:
        numbers = [sink.of(name, s) for s in ("grad_norm", "weight_norm", "update_norm")]
        for step, row in enumerate(expected):
            norm, weight, moved = row[name]
            assert numbers[0][step] == pytest.approx(
                math.nan if norm is None else norm, rel=1e-5, nan_ok=True
            )
            assert numbers[1][step] == pytest.approx(weight, rel=1e-5)
            assert numbers[2][step] == pytest.approx(moved, rel=2e-3 if "d." in name else 1e-5)


def test_two_optimizers_in_any_order_measure_what_each_moved():
    torch.manual_seed(0)
    net = nn.ModuleDict({name: nn.Linear(20, 30) for name in "abc"})
    parts = [torch.optim.SGD(net[name].parameters(), lr=0.1) for name in "ab"]  # nobody holds c
    sink = Kept()
    with watch(net, parts, to=sink):
        for step in range(4):
            for p in net.parameters():
                p.grad = torch.ones_like(p)
            for optimizer in parts if step % 2 else parts[::-1]:
                optimizer.step()
    for name in ("a.weight", "b.weight"):
        assert sink.of(name, "update_norm") == pytest.approx([0.1 * math.sqrt(600)] * 4, rel=1e-5)
    assert sink.of("c.weight", "update_norm") == [0] * 4
    assert sink.of("c.weight", "grad_norm") == pytest.approx([math.sqrt(600)] * 4)


def test_groups_of_neighbours_fit_their_place():
    layout = small_tensors.Layout([(n,) for n in (1, 1 << 16, 70, 1 << 16, 1 << 16, 1 << 15, 3)])
    assert sum(group.entries for group in layout.groups) == layout.rows * small_tensors.ROW
    assert max(group.entries for group in layout.groups) <= small_tensors._TOGETHER
    assert [n for group in layout.groups for n in group.sizes] == layout.sizes.tolist()


def test_histograms_of_what_is_longer_than_a_piece_are_counted_in_pieces():
    """As a tensor that was copied from a device is."""
    values = torch.randn(PIECE + 1001)
    found, expected = np.zeros((2, 64), np.int64)
    _count(found, values, Scratch())
    for part in values.split(999):
        count_into(expected, part, Scratch())
    assert found.tolist() == expected.tolist()

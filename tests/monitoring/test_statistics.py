"""The fused statistics are those of a plain computation, one tensor and one number at a time."""

import math

import numpy as np
import pytest
import torch

from clinometer import vocabulary
from clinometer.monitoring.measure.device import gradients_on_device, weights_on_device
from clinometer.monitoring.measure.histograms import count_into
from clinometer.monitoring.measure.statistics import PIECE, Scratch, flat, measure_gradient, measure_weight

SHAPES = [(), (0,), (1,), (3, 0, 2), (7, 5), (2, 3, 4, 5), (PIECE,), (PIECE + 3,), (3, PIECE // 2 + 1)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]


def plain_gradient(g, m):
    """In float64 (complex128), with nothing clever."""
    g = g.to_dense() if g.layout is not torch.strided else g
    wide = g.to(torch.complex128 if g.is_complex() else torch.float64)
    size = g.numel()
    zeros = int((wide == 0).sum()) / size if size else 0.0
    bad = size - int(torch.isfinite(wide).sum())
    norm = math.sqrt(float((wide.abs() ** 2).sum()))
    largest = float(wide.abs().max()) if size else 0.0
    moment_norm = cosine = math.nan
    if m is not None:
        m = m.to(wide.dtype)
        moment_norm = math.sqrt(float((m.abs() ** 2).sum()))
        if norm and moment_norm and not bad:
            cosine = float((wide * m.conj()).sum().real) / norm / moment_norm
    if bad:
        norm = largest = math.inf
    return norm, largest, zeros, bad, cosine, moment_norm


def same(found, expected, tolerance=1e-5):
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        error = tolerance if place == 4 else 0.0  # a cosine near 0 has the error of its terms
        assert one == pytest.approx(other, rel=tolerance, abs=error, nan_ok=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_statistics_are_those_of_a_plain_computation(shape, dtype):
    g, m = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    if g.numel() > 3:
        g.view(-1)[:: g.numel() // 3] = 0
    same(measure_gradient(g, m, Scratch()), plain_gradient(g, m))
    same(measure_gradient(g, None, Scratch()), plain_gradient(g, None))
    same(gradients_on_device([g], [m]).tolist()[0], plain_gradient(g, m))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_statistics_are_those_of_a_plain_computation(shape, dtype):
    before, after = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = [
        float(torch.linalg.vector_norm(t.to(wide))) for t in (after, after.to(wide) - before.to(wide))
    ]
    copy = flat(before).clone()
    same(measure_weight(after, copy, Scratch()), expected)
    assert torch.equal(copy, flat(after))
    copy = flat(before).clone()
    same(weights_on_device([after], [copy]).tolist()[0], expected)
    assert torch.equal(copy, flat(after))


@pytest.mark.parametrize("layout", ["transposed", "strided", "channels_last", "expanded"])
def test_memory_layout_changes_nothing(layout):
    g, m = torch.randn(6, 8, 4, 4), torch.randn(6, 8, 4, 4)
    g = {
        "transposed": lambda: g.transpose(0, 1),
        "strided": lambda: torch.randn(12, 8, 4, 4)[::2],
        "channels_last": lambda: g.to(memory_format=torch.channels_last),
        "expanded": lambda: torch.randn(1, 8, 4, 4).expand(6, 8, 4, 4),
    }[layout]()
    m = m.reshape(g.shape)
    same(measure_gradient(g, m, Scratch()), plain_gradient(g, m))


def test_a_sparse_gradient_counts_what_it_does_not_store_as_zeros():
    table = torch.nn.Embedding(50, 4, sparse=True)
    table(torch.tensor([3, 3, 7])).square().sum().backward()
    found = measure_gradient(table.weight.grad, torch.randn(50, 4), Scratch())
    assert found.zeros == 48 / 50
    same(found[:4], plain_gradient(table.weight.grad, None)[:4])


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-13, 1e13, 1e18, 1e25, 1e30])
def test_squares_beyond_float32_are_neither_lost_nor_infinite(size):
    g, m = torch.randn(1000) * size, torch.randn(1000) * size
    found = measure_gradient(g, m, Scratch())
    assert found.nonfinite == 0
    same(found, plain_gradient(g, m))
    old = g.clone()
    same(
        measure_weight(g + m, old, Scratch()),
        [float((g + m).double().norm()), float((g + m - g).double().norm())],
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_counted_and_makes_the_norm_infinite(value):
    g = torch.randn(PIECE + 10)
    g[[1, 5, PIECE + 2]] = value
    g[7] = 0
    for found in (measure_gradient(g, g, Scratch()), gradients_on_device([g], [g]).tolist()[0]):
        norm, largest, zeros, nonfinite, cosine, _ = found
        assert (norm, largest, nonfinite) == (math.inf, math.inf, 3)
        assert zeros == pytest.approx(1 / g.numel())
        assert math.isnan(cosine)


def test_a_norm_beyond_float32_stays_a_finite_number_of_a_row():
    g = torch.full((3,), 1e200, dtype=torch.float64)
    found = np.float32(measure_gradient(g, None, Scratch()))
    assert np.isfinite(found[0])
    assert np.isfinite(found[1])


def test_long_sums_keep_five_digits():
    """Equal entries are the worst case: each error has the same sign."""
    g = torch.full((3_000_000,), 0.1)
    assert measure_gradient(g, None, Scratch()).norm == pytest.approx(float(g.double().norm()), rel=1e-5)


def test_foreach_norm_is_right_for_many_tensors():
    """It was silently wrong once (pytorch#140066), and the device's statistics rest on it."""
    grads = [torch.randn(n) for n in (1, 17, 0, 70_000, 5, 300_001)]
    found = gradients_on_device(grads, [None] * len(grads))[:, 0]
    expected = torch.tensor([float(g.double().norm()) for g in grads], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0, 1, 2, 1001])
def test_histograms_count_exponents(size, dtype):
    values = torch.randn(size, dtype=dtype) * torch.exp2(torch.randint(-60, 30, (size,)).to(dtype))
    if size > 9:
        values[:9] = torch.tensor([0, -0.0, math.inf, -math.inf, math.nan, 1.0, -2.0, 1e-40, 2.0**-47])
    expected = np.zeros(64, np.int64)
    for x in values.tolist():
        bucket = 63 if not math.isfinite(x) else 0 if x == 0 else min(max(math.frexp(x)[1] - 1 + 48, 1), 63)
        expected[bucket] += 1
    found = np.zeros(64, np.int64)
    count_into(found, values, Scratch())
    assert found.tolist() == expected.tolist()


def test_histograms_come_with_the_statistics():
    old, new = torch.randn(PIECE + 11), torch.randn(PIECE + 11)
    expected = np.zeros((2, 64), np.int64)
    for row, values in zip(expected, (new, new - old), strict=True):
        for part in values.split(1000):
            count_into(row, part, Scratch())
    counts = np.zeros((2, 64), np.int64)
    measure_weight(new, old, Scratch(), (counts[0], counts[1]))
    assert counts.tolist() == expected.tolist()


@pytest.mark.gpu
def test_statistics_on_a_gpu_are_those_of_the_host():
    grads = [torch.randn(shape).to(dtype) for shape in SHAPES for dtype in DTYPES[:4]]
    moments = [torch.randn_like(g) for g in grads]
    found = gradients_on_device([g.cuda() for g in grads], [m.cuda() for m in moments]).cpu()
    for row, g, m in zip(found.tolist(), grads, moments, strict=True):
        same(row, plain_gradient(g, m))


def test_the_order_of_the_statistics_is_fixed():
    names = "grad_norm grad_max grad_zeros grad_nonfinite weight_norm update_norm cosine moment_norm"
    assert " ".join(vocabulary.STATISTICS) == names

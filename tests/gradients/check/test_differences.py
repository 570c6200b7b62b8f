"""The numerics alone, on functions whose derivatives are known."""

import math

import pytest
import torch

from clinometer.gradients.check.numerics.finite_differences import (
    COARSEST,
    EPS,
    RELATIVE,
    STEP,
    direction,
    judge,
    jump,
    reals,
    richardson,
    tolerance,
)


def test_the_step_is_the_fifth_root_of_the_rounding_unit():
    assert pytest.approx(7.4e-4, rel=1e-3) == STEP
    assert EPS == 2**-52


@pytest.mark.parametrize(
    ("f", "slope"), [(math.exp, 1.0), (math.sin, 1.0), (lambda t: math.log1p(t) ** 2 + 3 * t, 3.0)]
)
def test_richardson_has_an_error_of_the_fourth_order(f, slope):
    assert abs(richardson(f, STEP) - slope) < 1e-11
    wide, narrow = (abs(richardson(f, h) - slope) for h in (0.08, 0.04))
    assert wide / narrow == pytest.approx(16, rel=0.2)


def test_the_tolerance_is_the_documented_sum():
    assert tolerance(3.0, 5.0, 1e-3) == RELATIVE * 3.0 + 20 * EPS * 5.0 / 1e-3


@pytest.mark.parametrize("error", [1e-8, 1e-6, 1e-3, 0.5, -2.0])
def test_an_error_above_the_tolerance_is_wrong_at_any_size(error):
    judged = judge(math.exp, 1 + error, 1.0, 1.0, 1.0)
    assert judged.verdict == "wrong"
    assert judged.error == pytest.approx(-error, rel=0.05)


@pytest.mark.parametrize("error", [0.0, 1e-10, -5e-10])
def test_an_error_below_the_tolerance_passes(error):
    assert judge(math.exp, 1 + error, 1.0, 1.0, 1.0).verdict == "passed"


@pytest.mark.parametrize("distance", [1e-3, 3e-4, 1e-5, -2e-6])
def test_a_corner_beside_the_point_does_not_accuse_the_right_slope(distance):
    f = lambda t: math.sin(t) + 5 * max(0.0, t - distance)  # noqa: E731
    slope = 1.0 + (5.0 if distance < 0 else 0.0)
    judged = judge(f, slope, 1.0, 1.0, f(0.0))
    assert judged.verdict == "passed"


def test_a_corner_nearer_than_any_step_can_tell_is_taken_for_one_at_the_point():
    assert judge(lambda t: 5 * max(0.0, t - 1e-8), 0.0, 1.0, 1.0, 0.0).verdict == "kink"


@pytest.mark.parametrize("distance", [1e-3, 3e-4, 1e-5, -2e-6])
def test_a_wrong_slope_is_found_though_a_corner_is_near(distance):
    f = lambda t: math.sin(t) + 5 * max(0.0, t - distance)  # noqa: E731
    slope = 1.0 + (5.0 if distance < 0 else 0.0)
    assert judge(f, slope + 0.1, 1.0, 1.0, f(0.0)).verdict == "wrong"


@pytest.mark.parametrize("chosen", [0.0, 1.0, 0.3])
def test_a_corner_at_the_point_is_a_kink_whatever_slope_was_chosen(chosen):
    judged = judge(lambda t: max(0.0, t), chosen, 1.0, 1.0, 0.0)
    assert judged.verdict == "kink"
    assert judged.jump == pytest.approx(1.0)


def test_at_a_corner_only_what_the_corner_cannot_explain_is_wrong():
    assert judge(lambda t: max(0.0, t), 40.0, 1.0, 1.0, 0.0).verdict == "wrong"


def test_a_jump_of_the_function_is_unclear_and_not_wrong():
    f = lambda t: t + (0.1 if t > 0 else 0.0)  # noqa: E731
    assert judge(f, 1.0, 1.0, 1.0, 0.0).verdict in ("unclear", "kink")


def test_a_jump_beside_the_point_is_stepped_over():
    f = lambda t: math.cos(t) + 2 * t + (0.1 if t > 1e-5 else 0.0)  # noqa: E731
    judged = judge(f, 2.0, 1.0, 1.0, 1.0)
    assert judged.verdict == "passed"
    assert judged.step < 1e-5


def test_strong_curvature_asks_for_a_smaller_step_and_then_passes():
    f = lambda t: math.sin(2000 * t) / 2000  # noqa: E731
    judged = judge(f, 1.0, 1e-3, 1.0, 0.0)
    assert judged.verdict == "passed"
    assert judged.step < STEP


def test_the_jump_of_a_smooth_function_shrinks_with_the_step():
    assert abs(jump(math.exp, 1.0, 1e-2)) < 1e-4
    assert jump(abs, 0.0, 1e-2) == pytest.approx(2.0)


def test_a_domain_that_ends_beside_the_point_asks_for_a_smaller_step():
    f = lambda t: math.log(1e-5 + t) * 1e-5 if t > -1e-5 else math.nan  # noqa: E731
    assert judge(f, 1.0, 1.0, 1e-4, f(0.0)).verdict == "passed"


def test_a_direction_has_the_size_of_its_tensor_and_signs_that_vary():
    generator = torch.Generator().manual_seed(0)
    v = direction(5 * torch.ones(10_000), generator)
    assert v.dtype == torch.float64
    assert float(v.std()) == pytest.approx(5, rel=0.03)
    assert 4_700 < int((v > 0).sum()) < 5_300
    assert float(direction(torch.zeros(10_000), generator).std()) == pytest.approx(1e-2, rel=0.03)
    assert direction(torch.zeros(2, 3, dtype=torch.complex64), generator).shape == (2, 3, 2)


def test_reals_share_the_memory_of_a_complex_tensor():
    z = torch.zeros(2, dtype=torch.complex128)
    reals(z)[0, 1] = 3.0
    assert z[0] == 3j


@pytest.mark.parametrize(("magnitude", "verdict"), [(50.0, "passed"), (1.0, "passed")])
def test_curvature_where_rounding_forbids_a_finer_step_is_extrapolated_away(magnitude, verdict):
    f = lambda t: math.sin(40 * t) / 40  # noqa: E731
    assert abs(richardson(f, STEP) - 1) > tolerance(1.0, magnitude, STEP)
    judged = judge(f, 1.0, 1.0, magnitude, 0.0)
    assert judged.verdict == verdict
    assert abs(judged.error) < 1e-9
    assert judge(f, 1.0 + 1e-7, 1.0, magnitude, 0.0).verdict == "wrong"


def test_rounding_of_the_numbers_a_small_loss_is_made_of_is_measured():
    size = 1e-4
    f = lambda t: (12.0 + size * math.exp(t)) - 12.0  # noqa: E731
    assert abs(richardson(f, STEP) - size) > tolerance(size, size, STEP)  # ε·|L| is too little
    judged = judge(f, size, size, size, f(0.0))
    assert judged.verdict == "passed"
    assert abs(judged.error) <= judged.tolerance <= COARSEST * size
    assert judge(f, size * 1.001, size, size, f(0.0)).verdict == "wrong"


@pytest.mark.parametrize(
    ("f", "slope"),
    [
        (lambda t: 1 / (1e-11 + t), -1e22),
        (lambda t: math.tanh(1e30 * t), 1e30),
        (lambda t: math.sin(1e12 * (1 + t)), 1e12 * math.cos(1e12)),
        (lambda t: math.sin(1e9 * (1 + t)), 1e9 * math.cos(1e9)),
        (lambda t: t / (1e-13 + abs(t)), 1e13),
    ],
)
def test_a_right_slope_that_no_step_can_resolve_is_not_called_wrong(f, slope):
    assert judge(f, slope, abs(slope), abs(f(0.0)), f(0.0)).verdict == "unclear"


def test_a_wrong_slope_of_a_steep_function_is_still_found():
    f = lambda t: math.sin(1e3 * (1 + t))  # noqa: E731
    slope = 1e3 * math.cos(1e3)
    assert judge(f, slope, abs(slope), abs(f(0.0)), f(0.0)).verdict == "passed"
    assert judge(f, 1.02 * slope, abs(slope), abs(f(0.0)), f(0.0)).verdict == "wrong"

"""Schedules: the formula, exact corners, order, and refusals."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clinometer.messages import InputError
from clinometer.optim.schedule import constant_schedule, cosine_schedule, warmup_stable_decay_schedule

rates = st.tuples(st.floats(0, 10), st.floats(0, 10)).map(sorted)
lengths = st.integers(0, 500)


def test_cosine_follows_the_formula_at_hand_computed_points() -> None:
    at = [cosine_schedule(t, 1.0, 0.1, 7, 21) for t in (0, 1, 7, 14, 21, 22, 1000)]
    assert at[:3] == [0.0, 1 / 7, 1.0]
    assert at[3] == pytest.approx(0.55, abs=1e-15)
    assert at[4:] == [0.1, 0.1, 0.1]
    third = cosine_schedule(7 + 14 / 3, 1.0, 0.1, 7, 21)  # cos(π/3) = ½
    assert third == pytest.approx(0.1 + 0.75 * 0.9, abs=1e-15)


@example([0.468, 0.999], 3, 7)  # 0.468 + (0.999 − 0.468) is not 0.999 in floating point
@given(rates, lengths, lengths)
def test_cosine_is_exact_at_its_corners(pair: list[float], warmup: int, rest: int) -> None:
    low, high = pair
    total = warmup + rest
    assert cosine_schedule(warmup, high, low, warmup, total) == high
    if rest:
        assert cosine_schedule(total, high, low, warmup, total) == low
    assert cosine_schedule(total + 1, high, low, warmup, total) == low
    if warmup:
        assert cosine_schedule(0, high, low, warmup, total) == 0.0


@given(rates, st.integers(0, 50), st.integers(0, 50))
def test_cosine_rises_and_then_falls(pair: list[float], warmup: int, rest: int) -> None:
    low, high = pair
    curve = [cosine_schedule(t, high, low, warmup, warmup + rest) for t in range(warmup + rest + 3)]
    up, down = curve[: warmup + 1], curve[warmup:]
    slack = 1e-15 * high + 1e-320  # the last places
    assert all(a <= b + slack for a, b in pairwise(up))
    assert all(a >= b - slack for a, b in pairwise(down))


def test_a_loop_that_asks_for_step_plus_one_starts_above_zero_and_ends_at_the_minimum() -> None:
    used = [cosine_schedule(step + 1, 1.0, 0.1, 10, 100) for step in range(100)]
    assert used[0] == 0.1
    assert used[9] == max(used) == 1.0
    assert used[-1] == min(used[10:]) == 0.1


def test_a_warmup_as_long_as_the_run_is_legal() -> None:
    assert [cosine_schedule(t, 1.0, 0.1, 4, 4) for t in (2, 4, 5)] == [0.5, 1.0, 0.1]
    assert cosine_schedule(0, 1.0, 0.1, 0, 0) == 1.0


def test_constant_warms_up_and_stays() -> None:
    assert [constant_schedule(t, 0.4, 4) for t in (0, 1, 4, 5, 10**9)] == [0.0, 0.1, 0.4, 0.4, 0.4]
    assert constant_schedule(0, 0.4, 0) == 0.4


def test_warmup_stable_decay_has_three_straight_parts() -> None:
    at = [warmup_stable_decay_schedule(t, 1.0, 0.2, 10, 100, 40) for t in (0, 5, 10, 60, 70, 80, 100, 101)]
    assert at[:4] == [0.0, 0.5, 1.0, 1.0]
    assert at[4:6] == pytest.approx([0.8, 0.6], abs=1e-15)
    assert at[6:] == [0.2, 0.2]


@example([0.468, 0.999], 3, 7, 5)
@given(rates, lengths, lengths, st.integers(1, 500))
def test_warmup_stable_decay_is_exact_at_its_corners(
    pair: list[float], warmup: int, stable: int, decay: int
) -> None:
    low, high = pair
    total = warmup + stable + decay
    arguments = (high, low, warmup, total, decay)
    assert warmup_stable_decay_schedule(warmup, *arguments) == high
    assert warmup_stable_decay_schedule(warmup + stable, *arguments) == high
    assert warmup_stable_decay_schedule(total, *arguments) == low


def test_no_decay_steps_means_no_decay() -> None:
    at = [warmup_stable_decay_schedule(t, 1.0, 0.1, 2, 10, 0) for t in (9, 10, 11)]
    assert at == [1.0, 1.0, 0.1]


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda: cosine_schedule(-1, 1.0, 0.1, 5, 10), "optim.nonnegative"),
        (lambda: cosine_schedule(math.nan, 1.0, 0.1, 5, 10), "optim.nonnegative"),
        (lambda: cosine_schedule(1, math.inf, 0.1, 5, 10), "optim.nonnegative"),
        (lambda: cosine_schedule(1, 1.0, -0.1, 5, 10), "optim.nonnegative"),
        (lambda: cosine_schedule(1, 1.0, 0.1, -5, 10), "optim.nonnegative"),
        (lambda: cosine_schedule(1, 1.0, 0.1, 5, math.inf), "optim.nonnegative"),
        (lambda: cosine_schedule(1, 0.1, 1.0, 5, 10), "optim.min_lr"),
        (lambda: cosine_schedule(1, 1.0, 0.1, 11, 10), "optim.warmup_steps"),
        (lambda: constant_schedule(1, -1.0, 5), "optim.nonnegative"),
        (lambda: warmup_stable_decay_schedule(1, 1.0, 0.1, 6, 10, 5), "optim.decay_steps"),
        (lambda: warmup_stable_decay_schedule(1, 1.0, 0.1, 6, 10, -5), "optim.nonnegative"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Callable[[], float], key: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert error.value.key == key
    for language in ("en", "zh"):
        assert error.value.render(language)

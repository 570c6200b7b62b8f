"""Rows of the races and steps from what was measured."""

import pytest

from benchmarks import training_rows as made


def named(found):
    return {row.name: row for row in found}


def test_a_race_that_once_missed_the_loss_has_no_row():
    nanogpt, cold, warm = (
        [(100.0, 1.886), (110.0, 1.886)],
        [(20.0, 1.88), (22.0, 1.89)],
        [(10.0, 1.88), (11.0, 1.87)],
    )
    found = named(made.race_rows(1.8857, nanogpt, cold, warm))
    assert found.keys() == {"loss-warm"}
    assert found["loss-warm"].ratio == pytest.approx(0.1)


def test_the_loss_after_equal_time_counts_only_if_the_time_was_not_longer():
    nanogpt, cold = [(100.0, 1.886)], [(20.0, 1.88)]
    found = named(made.race_rows(1.8857, nanogpt, cold, long=[(99.0, 1.58)]))
    assert (found["loss-same-time"].ours, found["loss-same-time"].theirs) == (1.58, 1.886)
    assert "loss-same-time" not in named(made.race_rows(1.8857, nanogpt, cold, long=[(101.0, 1.58)]))


def test_speed_is_set_beside_the_better_form_of_nanogpt_and_the_machines_own_product():
    def side(speed, share=0.5):
        return [{"tokens_per_second": speed, "matmul_share": share}] * 2

    results = {
        "nanoGPT eager": side(1000.0),
        "nanoGPT compiled": side(1250.0),
        "nanoGPT bf16 compiled": side(2000.0),
        "clinometer float32": side(1500.0),
        "clinometer bf16": side(3000.0, 0.6),
    }
    found = named(made.speed_rows(results, operations_a_token=1e8))
    assert found["speed-float32"].peer == "nanoGPT compiled"
    assert found["speed-float32"].ratio == pytest.approx(1.2)
    assert found["speed-bf16"].ratio == pytest.approx(2.4)
    assert found["speed-bf16-bf16"].ratio == pytest.approx(1.5)
    share = found["matmul-share"]
    assert (share.ours, share.theirs, share.ratio) == pytest.approx((0.3, 0.5, 0.6))


def test_memory_is_set_beside_nanogpt_eager():
    found = named(made.memory_rows({"nanoGPT eager": 8.0, "clinometer float32": 4.0}))
    assert found.keys() == {"memory"}
    assert found["memory"].ratio == 0.5


def test_the_loop_is_compared_with_its_own_inside_and_the_bare_outside():
    milliseconds = {
        "bare loop": (2.0, 1000.0),
        "train, watch_every = 0": (7.0, 1005.0),
        "train, watched": (22.0, 900.0),
    }
    found = named(made.loop_rows(milliseconds))
    assert found["loop"].ratio == pytest.approx(1005 / 1000)
    assert found["loop-watched"].ratio == pytest.approx(900 / 880)

"""A run that was cut and goes on has the same rows as one that never stopped."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinometer.record.read.reader import RunFile
from clinometer.record.write.recorder import Recorder
from tests.record.running import RUN, begun, named, recorded, rows_of, statistics


def run_steps(recorder, first, last, every, grown_at):
    """What a deterministic training would send: steps, histograms, events, a pinned weight, new tensors."""
    for step in range(first, last + 1):
        if step % every:
            continue
        tensors = 2 if step < grown_at else 3
        if tensors > len(recorder._names):
            recorder.tensors(named(tensors))
        scalars = {"loss": float(np.sin(step)), "lr": 1e-3}
        if step % 50 == 0:
            scalars["validation_loss"] = float(step)
        recorder.step(step, float(step), scalars, statistics(step, tensors))
        if step % 16 == 0:
            recorder.histograms(step, np.full((tensors, 3, 64), step))
        if step % 40 == 0:
            recorder.event(step, float(step), "checkpoint", {"path": f"step-{step}"})
        if step > 30:
            recorder.weights(step, [{"tensor": 0, "index": [1, 1], "before": step, "after": step + 1.0}])


@settings(max_examples=12)
@given(
    cuts=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 300)), min_size=1, max_size=3),
    every=st.sampled_from([1, 1, 3, 10]),
    grown_at=st.integers(0, 500),
    total=st.integers(1, 560),
)
def test_cut_and_resumed_equals_uninterrupted_row_by_row(tmp_path_factory, cuts, every, grown_at, total):
    whole = tmp_path_factory.mktemp("whole")
    recorder = begun(whole, tensors=2)
    run_steps(recorder, 1, total, every, grown_at)
    recorder.close()

    parts = tmp_path_factory.mktemp("parts")
    done = 0
    for cut, further in cuts:
        cut = min(cut, done)
        recorder = begun(parts, tensors=2, continue_from=cut)
        done = min(total, cut + further)
        run_steps(recorder, cut + 1, done, every, grown_at)
        recorder._file.connection.close() if further % 2 else recorder.close("stopped")
        recorder._file._lock.release()
    recorder = begun(parts, tensors=2, continue_from=done)
    run_steps(recorder, done + 1, total, every, grown_at)
    recorder.close()

    expected, found = rows_of(whole), rows_of(parts)
    for table in expected:
        assert found[table] == expected[table], table


def test_alerts_of_the_first_part_stay_and_end_at_the_cut(tmp_path):
    recorder = begun(tmp_path)
    alert = {
        "cause": "dead",
        "severity": "warning",
        "tensors": ["t"],
        "values": {},
        "key": "k",
        "remedy": "r",
    }
    for step in range(1, 31):
        recorder.step(step, step, {}, statistics(step, 3))
    recorder.alert({**alert, "id": 0, "step": 3, "until": 5})
    recorder.alert({**alert, "id": 1, "step": 10, "until": None})
    recorder.alert({**alert, "id": 2, "step": 15, "until": 28})
    recorder.alert({**alert, "id": 3, "step": 25, "until": None})
    recorder.close("stopped")
    recorder = begun(tmp_path, continue_from=20)
    recorder.alert({**alert, "id": 0, "step": 22, "until": None})
    recorder.alert({**alert, "id": 0, "step": 22, "until": 23})
    found = [(a["id"], a["step"], a["until"]) for a in RunFile.open(tmp_path).alerts()]
    recorder.close()
    assert found == [(0, 3, 5), (1, 10, 20), (2, 15, 20), (3, 22, 23)]


def test_a_continued_run_keeps_its_name_and_id_and_is_live_again(tmp_path):
    recorded(tmp_path, 10)
    before = RunFile.open(tmp_path).info()
    recorder = begun(tmp_path, continue_from=8, name="other", started=2e9, config={"lr": 0.2})
    run = RunFile.open(tmp_path)
    info = run.info()
    for key in ("id", "name", "started"):
        assert info[key] == before[key]
    assert (info["state"], info["last_step"], info["config"]) == ("live", 8, {"lr": 0.2})
    assert info["since"] > before["since"]
    recorder.close()


def test_continuing_where_nothing_was_recorded_begins_a_run(tmp_path):
    recorder = Recorder(tmp_path, continue_from=500)
    recorder.begin(dict(RUN))
    recorder.tensors(named(3))
    recorder.step(501, 1, {}, statistics(1, 3))
    recorder.close()
    assert RunFile.open(tmp_path).info()["first_step"] == 501


@pytest.mark.parametrize("cut", [0, 15, 16, 255, 256, 300])
def test_a_cut_leaves_nothing_later_and_no_roll_up_of_it(tmp_path, cut):
    recorded(tmp_path, 300)
    Recorder(tmp_path, continue_from=cut).close()
    rows = rows_of(tmp_path)
    assert [row[0] for row in rows["steps"]] == list(range(1, cut + 1))
    for level in (16, 256, 4096):
        starts = {row[0] for row in rows[f"scalar_rollup_{level}"]}
        assert starts == set(range(0, cut // level * level, level))
        assert {row[0] & ((1 << 40) - 1) for row in rows[f"rollup_{level}"]} == starts

"""What ranges answer equals a plain computation over the rows; and readers hold nobody up."""

import sqlite3
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinometer.messages import InputError
from clinometer.record.format import cells
from clinometer.record.read.reader import RunFile, find_runs
from clinometer.record.write import writer_file
from clinometer.record.write.recorder import Recorder
from clinometer.vocabulary import STATISTICS
from tests.record.running import begun, named, recorded, statistics
from tests.record.synthetic import synthetic


def plain(steps, table, stride):
    """(C, W) means, minima and maxima of the rows in each cell of `stride` steps, NaN where there is none."""
    index = np.array(steps) // stride
    out = []
    for cell in np.unique(index):
        rows = table[index == cell].astype(np.float64)
        there = ~np.isnan(rows)
        some = there.any(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(there, rows, 0).sum(0) / there.sum(0)
        low = np.where(some, np.where(there, rows, np.inf).min(0), np.nan)
        high = np.where(some, np.where(there, rows, -np.inf).max(0), np.nan)
        out.append((mean, low, high))
    return np.array(out).transpose(1, 0, 2), np.unique(index) * stride


def written(folder, steps, tensors, grown_at):
    recorder = begun(folder, tensors)
    table = np.full((len(steps), tensors + 2, 8), np.nan, np.float32)
    losses = np.full(len(steps), np.nan)
    for row, step in enumerate(steps):
        if step >= grown_at and tensors == len(recorder._names):
            recorder.tensors(named(tensors + 2))
        values = statistics(step, len(recorder._names))
        scalars = {"lr": 0.5} if step % 3 else {"lr": 0.5, "loss": float(np.sin(step))}
        losses[row] = scalars.get("loss", np.nan)
        recorder.step(step, float(step), scalars, values)
        table[row, : len(values)] = values
    width = len(recorder._names)
    recorder.close()
    return table[:, :width], losses


@settings(max_examples=15)
@given(
    gaps=st.lists(st.integers(1, 60), min_size=1, max_size=90),
    tensors=st.integers(1, 3),
    grown=st.integers(0, 3000),
    points=st.integers(1, 40),
    ends=st.tuples(st.integers(0, 2500), st.integers(0, 2500)),
)
def test_ranges_answer_what_a_plain_computation_over_the_rows_gives(
    tmp_path_factory, gaps, tensors, grown, points, ends
):
    steps = np.cumsum(gaps).tolist()
    folder = tmp_path_factory.mktemp("run")
    table, losses = written(folder, steps, tensors, grown)
    run = RunFile.open(folder)
    first, last = min(ends), max(ends)
    for low, high in ((None, None), (first, last)):
        answer = run.series(range(table.shape[1]), "grad_norm", low, high, points)
        stride = answer["stride"]
        begin = max(steps[0], low or 0) // stride * stride
        end = min(steps[-1], 1 << 40 if high is None else high) // stride * stride + stride
        chosen = [i for i, step in enumerate(steps) if begin <= step < end]
        if not chosen or (high is not None and (high < steps[0] or low > steps[-1])):
            assert len(answer["step"]) == 0
            continue
        expected, starts = plain([steps[i] for i in chosen], table[chosen, :, 0], stride)
        for part, name in enumerate(("mean", "min", "max")):
            np.testing.assert_allclose(answer[name].T, expected[part], rtol=3e-6, err_msg=name)
        assert len(answer["step"]) <= points + 1 or stride == 1
        assert (answer["step"] == np.maximum(starts, answer["step"][0])).all()

        grid = run.grid("grad_norm", low, high, points)
        places = np.searchsorted(grid["step"], np.maximum(starts, grid["step"][0]), side="right") - 1
        np.testing.assert_allclose(grid["values"][:, places].T, expected[0], rtol=3e-6)
        rest = np.delete(grid["values"], places, axis=1)
        assert np.isnan(rest).all()

        if "loss" in run.scalar_names():
            curve = run.scalars(["loss", "time"], low, high, points)
            assert curve["stride"] == stride
            wanted, _ = plain([steps[i] for i in chosen], losses[chosen, None], stride)
            for part, name in enumerate(("mean", "min", "max")):
                np.testing.assert_allclose(curve["loss"][name], wanted[part, :, 0], rtol=1e-12, err_msg=name)
            firsts = [min(s for s in steps if s // stride == c // stride) for c in starts]
            assert curve["time"]["mean"].tolist() == firsts
    run.close()


def test_three_levels_of_roll_ups_agree_with_the_rows(tmp_path, monkeypatch):
    """Long enough for closed windows of 4096 steps, with a frozen tensor, one that dies and one infinity."""
    folder = synthetic(tmp_path, steps=9000, layers=1)
    run = RunFile.open(folder)
    rows = run.rows(limit=9000)
    for points, stride in ((2, 8192), (30, 512), (500, 32), (565, 16)):
        answer = run.series(range(9), "grad_norm", points=points)
        assert answer["stride"] == stride
        expected, starts = plain(rows["step"].tolist(), rows["statistics"][..., 0], stride)
        for part, name in enumerate(("mean", "min", "max")):
            np.testing.assert_allclose(answer[name].T, expected[part], rtol=1e-5)
        assert (answer["step"] == np.maximum(starts, 1)).all()
        np.testing.assert_allclose(run.grid("grad_norm", columns=points)["values"], answer["mean"])
    some = run.series([8, 2], "cosine", points=30)
    every = run.series(range(9), "cosine", points=30)
    for name in ("mean", "min", "max"):
        np.testing.assert_array_equal(some[name], every[name][[8, 2]])
    queries = []
    run._connection.set_trace_callback(queries.append)
    run.series([8], "cosine", points=2)
    assert any("rollup_4096" in query for query in queries)


@pytest.mark.parametrize("tensor", [0, 5, 15])
def test_a_single_tensor_of_many_is_cut_out_of_the_rows(tmp_path, tensor):
    folder = synthetic(tmp_path, steps=700, layers=2)
    run = RunFile.open(folder)
    rows = run.rows(limit=700)["statistics"]
    for points in (1000, 40):
        alone = run.series([tensor], "moment_norm", points=points)
        together = run.series(range(16), "moment_norm", points=points)
        for name in ("mean", "min", "max"):
            np.testing.assert_allclose(alone[name][0], together[name][tensor], rtol=1e-6)
    np.testing.assert_array_equal(run.series([tensor], "moment_norm")["mean"][0], rows[:, tensor, 7])


def test_derived_statistics_follow_their_definition(tmp_path):
    folder = synthetic(tmp_path, steps=400, layers=1)
    run = RunFile.open(folder)
    rows, numel = run.rows(limit=400)["statistics"], [t["numel"] for t in run.tensors()]
    for name in ("grad", "weight", "update", "moment"):
        values = rows[..., STATISTICS.index(f"{name}_norm")] / np.sqrt(np.float32(numel))
        np.testing.assert_allclose(run.grid(f"{name}_rms")["values"], values.T, rtol=1e-6)
    ratio = rows[..., 5] / rows[..., 4]
    np.testing.assert_allclose(run.grid("update_ratio")["values"], ratio.T, rtol=1e-6)
    coarse = run.series(range(9), "update_ratio", points=20)
    assert coarse["stride"] == 32
    means = plain(list(range(1, 401)), ratio, 32)[0]
    np.testing.assert_allclose(coarse["mean"].T, means[0], rtol=1e-3)
    assert (means[1] * (1 + 1e-6) >= coarse["min"].T).all()
    assert (means[2] * (1 - 1e-6) <= coarse["max"].T).all()


def test_a_map_of_a_run_watched_every_tenth_step_has_a_column_for_each(tmp_path):
    recorder = begun(tmp_path, tensors=2, every=10)
    for step in range(0, 200, 10):
        if step != 70:
            recorder.step(step, step, {}, np.full((2, 8), step, np.float32))
    recorder.close()
    grid = RunFile.open(tmp_path).grid("grad_norm")
    assert grid["stride"] == 10
    assert grid["step"].tolist() == list(range(0, 200, 10))
    assert np.isnan(grid["values"][0]).tolist() == [step == 70 for step in range(0, 200, 10)]


def test_a_range_too_wide_to_be_read_row_by_row_is_answered_in_coarser_cells(tmp_path, monkeypatch):
    folder = recorded(tmp_path, 300)
    run = RunFile.open(folder)
    assert run.grid("grad_norm", columns=1280)["stride"] == 1
    monkeypatch.setattr(cells, "MOST_BYTES", 100_000)
    assert run.grid("grad_norm", columns=1280)["stride"] == 16
    assert run.grid("grad_norm", 100, 200, columns=1280)["stride"] == 1


@settings(max_examples=60)
@given(
    span=st.integers(1, 200_000),
    points=st.integers(1, 3000),
    every=st.sampled_from([1, 3, 12, 16, 50]),
    first=st.integers(0, 5000),
)
def test_a_plan_reads_no_finer_than_a_quarter_under_the_next_level(span, points, every, first):
    level, stride = cells.plan(
        first, first + span - 1, points, every=every, row_bytes=10**3, window_bytes=10**2
    )
    wanted = max(1, every, -(-span // points))
    assert stride >= wanted
    assert stride % level == 0
    if wanted > every and level < 4096:
        assert stride / level <= 13 if level > 1 else stride <= 12


def test_a_stride_just_under_a_level_is_read_from_that_level_with_the_same_answer(tmp_path):
    run = RunFile.open(synthetic(tmp_path, steps=3000, layers=1))
    rows = run.rows(limit=3000)
    for points, table in ((200, 16), (14, 256)):  # wished: 15 and 215 steps a cell
        queries = []
        run._connection.set_trace_callback(queries.append)
        answer = run.series(range(9), "grad_norm", points=points)
        run._connection.set_trace_callback(None)
        assert answer["stride"] == table
        assert any(f"rollup_{table}" in query for query in queries)
        expected, starts = plain(rows["step"].tolist(), rows["statistics"][..., 0], table)
        for part, name in enumerate(("mean", "min", "max")):
            np.testing.assert_allclose(answer[name].T, expected[part], rtol=1e-5)
        assert (answer["step"] == np.maximum(starts, 1)).all()


@pytest.mark.parametrize("at", [None, 1, 37, 256, 4095, 4096, 4500, 9000])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_the_first_step_that_was_not_finite_is_found_in_any_level(tmp_path, at, value):
    recorder = begun(tmp_path, tensors=1)
    for step in range(1, 9001):
        if step % 3 and step != at:
            continue  # a step that was not recorded, or logs nothing, is not one that was not finite
        scalars = {"loss": value if at is not None and step >= at else 1.0} if step % 2 or step == at else {}
        recorder.step(step, step, scalars, np.ones((1, 8), np.float32))
    recorder.close()
    run = RunFile.open(tmp_path)
    assert run.first_not_finite("loss") == at
    assert run.first_not_finite("nothing") is None
    counts = run.scalars(["loss"], points=10_000)["loss"]["count"]
    assert set(counts) == {0, 1}


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda run: run.scalars(["los"]), "record.no_scalar"),
        (lambda run: run.series([0], "grad"), "record.no_statistic"),
        (lambda run: run.grid("<b>"), "record.no_statistic"),
        (lambda run: run.series([3], "grad_norm"), "record.no_tensor"),
        (lambda run: run.series([-1], "grad_norm"), "record.no_tensor"),
        (lambda run: run.grid("grad_norm", ids=[1 << 70]), "record.no_tensor"),
        (lambda run: run.histograms(3, "grad"), "record.no_tensor"),
        (lambda run: run.histograms(0, "m"), "record.no_kind"),
    ],
)
def test_a_question_about_what_there_is_not_is_answered_in_words(tmp_path, call, key):
    run = RunFile.open(recorded(tmp_path, 3))
    with pytest.raises(InputError) as caught:
        call(run)
    assert caught.value.key == key
    assert str(caught.value)


@pytest.mark.parametrize("step", [-(1 << 70), -1, 0, 4, 1 << 40, 1 << 70])
def test_ranges_and_steps_beyond_the_run_are_empty(tmp_path, step):
    run = RunFile.open(recorded(tmp_path, 3))
    assert run.row(step) is None
    first, last = (step, None) if step > 0 else (None, step)
    assert len(run.scalars(["loss"], first, last)["step"]) == 0
    assert run.grid("grad_norm", first, last)["values"].shape == (3, 0)
    assert len(run.histograms(0, "grad", first, last)["step"]) == 0
    assert len(run.weight(0, [0], first, last)["step"]) == 0
    assert len(run.rows(first, last)["step"]) == 0
    assert run.events(first=first, last=last) == []
    assert run.alerts(first, last) == []


def test_version_changes_with_whatever_is_new_and_stays_otherwise(tmp_path):
    recorder = begun(tmp_path)
    run = RunFile.open(tmp_path)
    seen = [run.version()]
    for write in (
        lambda: recorder.step(1, 1, {}, statistics(1, 3)),
        lambda: recorder.event(1, 1, "note", {}),
        lambda: recorder.alert({"id": 0, "step": 1, "cause": "dead", "severity": "warning"}),
        lambda: recorder.tensors(named(4)),
        lambda: recorder.histograms(16, np.ones((3, 3, 64), np.int64)),
        lambda: recorder.close("done"),
    ):
        assert run.version() == seen[-1]
        write()
        assert run.version() not in seen
        seen.append(run.version())


def test_a_reader_follows_a_run_that_is_started_over(tmp_path):
    begun(tmp_path).close()
    run = RunFile.open(tmp_path)
    before = run.version()
    recorder = begun(tmp_path)
    recorder.step(1, 1, {"loss": 3.0}, statistics(1, 3))
    assert run.info()["last_step"] == 1
    assert run.info()["id"] == recorder.id
    assert run.version() != before
    recorder.close()
    (tmp_path / "run.sqlite").unlink()
    with pytest.raises(InputError, match="cannot be opened"):
        run.info()


def test_reading_never_stops_the_writer_and_the_log_stays_short(tmp_path, monkeypatch):
    """Two readers at work all the time: their reads overlap, and the WAL begins again nevertheless."""
    monkeypatch.setattr(writer_file, "LONGEST_LOG", 1 << 20)
    monkeypatch.setattr(writer_file, "LOOK_EVERY", 16)
    recorder = begun(tmp_path, tensors=64)
    recorder._file.execute("PRAGMA wal_autocheckpoint = 50")
    recorder.step(0, 0, {"loss": 0.0}, statistics(0, 64))
    done, answers, failures = threading.Event(), [], []

    def read():
        run = RunFile.open(tmp_path)
        while not done.is_set():
            try:
                run.grid("grad_norm")
                answers.append(run.scalars(["loss"])["loss"]["max"][-1])
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    largest = 0
    for step in range(1, 800):
        recorder.step(step, step, {"loss": float(step)}, statistics(1, 64))
        largest = max(largest, (tmp_path / "run.sqlite-wal").stat().st_size)
    done.set()
    for thread in threads:
        thread.join()
    recorder.close()
    assert failures == []
    assert max(answers) > 100  # it saw the run grow
    assert RunFile.open(tmp_path).info()["last_step"] == 799
    assert largest < 8 << 20  # without it 17 MB, and 2 MB with it on a machine that does nothing else


def test_a_reader_cannot_write(tmp_path):
    run = RunFile.open(recorded(tmp_path, 3))
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        run._connection.execute("DELETE FROM steps")


def test_runs_are_found_three_folders_deep_newest_first(tmp_path):
    import os

    for age, place in enumerate(("a", "b/c", "b/d/e", "x/y/z/too-deep", ".hidden/run", "a/checkpoints")):
        begun(tmp_path / place).close()
        when = 1_790_000_000 - 100 * age
        os.utime(tmp_path / place / "run.sqlite", (when, when))
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    found = [path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)]
    assert [path for path in found if not path.startswith("loop")] == ["a", "b/c", "b/d/e"]
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]
    assert find_runs(tmp_path / "nowhere") == []


def test_of_too_many_alerts_the_newest_are_given(tmp_path):
    recorder = Recorder(tmp_path / "run")
    recorder.begin({"name": "run", "started": 1.0})
    for number in range(7):
        alert = {"id": number, "cause": "exploding", "severity": "fault", "step": number, "until": number}
        recorder.alert({**alert, "tensors": [], "values": {}, "key": "k", "remedy": "r"})
    recorder.close()
    found = RunFile.open(tmp_path / "run").alerts(limit=3)
    assert [alert["step"] for alert in found] == [4, 5, 6]

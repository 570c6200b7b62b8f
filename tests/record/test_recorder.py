"""What is written is what is read, and what cannot be written is refused or left out in words."""

import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

from clinometer.messages import InputError
from clinometer.record.format import histogram_codec
from clinometer.record.read.reader import RunFile
from clinometer.record.write.recorder import MOST_SCALARS, Recorder
from tests.record.running import RUN, begun, named, recorded, rows_of, statistics


def test_a_step_comes_back_bit_for_bit(tmp_path):
    recorder = begun(tmp_path, tensors=5)
    values = statistics(35, 5)
    scalars = {"loss": 0.1, "lr": 3e-4, "total_norm": math.inf, "clip": math.nan, "noise_scale": -0.0}
    recorder.step(35, 1234.5, scalars, values)
    row = RunFile.open(tmp_path).row(35)
    recorder.close()
    assert row["step"] == 35
    assert row["time"] == 1234.5
    assert row["statistics"].tobytes() == values.tobytes()
    assert list(row["scalars"]) == list(scalars)
    for name, value in scalars.items():
        assert np.float64(row["scalars"][name]).tobytes() == np.float64(value).tobytes(), name


def test_a_scalar_that_was_not_logged_is_absent_and_one_that_was_nan_is_nan(tmp_path):
    recorder = begun(tmp_path)
    strange = np.uint64(0x7FF8_0000_0000_0001).view(np.float64)  # the very bits that mean "absent"
    for step, scalars in enumerate(
        ({"loss": 1.0}, {"validation_loss": 2.0}, {"loss": math.nan}, {"loss": strange}, {}, {"loss": None})
    ):
        recorder.step(step, step, scalars, statistics(step, 3))
    recorder.close()
    run = RunFile.open(tmp_path)
    logged = [set(run.row(step)["scalars"]) for step in range(6)]
    assert logged == [{"loss"}, {"validation_loss"}, {"loss"}, {"loss"}, set(), set()]
    assert run.scalar_names() == ["loss", "validation_loss"]
    assert np.isnan(run.scalars(["loss"])["loss"]["mean"]).tolist() == [False] + 5 * [True]


def test_what_is_no_number_is_left_out_of_the_scalars(tmp_path):
    recorder = begun(tmp_path)
    recorder.step(0, 0, {"a": "x", "b": np.float32(2), "c": True, "d": [1], "e": "7"}, statistics(0, 3))
    recorder.close()
    assert RunFile.open(tmp_path).row(0)["scalars"] == {"b": 2.0, "c": 1.0, "e": 7.0}


def test_a_program_that_invents_names_is_stopped_at_a_thousand_with_one_warning(tmp_path):
    recorder = begun(tmp_path)
    recorder.step(1, 1, {f"s{i}": i for i in range(MOST_SCALARS)}, statistics(1, 3))
    with pytest.warns(RuntimeWarning, match="1000 names already") as caught:
        recorder.step(2, 2, {"more": 1, "and more": 2, "s3": 5}, statistics(2, 3))
    recorder.close()
    assert len(caught) == 1
    assert RunFile.open(tmp_path).row(2)["scalars"] == {"s3": 5.0}


def test_what_is_said_of_the_run_comes_back(tmp_path):
    recorder = begun(tmp_path / "a", tensors=2)
    recorder.step(3, 99.0, {"loss": 1.0}, statistics(3, 2))
    run = RunFile.open(tmp_path / "a")
    info = run.info()
    assert info["id"] == recorder.id == run.id
    assert len(run.id) == 12
    assert int(run.id, 16) >= 0
    for key in ("name", "started", "config", "environment", "every", "model", "optimizers"):
        assert info[key] == RUN[key], key
    assert (info["state"], info["first_step"], info["last_step"], info["updated"]) == ("live", 3, 3, 99.0)
    assert (info["numel"], info["tensor_count"], info["alert_count"]) == (12, 2, 0)
    assert run.tensors() == named(2)
    recorder.close("stopped")
    assert run.info()["state"] == "stopped"


def test_a_closed_run_is_one_plain_file(tmp_path):
    recorded(tmp_path, 40)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".run.sqlite.lock", "run.sqlite"]


def test_alerts_grow_and_close_under_their_id(tmp_path):
    recorder = begun(tmp_path)
    recorder.step(4, 4, {}, statistics(4, 3))
    alert = {
        "id": 0,
        "cause": "exploding",
        "severity": "fault",
        "step": 4,
        "until": None,
        "tensors": ["layers.0.weight"],
        "values": {"norm": np.float32(1e30), "ratio": math.inf},
        "key": "k",
        "remedy": "r",
    }
    recorder.alert(alert)
    run = RunFile.open(tmp_path)
    assert run.alerts() == [{**alert, "values": {"norm": float(np.float32(1e30)), "ratio": math.inf}}]
    recorder.alert({**alert, "until": 9, "tensors": ["layers.0.weight", "layers.1.weight"]})
    assert [(a["until"], len(a["tensors"])) for a in run.alerts()] == [(9, 2)]
    assert run.alerts(first=10) == []
    assert run.alerts(first=9) != []
    assert run.alerts(last=3) == []
    recorder.close()


def test_events_come_back_in_order_by_kind_and_range(tmp_path):
    recorder = begun(tmp_path)
    for step in range(1, 8):
        recorder.event(step, step + 0.5, "validation" if step % 2 else "checkpoint", {"loss": step})
    run = RunFile.open(tmp_path)
    assert [e["step"] for e in run.events("validation")] == [1, 3, 5, 7]
    assert [e["step"] for e in run.events("validation", first=2, last=5)] == [3, 5]
    assert [e["step"] for e in run.events(limit=2, newest=True)] == [7, 6]
    assert run.events("checkpoint", limit=1) == [
        {"id": 2, "step": 2, "time": 2.5, "kind": "checkpoint", "data": {"loss": 2}}
    ]
    recorder.close()


def test_pinned_weights_come_back_exactly_and_what_an_optimizer_lacks_is_nan(tmp_path):
    recorder = begun(tmp_path)
    theta = float(np.float32(0.1))
    for step in range(1, 51):
        recorder.step(step, step, {}, statistics(step, 3))
        row = {"tensor": 1, "index": [1, 2], "before": theta, "after": theta + step, "grad": step / 3}
        recorder.weights(step, [row, {**row, "tensor": 2, "index": []}])
    recorder.close()
    run = RunFile.open(tmp_path)
    assert run.pinned() == [{"tensor": 1, "index": [1, 2]}, {"tensor": 2, "index": []}]
    history = run.weight(1, (1, 2))
    assert history["step"].tolist() == list(range(1, 51))
    assert history["grad"].tolist() == [step / 3 for step in range(1, 51)]
    assert np.isnan(history["exp_avg_sq_after"]).all()
    few = run.weight(1, (1, 2), first=11, last=40, points=10)
    assert few["step"].tolist() == list(range(11, 41, 3))
    assert few["after"].tolist() == [theta + step for step in range(11, 41, 3)]
    assert run.weight(0, (0, 0))["step"].tolist() == []


def test_histograms_come_back_whatever_their_size(tmp_path):
    recorder = begun(tmp_path, tensors=2)
    recorder.step(16, 16, {}, statistics(16, 2))
    recorder.step(32, 32, {}, statistics(32, 2))
    counts = np.zeros((2, 3, 64), dtype=np.int64)
    counts[1, 2, 63] = 1
    counts[0, 0, :] = np.arange(64)
    recorder.histograms(16, counts)
    recorder.histograms(32, counts * (1 << 40))
    recorder.close()
    run = RunFile.open(tmp_path)
    for tensor in range(2):
        for place, kind in enumerate(("grad", "weight", "update")):
            found = run.histograms(tensor, kind)
            assert found["low_exponent"] == -48
            assert found["step"].tolist() == [16, 32]
            assert (found["counts"][0] == counts[tensor, place]).all()
            assert (found["counts"][1] == counts[tensor, place] << 40).all()
    assert (histogram_codec.decode(histogram_codec.encode(counts)) == counts).all()


def test_of_many_histograms_the_newest_are_all_kept_and_the_older_at_one_stride(tmp_path):
    kept: set[int] = set()
    recorder = begun(tmp_path, tensors=1)
    connection = recorder._file.connection
    for count in range(1, 400):
        connection.execute("INSERT INTO histograms VALUES (?, ?, x'')", (16 * count, count - 1))
        histogram_codec.thin(connection, count, most=40, newest=10)
        kept = {ordinal for (ordinal,) in connection.execute("SELECT ordinal FROM histograms")}
        stride = histogram_codec.stride_of_older(count, 40, 10)
        assert kept == {i for i in range(count) if i >= count - 10 or i % stride == 0}
        assert len(kept) <= 40
    assert stride == 16
    recorder.close()


def test_tensors_may_be_added_later_and_older_rows_are_shorter(tmp_path):
    recorder = begun(tmp_path, tensors=2)
    for step in range(1, 25):
        recorder.step(step, step, {}, np.full((2, 8), step, np.float32))
    recorder.tensors(named(4))
    for step in range(25, 41):
        recorder.step(step, step, {}, np.full((4, 8), step, np.float32))
    recorder.close()
    run = RunFile.open(tmp_path)
    assert run.row(24)["statistics"].shape == (2, 8)
    assert run.row(25)["statistics"].shape == (4, 8)
    late = run.series([3], "grad_norm")
    assert np.isnan(late["mean"][0, :24]).all()
    assert late["mean"][0, 24:].tolist() == list(range(25, 41))
    coarse = run.series([0, 3], "grad_norm", points=2)
    assert coarse["stride"] == 32
    assert coarse["mean"].tolist() == [[16.0, 36.0], [28.0, 36.0]]
    assert coarse["min"].tolist() == [[1.0, 32.0], [25.0, 32.0]]
    assert run.grid("grad_norm")["values"].shape == (4, 40)


def test_statistics_of_another_shape_are_refused(tmp_path):
    recorder = begun(tmp_path, tensors=2)
    with pytest.raises(InputError, match=r"\(3, 8\).*\(2, 8\)"):
        recorder.step(1, 1, {}, statistics(1, 3))
    recorder.step(1, 1, {}, statistics(1, 2))
    recorder.close()
    assert RunFile.open(tmp_path).info()["last_step"] == 1


def test_steps_out_of_order_are_left_out_with_one_warning(tmp_path):
    recorder = begun(tmp_path)
    recorder.step(5, 5, {"loss": 5}, statistics(5, 3))
    with pytest.warns(RuntimeWarning, match=r"Step 5 .* step 5"):
        recorder.step(5, 0, {"loss": 0}, statistics(5, 3))
    with warnings.catch_warnings(record=True) as caught:
        recorder.step(4, 0, {"loss": 0}, statistics(4, 3))
        recorder.step(-1, 0, {"loss": 0}, statistics(1, 3))
    assert caught == []
    recorder.step(6, 6, {"loss": 6}, statistics(6, 3))
    recorder.close()
    assert RunFile.open(tmp_path).scalars(["loss"])["loss"]["mean"].tolist() == [5, 6]


def test_another_model_in_the_same_run_is_refused(tmp_path):
    recorder = begun(tmp_path, tensors=2)
    other = named(2)
    other[1]["name"] = "somebody.else"
    with pytest.raises(InputError, match=r"layers\.1\.weight.*somebody\.else"):
        recorder.tensors(other)
    recorder.close()


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    recorder = begun(tmp_path)
    with pytest.raises(InputError, match="being recorded by another process"):
        Recorder(tmp_path, continue_from=0)
    script = (
        "import sys; from clinometer.record.write.recorder import Recorder\n"
        "from clinometer.messages import InputError\n"
        "try: Recorder(sys.argv[1], continue_from=0)\n"
        "except InputError as error: sys.exit(7 if error.key == 'record.in_use' else 8)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == 7
    recorder.step(1, 1, {}, statistics(1, 3))
    recorder.close()
    Recorder(tmp_path, continue_from=1).close()


def test_a_run_with_steps_is_not_written_over_but_a_start_that_died_is(tmp_path):
    recorded(tmp_path, 3)
    before = rows_of(tmp_path)
    with pytest.raises(InputError, match=r"up to step 3.*continue_from"):
        Recorder(tmp_path)
    assert rows_of(tmp_path) == before
    first = begun(tmp_path / "b")
    first.close("failed")
    second = begun(tmp_path / "b")
    assert second.id != first.id
    second.close()


def test_a_forked_child_writes_nothing_and_takes_nothing_away(tmp_path):
    """In a process of its own: pytest's has threads, and their locks would be copied as they stand."""
    script = """
import os, sys
from pathlib import Path
import pytest
from clinometer.messages import InputError
from clinometer.record.read.reader import RunFile
from clinometer.record.write.recorder import Recorder
from tests.record.running import begun, statistics
folder = Path(sys.argv[1])
recorder = begun(folder)
recorder.step(1, 1, {}, statistics(1, 3))
child = os.fork()
if child == 0:
    recorder.step(2, 2, {"loss": 1}, statistics(2, 3))
    recorder.event(2, 2, "note", {})
    recorder.alert({"id": 0, "step": 1, "cause": "x", "severity": "fault"})
    recorder.close()
    recorder._file._lock.__del__()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
run = RunFile.open(folder)
assert run.info()["state"] == "live"
assert (run.info()["last_step"], run.events(), run.alerts()) == (1, [], [])
with pytest.raises(InputError, match="another process"):
    Recorder(folder, continue_from=1)
recorder.step(2, 2, {}, statistics(2, 3))
recorder.close()
assert run.info()["last_step"] == 2
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_nothing_is_lost_when_an_exception_falls_into_the_middle_of_a_step(tmp_path):
    recorder = begun(tmp_path)
    for step in range(16):
        recorder.step(step, step, {"loss": step}, statistics(step, 3))

    class Interrupting(float):
        def __float__(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorder.step(16, 16, {"new": 1.0, "loss": Interrupting()}, statistics(16, 3))
    for step in range(16, 40):
        recorder.step(step, step, {"loss": step}, statistics(step, 3))
    recorder.close()
    run = RunFile.open(tmp_path)
    assert run.scalar_names() == ["loss"]
    assert run.scalars(["loss"])["loss"]["mean"].tolist() == list(range(40))
    assert run.scalars(["loss"], points=2)["loss"]["mean"].tolist() == [15.5, 35.5]


def test_names_are_text_whatever_they_hold(tmp_path):
    names = ["<script>alert(1)</script>", "a\nb\x00c", "x" * 10_000, "模型.权重", "half \ud83d pair", ""]
    tensors = named(len(names))
    for tensor, name in zip(tensors, names, strict=True):
        tensor["name"] = name
    recorder = Recorder(tmp_path)
    recorder.begin({**RUN, "name": names[0], "config": {names[1]: names[4], ("a", 1): {1, 2}}})
    recorder.tensors(tensors)
    recorder.step(1, 1, {"<b>": 1.0, "half \ud83d": 2.0}, statistics(1, len(names)))
    recorder.event(1, 1, names[0], {"text": names[4], "object": object})
    recorder.tensors(tensors)
    recorder.close()
    run = RunFile.open(tmp_path)
    assert [tensor["name"] for tensor in run.tensors()] == [*names[:4], "half \\ud83d pair", ""]
    assert run.info()["name"] == names[0]
    assert run.info()["config"] == {names[1]: names[4], "('a', 1)": [1, 2]}
    assert run.scalar_names() == ["<b>", "half \\ud83d"]
    assert run.events(names[0])[0]["data"]["text"] == names[4]


@pytest.mark.parametrize("tensors", [0, 1])
def test_a_run_without_tensors_or_steps_reads_as_empty(tmp_path, tensors):
    recorder = begun(tmp_path, tensors)
    run = RunFile.open(tmp_path)
    assert run.info()["first_step"] is None
    assert run.scalars([])["step"].tolist() == []
    assert run.grid("grad_norm")["values"].shape == (tensors, 0)
    assert run.series(range(tensors), "update_ratio")["mean"].shape == (tensors, 0)
    assert run.row(0) is None
    for step in range(1, 40):
        recorder.step(step, step, {"loss": 1.0}, statistics(step, tensors))
    recorder.close()
    assert run.grid("grad_norm", columns=5)["values"].shape == (tensors, 5)
    assert run.grid("grad_norm", columns=2)["values"].shape == (tensors, 2)
    assert run.scalars(["loss"], points=2)["loss"]["mean"].tolist() == [1, 1]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        Recorder(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        Recorder(tmp_path / "file" / "below")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "run.sqlite").write_text("this is no database" * 100)
    with pytest.raises(InputError, match="is not a run file"):
        Recorder(tmp_path / "text")
    with pytest.raises(InputError, match="is not a run file"):
        Recorder(tmp_path / "text", continue_from=3)
    assert (tmp_path / "text" / "run.sqlite").read_text() == "this is no database" * 100


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"):
        Recorder(tmp_path)
    tmp_path.chmod(0o700)

"""The run file of a training: what was trained is in it, and it changes nothing of the training."""

import shutil
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clinometer.record.read.reader import RunFile
from clinometer.training.replay.replay import replay_step
from clinometer.training.replay.replayed_weight import replayed_weight
from clinometer.training.run import prepare
from clinometer.training.run.loop import Outcome, train
from clinometer.training.run.recording import open_record
from clinometer.training.run.run_folder import RunFolder
from clinometer.training.settings.config import OptimConfig
from tests.training.conftest import Silent, small_config, stopped_after
from tests.training.test_loop import final_bits, spoil_at

KINDS = {
    "adamw": OptimConfig(lr=1e-2),
    "sgd": OptimConfig(name="sgd", lr=0.1, momentum=0.9),
    "muon": OptimConfig(name="muon", lr=1e-2),
    "clipped": OptimConfig(lr=1e-2, max_norm=0.05),
}
PASSING = ("seconds", "memory")
"""What two runs of the same steps may differ in."""


def run(config, path, display=None, again=False, spoil=()):
    display = display or Silent()
    session = prepare.resume(path, None, display) if again else prepare.start(config, path, display)
    if spoil:
        spoil_at(session, spoil)
    record = open_record(session, display)
    outcome = None
    try:
        outcome = train(session, display, record, display.request)
    finally:
        record.close(outcome)
        session.close()
    return outcome


def contents(path):
    file = RunFile.open(path)
    rows = {}
    for step in range(1, (file.info()["last_step"] or 0) + 1):
        row = file.row(step)
        if row is not None:
            kept = {k: v for k, v in row["scalars"].items() if k not in PASSING}
            rows[step] = (kept, row["statistics"])
    names = [t["name"] for t in file.tensors()]
    histograms = [
        file.histograms(i, kind) for i in range(len(names)) for kind in ("grad", "weight", "update")
    ]
    weights = [file.weight(p["tensor"], p["index"]) for p in file.pinned()]
    events = [(e["step"], e["kind"], e["data"]) for e in file.events() if e["kind"] != "resumed"]
    file.close()
    return names, rows, histograms, weights, events


def assert_same_contents(a, b, apart_from=frozenset()):
    """`apart_from`: (step, kind) of events that only one of them has."""
    (names, rows, histograms, weights, events), other = contents(a), contents(b)
    assert names == other[0]
    assert rows.keys() == other[1].keys()
    for step, (scalars, statistics) in rows.items():
        assert scalars == other[1][step][0], step
        np.testing.assert_array_equal(statistics, other[1][step][1], err_msg=str(step))
    for mine, theirs in zip(histograms + weights, other[2] + other[3], strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            np.testing.assert_array_equal(mine[key], theirs[key], err_msg=key)
    first, second = ([e for e in found if e[:2] not in apart_from] for found in (events, other[4]))
    assert first == second


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recording_changes_no_bit_of_the_run(corpus, tmp_path, kind, precision):
    for name, every in (("off", 0), ("on", 1)):
        config = small_config(corpus, precision=precision, micro_batch_size=2, watch_every=every)
        assert run(replace(config, optim=KINDS[kind]), tmp_path / name) is Outcome.DONE
    a, b = final_bits(tmp_path / "off"), final_bits(tmp_path / "on")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not (tmp_path / "off" / "run.sqlite").exists()


def test_the_file_holds_what_was_trained(config, tmp_path):
    display = Silent()
    run(config, tmp_path / "run", display)
    file = RunFile.open(tmp_path / "run")
    info = file.info()
    assert (info["state"], info["first_step"], info["last_step"]) == ("done", 1, 20)
    assert info["config"]["training"]["steps"] == 20
    assert info["alert_count"] == 0
    assert info["replayable"]
    for told in display.rows:
        scalars = file.row(told["step"])["scalars"]
        assert scalars["loss"] == told["loss"]
        assert scalars["lr"] == told["lr"]
        assert scalars["total_norm"] == pytest.approx(told["grad_norm"], rel=1e-6)
        assert scalars["tokens"] == 4 * 16
        assert scalars["taken"] == 1
    validations = [(e["step"], e["data"]["loss"]) for e in file.events("validation")]
    assert validations == [(step, loss) for step, loss, _ in display.validations]
    assert [e["step"] for e in file.events("sample")] == [10, 20]
    assert {e["data"]["path"] for e in file.events("checkpoint")} >= {"step-00000007", "step-00000020"}
    assert len(file.pinned()) == 5


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.lists(st.integers(1, 18), min_size=1, max_size=2, unique=True))
def test_the_file_of_a_resumed_run_is_that_of_an_uninterrupted_one(corpus, tmp_path_factory, kind, stops):
    folder = tmp_path_factory.mktemp("runs")
    config = replace(small_config(corpus, micro_batch_size=2), optim=KINDS[kind])
    run(config, folder / "whole")
    for number, stop in enumerate(sorted(stops)):
        outcome = run(config, folder / "parts", stopped_after(stop), again=number > 0)
        assert outcome is Outcome.INTERRUPTED
        assert RunFile.open(folder / "parts").info()["state"] == "stopped"
    assert run(config, folder / "parts", again=True) is Outcome.DONE
    *_, whole = contents(folder / "whole")
    # A stop writes a checkpoint of its own, which the uninterrupted run has only by chance.
    stopped = {(stop, "checkpoint") for stop in stops} - {event[:2] for event in whole}
    assert_same_contents(folder / "whole", folder / "parts", stopped)


def test_steps_that_came_after_the_last_checkpoint_are_taken_back(config, tmp_path):
    """As after kill -9: the file is ahead of the checkpoint."""
    run(config, tmp_path / "whole")
    run(config, tmp_path / "cut")
    for step in (14, 20):
        for path in (tmp_path / "cut" / "checkpoints").glob(f"step-*{step}"):
            if step == 20:
                shutil.rmtree(path)
    assert run(config, tmp_path / "cut", again=True) is Outcome.DONE
    assert_same_contents(tmp_path / "whole", tmp_path / "cut")


def test_a_step_that_is_not_taken_is_there_and_marked(config, tmp_path):
    display = Silent()
    run(config, tmp_path / "run", display, spoil={3})
    file = RunFile.open(tmp_path / "run")
    row = file.row(4)
    assert row["scalars"]["taken"] == 0
    assert (row["statistics"][:, 3] > 0).all()  # every gradient has entries that are not finite
    assert np.isinf(row["statistics"][:, 0]).all()
    assert (row["statistics"][:, 5] == 0).all()  # no weight moved
    assert file.row(5)["scalars"]["taken"] == 1
    assert file.info()["last_step"] == 20


def test_the_batch_that_is_not_finite_is_diagnosed_and_changes_no_bit(corpus, tmp_path):
    for every in (0, 1):
        config = small_config(corpus, micro_batch_size=2, watch_every=every)
        run(config, tmp_path / f"run{every}", spoil={3})
    (report,) = RunFile.open(tmp_path / "run1").events("report")
    assert report["step"] in (3, 4)  # in the middle of the fourth
    assert "result * value" in report["data"]["text"]["en"]
    a, b = final_bits(tmp_path / "run0"), final_bits(tmp_path / "run1")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "clipped"])
def test_the_replayed_steps_pinned_weights_are_the_live_ones_bit_for_bit(corpus, tmp_path, kind):
    config = replace(small_config(corpus, micro_batch_size=2), optim=KINDS[kind])
    path = tmp_path / "run"
    run(config, path)
    file = RunFile.open(path)
    names = [t["name"] for t in file.tensors()]
    fields = (
        "before",
        "after",
        "grad",
        "exp_avg_before",
        "exp_avg_after",
        "exp_avg_sq_before",
        "exp_avg_sq_after",
    )
    for step in (1, 7, 8, 13, 20):
        replay_step(path, step, lambda *_: None)
        for pin in file.pinned():
            live = file.weight(pin["tensor"], pin["index"], step, step)
            again = replayed_weight(path, step, names[pin["tensor"]], tuple(pin["index"]))
            for field in (*fields, "clip", "lr", "weight_decay"):
                if field in again:
                    assert float(live[field][0]) == again[field], (step, names[pin["tensor"]], field)


def test_a_run_file_that_is_no_run_file_costs_the_record_and_not_the_training(config, tmp_path):
    display = Silent()
    run(config, tmp_path / "run", stopped_after(8))
    (tmp_path / "run" / "run.sqlite").write_bytes(b"not a database" * 100)
    assert run(config, tmp_path / "run", display, again=True) is Outcome.DONE
    assert "train.unrecorded" in [key for key, _ in display.notices]
    assert (tmp_path / "run" / "run.sqlite").read_bytes().startswith(b"not a database")


def test_a_run_from_before_there_were_run_files_goes_on_with_one(config, tmp_path):
    run(config, tmp_path / "run", stopped_after(8))
    (tmp_path / "run" / "run.sqlite").unlink()
    assert run(config, tmp_path / "run", again=True) is Outcome.DONE
    info = RunFile.open(tmp_path / "run").info()
    assert (info["first_step"], info["last_step"]) == (9, 20)


def test_a_run_file_that_vanishes_stops_no_training(config, tmp_path):
    display = stopped_after(0)

    def vanish(row, keep=display.step):
        keep(row)
        if row["step"] == 5:
            (tmp_path / "run" / "run.sqlite").unlink()

    display.step = vanish
    with pytest.warns(RuntimeWarning):
        assert run(config, tmp_path / "run", display) is Outcome.DONE


def test_every_nth_step_is_recorded_if_so_asked(corpus, tmp_path):
    run(small_config(corpus, watch_every=6), tmp_path / "run")
    with sqlite3.connect(tmp_path / "run" / "run.sqlite") as file:
        steps = [step for (step,) in file.execute("SELECT step FROM steps ORDER BY step")]
    assert steps == [1, 7, 13, 19]
    assert RunFolder.open(tmp_path / "run").config.training.watch_every == 6

"""The same numbers in TensorBoard's files and in any tracker that logs as Weights & Biases does."""

import subprocess
import sys

import numpy as np
import pytest

from clinometer.messages import InputError
from clinometer.record.out.trackers import TensorBoard, Tracker
from tests.record.running import RUN, named

ALERT = {"id": 0, "cause": "dead", "severity": "warning", "step": 2, "until": None}


def feed(sink, steps=5):
    """Step s has loss s, and statistics 100·tensor + 10·column + s; tensor 1 has no gradient."""
    sink.begin(RUN)
    sink.tensors(named(2))
    for step in range(1, steps + 1):
        values = np.fromfunction(lambda t, c, s=step: 100 * t + 10 * c + s, (2, 8)).astype(np.float32)
        values[1, 0] = np.nan
        sink.step(step, 1e9 + step, {"loss": float(step), "clip": None}, values)
        if step == 2:
            sink.alert(ALERT)
            counts = np.zeros((2, 3, 64), np.int64)
            counts[0, 0, 40:42] = 3, 5
            sink.histograms(step, counts)
            sink.weights(step, [{"tensor": 1, "index": [0, 2], "before": 1.0, "after": 2.0, "grad": 0.5}])
        if step == 4:
            sink.event(step, 1e9 + step, "validation", {"loss": 0.25, "best": True})
            sink.event(step, 1e9 + step, "note", {"text": "x"})
            sink.alert({**ALERT, "until": 4})
    sink.close("done")
    sink.close("done")


def test_tensorboard_shows_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    feed(TensorBoard(tmp_path, every=2))
    read = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "histograms": 0})
    read.Reload()

    def curve(tag):
        return [(e.step, e.value) for e in read.Scalars(tag)]

    assert curve("loss") == [(s, float(s)) for s in range(1, 6)]
    assert curve("grad_max/layers.1.weight") == [(s, 110.0 + s) for s in (1, 3, 5)]
    assert curve("alerts") == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 0)]
    assert curve("validation_loss") == [(4, 0.25)]
    assert curve("weight/layers.1.weight[0, 2]") == [(2, 2.0)]
    assert "grad_norm/layers.1.weight" not in read.Tags()["scalars"]
    assert "clip" not in read.Tags()["scalars"]
    assert read.Scalars("loss")[0].wall_time == 1e9 + 1
    (histogram,) = read.Histograms("grad/layers.0.weight")
    bars = histogram.histogram_value
    assert histogram.step == 2
    assert list(bars.bucket) == [3.0, 5.0]
    assert list(bars.bucket_limit) == [2.0**-7, 2.0**-6]
    assert (bars.num, bars.min, bars.max) == (8.0, 2.0**-8, 2.0**-6)


class Tracking:
    def __init__(self):
        self.rows = {}

    def log(self, data, *, step):
        assert step not in self.rows, "a tracker drops what comes for a step it has left"
        assert all(isinstance(name, str) for name in data)
        self.rows[step] = data


def test_a_tracker_gets_everything_of_a_step_in_one_call():
    run = Tracking()
    feed(
        Tracker(run, every=4, histogram=lambda counts, edges: (counts.tolist(), edges.tolist()), prefix="c/")
    )
    assert list(run.rows) == [1, 2, 3, 4, 5]
    assert run.rows[2] == {
        "c/loss": 2.0,
        "c/alerts": 0.0,
        "c/grad/layers.0.weight": ([3, 5], [-8, -7, -6]),
        "c/weight/layers.1.weight[0, 2]": 2.0,
        "c/weight_grad/layers.1.weight[0, 2]": 0.5,
    }
    assert run.rows[4] == {"c/loss": 4.0, "c/alerts": 1.0, "c/validation_loss": 0.25}
    assert len(run.rows[1]) == len(run.rows[5]) == 2 + 15
    assert run.rows[5]["c/cosine/layers.0.weight"] == 65.0


def test_what_cannot_be_a_sink_is_refused_in_words(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"has no method log"):
        Tracker(object())  # pyright: ignore
    with pytest.raises(InputError, match="every = 0"):
        Tracker(Tracking(), every=0)
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    with pytest.raises(InputError, match=r"clinometer\[tensorboard\]"):
        TensorBoard(tmp_path)


def test_the_sinks_need_no_torch(tmp_path):
    script = (
        "import sys; from clinometer.record import TensorBoard; TensorBoard(sys.argv[1]).close()\n"
        "import clinometer.record.write.recorder, clinometer.record.read.reader, clinometer.commands.runs\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)

"""Tables as a pandas user expects them, and the list of runs."""

import csv
import io
import json
import math
import sys
from datetime import UTC, datetime

import numpy as np
import pytest
from rich.console import Console

from clinometer.commands.runs import export_command, one_line, runs_command
from clinometer.messages import InputError, set_language
from clinometer.record.out.table_export import TABLES, export
from clinometer.record.read.reader import RunFile
from clinometer.vocabulary import STATISTICS
from tests.record.running import begun, recorded, statistics
from tests.record.synthetic import synthetic


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def run(tmp_path):
    recorder = begun(tmp_path / "run", tensors=2)
    recorder.step(1, 1e9, {"loss": 0.1, "lr": 3e-4}, statistics(1, 2))
    recorder.step(2, 1e9 + 0.5, {"loss": math.nan, "step": 7.0}, statistics(5, 2))
    recorder.step(3, 1e9 + 1, {"lr": math.inf}, statistics(7, 2))
    recorder.close()
    return RunFile.open(tmp_path / "run")


def test_steps_are_one_row_each_with_a_column_for_each_scalar(run, tmp_path):
    assert export(run, tmp_path / "a.csv") == 3
    assert read_csv(tmp_path / "a.csv") == [
        {"step": "1", "time": "2001-09-09T01:46:40+00:00", "loss": "0.1", "lr": "0.0003", "step.logged": ""},
        {
            "step": "2",
            "time": "2001-09-09T01:46:40.500000+00:00",
            "loss": "nan",
            "lr": "",
            "step.logged": "7.0",
        },
        {"step": "3", "time": "2001-09-09T01:46:41+00:00", "loss": "", "lr": "inf", "step.logged": ""},
    ]


def test_tensors_are_one_row_for_each_step_and_tensor_exact_in_float32(run, tmp_path):
    assert export(run, tmp_path / "t.csv", "tensors", first=2) == 4
    rows = read_csv(tmp_path / "t.csv")
    assert [(row["step"], row["tensor"]) for row in rows] == [
        (step, f"layers.{i}.weight") for step in "23" for i in (0, 1)
    ]
    found = np.array([[row[name] for name in STATISTICS] for row in rows]).astype(np.float32)
    np.testing.assert_array_equal(found, np.concatenate([statistics(5, 2), statistics(7, 2)]))


def test_parquet_keeps_types_and_tells_absent_from_nan(run, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    export(run, tmp_path / "a.parquet")
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table["loss"].to_pylist()[0] == 0.1
    assert math.isnan(table["loss"].to_pylist()[1])
    assert table["loss"].to_pylist()[2] is None
    assert table["time"].to_pylist()[0] == datetime(2001, 9, 9, 1, 46, 40, tzinfo=UTC)
    export(run, tmp_path / "t.parquet", "tensors")
    table = parquet.read_table(tmp_path / "t.parquet")
    assert table.column_names == ["step", "tensor", *STATISTICS]
    assert str(table.schema.field("cosine").type) == "float"
    expected = np.concatenate([statistics(s, 2) for s in (1, 5, 7)])
    np.testing.assert_array_equal(np.stack([table[name].to_numpy() for name in STATISTICS], 1), expected)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("table", TABLES)
def test_every_table_of_a_whole_run_and_of_an_empty_one_is_written(tmp_path, suffix, table):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    whole = RunFile.open(synthetic(tmp_path / "whole", steps=1100, layers=1))
    wanted = {"steps": 1100, "tensors": 9900, "alerts": 2, "events": 10, "weights": 1100}
    assert export(whole, tmp_path / f"whole.{suffix}", table) == wanted[table]
    begun(tmp_path / "empty", tensors=0).close()
    assert export(RunFile.open(tmp_path / "empty"), tmp_path / f"empty.{suffix}", table) == 0
    assert (tmp_path / f"empty.{suffix}").stat().st_size > 0
    assert not list(tmp_path.glob(".*tmp"))


def test_what_is_nested_is_json(tmp_path):
    whole = RunFile.open(synthetic(tmp_path / "whole", steps=300, layers=1))
    export(whole, tmp_path / "alerts.csv", "alerts")
    alerts = read_csv(tmp_path / "alerts.csv")
    assert [json.loads(alert["values"]) for alert in alerts] == [{"count": 7}] * 2
    assert json.loads(alerts[0]["tensors"]) == ["lm_head.weight"]
    assert [alert["until"] for alert in alerts] == ["100", ""]


def test_nothing_is_written_over_or_left_half(run, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("mine")
    for to, table, key in (
        ("a.csv", "steps", "record.export_exists"),
        ("a.xlsx", "steps", "record.export_suffix"),
        ("b.csv", "everything", "record.no_table"),
        ("nowhere/b.csv", "steps", "record.not_writable"),
    ):
        with pytest.raises(InputError) as caught:
            export(run, tmp_path / to, table)
        assert caught.value.key == key
        assert str(caught.value)
    assert (tmp_path / "a.csv").read_text() == "mine"
    export(run, tmp_path / "a.csv", overwrite=True)
    assert len(read_csv(tmp_path / "a.csv")) == 3
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'clinometer\[parquet\]'"):
        export(run, tmp_path / "a.parquet")


def shown(call, *arguments, **options):
    console = Console(file=io.StringIO(), width=120, color_system=None)
    assert call(console, *arguments, **options) == 0
    return console.file.getvalue()  # pyright: ignore


def test_runs_are_listed_with_their_state_and_loss(tmp_path):
    recorded(tmp_path / "a", 40)
    synthetic(tmp_path / "b", steps=300, layers=1, state="crashed", name="[bold]<b>x\ny")
    begun(tmp_path / "c").close("failed")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "run.sqlite").write_text("no run" * 100)
    text = shown(runs_command, tmp_path)
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert lines["a"].split()[2:6] == ["done", "40", "0.25", "-"]
    assert "[bold]<b>x�y" in lines["b"]
    assert "crashed" in lines["b"]
    assert lines["c"].split()[2:6] == ["failed", "-", "-", "-"]
    assert "unreadable" in lines["d"]
    assert "is not a run file" in text
    set_language("zh")
    try:
        assert "崩溃" in shown(runs_command, tmp_path)
    finally:
        set_language(None)


def test_where_there_are_no_runs_it_says_how_to_make_one(tmp_path):
    assert "clinometer train" in shown(runs_command, tmp_path)
    with pytest.raises(InputError, match="There is no folder"):
        runs_command(Console(), tmp_path / "nowhere")


def test_export_says_how_many_rows_went_where(tmp_path):
    recorded(tmp_path / "a", 1200, tensors=1)
    text = shown(export_command, tmp_path / "a", tmp_path / "a.csv", first=101)
    assert "1,100 rows" in text
    assert "a.csv" in text


def test_names_that_would_upset_a_terminal_are_shown_on_one_line():
    assert one_line("a\x1b[31m\nb\u202e") == "a�[31m�b�"
    assert len(one_line("x" * 1000)) == 60

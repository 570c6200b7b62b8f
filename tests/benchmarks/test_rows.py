"""The rows a benchmark keeps: their arithmetic, and the file that holds one machine."""

import json

import pytest

from benchmarks import rows


def test_a_paired_row_takes_the_median_of_the_rounds_ratios_and_not_the_ratio_of_the_medians():
    row = rows.paired("adamw-20m", "torch", [1.0, 4.0, 9.0], [1.0, 8.0, 3.0], "s")
    assert (row.ours, row.theirs, row.ratio) == (4.0, 3.0, 1.0)
    assert (row.low, row.high, row.rounds) == (0.5, 3.0, 3)


def test_from_four_rounds_on_the_spread_is_the_quartiles():
    assert rows.spread([1.0, 2.0, 3.0]) == (1.0, 3.0)
    assert rows.spread([1.0, 2.0, 3.0, 4.0, 500.0]) == (2.0, 4.0)


def test_rounds_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError):
        rows.paired("adamw-20m", "torch", [1.0], [1.0, 2.0], "s")


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "no-such-row", "unit": "s"},
        {"name": "record", "unit": "s"},
        {"name": "adamw-20m", "unit": "s"},
        {"name": "record", "unit": "µs", "peer": "SQLite"},
        {"name": "record", "unit": "µs", "theirs": 1.0},
        {"name": "record", "unit": "µs", "rounds": 0},
    ],
    ids=["unknown", "another unit", "no ratio", "a peer without a figure", "a figure of nobody", "no round"],
)
def test_a_row_that_says_too_little_is_refused(wrong):
    with pytest.raises(ValueError, match=r"."):
        rows.Row(ours=1.0, **wrong)


def test_one_benchmark_repeated_alone_leaves_the_other_rows(tmp_path):
    file = tmp_path / "machine.json"
    rows.keep(file, [rows.alone("record", [41.0, 43.0, 42.0], "µs")])
    rows.keep(file, [rows.paired("adamw-20m", "torch", [1.0], [2.0], "s")])
    rows.keep(file, [rows.paired("adamw-20m", "torch", [3.0], [4.0], "s")])
    kept = rows.read(file)["rows"]
    assert kept["record"]["ours"] == 42.0
    assert kept["adamw-20m"]["ratio"] == 0.75
    assert {"date", "commit", "command", "torch"} <= kept["adamw-20m"].keys()


def test_what_is_missing_is_named_and_takes_no_figure_away(tmp_path, capsys):
    file = tmp_path / "machine.json"
    rows.keep(file, [rows.alone("record", [1.0], "µs")], missing={"watch-large-cockpit": "Cockpit"})
    rows.keep(file, missing={"record": "numpy"})
    kept = rows.read(file)
    assert kept["missing"] == {"watch-large-cockpit": "Cockpit"}
    assert "record" in kept["rows"]
    assert "skipped: watch-large-cockpit (Cockpit is missing)" in capsys.readouterr().out
    rows.keep(file, [rows.paired("watch-large-cockpit", "Cockpit", [1.0], [1.0], "s")])
    assert rows.read(file)["missing"] == {}


def test_a_file_of_another_machine_is_refused_and_left_as_it_was(tmp_path):
    file = tmp_path / "machine.json"
    rows.keep(file, [rows.alone("record", [1.0], "µs")])
    other = rows.read(file)
    other["machine"]["processor"] = "Abacus"
    rows.write(file, other)
    with pytest.raises(SystemExit, match="Abacus"):
        rows.keep(file, [rows.alone("record", [2.0], "µs")])
    assert rows.read(file) == other


def test_without_a_file_nothing_is_kept_and_what_is_missing_is_still_said(capsys):
    rows.keep(None, [rows.alone("record", [1.0], "µs")], missing={"loss-cold": "nanoGPT"})
    assert "loss-cold (nanoGPT is missing)" in capsys.readouterr().out


def test_points_come_back_and_stand_on_one_line_each(tmp_path):
    file = tmp_path / "machine.json"
    rows.keep(
        file, [rows.alone("growth-batch-time", [1.02], "exponent", points=[(1, 0.123456789), (4, 0.5)])]
    )
    assert rows.read(file)["rows"]["growth-batch-time"]["points"] == [[1.0, 0.12346], [4.0, 0.5]]
    assert "[1.0, 0.12346]" in file.read_text()
    assert json.loads(file.read_text()) == rows.read(file)


def test_the_command_says_no_path_of_this_machine():
    said = rows.command(
        [
            "/a/benchmarks/training.py",
            "--nanogpt",
            "/b/nanoGPT",
            "--text=/c/x.txt",
            "--rounds",
            "2",
            "--json",
            "d",
        ]
    )
    assert said == "python -m benchmarks.training --nanogpt PATH --text=PATH --rounds 2"
    assert (
        rows.command(["benchmarks/check.py", "--json=a.json", "--gpt2"])
        == "python -m benchmarks.check --gpt2"
    )


def test_the_file_is_called_after_what_may_not_change_in_it():
    facts = {"processor": "AMD EPYC (Zen 4)", "cores": 2}
    assert rows.file_name(facts) == "amd-epyc-zen-4-2-cores.json"
    assert rows.file_name(facts | {"device": "NVIDIA H100"}) == "amd-epyc-zen-4-2-cores-nvidia-h100.json"

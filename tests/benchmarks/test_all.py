"""`python -m benchmarks`: what is missing is named, no error stops it, the pages speak of one machine."""

import argparse
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as everything
from benchmarks import growth, rows, table, watching


def given(**more):
    return argparse.Namespace(**{"nanogpt": None, "text": None, "quick": False, **more})


def named(name):
    return next(one for one in everything.BENCHMARKS if one.name == name)


def test_without_nanogpt_each_of_its_rows_is_named_and_nothing_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setattr(rows, "commit", lambda: "")
    file = tmp_path / "machine.json"
    assert everything.run(named("training"), given(), file)
    said = capsys.readouterr().out
    assert "not given: --nanogpt PATH, --text PATH" in said
    assert "skipped: loss-cold (nanoGPT is missing)" in said
    asked = {entry.name for entry in table.catalogue().values() if entry.benchmark == "training"}
    assert rows.read(file)["missing"] == dict.fromkeys(asked, "nanoGPT")


def test_each_benchmark_is_called_with_its_arguments_and_the_file(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: called.append(command[1:]) or SimpleNamespace(returncode=0)
    )
    file = tmp_path / "machine.json"
    assert everything.run(named("optimizer"), given(), file)
    assert called == [
        ["-m", "benchmarks.optimizer", *size, "--json", str(file)]
        for size in (["--params", "20e6"], ["--gpt2"])
    ]
    called.clear()
    everything.run(named("training"), given(nanogpt="there", text="it.txt"), file)
    assert all(command[2:6] == ["--nanogpt", "there", "--text", "it.txt"] for command in called)
    assert called


def test_an_error_in_one_is_reported_and_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    ran = []

    def run(benchmark, given, results):
        ran.append(benchmark.name)
        return benchmark.name != "recording"

    monkeypatch.setattr(everything, "run", run)
    monkeypatch.setattr(table, "RESULTS", table.ROOT / "build" / tmp_path.name)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "recording,optimizer"])
    assert everything.main() == 1
    assert ran == ["optimizer", "recording"]
    assert "ended with an error, see above: recording" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "watchng"], "no benchmark is called watchng"),
        (["--nanogpt", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(everything, "run", None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as ended:
        everything.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_pages_speak_of_another_machine_only_when_told_to(tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr(table, "write_pages", lambda kept: written.append(kept) or [])
    facts = {"processor": "Abacus", "cores": 1}
    for name in ("theirs.json", "ours.json"):
        rows.write(tmp_path / name, {"machine": facts, "rows": {}, "missing": {}})
    (tmp_path / "published").write_text("theirs.json\n")
    kept = rows.read(tmp_path / "ours.json")
    everything.publish(kept, tmp_path / "ours.json", False)
    assert not written
    assert "Abacus, 1 cores" in capsys.readouterr().out
    everything.publish(kept, tmp_path / "ours.json", True)
    assert written == [kept]
    assert (tmp_path / "published").read_text() == "ours.json\n"


def test_the_exponent_is_the_slope_between_the_last_two_points_of_a_round():
    sizes = (100, 400, 1600)
    curve = [[{"batch": size, "time": 5 + size**2.0}] * 2 for size in sizes]
    assert growth.exponents(curve, "batch", "time") == pytest.approx([2.0, 2.0], abs=1e-4)
    assert growth.slope([(1, 3), (2, 9), (16, 48)]) == pytest.approx(1.0)


def test_an_axis_of_growth_is_four_and_sixteen_times_its_first_size_and_moves_alone():
    for axis, changes in growth.AXES.items():
        (key,) = set().union(*changes)
        sizes = [change[key] for change in changes]
        assert sizes[0] == growth.BASE[key]
        factor = 2 if axis == "parameters" else 4  # parameters grow with the square of the width
        assert [size // sizes[0] for size in sizes] == [1, factor, factor**2]


def test_a_round_of_watching_holds_sixteen_steps_and_so_one_histogram():
    seconds = [1.0] * 40
    seconds[5] = seconds[21] = 17.0
    assert watching.sixteens(seconds) == [2.0, 2.0]
    assert watching.sixteens([1.0, 3.0]) == [2.0]

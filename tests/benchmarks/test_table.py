"""What the pages say is what was measured, in both languages, and misses no row that was asked for."""

import re
import xml.etree.ElementTree as ElementTree
from fractions import Fraction

import pytest

from benchmarks import __main__ as everything
from benchmarks import figure, rows, table

ASKED_FOR = {
    "whole process to a loss, cold": ["loss-cold"],
    "whole process to a loss, warm": ["loss-warm"],
    "loss after nanoGPT's wall time": ["loss-same-time"],
    "training tokens a second": ["speed-float32", "speed-bf16"],
    "share of the matmul rate": ["matmul-share"],
    "peak memory": ["memory"],
    "loop overhead": ["loop"],
    "AdamW": ["adamw-20m", "adamw-124m", "adamw-20m-bandwidth", "adamw-124m-bandwidth"],
    "watch": ["watch-large"],
    "watch's peers": ["watch-large-wandb", "watch-large-tensorboard", "watch-large-cockpit"],
    "watch on a small model": ["watch-small"],
    "record": ["record"],
    "check, small": ["check-small"],
    "check, GPT-2": ["check-gpt2", "check-gpt2-memory"],
    "diagnose": ["diagnose-gpt2"],
    "tokenizer": ["tokenizer-training", "tokenizer-encoding", "tokenizer-cores", "tokenizer-memory"],
    "generation": ["generation-1", "generation-32"],
    "import and help": ["import", "help"],
    "first step": ["first-step"],
    "growth": [f"growth-{axis}-{of}" for axis in figure.AXES for of in ("time", "memory")],
}
MEASURED = {
    "loss-cold",
    "speed-float32",
    "speed-bf16",
    "record",
    "check-small",
    "check-gpt2",
    "diagnose-gpt2",
}


@pytest.fixture(scope="module")
def kept():
    return rows.read(table.published())


def row(**more):
    made = {
        "date": "2026-11-25",
        "commit": "",
        "command": "python -m benchmarks.x",
        "torch": "2",
        "unit": "s",
    }
    return {"ours": 1.0, "rounds": 1, **made, **more}


def marked(path):
    return {
        place: found
        for _, place, found in re.findall(
            r"(<!-- bench: ([a-z-]+) -->\n)(.*?)<!-- end -->", path.read_text(encoding="utf-8"), re.DOTALL
        )
    }


def test_every_row_that_was_asked_for_has_its_place_and_its_target():
    for asked, names in ASKED_FOR.items():
        for name in names:
            assert name in table.catalogue(), asked
            assert table.catalogue()[name].target is not None or asked == "watch's peers", name


@pytest.mark.parametrize("language", table.LANGUAGES)
def test_pages_readme_and_drawing_say_what_the_committed_rows_say(kept, language):
    for path in (table.PAGES[language], table.READMES[language]):
        text = path.read_text(encoding="utf-8")
        assert table.fill(text, kept, language) == text, (
            f"{path.name}: run python -m benchmarks.table --write"
        )
    assert table.DRAWINGS[language].read_text(encoding="utf-8") == figure.growth(kept, language)


@pytest.mark.parametrize("language", table.LANGUAGES)
def test_a_page_has_every_table(language):
    places = {entry.group for entry in table.catalogue().values()} | {"machine", "limits", "origins"}
    assert marked(table.PAGES[language]).keys() == places
    assert marked(table.READMES[language]).keys() == {"readme"}


def test_both_languages_carry_the_same_figures(kept):
    for entry in table.catalogue().values():
        english, chinese = (table.cells(entry, kept, language) for language in table.LANGUAGES)
        if entry.name in kept["rows"]:
            for column in (1, 3, 4, 5, 6):
                said = chinese[column].replace("token/秒", "tokens/s").replace("秒", "s")
                assert said == english[column], entry.name
        else:
            assert english[3:5] == chinese[3:5] == ["", ""], entry.name
    english, chinese = (marked(table.PAGES[language]) for language in table.LANGUAGES)
    assert len(english) == len(chinese)


def test_what_misses_its_target_says_in_both_languages_what_holds_it_back(kept):
    for entry in table.catalogue().values():
        if entry.target is not None:
            assert entry.limit is not None, entry.name
            assert all(entry.limit[language].strip() for language in table.LANGUAGES), entry.name
    missed = [
        n for n, e in table.catalogue().items() if n in kept["rows"] and e.reached(kept["rows"][n]) is False
    ]
    for language in table.LANGUAGES:
        said = table.limits(kept, language)
        assert [name for name in table.catalogue() if f"- `{name}`" in said] == missed


def test_the_committed_rows_are_of_the_catalogue_and_name_no_path_of_a_machine(kept):
    assert kept["rows"].keys() | kept["missing"].keys() <= table.catalogue().keys()
    assert kept["rows"].keys() >= MEASURED
    for name, found in kept["rows"].items():
        assert found["unit"] == table.catalogue()[name].unit
        # benchmarks.training has the loop's rows measured by benchmarks.loop, in a process of its own.
        module = "loop" if name.startswith("loop") else table.catalogue()[name].benchmark
        assert found["command"].startswith(f"python -m benchmarks.{module} ".rstrip())
        assert "/" not in found["command"].replace("tokens/s", "")
    assert rows.file_name(kept["machine"]) == table.published().name


def test_every_row_is_measured_by_a_benchmark_that_runs_with_the_others():
    assert {entry.benchmark for entry in table.catalogue().values()} == {
        one.name for one in everything.BENCHMARKS
    }


def test_every_word_stands_in_both_languages():
    english, chinese = (table.words(language) for language in table.LANGUAGES)
    assert chinese.keys() == english.keys() | {"tokens/s"}
    for key, said in english.items():
        if isinstance(said, str):
            assert sorted(re.findall(r"\{\w+\}", said)) == sorted(re.findall(r"\{\w+\}", chinese[key])), key
        else:
            assert len(said) == len(chinese[key])
    for entry in table.catalogue().values():
        for both in (entry.peer, entry.limit):
            assert both is None or both.keys() == {"en", "zh"}, entry.name


@pytest.mark.parametrize(
    ("value", "shown", "said"),
    [
        (0.3143, "fraction", "1/3.18"),
        (0.0125, "fraction", "1/80.0"),
        (1.25, "fraction", "1.25×"),
        (1.942, "times", "1.94×"),
        (1.0074, "over", "+0.7 %"),
        (0.9981, "over", "−0.2 %"),
        (0.527, "share", "53 %"),
    ],
)
def test_a_ratio_is_said_as_it_is_talked_about(value, shown, said):
    assert table.ratio(value, shown) == said


@pytest.mark.parametrize(
    ("figures", "english", "chinese"),
    [
        ((1264.0, "tokens/s"), "1,264 tokens/s", "1,264 token/秒"),
        ((33.62, "s"), "33.6 s", "33.6 秒"),
        ((0.01034, "s"), "10.3 ms", "10.3 ms"),
        ((0.8, "s", 23.0), "0.8 s", "0.8 秒"),
        ((1.8857, "loss"), "1.886", "1.886"),
        ((0.963, "exponent"), "0.963", "0.963"),
        ((101.5, "s"), "102 s", "102 秒"),
        ((0.0, "MB"), "0 MB", "0 MB"),
    ],
)
def test_a_figure_has_three_digits_and_its_unit(figures, english, chinese):
    value, unit, *beside = figures
    assert table.figure(value, unit, "en", *beside) == english
    assert table.figure(value, unit, "zh", *beside) == chinese


def test_a_target_is_met_by_the_figure_and_not_by_its_rounding():
    entry = table.Entry(
        name="x", group="g", benchmark="b", unit="s", shown="times", en="", zh="", at_most=Fraction("1.05")
    )
    assert entry.reached(row(ratio=1.05)) is True
    assert entry.reached(row(ratio=1.0500001)) is False
    assert table.ratio(1.0500001, "times") == "1.05×"
    assert table.catalogue()["loss-cold"].reached(row(ratio=1 / 6)) is True
    assert table.catalogue()["speed-bf16-bf16"].reached(row(ratio=0.1)) is None
    assert table.catalogue()["check-gpt2"].reached(row(ours=301.0)) is False


def test_a_row_shows_its_quartiles_only_if_there_was_more_than_one_round():
    spread = {"ratio": 1.007, "low": 1.003, "high": 1.012}
    assert table.with_spread(row(**spread, rounds=6), "over") == "+0.7 % (+0.3 % … +1.2 %)"
    assert table.with_spread(row(**spread, rounds=1), "over") == "+0.7 %"
    assert table.with_spread(row(), "own") == ""


def test_what_is_missing_is_named_in_its_row():
    nothing = {"machine": {}, "rows": {}, "missing": {"watch-large-cockpit": "Cockpit"}}
    said = table.cells(table.catalogue()["watch-large-cockpit"], nothing, "en")
    assert said[1] == "not measured: Cockpit was missing"
    assert table.cells(table.catalogue()["record"], nothing, "zh")[1] == "尚未测量"


def test_only_what_stands_between_the_marks_is_written(kept):
    text = "before\n<!-- bench: machine -->\nold\n<!-- end -->\nafter | 1.2 |\n"
    filled = table.fill(text, kept, "en")
    assert (
        filled
        == f"before\n<!-- bench: machine -->\n{table.machine_line(kept, 'en')}\n<!-- end -->\nafter | 1.2 |\n"
    )
    assert table.fill(filled, kept, "en") == filled
    with pytest.raises(KeyError, match="nonsense"):
        table.fill("<!-- bench: nonsense -->\n<!-- end -->", kept, "en")


def test_the_drawing_shows_each_point_where_it_belongs():
    curve = {"points": [[2.0, 10.0], [8.0, 40.0], [32.0, 80.0]], "ours": 0.5}
    drawn = figure.growth({"rows": {"growth-batch-time": curve}}, "en")
    tree = ElementTree.fromstring(drawn)
    (line,) = tree.iter("{http://www.w3.org/2000/svg}polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    across, up = points[1][0] - points[0][0], points[0][1] - points[1][1]
    assert across / figure.WIDE == pytest.approx(up / figure.HIGH, abs=2e-3), (
        "four times as much: on the straight line"
    )
    assert (points[1][1] - points[2][1]) / up == pytest.approx(0.5, abs=5e-3), (
        "twice as much is half a fourfold"
    )
    assert drawn.count("not measured yet") == 2 * len(figure.AXES) - 1
    assert "exponent 0.50" in "".join(tree.itertext())


def test_a_point_beyond_the_panel_is_held_at_its_edge():
    assert figure.place(0, 99) == (figure.place(0, 0)[0], 0)

"""Figures: valid Plotly, strict JSON, both languages and themes, and captions that tell the truth."""

import json
import math
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

import clinometer.view
from clinometer.messages import sentences
from clinometer.record.read.reader import RunFile
from clinometer.record.write.recorder import Recorder
from clinometer.view import figures
from clinometer.view.figures import colours
from clinometer.view.figures.gradient_map import read_map
from clinometer.view.figures.loss import smooth_out
from clinometer.view.figures.order import in_order
from clinometer.view.figures.strip import last_values, strip
from clinometer.view.figures.style import four, percent, times
from clinometer.view.figures.words import alert_sentences
from clinometer.vocabulary import STATISTICS
from tests.view.conftest import EVIL, NAME, record


def every_figure(run, language, theme, **steps):
    looks = {"language": language, "theme": theme}
    tensor = next(t for t in run.tensors() if t["name"] == NAME)
    pin = run.pinned()[0]
    pinned = next(t for t in run.tensors() if t["id"] == pin["tensor"])
    weight = {"tensor": pinned, "index": pin["index"]}
    yield "loss", figures.loss(run, **looks, **steps)
    yield "lr", figures.lr(run, **looks, **steps)
    yield "norm", figures.norm(run, **looks, **steps)
    yield "speed", figures.speed(run, **looks, **steps)
    for stat in (*STATISTICS, "update_ratio", "grad_rms"):
        yield f"map {stat}", figures.gradient_map(run, stat=stat, columns=100, **looks, **steps)
        yield f"tensor {stat}", figures.tensor(run, tensor=tensor, stat=[stat], **looks, **steps)
    for kind in ("grad", "weight", "update"):
        yield f"ridge {kind}", figures.ridge(run, tensor=tensor, kind=kind, **looks, **steps)
        yield f"histogram {kind}", figures.histogram(run, tensor=tensor, kind=kind, step=900, **looks)
    yield "waterfall", figures.waterfall(run, step=900, **weight, **looks)
    yield "weight_history", figures.weight_history(run, **weight, **looks, **steps)
    yield "compare", figures.compare([run, run], **looks, **steps)


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


@pytest.mark.parametrize("theme", colours.THEMES)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_figure_is_valid_strict_and_says_what_is_healthy(run, language, theme):
    for name, figure in every_figure(run, language, theme):
        assert figure.empty is None, name
        json.dumps(figure.to_dict(), allow_nan=False)
        go.Figure(figure.to_plotly())  # raises for anything Plotly does not know
        assert figure.caption, name
        assert "{" not in figure.caption
        assert not any("{" in text.replace("%{", "") for text in strings(figure.layout)), name
        if language == "zh":
            assert any("一" <= c <= "鿿" for c in figure.caption), name
        assert "title" not in figure.layout


def test_every_axis_that_is_seen_has_a_title_and_steps_are_numbers(run):
    for name, figure in every_figure(run, "en", "light"):
        axes = {key: axis for key, axis in figure.layout.items() if key[1:5] == "axis"}
        assert {"xaxis", "yaxis"} <= set(axes)
        for key, axis in axes.items():
            if axis.get("visible", True) and axis.get("type") != "category":
                assert axis["title"]["text"], f"{name} {key}"
        if axes["xaxis"]["title"]["text"] == "step":
            assert axes["xaxis"]["type"] == "linear"
            if name != "compare":  # its runs have each their own length
                assert axes["xaxis"]["range"] == [0.5, 2000.5]
        assert figure.layout["uirevision"]


def test_a_zoom_asks_for_its_steps_alone_and_keeps_the_zoom(run):
    near = figures.loss(run, first=100, last=200)
    far = figures.loss(run)
    train = next(trace for trace in near.data if trace.get("name") == "training")
    assert train["x"][0] == 100
    assert train["x"][-1] == 200
    assert near.layout["uirevision"] == far.layout["uirevision"]


def test_the_loss_is_the_recorded_one(run):
    figure = figures.loss(run, first=1, last=50)
    train = next(trace for trace in figure.data if trace["name"] == "training")
    assert train["y"] == [run.row(step)["scalars"]["loss"] for step in range(1, 51)]
    valid = next(trace for trace in figures.loss(run).data if trace.get("name") == "validation")
    assert valid["x"] == list(range(250, 2001, 250))


def run_of(folder, losses, **scalars):
    recorder = Recorder(folder)
    recorder.begin(
        {"name": "r", "started": 1.79e9, "config": {}, "environment": {}, "every": 1}
        | {"statistics": list(STATISTICS), "model": "Net", "optimizers": []}
    )
    recorder.tensors([])
    for step, loss in enumerate(losses, 1):
        more = {name: values[step - 1] for name, values in scalars.items()}
        recorder.step(step, 1.79e9 + step, {"loss": loss, **more}, np.zeros((0, 8), np.float32))
    recorder.close("done")
    return RunFile.open(folder)


def test_the_loss_caption_names_the_losses_of_the_steps_it_names(tmp_path):
    losses = 10.0 * 0.9 ** np.arange(50)
    caption = figures.loss(run_of(tmp_path / "run", losses)).caption
    assert "from 10.00 (step 1) to 0.05726 (step 50)" in caption, caption


def test_the_loss_caption_tells_falling_from_level_from_rising(tmp_path):
    rng = np.random.default_rng(0)
    noise = 0.02 * rng.standard_normal(400)
    cases = {
        "still falling": 3 - np.linspace(0, 2, 400),
        "does not change by more than its noise": np.full(400, 2.0),
        "has been rising": 1 + np.linspace(0, 2, 400),
    }
    for i, (words, losses) in enumerate(cases.items()):
        caption = figures.loss(run_of(tmp_path / str(i), losses + noise)).caption
        assert words in caption, caption
        assert sum(other in caption for other in cases) == 1


def test_a_loss_that_is_not_finite_is_a_gap_and_is_said(tmp_path):
    losses = [2.0, 1.9, float("nan"), 1.7, float("inf"), 1.6]
    figure = figures.loss(run_of(tmp_path / "r", losses))
    train = next(trace for trace in figure.data if trace["name"] == "training")
    assert train["y"] == [2.0, 1.9, None, 1.7, None, 1.6]
    assert "Its first value that is not finite is at step 3" in figure.caption


def test_clip_events_are_marked_where_they_were(tmp_path):
    clip = [1.0, 0.5, 1.0, 0.25]
    norm = [0.5, 2.0, 0.9, 4.0]
    run = run_of(tmp_path / "r", [1.0] * 4, clip=clip, total_norm=norm, max_norm=[1.0] * 4)
    figure = figures.norm(run)
    marks = next(trace for trace in figure.data if trace["name"] == "clipped")
    assert marks["x"] == [2, 4]
    assert marks["y"] == [2.0, 4.0]
    assert "50 % of the steps shown were clipped" in figure.caption
    limit = next(trace for trace in figure.data if trace["name"] == "limit (max_norm)")
    assert limit["y"] == [1.0] * 4


def test_speed_is_tokens_over_seconds_and_steps_where_no_tokens_are_counted(tmp_path):
    run = run_of(tmp_path / "a", [1.0] * 3, tokens=[100.0] * 3, seconds=[0.5, 0.25, 1.0])
    assert figures.speed(run).data[0]["y"] == [200.0, 400.0, 100.0]
    run = run_of(tmp_path / "b", [1.0] * 2, seconds=[0.5, 0.25])
    figure = figures.speed(run)
    assert figure.data[0]["y"] == [2.0, 4.0]
    assert "steps per second" in figure.layout["yaxis"]["title"]["text"]


def test_the_map_hatches_zeros_alarms_at_what_is_not_finite_and_names_both(run):
    figure = figures.gradient_map(run, columns=400)
    heat, alarm, bars = figure.data
    assert heat["type"] == alarm["type"] == "heatmap"
    dead = run.tensors()[4]["name"]
    assert bars["y"] == [dead]
    # Zero from step 1,001 on: the hatch begins with the first column that is wholly zero.
    assert 1000 <= bars["base"][0] <= 1010
    assert f"Zero lately: {dead}" in figure.caption
    assert "lm_head.weight" in figure.caption
    cells = read_map(run, columns=400)
    assert cells.dead.sum() == 1
    first = cells.dead_from(4)
    assert (cells.values[4, first:] == 0).all()
    assert cells.values[4, first - 1] > 0
    assert cells.alarm.sum() == 1


def test_a_healthy_map_accuses_nobody(tmp_path):
    run = RunFile.open(record(tmp_path / "r", ["a", "b", "c"]))
    caption = figures.gradient_map(run).caption
    assert "Zero" not in caption
    assert "below" not in caption
    assert "First not finite" not in caption
    assert len(figures.gradient_map(run).data) == 1


def test_the_map_names_the_row_that_lies_apart(tmp_path):
    recorder = Recorder(tmp_path / "r")
    recorder.begin(
        {"name": "r", "started": 1.79e9, "config": {}, "environment": {}, "every": 1}
        | {"statistics": list(STATISTICS), "model": "Net", "optimizers": []}
    )
    shared = {"shape": [4], "dtype": "float32", "numel": 4, "group": 0}
    recorder.tensors(
        [
            {"id": i, "name": f"layers.{i}.v", "layer": i, "kind": "v", "position": i, **shared}
            for i in range(4)
        ]
    )
    rows = np.ones((4, 8), np.float32)
    rows[3, 0] = 1 / 40
    for step in range(1, 41):
        recorder.step(step, 1.79e9 + step, {}, rows)
    recorder.close("done")
    caption = figures.gradient_map(RunFile.open(tmp_path / "r")).caption
    assert "layers.3.v is 40× below similar tensors" in caption


def test_names_are_text_in_every_figure(tmp_path):
    run = RunFile.open(record(tmp_path / "r", [EVIL], name=EVIL))
    (tensor,) = run.tensors()
    shown = [
        figures.gradient_map(run),
        figures.tensor(run, tensor=tensor),
        figures.compare([run, run]),
    ]
    for figure in shown:
        assert "<img" not in json.dumps(figure.to_plotly())
        # A caption is plain text: what it says of a name is the name.
        assert "&lt;" not in figure.caption
    other = RunFile.open(record(tmp_path / "s", ["w"], name="short"))
    assert EVIL in figures.compare([run, other]).caption


def test_the_strip_says_not_finite_with_the_first_step_where_it_was(tmp_path):
    nan, inf = float("nan"), float("inf")
    for i, (losses, since) in enumerate(
        [([2.0, nan, 1.8, inf], 2), ([2.0] * 300 + [nan], 301), ([nan] * 300, 1), ([nan, 2.0], None)]
    ):
        run = run_of(tmp_path / str(i), losses)
        loss = strip(run, "en")[0]
        assert loss["not_finite_since"] == since
        assert last_values(run)["not_finite_since"] == since
        if since is None:
            assert (loss["text"], loss["unit"]) == ("2.000", "")
        else:
            assert (loss["text"], loss["unit"]) == ("not finite", f"(first at step {since})")
            assert strip(run, "zh")[0]["text"] == "非有限值"


def test_a_weights_waterfall_adds_up_to_what_happened(run):
    pin = run.pinned()[0]
    tensor = run.tensors()[pin["tensor"]]
    figure = figures.waterfall(run, tensor=tensor, index=pin["index"], step=900)
    (trace,) = figure.data
    found = run.weight(tensor["id"], pin["index"], 900, 900)
    assert trace["y"][0] == found["before"][0]
    assert trace["y"][-1] == found["after"][0]
    assert math.isclose(sum(trace["y"][:-1]), trace["y"][-1], rel_tol=1e-12)
    low, high = figure.layout["yaxis"]["range"]
    assert low < trace["y"][0] < high


def test_a_weight_that_is_not_pinned_says_what_to_do(run):
    tensor = run.tensors()[0]
    for figure in (
        figures.weight_history(run, tensor=tensor, index=[0, 0]),
        figures.waterfall(run, tensor=tensor, index=[0, 0], step=3),
    ):
        assert "pin(name, index)" in figure.empty
        assert figure.to_dict()["figure"] is None


def test_underflow_is_marked_where_float16_ends(run):
    figure = figures.ridge(run, tensor=run.tensors()[0], kind="update")
    assert [shape["y0"] for shape in figure.layout["shapes"]] == [-25.5, -14.5]
    assert any("float16" in note["text"] for note in figure.layout["annotations"])
    assert any("bfloat16" in note["text"] for note in figure.layout["annotations"])


def test_float16_itself_agrees_about_where_it_ends():
    assert np.float16(2.0**-25) == 0
    assert np.float16(2.0**-25 * 1.001) > 0
    assert np.finfo(np.float16).smallest_normal == 2.0**-14


def test_smoothing_does_not_lag_and_keeps_a_constant():
    np.testing.assert_allclose(smooth_out(np.full(50, 3.0), 0.9), 3.0)
    line = np.linspace(0, 1, 201)
    assert abs(smooth_out(line, 0.9)[100] - 0.5) < 1e-6
    broken = np.array([1.0, np.nan, 1.0])
    assert np.isnan(smooth_out(broken, 0.5)[1])
    np.testing.assert_array_equal(smooth_out(line, 0.0), line)


def test_layers_have_their_kinds_in_one_order():
    def tensor(number, layer, kind):
        return {"id": number, "name": f"{layer}.{kind}", "layer": layer, "kind": kind, "position": number}

    mixed = [
        tensor(0, None, "embed"),
        tensor(1, 0, "ffn.w1"),
        tensor(2, 0, "attn.q_proj"),
        tensor(3, 0, "odd"),
        tensor(4, 1, "odd"),
        tensor(5, 1, "attn.q_proj"),
        tensor(6, 1, "ffn.w1"),
        tensor(7, None, "head"),
    ]
    assert [t["id"] for t in in_order(mixed)] == [0, 2, 1, 3, 5, 6, 4, 7]


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (1.0, "1.000"),
        (0.41182, "0.4118"),
        (9999.4, "9999"),
        (9999.6, "1.000e+04"),
        (0.001, "0.001000"),
        (0.00099999, "1.000e-03"),
        (-2.5e-7, "−2.500e-07"),
        (float("nan"), "–"),
        (float("inf"), "∞"),
        (3.4028234663852886e38, "≥ 3.403e+38"),  # float32's largest: a norm that float32 cannot hold
        (3.4e38, "3.400e+38"),
        (None, "–"),
    ],
)
def test_numbers_have_four_digits(x, text):
    assert four(x) == text


def test_factors_and_shares_are_said_shortly():
    assert [times(x) for x in (1.26, 40.2, 12345.6, float("inf"))] == ["1.3", "40", "12,346", "∞"]
    assert [percent(x) for x in (0.0, 0.0012, 0.5, -0.031)] == ["0", "0.12", "50", "−3.1"]


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", colours.THEMES)
def test_what_is_read_stands_out_from_its_paper(theme):
    tokens = colours.tokens(theme)
    read = [name for name in tokens if name not in ("paper", "panel", "rule", "faint")]
    for name in read:
        for paper in ("paper", "panel"):
            low, high = sorted((luminance(tokens[name]), luminance(tokens[paper])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{name} on {paper}"


def test_the_maps_scale_rises_evenly_in_lightness():
    steps = np.diff([luminance(colour) ** (1 / 3) for _, colour in colours.scale("light")])
    assert (steps > 0).all()
    assert steps.max() < 3 * steps.min()


def test_an_alert_is_said_with_its_values_and_a_strange_one_by_its_name(monkeypatch):
    planted = {"alert.x.what": "Step {step}: {count} {count|tensor|tensors}, {ratio}: {names}"}
    words = {**sentences("en"), **planted, "view.token": "secret {step}"}
    monkeypatch.setattr("clinometer.view.figures.words.sentences", lambda language: words)
    monkeypatch.setattr("clinometer.messages._below", lambda language, first: words)
    alert = {"cause": "x", "step": 1200, "tensors": list("abcde"), "values": {"ratio": 1.23456e-7}}
    said = alert_sentences({**alert, "key": "alert.x.what", "remedy": "alert.x.remedy"}, "en")
    assert said == ("Step 1,200: 5 tensors, 1.235e-07: a, b, c and 2 more", "")
    assert alert_sentences({**alert, "key": "alert.x.what", "values": {}}, "en") == ("x", "")
    assert alert_sentences({**alert, "key": "view.token", "remedy": 3}, "en") == ("x", "")


PUT_TOGETHER = ("healthy_", "power_", "source_")
NAMED_BY_DATA = ("figure.statistic", "figure.unit", "figure.choice", "report.states", "view.stage")


def test_every_sentence_of_the_room_is_said_somewhere():
    view = Path(clinometer.view.__file__).parent
    files = [*view.rglob("*.py"), *(view.parent / "commands").rglob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)

    def is_said(key):
        rest = key.partition(".")[2]
        family, _, last = key.rpartition(".")
        tail = next((last.removeprefix(p) for p in PUT_TOGETHER if last.startswith(p)), last)
        quoted = [mark + part + mark for part in (key, rest, last, tail) for mark in "'\""]
        return family in NAMED_BY_DATA or any(part in source for part in quoted)

    keys = [key for key in sentences("en") if key.partition(".")[0] in ("view", "figure", "report")]
    assert len(keys) > 150
    by_family = ("figure.tensor.healthy_",)  # the first word of a statistic's name
    assert [key for key in keys if not is_said(key) and not key.startswith(by_family)] == []

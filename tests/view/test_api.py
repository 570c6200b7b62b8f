"""What the routes answer: shapes, bounds, errors in both languages, and that the description is true."""

import base64
import json

import numpy as np
import pytest
from starlette.routing import Route

from clinometer.messages import sentences
from clinometer.view.http.openapi import description
from clinometer.view.http.server import make_app
from tests.view.conftest import NAME, OWN, open_client, record


def get(client, path, status=200, **query):
    answer = client.get(path, params=query)
    assert answer.status_code == status, answer.text
    return json.loads(answer.text, parse_constant=_not_in_json)


def _not_in_json(word):
    raise AssertionError(f"{word} is no JSON")


def test_the_list_tells_state_loss_speed_and_a_sparkline_of_each_run(client):
    told = get(client, "/api/runs")
    assert {run["name"] for run in told["runs"]} == {"first", "second"}
    first = next(run for run in told["runs"] if run["name"] == "first")
    assert first["state"] == "done"
    assert first["folder"] == "a"
    assert first["speed"] == pytest.approx(4096 / 0.25, rel=0.05)
    assert 0 < len(first["spark"]) <= 100
    assert {run["state"] for run in told["runs"]} == {"done", "crashed", "stopped"}
    assert told["broken"] == []


def test_a_run_tells_its_tensors_in_display_order_and_its_alerts_in_words(client, identity):
    told = get(client, f"/api/runs/{identity}")
    assert len(told["tensors"]) == told["tensor_count"] == 30
    layers = [t["layer"] for t in told["tensors"] if t["layer"] is not None]
    assert layers == sorted(layers)
    assert {"id", "name", "shape", "dtype", "numel", "layer", "kind", "position"} <= set(told["tensors"][0])
    assert [alert["cause"] for alert in told["alerts"]] == ["non-finite", "dead"]
    assert all(alert["text"] for alert in told["alerts"])
    assert told["pinned"][0]["name"] in {t["name"] for t in told["tensors"]}
    assert told["replayable"] is False
    assert "folder" in told
    assert "/" not in told["folder"]


def test_the_strip_has_its_four_numbers_in_order(client, identity):
    numbers = get(client, f"/api/runs/{identity}/strip", lang="zh")["numbers"]
    assert [n["name"] for n in numbers] == ["loss", "norm", "speed", "alerts"]
    assert [n["label"] for n in numbers] == ["损失", "梯度范数", "速度", "警报"]
    assert all(len(n["spark"]) == len(n["step"]) <= 100 for n in numbers)
    assert numbers[3]["value"] == 2


def test_the_map_is_the_runs_numbers_cell_by_cell(client, identity, run):
    told = get(client, f"/api/runs/{identity}/map", **{"from": 1, "to": 100, "columns": 200})
    values = np.frombuffer(base64.b64decode(told["values"]), dtype="<f4").reshape(
        told["rows"], told["columns"]
    )
    assert told["step"] == list(range(1, 101))
    for column in (0, 50, 99):
        row = run.row(told["step"][column])["statistics"][told["ids"], 0]
        np.testing.assert_array_equal(values[:, column], row)


def test_cells_that_are_not_finite_raise_the_alarm_in_every_statistic(client, identity):
    for statistic in ("grad_norm", "weight_norm", "update_ratio"):
        told = get(client, f"/api/runs/{identity}/map", stat=statistic, columns=400)
        alarm = np.frombuffer(base64.b64decode(told["alarm"]), np.uint8).reshape(told["rows"], -1)
        assert alarm.sum() == 1
        assert alarm[-1].any()
        at = told["step"][int(alarm[-1].argmax())]
        assert at <= 666 < at + told["stride"]


def test_a_recorded_row_is_told_in_the_tensors_order(client, identity, run):
    told = get(client, f"/api/runs/{identity}/step", step=1500)
    names = told["statistics"]["names"]
    row = told["statistics"]["rows"][4]
    assert row[names.index("grad_zeros")] == 1.0
    assert told["scalars"]["tokens"] == 4096.0
    assert told["statistics"]["rows"][3][0] is None  # no gradient: null, not NaN
    assert get(client, f"/api/runs/{identity}/step", 404, step=9999)["error"]["key"] == "view.no_step"


def test_events_come_newest_first_and_bounded(client, identity):
    events = get(client, f"/api/runs/{identity}/events", kind="validation", limit=3)["events"]
    assert [event["step"] for event in events] == [2000, 1750, 1500]
    assert get(client, f"/api/runs/{identity}/events", 400, limit=5000)["error"]["key"] == "view.between"


def test_reports_speak_the_language_that_was_asked_for(tmp_path):
    from clinometer.record.write.recorder import Recorder

    folder = record(tmp_path / "r", ["w"])
    recorder = Recorder(folder, continue_from=20)
    text = {"en": "Looked at 1 parameter.", "zh": "看了 1 个参数。"}
    data = {"kind": "diagnosis", "title": "t", "document": {"healthy": True}, "text": text}
    recorder.event(20, 1.79e9, "report", data)
    recorder.close("done")
    with open_client(tmp_path) as client:
        identity = get(client, "/api/runs")["runs"][0]["id"]
        (told,) = get(client, f"/api/runs/{identity}/reports", lang="zh")["reports"]
        assert told["text"] == text["zh"]
        assert told["document"] == {"healthy": True}
        (event,) = get(client, f"/api/runs/{identity}/events", kind="report")["events"]
        assert "document" not in event["data"]


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("map?stat=nonsense", "view.choice"),
        ("map?columns=100000", "view.between"),
        ("map?columns=-5", "view.between"),
        ("map?from=9&to=3", "view.order"),
        ("map?from=1e3", "view.between"),
        ("map?from=" + "9" * 400, "view.between"),
        ("map?tensors=" + ",".join(["1"] * 1001), "view.too_many"),
        ("map?tensors=999", "view.no_tensor"),
        ("figure/loss?points=10", "view.between"),
        ("figure/loss?smooth=nan", "view.between"),
        ("figure/loss?theme=pink", "view.choice"),
        ("figure/nonsense", "view.no_figure"),
        ("figure/tensor", "view.needed"),
        ("figure/tensor?tensor=nobody", "view.no_tensor"),
        (f"figure/tensor?tensor={NAME}&stat=a,b,c,d,e", "view.too_many"),
        (f"figure/ridge?tensor={NAME}&kind=loss", "view.choice"),
        (f"figure/waterfall?tensor={NAME}&index=1&step=3", "view.index"),
        (f"figure/waterfall?tensor={NAME}&index=1,999&step=3", "view.index"),
        (f"figure/waterfall?tensor={NAME}&index=1,-1&step=3", "view.between"),
        (f"figure/waterfall?tensor={NAME}&index=1,2", "view.needed"),
        (f"matrix?step=3&tensor={NAME}", "view.no_replay"),
        ("step", "view.needed"),
        ("batch", "view.needed"),
        ("token?position=0,0", "view.needed"),
        ("token?step=3&position=0,0", "view.no_replay"),
    ],
)
def test_bad_values_get_a_sentence_in_both_languages(client, identity, path, key):
    for language in ("en", "zh"):
        answer = client.get(f"/api/runs/{identity}/{path}{'&' if '?' in path else '?'}lang={language}")
        assert 400 <= answer.status_code < 500, answer.text
        error = answer.json()["error"]
        assert error["key"] == key
        assert error["text"].startswith(sentences(language)[key].split("{")[0])


def test_answers_are_revalidated_and_change_with_the_run(tmp_path):
    from clinometer.record.write.recorder import Recorder

    folder = record(tmp_path / "r", ["w"])
    with open_client(tmp_path) as client:
        identity = get(client, "/api/runs")["runs"][0]["id"]
        path = f"/api/runs/{identity}/figure/loss"
        first = client.get(path)
        tag = first.headers["etag"]
        assert client.get(path, headers={"if-none-match": tag}).status_code == 304
        assert client.get(path, params={"lang": "zh"}, headers={"if-none-match": tag}).status_code == 200
        recorder = Recorder(folder, continue_from=20)
        recorder.step(21, 1.79e9 + 21, {"loss": 1.0}, np.ones((1, 8), np.float32))
        recorder.close("done")
        again = client.get(path, headers={"if-none-match": tag})
        assert again.status_code == 200
        assert again.json()["version"] != first.json()["version"]


def test_big_answers_are_compressed_where_that_is_wished(client, identity):
    path = f"/api/runs/{identity}/figure/loss"
    packed = client.get(path, headers={"accept-encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.json() == client.get(path).json()


def test_the_pages_sentences_are_all_there_in_both_languages(client):
    for language in ("en", "zh"):
        told = get(client, "/api/messages", lang=language)
        assert told["messages"] == {k: v for k, v in sentences(language).items() if k.startswith("page.")}


def test_the_description_lists_every_route_and_every_route_is_described(runs):
    app = make_app(runs)
    served = {
        (route.path, method.lower())
        for route in app.routes
        if isinstance(route, Route) and route.path.startswith("/api/")
        for method in route.methods or ()
        if method != "HEAD"
    }
    document = description()
    described = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert described == served
    json.dumps(document)


def test_a_method_that_is_not_served_is_refused_in_json(client, identity):
    answer = client.post(f"/api/runs/{identity}", headers=OWN, json={})
    assert answer.status_code == 405
    assert answer.json()["error"]["key"] == "view.no_method"


def test_runs_are_compared_and_namesakes_kept_apart(client):
    ids = [run["id"] for run in get(client, "/api/runs")["runs"]]
    for metric in ("loss", "norm", "speed", "lr"):
        told = get(client, "/api/compare", ids=",".join(ids), metric=metric)
        labels = [trace["name"] for trace in told["figure"]["data"]]
        assert len(set(labels)) == len(ids)
        assert told["caption"]
    assert get(client, "/api/compare", 404, ids="0" * 12)["error"]["key"] == "view.no_run"
    assert get(client, "/api/compare", 400, ids=",".join(["x"] * 21))["error"]["key"] == "view.too_many"

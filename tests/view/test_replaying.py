"""Replays: one at a time, progress, cancel, errors in words, and what a replayed step shows."""

import base64
import json
import os
import signal
import sys
import time

import numpy as np
import pytest
from safetensors import safe_open

from clinometer.record.replays.replays import Replay
from clinometer.view.errors import ApiError
from clinometer.view.jobs import Replays
from tests.view.conftest import OWN, open_client

TENSOR = "layers.0.attn.q_proj.weight"
PATIENCE = 300.0

WORKER = """
import json, os, signal, sys, time
def stopped(number, frame):
    open(os.path.join(os.environ["MARKS"], "stopped"), "w").close()
    sys.exit(143)
if os.environ.get("DEAF"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, stopped)
with open(os.path.join(os.environ["MARKS"], "called"), "a") as file:
    file.write(json.dumps([sys.argv[1:], os.environ["CLINOMETER_LANG"]]) + "\\n")
for line in os.environ["SAYS"].split("|"):
    print(line, flush=True)
print("a warning", file=sys.stderr, flush=True)
time.sleep(float(os.environ["SLEEPS"]))
sys.exit(int(os.environ["CODE"]))
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Replays with a worker that says and does what a test wants."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setenv("MARKS", str(tmp_path))
    monkeypatch.setenv("CLINOMETER_CACHE", str(tmp_path / "cache"))
    made = []

    def make(says="", sleeps=0.0, code=0, deaf=""):
        for name, value in {"SAYS": says, "SLEEPS": sleeps, "CODE": code, "DEAF": deaf}.items():
            monkeypatch.setenv(name, str(value))
        made.append(Replays([sys.executable, str(script)]))
        return made[-1]

    yield make
    for replays in made:
        replays.close()


def wait(found, states=("done", "failed", "cancelled")):
    end = time.monotonic() + PATIENCE
    while found() not in states:
        assert time.monotonic() < end, found()
        time.sleep(0.02)
    return found()


def calls(tmp_path):
    return [json.loads(line) for line in (tmp_path / "called").read_text().splitlines()]


def test_the_worker_is_told_run_step_and_weight_and_tells_progress(worker, tmp_path):
    says = '{"progress": 3, "total": 9, "stage": "replay"}|no json|[1]|{"done": "x"}'
    job, new = worker(says).start("r", tmp_path, 7, "-a b", (1, 2), language="zh")
    assert new
    assert wait(lambda: job.state) == "done"
    told = job.to_dict("zh")
    assert (told["progress"], told["total"], told["stage"]) == (3, 9, "replay")
    assert told["stage_text"] == "正在重放各步"
    ((arguments, language),) = calls(tmp_path)
    assert arguments == [
        "explain",
        str(tmp_path.resolve()),
        "--step",
        "7",
        "--machine",
        "--parameter=-a b",
        "--index=1,2",
    ]
    assert language == "zh"


def test_one_runs_at_a_time_and_the_same_wish_gets_the_same_job(worker, tmp_path):
    replays = worker(sleeps=60)
    job, _ = replays.start("r", tmp_path, 7, None, None, language="en")
    again, new = replays.start("r", tmp_path, 7, None, None, language="en")
    assert again is job
    assert not new
    with pytest.raises(ApiError) as busy:
        replays.start("r", tmp_path, 8, None, None, language="en")
    assert busy.value.status == 409
    assert busy.value.body("en")["job"]["id"] == job.id
    replays.cancel(job.id)
    other, new = replays.start("r", tmp_path, 8, None, None, language="en")
    assert new
    replays.cancel(other.id)


def test_a_cancelled_worker_is_asked_to_stop(worker, tmp_path):
    replays = worker(sleeps=60)
    job, _ = replays.start("r", tmp_path, 7, None, None, language="en")
    wait(lambda: (tmp_path / "called").exists(), (True,))
    assert replays.cancel(job.id).state == "cancelled"
    wait(lambda: (tmp_path / "stopped").exists(), (True,))
    wait(lambda: job.process, (None,))
    assert job.state == "cancelled"


def test_a_deaf_worker_is_ended(worker, tmp_path, monkeypatch):
    monkeypatch.setattr("clinometer.view.jobs.GRACE_SECONDS", 0.2)
    replays = worker(sleeps=60, deaf="1")
    job, _ = replays.start("r", tmp_path, 7, None, None, language="en")
    wait(lambda: (tmp_path / "called").exists(), (True,))
    process = job.process
    replays.cancel(job.id)
    assert process.wait(PATIENCE) == -signal.SIGKILL


def test_the_worker_ends_with_the_server(worker, tmp_path):
    replays = worker(sleeps=60)
    job, _ = replays.start("r", tmp_path, 7, None, None, language="en")
    wait(lambda: (tmp_path / "called").exists(), (True,))
    process = job.process
    replays.close()
    assert process.wait(PATIENCE) is not None
    with pytest.raises(ApiError):
        replays.start("r", tmp_path, 8, None, None, language="en")


def test_the_workers_error_is_told_in_its_words(worker, tmp_path):
    says = '{"error": "no such step", "key": "view.no_step"}'
    job, _ = worker(says, code=2).start("r", tmp_path, 7, None, None, language="en")
    assert wait(lambda: job.state) == "failed"
    assert job.to_dict("en")["error"] == {"key": "view.no_step", "text": "no such step"}


@pytest.mark.parametrize("says", ["", '{"progress": "x", "total": -1, "stage": "odd"}', "x" * 100_000])
def test_a_worker_that_dies_is_a_failure_with_its_last_words(worker, tmp_path, says):
    job, _ = worker(says, code=3).start("r", tmp_path, 7, None, None, language="en")
    assert wait(lambda: job.state) == "failed"
    assert "a warning" in job.to_dict("en")["error"]["text"]
    assert (job.progress, job.total, job.stage) == (0, 0, "start")


def test_a_worker_that_cannot_start_is_a_failure(tmp_path):
    replays = Replays([str(tmp_path / "nothing")])
    job, _ = replays.start("r", tmp_path, 7, None, None, language="zh")
    assert wait(lambda: job.state) == "failed"
    assert job.to_dict("zh")["error"]["text"].startswith("重放失败")


def test_old_jobs_are_forgotten(worker, tmp_path):
    replays = worker('{"done": "x"}')
    for step in range(3):
        job, _ = replays.start("r", tmp_path, step, None, None, language="en")
        wait(lambda job=job: job.state)
    for step in range(30):
        replays._keep(type(job)("r", tmp_path, step, None, None))
    assert len(replays.all()) == 20


@pytest.fixture(scope="module")
def replayed(trained):
    """The application over a really trained run, step 9 replayed for one weight by POST."""
    with open_client(trained) as client:
        (run,) = client.get("/api/runs").json()["runs"]
        base = f"/api/runs/{run['id']}"
        body = {"step": 9, "tensor": TENSOR, "index": [3, 5]}
        answer = client.post(f"{base}/replay", json=body, headers=OWN)
        assert answer.status_code == 202, answer.text
        job = f"/api/jobs/{answer.json()['job']['id']}"
        state = wait(lambda: client.get(job).json()["job"]["state"])
        assert state == "done", client.get(job).text
        yield client, base, trained


def test_a_click_replays_the_step_and_is_remembered(replayed):
    client, base, _ = replayed
    assert client.get(f"{base}/replays").json() == {"steps": [9], "replayable": True}
    again = client.post(f"{base}/replay", json={"step": 9, "tensor": TENSOR, "index": [3, 5]}, headers=OWN)
    assert again.status_code == 200
    assert again.json()["job"]["state"] == "done"
    assert client.post(f"{base}/replay", json={"step": 99}, headers=OWN).status_code == 404


def test_a_matrix_is_the_replayed_tensor_and_shrinks_to_what_was_asked_for(replayed):
    client, base, folder = replayed
    query = {"step": 9, "tensor": TENSOR, "kind": "grad"}
    told = client.get(f"{base}/matrix", params=query).json()
    with safe_open(Replay.open(folder, 9).path / "tensors.safetensors", framework="numpy") as file:
        grad = file.get_tensor(f"{TENSOR}.grad")
    shape = (told["height"], told["width"])
    values = np.frombuffer(base64.b64decode(told["values"]), "<f4").reshape(shape)
    np.testing.assert_array_equal(values, grad)
    assert told["shape"] == list(grad.shape)
    assert abs(told["largest"]["value"]) == pytest.approx(float(np.abs(grad).max()))
    small = client.get(f"{base}/matrix", params={**query, "height": 4, "width": 4}).json()
    assert (small["height"], small["width"], small["block"]) == (4, 4, [4, 4])
    part = client.get(f"{base}/matrix", params={**query, "rows": "2,5", "cols": "1,3"}).json()
    assert (part["rows"], part["cols"], part["height"], part["width"]) == ([2, 5], [1, 3], 3, 2)
    for bad in ({"kind": "loss"}, {"height": 9999}, {"rows": "5,2"}, {"rows": "1"}, {"step": 8}):
        assert 400 <= client.get(f"{base}/matrix", params={**query, **bad}).status_code < 500


def test_a_weight_tells_its_anatomy_and_who_pushed_it(replayed):
    client, base, _ = replayed
    query = {"step": 9, "tensor": TENSOR, "index": "3,5", "rows": 2}
    told = client.get(f"{base}/weight", params={**query, "lang": "zh"}).json()
    assert told["state"] == "ready"
    assert "谁推动了" in told["attribution_text"]
    assert np.shape(told["tokens"]) == np.shape(told["pieces"]) == (2, 16)
    assert told["sequences"] == 4
    every = client.get(f"{base}/weight", params={**query, "rows": 64}).json()
    assert np.sum(every["tokens"]) == pytest.approx(told["entry"]["grad"], rel=1e-4)
    assert told["largest"] == np.abs(every["tokens"]).max()
    assert "matrix" not in told["attribution"]
    other = client.get(f"{base}/weight", params={**query, "index": "0,0"}).json()
    assert other["state"] == "step"
    assert other["entry"]["before"] is not None
    assert client.get(f"{base}/weight", params={**query, "step": 8}).json()["state"] == "none"


def test_the_waterfall_of_a_replay_tells_earlier_batches_from_this_one(replayed):
    client, base, _ = replayed
    query = {"step": 9, "tensor": TENSOR, "index": "3,5"}
    answer = client.get(f"{base}/figure/waterfall", params=query)
    assert "etag" not in answer.headers  # the run file's version says nothing about replays
    told = answer.json()
    (trace,) = told["figure"]["data"]
    assert trace["x"][:4] == ["θ before", "earlier batches", "this batch", "decay"]
    entry = client.get(f"{base}/entry", params=query).json()
    assert trace["y"][0] == pytest.approx(entry["before"], rel=1e-6)
    assert trace["y"][-1] == pytest.approx(entry["after"], rel=1e-6)
    assert sum(trace["y"][:-1]) == pytest.approx(trace["y"][-1], rel=1e-9)
    assert told["caption"].endswith("Replayed.")


def test_the_batch_is_told_token_by_token_in_pages(replayed):
    client, base, _ = replayed
    told = client.get(f"{base}/batch", params={"step": 9, "row": 1, "rows": 2}).json()
    assert told["state"] == "ready"
    assert told["exact"] is True
    assert (told["sequences"], told["row"], told["rows"]) == (4, 1, 2)
    names = ("token_ids", "targets", "pieces", "target_pieces", "loss_per_token", "grad_norm")
    assert {np.shape(told[name]) for name in names} == {(2, 16)}
    every = client.get(f"{base}/batch", params={"step": 9, "rows": 64}).json()
    assert np.mean(every["loss_per_token"]) == pytest.approx(told["loss"], rel=1e-4)
    assert told["loss_range"] == [np.min(every["loss_per_token"]), np.max(every["loss_per_token"])]
    assert client.get(f"{base}/batch", params={"step": 9, "rows": 65}).status_code == 400
    far = client.get(f"{base}/batch", params={"step": 9, "row": 10**9}).json()
    assert (far["row"], far["rows"]) == (3, 1)


def test_a_token_tells_the_ten_tensors_it_moved_most(replayed):
    client, base, folder = replayed
    told = client.get(f"{base}/token", params={"step": 9, "position": "2,7"}).json()
    assert (told["state"], told["step"], told["position"]) == ("ready", 9, [2, 7])
    assert told["tensors"] == [{**one, "finite": True} for one in Replay.open(folder, 9).token(2, 7)[:10]]
    assert len(told["tensors"]) == 10
    for position, status, key in (
        ("4,0", 404, "view.no_token"),
        ("0,16", 404, "view.no_token"),
        ("3", 400, "view.position"),
        ("", 400, "view.position"),
        ("1,2,3", 400, "view.too_many"),
        ("-1,0", 400, "view.between"),
        ("a,0", 400, "view.between"),
    ):
        answer = client.get(f"{base}/token", params={"step": 9, "position": position})
        assert (answer.status_code, answer.json()["error"]["key"]) == (status, key)
    assert "4 × 16" in client.get(f"{base}/token", params={"step": 9, "position": "4,0"}).text


def test_a_loss_that_is_not_finite_is_told_from_one_that_does_not_count(replayed, monkeypatch):
    client, base, _ = replayed
    opened = Replay.open

    def spoilt(folder, step):
        found = opened(folder, step)
        batch = found.step_info["batch"]
        batch["loss"][2][3], batch["loss"][1][0], batch["grad_norm"][1][5] = "NaN", 0.0, "Infinity"
        batch["targets"][1][0] = -100
        return found

    monkeypatch.setattr(Replay, "open", spoilt)
    told = client.get(f"{base}/batch", params={"step": 9, "row": 1, "rows": 2}).json()
    assert told["loss_per_token"][1][3] is None
    assert told["loss_per_token"][0][0] is None
    assert told["loss_not_finite"] == [[2, 3]]
    assert told["grad_not_finite"] == [[1, 5]]
    assert told["loss_range"][0] > 0  # the zero of a target that does not count is no loss
    figure = client.get(f"{base}/figure/batch-loss", params={"step": 9}).json()["figure"]
    assert min(y for trace in figure["data"] for y in trace["y"] if y is not None) > 0


def test_figures_of_a_replay_speak_both_languages(replayed):
    client, base, _ = replayed
    query = {"step": 9, "tensor": TENSOR, "index": "3,5"}
    for name in ("batch-loss", "shares", "waterfall"):
        for language in ("en", "zh"):
            told = client.get(f"{base}/figure/{name}", params={**query, "lang": language}).json()
            assert told["empty"] is None
            assert told["caption"]


def test_a_run_that_cannot_be_replayed_says_why(client, identity):
    answer = client.post(f"/api/runs/{identity}/replay", json={"step": 3}, headers=OWN)
    assert answer.status_code == 409
    assert answer.json()["error"]["key"] == "view.not_replayable"


def test_the_page_never_imports_torch(runs):
    import subprocess

    code = (
        "import sys; from pathlib import Path; from clinometer.view.http.server import make_app;"
        "import clinometer.commands.view, clinometer.view.report;"
        f"make_app(Path({str(runs)!r})); sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0

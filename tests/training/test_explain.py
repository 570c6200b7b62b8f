"""`clinometer explain`: what a person reads, what a program reads, and what either gets for a mistake."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from clinometer.commands import explain
from clinometer.commands.explain import explain_command
from clinometer.record.replays.replays import Replay, replayed_steps
from clinometer.training.run import prepare
from clinometer.training.run.loop import Outcome, train
from clinometer.training.run.run_folder import RunFolder
from tests.training.conftest import Silent, assert_refused, small_config

NAME = "layers.0.attn.q_proj.weight"


@pytest.fixture
def run(corpus, tmp_path):
    session = prepare.start(small_config(corpus, sample_tokens=0), tmp_path / "run", Silent())
    assert train(session, Silent()) is Outcome.DONE
    session.close()
    return tmp_path / "run"


def test_a_step_is_summed_up_in_both_languages(call, run):
    code, out, err = call("explain", run, "--step", 9)
    assert code == 0, err
    assert f"Step 9 of {run}" in out
    assert "bit for bit" in out
    assert "To first order this whole step changes the loss by" in out
    assert "learning rate" in out
    row = next(row for row in RunFolder(run).metrics() if row["step"] == 9)
    assert f"{row['grad_norm']:#.4g}" in out
    code, out, _ = call("--language", "zh", "explain", run, "--step", 9)
    assert code == 0
    assert "第 9 步" in out
    assert "逐位相同" in out


def test_a_weight_is_explained_in_both_languages_and_kept(call, run):
    code, out, err = call("explain", run, "--step", 20, "--parameter", NAME, "--index", "3,5")
    assert code == 0, err
    assert f"{NAME}[3, 5], step 20 (AdamW)" in out
    assert f"Who pushed {NAME}[3, 5]?" in out
    code, out, _ = call(
        "--language", "zh", "explain", run, "--step", 20, "--parameter", NAME, "--index=-13,-11"
    )
    assert code == 0
    assert f"{NAME}[3, 5]，第 20 步（AdamW）" in out
    told = Replay.open(run, 20).weight(NAME, (3, 5))
    assert told["index"] == [3, 5]
    assert f"{NAME}[3, 5], step 20 (AdamW)" in told["anatomy_text"]["en"]
    assert f"谁推动了 {NAME}[3, 5]" in told["attribution_text"]["zh"]


def test_rows_and_whole_tensors_are_explained(call, run):
    code, out, _ = call("explain", run, "--step", 20, "--parameter", NAME, "--index", "[3]")
    assert code == 0
    assert f"{NAME}[3], step 20 (AdamW)" in out
    code, out, _ = call("explain", run, "--step", 20, "--parameter", "ln_final.weight")
    assert code == 0
    assert "ln_final.weight (16)" in out
    assert Replay.open(run, 20).weight(NAME, (3,)) is not None
    assert Replay.open(run, 20).weight("ln_final.weight", ()) is not None


def test_a_replayed_step_is_used_again_unless_it_was_touched(call, run, monkeypatch):
    replays = []
    replay_step = explain.replay_step
    monkeypatch.setattr(explain, "replay_step", lambda *a, **k: replays.append(a[1]) or replay_step(*a, **k))
    for expected in (1, 1):
        assert call("explain", run, "--step", 20)[0] == 0
        assert len(replays) == expected
    path = Replay.open(run, 20).path
    told = (path / "step.json").read_text()
    tensors = (path / "tensors.safetensors").read_bytes()
    (path / "step.json").write_text(told.replace('"taken": true', '"taken": false'))
    assert call("explain", run, "--step", 20)[0] == 0
    assert len(replays) == 2
    (path / "tensors.safetensors").write_bytes(tensors[:-8] + b"\0" * 7 + b"\1")
    assert call("explain", run, "--step", 20)[0] == 0
    assert len(replays) == 3
    assert (path / "tensors.safetensors").read_bytes() == tensors


def test_an_inexact_replay_is_refused_or_says_so_and_is_never_used_as_exact(call, run):
    rows = (run / "metrics.jsonl").read_text().splitlines()
    changed = [
        json.dumps(row | {"loss": row["loss"] * 1.001})
        if (row := json.loads(r)).get("step") == 3 and "loss" in row
        else r
        for r in rows
    ]
    (run / "metrics.jsonl").write_text("\n".join(changed) + "\n")
    assert_refused(call("explain", run, "--step", 5), "Step 3", "--inexact")
    assert replayed_steps(run) == []
    for language, words in (("zh", "不精确"), ("en", "not exact")):
        code, out, _ = call("--language", language, "explain", run, "--step", 5, "--inexact")
        assert code == 0
        assert words in out
        assert "bit for bit" not in out
        assert "逐位相同" not in out
    assert_refused(call("explain", run, "--step", 5), "Step 3")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step", "0"], ["1 to 20"]),
        (["--step", "21"], ["21", "1 to 20"]),
        (["--step", "3", "--parameter", "layer.0.attn.q_proj.weight"], [NAME]),
        (["--step", "3", "--parameter", NAME, "--index", "16,0"], ["[16, 16]", "15,15"]),
        (["--step", "3", "--parameter", NAME, "--index", "0,0,0"], ["[16, 16]"]),
        (["--step", "3", "--parameter", NAME, "--index=-17,0"], ["[16, 16]", "[-17, 0]"]),
        (["--step", "3", "--parameter", NAME, "--index", "a"], ["3,5"]),
        (["--step", "3", "--index", "1,1"], ["--parameter"]),
    ],
)
def test_mistakes_are_said_before_any_work_is_done(call, run, monkeypatch, arguments, words):
    monkeypatch.setattr(explain, "replay_step", None)
    assert_refused(call("explain", run, *arguments), *words)
    code, out, err = call("explain", run, *arguments, "--machine")
    assert code == 2
    assert err == ""
    (line,) = out.splitlines()
    told = json.loads(line)
    assert set(told) == {"error", "key"}
    for word in words:
        assert word in told["error"]


def test_what_is_no_run_is_said(call, tmp_path):
    assert_refused(call("explain", tmp_path / "nowhere", "--step", "1"), "nowhere")
    assert_refused(call("explain", tmp_path, "--step", "1"), "config.toml")


def test_a_program_reads_lines_of_json(call, run):
    code, out, err = call("explain", run, "--step", 13, "--parameter", NAME, "--index", "0,0", "--machine")
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    stages = [line["stage"] for line in lines[:-1]]
    assert list(dict.fromkeys(stages)) == ["restore", "replay", "attribute"]
    for line in lines[:-1]:
        assert 0 <= line["progress"] <= line["total"]
    assert lines[-1] == {"done": str(run / "replays" / "step-00000013")}


def test_a_skipped_step_says_that_it_was_not_taken(console, run, monkeypatch):
    path = replay_with(run, monkeypatch, taken=False)
    assert explain_command(console, run, 20, NAME, "0,0") == 0
    text = " ".join(console.export_text().split())
    assert "not taken" in text
    assert "no weight moved" in text
    assert not (path / "weights").exists()


def replay_with(run, monkeypatch, **changes):
    """The replay of step 20 with these facts in place of its own."""
    path = explain.replay_step(run, 20, lambda *_: None)
    info = json.loads((path / "step.json").read_text()) | changes
    (path / "step.json").write_text(json.dumps(info))
    monkeypatch.setattr(explain, "find_replay", lambda *_: Replay.at(path))
    return path


@pytest.fixture
def console():
    from rich.console import Console

    return Console(record=True, width=120, file=open(os.devnull, "w", encoding="utf-8"))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_it_and_leaves_nothing(run, tmp_path, number, code):
    """A run made endless, so that the signal comes in the middle of the replay."""
    for path in (run / "checkpoints").iterdir():
        shutil.rmtree(path)
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time\n"
        "from clinometer.training.run import loop\n"
        "from clinometer.training.replay import replay\n"
        "take = loop.take_step\n"
        "replay.take_step = lambda *a, **k: (time.sleep(0.3), take(*a, **k))[1]\n"
        "from clinometer import cli\n"
        f"sys.argv = ['clinometer', 'explain', {str(run)!r}, '--step', '20', '--machine']\n"
        "from clinometer.commands.helpers import process_settings\n"
        "process_settings.restart_with_settings = lambda: None\n"
        "cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(slow)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("stage") == "replay":
            break
    time.sleep(0.5)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == code, err
    assert json.loads(out.splitlines()[-1])["key"] == "explain.stopped"
    assert "Traceback" not in err
    assert not (run / "replays").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_kill_while_writing_leaves_no_half_step(call, run, tmp_path):
    killed = tmp_path / "killed.py"
    killed.write_text(
        "import os, signal, sys\n"
        "from clinometer import whole_files\n"
        "whole_files.sync_folder = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from clinometer import cli\n"
        f"sys.argv = ['clinometer', 'explain', {str(run)!r}, '--step', '20']\n"
        "from clinometer.commands.helpers import process_settings\n"
        "process_settings.restart_with_settings = lambda: None\n"
        "cli.main()\n"
    )
    assert subprocess.run([sys.executable, str(killed)], check=False).returncode == -signal.SIGKILL
    assert [p.name.startswith(".step-00000020.") for p in (run / "replays").iterdir()] == [True]
    assert replayed_steps(run) == []
    assert call("explain", run, "--step", 20)[0] == 0
    assert replayed_steps(run) == [20]


@pytest.mark.soak
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_run_replays_bit_for_bit(clinometer, corpus, tmp_path, precision):
    from tests.training.conftest import small

    settings = small("--training.steps=30", "--training.compile=on", f"--training.precision={precision}")
    done = clinometer("train", "--corpus", corpus, "--run", "run", *settings, timeout=600)
    assert done.returncode == 0, done.stderr
    for step in (1, 5, 17, 30):
        done = clinometer(
            "explain", "run", "--step", step, "--parameter", NAME, "--index", "3,5", timeout=600
        )
        assert done.returncode == 0, done.stderr
        assert "bit for bit" in done.stdout

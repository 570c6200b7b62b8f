"""A run folder from somebody else: nothing outside of it is written, whatever its links and names say."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from clinometer.messages import InputError
from clinometer.record.write.recorder import Recorder
from clinometer.text.token_shards import TokenData
from clinometer.training.checkpoints import checkpoint, retention
from clinometer.training.replay.replay import replay_step
from clinometer.training.run import prepare
from clinometer.training.run.loop import train
from clinometer.training.run.run_folder import RunFolder
from clinometer.whole_files import write_whole
from tests.record.synthetic import synthetic
from tests.training.conftest import SENTENCES, Silent, small_config


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that can be gone on with; its corpus lies beside it."""
    root = tmp_path_factory.mktemp("links")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLINOMETER_CACHE", str(root / "cache"))
        corpus = root / "corpus.txt"
        corpus.write_text("\n".join(SENTENCES[i % 4] + f" {i * i}" for i in range(400)), encoding="utf-8")
        session = prepare.start(small_config(corpus, sample_tokens=0), root / "run", Silent())
        try:
            train(session, Silent())
        finally:
            session.close()
        yield root / "run"


@pytest.fixture
def place(tmp_path, stopped, monkeypatch):
    """A copy of that run, and somebody's own folder beside it with files that a link may lead to."""
    monkeypatch.setenv("CLINOMETER_CACHE", str(tmp_path / "cache"))
    shutil.copytree(stopped, tmp_path / "run")
    home = tmp_path / "home"
    (home / "step-00000003").mkdir(parents=True)
    (home / "step-00000003" / "state.json").write_text("{}")
    (home / "profile").write_text("export PATH\n" * 10_000)
    return tmp_path


def state_of(folder: Path) -> dict[str, str]:
    return {
        os.path.relpath(path, folder): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def replaced_by_link(path: Path, to: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.symlink_to(to)


@pytest.mark.parametrize(
    ("name", "to"),
    [
        (".lock", "profile"),
        ("metrics.jsonl", "profile"),
        ("skipped.jsonl", "profile"),
        ("checkpoints", "."),
        ("samples", "."),
        ("corpus.txt", "profile"),
        ("tokens", "."),
        ("metrics.jsonl", "not-there-yet"),
    ],
)
def test_a_run_whose_file_is_a_link_is_not_gone_on_with(place, name, to):
    before = state_of(place / "home")
    replaced_by_link(place / "run" / name, place / "home" / to)
    with pytest.raises(InputError) as caught:
        prepare.resume(place / "run", None, Silent())
    assert caught.value.key == "foreign.link"
    for language in ("en", "zh"):
        assert name in caught.value.render(language)
    assert state_of(place / "home") == before


@pytest.mark.parametrize("name", ["run.sqlite", "run.sqlite-wal", "run.sqlite-journal", ".run.sqlite.lock"])
def test_a_record_that_is_a_link_is_not_written(place, name):
    synthetic(place / "home" / "other", 20, 0)
    folder = synthetic(place / "record", 20, 0)
    before = state_of(place / "home")
    to = place / "home" / ("other/run.sqlite" if name == "run.sqlite" else "profile")
    replaced_by_link(folder / name, to)
    with pytest.raises(InputError) as caught:
        Recorder(folder, continue_from=10)
    assert caught.value.key == "foreign.link"
    assert state_of(place / "home") == before


def test_replays_that_are_a_link_are_kept_elsewhere_and_nothing_there_is_pruned(place):
    for step in range(4, 9):
        shutil.copytree(place / "home" / "step-00000003", place / "home" / f"step-{step:08d}")
    before = state_of(place / "home")
    (place / "run" / "replays").symlink_to(place / "home")
    replay_step(place / "run", 9, lambda stage, done, total: None)
    assert state_of(place / "home") == before
    assert list((place / "cache" / "replays").glob("*/step-00000009/step.json"))


def test_a_file_that_is_written_whole_replaces_a_link_and_does_not_follow_it(place):
    before = state_of(place / "home")
    config = place / "run" / "config.toml"
    replaced_by_link(config, place / "home" / "profile")
    partial = config.with_name(f".config.toml.{os.getpid()}.tmp")
    partial.symlink_to(place / "home" / "profile")
    write_whole(config, "[training]\n")
    assert config.read_text() == "[training]\n"
    assert not config.is_symlink()
    assert state_of(place / "home") == before


def test_a_checkpoint_that_is_a_link_is_not_pruned_through(place):
    folder = place / "run" / "checkpoints"
    for step in (1, 2):
        (folder / f"step-{step:08d}").symlink_to(place / "home" / "step-00000003")
    before = state_of(place / "home")
    retention.prune(folder, 1, None)
    assert state_of(place / "home") == before


@pytest.mark.parametrize(
    "name", ["../home/profile", "/etc/passwd", "..", "a/b", "model.safetensors/../x", ""]
)
def test_names_in_a_checkpoint_lead_nowhere(place, name):
    (saved,) = checkpoint.checkpoints(place / "run" / "checkpoints")[-1:]
    state = json.loads((saved / "state.json").read_text())
    state["files"][name] = next(iter(state["files"].values()))
    state.pop("sha256")
    state["sha256"] = checkpoint.digest(state)
    (saved / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError) as caught:
        checkpoint.read_state(saved)
    assert caught.value.key == "checkpoint.malformed"


@pytest.mark.parametrize("name", ["../home/profile", "/etc/passwd", "..", "a/b", "", "n" * 5000, "\0"])
def test_names_in_a_header_of_shards_lead_nowhere(made, tmp_path, name):
    shutil.copytree(made["shards"].good, tmp_path / "shards")
    file = tmp_path / "shards" / "header.json"
    header = json.loads(file.read_text())
    header["train"][0]["file"] = name
    file.write_text(json.dumps(header))
    with pytest.raises(InputError) as caught:
        TokenData.open(tmp_path / "shards")
    assert caught.value.key == "text.shards_broken"


def test_a_run_folder_that_is_itself_a_link_is_gone_on_with(place):
    """Somebody's way to keep runs on another disk, and no trap: the user named it."""
    (place / "link").symlink_to(place / "run")
    folder = RunFolder.open(place / "link")
    folder.lock()
    folder.unlock()
